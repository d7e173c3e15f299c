"""The registry of codecs: by spec for encoding, by wire name for decoding."""

from types import SimpleNamespace

import pytest
import torch

from fedmq.codecs import registry
from fedmq.codecs.base import Encoded
from fedmq.codecs.cast import Cast
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.raw import Raw
from fedmq.codecs.registry import codecs, decode, make_codec


def test_codecs_are_made_by_spec():
    assert isinstance(make_codec("raw"), Raw)
    assert isinstance(make_codec(" cast( float16 ) "), Cast)
    assert make_codec("cast(dtype=bfloat16)").wire_name == "cast@1(bfloat16)"
    assert make_codec("raw").wire_name == "raw@1"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rwa", r"unknown codec 'rwa' \(did you mean 'raw'\?\); choose from cast, entropy"),
        ("zip", "unknown codec 'zip'; choose from cast, entropy, features"),
        ("raw(1)", r"codec 'raw\(1\)': too many positional arguments; expected raw"),
        ("cast", r"missing a required argument: 'dtype'; expected cast\(dtype\)"),
        ("cast(type=float16)", r"expected cast\(dtype\)"),
        ("cast(16)", "dtype must be float16 or bfloat16, got 16"),
        ("raw | raw", "codec raw cannot be a stage of a pipeline"),
        ("hadamard | quantise(4)", r"unknown codec 'quantise' \(did you mean 'quantize'\?\)"),
        ("quantize(4) | hadamard", "expected stages in this order"),
        ("", "expected name"),
    ],
)
def test_the_error_for_an_unknown_codec_or_parameter_lists_the_choices(spec, message):
    with pytest.raises(SpecError, match=message):
        make_codec(spec)


@pytest.mark.parametrize("spec", ["raw", "cast(float16)", "cast(bfloat16)"])
def test_decoding_needs_nothing_but_the_message(spec):
    encoded = make_codec(spec).encode({"w": torch.tensor([1.0, 2.0])}, seed=7)
    message = Encoded(str(encoded.codec), dict(encoded.meta), [bytes(b) for b in encoded.buffers])
    registry._codec_of.cache_clear()
    assert decode(message)["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("wire_name", "message"),
    [
        ("raw@2", "expected codec raw in version 1, got 2"),
        ("cast@7(float16)", "expected codec cast in version 1, got 7"),
        ("raw", r"expected codec@version\(parameters\), got 'raw'"),
        ("raw@", r"expected codec@version\(parameters\)"),
        ("raw@1 ", r"expected codec@version\(parameters\)"),
        ("raw@1" + " " * 2000, r"expected codec@version\(parameters\)"),
        ("zip@1", "unknown codec 'zip'; choose from cast, entropy, features"),
        ("cast@1", "missing a required argument: 'dtype'"),
        ("cast@1(float8)", "dtype must be float16 or bfloat16"),
        ("raw@1(1)", "too many positional arguments"),
        ("cast@1(float16) | raw()", r"expected codec@version\(parameters\)"),
        ("cast@1(float16) | raw@1", "codec raw cannot be a stage"),
        ("hadamard@1(64) | quantize@2(4, 64)", "expected codec quantize in version 1, got 2"),
        ("hadamard@1(64)  | quantize@1(4, 64)", r"expected codec@version\(parameters\)"),
    ],
)
def test_an_invalid_wire_name_is_a_decode_error(wire_name, message):
    with pytest.raises(DecodeError, match=message):
        decode(Encoded(wire_name, {"tensors": [], "dtypes": []}, []))


def test_every_error_is_a_codec_error():
    assert issubclass(SpecError, CodecError)
    assert issubclass(DecodeError, CodecError)
    assert issubclass(CodecError, ValueError)


class Other(Raw):
    name = "other"


def entry(name, loaded):
    """Return an entry point as importlib.metadata does."""
    return SimpleNamespace(name=name, value=f"elsewhere:{name}", load=lambda: loaded)


def test_installed_extensions_are_codecs_too(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry("other", Other)])
    built_in = {"raw": Raw, "cast": Cast, "features": Features, "logits": Logits}
    assert dict(codecs.__wrapped__()) == {**built_in, "other": Other}


def test_an_extension_cannot_take_the_name_of_another_codec(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry("raw", Other)])
    with pytest.raises(SpecError, match="two codecs are named 'raw'; one is elsewhere:raw"):
        codecs.__wrapped__()


def test_an_extension_must_be_a_codec_class(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry("other", dict)])
    with pytest.raises(SpecError, match=r"'other' of fedmq\.codecs is not a Codec class"):
        codecs.__wrapped__()


class Elsewhere(Raw):
    """A codec of another package that raises arbitrary exceptions."""

    name = "elsewhere"

    def decode(self, encoded, max_bytes):
        raise ZeroDivisionError("by zero")


def test_any_exception_of_another_packages_codec_is_a_decode_error(monkeypatch):
    known = {**codecs(), "elsewhere": Elsewhere}
    monkeypatch.setattr(registry, "codecs", lambda: known)
    encoded = make_codec("elsewhere").encode({"w": torch.zeros(2)}, 0)
    with pytest.raises(DecodeError, match=r"elsewhere@1 cannot decode: ZeroDivisionError: by zero"):
        decode(encoded)
    for found in (None, [torch.zeros(2)], {"w": 3}, {0: torch.zeros(2)}):
        monkeypatch.setattr(Elsewhere, "decode", lambda *_, found=found: found)
        with pytest.raises(DecodeError, match="elsewhere@1: expected tensors by name, got"):
            decode(encoded)
    monkeypatch.undo()
    monkeypatch.setattr(registry, "codecs", lambda: known)
    monkeypatch.setattr(Elsewhere, "__module__", "fedmq.codecs.elsewhere")
    with pytest.raises(ZeroDivisionError):
        decode(encoded)
    registry._codec_of.cache_clear()


@pytest.mark.parametrize(
    ("old", "new"),
    [("updates_only", "deltas_only"), ("remembers", "error_feedback"), ("restrict", "project")],
)
def test_a_codec_with_a_name_of_an_older_release_is_an_error_with_the_new_one(old, new):
    with pytest.raises(CodecError, match=f"Mine.{old} is now called {new}"):
        type("Mine", (Raw,), {old: True})
