"""The parts of a model that a hypernetwork generates, that are sent, and that clients keep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.toolkit.layout import Layout, Slot, end_to_end


@dataclass(frozen=True)
class ModelPartition:
    """The partition of a client's model.

    whole: layout of the model: theta, then the personal classifier, then untrained tensors.
    sent: theta, then untrained tensors (running statistics, frozen weights).
    own: the personal classifier, which the client keeps; empty if there is none.
    """

    whole: Layout
    sent: Layout
    own: Layout

    @classmethod
    def of(cls, whole: Layout, *, personal_classifier: bool) -> ModelPartition:
        """Return the partition of a model; its classifier is the last trained layer.

        Raises:
            ProblemError: the classifier is the only trained layer, or weights are complex.
        """
        trained = [slot for slot in whole.weights if slot.start < whole.parameters]
        own: list[Slot] = []
        if personal_classifier:
            layer = trained[-1].name.rpartition(".")[0]
            while trained and trained[-1].name.rpartition(".")[0] == layer:
                own.insert(0, trained.pop())
            if not trained:
                raise ProblemError(
                    "personal_classifier: expected a model with more than one trained layer, "
                    "because the last one stays at the clients"
                )
        if any(slot.dtype.is_complex for slot in (*trained, *own)):
            raise ProblemError(
                "expected real weights, because a hypernetwork generates them; the model trains "
                "complex ones"
            )
        theta = sum(slot.size for slot in trained)
        sent = end_to_end([*trained, *whole.rest])
        return cls(
            whole,
            dataclasses.replace(whole, weights=sent, parameters=theta),
            Layout(end_to_end(own), (), sum(slot.size for slot in own)),
        )

    @property
    def theta(self) -> int:
        """Return the length of theta, the trained part of ``sent``."""
        return self.sent.parameters

    @property
    def shared(self) -> Layout:
        """Return the layout of the untrained tensors, the end of ``sent``."""
        rest = [dataclasses.replace(s, start=s.start - self.theta) for s in self.sent.rest]
        return Layout(tuple(rest), (), 0)

    def join(self, sent: Tensor, own: Tensor) -> Tensor:
        """Return a whole model's weights, float32 [whole.dim]."""
        return self.whole.flatten(self.sent.views(sent) | self.own.views(own))

    def part(self, weights: Tensor) -> Tensor:
        """Return the part of a whole model's weights that is sent, float32 [sent.dim]."""
        views = self.whole.views(weights)
        return self.sent.flatten({slot.name: views[slot.name] for slot in self.sent.weights})

    def kept(self, weights: Tensor) -> dict[str, Tensor]:
        """Return copies of the parameters that a client keeps, by name."""
        return self.own.views(weights[self.theta : self.whole.parameters].cpu().clone())
