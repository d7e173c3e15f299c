"""Tensor tables that are too long for a message's header, and limits for hostile ones."""

import time
import tracemalloc

import msgspec
import numpy as np
import pytest
import torch

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import MAX_BUFFERS, MAX_MESSAGE_BYTES, Blob, Message
from fedmq.codecs.base import Codec, Encoded
from fedmq.codecs.errors import CodecError, DecodeError
from fedmq.codecs.registry import make_codec
from fedmq.nodes.messages.payloads import RAW, Codecs, pack, unpack
from fedmq.nodes.messages.tensor_tables import MAX_TABLE_BYTES, MAX_TABLE_MEMORY, fitted
from fedmq.nodes.trace.groups import groups_of

ABOUT = {"kind": "task", "id": "a/1", "run": "r", "sender": "a", "to": "record"}


def of(count, size=3, dtype=torch.float32):
    return {
        f"features.denseblock4.denselayer{n}.norm.weight": torch.full((size,), n).to(dtype)
        for n in range(count)
    }


def posted(payload, codecs=RAW, seed=0, last=()):
    """Return a message after encoding and decoding, and its blobs' bytes."""
    packed = pack(payload, codecs, seed)
    blobs = (*packed.blobs, *(Blob.of(each) for each in last))
    message = Message(**ABOUT, body=dict(packed.body), blobs=blobs)
    message, data = fitted(message, (*packed.data, *last))
    assert [Blob.of(each) for each in data] == list(message.blobs)
    return decode_message(encode_message(message)), data


def same(payload, other):
    for group in ("weights", "exact", "features", "logits"):
        ours, theirs = getattr(payload, group), getattr(other, group)
        assert list(ours) == list(theirs)
        assert all(torch.equal(each, theirs[name]) for name, each in ours.items())


def test_a_message_that_fits_is_unchanged():
    payload = Payload(of(600), numbers={"n": 3})
    packed = pack(payload, RAW, 0)
    message = Message(**ABOUT, body=dict(packed.body), blobs=packed.blobs)
    assert 30_000 < len(encode_message(message)) < MAX_MESSAGE_BYTES
    assert fitted(message, packed.data) == (message, packed.data)


@pytest.mark.slow
@pytest.mark.parametrize("count", [900, 1213, 20_000])
def test_a_table_that_does_not_fit_is_a_blob(count):
    payload = Payload(of(count), of(count, 1, torch.int64), {"n": 3})
    message, data = posted(payload)
    assert len(encode_message(message)) < 1000
    assert [group["table"] for group in message.body["groups"]] == [True, True]
    back = unpack(message, data.__getitem__)
    same(payload, back)
    assert back.numbers == {"n": 3}


@pytest.mark.parametrize("spec", ["raw", "cast(float16)", "quantize(4)", "limit(0) | topk(0.1)"])
def test_every_codecs_table_can_be_long(spec):
    payload = Payload({name: each.repeat(400, 1) for name, each in of(1300).items()})
    packed = pack(payload, Codecs(make_codec(spec)), 7)
    message, data = posted(payload, Codecs(make_codec(spec)), 7)
    assert packed.body["groups"][0]["meta"]["tensors"]
    assert message.body["groups"][0]["meta"].get("seed") == packed.body["groups"][0]["meta"].get(
        "seed"
    )
    short = Message(**ABOUT, body=dict(packed.body), blobs=packed.blobs)
    same(unpack(short, packed.data.__getitem__), unpack(message, data.__getitem__))


def test_the_table_of_one_model_is_one_blob_whatever_the_seed():
    """It is stored once and sent once."""
    codecs = Codecs(make_codec("quantize(4)"))
    one, _ = posted(Payload(of(1300, 2000)), codecs, 1)
    other, _ = posted(Payload({name: each + 1 for name, each in of(1300, 2000).items()}), codecs, 2)
    assert one.blobs[0] == other.blobs[0]
    assert one.blobs[1:] != other.blobs[1:]


def test_blobs_after_the_groups_stay_after_them():
    message, data = posted(Payload(of(1300), of(3, 1, torch.int64)), last=(b"a fold",))
    groups, rest = groups_of(message)
    assert [(each.name, each.first, each.table is not None) for each in groups] == [
        ("weights", 1, True),
        ("exact", 2, False),
    ]
    assert data[rest:] == (b"a fold",)
    assert list(groups[0].decode(data.__getitem__)) == list(of(1300))
    assert groups[0].sizes(data.__getitem__) == dict.fromkeys(of(1300), 12)
    # Fitting twice changes nothing more: a result that another node has saved is fitted again.
    assert fitted(message, data) == (message, data)


def test_a_message_of_many_dtypes_and_long_tables_has_few_blobs():
    exact = {}
    for n in range(1000):
        exact |= {f"{n}.a": torch.tensor(n), f"{n}.b": torch.tensor(float(n))}
    message, data = posted(Payload(of(1000), exact, features={}, logits={}), last=(b"fold",))
    assert len(message.blobs) < MAX_BUFFERS
    same(Payload(of(1000)), Payload(unpack(message, data.__getitem__).weights))


def hostile(table, size=None):
    """Return a message with these bytes as its table, of their size or a false one."""
    payload = Payload(of(1300))
    message, data = posted(payload)
    blob = Blob.of(table) if size is None else Blob(Blob.of(table).digest, size)
    return msgspec.structs.replace(message, blobs=(blob, *message.blobs[1:])), (table, *data[1:])


MAPS = b"\x81\xa7tensors\xdd" + (7 << 20).to_bytes(4) + b"\x80" * (7 << 20)
NAMES = b"\x81\xa7tensors\xdd" + (3 << 20).to_bytes(4) + b"\xa1\xe9" * (3 << 20)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (b"", "expected a table of tensors"),
        (b"\xc1", "expected a table of tensors"),
        (b"\x93\x01\x02\x03", "expected a table of tensors as a map"),
        (b"\x81\x01\x02", "expected a table of tensors as a map"),
        (b"\x81\xa7tensors\xdd\xff\xff\xff\xff", "expected a table of tensors"),
        (b"\x81\xa7tensors" + b"\x91" * 500_000 + b"\x90", "expected a table of tensors"),
        (b"\x81\xa7tensors" + b"\x91" * 200 + b"\x90", "nested at most 32 deep"),
        (MAPS, "takes at most 268435456 bytes of memory"),
        (NAMES, "expected a table of tensors"),
        (msgspec.msgpack.encode({"tensors": [["a", "float32", [3]]]}), "its tensors need 12"),
        (msgspec.msgpack.encode({"tensors": 3}), "expected meta.tensors as a list"),
        (msgspec.msgpack.encode({}), "expected meta.tensors as a list"),
    ],
    ids=range(12),
)
def test_a_hostile_table_is_rejected_within_bounds(table, error):
    message, data = hostile(table)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(DecodeError, match=error):
        unpack(message, data.__getitem__)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_TABLE_MEMORY
    assert time.process_time() - began < 5


@pytest.mark.parametrize("size", [MAX_TABLE_BYTES + 1, 1 << 40])
def test_a_table_with_too_large_a_size_is_not_read(size):
    message, data = hostile(b"\x80", size)

    def read(index):
        assert index
        return data[index]

    with pytest.raises(DecodeError, match="expected a table of tensors of at most 8388608 bytes"):
        unpack(message, read)


@pytest.mark.parametrize("count", [-1, 2, 1 << 62])
def test_a_group_with_a_table_has_no_more_blobs_than_its_message(count):
    message, data = posted(Payload(of(1300)))
    group = {**message.body["groups"][0], "buffers": count}
    message = msgspec.structs.replace(message, body={**message.body, "groups": [group]})
    with pytest.raises(DecodeError, match="buffers, the message has fewer"):
        unpack(message, data.__getitem__)
    with pytest.raises(DecodeError):
        groups_of(message)


def test_a_missing_table_is_rejected():
    message, data = posted(Payload(of(1300)))
    message = msgspec.structs.replace(message, blobs=())
    with pytest.raises(DecodeError, match="buffers, the message has fewer"):
        unpack(message, data.__getitem__)


# ---- codecs of users


class Own(Codec):
    """A user's codec with a given return value."""

    name = "own"

    def __init__(self, returned):
        self.returned = returned

    def encode(self, tensors, seed):
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned

    def decode(self, encoded, max_bytes):
        raise NotImplementedError


def test_numbers_of_numpy_in_a_codecs_meta_are_numbers():
    meta = {"scale": np.float32(0.5), "sizes": (np.int64(3), torch.tensor(4)), "name": "x"}
    packed = pack(Payload(of(1)), Codecs(Own(Encoded("own@1", meta, [b"ab"]))), 0)
    assert packed.body["groups"][0]["meta"] == {"scale": 0.5, "sizes": (3, 4), "name": "x"}
    encode_message(Message(**ABOUT, body=dict(packed.body), blobs=packed.blobs))


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (ZeroDivisionError("by zero"), "codec own@1 cannot encode: ZeroDivisionError: by zero"),
        (None, "codec own@1 cannot encode: AttributeError"),
        (Encoded("own@1", {"a": object()}, []), "codec own@1: expected plain numbers, text"),
        (Encoded("own@1", {"a": np.zeros(3)}, []), "codec own@1: expected plain numbers, text"),
        (Encoded("own@1", {}, ["text"]), "codec own@1 cannot encode: TypeError"),
        (Encoded("own@1", 3, []), "codec own@1 cannot encode: TypeError"),
    ],
    ids=range(6),
)
def test_a_codec_that_fails_is_named(returned, error):
    with pytest.raises(CodecError) as caught:
        pack(Payload(of(1)), Codecs(Own(returned)), 0)
    assert str(caught.value).startswith(error)
