"""Personalised accuracy: Fallah, Mokhtari, Ozdaglar, NeurIPS 2020, "Personalized Federated
Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach", MNIST.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproduction.runs import Cell, Outcome, Result, Runs, Settings

VARIANTS = ("fedavg", "fo", "hf")
NAMES = {"fedavg": "FedAvg+update", "fo": "FO", "hf": "HF"}
"""The paper's names, in the order of the expected accuracies."""
ROUNDS = 1000
GAP = 0.02
"""Smallest accepted gain of HF over FedAvg+update."""
_POINTS = 20
_LATE = 5


def settings(rounds: int = ROUNDS, **algorithm: Any) -> Settings:
    """Return the paper's setting: 50 users, a fifth per round, tau = 10, batches of 40."""
    return Settings(
        run={"versions": rounds, "evaluate_every": max(1, rounds // _POINTS)},
        problem={
            "name": "mnist",
            "model": "mlp-elu",
            "clients": 50,
            "partition": "fallah(196)",
        },
        algorithm={
            "name": "perfedavg",
            "lr": 0.001,
            "inner_lr": 0.01,
            "steps": 10,
            "batch_size": 40,
            **algorithm,
        },
        schedule={"name": "rounds", "fraction": 0.2},
    )


@dataclass(frozen=True)
class Order(Cell):
    """The mean accuracy of all users, each after one step on its own training examples."""

    def measure(self, runs: Runs) -> Outcome:
        """Run all three, with the same cohorts and the same first model."""
        results = {each: runs.result(settings(variant=each)) for each in VARIANTS}
        late = {each: result.late(_LATE) for each, result in results.items()}
        ordered = late["fedavg"] < late["fo"] < late["hf"]
        lines = [f"{NAMES[each]:<14} {_course(result)}" for each, result in results.items()]
        return Outcome(
            " < ".join(f"{late[each]:.1%}" for each in sorted(late, key=lambda key: late[key])),
            ordered and late["hf"] - late["fedavg"] >= GAP,
            {f"{each}.accuracy": late[each] for each in VARIANTS}
            | {f"{each}.last_accuracy": results[each].last for each in VARIANTS}
            | {f"{each}.run_s": results[each].seconds for each in VARIANTS},
            lines,
        )


CELLS: tuple[Cell, ...] = (
    Order(
        "perfedavg",
        "FedAvg+update < FO < HF",
        f"in this order at round {ROUNDS}, HF {100 * GAP:g} points above FedAvg+update",
    ),
)


def _course(result: Result) -> str:
    every = max(1, _POINTS // 4)
    return ", ".join(f"{accuracy:.1%} at {version}" for version, accuracy in result.curve[::every])
