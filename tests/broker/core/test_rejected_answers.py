"""An answer that cannot be accepted: who asked learns it, because no other answer will come."""

import pytest

from fedmq.broker.core.uploads import CONTROL_BYTES
from fedmq.broker.rejections import Code
from fedmq.broker.settings import Limits
from fedmq.broker.wire.schema import Deliver

AGG, W1 = b"agg:1", b"w1:s1"


def bench_of(new_bench, limits):
    bench = new_bench(limits=limits)
    bench.joined("agg", "aggregator", session="1")
    bench.joined("w1", clients=((0, 4),))
    return bench


@pytest.mark.parametrize("restarts", [False, True])
def test_an_answer_beyond_a_limit_frees_its_task_at_the_aggregator(new_bench, restarts):
    bench = bench_of(new_bench, Limits(node_disk=1000))
    bench.post(AGG, "client/0", kind="task", id="task/1")
    [task] = bench.take(W1, Deliver)
    answer = {"kind": "result", "re": "task/1", "consumes": (task.seq,)}
    bench.post(W1, "aggregator", blobs=[b"x" * 2000], **answer)
    if restarts:
        bench.restart()
    of_task = [each for each in bench.messages() if each.kind == "refused" and each.re == "task/1"]
    assert [each.body["code"] for each in of_task] == [Code.LIMIT]
    assert of_task[0].body["reason"].startswith("its answer was rejected: broker.limits.node_disk")
    assert [each.of for each in bench.refusals() if each.of is not None] == [task.seq]


def test_an_aggregator_has_room_to_say_why_its_run_ends(new_bench):
    bench = bench_of(new_bench, Limits(run_disk=1))
    bench.post(AGG, "record", "x" * 1000)
    assert not bench.refusals()
    bench.post(AGG, "record", blobs=[b"x"])
    for _ in range(CONTROL_BYTES // 40_000 + 1):
        bench.post(AGG, "record", "x" * 40_000)
    assert [each.code for each in bench.refusals()] == [Code.LIMIT, Code.LIMIT]
