"""The command line: all commands of ``fedmq``."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fedmq.broker.access.invites import PREFIX
from fedmq.broker.process import give_torch_huge_pages, tune_process
from fedmq.broker.wire.addresses import name_fault
from fedmq.nodes.cli.codec import codec
from fedmq.nodes.cli.keys import keys
from fedmq.nodes.cli.ledger import ledger
from fedmq.nodes.cli.nodes import aggregator, worker
from fedmq.nodes.cli.options import (
    DEFAULT_ENDPOINT,
    Commands,
    Number,
    RenamedOptions,
    UsageSentence,
    WholeNumber,
    Word,
    above_zero,
    config_argument,
    exit_2_on_error,
    keys_option,
    named_limits,
    settings_option,
)
from fedmq.nodes.cli.personalise import personalise
from fedmq.nodes.cli.replay import replay
from fedmq.nodes.cli.runs import simulate, sweep
from fedmq.nodes.cli.trace import trace
from fedmq.nodes.cluster.console import output_console
from fedmq.nodes.cluster.environment import check_surroundings
from fedmq.nodes.errors import ConfigError, own_code
from fedmq.nodes.keys.folder import JOIN_VARIABLE
from fedmq.nodes.keys.trust import find_own_code
from fedmq.nodes.process import logs, streams
from fedmq.nodes.process.ending import ending_well
from fedmq.nodes.process.signals import this_process


class _Commands(Commands):
    """All commands; they handle signals and failing output in the same way."""

    def make_context(
        self, info_name: str | None, args: list[str], *others: Any, **more: Any
    ) -> click.Context:
        """Read the options, unless one is an invite: the error must not show it."""
        if any(PREFIX in each for each in args):
            raise UsageSentence(
                "an invite on a command line can be read by other users, and stays in the shell's "
                f"history: use --join-file FILE, --join-file - for standard input, or the variable "
                f"{JOIN_VARIABLE}"
            )
        return super().make_context(info_name, args, *others, **more)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command, see `ending_well`."""
        with ending_well():
            return super().main(*args, **extra)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedmq")
def main() -> None:
    """Asynchronous federated learning over a message queue."""
    with exit_2_on_error():
        check_surroundings()
    give_torch_huge_pages()


main.add_command(trace)


_insecure = click.option(
    "--insecure",
    is_flag=True,
    help="Without keys, let anybody who reaches the broker's address connect, and read all.",
)


@main.command()
@config_argument
@settings_option
@click.option("--workers", type=WholeNumber(min=1), help="Number of worker processes.")
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the run; if it holds a run, that run resumes. Default: runs/ID.",
)
@keys_option
@_insecure
def cluster(
    config: Path | None,
    settings: tuple[str, ...],
    workers: int | None,
    folder: Path | None,
    keys_folder: Path | None,
    insecure: bool,  # noqa: FBT001 - click's
) -> None:
    """Train on this host: broker, aggregator, workers and evaluator as processes.

    CONFIG is a TOML file, or - for standard input; keys that it and --set leave out have their
    defaults. With broker.bind, workers of other hosts can connect, too: --keys has the broker's
    key, see fedmq keys.
    """
    now = time.time()
    from fedmq.nodes.cluster.continuing import about, asking, continuation, show_ended
    from fedmq.nodes.cluster.forking import preloading
    from fedmq.nodes.cluster.listening import Listening
    from fedmq.nodes.cluster.supervisor import Cluster, resume_command, worker_names

    settings = (*settings, *([f"worker.count={workers}"] if workers else []))
    streams.go_on_without_output()
    console = output_console()
    with exit_2_on_error(), asking(config, settings, folder, now) as asked:
        find_own_code(asked.config.allowed)
        # The configuration in the folder includes the changes of --set.
        listening = Listening.of(asked.config.broker.listens_at, keys_folder, insecure=insecure)
        resume_with = resume_command(asked.folder, None if settings else config, listening.options)
        resumed = None
        if asked.recorded is not None:
            resumed = continuation(asked)
            if resumed is None:
                show_ended(asked, console)
                sys.exit(1 if asked.recorded.failed else 0)
            this_process.hint = f"resume with: {resume_with}"
            console.print(about(asked, resumed), highlight=False, soft_wrap=True, markup=False)
        with preloading():
            from fedmq.nodes.run.devices import choose_device
            from fedmq.nodes.run.setup import check_attainable, set_up

            with own_code("problem.name"):
                setup = set_up(asked.config)
                # Without the data or the device, nothing is started.
                choose_device(asked.config.worker.device)
                clients = setup.problem.clients
                check_attainable(setup, worker_names(setup.config, clients))
                setup.problem.test()
                setup.problem.client(0)
        code = Cluster(
            *(setup.config, clients, asked.folder, asked.begun, console),
            continuation=resumed,
            resume_with=resume_with,
            listening=listening,
        ).run()
    sys.exit(code)


@main.command(cls=RenamedOptions, renamed={"--offer-parked": "--redeliver-dead-letters"})
@click.option(
    "--bind",
    "binds",
    metavar="ADDRESS",
    multiple=True,
    default=[DEFAULT_ENDPOINT],
    show_default=True,
    help="Listen here, such as tcp://*:7700 or ipc://PATH; repeatable.",
)
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--lease",
    "lease_s",
    metavar="SECONDS",
    type=Number(),
    callback=above_zero,
    default=10.0,
    show_default=True,
    help="Count a node as gone after this time of silence.",
)
@click.option(
    "--durability",
    type=Word(["process", "power"]),
    default="process",
    show_default=True,
    help="What acknowledged messages survive: the broker's death, or also a power failure.",
)
@click.option(
    "--retain",
    default="everything",
    show_default=True,
    help="Payloads to keep: everything, unfinished, headers, or a number of bytes.",
)
@click.option(
    "--share-files/--no-share-files",
    default=True,
    help="Let nodes on this host read blobs from the ledger's files.",
)
@click.option(
    "--limit",
    "limits",
    metavar="NAME=VALUE",
    multiple=True,
    help="Set a limit of broker.limits, see docs/configuration.md; repeatable.",
)
@click.option("--redeliver-dead-letters", is_flag=True, help="Deliver dead letters again.")
@click.option(
    "--release-names",
    is_flag=True,
    help="Let others take the names of nodes that have left, whose keys are lost.",
)
@click.option("--once", is_flag=True, help="Exit at the end of the run, and write its summary.")
@click.option(
    "--run-id", default="", help="Serve only this run; default with --once: the first to be opened."
)
@keys_option
@_insecure
def broker(
    binds: tuple[str, ...],
    folder: Path,
    lease_s: float,
    durability: str,
    retain: str,
    share_files: bool,  # noqa: FBT001 - click's
    limits: tuple[str, ...],
    redeliver_dead_letters: bool,  # noqa: FBT001 - click's
    release_names: bool,  # noqa: FBT001 - click's
    once: bool,  # noqa: FBT001 - click's
    run_id: str,
    keys_folder: Path | None,
    insecure: bool,  # noqa: FBT001 - click's
) -> None:
    """Run the broker; it resumes from the ledger in its folder.

    Beyond this host, it needs keys, see fedmq keys. With --keys, nodes of this host need them, too,
    except over ipc://.
    """
    from fedmq.broker.ledger.reader import read_entries
    from fedmq.broker.router import BrokerServer
    from fedmq.nodes.history.run import runs_of
    from fedmq.nodes.keys.serving import broker_keys, how_to_connect, unused_keys
    from fedmq.nodes.run.config import build
    from fedmq.nodes.run.toml import setting_value
    from fedmq.nodes.run_folder.folder import LEDGER, begun_at, check_not_simulated, state_of
    from fedmq.nodes.run_folder.summary_file import SUMMARY_FILE, remove_summary, write_summary

    streams.go_on_without_output()
    logs.configure(None, node="broker")
    tune_process()
    with exit_2_on_error():
        given = {
            "lease_s": lease_s,
            "durability": durability,
            "retain": setting_value(retain),
            "share_files": share_files,
            "limits": named_limits(limits),
        }
        table = build({"broker": given}).broker
        ledger_settings = replace(
            table.ledger_settings(), redeliver_dead_letters=redeliver_dead_letters
        )
        if run_id and (fault := name_fault(run_id)):
            raise ConfigError(f"--run-id: {fault}")
        settings = replace(
            table.settings(), release_names=release_names, only_run=run_id, once=once
        )
        check_not_simulated(folder)
        own = broker_keys(binds, keys_folder, insecure=insecure)
        server = BrokerServer(
            binds, folder / LEDGER, settings, ledger_settings, keys=own, insecure=insecure
        )
        runs = runs_of(read_entries(folder / LEDGER))
        found = state_of([runs[each] for each in runs if run_id in ("", each)], once=once)
        where = f"listening on {', '.join(server.endpoints)}, ledger in {folder / LEDGER}"
        click.echo(f"{where}; {found}", err=True)
        if own is not None:
            for line in how_to_connect(own, server.endpoints):
                click.echo(line, err=True)
        elif unused := unused_keys():
            click.echo(unused, err=True)
        if once:
            remove_summary(folder)
        with this_process.noting(server.stop):
            server.serve(until_idle=once)
            if once:
                write_summary(folder, begun_at(folder), run_id)
                click.echo(f"summary in {folder / SUMMARY_FILE}", err=True)
        this_process.check()


@main.command("list")
@click.argument(
    "what", type=Word(["algorithms", "codecs", "distributions", "problems", "schedules"])
)
def list_(what: str) -> None:
    """List the available algorithms, codecs, distributions, problems or schedules.

    Algorithms and schedules are listed with their configuration keys and defaults, problems with
    the numbers of training + test examples and the default model. Distributions are for
    [simulation] and worker.slowdown.
    """
    from fedmq.nodes.cli.catalogue import lines

    for line in lines(what, shutil.get_terminal_size().columns):
        click.echo(line)


main.add_command(aggregator)
main.add_command(codec)
main.add_command(keys)
main.add_command(ledger)
main.add_command(personalise)
main.add_command(replay)
main.add_command(simulate)
main.add_command(sweep)
main.add_command(worker)
