"""Shared by the commands: one-line errors, exit codes, renamed options, ranges of clients."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fedmq.broker.errors import BrokerFailed, GaveUp
from fedmq.nodes.errors import ON_PURPOSE, ConfigError, RunFailed
from fedmq.nodes.process.terminal import guess, plain, renaming_notice

LONGEST_TEXT = 2000
"""Characters of an error, at most."""
_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""No mistake: ``fedmq`` without a command shows its help. (Click has this error since 8.2.)"""


DEFAULT_ENDPOINT = "tcp://127.0.0.1:7700"
folder_argument = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
config_argument = click.argument(
    "config", required=False, type=click.Path(dir_okay=False, path_type=Path)
)
keys_option = click.option(
    "--keys",
    "keys_folder",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of keys; default: that of FEDMQ_KEYS, or ~/.config/fedmq/keys.",
)
allow_option = click.option(
    "--allow",
    "allow",
    metavar="MODULE",
    multiple=True,
    help="Allow the run's configuration to use code of this module and those below it; repeatable.",
)
run_id_option = click.option("--run-id", default="", help="The run, if the ledger holds several.")
settings_option = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Set a configuration key; repeatable.",
)


def named_limits(settings: Sequence[str]) -> dict[str, Any]:
    """Return the table ``broker.limits`` of some ``NAME=VALUE``.

    Raises:
        ConfigError: one of them has no value, or a dot in its name.
    """
    from fedmq.nodes.run.toml import setting_value

    table = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--limit {setting}: expected NAME=VALUE, such as nodes=1000")
        if "." in name:
            raise ConfigError(
                f"--limit {setting}: expected the name of a limit without a dot, such as nodes=1000"
            )
        table[name.strip()] = setting_value(text.strip())
    return table


class UsageSentence(click.UsageError):
    """A mistake on the command line, printed like all errors of fedmq."""

    def show(self, file: Any = None) -> None:
        """Print the sentence to standard error."""
        click.echo(f"fedmq: {self.message}", file=file, err=file is None)


class Commands(click.Group):
    """A group of commands; a mistake is a one-line error that lists the valid choices."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the group's own options."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _in_a_sentence(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _in_a_sentence(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name.

        Raises:
            UsageSentence: there is no such command.
        """
        name, names = args[0], self.list_commands(ctx)
        if name not in names and not name.startswith("-"):
            text = f"there is no command {name!r}{guess(name, names)}"
            raise UsageSentence(_of_command(f"{text}; choose from {', '.join(names)}", ctx), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of each command's help; click would truncate it."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_sentence(each)) for name, each in commands if each is not None]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class WholeNumber(click.ParamType):  # type: ignore[type-arg] # generic only in newer click
    """A whole number of at least ``min``."""

    name = "number"

    def __init__(self, min: int = 0) -> None:  # noqa: A002 - as click's own types have it
        self._min = min

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a number from the command line."""
        try:
            number = int(value)
        except ValueError:
            number = self._min - 1
        if number < self._min:
            self.fail(f"expected a whole number from {self._min}, got {value}", param, ctx)
        return number


class Number(click.types.FloatParamType):
    """A number; the error names what was expected."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number from the command line."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"expected a number, got {value!r}", param, ctx)


class Word(click.Choice):  # type: ignore[type-arg] # generic only in newer click
    """One of several words; the error names them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a word from the command line."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            choices = ", ".join(map(str, self.choices))
            self.fail(f"expected one of {choices}, got {value!r}", param, ctx)


class RenamedOptions(click.Command):
    """A command with options that had another name in the last release.

    Args:
        renamed: new names by old ones; an old name works, is not in the help, and prints a notice.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._renamed = renamed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options, after a notice for each old name among them."""
        options = args[: args.index("--")] if "--" in args else args
        current = [self._current(each) for each in options]
        return super().parse_args(ctx, current + args[len(options) :])

    def _current(self, arg: str) -> str:
        old, equals, value = arg.partition("=")
        if old not in self._renamed:
            return arg
        click.echo(renaming_notice(old, self._renamed[old]), err=True)
        return f"{self._renamed[old]}{equals}{value}"


def above_zero(
    context: click.Context, option: click.Parameter, seconds: float | None
) -> float | None:
    """Check that a time is finite and above 0."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise click.BadParameter(f"expected seconds above 0, got {seconds:g}", context, option)
    return seconds


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").split("\f")[0].split())
    return text.partition(". ")[0].rstrip(".")


def _in_a_sentence(error: click.UsageError) -> click.UsageError:
    """Return a mistake as a one-line error."""
    if isinstance(error, UsageSentence) or (_HELP and isinstance(error, _HELP)):
        return error
    return UsageSentence(_sentence(error), error.ctx)


def _sentence(error: click.UsageError) -> str:
    match error:
        case click.NoSuchOption(option_name=name, possibilities=known):
            close = f" (did you mean {known[0]!r}?)" if known else "; --help lists them"
            text = f"there is no option {name!r}{close}"
        case click.MissingParameter(param=click.Parameter() as parameter):
            text = f"expected {_expected(parameter)}"
        case click.BadParameter(param=click.Parameter() as parameter):
            is_word = isinstance(parameter.type, click.Choice) and not _is_option(parameter)
            wanted = _plain(error)
            text = wanted if is_word else f"{_shown(parameter)}: {wanted}"
        case _:
            text = _plain(error)
    return _of_command(text, error.ctx)


def _of_command(text: str, ctx: click.Context | None) -> str:
    """Return a sentence after the name of its command."""
    names: list[str] = []
    while ctx is not None and ctx.parent is not None:
        names.insert(0, ctx.info_name or "")
        ctx = ctx.parent
    return f"{' '.join(names)}: {text}" if names else text


def _plain(error: click.UsageError) -> str:
    """Return click's message as one line that starts in lower case and has no full stop."""
    text = " ".join(error.message.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _is_option(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option)


def _shown(parameter: click.Parameter) -> str:
    if _is_option(parameter):
        return max(parameter.opts, key=len)
    return (parameter.metavar or parameter.name or "").upper()


def _expected(parameter: click.Parameter) -> str:
    if isinstance(parameter.type, click.Choice):
        choices = "one of " + ", ".join(map(str, parameter.type.choices))
        return f"{_shown(parameter)} {choices}" if _is_option(parameter) else choices
    if _is_option(parameter):
        return f"{_shown(parameter)} {parameter.metavar or parameter.type.name.upper()}"
    return _shown(parameter)


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Read client ranges such as ``0-9,12``, ends included; adjacent ranges are merged.

    Raises:
        ConfigError: the text has another form.
    """
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match:
            raise ConfigError(f"--clients: expected ranges such as 0-9,12, got {text!r}")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ConfigError(f"--clients: expected the lower number first, got {part.strip()!r}")
        if ranges and low == ranges[-1][1] + 1:
            low = ranges.pop()[0]
        ranges.append((low, high))
    return ranges


@contextlib.contextmanager
def exit_2_on_error() -> Iterator[None]:
    """Print fedmq's own errors as one sentence; exit with code 2, or 1 if something failed."""
    try:
        yield
    except RunFailed as error:
        click.echo(f"fedmq: the run failed: {plain(error, LONGEST_TEXT)}", err=True)
        sys.exit(1)
    except ON_PURPOSE as error:
        click.echo(f"fedmq: {plain(error, LONGEST_TEXT)}", err=True)
        sys.exit(1 if isinstance(error, GaveUp | BrokerFailed) else 2)
