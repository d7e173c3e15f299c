"""The one registry of codecs: by spec for writing, by wire name for reading.

Other packages add codecs through the entry-point group ``fedmq.codecs``; each entry
point is a `Codec` class, and its name is the codec's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from torch import Tensor

from fedmq.codecs.base import MAX_DECODED_BYTES, Codec, Encoded
from fedmq.codecs.cast import Cast
from fedmq.codecs.errors import CodecError, DecodeError, SpecError
from fedmq.codecs.extensions import entry_points
from fedmq.codecs.features import Features
from fedmq.codecs.logits import Logits
from fedmq.codecs.pipeline import STAGES, Pipeline
from fedmq.codecs.raw import Raw
from fedmq.codecs.spec import build_call, parse, split
from fedmq.codecs.stages.base import Stage
from fedmq.codecs.text import shorten, unknown

_WIRE_NAME = re.compile(r"([A-Za-z_][\w-]*)@(\d{1,9})(\(.*\))?", re.DOTALL)
_MAX_WIRE_NAME = 1000


@functools.cache
def codecs() -> Mapping[str, type[Codec]]:
    """Return all codec classes by name, those of installed extensions included.

    Raises:
        SpecError: two codecs have one name, or an entry point is no codec.
    """
    found: dict[str, type[Codec]] = {each.name: each for each in (Raw, Cast, Features, Logits)}
    for entry in entry_points(group="fedmq.codecs"):
        extension = entry.load()
        if not (isinstance(extension, type) and issubclass(extension, Codec)):
            raise SpecError(f"entry point {entry.name!r} of fedmq.codecs is not a Codec class")
        if entry.name in found:
            raise SpecError(f"two codecs are named {entry.name!r}; one is {entry.value}")
        found[entry.name] = extension
    return found


def make_codec(spec: str) -> Codec:
    """Return the codec that a spec names: ``raw``, or ``hadamard(4096) | quantize(4)``.

    Raises:
        SpecError: unknown codec, stage or parameter; the sentence holds the choices.
    """
    calls = parse(spec)
    if len(calls) == 1 and calls[0].name in codecs():
        return build_call(calls[0], codecs(), "codec")
    for call in calls:
        if call.name in codecs() and call.name not in STAGES:
            raise SpecError(f"codec {call.name} stands alone, it is no stage of a pipeline")
        if call.name not in STAGES:
            choices = STAGES if len(calls) > 1 else {**codecs(), **STAGES}
            raise SpecError(unknown("codec", call.name, choices))
    return Pipeline([build_call(call, STAGES, "codec") for call in calls])


def decode(encoded: Encoded, max_bytes: int = MAX_DECODED_BYTES) -> dict[str, Tensor]:
    """Read tensors by the wire name beside them; nothing but the message is needed.

    Raises:
        DecodeError: unknown codec or version, or damaged bytes.
    """
    codec = _reader(encoded.codec)
    if type(codec).__module__.startswith("fedmq."):
        return codec.decode(encoded, max_bytes)
    return _decode_elsewhere(codec, encoded, max_bytes)


def _decode_elsewhere(codec: Codec, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
    """Read tensors with another package's codec: whatever it does must not end its reader."""
    try:
        found: object = codec.decode(encoded, max_bytes)
    except CodecError:
        raise
    except Exception as error:  # a codec may be a user's own, and raise anything
        text = f"codec {codec.wire_name} cannot decode: {type(error).__name__}: {error}"
        raise DecodeError(text[:2000]) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in found.items()
    ):
        kind = type(found).__name__
        raise DecodeError(f"codec {codec.wire_name}: expected tensors by name, got {kind!r}")
    return found


@functools.lru_cache(maxsize=256)
def _reader(wire_name: str) -> Codec:
    """Return the codec of a wire name, which is a spec with versions."""
    texts = [part.strip() for part in split(wire_name[: _MAX_WIRE_NAME + 1])]
    if len(wire_name) > _MAX_WIRE_NAME or " | ".join(texts) != wire_name:
        raise DecodeError(f"expected codec@version(parameters), got {shorten(wire_name)}")
    matches = [_WIRE_NAME.fullmatch(text) for text in texts]
    known: Mapping[str, type[Codec] | type[Stage]] = {**STAGES, **codecs()}
    parts = []
    for match in matches:
        if match is None:
            raise DecodeError(f"expected codec@version(parameters), got {shorten(wire_name)}")
        name, version, parameters = match.groups()
        if name not in known:
            raise DecodeError(unknown("codec", name, known))
        kind = STAGES[name] if len(matches) > 1 and name in STAGES else known[name]
        if kind.version != int(version):
            raise DecodeError(f"codec {name} here has version {kind.version}, not {version}")
        parts.append(name + (parameters or ""))
    try:
        return make_codec(" | ".join(parts))
    except SpecError as error:
        raise DecodeError(str(error)) from None
