"""FedPer: Arivazhagan, Aggarwal, Singh, Choudhary,
"Federated Learning with Personalization Layers", 2019.
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
class FedPer(SharedBody):
    """SGD trains body and head together; only the body is averaged.

    head: K_P, number of the last trained layers that are personal.
    finetune_epochs: passes over the local data, of body and head together, before a client is
        evaluated; the result is discarded. With 0, a client that never trained is evaluated with
        the first head.
    Other fields are FedAvg's.
    """

    name: ClassVar[str] = "fedper"

    finetune_epochs: Annotated[int, Field(ge=0)] = 10

    def learn(self, model: Split, data: Examples, client: Client) -> None:
        """Train all parameters for E epochs."""
        model.fit("both", data, self.epochs, self.sgd_settings, client)

    def tune(self, model: Split, data: Examples, client: Client) -> None:
        """Fit all parameters, as in training."""
        model.fit("both", data, self.finetune_epochs, self.sgd_settings, client)
