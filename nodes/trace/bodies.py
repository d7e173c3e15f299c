"""The body of a message as the trace shows it: without a node's secret.

Ledgers of releases before 0.2.0 hold the secret by which a node proves its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmq.broker.access.owners import owner_of
from fedmq.broker.wire.addresses import BROKER
from fedmq.broker.wire.schema import Message


def shown_body(message: Message) -> Mapping[str, Any]:
    """Return a message's body; a node's secret is replaced by the owner that it stands for."""
    body = message.body
    if message.sender != BROKER or "key" not in body:
        return body
    session = str(body.get("session", ""))
    public = {name: value for name, value in body.items() if name != "key"}
    return {"owner": owner_of("", str(body["key"]), session), **public}
