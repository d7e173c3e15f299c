"""Codes of rejections, in ledgers with codes and in older ones with sentences only."""

import pytest

from fedmq.algorithms.errors import Fault
from fedmq.broker.rejections import Code, code_of, failure_code_of


def test_every_fault_of_a_result_is_a_code():
    assert {each.value for each in Fault} <= {each.value for each in Code}


@pytest.mark.parametrize(
    ("reason", "code"),
    [("too stale: 3 versions behind", Code.STALE), ("the run is over", Code.RUN_OVER), ("x", "")],
)
def test_a_reason_in_an_old_ledger_has_its_code(reason, code):
    assert code_of("", reason) == code
    assert code_of("late", reason) == "late"


@pytest.mark.parametrize("reason", ["task failed: CUDA out of memory", "the run is over", "x"])
def test_the_text_of_a_users_error_decides_nothing(reason):
    assert failure_code_of("", reason) == Code.TRAINING_FAILED
    assert failure_code_of("", "dropped on demand") == Code.DROPPED
    assert failure_code_of("unusable", reason) == "unusable"
