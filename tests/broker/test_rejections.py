"""Rejections carry a code; sentences of version 0.1.0, which had none, are read in one place."""

import msgspec
import pytest

from fedmq.algorithms.errors import Fault, ResultError
from fedmq.broker.entries import Refusal
from fedmq.broker.errors import WireError
from fedmq.broker.rejections import MAX_CODE, Code, code_of
from fedmq.codecs.errors import DecodeError
from fedmq.nodes.errors import MessageError, rejection_of


def test_codes_are_short_and_faults_of_results_are_among_them():
    assert all(len(code) <= MAX_CODE for code in Code)
    assert {str(fault) for fault in Fault} < {str(code) for code in Code}


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("too stale: 3 versions behind", Code.STALE),
        ("no task 'aggregator/7' is out", Code.UNKNOWN_TASK),
        ("task 'aggregator/7' is not with w1", Code.WRONG_NODE),
        ("the result holds NaN or infinite values", Code.NOT_FINITE),
        ("the run is over", Code.RUN_OVER),
        ("parked: 5 sessions ended while they worked on it", Code.DEAD_LETTER),
        ("of another shape", Code.UNKNOWN),
    ],
)
def test_a_sentence_of_an_old_ledger_has_a_code(reason, code):
    assert code_of("", reason) == code
    assert code_of("of-its-own", reason) == "of-its-own"


def test_an_old_record_is_read_and_a_new_one_keeps_its_code():
    old = {"kind": "refusal", "seq": 3, "at": 1.0, "run": "r", "node": "aggregator", "id": "a/3"}
    entry = msgspec.msgpack.decode(
        msgspec.msgpack.encode({**old, "reason": "too stale: 2 versions behind", "of": 1}),
        type=Refusal,
    )
    assert (entry.code, entry.known_code) == ("", Code.STALE)
    coded = msgspec.structs.replace(entry, code=Code.LATE)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(coded), type=Refusal)
    assert (again.code, again.known_code) == (Code.LATE, Code.LATE)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WireError("?"), Code.UNREADABLE),
        (WireError("?", Code.BAD_BLOB), Code.BAD_BLOB),
        (DecodeError("?"), Code.UNDECODABLE),
        (ResultError("?"), Code.UNUSABLE),
        (ResultError("?", Fault.NOT_FINITE), Code.NOT_FINITE),
        (MessageError("?", Code.WRONG_CLIENT), Code.WRONG_CLIENT),
        (ValueError("?"), Code.UNUSABLE),
    ],
)
def test_an_error_has_the_code_of_its_kind(error, code):
    assert (rejection_of(error).code, rejection_of(error).reason) == (code, "?")
