"""Make the problem that the ``[problem]`` table of a configuration describes."""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Mapping
from typing import Any

from fedmq.algorithms.allowed import NOTHING, Allowed, installed, resolve
from fedmq.algorithms.errors import AlgorithmError, NotAllowed, ProblemError
from fedmq.algorithms.problems.base import Problem
from fedmq.algorithms.problems.datasets import DATASETS
from fedmq.algorithms.problems.guards import guard_instance
from fedmq.algorithms.problems.image import ImageClassification
from fedmq.algorithms.values import kind_of_value
from fedmq.codecs.text import shorten, unknown

PROBLEMS: Mapping[str, str] = {name: source.about for name, source in DATASETS.items()}
"""The built-in problems with one-line descriptions."""

DEFAULT_MODEL: Mapping[str, str] = {name: source.model for name, source in DATASETS.items()}
"""The default model of each built-in problem."""

ENTRY_POINTS = "fedmq.problems"
"""Group of entry points in which installed packages register problems."""

_EXPECTED: Mapping[str, tuple[type, str]] = {
    "name": (str, "the name of a data set or module:attribute, in quotes"),
    "model": (str, "the name of a model, in quotes"),
    "clients": (int, "a whole number"),
    "partition": (str, "a partition such as 'dirichlet(0.5)', in quotes"),
    "examples": (int, "a whole number"),
    "held_out": (int, "a whole number"),
    "public": (int, "a whole number"),
}


def load_problem(options: Mapping[str, object], seed: int, allowed: Allowed = NOTHING) -> Problem:
    """Return the problem that the ``[problem]`` table of a configuration describes.

    The table has ``name`` and ``clients`` and optionally ``model``, ``partition`` (IID by default),
    ``examples``, ``held_out`` and ``public``: the fields of `ImageClassification`. If the name is
    ``module:attribute``, or an entry point of an installed package, the object of that name is
    called with all the other options and ``seed`` as keywords, and must return a `Problem`. This
    runs the module's code, if ``allowed`` permits it; see `fedmq.algorithms.allowed`.

    Raises:
        NotAllowed: the module is not allowed; nothing was imported.
        ProblemError: an option is unknown, missing, of a wrong type or out of range; the
            message begins with its key, ``problem.<key>``.
    """
    name = _option(options, "name")
    if ":" in name or (name not in DATASETS and _is_installed(name)):
        others = {key: each for key, each in options.items() if key != "name"}
        return _load_own(name, others, seed, allowed)
    for key in options:
        if key not in _EXPECTED:
            raise ProblemError(f"problem.{key}: {unknown('key', key, _EXPECTED)}")
    if name not in DATASETS:
        raise ProblemError(
            f"problem.name: {unknown('problem', name, PROBLEMS)}, or name your own as "
            "module:attribute"
        )
    model = _option(options, "model", DEFAULT_MODEL[name])
    clients = _option(options, "clients")
    partition = _option(options, "partition", "iid")
    examples = None if options.get("examples") is None else _option(options, "examples")
    try:
        return ImageClassification(
            name,
            model,
            clients,
            partition,
            seed,
            examples,
            _option(options, "held_out", 0),
            _option(options, "public", 0),
        )
    except ProblemError as error:
        raise ProblemError(f"problem.{error}") from None


def complete_options(options: Mapping[str, object]) -> Mapping[str, object]:
    """Return the ``[problem]`` table with the model that a built-in problem has by default."""
    name = str(options.get("name"))
    default = {"model": DEFAULT_MODEL[name]} if name in DEFAULT_MODEL else {}
    return {"name": name, **default, **options}


def _option(options: Mapping[str, object], key: str, default: object = None) -> Any:
    kind, expected = _EXPECTED[key]
    value = options.get(key, default)
    if value is None:
        raise ProblemError(f"problem.{key}: expected {expected}, it is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProblemError(f"problem.{key}: expected {expected}, got {value!r}")
    return value


def _is_installed(name: str) -> bool:
    try:
        return installed(ENTRY_POINTS, name) is not None
    except AlgorithmError as error:
        raise ProblemError(f"problem.name: {error}") from None


def _load_own(name: str, options: Mapping[str, object], seed: int, allowed: Allowed) -> Problem:
    if "seed" in options:
        raise ProblemError(
            "problem.seed: expected no such key; run.seed is the seed of the whole run"
        )
    factory: Any
    try:
        factory = resolve(name, allowed, ENTRY_POINTS, Problem, options)
    except NotAllowed:
        raise
    except AlgorithmError as error:
        raise ProblemError(f"problem.name: {error}") from error
    if not callable(factory) or (isinstance(factory, type) and not issubclass(factory, Problem)):
        raise ProblemError(
            f"problem.name: expected {name!r} to be a Problem class or a function that returns "
            f"a Problem, got one of type {type(factory).__name__!r}"
        )
    try:
        signature = inspect.signature(factory)
        options = {key: _text_or_none(signature, key, each) for key, each in options.items()}
        signature.bind(**options, seed=seed)
    except TypeError as error:
        raise ProblemError(
            f"problem: cannot call {name!r} with {', '.join([*options, 'seed'])}: {error}"
        ) from None
    problem = factory(**options, seed=seed)
    if not isinstance(problem, Problem):
        raise ProblemError(
            f"problem.name: expected {name!r} to return a Problem, got one of type "
            f"{type(problem).__name__!r}"
        )
    _count_clients(name, problem)
    if not hasattr(problem, "seed"):
        with contextlib.suppress(AttributeError):  # slots
            object.__setattr__(problem, "seed", seed)  # a frozen dataclass has it too
    guard_instance(problem)
    return problem


def _text_or_none(signature: inspect.Signature, key: str, value: object) -> object:
    """Return an option's value, with None as the text ``none`` if the option takes text.

    In a configuration ``none`` stands for null. An option takes text if its default is a text and
    its annotation does not include None.
    """
    found = signature.parameters.get(key)
    if value is not None or found is None or not isinstance(found.default, str):
        return value
    annotation = "" if found.annotation is found.empty else str(found.annotation)
    return value if "None" in annotation or "Optional" in annotation else "none"


def _count_clients(name: str, problem: Problem) -> None:
    """Convert a problem's number of clients to Python's int, because numpy's cannot be sent.

    Raises:
        ProblemError: it is no whole number from 1.
    """
    found = getattr(problem, "clients", None)
    try:
        clients = operator.index(found)  # type: ignore[arg-type] # checked here
        if type(found) is not int:
            object.__setattr__(problem, "clients", clients)  # a frozen dataclass has it too
    except (TypeError, AttributeError):
        clients = 0
    if clients < 1:
        got = shorten(found) if isinstance(found, str) else kind_of_value(found)
        raise ProblemError(f"{name}: expected clients, a whole number from 1, got {got}")
