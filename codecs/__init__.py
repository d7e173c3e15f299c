"""Codecs: tensors to bytes and back, without any knowledge of sockets or algorithms."""

from typing import TYPE_CHECKING

__all__ = [
    "STAGES",
    "Codec",
    "CodecError",
    "Context",
    "DecodeError",
    "Encoded",
    "NumberStage",
    "Pipeline",
    "SpecError",
    "Stage",
    "StageOrder",
    "ValueStage",
    "codecs",
    "decode",
    "make_codec",
]

if TYPE_CHECKING:
    from fedmq.codecs.base import Codec, Encoded
    from fedmq.codecs.errors import CodecError, DecodeError, SpecError
    from fedmq.codecs.pipeline import STAGES, Pipeline
    from fedmq.codecs.registry import codecs, decode, make_codec
    from fedmq.codecs.stages.base import Context, NumberStage, Stage, StageOrder, ValueStage
else:
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.codecs.base": "Codec Encoded",
            "fedmq.codecs.errors": "CodecError DecodeError SpecError",
            "fedmq.codecs.pipeline": "STAGES Pipeline",
            "fedmq.codecs.registry": "codecs decode make_codec",
            "fedmq.codecs.stages.base": "Context NumberStage Stage StageOrder ValueStage",
        },
    )
