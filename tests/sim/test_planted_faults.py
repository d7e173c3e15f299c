"""Each checker is shown to work: it catches a fault that is planted in the product.

`PLANTED` has the promises of docs/guarantees.md, the checkers of each, and the planted faults.
"""

import contextlib
import traceback
from collections import deque
from pathlib import Path
from unittest import mock

import pytest
from msgspec.structs import replace

from fedmq.broker import recovery
from fedmq.broker.access import access_file
from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.core import acceptance, admission
from fedmq.broker.core.broker import Broker
from fedmq.broker.core.deduplication import DedupWindow
from fedmq.broker.core.events import Append, SendTo
from fedmq.broker.core.joining import Admissions
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.core.sessions import Sessions
from fedmq.broker.core.state import Node, PendingPost
from fedmq.broker.driver import BrokerDriver
from fedmq.broker.errors import LedgerError
from fedmq.broker.ledger import blob_store, writer
from fedmq.broker.ledger.entries import Consumed
from fedmq.broker.ledger.segment_writer import Segment
from fedmq.broker.link import core as link_core
from fedmq.broker.link.core import Link
from fedmq.broker.recovery import Restorer
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.virtual.disk import DiskFault
from fedmq.broker.virtual.network import Faults
from fedmq.broker.wire.chunked_transfer import Fetcher
from fedmq.broker.wire.clock import Clock
from fedmq.broker.wire.schema import Enrolled
from fedmq.nodes.aggregator.driver import AggregatorDriver
from fedmq.nodes.simulation.virtual_run import Chances
from fedmq.nodes.worker.client_state import ClientStateStore
from tests.sim import promises, witness
from tests.sim.history import Plan, check_history
from tests.sim.keyed import KeyPlan

pytestmark = pytest.mark.soak

SMALL = {"inline_bytes": 100, "chunk_bytes": 64}
LOSS = Faults(loss=0.1, duplicate=0.1, reorder=0.1)


def plan(*, schedule=2, algorithm="Tally", checkpoint_s=0.0, sizes=None, who=None, **chances):
    """Return the plan of a short history with few kinds of faults; ``who``: keys and mallory."""
    chances = Chances(**{"train_s": 0.2, **chances})
    more = {**(sizes or {}), **(who or {})}
    return Plan(schedule, algorithm, checkpoint_s, chances, BrokerSettings(3.0, 0.5, 1000), **more)


POWER = plan(power=0.4)
CRASHES = plan(crash=0.3)
CRASHES_IN_TURNS = plan(schedule=1, doom=0.5, train_s=3.0)


def after(function, extra):
    """Return a function that calls ``extra`` with the same arguments after the original one."""

    def both(*arguments, **options):
        found = function(*arguments, **options)
        extra(*arguments)
        return found

    return both


def patch(where, name, new):
    """Return a context in which an attribute of the product is replaced."""
    return mock.patch.object(where, name, new)


def sends_before_commit():
    carry_out = BrokerDriver.carry_out

    def at_once(self, actions, now):
        carry_out(self, [each for each in actions if not isinstance(each, SendTo)], now)
        for each in actions:
            if isinstance(each, SendTo):
                self._send(each)

    return patch(BrokerDriver, "carry_out", at_once)


def syncs_nothing():
    return patch(Segment, "sync", lambda _: None)


def syncs_no_payload():
    sync = Segment.sync
    return patch(Segment, "sync", lambda self: None if "payload" in self.path.name else sync(self))


def syncs_no_folder():
    return mock.patch.multiple(writer, sync_folder=lambda *_: None)


def believes_a_second_sync():
    sync = Segment.sync

    def twice(self):
        try:
            sync(self)
        except LedgerError:
            sync(self)

    return patch(Segment, "sync", twice)


def forgets_ids():
    return patch(DedupWindow, "seen", lambda *_: "new")


def saves_no_client_state():
    return patch(ClientStateStore, "put", lambda _self, _client, state: state)


def acknowledges_before_the_checkpoint():
    def done(self, event):
        if self._unsettled:
            self._port.done([self._unsettled.pop()])

    return patch(AggregatorDriver, "handle", after(AggregatorDriver.handle, done))


def overtakes_missing_blobs():
    settle = Broker._settle

    def overtaking(self, node, now, out):
        def waits(frame):
            apart = isinstance(frame, PendingPost) and frame.apart
            return bool(apart) and self._uploads.resolve(node, frame) is None

        node.pending_frames = deque(sorted(node.pending_frames, key=waits))
        settle(self, node, now, out)

    return patch(Broker, "_settle", overtaking)


def accepts_gaps():
    deliver = Link._deliver

    def anything(self, frame, buffers, out):
        deliver(self, replace(frame, after=min(frame.after, self.received)), buffers, out)

    return patch(Link, "_deliver", anything)


def consumes_twice():
    consume = Mailboxes.consume

    def twice(self, node, seqs, now, out):
        consume(self, node, seqs, now, out)
        again = [each.entry for each in out if isinstance(each, Append)]
        for entry in again:
            if isinstance(entry, Consumed):
                out.append(Append(replace(entry, seq=self.number())))

    return patch(Mailboxes, "consume", twice)


def rejects_silently():
    return patch(Mailboxes, "_notify_sender", lambda *_: None)


def resends_nothing():
    return patch(Link, "_answered", lambda *_: None)


def drops_timers_at_restart():
    return patch(
        Restorer, "finish", after(Restorer.finish, lambda self, *_: self.mailboxes.timers.clear())
    )


def fires_timers_early():
    timer_of = recovery.timer_of

    def half(message):
        token, after_s = timer_of(message)
        return token, after_s / 2

    return patch(recovery, "timer_of", half)


def trusts_the_clock():
    return patch(Clock, "not_before", lambda *_: None)


def ignores_connections():
    def lapse(self, node, now, out):
        self.leave(node, "silent", now, out)

    return patch(Sessions, "_lapse", lapse)


def verifies_no_checksum():
    def read_record(disk, fd, path, offset, end):
        return disk.pread(fd, end - offset, offset)

    return patch(blob_store, "read_record", read_record)


def verifies_no_digest():
    stack = contextlib.ExitStack()
    complete = Fetcher.check_complete
    stack.enter_context(verifies_no_checksum())
    stack.enter_context(patch(link_core, "check_inline", lambda *_: None))
    stack.enter_context(
        patch(Fetcher, "check_complete", lambda *each: None if complete(*each) is None else True)
    )
    return stack


def keeps_addresses_of_those_who_left():
    def host(_, node, *__):
        node.run.hosts.add(node.hello)

    return patch(Sessions, "leave", after(Sessions.leave, host))


def gives_names_to_anybody():
    return patch(admission, "is_owner", lambda *_: True)


def accepts_posts_of_all_roles():
    return patch(acceptance, "must_answer", lambda *_: False)


def lets_all_read():
    return patch(Node, "may_read", lambda *_: True)


def notices_no_change_of_the_keys():
    return patch(AccessFile, "changed", lambda _: False)


def keeps_sessions_of_revoked_keys():
    return patch(Admissions, "_revoke", lambda *_: None)


def answers_before_it_stores():
    enroll = Admissions._enroll

    def at_once(self, peer, key, invite, now, out):
        out.append(SendTo(peer, Enrolled(key=key)))
        enroll(self, peer, key, invite, now, out)

    return patch(Admissions, "_enroll", at_once)


def counts_no_uses():
    def changed(struct, **fields):
        fields.pop("uses", None)
        return replace(struct, **fields)

    return patch(access_file, "replace", changed)


STRANGER = {"mallory": True}
REVOKED = {"keys": KeyPlan(revoke_s=2.0)}
GUESTS = {"keys": KeyPlan(guests=4)}
SYNC_ERRORS = plan(power=0.4, disk={DiskFault.SYNC_ERROR: 0.05})
FLIPS = plan(schedule=1, crash=0.4, train_s=3.0, disk={DiskFault.FLIPPED_BIT: 0.5})
ABSENCES = plan(schedule=1, partition=0.3, train_s=3.0)
DEADLINES = plan(schedule=1, crash=0.3, train_s=3.0)

PLANTED = {
    "Durability": {
        "check_durability": [
            (sends_before_commit, CRASHES_IN_TURNS),
            (syncs_nothing, POWER),
            (syncs_no_folder, plan(power=0.4, sizes={"messages_bytes": 1024})),
            (believes_a_second_sync, SYNC_ERRORS),
        ],
        "check_blobs": [(syncs_no_payload, plan(schedule=0, power=0.4, sizes=SMALL))],
    },
    "Exactly-once application": {
        "check_accepted_once": [(forgets_ids, plan(crash=0.2, doom=0.2))],
        "check_local_states": [(saves_no_client_state, plan(crash=0.3, doom=0.3))],
        "check_fold": [(acknowledges_before_the_checkpoint, DEADLINES)],
    },
    "Ordering": {
        "check_numbers": [(overtakes_missing_blobs, plan(sizes=SMALL, chat=1.0, faults=LOSS))],
        "check_deliveries": [(accepts_gaps, plan(faults=LOSS))],
    },
    "Explicit rejection": {
        "check_account": [(consumes_twice, plan())],
        "check_notices": [(rejects_silently, plan(chat=1.0))],
    },
    "Rights": {
        "check_owners": [
            (gives_names_to_anybody, plan(train_s=2.0, who=STRANGER)),
            (gives_names_to_anybody, plan(train_s=2.0, who={**STRANGER, "keys": KeyPlan()})),
        ],
        "check_rights": [
            (accepts_posts_of_all_roles, plan(train_s=2.0, who=STRANGER)),
            (lets_all_read, plan(train_s=2.0, who=STRANGER)),
        ],
        "check_revoked": [
            (notices_no_change_of_the_keys, plan(train_s=2.0, who=REVOKED)),
            (keeps_sessions_of_revoked_keys, plan(train_s=2.0, who=REVOKED)),
        ],
        "check_invites": [
            (answers_before_it_stores, plan(train_s=2.0, who=GUESTS)),
            (counts_no_uses, plan(train_s=2.0, who=GUESTS)),
        ],
    },
    "Liveness": {
        "check_ended": [
            (resends_nothing, plan(faults=LOSS)),
        ],
        "check_timers_fire": [(drops_timers_at_restart, DEADLINES)],
        "check_timers": [(fires_timers_early, DEADLINES)],
        "check_presence": [(ignores_connections, plan(schedule=1, pause=0.2, train_s=3.0))],
        "check_time": [(trusts_the_clock, plan(crash=0.3, jump=0.3))],
    },
    "Reads": {
        "check_blob_reads": [(verifies_no_digest, FLIPS)],
        "check_reads": [(verifies_no_checksum, plan(sizes=SMALL))],
    },
    "States": {"validate_state": [(keeps_addresses_of_those_who_left, ABSENCES)]},
}
CASES = [
    pytest.param(checker, plant, plan, id=f"{checker}-{plant.__name__}")
    for checkers in PLANTED.values()
    for checker, plants in checkers.items()
    for plant, plan in plants
]
SEEDS = 8


def checkers_that_raised(plant, plan, seed):
    """Return the functions in the traceback of the history's failure; none if it is good."""
    try:
        with plant():
            check_history(seed, plan)
    except Exception as error:  # noqa: BLE001 - the product may notice first
        return [each.name for each in traceback.extract_tb(error.__traceback__)], error
    return [], None


@pytest.mark.parametrize(("checker", "plant", "plan"), CASES)
def test_a_planted_fault_is_caught(checker, plant, plan):
    seen = []
    for seed in range(SEEDS):
        names, error = checkers_that_raised(plant, plan, seed)
        if checker in names:
            return
        seen.append((names[-1:], error))
    pytest.fail(f"{checker} has caught nothing: {seen}")


@pytest.mark.parametrize("plan", {id(each.values[2]): each.values[2] for each in CASES}.values())
def test_without_a_planted_fault_nothing_is_wrong(plan):
    check_history(0, plan)


def test_each_checker_has_a_planted_fault():
    planted = {name for checkers in PLANTED.values() for name in checkers}
    final = {each.__name__ for each in promises.CHECKS}
    meanwhile = {name for name in vars(witness.Witness) if name.startswith("check_")}
    assert planted == final | meanwhile | {"validate_state"}


def test_the_docs_name_each_checker():
    page = (Path(__file__).parents[2] / "docs" / "guarantees.md").read_text()
    missing = {
        name for checkers in PLANTED.values() for name in checkers if f"`{name}`" not in page
    }
    assert not missing
