"""The lives of messages and sessions: their tables, and ledgers that break them."""

import pytest

from fedmq.broker.core.lifecycles import (
    MESSAGE,
    PRESENT,
    SESSION,
    UNFINISHED,
    ImpossibleTransition,
    MessageEvent,
    MessageLives,
    MessageState,
    SessionEvent,
    SessionState,
    next_state,
)
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.errors import LedgerDamage
from fedmq.broker.ledger.entries import Accepted, Consumed, Ended, Opened, Refusal
from fedmq.broker.recovery import Restorer
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message

OPENED = Opened(seq=0, at=0.0, run="r", config="", total_clients=10)


def reachable(table, first):
    found, new = set(), {first}
    while new:
        found |= new
        new = {after for state in new for after in table[state].values()} - found
    return found


def test_the_tables_have_all_states_and_reach_each_of_them():
    assert reachable(MESSAGE, MessageState.NONE) == set(MessageState) == MESSAGE.keys()
    assert reachable(SESSION, SessionState.WAITING) == set(SessionState) == SESSION.keys()


def test_every_event_happens_in_some_state():
    for table, events in ((MESSAGE, MessageEvent), (SESSION, SessionEvent)):
        assert {event for ways in table.values() for event in ways} == set(events)


def test_what_is_finished_stays_so_while_its_run_lasts():
    for state in set(MESSAGE) - UNFINISHED - {MessageState.NONE, MessageState.DEAD_LETTERED}:
        assert set(MESSAGE[state]) <= {MessageEvent.REOPEN_RUN}


def test_a_session_that_is_present_can_leave():
    assert {next_state(state, SessionEvent.LEAVE) for state in PRESENT} == {SessionState.LEFT}
    with pytest.raises(ImpossibleTransition, match="no leave can happen to a session that is left"):
        next_state(SessionState.LEFT, SessionEvent.LEAVE)


def test_lives_count_the_messages_in_each_state():
    lives = MessageLives()
    for seq in (1, 4, 5):
        lives.move(seq, MessageEvent.ACCEPT)
    lives.move(4, MessageEvent.CONSUME)
    lives.move(6, MessageEvent.RECORD)
    assert lives.state_of(4) is MessageState.CONSUMED
    assert lives.state_of(2) is lives.state_of(99) is lives.state_of(-1) is MessageState.NONE
    assert lives.count() == {
        MessageState.ACCEPTED: 2,
        MessageState.CONSUMED: 1,
        MessageState.RECORDED: 1,
    }


# ---- ledgers


def accepted(seq, to="client/0", *, kind="note", sender="agg", consumes=(), **body):
    message = Message(kind=kind, id=f"{sender}/{seq}", run="r", sender=sender, to=to, body=body)
    return Accepted(seq=seq, at=float(seq), message=encode_message(message), consumes=consumes)


def refusal(seq, of, *, dead_lettered=False):
    fields = {"run": "r", "node": "w1", "id": "agg/1", "reason": "no"}
    return Refusal(seq=seq, at=0.0, of=of, dead_lettered=dead_lettered, **fields)


def consumed(seq, *of):
    return Consumed(seq=seq, at=0.0, node="w1", of=of)


def member(seq, kind):
    body = {"node": "w1", "role": "worker", "session": "s1", "clients": [[0, 4]], "reason": "gone"}
    return accepted(seq, "aggregator", kind=kind, sender="broker", **body)


def restored(*entries):
    restorer = Restorer(Mailboxes())
    for entry in [OPENED, *entries]:
        restorer.feed(entry)
    return restorer


IMPOSSIBLE = {
    "consumed twice": (
        [accepted(1), consumed(2, 1), consumed(3, 1)],
        "entry 3 is impossible: cannot consume entry 1, which is consumed",
    ),
    "consumed before it was accepted": (
        [consumed(1, 2)],
        "entry 1 is impossible: cannot consume entry 2, which is not an accepted message",
    ),
    "consumed by a message, and again": (
        [accepted(1), accepted(2, "aggregator", consumes=(1,)), consumed(3, 1)],
        "cannot consume entry 1, which is consumed",
    ),
    "a record is consumed": ([accepted(1, "record"), consumed(2, 1)], "entry 1, which is recorded"),
    "the opening of a run is consumed": ([consumed(1, 0)], "entry 0, which is not an accepted"),
    "rejected twice": (
        [accepted(1), refusal(2, 1), refusal(3, 1)],
        "cannot reject entry 1, which is rejected",
    ),
    "rejected after it was consumed": (
        [accepted(1), consumed(2, 1), refusal(3, 1)],
        "cannot reject entry 1, which is consumed",
    ),
    "dead-lettered after it was rejected": (
        [accepted(1), refusal(2, 1), refusal(3, 1, dead_lettered=True)],
        "cannot dead-letter entry 1, which is rejected",
    ),
    "consumed after its run ended": (
        [accepted(1), Ended(seq=2, at=0.0, run="r", reason="done"), consumed(3, 1)],
        "cannot consume entry 1, which is dropped",
    ),
    "left twice": (
        [member(1, "joined"), member(2, "left"), member(3, "left")],
        "no leave can happen to a session that is left",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_entry_that_cannot_happen_is_damage(case):
    entries, reason = IMPOSSIBLE[case]
    with pytest.raises(LedgerDamage, match=reason):
        restored(*entries)


def test_possible_lives_are_recovered():
    restorer = restored(
        *[accepted(seq) for seq in range(1, 7)],
        consumed(7, 1),
        refusal(8, 2),
        refusal(9, 3),
        consumed(10, 3),
        refusal(11, 4, dead_lettered=True),
        refusal(12, 5, dead_lettered=True),
        accepted(13, consumes=(5,)),
    )
    assert restorer.unfinished.keys() == {2, 6, 13}
    assert restorer.dead_letters == (4,)
