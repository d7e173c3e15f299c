"""Which part of a model a hypernetwork makes, which travels, and which a client keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.toolkit.layout import Layout, Slot, end_to_end


@dataclass(frozen=True)
class ModelPartition:
    """How a client's model is divided.

    whole: all of it; its parameters are theta, then the classifier that the client keeps.
    sent: what travels: theta, then what is not trained (running statistics, frozen weights).
    own: the classifier; empty unless it is personal.
    """

    whole: Layout
    sent: Layout
    own: Layout

    @classmethod
    def of(cls, whole: Layout, *, personal_classifier: bool) -> ModelPartition:
        """Return how a model is divided; its classifier is its last layer that is trained.

        Raises:
            ProblemError: nothing would be left to send.
        """
        trained = [slot for slot in whole.weights if slot.start < whole.parameters]
        own: list[Slot] = []
        if personal_classifier:
            layer = trained[-1].name.rpartition(".")[0]
            while trained and trained[-1].name.rpartition(".")[0] == layer:
                own.insert(0, trained.pop())
            if not trained:
                raise ProblemError(
                    "personal_classifier keeps the model's last layer at the clients, "
                    "and the problem's model has no other"
                )
        if any(slot.dtype.is_complex for slot in (*trained, *own)):
            raise ProblemError("a hypernetwork makes real numbers, the model trains complex ones")
        theta = sum(slot.size for slot in trained)
        sent = end_to_end([*trained, *whole.rest])
        return cls(
            whole,
            dataclasses.replace(whole, weights=sent, parameters=theta),
            Layout(end_to_end(own), (), sum(slot.size for slot in own)),
        )

    @property
    def theta(self) -> int:
        """Return the length of theta, the trained part of what travels."""
        return self.sent.parameters

    @property
    def shared(self) -> Layout:
        """Return the order of what travels and is not trained: the end of ``sent``."""
        rest = [dataclasses.replace(s, start=s.start - self.theta) for s in self.sent.rest]
        return Layout(tuple(rest), (), 0)

    def join(self, sent: Tensor, own: Tensor) -> Tensor:
        """Return a whole model's weights, float32 [whole.dim]."""
        return self.whole.flatten(self.sent.views(sent) | self.own.views(own))

    def part(self, weights: Tensor) -> Tensor:
        """Return what travels of a whole model's weights, float32 [sent.dim]."""
        views = self.whole.views(weights)
        return self.sent.flatten({slot.name: views[slot.name] for slot in self.sent.weights})

    def kept(self, weights: Tensor) -> dict[str, Tensor]:
        """Return copies of what a client keeps of its parameters, by name."""
        return self.own.views(weights[self.theta : self.whole.parameters].cpu().clone())
