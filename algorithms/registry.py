"""All algorithms by the name that a configuration uses."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping

from fedmq.algorithms.base import Algorithm
from fedmq.algorithms.codistillation import Codistillation
from fedmq.algorithms.distillation import Distillation
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.faug import FAug
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.feddropout import FedDropout
from fedmq.algorithms.fedgkt import FedGKT
from fedmq.algorithms.fedper import FedPer
from fedmq.algorithms.fedprox import FedProx
from fedmq.algorithms.fedrep import FedRep
from fedmq.algorithms.fedsgd import FedSGD
from fedmq.algorithms.finetune import FedAvgFT, LocalOnly
from fedmq.algorithms.mocha import Mocha
from fedmq.algorithms.perfedavg import PerFedAvg
from fedmq.algorithms.pfedhn import PFedHN
from fedmq.algorithms.reptile import PersonalisedFedAvg
from fedmq.codecs.spec import unknown

ALGORITHMS: Mapping[str, type[Algorithm]] = {
    each.name: each
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


def find_algorithm(name: str) -> type[Algorithm]:
    """Return a built-in algorithm by its name, or a user's own by ``module:Class``.

    Raises:
        AlgorithmError: there is none; the sentence holds the choices.
    """
    if ":" not in name:
        if name not in ALGORITHMS:
            choices = unknown("algorithm", name, ALGORITHMS)
            raise AlgorithmError(f"{choices}, or name your own as module:Class")
        return ALGORITHMS[name]
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise AlgorithmError(f"cannot load {name!r}: {error}") from None
    if not (
        isinstance(found, type) and issubclass(found, Algorithm) and dataclasses.is_dataclass(found)
    ):
        raise AlgorithmError(f"expected a dataclass derived from Algorithm, {name!r} is {found!r}")
    return found
