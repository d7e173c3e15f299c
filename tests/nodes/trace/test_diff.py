import functools

import msgspec
import pytest
import torch

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.schema import Blob, Message
from fedmq.codecs.registry import make_codec
from fedmq.nodes.messages.payloads import Codecs, pack
from fedmq.nodes.trace import differ
from fedmq.nodes.trace.differ import Operand
from fedmq.nodes.trace.differences import ABSENT, Difference, DifferenceKind, Field, Gap, InGroup
from tests.nodes.trace import story

NAN = float("nan")
W = torch.zeros(4, 5)


def differences(a, b, **options):
    """Return what differs as sentences."""
    return [str(each) for each in differ.differences(a, b, **options)]


def side(tensors=None, codec="raw", more=(), **fields):
    packed = pack(Payload(tensors or {}, {}, {}), Codecs(make_codec(codec)), 0)
    data = [bytes(each) for each in (*packed.data, *more)]
    body = {**packed.body, **fields.pop("body", {})}
    known = {"kind": "result", "id": "a/1", "run": "r", "sender": "w", "to": "aggregator"}
    blobs = tuple(Blob.of(each) for each in data)
    return Operand(Message(**{**known, **fields}, body=body, blobs=blobs), data.__getitem__)


def poked(index, value, tensor=W):
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


def test_equal_messages_have_no_differences():
    body = {"x": [1, {"y": NAN}], "elapsed_s": 1.0}
    ours = side({"w": poked(3, NAN)}, body=body)
    theirs = side({"w": poked(3, NAN)}, body={**body, "elapsed_s": 2.0}, run="q")
    assert differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("a", "b", "output"),
    [
        ({"loss": 0.1}, {"loss": 0.1}, []),
        ({"loss": 0.3}, {"loss": 0.1 + 0.2}, ["body.loss: 0.3 in A, 0.30000000000000004 in B"]),
        ({"n": 1}, {"n": 1.0}, ["body.n: 1 in A, 1.0 in B"]),
        ({"n": 0.0}, {"n": -0.0}, ["body.n: 0.0 in A, -0.0 in B"]),
        ({"n": NAN}, {"n": 1.0}, ["body.n: nan in A, 1.0 in B"]),
        ({"n": None}, {}, ["body.n: None in A, absent in B"]),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ["body.a.b[1]: 2 in A, 3 in B"]),
        ({"a": [1]}, {"a": [1, 2]}, ["body.a: [1] in A, [1, 2] in B"]),
        ({"t": "a\x1b"}, {"t": "a"}, ["body.t: 'a\\x1b' in A, 'a' in B"]),
    ],
)
def test_fields(a, b, output):
    assert differences(side(body=a), side(body=b)) == output


def test_a_long_text_is_shown_where_it_differs():
    (output,) = differences(side(body={"t": "x" * 5000 + "1"}), side(body={"t": "x" * 5000 + "2"}))
    assert len(output) < 250
    assert "1'" in output
    assert "2'" in output


def test_a_configuration_is_compared_key_by_key():
    ours = side(body={"config": '[run]\nid = "x"\nseed = 0\n'})
    theirs = side(body={"config": '[run]\nid = "y"\nseed = 1\n'})
    assert differences(ours, theirs) == ["body.config.run.seed: 0 in A, 1 in B"]


def test_header_and_names():
    output = differences(side(), side(to="record", re="t"), names=("the ledger", "the replay"))
    assert output == [
        "to: 'aggregator' in the ledger, 'record' in the replay",
        "re: None in the ledger, 't' in the replay",
    ]


def test_ids_of_the_broker_are_numbers_in_its_ledger():
    assert differences(side(sender="broker", id="broker/1"), side(sender="broker", id="x")) == []
    assert differences(side(), side(id="a/2")) == ["id: 'a/1' in A, 'a/2' in B"]


def test_what_is_ignored_is_a_choice():
    ours, theirs = side(body={"elapsed_s": 1.0}), side(body={"elapsed_s": 2.0}, run="q")
    assert len(differences(ours, theirs, ignore=frozenset())) == 2


@pytest.mark.parametrize(
    ("other", "output"),
    [
        (poked(3, 0.5), ["weights w: 1 of 20 elements differ, by at most 0.5"]),
        (
            poked(3, NAN),
            ["weights w: 1 of 20 elements differ, 1 NaN in B but not in A"],
        ),
        (
            poked(0, NAN, poked(1, 2.0)),
            ["weights w: 2 of 20 elements differ, by at most 2, 1 NaN in B but not in A"],
        ),
        (W.double(), ["weights w: float32 [4, 5] in A, float64 [4, 5] in B"]),
        (W.reshape(5, 4), ["weights w: float32 [4, 5] in A, float32 [5, 4] in B"]),
    ],
)
def test_tensors(other, output):
    assert differences(side({"w": W}), side({"w": other})) == output


def test_nan_in_the_first_only():
    output = differences(side({"w": poked(3, NAN)}), side({"w": W}))
    assert output == ["weights w: 1 of 20 elements differ, 1 NaN in A but not in B"]


def test_minus_zero_is_another_byte_and_no_other_value():
    (output,) = differences(side({"w": W}), side({"w": poked(0, -0.0)}))
    assert "equal values, different bytes" in output


def test_tensors_and_groups_that_only_one_has():
    output = differences(side({"w": W, "b": W}), side({"w": W}))
    assert output == ["weights b: only in A, not in B"]
    assert differences(side(), side({"w": W})) == ["weights: only in B, not in A"]


def test_another_codec_and_what_it_rounded():
    output = differences(side({"w": W + 0.1}), side({"w": W + 0.1}, "cast(float16)"))
    assert output[0] == "weights codec: raw@1 in A, cast@1(float16) in B"
    assert output[1].startswith("weights w: 20 of 20 elements differ, by at most 2.44e-05")


def test_blobs_are_read_only_where_digests_differ():
    def never(index):
        raise AssertionError(index)

    ours = side({"w": W}, more=[b"fold"])
    assert differences(Operand(ours.message, never), Operand(ours.message, never)) == []


def test_what_cannot_be_decoded_is_described_by_size_and_digest():
    ours, theirs = side({"w": W}), side({"w": W + 1})
    body = {**theirs.message.body, "groups": [dict(theirs.message.body["groups"][0])]}
    body["groups"][0]["codec"] = "unknown@7"
    message = msgspec.structs.replace(theirs.message, body=body)
    output = differences(ours, Operand(message, theirs.read))
    assert output[0] == "weights codec: raw@1 in A, unknown@7 in B"
    digests = [each.message.blobs[0].digest.hex() for each in (ours, theirs)]
    assert output[1] == f"weights: 80 bytes ({digests[0]}) in A, 80 bytes ({digests[1]}) in B"
    assert output[2].startswith("weights: cannot be decoded in B: ")


def test_folds_are_compared_by_field():
    folds = [
        msgspec.msgpack.encode({"at": at, "counts": {"used": used}, "hosts": {0: "w"}})
        for at, used in ((1.0, 3), (2.0, 4))
    ]
    output = differences(side(more=[folds[0]]), side(more=[folds[1]]))
    assert output == ["fold.counts.used: 3 in A, 4 in B"]
    output = differences(side(more=[b"\xc1"]), side(more=[b"\xc1\xc1"]))
    assert output[0].startswith("blob 0: 1 bytes ")


# ---- differences are values


def kinds(ours, theirs):
    return [(each.kind, str(each.place)) for each in differ.differences(ours, theirs)]


def test_a_difference_tells_its_kind_its_place_and_its_numbers():
    ours, theirs = side({"w": W}, body={"metrics": {"a.b": 0.5}}), side({"w": poked(3, 0.5)})
    field, values = differ.differences(ours, theirs)
    assert field == Difference(
        DifferenceKind.FIELD, Field(("body", "metrics")), ({"a.b": 0.5}, ABSENT), ("A", "B")
    )
    form = "float32 [4, 5]"
    gap = Gap(differing=1, elements=20, largest=0.5)
    assert values == Difference(
        DifferenceKind.VALUES, InGroup("weights", "w"), (form, form), gap=gap
    )


@pytest.mark.parametrize(
    ("theirs", "kind", "place"),
    [
        ({"w": poked(0, -0.0)}, DifferenceKind.ENCODING, "weights"),
        ({"w": W.double()}, DifferenceKind.FORM, "weights w"),
        ({"w": W, "b": W}, DifferenceKind.MISSING, "weights b"),
        ({}, DifferenceKind.MISSING, "weights"),
    ],
)
def test_the_kinds_of_tensors(theirs, kind, place):
    assert kinds(side({"w": W}), side(theirs)) == [(kind, place)]


def test_the_kinds_of_blobs_and_codecs():
    assert kinds(side(more=[b"\xc1"]), side(more=[b"\xc1\xc1"])) == [
        (DifferenceKind.BYTES, "blob 0"),
        (DifferenceKind.UNDECODABLE, "blob 0"),
        (DifferenceKind.UNDECODABLE, "blob 0"),
    ]
    assert kinds(side(), side(more=[b"x"])) == [(DifferenceKind.BLOBS, "blobs besides the tensors")]
    assert kinds(side({"w": W}), side({"w": W}, "cast(float16)")) == [
        (DifferenceKind.CODEC, "weights")
    ]


def test_a_key_with_dots_is_not_taken_for_a_path():
    ours, theirs = side(body={"metrics.loss": 1.0}), side(body={"metrics.loss": 2.0})
    (found,) = differ.differences(ours, theirs)
    assert not found.place.is_under("body", "metrics")


def test_integers_are_not_rounded():
    counted = torch.tensor([3])
    (found,) = differ.differences(side({"n": counted}), side({"n": counted + 1}))
    assert found.gap == Gap(1, 1, 1.0, rounded=False)


def test_complex_values_are_compared_as_such():
    gap = differ.gap_between(W + 0j, W + 3j)
    assert gap == Gap(20, 20, 3.0)
    assert differ.gap_between(W + 1j, W + 1j) is None


# ---- whole runs


def test_a_run_and_its_copy_are_equal(fedmq, written, tmp_path):
    story.rewrite(written[0], tmp_path / "ledger", lambda seq, message, data: (message, data))
    assert fedmq("diff", written[0], tmp_path).stdout == "21 messages, all equal\n"


def test_a_field_and_a_tensor_that_were_changed_are_found(fedmq, written, tmp_path):
    folder, at = written

    def change(seq, message, data):
        if seq == at["half"]:
            data = [bytes(2) + data[0][2:]]
            message.body["numbers"]["n"] = 11
        return message, data

    story.rewrite(folder, tmp_path, change)
    output = fedmq("diff", folder, tmp_path, code=1).stdout
    assert "order: equal" in output
    assert f"the first difference is in entry {at['half']} of A, {at['half']} of B" in output
    assert "result a/3/result, worker-1 -> aggregator" in output
    assert "  body.numbers.n: 10 in A, 11 in B\n" in output
    assert "  weights w: 1 of 6 elements differ, by at most 2\n" in output


def test_the_first_version_of_another_model_is_named(fedmq, written, tmp_path):
    folder, at = written

    def change(seq, message, data):
        if seq == at["version"]:
            message.body["model_digest"] = "e" * 32
        return message, data

    story.rewrite(folder, tmp_path, change)
    assert "model: different in version 1\n" in fedmq("diff", folder, tmp_path, code=1).stdout


def test_where_runs_differ_in_order(fedmq, written, tmp_path):
    folder, at = written
    story.rewrite(folder, tmp_path, lambda seq, *both: None if seq == at["score"] else both)
    output = fedmq("diff", folder, tmp_path, code=1).stdout
    assert "21 messages in A, 20 in B, 20 in both" in output
    assert f"A  entry {at['score']}: score a/1/score, evaluator -> aggregator" in output
    assert f"B  entry {at['score']}: result a/3/result" in output
    assert "A's message is not in B" in output
    other = fedmq("diff", tmp_path, folder, code=1).stdout
    assert f"A's message is entry {at['half']}" in other
    assert "all common messages are equal" in other


def test_a_run_that_continues_after_the_other(fedmq, written, tmp_path):
    folder, at = written
    story.rewrite(folder, tmp_path, lambda seq, *both: both if seq < at["timer"] else None)
    output = fedmq("diff", folder, tmp_path, code=1).stdout
    assert "B  ends" in output


def test_runs_of_one_seed_with_and_without_trouble(fedmq, simulated):
    calm, wild = simulated(0, 1, trouble=False), simulated(0, 1)
    assert "all equal" in fedmq("diff", wild, wild).stdout
    output = fedmq("diff", calm, wild, code=1).stdout
    assert "model: " in output
    assert "order: equal for " in output


def test_another_configuration_does_not_hide_what_follows(fedmq, written, tmp_path):
    folder, at = written

    def change(seq, message, data):
        if message.kind == "run":
            message.body["config"] = message.body["config"].replace("seed = 0", "seed = 1")
        if seq == at["result"]:
            message.body["numbers"]["n"] = 11
        return message, data

    story.rewrite(folder, tmp_path, change)
    output = fedmq("diff", folder, tmp_path, code=1).stdout
    assert "  body.config.run.seed: 0 in A, 1 in B\n" in output
    assert f"the next difference is in entry {at['result']} of A" in output
    assert "  body.numbers.n: 10 in A, 11 in B\n" in output


def test_a_blob_that_is_too_deep_is_no_fold():
    deep = msgspec.msgpack.encode({"a": functools.reduce(lambda x, _: [x], range(100), 1)})
    output = differences(side(more=[deep]), side(more=[deep[:-1] + b"\x02"]))
    assert output[1] == "blob 0: cannot be read in A: not a msgpack map"
