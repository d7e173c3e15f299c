"""Coarse downloads, and the whole pipeline: Caldas, Konecny, McMahan, Talwalkar 2018,
"Expanding the Reach of Federated Learning by Reducing Client Resource Requirements".
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmq.algorithms.problems import Problem, load_problem
from fedmq.algorithms.toolkit.sgd import evaluate_module
from fedmq.codecs.base import MAX_DECODED_BYTES
from fedmq.codecs.registry import make_codec
from fedmq.nodes.run.config import load
from reproduction.fedavg import CNN_EVERY, CNN_IID, CNN_ROUNDS, settings
from reproduction.runs import Cell, Outcome, Runs

WAYS: Mapping[str, str] = {
    "I": "identity | quantize({bits}, 1048576)",
    "HD": "hadamard(4096) | quantize({bits})",
    "K": "kashin(4096) | quantize({bits})",
    "I/4096": "identity | quantize({bits})",
}
"""As in the paper, values that are transformed together share a minimum and a maximum: a
block, or without a basis a layer (of up to 2^20 values). I/4096 has them for every block."""
BITS = (1, 2, 3, 4, 8)
ORDERED_BITS = (1, 2, 3, 4)
EPOCHS, BATCH, LR = 2, 50, 0.1

KEEP = 0.75
DOWN = "limit(500) | kashin(4096) | quantize(4)"
UP = "limit(500) | kashin(4096) | quantize(2)"
"""``limit(500)`` includes the first layer's 600 weights: as float32 they are 1 % of the upload."""
TIMES_DOWN, TIMES_UP, POINTS = 13.0, 26.0, 0.003
LATE = 5


@dataclass(frozen=True)
class OneShot(Cell):
    """Accuracy of a trained model after one encoding, by bits and basis."""

    def measure(self, runs: Runs) -> Outcome:
        """Train a CNN on all examples in one place, then encode it once with each codec."""
        keys = [f"problem.{key}={each}" for key, each in CNN_IID.problem.items()]
        problem = load_problem(load(None, [*keys, *runs.overrides]).problem, runs.seed)
        model = trained(problem, runs.seed)
        weights = {name: each.detach().clone() for name, each in model.state_dict().items()}
        plain = evaluate_module(model, problem, "cpu")["accuracy"]
        figures = {"accuracy": plain}
        lines = [f"not encoded: {plain:.2%}; accuracy, NMSE, bytes by bits and basis:"]
        for bits in BITS:
            row = []
            for short, spec in WAYS.items():
                decoded, nmse, size = encode_once(weights, spec.format(bits=bits), runs.seed)
                model.load_state_dict(decoded)
                accuracy = evaluate_module(model, problem, "cpu")["accuracy"]
                key = f"{short}.{bits}"
                figures |= {f"{key}.accuracy": accuracy, f"{key}.nmse": nmse, f"{key}.bytes": size}
                row.append(f"{short} {accuracy:6.2%} {nmse:8.2g} {size:>9,}")
            lines.append(f"q={bits}  " + "   ".join(row))
        ordered = all(
            figures[f"K.{bits}.nmse"] < figures[f"HD.{bits}.nmse"] < figures[f"I.{bits}.nmse"]
            for bits in ORDERED_BITS
        )
        lost = plain - figures["K.4.accuracy"]
        ours = f"{'K < HD < I' if ordered else 'another order'}; {-100 * lost:+.2f} points"
        return Outcome(ours, ordered and lost <= POINTS, figures, lines)


@dataclass(frozen=True)
class Combined(Cell):
    """Federated Dropout with lossy codecs both ways against FedAvg, after the same rounds.

    absent: the algorithm's rule for coordinates that a client did not receive; the paper's
        is ``zero``.
    """

    absent: str

    def measure(self, runs: Runs) -> Outcome:
        """Run both; FedAvg's run is that of the cell cnn-iid."""
        plain = runs.result(CNN_IID)
        ours = runs.result(
            settings(
                "cnn",
                "iid",
                CNN_ROUNDS,
                algorithm="feddropout",
                lr=CNN_IID.algorithm["lr"],
                every=CNN_EVERY,
                keep=KEEP,
                absent=self.absent,
                codec={"down": DOWN, "up": UP},
            )
        )
        down, up = plain.traffic.down / ours.traffic.down, plain.traffic.up / ours.traffic.up
        sockets_down = plain.traffic.sockets_down / ours.traffic.sockets_down
        sockets_up = plain.traffic.sockets_up / ours.traffic.sockets_up
        gain = ours.late(LATE) - plain.late(LATE)
        level = (
            f"accuracy, mean of the last {LATE} evaluations: {ours.late(LATE):.2%}, plain "
            f"{plain.late(LATE):.2%}; of the last one: {ours.last:.2%}, plain {plain.last:.2%}"
        )
        sizes = (
            f"bytes per client and round: {ours.traffic.down:,.0f} down, "
            f"{ours.traffic.up:,.0f} up; "
            f"plain {plain.traffic.down:,.0f} and {plain.traffic.up:,.0f}"
        )
        sockets = (
            f"at the workers' sockets, where a node of 50 clients fetches the plain model only "
            f"once: {sockets_down:.2f}x down, {sockets_up:.2f}x up"
        )
        return Outcome(
            f"{down:.2f}x down, {up:.2f}x up, {100 * gain:+.2f} points",
            down >= TIMES_DOWN and up >= TIMES_UP and gain >= -POINTS,
            {
                "times_down": down,
                "times_up": up,
                "sockets_times_down": sockets_down,
                "sockets_times_up": sockets_up,
                "accuracy": ours.late(LATE),
                "plain_accuracy": plain.late(LATE),
                "last_accuracy": ours.last,
                "plain_last_accuracy": plain.last,
                "run_s": ours.seconds,
                "plain_run_s": plain.seconds,
            },
            (level, sizes, sockets),
        )


_COMBINED_BAR = f"{TIMES_DOWN:g}x down, {TIMES_UP:g}x up, within 0.3 points"

CELLS: tuple[Cell, ...] = (
    OneShot(
        "one-shot",
        "4 bits with K lose nothing; K best at 1, 2",
        "NMSE K < HD < I at 1 to 4 bits; K at 4 bits within 0.3 points",
    ),
    Combined("combined", "14x down, 28x up, no loss (abstract)", _COMBINED_BAR, absent="zero"),
)
MORE: tuple[Cell, ...] = (
    Combined("combined-holders", "the same, by the other rule", _COMBINED_BAR, absent="holders"),
)


def trained(problem: Problem, seed: int) -> torch.nn.Module:
    """Return the problem's model after SGD on the examples of all clients together."""
    parts = [problem.client(client) for client in range(problem.clients)]
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(y), generator=order), BATCH):
            optimizer.zero_grad()
            problem.loss(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call] # torch's
            optimizer.step()
    return model


def encode_once(
    weights: Mapping[str, Tensor], spec: str, seed: int
) -> tuple[dict[str, Tensor], float, int]:
    """Encode and decode weights layer by layer, as in the paper.

    Returns:
        The decoded weights, their normalised squared error, and the encoded bytes.
    """
    codec = make_codec(spec)
    decoded: dict[str, Tensor] = {}
    size = 0
    for index, (name, tensor) in enumerate(weights.items()):
        encoded = codec.encode({name: tensor}, seed + index)
        decoded |= codec.decode(encoded, MAX_DECODED_BYTES)
        size += encoded.nbytes
    error = sum(float((decoded[name] - each).square().sum()) for name, each in weights.items())
    return decoded, error / sum(float(w.square().sum()) for w in weights.values()), size
