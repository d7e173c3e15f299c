"""``fedmq replay``: run the nodes of a recorded run again and compare them with the record."""

from __future__ import annotations

import code
import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmq.nodes.cli.options import (
    RenamedOptions,
    WholeNumber,
    allow_option,
    exit_2_on_error,
    folder_argument,
    run_id_option,
)
from fedmq.nodes.errors import NodeError
from fedmq.nodes.keys.trust import allowed_here, find_own_code
from fedmq.nodes.process.signals import this_process
from fedmq.nodes.process.terminal import fitted, plural

if TYPE_CHECKING:
    from fedmq.algorithms.allowed import Allowed
    from fedmq.broker.inspection.trace import Trace
    from fedmq.nodes.replay.fold import Replay, ReplayStep


@click.command(cls=RenamedOptions, renamed={"--against": "--compare"})
@folder_argument
@run_id_option
@click.option("--until", type=WholeNumber(min=0), metavar="OFFSET", help="Stop at this entry.")
@click.option("--shell", is_flag=True, help="Open a Python prompt on the state at that entry.")
@click.option(
    "--from-checkpoint", is_flag=True, help="Start from the newest checkpoint before that entry."
)
@click.option("--worker", metavar="NAME", help="Train the tasks of this node again.")
@click.option("--task", metavar="ID", help="Train only this task of the worker.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Recompute the learning curve with other aggregation settings; repeatable.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Write digests of the state after each message to this folder, for --compare.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    help="Find the first difference from a folder of --save, or from another run.",
)
@allow_option
def replay(
    folder: Path,
    run_id: str,
    until: int | None,
    shell: bool,  # noqa: FBT001 - click's
    from_checkpoint: bool,  # noqa: FBT001 - click's
    worker: str | None,
    task: str | None,
    settings: tuple[str, ...],
    save: Path | None,
    compare: Path | None,
    allow: tuple[str, ...],
) -> None:
    """Run the aggregator again and verify every message against the ledger.

    DIR is the folder of the run. Exit code 0: all messages match; 1: some differ.
    """
    with _importing():
        from fedmq.nodes.replay.record import Diverged

    _check_options(until, shell, from_checkpoint, worker, task, settings, save, compare)
    with exit_2_on_error():
        from fedmq.broker.errors import NotKept
        from fedmq.broker.inspection.trace import Trace

        trace = Trace(folder, run_id)
        allowed = allowed_here(allow)
        find_own_code(allowed)
        try:
            if worker is not None:
                matches = _retrain(trace, allowed, worker, task)
            elif settings:
                matches = _what_if(trace, allowed, settings)
            else:
                resume = from_checkpoint
                matches = _fold(trace, allowed, until, save, compare, shell=shell, resume=resume)
        except Diverged as error:
            click.echo(str(error))
            matches = False
        except NotKept as error:
            text = f"cannot replay run {trace.run}: {error} (see broker.retain)"
            raise NodeError(text) from None
    if not matches:
        raise click.exceptions.Exit(1)


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import torch without garbage collection, which takes 1.4 s instead of 1.7 s."""
    gc.disable()
    yield
    gc.enable()


def _check_options(
    until: int | None,
    shell: bool,  # noqa: FBT001 - as above
    from_checkpoint: bool,  # noqa: FBT001
    worker: str | None,
    task: str | None,
    settings: tuple[str, ...],
    save: Path | None,
    compare: Path | None,
) -> None:
    """Raise UsageError for options that do not go together."""
    options = {
        "--until": until is not None,
        "--shell": shell,
        "--from-checkpoint": from_checkpoint,
        "--save": save is not None,
        "--compare": compare is not None,
    }
    given = [name for name, there in options.items() if there]
    if task is not None and worker is None:
        raise click.UsageError("--task needs --worker")
    if worker is not None and (given or settings):
        raise click.UsageError(f"cannot combine --worker with {[*given, '--set'][0]}")
    if settings and given:
        raise click.UsageError(f"cannot combine --set with {given[0]}")
    if save is not None and compare is not None:
        raise click.UsageError("cannot combine --save with --compare")
    if from_checkpoint and (save is not None or compare is not None):
        which = "--save" if save is not None else "--compare"
        raise click.UsageError(f"cannot combine {which} with --from-checkpoint")


def _fold(
    trace: Trace,
    allowed: Allowed,
    until: int | None,
    save: Path | None,
    compare: Path | None,
    *,
    shell: bool,
    resume: bool,
) -> bool:
    """Replay the aggregator; return whether all actions match."""
    from fedmq.broker.errors import LedgerError
    from fedmq.nodes.replay.fold import Replay, last_checkpoint
    from fedmq.nodes.replay.record import Diverged
    from fedmq.nodes.replay.state_digests import FILE

    began = time.perf_counter()
    run = Replay(trace, last_checkpoint(trace, until) if resume else None, allowed=allowed)
    last: ReplayStep | None = None
    shown = time.monotonic()
    try:
        for step in _steps(run, allowed, until, save, compare):
            last = step
            if sys.stderr.isatty() and time.monotonic() - shown > 1.0:
                shown = time.monotonic()
                click.echo(f"\rversion {run.core.version}", nl=False, err=True)
    except Diverged as error:
        if not shell:
            raise
        click.echo(str(error))
        _prompt(run, last)
        return False
    except LedgerError:
        if run.messages:  # those before the damage
            _report(run, time.perf_counter() - began, until)
        raise
    if shell:
        _prompt(run, last)
        return True
    _report(run, time.perf_counter() - began, until)
    if save is not None:
        click.echo(f"saved the state after each message to {save / FILE}")
    elif compare is not None:
        click.echo(f"the state after each message equals that of {compare}")
    return True


def _steps(
    run: Replay, allowed: Allowed, until: int | None, save: Path | None, compare: Path | None
) -> Iterator[ReplayStep]:
    from fedmq.broker.inspection.trace import Trace
    from fedmq.nodes.replay.fold import Replay
    from fedmq.nodes.replay.state_digests import (
        FILE,
        compare_runs,
        compare_state_digests,
        save_state_digests,
    )

    if save is not None:
        return save_state_digests(run, save, until)
    if compare is None:
        return run.steps(until)
    if (compare / FILE).exists():
        return compare_state_digests(run, compare, until)
    if not compare.is_dir():
        raise NodeError(f"--compare: expected the folder of a run or of --save, got {compare}")
    return compare_runs(run, Replay(Trace(compare), allowed=allowed), until)


def _report(run: Replay, took_s: float, until: int | None) -> None:
    from fedmq.nodes.run.digests import model_digest

    messages, actions = plural(run.messages, "message"), f"{run.record.compared:,} actions"
    how = "" if run.record.exact else " within the tolerance"
    click.echo(f"replayed {messages}: all {actions} match the record{how}")
    for sentence in _about_machines(run):
        click.echo("\n".join(fitted(sentence)))
    core = run.core
    click.echo(f"version {core.version}, model {model_digest(core.tensors())}")
    if run.record.unmatched and until is None:
        more = plural(run.record.unmatched, "more action")
        click.echo(f"{more} than in the record, which ends before")
    lasted = run.at - run.trace.opened.at
    where = f", up to entry {until}," if until is not None else ""
    click.echo(f"replayed {lasted:.1f} s of the run{where} in {took_s:.2f} s")


def _about_machines(run: Replay) -> Iterator[str]:
    """Yield sentences on what this machine computes differently from the recording one."""
    from fedmq.algorithms.toolkit.arithmetic import ARITHMETIC
    from fedmq.nodes.replay.tolerance import LOSSY_TOLERANCE, TOLERANCE
    from fedmq.nodes.run.devices import kind_of

    if not run.record.exact:
        if run.computed.arithmetic < ARITHMETIC:
            why = "the run was recorded by fedmq 0.1.0, whose sums differ in the last bits"
        elif run.computed.arithmetic > ARITHMETIC:
            why = "the run was recorded by a later release, whose sums may differ in the last bits"
        else:
            why = (
                f"{run.setup.algorithm.name} computes different last bits on {kind_of('cpu')} "
                f"than on {run.computed.device or 'an unknown CPU'}"
            )
        yield (
            f"{why}: tensors were compared within {TOLERANCE:g} ({LOSSY_TOLERANCE:g} for lossy "
            f"codecs), and the replay restarted from each recorded checkpoint; the largest "
            f"distance was {run.record.max_distance:.2g} of the tolerance"
        )
    if run.version_0_distance:
        distance = run.version_0_distance * TOLERANCE
        yield f"version 0 was read from the record; here, model() differs from it by {distance:.2g}"
        if distance > TOLERANCE:
            yield f"that is more than {TOLERANCE:g}: is model() seeded, and the code the same?"


def _prompt(run: Replay, last: ReplayStep | None) -> None:
    """Open a Python prompt on the state of a replay."""
    names: dict[str, Any] = {
        "trace": run.trace,
        "core": run.core,
        "parts": run.core.state_snapshot(),
        "setup": run.setup,
        "event": last.event if last else None,
        "actions": last.actions if last else [],
    }

    def step(count: int = 1) -> Any:
        """Process the next messages of the inbox; return the last."""
        for each in itertools.islice(run.steps(), count):
            names.update(event=each.event, actions=each.actions, parts=run.core.state_snapshot())
        return names["event"]

    names["step"] = step
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() history and editing
    banner = (
        f"version {run.core.version}, {plural(run.messages, 'message')} processed\n"
        "core: the aggregator; parts: its state by name; event: the last message;\n"
        "actions: its response; step(n): process n messages; setup; trace; Ctrl-D leaves"
    )
    with this_process.prompting():
        code.interact(banner=banner, local=names, exitmsg="")


def _retrain(trace: Trace, allowed: Allowed, node: str, task: str | None) -> bool:
    """Train a worker's tasks again; return whether all results match the record."""
    from fedmq.nodes.replay.fold import recorded_setup
    from fedmq.nodes.replay.tolerance import TOLERANCE
    from fedmq.nodes.replay.workers import Retraining
    from fedmq.nodes.run.devices import kind_of

    retraining = Retraining(trace, recorded_setup(trace, allowed=allowed), node)
    tasks = matching = near = 0
    evaluated = False
    for each in [retraining.train_one(task)] if task is not None else retraining.train_all():
        tasks += 1
        evaluated = each.message.kind == "score"
        matching += each.matches
        near += each.matches and each.distance is not None
        if each.distance is not None:
            device = each.message.body.get("device")
            where = "by fedmq 0.1.0" if device == kind_of("cpu") else f"on {device}"
            verdict = f"distance {each.distance:.2g} (tolerance {TOLERANCE:g}), recorded {where}"
            if each.distance > TOLERANCE:
                verdict += "; in a long task, rounding alone can grow this much"
        else:
            verdict = "same bytes" if each.matches else "differs"
        click.echo(
            f"{each.message.re}, result in entry {each.result}: {verdict}, {each.seconds:.2f} s"
        )
        if not each.matches:
            click.echo("".join(f"  {line}\n" for line in each.differences), nl=False)
    which = "all" if matching == tasks else f"{matching} of {tasks}"
    close = f", {near} only within the tolerance" if near else ""
    done = (
        f"evaluated {plural(tasks, 'model')} again"
        if evaluated
        else f"retrained {plural(tasks, 'task')}"
    )
    click.echo(f"{done}: {which} results match the record{close}")
    if trace.damage is not None:
        raise trace.damage  # the tasks before it have been trained
    return tasks == matching


def _what_if(trace: Trace, allowed: Allowed, settings: tuple[str, ...]) -> bool:
    """Print the curves of the recorded run and with other settings side by side."""
    from fedmq.broker.errors import LedgerError
    from fedmq.nodes.process.terminal import table
    from fedmq.nodes.replay.whatif import WhatIf, changed_setup

    setup = changed_setup(trace, settings, allowed)
    names = ("results", "version", "accuracy", "loss")
    rows = []
    damage: LedgerError | None = None
    try:
        for point in WhatIf(trace, setup, allowed).points():
            row = [f"{point.at:.1f}"]
            for index, metrics in enumerate((point.recorded or {}, point.other)):
                row += [str(point.results[index]), str(point.versions[index])]
                row += [_number(metrics.get(name)) for name in ("accuracy", "loss")]
            row[len(names)] += " |"
            rows.append(row)
    except LedgerError as error:
        damage = error
    click.echo("\n".join(fitted(f"left: as recorded; right: with {', '.join(settings)}")))
    click.echo("\n".join(table(["time s", *names[:-1], "loss |", *names], rows, left=0)))
    click.echo("The clients trained from the recorded models, not from those on the right.")
    if damage is not None:
        raise damage
    return True


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
