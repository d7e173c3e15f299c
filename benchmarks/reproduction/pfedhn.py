"""pFedHN on clients with two classes: Shamsian, Navon, Fetaya, Chechik,
"Personalized Federated Learning using Hypernetworks", ICML 2021, section 5.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reproduction.runs import Cell, Outcome, Runs, Settings

CLIENTS, TASKS, BATCH = 20, 1000, 64
EPOCHS = 3
STEPS = 48
"""K, the batches of 64 in FedAvg's three epochs of 1,024 images, the mean size of a client."""
WEIGHTS = 50_890
POINTS = 0.05
LOCAL: Mapping[str, Any] = {
    "lr": 5e-3, "momentum": 0.9, "weight_decay": 5e-5, "batch_size": BATCH,
}  # fmt: skip


def settings(algorithm: Mapping[str, Any], cohort: int, tasks: int = TASKS) -> Settings:
    """Return a run of ``tasks`` tasks in rounds of ``cohort`` clients."""
    rounds = tasks // cohort
    return Settings(
        run={"versions": rounds, "evaluate_every": max(1, rounds // 4)},
        problem={
            "name": "mnist",
            "model": "mlp",
            "clients": CLIENTS,
            "partition": "classes(2)",
            "examples": CLIENTS * BATCH * STEPS // EPOCHS,
        },
        algorithm={**LOCAL, **algorithm},
        schedule={"name": "rounds", "fraction": cohort / CLIENTS},
    )


FEDAVG: Mapping[str, Any] = {"name": "fedavg-ft", "finetune_epochs": 0, "epochs": EPOCHS}
"""Without fine-tuning this is FedAvg, evaluated by the clients."""
COHORTS = (1, 5)


@dataclass(frozen=True)
class AboveFedAvg(Cell):
    """pFedHN's mean accuracy on the clients' own test data against FedAvg's.

    tasks: number of pFedHN's tasks. FedAvg has `TASKS`, with one or with five clients per
        round; the better of the two counts.
    sent: number of weights in each of pFedHN's messages.
    options: pFedHN's other keys.
    """

    tasks: int
    sent: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, runs: Runs) -> Outcome:
        """Run pFedHN, one client per round as in the paper, and FedAvg twice."""
        algorithm = {"name": "pfedhn", "batches": STEPS, **self.options}
        ours = runs.result(settings(algorithm, 1, self.tasks))
        fedavg = {each: runs.result(settings(FEDAVG, each)).last for each in COHORTS}
        gain = ours.last - max(fedavg.values())
        # A message also holds names and shapes; phi, the hypernetwork, is 100 times larger.
        slim = max(ours.traffic.down, ours.traffic.up) < 4 * self.sent + 4096
        level = (
            f"FedAvg after {TASKS} tasks: {fedavg[1]:.2%} with one client per round, "
            f"{fedavg[5]:.2%} with five"
        )
        sizes = (
            f"bytes per message: {ours.traffic.down:,.0f} down, {ours.traffic.up:,.0f} up; "
            f"{self.sent:,} weights are {4 * self.sent:,}"
        )
        return Outcome(
            f"{ours.last:.2%}, {100 * gain:+.1f} points",
            gain >= POINTS and slim,
            {
                "accuracy": ours.last,
                "fedavg_1_accuracy": fedavg[1],
                "fedavg_5_accuracy": fedavg[5],
                "task_bytes": ours.traffic.down,
                "result_bytes": ours.traffic.up,
                "run_s": ours.seconds,
            },
            (level, sizes),
        )


CELLS: tuple[Cell, ...] = (
    AboveFedAvg(
        "pfedhn-two-class",
        "99.28% (MNIST, 50 clients), 5000 rounds",
        "5 points above FedAvg, messages of 4d bytes",
        TASKS,
        WEIGHTS,
    ),
    AboveFedAvg(
        "pfedhn-pc-two-class",
        "above pFedHN (CIFAR-10, 10 to 100 clients)",
        f"5 points above FedAvg in {400 / TASKS:.0%} of the tasks",
        400,
        WEIGHTS - 650,
        {"personal_classifier": True},
    ),
)
