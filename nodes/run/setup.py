"""Make the objects of a run from its configuration; importing this module imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedmq.algorithms.allowed import Allowed
from fedmq.algorithms.base import AnyAlgorithm
from fedmq.algorithms.errors import AlgorithmError, NotAllowed
from fedmq.algorithms.fedavg import FedAvg
from fedmq.algorithms.fedprox import FedProx
from fedmq.algorithms.problems import complete_options, load_problem
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.problems.quadratic import QuadraticProblem
from fedmq.algorithms.registry import find_algorithm
from fedmq.algorithms.schedules import Schedule, find_schedule
from fedmq.algorithms.values import ReturnedError, plain_settings
from fedmq.broker.wire.addresses import MAX_CLIENTS
from fedmq.codecs.base import Codec
from fedmq.codecs.errors import CodecError, SpecError
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.raw import Raw
from fedmq.codecs.registry import make_codec
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.messages.payloads import Codecs
from fedmq.nodes.population.population import examples_of
from fedmq.nodes.population.table import stand_in_of
from fedmq.nodes.process.exception_text import described
from fedmq.nodes.run.config import Config
from fedmq.nodes.run.goal import Goal
from fedmq.nodes.run.numbers import check_types
from fedmq.nodes.run.stragglers import slowdown
from fedmq.nodes.run.toml import describe

T = TypeVar("T", bound=AnyAlgorithm | Schedule)


@dataclass(frozen=True)
class Setup:
    """The objects of a run, and its configuration with every default filled in."""

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
        """Return the codecs of tasks."""
        return Codecs(self.down, self.features, self.logits)

    @property
    def uplink(self) -> Codecs:
        """Return the codecs of results."""
        return Codecs(self.up, self.features, self.logits)


def set_up(config: Config, allowed: Allowed | None = None, run: str = "") -> Setup:
    """Make the objects that a configuration names.

    Args:
        config: of the run.
        allowed: user code that the configuration may name; by default all code if the user of
            this machine gave it (`load`, `build`), and none if it came from elsewhere (`parse`).
        run: id of the run, for error messages; by default the one in the configuration.

    Raises:
        ConfigError: an object is unknown, not allowed or invalid, or two do not fit together.
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
            _check_ranges(problem)
        except NotAllowed:
            raise
        except (AlgorithmError, SpecError) as error:
            raise ConfigError(str(error)) from None
    problem = _stand_in(config, problem, algorithm)
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
    if config.run.max_update_norm is not None and not algorithm.bounds_updates:
        raise ConfigError(
            "run.max_update_norm: expected an algorithm whose clients send updates of a model, "
            f"got {algorithm.name}"
        )
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


def check_attainable(setup: Setup, workers: Collection[str] = ()) -> None:
    """Check that a new run can reach its goal.

    Existing runs are not checked: the ledger of a run with such settings can still be replayed.

    Args:
        setup: of the run.
        workers: names of all workers, if they are known.

    Raises:
        ConfigError: names the key, the expected value and the given one.
    """
    config, clients = setup.config, setup.problem.clients
    if clients > MAX_CLIENTS:
        raise ConfigError(f"problem.clients: expected at most {MAX_CLIENTS}, got {clients}")
    least = setup.schedule.least_clients()
    if least is not None and least[1] > clients:
        key, wanted = least
        raise ConfigError(
            f"schedule.{key}: expected at most problem.clients, {clients}, got {wanted}"
        )
    run = config.run
    needs = Goal.of(run).needs_accuracy
    if needs and not run.evaluate_every:
        raise ConfigError(
            f"run.evaluate_every: expected at least 1 because {needs} is set, got 0: "
            "only the last version would be evaluated"
        )
    if all(config.worker.straggling(name).drop >= 1 for name in workers or [""]):
        raise ConfigError("worker.drop: expected less than 1, got 1: every result would be lost")


def completed(config: Config, allowed: Allowed | None = None) -> Config:
    """Return a configuration with every default filled in, without making its problem.

    Raises:
        ConfigError: the algorithm or schedule is unknown, not allowed or invalid.
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


def _stand_in(config: Config, problem: Problem, algorithm: AnyAlgorithm) -> Problem:
    """Return the problem that clients learn: the stand-in if ``simulation.learner`` is ``curve``.

    Raises:
        ConfigError: the algorithm cannot train it.
    """
    stand_in = stand_in_of(config.simulation)
    if stand_in is None:
        return problem
    kind: type = type(algorithm)  # a subclass may train in other ways
    if kind not in (FedAvg, FedProx):
        raise ConfigError(
            "simulation.learner: expected 'train' with algorithm "
            f"{algorithm.name}, got 'curve', which stands in for the training of "
            "fedavg and fedprox only"
        )
    examples = examples_of(stand_in.examples, config.run.seed)
    return QuadraticProblem(
        problem, examples, stand_in.heterogeneity, stand_in.noise, stand_in.curvature
    )


def _check_ranges(problem: Problem) -> None:
    """Call a problem's `metric_range`, which may be a user's, before a score needs it.

    Raises:
        ConfigError: it fails, or returns no range.
    """
    for name in ("loss", "accuracy"):
        try:
            problem.metric_range(name)
        except ReturnedError as error:
            raise ConfigError(str(error)) from None
        except Exception as error:  # a user's method can raise anything
            who = f"{type(problem).__name__}.metric_range"
            raise ConfigError(f"{who}: failed for {name!r}: {described(error)}") from error


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
    """Add the key and the run to the error for code that is not allowed."""
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
        ConfigError: names the codec and the reason.
    """
    if (algorithm.fixed_reply or schedule.reply) == "model" and up.deltas_only:
        raise ConfigError(
            f"codec.up: under schedule {schedule.name} clients send models, and "
            f"{up.wire_name!r} treats omitted values as zero"
        )
    if up.error_feedback and algorithm.task_per_client:
        raise ConfigError(
            f"codec.up: {up.wire_name!r} keeps an error-feedback residual, but with "
            f"{algorithm.name} a client's next result has other weights"
        )
    if down.structured or down.error_feedback:
        raise ConfigError(
            f"codec.down: {down.wire_name!r} is for updates of clients: the server's model has "
            "no such structure, and no later message would carry an error-feedback residual"
        )
