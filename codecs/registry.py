"""The registry of codecs: by spec for encoding, by wire name for decoding.

Other packages add codecs in the entry-point group ``fedmq.codecs``; each entry point is a
`Codec` class and has the codec's name. Stages of pipelines are listed in `pipeline.STAGES`.
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
    """Return all codec classes by name, including those of other installed packages.

    Raises:
        SpecError: two codecs have the same name, or an entry point is not a codec.
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
    """Return the codec of a spec, such as ``raw`` or ``hadamard(4096) | quantize(4)``.

    Raises:
        SpecError: unknown codec, stage or parameter; the message lists the choices.
    """
    calls = parse(spec)
    if len(calls) == 1 and calls[0].name in codecs():
        return build_call(calls[0], codecs(), "codec")
    for call in calls:
        if call.name in codecs() and call.name not in STAGES:
            raise SpecError(f"codec {call.name} cannot be a stage of a pipeline; use it alone")
        if call.name not in STAGES:
            choices = STAGES if len(calls) > 1 else {**codecs(), **STAGES}
            raise SpecError(unknown("codec", call.name, choices))
    return Pipeline([build_call(call, STAGES, "codec") for call in calls])


def decode(encoded: Encoded, max_bytes: int = MAX_DECODED_BYTES) -> dict[str, Tensor]:
    """Decode tensors with the codec of their wire name.

    Raises:
        DecodeError: unknown codec or version, or damaged bytes.
    """
    codec = _codec_of(encoded.codec)
    if type(codec).__module__.startswith("fedmq."):
        return codec.decode(encoded, max_bytes)
    return _decode_with_extension(codec, encoded, max_bytes)


def _decode_with_extension(codec: Codec, encoded: Encoded, max_bytes: int) -> dict[str, Tensor]:
    """Decode tensors with another package's codec; raise DecodeError whatever it raises."""
    try:
        tensors: object = codec.decode(encoded, max_bytes)
    except CodecError:
        raise
    except Exception as error:  # another package's codec can raise anything
        text = f"codec {codec.wire_name} cannot decode: {type(error).__name__}: {error}"
        raise DecodeError(text[:2000]) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in tensors.items()
    ):
        kind = type(tensors).__name__
        raise DecodeError(f"codec {codec.wire_name}: expected tensors by name, got {kind!r}")
    return tensors


@functools.lru_cache(maxsize=256)
def _codec_of(wire_name: str) -> Codec:
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
            raise DecodeError(f"expected codec {name} in version {kind.version}, got {version}")
        parts.append(name + (parameters or ""))
    try:
        return make_codec(" | ".join(parts))
    except SpecError as error:
        raise DecodeError(str(error)) from None
