"""A shared body and personal heads: Collins, Hassani, Mokhtari, Shakkottai, ICML 2021,
"Exploiting Shared Representations for Personalized Federated Learning", table 1.

The paper has no MNIST column. Its claim is held against ours at its own setting (10 of 100
clients a round, 10 + 1 epochs, batches of 10, lr 0.01, momentum 0.5), on clients with five
digits and 60 to 100 images each; with two digits, local training alone is above 98 %.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproduction.runs import Cell, Outcome, Runs, Settings

ROUNDS, EVERY = 50, 10
MODEL = "mlp"
HEAD_EPOCHS, BODY_EPOCHS = 10, 1
ABOVE = 0.01
"""What FedRep must be above local training."""


def settings(algorithm: str, **options: Any) -> Settings:
    """Return one of the algorithms in the common setting."""
    return Settings(
        run={"versions": ROUNDS, "evaluate_every": EVERY},
        problem={
            "name": "mnist",
            "model": MODEL,
            "clients": 100,
            "partition": "classes(5, 60, 100)",
        },
        algorithm={"name": algorithm, "lr": 0.01, "momentum": 0.5, "batch_size": 10, **options},
        schedule={"name": "rounds", "fraction": 0.1},
    )


FEDREP = settings(
    "fedrep", head_epochs=HEAD_EPOCHS, epochs=BODY_EPOCHS, final_head_epochs=HEAD_EPOCHS
)
OTHERS = {
    "local": settings("local", epochs=HEAD_EPOCHS + BODY_EPOCHS),
    "FedPer": settings("fedper", epochs=BODY_EPOCHS),
    "FedAvg+FT": settings("fedavg-ft", epochs=BODY_EPOCHS),
    "FedAvg+FT of the head": settings("fedavg-ft", epochs=BODY_EPOCHS, head=1),
}
"""All of them, FedRep too, go over the local data ten more times before they are evaluated."""


@dataclass(frozen=True)
class Against(Cell):
    """FedRep's mean local accuracy after the last round, less another's.

    other: of `OTHERS`.
    least: what the difference must be; None where it only stands beside the paper's.
    """

    other: str
    least: float | None = None

    def measure(self, runs: Runs) -> Outcome:
        """Run both."""
        ours, other = runs.result(FEDREP), runs.result(OTHERS[self.other])
        gain = ours.last - other.last
        text = f"{ours.last:.2%}, {self.other} {other.last:.2%}"
        figures = {"accuracy": ours.last, "other_accuracy": other.last, "gain": gain}
        return Outcome(text, None if self.least is None else gain >= self.least, figures)


CELLS: tuple[Cell, ...] = (
    Against(
        "fedrep-local",
        "75.68, local 70.68 (table 1, CIFAR-10, 5)",
        f"at least {100 * ABOVE:g} point above local",
        "local",
        ABOVE,
    ),
    Against(
        "fedrep-ft", "75.68, FT 73.68 (table 1, CIFAR-10, 5)", "at or above FT", "FedAvg+FT", 0.0
    ),
    Against("fedrep-ft-head", "as fedrep-ft", "", "FedAvg+FT of the head"),
    Against("fedrep-fedper", "75.68, FedPer 73.84 (table 1)", "", "FedPer"),
)
