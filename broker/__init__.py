"""Messaging: wire format, ledger, broker and links. Never imports torch."""

from typing import TYPE_CHECKING

__all__ = [
    "Accepted",
    "AccessError",
    "Blob",
    "Broker",
    "BrokerError",
    "BrokerFailed",
    "BrokerServer",
    "BrokerSettings",
    "Code",
    "Consumed",
    "Ended",
    "EndpointError",
    "GaveUp",
    "Ledger",
    "LedgerDamage",
    "LedgerError",
    "LedgerSettings",
    "Link",
    "LinkClosed",
    "Message",
    "NoSpace",
    "NodeLink",
    "NotKept",
    "Opened",
    "Rejected",
    "Rejection",
    "RunOver",
    "Trace",
    "UnresolvedError",
    "VersionError",
    "WireError",
]

if TYPE_CHECKING:
    from fedmq.broker.core.broker import Broker
    from fedmq.broker.errors import (
        AccessError,
        BrokerError,
        BrokerFailed,
        EndpointError,
        GaveUp,
        LedgerDamage,
        LedgerError,
        LinkClosed,
        NoSpace,
        NotKept,
        Rejected,
        RunOver,
        UnresolvedError,
        VersionError,
        WireError,
    )
    from fedmq.broker.inspection.trace import Trace
    from fedmq.broker.ledger.entries import Accepted, Consumed, Ended, Opened
    from fedmq.broker.ledger.writer import Ledger
    from fedmq.broker.link.core import Link
    from fedmq.broker.link.node_link import NodeLink
    from fedmq.broker.rejections import Code, Rejection
    from fedmq.broker.router import BrokerServer
    from fedmq.broker.settings import BrokerSettings, LedgerSettings
    from fedmq.broker.wire.schema import Blob, Message
else:
    from fedmq._lazy import lazily

    __getattr__, __dir__ = lazily(
        __name__,
        {
            "fedmq.broker.core.broker": "Broker",
            "fedmq.broker.errors": "AccessError BrokerError BrokerFailed EndpointError GaveUp "
            "LedgerDamage LedgerError LinkClosed NoSpace NotKept "
            "Rejected RunOver UnresolvedError VersionError WireError",
            "fedmq.broker.inspection.trace": "Trace",
            "fedmq.broker.ledger.entries": "Accepted Consumed Ended Opened",
            "fedmq.broker.ledger.writer": "Ledger",
            "fedmq.broker.link.core": "Link",
            "fedmq.broker.link.node_link": "NodeLink",
            "fedmq.broker.rejections": "Code Rejection",
            "fedmq.broker.router": "BrokerServer",
            "fedmq.broker.settings": "BrokerSettings LedgerSettings",
            "fedmq.broker.wire.schema": "Blob Message",
        },
    )
