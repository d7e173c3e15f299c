"""``fedmq list``: all that a configuration can name, with settings and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator

from fedmq.codecs.extensions import entry_points
from fedmq.nodes.run.toml import NONE

_NAME_COLUMNS = 22
"""Columns of a name; a longer name gets a line of its own."""
_LEAST_COLUMNS = 40


def lines(what: str, width: int) -> Iterator[str]:
    """Yield `catalogue` as lines of at most this many columns; words are not broken."""
    found = [(name, about.split("\n")) for name, about in catalogue(what)]
    indent = min(_NAME_COLUMNS, max(len(name) for name, _ in found) + 2)
    columns = max(width, _LEAST_COLUMNS) - indent
    for name, abouts in found:
        wrapped = [
            line
            for about in abouts
            for line in textwrap.wrap(
                about, columns, break_long_words=False, break_on_hyphens=False
            )
        ]
        if len(name) + 2 > indent:
            yield name
        else:
            yield f"{name:{indent}}{wrapped.pop(0) if wrapped else ''}".rstrip()
        yield from (" " * indent + line for line in wrapped)


def catalogue(what: str) -> Iterator[tuple[str, str]]:
    """Yield name and description of all choices of one kind, such as ``algorithms``."""
    match what:
        case "algorithms":
            from fedmq.algorithms.registry import ALGORITHMS, ENTRY_POINTS

            for name, algorithm in ALGORITHMS.items():
                schedules = ", ".join(sorted(algorithm.schedules))
                yield name, f"{_fields(algorithm)}\nschedules: {schedules}"
            yield from _installed(ENTRY_POINTS)
        case "schedules":
            from fedmq.algorithms.schedules import SCHEDULES
            from fedmq.algorithms.schedules.staleness import STALENESS

            for name, schedule in SCHEDULES.items():
                yield name, _fields(schedule)
            functions = (f"{name}{_parameters(each)}" for name, each in STALENESS.items())
            yield "staleness", ", ".join(functions)
        case "distributions":
            from fedmq.nodes.population.distributions import ABOUT, DISTRIBUTIONS

            for name, distribution in DISTRIBUTIONS.items():
                yield f"{name}{_parameters(distribution)}", ABOUT[name]
        case "codecs":
            from fedmq.codecs.pipeline import STAGES
            from fedmq.codecs.registry import codecs

            for name, codec in codecs().items():
                yield f"{name}{_parameters(codec)}", _first_sentence(codec)
            stages: dict[str, list[str]] = {}
            for name, stage in STAGES.items():
                stages.setdefault(stage.place.name.lower(), []).append(
                    f"{name}{_parameters(stage)}"
                )
            order = " | ".join(f"[{' or '.join(each)}]" for each in stages.values())
            yield "pipelines", f"any of these stages, in this order:\n{order}"
        case "problems":
            from fedmq.algorithms.problems import DEFAULT_MODEL, MODELS, PARTITIONS, PROBLEMS
            from fedmq.algorithms.problems.federated_datasets import DigitTasks, LandMine, School
            from fedmq.algorithms.problems.registry import ENTRY_POINTS

            for name, about in PROBLEMS.items():
                yield name, f"{about}; model {DEFAULT_MODEL[name]}"
            for task in (DigitTasks, LandMine, School):
                yield f"{task.__module__}:{task.__name__}", _first_sentence(task)
            yield from _installed(ENTRY_POINTS)
            yield "models", ", ".join(MODELS)
            partitions = (f"{name}{_parameters(each)}" for name, each in PARTITIONS.items())
            yield "partitions", ", ".join(partitions)


def _installed(group: str) -> Iterator[tuple[str, str]]:
    """Yield the entry points of installed packages; none of them is imported."""
    for entry in entry_points(group):
        yield entry.name, f"{entry.value}, from an installed package"


def _first_sentence(kind: type) -> str:
    return re.split(r"\.\s", inspect.getdoc(kind) or "")[0].rstrip(".")


def _fields(kind: type) -> str:
    return ", ".join(f"{each.name}={_toml(each.default)}" for each in dataclasses.fields(kind))


def _toml(value: object) -> str:
    """Return a default as TOML; None is "none"."""
    match value:
        case None:
            return json.dumps(NONE)
        case tuple() | list():
            return f"[{', '.join(map(_toml, value))}]"
        case str() | bool():
            return json.dumps(value)
        case _:
            return repr(value)


def _parameters(factory: object) -> str:
    parameters = inspect.signature(factory).parameters.values()  # type: ignore[arg-type] # callable
    shown = [
        _parameter(each)
        for each in parameters
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return f"({', '.join(shown)})" if shown else ""


def _parameter(each: inspect.Parameter) -> str:
    if each.default is each.empty:
        return each.name
    return f"[{each.name}]" if each.default is None else f"{each.name}={each.default!r}"
