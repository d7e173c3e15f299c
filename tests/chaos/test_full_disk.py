"""A disk that fills up: the broker says so and waits, and nothing that was said is lost.

Full is made so in two ways: by a limit on the size of the broker's files, set from outside
(EFBIG; Python ignores the signal), and by a real file system that is small, where users may
mount one in a namespace of their own (ENOSPC, with writes that are cut short).
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.wire.schema import Blob, Hello, Message
from tests.chaos.crew import Crew, Process, wait_until
from tests.chaos.ledgers import Watch, check_books

pytestmark = pytest.mark.end_to_end

LEASE_S = 2.0
BUFFERED = {
    "schedule__name": "buffered",
    "schedule__size": 2,
    "schedule__concurrency": 4,
    "problem__clients": 4,
}
IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def fill(broker: Process, ledger: Path) -> None:
    """From now on, no file of the broker may be larger than its messages are now."""
    size = max(each.stat().st_size for each in ledger.glob("messages-*.log"))
    assert broker.log.stat().st_size < size, "the log must still be written"
    resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def again_while_full(crew: Crew, broker: Process, ledger: Path) -> Process:
    """Kill the broker, and start it again on a disk that is as full as before."""
    broker.kill()
    size = max(each.stat().st_size for each in ledger.glob("messages-*.log"))
    code = (
        "import os, sys; from resource import *; "
        "setrlimit(RLIMIT_FSIZE, (int(sys.argv[1]), RLIM_INFINITY)); "
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    broker = crew.broker(LEASE_S, before=(sys.executable, "-c", code, str(size)))
    wait_until("it to be full", lambda: broker.said().count("cannot write the ledger") == 2, 10)
    return broker


def make_room(broker: Process) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, unlimited)


@contextlib.contextmanager
def linked(endpoint: str, **hello: object) -> Iterator[NodeLink]:
    """A node of this process's own; whatever it waits for, it does not wait for ever."""
    link = NodeLink.connect(endpoint, Hello(run="r", session="s", **hello))  # type: ignore[arg-type]
    stop = threading.Timer(60, link.stop)
    stop.start()
    try:
        link.welcome()
        yield link
    finally:
        stop.cancel()
        stop.join()
        link.close()


def note(number: int) -> tuple[Message, list[bytes]]:
    """Return a message to client 0; every tenth with a blob that travels in chunks."""
    data = [bytes([number % 251]) * 1_500_000] if number % 10 == 0 else []
    blobs = tuple(Blob.of(each) for each in data)
    body = {"number": number, "padding": "x" * 500}
    message = Message(
        kind="note", id=f"n/{number}", run="r", sender="aggregator", to="client/0", body=body,
        blobs=blobs,
    )  # fmt: skip
    return message, data


@pytest.mark.parametrize("then", ["room", "restart", "restart while full"])
def test_what_is_posted_while_nothing_can_be_kept_arrives_once_and_in_order(
    crew: Crew, watch: Watch, then: str
) -> None:
    broker = crew.broker(LEASE_S)
    brings = {"config": "[run]", "total_clients": 1}
    with (
        capture_logs() as logs,
        linked(crew.endpoint, node="aggregator", role="aggregator", key="k", **brings) as sender,
        linked(crew.endpoint, node="w", role="worker", key="k", clients=((0, 0),)) as receiver,
    ):
        for number in range(50):
            sender.post(*note(number))
        sender.flush()
        fill(broker, crew.ledger)
        kept = list(read_entries(crew.ledger))
        for number in range(50, 200):
            sender.post(*note(number))

        def refusals() -> list[str]:
            return [each["reason"] for each in logs if "cannot write its ledger" in each["event"]]

        wait_until("the broker to say that it is full", lambda: len(refusals()) >= 8, 20)
        assert "File too large" in refusals()[0]
        assert broker.said().count("cannot write the ledger") == 1
        assert "File too large" in broker.said()
        assert broker.alive
        assert list(read_entries(crew.ledger)) == kept, "nothing can have been kept"
        if then == "restart while full":
            broker = again_while_full(crew, broker, crew.ledger)
        if then != "restart":
            make_room(broker)
            wait_until(
                "the broker to go on", lambda: "the ledger is writable again" in broker.said(), 10
            )
        else:
            broker.kill()
            broker = broker.again()
        got, numbers = [], []
        for _ in range(200):
            delivery = receiver.get()
            got.append(delivery.message.body["number"])
            numbers.append(delivery.seq)
            data = note(got[-1])[1]
            assert [bytes(delivery.read(0))] == data if data else True
            receiver.done([delivery.seq])
        assert got == list(range(200))
        assert numbers == sorted(set(numbers))
        sender.flush()
        receiver.flush()
    watch.read()
    assert watch.entries[: len(kept)] == kept
    notes = [each.message.body["number"] for each in watch.of_kind("note")]
    assert notes == list(range(200))
    assert broker.alive


def test_a_run_waits_while_the_disk_is_full_and_then_ends(crew: Crew, watch: Watch) -> None:
    broker = crew.broker(LEASE_S, "--once")
    aggregator = crew.aggregator(run__versions=15, **BUFFERED)
    workers = [crew.worker("one", "0-1"), crew.worker("two", "2-3")]
    watch.until_version(5)
    fill(broker, crew.ledger)
    wait_until("the broker to say so", lambda: "cannot write the ledger" in broker.said(), 10)
    nodes = [aggregator, *workers]
    for each in nodes:
        wait_until(f"{each.log.name} to hear of it", lambda it=each: keeps_nothing(it) > 4, 15)
    version = watch.version
    assert all(each.alive for each in [broker, *nodes])
    make_room(broker)
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert broker.wait(20) == 0, broker.said()[-3000:]
    assert version < 15
    assert "the ledger is writable again" in broker.said()
    books = check_books(crew.folder / "run", crew.folder / "model")
    assert books.versions == 15
    assert books.used == books.tasks - books.open_at_end
    assert not watch.of_kind("left"), "whose fault was it?"


def keeps_nothing(node: Process) -> int:
    return node.said().count("the broker cannot write its ledger")


def may_mount() -> bool:
    try:
        return not subprocess.run([*IN_NAMESPACE, "true"], check=False, timeout=10).returncode
    except OSError:
        return False


def test_a_run_waits_for_room_in_a_small_file_system(crew: Crew) -> None:
    if not may_mount():
        pytest.skip("no mounts in a user's own namespace here (unshare -Urm)")
    small = crew.folder / "run"
    small.mkdir()
    script = 'mount -t tmpfs -o size=48m none "$0" && head -c 40m /dev/zero > "$0/ballast"'
    before = (*IN_NAMESPACE, "sh", "-c", f'{script} && exec "$@"', str(small))
    broker = crew.broker(LEASE_S, before=before)
    wait_until("the broker", lambda: "listening on" in broker.said(), 10)
    inside = Path(f"/proc/{broker.pid}/root{small}")
    assert (inside / "ballast").stat().st_size == 40 << 20
    aggregator = crew.aggregator(run__versions=15, **BUFFERED)
    crew.worker("one", "0-1")
    crew.worker("two", "2-3")
    wait_until("the disk to be full", lambda: "cannot write the ledger" in broker.said(), 20)
    assert "No space left on device" in broker.said()
    wait_until("the aggregator to hear of it", lambda: keeps_nothing(aggregator) > 4, 15)
    kept = list(read_entries(inside / "ledger"))
    assert not any(isinstance(each, Accepted) and each.read().kind == "left" for each in kept)
    (inside / "ballast").unlink()
    assert aggregator.wait(60) == 0, aggregator.said()[-3000:]
    assert "the ledger is writable again" in broker.said()
    assert list(read_entries(inside / "ledger"))[: len(kept)] == kept
    books = check_books(inside, crew.folder / "model")
    assert books.versions == 15
    assert books.used == books.tasks - books.open_at_end
