"""From a checked configuration to the objects of a run; this is where torch comes in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.base import AnyAlgorithm
from fedmq.algorithms.errors import AlgorithmError, NotAllowed
from fedmq.algorithms.problems import complete_options, load_problem
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.registry import find_algorithm
from fedmq.algorithms.schedules import Schedule, find_schedule
from fedmq.algorithms.values import plain_settings
from fedmq.codecs.base import Codec
from fedmq.codecs.errors import CodecError, SpecError
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.raw import Raw
from fedmq.codecs.registry import make_codec
from fedmq.codecs.spec import build
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.messages.payloads import Codecs
from fedmq.nodes.run.config import Config, describe
from fedmq.nodes.run.numbers import check_types

T = TypeVar("T", bound=AnyAlgorithm | Schedule)
Slowdown = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class Setup:
    """The objects of a run, and the configuration with every default filled in."""

    config: Config
    problem: Problem
    algorithm: AnyAlgorithm
    schedule: Schedule
    down: Codec
    up: Codec
    features: Codec
    logits: Codec

    @property
    def downlink(self) -> Codecs:
        """Return what encodes tasks."""
        return Codecs(self.down, self.features, self.logits)

    @property
    def uplink(self) -> Codecs:
        """Return what encodes results."""
        return Codecs(self.up, self.features, self.logits)


def set_up(config: Config, allowed: Allowed | None = None, run: str = "") -> Setup:
    """Make the objects that a configuration names.

    Args:
        config: of the run.
        allowed: which code it may name; by default that which it names itself if the person at
            this machine gave it (`load`, `build`), and none if it came from elsewhere (`parse`).
        run: id of the run, for error messages; by default what the configuration says.

    Raises:
        ConfigError: one of them is unknown or not allowed, or they do not fit together.
    """
    allowed = config.allowed if allowed is None else allowed
    run = run or config.run.id
    algorithm, schedule = _choices(config, allowed, run)
    if schedule.name not in algorithm.schedules:
        raise ConfigError(
            f"schedule.name: {algorithm.name} does not run under {schedule.name!r}; "
            f"choose from {', '.join(sorted(algorithm.schedules))}"
        )
    with _naming_the_run(run, "problem.name"):
        try:
            problem = load_problem(config.problem, config.run.seed, allowed)
        except NotAllowed:
            raise
        except (AlgorithmError, SpecError) as error:
            raise ConfigError(str(error)) from None
    down, up = _codec(config.codec.down, "down"), _codec(config.codec.up, "up")
    features = _codec(config.codec.features, "features")
    logits = _codec(config.codec.logits, "logits")
    _check_codecs(down, up, schedule, algorithm)
    for key, codec, kind in (("features", features, Features), ("logits", logits, Logits)):
        if not isinstance(codec, Raw | kind):
            raise ConfigError(
                f"codec.{key}: expected raw or a codec of {key}, such as {kind().wire_name}, "
                f"got {codec.wire_name}"
            )
    for node in ["", *config.worker.nodes]:
        slowdown(config.worker.straggling(node).slowdown)
    wanted = config.run.min_clients
    if wanted > problem.clients:
        raise ConfigError(
            f"run.min_clients: expected at most problem.clients, {problem.clients}, got {wanted}"
        )
    return Setup(
        _complete(config, algorithm, schedule),
        problem,
        algorithm,
        schedule,
        down,
        up,
        features,
        logits,
    )


def completed(config: Config, allowed: Allowed | None = None) -> Config:
    """Return a configuration with every default filled in, as `set_up` does, without its objects.

    Raises:
        ConfigError: its algorithm or its schedule is unknown, not allowed, or unusable.
    """
    allowed = config.allowed if allowed is None else allowed
    algorithm, schedule = _choices(config, allowed, config.run.id)
    return _complete(config, algorithm, schedule)


def _choices(config: Config, allowed: Allowed, run: str) -> tuple[AnyAlgorithm, Schedule]:
    find = functools.partial(find_algorithm, allowed=allowed)
    with _naming_the_run(run, "algorithm.name"):
        algorithm = _choose(config.algorithm, find, "algorithm")
    if getattr(algorithm, "seed", 0) is None:
        algorithm = dataclasses.replace(algorithm, seed=config.run.seed)  # type: ignore[call-arg] # it has that field
    return algorithm, _choose(config.schedule, find_schedule, "schedule")


def _complete(config: Config, algorithm: AnyAlgorithm, schedule: Schedule) -> Config:
    complete = config.model_copy(
        update={
            "problem": complete_options(config.problem),
            "algorithm": {**config.algorithm, **plain_settings(dataclasses.asdict(algorithm))},
            "schedule": {**config.schedule, **dataclasses.asdict(schedule)},
        }
    )
    try:
        complete.to_toml()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the configuration cannot be written as TOML: {error}") from None
    return complete


@contextlib.contextmanager
def _naming_the_run(run: str, key: str) -> Iterator[None]:
    """Say of code that is not allowed which run names it."""
    try:
        yield
    except NotAllowed as error:
        of_run = f" of run {run[:100]!r}" if run else ""
        raise ConfigError(f"{key}{of_run}: {error}") from None


def _choose(table: Mapping[str, Any], find: Callable[[str], type[T]], what: str) -> T:
    options = dict(table)
    try:
        chosen = find(str(options.pop("name", "")))
    except NotAllowed:
        raise
    except (AlgorithmError, SpecError) as error:
        raise ConfigError(f"{what}.name: {error}") from None
    keys: list[str] = ["name", *(field.name for field in dataclasses.fields(chosen))]
    try:
        made = TypeAdapter(chosen).validate_python(options)
    except ValidationError as error:
        raise ConfigError(describe(error, what, {what: keys})) from None
    check_types(options, vars(made), what)
    return made


def _codec(spec: str, direction: str) -> Codec:
    try:
        return make_codec(spec)
    except CodecError as error:
        raise ConfigError(f"codec.{direction}: {error}") from None


def _check_codecs(down: Codec, up: Codec, schedule: Schedule, algorithm: AnyAlgorithm) -> None:
    """Refuse to send a model with a codec for updates.

    Raises:
        ConfigError: the sentence says which, and why.
    """
    if (algorithm.fixed_reply or schedule.reply) == "model" and up.deltas_only:
        raise ConfigError(
            f"codec.up: under schedule {schedule.name} clients send models, and "
            f"{up.wire_name!r} takes for zero what it does not send"
        )
    if up.error_feedback and algorithm.task_per_client:
        raise ConfigError(
            f"codec.up: {up.wire_name!r} remembers what it did not send, and with "
            f"{algorithm.name} a client's next result is of other weights"
        )
    if down.structured or down.error_feedback:
        raise ConfigError(
            f"codec.down: {down.wire_name!r} is for updates of clients; a model that goes down "
            "is neither trained by the codec's structure nor sent a second time"
        )


def _added(draw: Callable[[np.random.Generator], float]) -> Slowdown:
    return lambda rng: 1.0 + max(0.0, float(draw(rng)))


DISTRIBUTIONS: Mapping[str, Callable[..., Slowdown]] = {
    "uniform": lambda low, high: _added(lambda rng: rng.uniform(low, high)),
    "halfnormal": lambda scale: _added(lambda rng: abs(rng.normal(0.0, scale))),
    "pareto": lambda shape: _added(lambda rng: rng.pareto(shape)),
    "exponential": lambda scale: _added(lambda rng: rng.exponential(scale)),
}


@functools.lru_cache(maxsize=64)
def slowdown(spec: float | str) -> Slowdown:
    """Return how many times as long a task is to take, as a draw.

    Raises:
        ConfigError: unknown distribution, a factor below 1, or parameters out of range.
    """
    if not isinstance(spec, str):
        if spec < 1:
            raise ConfigError(f"worker.slowdown: expected a factor of at least 1, got {spec}")
        return lambda _rng: spec
    try:
        chosen = build(spec, DISTRIBUTIONS, "distribution")
        chosen(np.random.default_rng(0))
    except (SpecError, ValueError, TypeError) as error:
        raise ConfigError(f"worker.slowdown: {error}") from None
    return chosen


@functools.cache
def kind_of(device: str) -> str:
    """Return what kind of device this is: to which bytes a task is trained depends on it.

    A GPU's name, or the widest instructions that torch uses on a CPU; and torch's version.
    """
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}"


def choose_device(wanted: str, key: str = "worker.device") -> str:
    """Return the torch device to use.

    Args:
        wanted: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        key: what the error says was wrong.

    Raises:
        ConfigError: there is no such device here; the sentence says which there are.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if gpus else "cpu"
    # One spelling for each: "cuda:01" is none for torch.
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", wanted, re.ASCII)
    if wanted == "cpu" or (match is not None and int(match[1] or 0) < gpus):
        return f"cuda:{int(match[1])}" if match is not None and match[1] else wanted
    there = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(gpus))])
    raise ConfigError(f"{key}: there is no device {wanted[:100]!r} here; choose from {there}")
