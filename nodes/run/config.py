"""The configuration of a run: one TOML file, ``--set key=value``, and defaults.

It is read in two steps, so that the broker and the command line stay free of torch:
`load` checks everything that needs no algorithm, `nodes.setup` makes the objects.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from fedmq.algorithms.allowed import NOTHING, Allowed, installed
from fedmq.algorithms.errors import AlgorithmError
from fedmq.algorithms.hyperparameters import fault_of
from fedmq.broker.settings import EVERYTHING, LEAST_RETAIN_BYTES, BrokerSettings, LedgerSettings
from fedmq.broker.wire.addresses import name_fault
from fedmq.nodes.errors import ConfigError
from fedmq.nodes.run.numbers import check_finite, check_types
from fedmq.nodes.run.toml import parse_toml, read_toml

DEFAULT: Mapping[str, Mapping[str, Any]] = {
    "problem": {"name": "mnist-mini"},
    "algorithm": {"name": "fedavg"},
    "schedule": {"name": "buffered"},
}
"""What ``make cluster`` runs. Whatever the name, all else has the defaults of what it names."""

_PROBLEM_DEFAULT = {"clients": 40, "partition": "dirichlet(0.5)"}
_LONGEST_S = 1_000_000
"""ZeroMQ counts milliseconds in 32 bits."""
_RETAIN = f"'everything', 'unfinished' or a number of bytes, at least {LEAST_RETAIN_BYTES:,}"
NONE = "none"
"""TOML has no null: this word stands for it, for example ``batch_size = "none"``."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class RunTable(_Table):
    """``[run]``.

    id: name of the run, unique at its broker, see `fedmq.broker.wire.addresses`; drawn from
        the time if empty.
    seed: of everything random.
    versions: the run ends when this many have been committed.
    target_accuracy: it ends earlier when an evaluation reaches this.
    evaluate_every: versions between evaluations; 0 evaluates only the last.
    min_clients: clients that must be reachable before the first task; 0 means all.
    failures: the run fails when this many tasks in a row have failed, or had their results
        rejected, without one whose result was used; by default three for each client, but 6 to
        100, and at least twice as many as are out at once.
    checkpoint_s: a version is a checkpoint if the last one is this many seconds old; a
        restarted aggregator folds the messages since then once more.
    """

    id: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    versions: Annotated[int, Field(ge=1)] = 150
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    evaluate_every: Annotated[int, Field(ge=0)] = 5
    min_clients: Annotated[int, Field(ge=0)] = 0
    failures: Annotated[int, Field(ge=1)] | None = None
    checkpoint_s: Annotated[float, Field(ge=0)] = 1.0


class CodecTable(_Table):
    """``[codec]``: specs of codecs.

    down, up: for the weights in tasks and in results.
    features, logits: for those, in either direction, of algorithms that exchange knowledge.
    """

    down: str = "raw"
    up: str = "raw"
    features: str = "features(float16)"
    logits: str = "logits(float32)"


class StragglingTable(_Table):
    """How a worker is slow or loses clients, on demand, for experiments.

    slowdown: how many times as long as it took a task is made to take: a number, or a
        distribution drawn for every task: ``uniform(low, high)``, ``halfnormal(scale)``,
        ``pareto(shape)``, ``exponential(scale)``; each draw is added to 1.
    drop: probability that a client goes away during a task and its result is lost.
    """

    slowdown: float | str = 1.0
    drop: Annotated[float, Field(ge=0, le=1)] = 0.0


class WorkerTable(StragglingTable):
    """``[worker]``.

    count: workers of a local cluster; the clients are dealt to them in ranges.
    device: torch device to train on; ``auto`` is the first GPU if there is one.
    threads: of torch, per worker. One, where workers share a host.
    nodes: other values of slowdown and drop for single workers, by name.
    """

    count: Annotated[int, Field(ge=1, le=1024)] = 4
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    nodes: dict[str, StragglingTable] = {}

    def straggling(self, node: str) -> StragglingTable:
        """Return the values that hold for one worker."""
        general = {"slowdown": self.slowdown, "drop": self.drop}
        special = self.nodes[node].model_dump(exclude_unset=True) if node in self.nodes else {}
        return StragglingTable.model_validate(general | special)


def _check_retain(value: Any) -> Any:
    if value in ("everything", "unfinished") or (isinstance(value, int | float) and value >= 0):
        return value
    raise ValueError(f"expected {_RETAIN}, got {value!r:.200}")


class BrokerTable(_Table):
    """``[broker]``.

    lease_s: a node that has been silent for this long has left.
    beat_s: a node with nothing to say says so this often.
    bind: where the broker of a local cluster listens; port 0 is any free one.
    durability: what a receipt promises: ``process``, the message survives the death of the
        broker; ``power``, it is on the device (slower: one sync for each batch).
    retain: ``everything``; ``unfinished``, payloads are deleted when no message needs them
        any more; or at most this many bytes of payloads, such as ``20e9``, but for what is
        needed; 16 MiB is the least that works. Messages themselves are kept for ever.
    deliveries: a task at which so many sessions of workers died is parked.
    share_files: nodes on the broker's host read blobs from its ledger's files instead of the
        socket, if they may.
    """

    lease_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 10.0
    beat_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 1.0
    bind: str = "tcp://127.0.0.1:0"
    durability: Literal["process", "power"] = "process"
    retain: Annotated[
        Literal["everything", "unfinished"] | Annotated[float, Field(ge=0)],
        BeforeValidator(_check_retain),
    ] = "everything"
    deliveries: Annotated[int, Field(ge=1)] = 5
    share_files: bool = True

    def settings(self) -> BrokerSettings:
        """Return how patient the broker is to be."""
        return BrokerSettings(self.lease_s, self.beat_s, self.deliveries)

    def ledger_settings(self) -> LedgerSettings:
        """Return how the broker is to keep its ledger."""
        match self.retain:
            case "everything":
                retain = EVERYTHING
            case "unfinished":
                retain = 0
            case limit:
                retain = int(limit)
        return LedgerSettings(self.durability, retain, share_files=self.share_files)


class Config(_Table):
    """A whole configuration. The tables with a name are checked when they are set up.

    One that the person at this machine gave, with `load` or `build`, may name any code. One
    that came from elsewhere, as `parse` reads it, may not.
    """

    run: RunTable = RunTable()
    problem: dict[str, Any]
    algorithm: dict[str, Any]
    schedule: dict[str, Any]
    codec: CodecTable = CodecTable()
    worker: WorkerTable = WorkerTable()
    broker: BrokerTable = BrokerTable()
    _allowed: Allowed = PrivateAttr(default=NOTHING)

    @property
    def allowed(self) -> Allowed:
        """Return what may be imported because this very configuration names it."""
        return self._allowed

    def to_toml(self) -> str:
        """Return the configuration as a complete TOML file, which `parse` reads back."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def load(path: Path | None, settings: Sequence[str] = ()) -> Config:
    """Read a configuration file (or the defaults) and apply ``key=value`` settings.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    given: dict[str, Any] = {}
    if path is not None:
        try:
            given = read_toml(path)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for setting in settings:
        _apply(given, setting)
    return build(given)


def parse(text: str) -> Config:
    """Read a complete configuration from TOML text, as the broker hands it to nodes.

    Nobody knows who wrote it: it allows no code.

    Raises:
        ConfigError: it is not one.
    """
    return _checked(parse_toml(text, "the configuration"))


def changed(config: Config, settings: Sequence[str]) -> Config:
    """Return a recorded configuration with ``key=value`` settings applied; it allows no code.

    Raises:
        ConfigError: a key or value is wrong.
    """
    given = config.model_dump()
    alone: dict[str, Any] = {}
    for setting in settings:
        _apply(given, setting)
        _apply(alone, setting)
    check_finite(alone)  # a recorded configuration is not checked again
    return _checked(given)


def build(given: Mapping[str, Any]) -> Config:
    """Return the configuration that a person gave: checked, and defaults filled in.

    The code that it names is allowed.

    Raises:
        ConfigError: names the key, what was expected, and what stood there.
    """
    check_finite(given)
    config = _checked(given)
    if isinstance(config.broker.retain, float) and config.broker.retain < LEAST_RETAIN_BYTES:
        raise ConfigError(f"broker.retain: expected {_RETAIN}, got {config.broker.retain:g}")
    lease, beat = config.broker.lease_s, config.broker.beat_s
    if lease < beat:
        raise ConfigError(
            f"broker.lease_s: expected at least broker.beat_s, {beat:g}, got {lease:g}"
        )
    if config.run.id and (fault := name_fault(config.run.id)):
        raise ConfigError(f"run.id: {fault}")
    named = (config.problem.get("name"), config.algorithm.get("name"))
    own = frozenset(each for each in named if isinstance(each, str) and ":" in each)
    config._allowed = Allowed(names=own)  # noqa: SLF001 - this module's own
    return config


def _checked(given: Mapping[str, Any]) -> Config:
    tables = dict(_none_words(given))
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
        raise ConfigError(describe(error, "", _keys(Config))) from None
    check_types(tables, config.model_dump())
    return config


def describe(error: ValidationError, table: str, keys: Mapping[str, Sequence[str]]) -> str:
    """Return the first fault as one sentence: key, what was expected, what stood there.

    Args:
        error: from pydantic.
        table: where the validated value stands, for example ``algorithm``.
        keys: known keys by table, to choose from.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if not _is_type_name(str(part))]
    where = ".".join([table, *path] if table else path)
    match first["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            parent, _, name = where.rpartition(".")
            choices = keys.get(parent, ())
            close = difflib.get_close_matches(name, choices, n=1)
            close += [f"{other}.{name}" for other in keys if other and name in keys[other]]
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            return f"unknown key {where!r}{guess}; choose from {', '.join(choices)}"
        case "missing" | "missing_argument":
            return f"{where}: expected a value, it is missing"
        case _:
            return f"{where}: {fault_of(first)}"


def _is_code(problem: str) -> bool:
    """Tell whether a problem's name is that of code, with options of its own."""
    try:
        return ":" in problem or installed("fedmq.problems", problem) is not None
    except AlgorithmError:
        return True  # several of one name: the sentence is made where they are looked up


def _apply(given: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {setting}: expected table.key=value, such as run.seed=1")
    table = given
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting}: {part} is not a table")
    table[parts[-1]] = setting_value(text.strip())


def setting_value(text: str) -> Any:
    """Read a TOML value; what is none is taken as a string."""
    try:
        return parse_toml(f"value = {text}", text)["value"]
    except ConfigError:
        return text


def _none_words(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError(f"expected numbers of at most 64 bits, got one of {value.bit_length()}")
    if isinstance(value, dict):
        return {key: _none_words(each) for key, each in value.items()}
    return None if value == NONE else value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items()}
    return NONE if value is None else value


def _keys(model: type[BaseModel]) -> dict[str, Sequence[str]]:
    keys: dict[str, Sequence[str]] = {"": tuple(model.model_fields)}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys[name] = tuple(field.annotation.model_fields)
    return keys


def _is_type_name(part: str) -> bool:
    """Tell pydantic's names of union members in an error's location from keys."""
    return part in {"int", "float", "str", "none"} or part.startswith(("constrained", "literal["))
