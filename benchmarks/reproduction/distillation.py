"""Distilling instead of averaging, with and without generated samples: Jeong et al. 2018,
"Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation
under Non-IID Private Data", Table 1.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reproduction.runs import Cell, Outcome, Runs, Settings

ROUNDS = 16
"""The paper's maximum; with FAug they follow its two phases."""
PHASES = 2
LATE = 3
"""Accuracies are means over this many last rounds and all devices, on the whole test set."""
DISTILLING, AVERAGING = "fd", "fedavg"
AUGMENTING = "faug"
PUBLIC = "codistillation"
POINTS = 0.002
"""Smallest accepted gain of distilling over training alone; 0.007 to 0.013 on mnist-mini."""


def settings(
    algorithm: str,
    *,
    devices: int,
    model: str,
    lr: float,
    phases: int = 0,
    public: int = 0,
    **options: Any,
) -> Settings:
    """Return the paper's setting: 2,000 MNIST images per device, only 5 of each of three labels.

    Args:
        algorithm: name of the algorithm.
        devices: M.
        model: model of every device.
        lr: eta; the paper does not state it.
        phases: rounds before the first training round.
        public: number of shared examples, for co-distillation.
        options: other keys of the algorithm.
    """
    chosen: dict[str, Any] = {"name": algorithm, "lr": lr, "batch_size": 64, **options}
    problem = {
        "name": "mnist",
        "model": model,
        "clients": devices,
        "partition": "targets(3, 5)",
        "examples": 2000 * devices,
    }
    if public:
        problem["public"] = public
    return Settings(
        run={"versions": ROUNDS + phases, "evaluate_every": 1},
        problem=problem,
        algorithm=chosen,
        schedule={"name": "rounds", "fraction": 1.0},
        codec={"logits": "logits(float32)", "features": "features(int8, none)"},
    )


@dataclass(frozen=True)
class Ordering(Cell):
    """Training alone, FD, FD+FAug, FL and FL+FAug in one setting.

    devices, model, lr: the same for all five.
    iterations: n, local steps per round; for FL the nearest number of whole epochs.
    gan_steps: training steps of the generator.
    """

    devices: int
    model: str
    lr: float
    iterations: int
    gan_steps: int

    def measure(self, runs: Runs) -> Outcome:
        """Run all five."""
        common: dict[str, Any] = {"devices": self.devices, "model": self.model, "lr": self.lr}
        steps = {"iterations": self.iterations}
        faug = {**common, **steps, "phases": PHASES, "gan_steps": self.gan_steps}
        epochs = max(1, round(self.iterations / (2000 // 64 + 1)))
        results = {
            "alone": runs.result(settings(DISTILLING, gamma=0.0, **common, **steps)),
            "fd": runs.result(settings(DISTILLING, gamma=0.5, **common, **steps)),
            "fd_faug": runs.result(settings(AUGMENTING, then="fd", gamma=0.5, **faug)),
            "fl": runs.result(settings(AVERAGING, epochs=epochs, momentum=0.0, **common)),
            "fl_faug": runs.result(settings(AUGMENTING, then="fedavg", **faug)),
        }
        late = {name: each.late(LATE) for name, each in results.items()}
        met = (
            late["fd"] >= late["alone"] + POINTS
            and late["fd_faug"] > late["fd"]
            and late["fl_faug"] > late["fd_faug"]
        )
        down, up = results["fd"].traffic.down, results["fd"].traffic.up
        level = (
            f"alone {late['alone']:.2%}, FD {late['fd']:.2%}, FD+FAug {late['fd_faug']:.2%}, "
            f"FL {late['fl']:.2%}, FL+FAug {late['fl_faug']:.2%}: means of the last {LATE} rounds"
        )
        sizes = (
            f"FD: {ROUNDS * (down + up):,.0f} bytes per device, messages and tensors; the "
            f"paper counts {4 * 2 * ROUNDS * 10 * 10:,}"
        )
        figures = {f"{name}_accuracy": each for name, each in late.items()}
        figures |= {f"{name}_s": each.seconds for name, each in results.items()}
        figures |= {"fd_bytes_down": down, "fd_bytes_up": up}
        gain, filled = late["fd"] - late["alone"], late["fd_faug"] - late["fd"]
        return Outcome(
            f"FD {100 * gain:+.2f} points, FAug {100 * filled:+.2f}", met, figures, (level, sizes)
        )


@dataclass(frozen=True)
class ByLabel(Cell):
    """FD against co-distillation, which sends its outputs by sample.

    devices, model, lr, iterations: the same for both.
    public: number of shared samples.
    """

    devices: int
    model: str
    lr: float
    iterations: int
    public: int

    def measure(self, runs: Runs) -> Outcome:
        """Run both."""
        common: dict[str, Any] = {"devices": self.devices, "model": self.model, "lr": self.lr}
        common |= {"iterations": self.iterations, "gamma": 0.5}
        fd = runs.result(settings(DISTILLING, **common))
        by_sample = runs.result(settings(PUBLIC, public=self.public, **common))
        times = (by_sample.traffic.down + by_sample.traffic.up) / (fd.traffic.down + fd.traffic.up)
        return Outcome(
            f"{times:.1f}x the bytes; {by_sample.late(LATE):.2%}, FD {fd.late(LATE):.2%}",
            times >= 10,
            {
                "times": times,
                "accuracy": by_sample.late(LATE),
                "fd_accuracy": fd.late(LATE),
                "run_s": by_sample.seconds,
                "fd_run_s": fd.seconds,
            },
        )


_BAR = "alone < FD < FD+FAug < FL+FAug"
_PAPER = "FD .75, FD+FAug .86, FL .91, FL+FAug .93 (Table 1, M = 10)"

CELLS: tuple[Cell, ...] = (
    Ordering(
        "distillation", _PAPER, _BAR, devices=4, model="mlp-elu", lr=0.05, iterations=100,
        gan_steps=1000,
    ),
    ByLabel(
        "codistillation", "outputs by sample cost more (section 2)", "at least 10x the bytes",
        devices=4, model="mlp-elu", lr=0.05, iterations=50, public=1000,
    ),
    # The paper's CNN takes 70 ms per step on one core; M = 2 has the fewest steps.
    Ordering(
        "distillation-full", "FD .72, FD+FAug .85, FL .81, FL+FAug .91 (Table 1, M = 2)", _BAR,
        devices=2, model="fd-cnn", lr=0.01, iterations=250, gan_steps=5000, hours=True,
    ),
)  # fmt: skip
