"""All algorithms by the name that a configuration uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

from fedmq.algorithms.allowed import NOTHING, Allowed, installed, resolve
from fedmq.algorithms.base import Algorithm, AnyAlgorithm
from fedmq.algorithms.distillation.codistillation import Codistillation
from fedmq.algorithms.distillation.fd import Distillation
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.faug.algorithm import FAug
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.feddropout.algorithm import FedDropout
from fedmq.algorithms.fedgkt.algorithm import FedGKT
from fedmq.algorithms.fedprox import FedProx
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.mocha.algorithm import Mocha
from fedmq.algorithms.personal.fedavg_finetune import FedAvgFT, LocalOnly
from fedmq.algorithms.personal.fedper import FedPer
from fedmq.algorithms.personal.fedrep import FedRep
from fedmq.algorithms.personal.perfedavg import PerFedAvg
from fedmq.algorithms.personal.personalised_fedavg import PersonalisedFedAvg
from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.codecs.text import unknown

ALGORITHMS: Mapping[str, type[AnyAlgorithm]] = {
    each.name: cast("type[AnyAlgorithm]", each)
    for each in (
        Codistillation,
        FAug,
        Distillation,
        FedAvg,
        FedAvgFT,
        FedDropout,
        FedGKT,
        FedPer,
        FedProx,
        FedRep,
        FedSGD,
        LocalOnly,
        Mocha,
        PFedHN,
        PerFedAvg,
        PersonalisedFedAvg,
    )
}
"""The built-in algorithms by the name that a configuration uses."""

ENTRY_POINTS = "fedmq.algorithms"
"""Group of entry points in which installed packages register algorithms."""


def find_algorithm(name: str, allowed: Allowed = NOTHING) -> type[AnyAlgorithm]:
    """Return an algorithm by its name: built in, of an installed package, or ``module:Class``.

    Raises:
        NotAllowed: the module is not in ``allowed``; nothing was imported.
        AlgorithmError: there is no such algorithm; the message lists the choices.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" not in name and installed(ENTRY_POINTS, name) is None:
        choices = unknown("algorithm", name, ALGORITHMS)
        raise AlgorithmError(f"{choices}, or name your own as module:Class")
    found = resolve(name, allowed, ENTRY_POINTS, Algorithm)
    if not (
        isinstance(found, type) and issubclass(found, Algorithm) and dataclasses.is_dataclass(found)
    ):
        raise AlgorithmError(
            f"expected a dataclass derived from Algorithm, {name!r} is of type "
            f"{type(found).__name__!r}"
        )
    return found
