"""The promises of docs/guarantees.md: a function for each that checks a finished history.

What can only be seen while a history runs is checked by `tests.sim.witness`.
"""

import random
from collections import Counter, defaultdict

from fedmq.broker.errors import LedgerError
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.blob_store import BlobStore, read_payload
from fedmq.broker.ledger.disk import LOCAL_DISK
from fedmq.broker.ledger.entries import (
    PAYLOAD,
    Accepted,
    Consumed,
    Ended,
    Refusal,
    blob_name,
    segment_numbers,
)
from fedmq.broker.ledger.reader import read_entries
from fedmq.broker.rejections import Code
from fedmq.broker.virtual.disk import DiskFault, VirtualDisk
from fedmq.broker.wire.addresses import (
    AGGREGATOR,
    AVAILABILITY,
    BROKER,
    CHECKPOINT,
    EVALUATOR,
    RECORD,
    TIMER,
    WORKER,
    addresses,
)
from fedmq.broker.wire.schema import Blob
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.simulation.virtual_run import RUN
from tests.sim.strangers import MALLORY

UNDELIVERED = (RECORD, CHECKPOINT, TIMER)
ANSWERS = {WORKER: ("result", "failed", "score", AVAILABILITY), EVALUATOR: ("failed", "score")}
"""Kinds of messages of each role but the aggregator's."""

# ---- durability


def check_blobs(history):
    """The blobs of everything accepted are in the ledger, to the bit."""
    refused = [each.id for each in history.entries if getattr(each, "code", "") == Code.LOST]
    assert not refused, f"lost: the bytes of {refused}"
    if not history.is_whole:
        return
    index = read_payload(history.folder, LOCAL_DISK)  # damaged where nothing was acknowledged
    try:
        for message in {id(each): each for each in history.messages.values()}.values():
            for blob in message.blobs:
                data = index.read(blob_name(message, blob), 0, blob.size)
                assert Blob.of(data) == blob, f"other bytes of {message.id}"
    finally:
        index.close()


# ---- exactly-once application


def check_accepted_once(history):
    """No message is accepted twice."""
    accepted = Counter((each.sender, each.id) for each in history.messages.values())
    twice = [name for name, times in accepted.items() if times > 1]
    assert not twice, f"accepted twice: {twice}"


def check_local_states(history):
    """A task changes its client once: what it saved counts its tasks without a gap."""
    tasks = defaultdict(list)
    for message in history.messages.values():
        if message.kind == "result":
            tasks[message.body["client"]].append(message.body["numbers"]["tasks"])
    for client, numbers in tasks.items():
        assert numbers == list(range(1, len(numbers) + 1)), f"client {client} did {numbers}"


def check_fold(history):
    """The aggregator's state is the fold of its inbox, to the bit, whatever died meanwhile.

    The replay also checks every message that the aggregator sent, in all sessions.
    """
    live = history.aggregator
    assert live.version == history.setup.config.run.versions
    if not history.is_whole:
        return  # a replay needs the blobs that were deleted
    replay = Replay(Trace(history.folder, RUN), setup=history.setup)
    for _ in replay.steps():
        pass
    assert replay.core.version == live.version
    assert model_digest(replay.core.tensors()) == model_digest(live.tensors())
    assert replay.core.state_snapshot()["counts"] == live.state_snapshot()["counts"]
    assert not replay.record.unmatched


# ---- ordering


def check_numbers(history):
    """The ledger's numbers have no gaps; a session's messages stand in the order of its posts."""
    entries, position = history.entries, {}
    for entry in entries:
        if isinstance(entry, Accepted):
            position[entry.message] = entry.seq
    assert [each.seq for each in entries] == list(range(len(entries)))
    for name, sessions in history.witness.deliveries_by_node().items():
        before = set()
        for session in sessions:
            posts = list(session.node.port.posts.values())
            found = [position[each] for each in posts if each not in before and each in position]
            assert found == sorted(found), f"{name} is out of order in the ledger"
            before.update(posts)


def check_deliveries(history):
    """A session receives each unfinished message of its node, in order and without gaps."""
    finished = {}
    for entry in history.entries:
        consumed = entry.consumes if isinstance(entry, Accepted) else getattr(entry, "of", ())
        for seq in consumed if isinstance(consumed, tuple) else ():
            finished[seq] = entry.seq
    waiting = defaultdict(list)
    for seq, message in history.messages.items():
        if message.to not in UNDELIVERED:
            waiting[message.to].append(seq)
    for name, sessions in history.witness.deliveries_by_node().items():
        mine = sorted(
            seq for each in addresses(sessions[0].node.hello) for seq in waiting.get(each, ())
        )
        for session in sessions:
            before = -1
            received = {delivery.seq for delivery, _ in session.deliveries}
            missed = [seq for seq in mine if seq not in received]
            for delivery, entries in session.deliveries:
                assert delivery.seq > before, f"{name} received {delivery.seq} after {before}"
                before = delivery.seq
                while missed and missed[0] < before:
                    seq = missed.pop(0)
                    done = finished.get(seq, len(history.entries)) < entries
                    assert done, f"{name} received {before}, but not {seq}"


# ---- explicit rejection


def check_account(history):
    """Each accepted message is consumed at most once and rejected at most once; nothing else is."""
    accepted, consumed, rejected = set(), set(), set()

    def consume(seqs):
        for seq in seqs:
            assert seq in accepted, f"consumed what was not accepted: {seq}"
            assert seq not in consumed, f"consumed twice: {seq}"
            consumed.add(seq)

    for entry in history.entries:
        match entry:
            case Accepted(consumes=consumes):
                consume(consumes)
                if history.messages[entry.seq].to != RECORD:
                    accepted.add(entry.seq)
            case Consumed(of=of):
                consume(of)
            case Refusal(of=int(seq)):
                assert seq in accepted, f"rejected what was not accepted: {seq}"
                assert seq not in rejected, f"rejected twice: {seq}"
                rejected.add(seq)


def check_notices(history):
    """The sender of everything that was rejected is notified, with the reason and its code."""
    notices = defaultdict(list)
    for message in history.messages.values():
        if message.kind == "refused":
            notices[message.re].append((message.body["reason"], message.body["code"]))
    for entry in history.entries:
        if isinstance(entry, Refusal):
            of_broker = entry.of is not None and history.messages[entry.of].sender == BROKER
            why = (entry.reason, entry.code)
            assert of_broker or why in notices[entry.id], f"no notice of {entry.id}: {entry.reason}"


# ---- rights


def check_rights(history):
    """A node posts only what its role may, and a stranger gets nothing and changes nothing."""
    roles, asked = {}, set()
    for message in history.messages.values():
        if message.sender == BROKER:
            if message.kind == "joined":
                roles[message.body["node"]] = message.body["role"]
            continue
        role = roles[message.sender]
        if role == AGGREGATOR:
            asked.add(message.id)
            continue
        what = f"{message.kind} from {message.sender}, the {role}, to {message.to}"
        assert message.sender != MALLORY, what
        assert message.kind in ANSWERS[role], what
        assert message.to == AGGREGATOR, what
        assert message.re in asked or message.kind == AVAILABILITY, f"{what}: nobody asked for it"
    mallory = history.mallory
    assert mallory is None or not mallory.gained, f"a stranger received {mallory.gained[:3]}"


def check_invites(history):
    """An invite lets in as many keys as it has uses, and each key that was let in is stored."""
    if history.access is None:
        return
    guests = [each for each in history.simulation.guests if each.is_enrolled]
    told = Counter(each.invite for each in guests)
    for invite, uses in history.simulation.uses.items():
        found = history.access.invites[invite]
        assert found.uses == uses - len(found.enrolled) >= 0, f"{found} had {uses} uses"
        assert told[invite] <= uses, f"{told[invite]} keys were let in with {uses} uses"
    lost = [each.name for each in guests if each.key not in history.access.keys]
    assert not lost, f"the keys of {lost} were acknowledged, and are not stored"


# ---- liveness and time


def check_ended(history):
    """The run ends, once its faults do."""
    failures = history.witness.broker.failures[-1:]
    why = (
        f"not over after {history.limit_s:g} s of virtual time; the broker's last error: {failures}"
    )
    assert history.ended, why


def check_timers(history):
    """No timer fires early, on the ledger's clock; none is forgotten."""
    due = {}
    for entry in history.entries:
        if isinstance(entry, Accepted):
            message = history.messages[entry.seq]
            for seq in entry.consumes:
                if seq in due:
                    assert entry.at > due.pop(seq) - 1e-6, f"timer {seq} fired early"
            if message.to == TIMER:
                due[entry.seq] = entry.at + message.body["after_s"]
        elif isinstance(entry, Ended):
            late = [seq for seq, when in due.items() if when < entry.at - 10]
            assert not late, f"timers {late} were forgotten"


def check_time(history):
    """The ledger's time never goes back."""
    before = 0.0
    for entry in history.entries:
        assert entry.at >= before, f"entry {entry.seq} is {before - entry.at:g} s before the last"
        before = entry.at


# ---- reads


def check_blob_reads(history):
    """What a node reads of a blob are the bytes that its sender posted."""
    wrong = history.witness.wrong_reads
    assert not wrong, f"nodes have read wrong bytes: {wrong[:3]}"


def check_reads(history):
    """A read of flipped bits gives the record that was written, or an error."""
    disk = VirtualDisk(random.Random(history.seed))  # noqa: S311 - a test's own dice
    disk.rates = {DiskFault.FLIPPED_BIT: 0.3, DiskFault.READ_ERROR: 0.05}
    try:
        for entry, true in zip(read_entries(history.folder, disk), history.entries, strict=False):
            assert entry == true, f"a damaged read gave another entry {true.seq}"
    except LedgerError:
        pass
    index = BlobStore(history.folder, disk)
    try:
        for number in segment_numbers(history.folder, PAYLOAD):
            index.add_segment(number)
        for message in list(history.messages.values())[-20:]:
            for blob in message.blobs:
                data = index.read(blob_name(message, blob), 0, blob.size)
                assert Blob.of(data) == blob, f"a damaged read gave other bytes of {message.id}"
    except LedgerError:
        pass
    finally:
        index.close()


CHECKS = (
    check_blob_reads,
    check_ended,
    check_time,
    check_numbers,
    check_accepted_once,
    check_account,
    check_notices,
    check_deliveries,
    check_timers,
    check_rights,
    check_invites,
    check_local_states,
    check_blobs,
    check_reads,
    check_fold,  # last: it notices most faults, but not which
)
