"""A worker writes clients' states in its own folder only, whatever the broker calls the run."""

import msgspec
import pytest
import structlog

from fedmq.broker.errors import WireError
from fedmq.broker.wire.encoding import decode_frame, encode_frame
from fedmq.broker.wire.schema import Hello, Welcome
from fedmq.nodes.errors import NodeError
from fedmq.nodes.run.session import admitted
from fedmq.nodes.worker.client_state import ClientStateStore
from tests.nodes.worker.test_client_state import kept
from tests.permissions import readable_by_others

OUTSIDE = ["/etc/x", "..", "../up", "a/../../up", "a/b", ".hidden", "a\0b", "a\n", "x" * 101, "ü"]
WELCOME = Welcome(run="r", beat_s=1.0, lease_s=10.0)


class Link:
    """A link that a broker has welcomed to a run of any name."""

    def __init__(self, run: str) -> None:
        self.welcome = lambda: msgspec.structs.replace(WELCOME, run=run)
        self.close = lambda *_args, **_more: None


@pytest.mark.parametrize("run", ["", *OUTSIDE])
def test_a_run_whose_name_is_no_folder_is_not_joined(run) -> None:
    hello = Hello(node="w", role="worker", session="s")
    with (
        pytest.raises(NodeError, match="the broker sent an invalid run name"),
        admitted(Link(run), hello, structlog.get_logger()),
    ):
        pytest.fail("the worker would set up the run")


@pytest.mark.parametrize("identity", OUTSIDE)
def test_an_identity_that_is_no_folder_is_not_read(identity) -> None:
    header = encode_frame(msgspec.structs.replace(WELCOME, identity=identity))
    with pytest.raises(WireError):
        decode_frame(header)


def test_states_are_below_the_folders_of_run_and_identity(tmp_path) -> None:
    frame = decode_frame(encode_frame(msgspec.structs.replace(WELCOME, identity="0f" * 16)))
    folder = tmp_path / "states" / frame.run / frame.identity
    ClientStateStore(folder).put(3, kept(seq=1))
    written = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert written == [folder / "client-3" / "000000000001.state"]
    assert readable_by_others(tmp_path / "states") == []
