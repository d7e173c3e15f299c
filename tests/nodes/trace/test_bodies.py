"""Nodes' secrets, which older ledgers hold, are not printed or exported."""

from pathlib import Path

import msgspec
import pytest

from fedmq.broker.access.owners import owner_of
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import Accepted
from fedmq.broker.wire.schema import Message
from fedmq.nodes.trace.bodies import shown_body
from tests.permissions import readable_by_others

OLD = Path(__file__).parents[2] / "golden/traces/0.1.0/fedavg-rounds"


def test_no_command_shows_the_secret_of_a_node(fedmq, tmp_path) -> None:
    joined = [each for each in Trace(OLD).entries() if isinstance(each, Accepted)]
    bodies = {each.seq: each.read().body for each in joined if each.read().kind == "joined"}
    secrets = [body["key"] for body in bodies.values()]
    assert secrets
    (tmp_path / "open").mkdir(0o700)
    printed = [
        fedmq("ls", OLD, "--all").output,
        fedmq("stats", OLD).output,
        *[fedmq("show", OLD, str(seq)).output for seq in bodies],
    ]
    for kind in ("--json", "--perfetto"):
        fedmq("export", OLD, kind, tmp_path / "open" / kind)
        printed.append((tmp_path / "open" / kind).read_text())
    assert readable_by_others(tmp_path / "open") == []
    for secret in secrets:
        assert not any(secret in text for text in printed)
    owner = owner_of("", secrets[0], bodies[min(bodies)]["session"])
    assert sum(owner in text for text in printed) >= 3, "who owns a name is shown"


@pytest.mark.parametrize(("sender", "body"), [("w1", {"key": "mine"}), ("broker", {"node": "w"})])
def test_other_bodies_are_shown_as_they_are(sender, body) -> None:
    message = Message(kind="joined", id="1", run="r", sender=sender, to="record", body=body)
    assert shown_body(message) == body
    assert msgspec.json.encode(shown_body(message))
