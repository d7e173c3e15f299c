"""FedRep: Collins, Hassani, Mokhtari, Shakkottai,
"Exploiting Shared Representations for Personalized Federated Learning", ICML 2021.
"""  # noqa: D205 - the citation is the summary

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from fedmq.algorithms.base import Client
from fedmq.algorithms.personal.shared_body import SharedBody
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.toolkit.split_model import Split


@dataclass(frozen=True)
class FedRep(SharedBody):
    """Algorithm 1: train the head on the received body, then the body under that head.

    head_epochs: tau_h, passes over the local data with the body frozen; 10 in the paper.
    epochs: tau_phi, passes over the local data with the head frozen; 1 or 5 in the paper.
    final_head_epochs: passes with the body frozen before a client is evaluated; 10 in the paper,
        after the last round only. The result is discarded.
    head: number of the last trained layers that are the head; 1 in the paper.
    Other fields are FedAvg's and apply to both phases. The paper uses lr 0.01, momentum 0.5,
    weight decay 1e-4 (not on biases; here on all) and batches of 10.

    The paper's server takes the plain mean of the bodies; here the schedule decides the weight of
    a body, n_k under ``rounds``.
    """

    name: ClassVar[str] = "fedrep"

    head_epochs: Annotated[int, Field(ge=1)] = 10
    final_head_epochs: Annotated[int, Field(ge=0)] = 10

    def learn(self, model: Split, data: Examples, client: Client) -> None:
        """tau_h epochs of h with phi frozen, then tau_phi epochs of phi with h frozen."""
        model.fit("head", data, self.head_epochs, self.sgd_settings, client)
        model.fit("body", data, self.epochs, self.sgd_settings, client)

    def tune(self, model: Split, data: Examples, client: Client) -> None:
        """Refit the head to phi_t, which has changed since the client's last task."""
        model.fit("head", data, self.final_head_epochs, self.sgd_settings, client)
