"""The configuration of a run: one TOML file, ``--set key=value``, and defaults.

It is read in two steps, so that the broker and the command line need no torch: `load` checks
everything but the tables of problem, algorithm and schedule; `nodes.run.setup` makes the objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_serializer,
)
from pydantic.dataclasses import dataclass as checked_dataclass

from fedmq.algorithms.allowed import NOTHING, Allowed, installed
from fedmq.algorithms.errors import AlgorithmError
from fedmq.broker.settings import (
    LEAST_RETAIN_BYTES,
    BrokerSettings,
    LedgerSettings,
    Limits,
)
from fedmq.broker.wire.addresses import name_fault
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.population.table import SimulationTable
from fedmq.nodes.process.exception_text import reason_of
from fedmq.nodes.run.numbers import (
    RETAIN_CHOICES,
    RETAINED,
    check_finite,
    check_retain,
    check_types,
)
from fedmq.nodes.run.toml import (
    describe,
    parse_toml,
    read_toml,
    rename_key,
    rename_keys,
    setting_value,
    with_none_words,
    without_none_words,
)

DEFAULT: Mapping[str, Mapping[str, Any]] = {
    "problem": {"name": "mnist-mini"},
    "algorithm": {"name": "fedavg"},
    "schedule": {"name": "buffered"},
}
"""The run of ``make cluster``. Other keys of these tables default to those of the named object."""

_PROBLEM_DEFAULT = {"clients": 40, "partition": "dirichlet(0.5)"}
_LONGEST_S = 1_000_000
"""Longest time, in seconds: ZeroMQ counts milliseconds in 32 bits."""
_LONGEST_RUN_S = 1_000_000_000
"""Longest timer of a broker, in seconds."""
_OLD_BIND = "tcp://127.0.0.1:0"
_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
_FORMS = {_DEVICE: "auto, cpu, cuda or cuda:N"}
"""What a text that must match a pattern looks like, in words."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunTable(_Table):
    """``[run]``.

    id: name of the run, unique at its broker, see `fedmq.broker.wire.addresses`; made from the
        time if empty.
    seed: seed of all randomness.
    versions: number of versions after which the run ends.
    target_accuracy: accuracy of an evaluation that ends the run earlier.
    max_bytes: bytes of tasks, evaluations and their answers, both directions added, that end the
        run earlier.
    max_wall_s: seconds after which the run ends, without the time in which it was stopped; in a
        simulation, of virtual time.
    patience: number of evaluations in a row without a better accuracy that end the run earlier.
    evaluate_every: versions between evaluations; 0 evaluates only the last.
    min_clients: number of clients that must be reachable before the first task; 0 means all.
    failures: number of failed tasks and rejected results in a row, without a used result in
        between, after which the run fails; by default three per client, within 6 to 100, and at
        least twice the number of concurrent tasks.
    checkpoint_s: least time between checkpoints, in seconds; a restarted aggregator folds the
        messages since the last one again.
    max_examples, max_update_norm: most examples, and largest L2 norm of an update, of a result.
    """

    id: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    versions: Annotated[int, Field(ge=1)] = 150
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    max_bytes: Annotated[int, Field(ge=1, le=10**18)] | None = None
    max_wall_s: Annotated[float, Field(gt=0, le=_LONGEST_RUN_S)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 5
    min_clients: Annotated[int, Field(ge=0)] = 0
    failures: Annotated[int, Field(ge=1)] | None = None
    checkpoint_s: Annotated[float, Field(ge=0)] = 1.0
    max_examples: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_update_norm: Annotated[float, Field(gt=0)] | None = None


class CodecTable(_Table):
    """``[codec]``: codec specs.

    down, up: codec of the weights in tasks and in results.
    features, logits: codecs of features and logits in both directions, for algorithms that
        exchange knowledge.
    """

    down: str = "raw"
    up: str = "raw"
    features: str = "features(float16)"
    logits: str = "logits(float32)"


class StragglingTable(_Table):
    """Simulated slow workers and lost results, for experiments.

    slowdown: factor by which a task takes longer: a number, or a distribution drawn for every
        task: ``uniform(low, high)``, ``halfnormal(scale)``, ``pareto(shape)``,
        ``exponential(scale)``; each draw is added to 1.
    drop: probability that a client drops out during a task and its result is lost.
    """

    slowdown: float | str = 1.0
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0


class WorkerTable(StragglingTable):
    """``[worker]``.

    count: number of workers of a local cluster; each hosts a range of clients.
    device: torch device to train on; ``auto`` is the first GPU, or else the CPU.
    threads: torch threads per worker; 1 where workers share a host.
    nodes: slowdown and drop of single workers, by name.
    """

    count: Annotated[int, Field(ge=1, le=1024)] = 4
    device: Annotated[str, Field(pattern=_DEVICE)] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    nodes: dict[str, StragglingTable] = {}

    @field_serializer("nodes")
    def _own_settings(self, nodes: dict[str, StragglingTable]) -> dict[str, dict[str, Any]]:
        """Leave out what a worker takes from the general settings, see `straggling`."""
        return {name: each.model_dump(exclude_unset=True) for name, each in nodes.items()}

    def straggling(self, node: str) -> StragglingTable:
        """Return slowdown and drop of one worker."""
        general = {"slowdown": self.slowdown, "drop": self.drop}
        special = self.nodes[node].model_dump(exclude_unset=True) if node in self.nodes else {}
        return StragglingTable.model_validate(general | special)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LimitsTable(Limits):
    """``[broker.limits]``: see `Limits`."""


class BrokerTable(_Table):
    """``[broker]``.

    lease_s: seconds of silence after which a node counts as gone.
    heartbeat_s: seconds between heartbeats of a node that sends nothing else.
    bind: address where the broker of a local cluster listens as well, for workers of other hosts;
        its own nodes use a socket file in the run's folder.
    durability: what an acknowledged message survives: ``process``, a crash of the broker;
        ``power``, a power failure (slower: one sync per batch).
    retain: ``everything``; ``unfinished``, payloads are deleted when no message needs them
        any more; ``headers``, also those of a run that has ended; or the most bytes of payloads to
        keep, such as ``20e9``, at least 16 MiB; needed payloads are kept even beyond it. Messages
        themselves are kept for ever.
    deliveries: number of deliveries of a task, each ended by the death of the worker's session,
        after which the task is dead-lettered.
    share_files: nodes on the broker's host read blobs from its ledger's files instead of the
        socket, if file permissions allow it.
    limits: what peers can make the broker use.
    """

    lease_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 10.0
    heartbeat_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 1.0
    bind: str | None = None
    durability: Literal["process", "power"] = "process"
    retain: Annotated[
        Literal["everything", "unfinished", "headers"] | Annotated[float, Field(ge=0)],
        BeforeValidator(check_retain),
    ] = "everything"
    deliveries: Annotated[int, Field(ge=1)] = 5
    share_files: bool = True
    limits: LimitsTable = LimitsTable()

    @property
    def listens_at(self) -> str | None:
        """Return where a cluster's broker listens as well; None for nowhere else.

        Older releases recorded the address of the whole cluster, a free port of loopback: no node
        of another host can use that.
        """
        return None if self.bind == _OLD_BIND else self.bind

    def settings(self) -> BrokerSettings:
        """Return the broker's timeouts and limits."""
        limits = Limits(**asdict(self.limits))
        return BrokerSettings(self.lease_s, self.heartbeat_s, self.deliveries, limits)

    def ledger_settings(self) -> LedgerSettings:
        """Return the ledger's durability and retention."""
        limit = self.retain
        retain = RETAINED[limit] if isinstance(limit, str) else int(limit)
        return LedgerSettings(self.durability, retain, share_files=self.share_files)


class Config(_Table):
    """A complete configuration; `nodes.run.setup` checks the tables with a name.

    A configuration that the user of this machine gave, read by `load` or `build`, can name any
    code. One from elsewhere, read by `parse`, cannot.
    """

    run: RunTable = RunTable()
    problem: dict[str, Any]
    algorithm: dict[str, Any]
    schedule: dict[str, Any]
    codec: CodecTable = CodecTable()
    worker: WorkerTable = WorkerTable()
    broker: BrokerTable = BrokerTable()
    simulation: SimulationTable | None = None
    _allowed: Allowed = PrivateAttr(default=NOTHING)

    @property
    def allowed(self) -> Allowed:
        """Return the code that may be imported because this configuration names it."""
        return self._allowed

    def tables(self) -> dict[str, Any]:
        """Return the configuration as tables; without ``simulation`` if there is none."""
        return self.model_dump(exclude={"simulation"} if self.simulation is None else None)

    def to_toml(self) -> str:
        """Return the configuration as complete TOML, which `parse` reads."""
        return tomli_w.dumps(with_none_words(self.tables()))


def load(path: Path | None, settings: Sequence[str] = (), *, recorded: bool = False) -> Config:
    """Read a configuration file (or the defaults) and apply ``key=value`` settings.

    Args:
        path: of the file; ``-`` is standard input.
        settings: each of them overrides a key.
        recorded: a run wrote the file: no notice asks anybody to rename its keys.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    given = {} if path is None else read_tables(path, recorded=recorded)
    for setting in settings:
        apply_setting(given, setting)
    return build(given)


def read_tables(path: Path, *, recorded: bool = False) -> dict[str, Any]:
    """Return the tables of a configuration file, unchecked, with every key under its new name.

    Args:
        path: of the file; ``-`` is standard input.
        recorded: see `load`.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    try:
        return rename_keys(read_toml(path), notice=not recorded)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {reason_of(error)}") from None


def parse(text: str) -> Config:
    """Read a complete configuration from TOML text, as the broker sends it to nodes.

    Its author is unknown, so it allows no code.

    Raises:
        ConfigError: the text is no valid configuration.
    """
    return _checked(rename_keys(parse_toml(text, "the configuration"), notice=False))


def changed(config: Config, settings: Sequence[str]) -> Config:
    """Apply ``key=value`` settings to a recorded configuration; the result allows no code.

    Raises:
        ConfigError: a key or value is wrong.
    """
    given = config.tables()
    new: dict[str, Any] = {}
    for setting in settings:
        apply_setting(given, setting)
        apply_setting(new, setting)
    check_finite(new)  # older releases recorded configurations with infinities
    return _checked(given)


def build(given: Mapping[str, Any]) -> Config:
    """Check the configuration that a user gave and fill in defaults.

    The code that it names is allowed.

    Raises:
        ConfigError: names the key, the expected value and the given one.
    """
    given = rename_keys(given, notice=True)
    check_finite(given)
    config = _checked(given)
    if isinstance(config.broker.retain, float) and config.broker.retain < LEAST_RETAIN_BYTES:
        raise ConfigError(f"broker.retain: expected {RETAIN_CHOICES}, got {config.broker.retain:g}")
    lease, heartbeat = config.broker.lease_s, config.broker.heartbeat_s
    if lease < heartbeat:
        raise ConfigError(
            f"broker.lease_s: expected at least broker.heartbeat_s, {heartbeat:g}, got {lease:g}"
        )
    if config.run.id and (fault := name_fault(config.run.id)):
        raise ConfigError(f"run.id: {fault}")
    named = (config.problem.get("name"), config.algorithm.get("name"))
    own = frozenset(each for each in named if isinstance(each, str) and ":" in each)
    config._allowed = Allowed(names=own)  # noqa: SLF001 - this module's own
    return config


def _checked(given: Mapping[str, Any]) -> Config:
    tables = dict(without_none_words(given))
    for table, default in DEFAULT.items():
        chosen = tables.get(table, {})
        if not isinstance(chosen, dict):
            raise ConfigError(f"{table}: expected a table, got {chosen!r}")
        tables[table] = {**default, **chosen}
    if not _is_code(str(tables["problem"]["name"])):
        tables["problem"] = {**_PROBLEM_DEFAULT, **tables["problem"]}
    try:
        config = Config.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(describe(error, "", _keys(Config), _FORMS)) from None
    check_types(tables, config.model_dump())
    return config


def _is_code(problem: str) -> bool:
    """Return whether a problem is a user's code, with options of its own."""
    try:
        return ":" in problem or installed("fedmq.problems", problem) is not None
    except AlgorithmError:
        return True  # several packages have one of this name: `load_problem` raises the error


def apply_setting(given: dict[str, Any], setting: str) -> None:
    """Set the key of a text such as ``run.seed=1`` in some tables.

    Raises:
        ConfigError: the text has another form.
    """
    key, equals, text = setting.partition("=")
    parts = rename_key(key.strip()).split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {setting}: expected table.key=value, such as run.seed=1")
    table = given
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {part} is not a table")
    table[parts[-1]] = setting_value(text.strip())


def _keys(model: type[BaseModel]) -> dict[str, Sequence[str]]:
    keys: dict[str, Sequence[str]] = {"": tuple(model.model_fields)}
    for name, kind in _tables(model):
        keys[name] = tuple(kind.model_fields)
        keys |= {f"{name}.{inner}": tuple(each.model_fields) for inner, each in _tables(kind)}
    keys["broker.limits"] = tuple(each.name for each in fields(Limits))
    return keys


def _tables(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the fields of a table that are tables themselves."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield name, kind
