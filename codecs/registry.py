"""The one registry of codecs: by spec for writing, by wire name for reading.

Other packages add codecs through the entry-point group ``fedmq.codecs``; each entry
point is a `Codec` class, and its name is the codec's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import entry_points

from torch import Tensor

from fedmq.codecs.base import MAX_DECODED_BYTES, Codec, Encoded, brief
from fedmq.codecs.cast import Cast
from fedmq.codecs.errors import DecodeError, SpecError
from fedmq.codecs.raw import Raw
from fedmq.codecs.spec import build, unknown

_WIRE_NAME = re.compile(r"([A-Za-z_][\w-]*)@(\d{1,9})(\(.*\))?", re.DOTALL)
_MAX_WIRE_NAME = 1000


@functools.cache
def codecs() -> Mapping[str, type[Codec]]:
    """Return all codec classes by name, those of installed extensions included.

    Raises:
        SpecError: two codecs have one name, or an entry point is no codec.
    """
    found: dict[str, type[Codec]] = {each.name: each for each in (Raw, Cast)}
    for entry in entry_points(group="fedmq.codecs"):
        extension = entry.load()
        if not (isinstance(extension, type) and issubclass(extension, Codec)):
            raise SpecError(f"entry point {entry.name!r} of fedmq.codecs is not a Codec class")
        if entry.name in found:
            raise SpecError(f"two codecs are named {entry.name!r}; one is {entry.value}")
        found[entry.name] = extension
    return found


def make_codec(spec: str) -> Codec:
    """Return the codec that a spec such as ``raw`` or ``cast(float16)`` names.

    Raises:
        SpecError: unknown codec or parameter; the sentence holds the choices.
    """
    return build(spec, codecs(), "codec")


def decode(encoded: Encoded, max_bytes: int = MAX_DECODED_BYTES) -> dict[str, Tensor]:
    """Read tensors by the wire name beside them; nothing but the message is needed.

    Raises:
        DecodeError: unknown codec or version, or damaged bytes.
    """
    return _reader(encoded.codec).decode(encoded, max_bytes)


@functools.lru_cache(maxsize=256)
def _reader(wire_name: str) -> Codec:
    match = _WIRE_NAME.fullmatch(wire_name) if len(wire_name) <= _MAX_WIRE_NAME else None
    if match is None:
        raise DecodeError(f"expected codec@version(parameters), got {brief(wire_name)}")
    name, version, parameters = match.groups()
    if name not in codecs():
        raise DecodeError(unknown("codec", name, codecs()))
    try:
        codec = make_codec(name + (parameters or ""))
    except SpecError as error:
        raise DecodeError(str(error)) from None
    if codec.version != int(version):
        raise DecodeError(f"codec {name} here has version {codec.version}, not {version}")
    return codec
