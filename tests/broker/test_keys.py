"""Real sockets with keys: who gets in, who is sent away, and what both sides say about it."""

import contextlib
import time

import pytest
import structlog
import zmq

from fedmq.broker import driver
from fedmq.broker.access.access_file import AccessFile
from fedmq.broker.access.broker_keys import BrokerKeys
from fedmq.broker.access.curve import KeyPair, NodeKeys
from fedmq.broker.access.invites import InviteToken
from fedmq.broker.access.rights import Rights
from fedmq.broker.enrolment import EnrolmentError, EnrolmentFault, enroll
from fedmq.broker.errors import BrokerError, GaveUp, Rejected
from fedmq.broker.link.local_blobs import LocalBlobs
from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.rejections import RejectCode
from fedmq.broker.router import BrokerServer
from fedmq.broker.settings import BrokerSettings
from fedmq.broker.transport import dealer_socket
from tests.broker.loops import AGGREGATOR, ANY, WORKER, get, message, serving

pytestmark = pytest.mark.end_to_end
OWN, AGG, WORK = KeyPair.new(), KeyPair.new(), KeyPair.new()


@pytest.fixture
def access(tmp_path):
    """The access file of a broker, with the aggregator's key."""
    file = AccessFile(tmp_path / "keys")
    file.authorize(Rights(name="agg", key=AGG.public))
    return file


@pytest.fixture
def logs(monkeypatch):
    """Nodes try again soon; the lines of all logs."""
    monkeypatch.setattr(dealer_socket, "RETRY_S", 0.1)
    with structlog.testing.capture_logs() as lines:
        yield lines


@contextlib.contextmanager
def with_keys(folder, access, endpoint=ANY, settings=None):
    keys = BrokerKeys(OWN, access)
    settings = settings or BrokerSettings(lease_s=2.0, beat_s=0.1)
    with serving(folder / "ledger", settings, endpoint=endpoint, keys=keys) as found:
        yield found


@contextlib.contextmanager
def connected(endpoint, hello, own, broker=OWN.public):
    link = NodeLink.connect(endpoint, hello, own and NodeKeys(own, broker))
    try:
        yield link
    finally:
        link.close()


def logged(logs, words, link=None, within_s=5.0):
    """Wait until the log contains the words in a line or its reason; return that line."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        for line in list(logs):
            if words in f"{line['event']} {line.get('reason', '')}":
                return line
        (link.pause if link else time.sleep)(0.02)
    raise AssertionError((words, logs))


def test_a_key_may_connect_as_soon_as_it_is_authorised(tmp_path, access, logs, monkeypatch):
    monkeypatch.setattr(driver, "ACCESS_EACH_S", 1000.0)
    with with_keys(tmp_path, access) as endpoint, connected(endpoint, AGGREGATOR, AGG) as agg:
        agg.welcome()
        pair = access.invite(Rights(name="guest", roles=("worker",)), 1, time.time() + 60)
        enroll(InviteToken(endpoint, OWN.public, pair), WORK.public, 10.0)
        with connected(endpoint, WORKER, WORK) as worker:
            worker.welcome()
    assert not [each for each in logs if "refused" in each["event"]]


def test_a_key_is_refused_authorised_and_revoked_while_it_is_connected(tmp_path, access, logs):
    with (
        with_keys(tmp_path, access) as endpoint,
        connected(endpoint, AGGREGATOR, AGG) as agg,
        connected(endpoint, WORKER, WORK) as worker,
    ):
        agg.welcome()
        line = logged(logs, f"fedmq keys authorize '{WORK.public}' --name w1 --role worker", worker)
        assert line["found"] == "key-refused"
        line = logged(logs, "refused a key without rights here")
        assert (line["key"], line["address"]) == (WORK.public, "127.0.0.1")
        assert "other_keys" not in line
        access.authorize(Rights(name="w1", key=WORK.public, roles=("worker",)))
        worker.welcome()
        agg.post(message("agg", "client/3"))
        assert get(worker).message.sender == "agg"
        access.revoke("w1")
        with pytest.raises(Rejected) as caught:
            worker.pause(5.0)
        assert caught.value.code == RejectCode.KEY
        agg.post(message("agg", "client/3", number=1))
        agg.flush()
        with connected(endpoint, WORKER, WORK) as again:
            again.give_up_after(0.5)
            with pytest.raises(GaveUp, match="does not accept this node's key"):
                again.welcome()


def test_a_connection_with_a_revoked_key_is_closed(tmp_path, access):
    """Also if its node never sent a Hello; and it fails its next handshake."""
    access.authorize(Rights(name="w1", key=WORK.public))
    with with_keys(tmp_path, access) as endpoint, zmq.Context() as context:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.curve_serverkey = OWN.public.encode()
        dealer.curve_publickey, dealer.curve_secretkey = WORK.public.encode(), WORK.secret.encode()
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = dealer.get_monitor_socket(events | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        dealer.connect(endpoint)
        dealer.send(b"garbage")
        assert dealer.poll(3000)
        access.revoke("w1")
        seen = []
        while zmq.EVENT_HANDSHAKE_FAILED_AUTH not in seen:
            assert monitor.poll(3000)
            seen.append(int.from_bytes(monitor.recv_multipart()[0][:2], "little"))
        dealer.disable_monitor()
        monitor.close()
        dealer.close()


def test_a_node_finds_out_that_the_broker_has_another_key(tmp_path, access, logs):
    with (
        with_keys(tmp_path, access) as endpoint,
        connected(endpoint, AGGREGATOR, AGG, KeyPair.new().public) as agg,
    ):
        agg.give_up_after(0.5)
        with pytest.raises(GaveUp, match=r"its key is not .*, which this node expects"):
            agg.welcome()


def test_a_node_without_keys_and_one_with_keys_find_out_that_the_other_end_differs(
    tmp_path, access, logs
):
    with (
        with_keys(tmp_path, access) as endpoint,
        connected(endpoint, AGGREGATOR, None) as agg,
    ):
        assert logged(logs, "the broker there requires keys", agg)["found"] == "secured"
        agg.give_up_after(0.4)
        with pytest.raises(GaveUp, match="requires keys"):
            agg.welcome()
    # However often the node has tried again.
    assert sum(line["event"].startswith("cannot connect") for line in logs) == 1
    with serving(tmp_path / "b") as endpoint, connected(endpoint, AGGREGATOR, AGG) as agg:
        assert logged(logs, "no broker with keys listens there", agg)["found"] == "without-keys"


def test_a_node_connects_once_the_broker_has_its_keys(tmp_path, access, logs):
    """libzmq itself never tries again after another mechanism."""
    with serving(tmp_path / "b") as endpoint:
        agg = NodeLink.connect(endpoint, AGGREGATOR, NodeKeys(AGG, OWN.public))
        logged(logs, "no broker with keys listens there", agg)
    with with_keys(tmp_path, access, endpoint):
        agg.welcome()
        agg.close()


def test_a_socket_file_needs_no_keys_beside_an_endpoint_with_keys(tmp_path, access):
    keys = BrokerKeys(OWN, access)
    path = tmp_path / "socket"
    endpoints = [ANY, f"ipc://{path}"]
    with serving(tmp_path / "a", endpoint=endpoints, keys=keys) as endpoint:
        assert endpoint.startswith("tcp://127.0.0.1:")
        assert path.stat().st_mode & 0o777 == 0o600
        with (
            connected(endpoints[1], AGGREGATOR, AGG) as agg,  # its keys are not used
            connected(endpoints[1], WORKER, None) as worker,
        ):
            agg.welcome()
            worker.welcome()
            agg.post(message("agg", "client/3"))
            assert get(worker).message.sender == "agg"


@pytest.mark.parametrize("read_files", [True, False])
def test_a_node_with_a_key_reads_the_ledger_s_files_if_its_rights_say_so(
    tmp_path, access, monkeypatch, read_files
):
    read = []
    fill = LocalBlobs._fill
    monkeypatch.setattr(LocalBlobs, "_fill", lambda *args: read.append(args) or fill(*args))
    access.authorize(Rights(name="w1", key=WORK.public, read_files=read_files))
    model = bytes(2_000_000)
    with (
        with_keys(tmp_path, access) as endpoint,
        connected(endpoint, AGGREGATOR, AGG) as agg,
        connected(endpoint, WORKER, WORK) as worker,
    ):
        agg.welcome()
        worker.welcome()
        agg.post(message("agg", "client/3", model), [model])
        with agg.away():
            assert get(worker).read(0) == model
    assert bool(read) == read_files


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "ipc://@x-y"])
def test_a_broker_that_others_reach_needs_keys_or_insecure(tmp_path, endpoint, logs):
    with pytest.raises(BrokerError, match=r"cannot listen on .*--insecure"):
        BrokerServer(endpoint, tmp_path)
    with serving(tmp_path, endpoint=endpoint, insecure=True):
        logged(logs, "it runs with --insecure")


def test_a_damaged_access_file_is_logged_and_the_keys_from_before_apply(tmp_path, access, logs):
    with with_keys(tmp_path, access) as endpoint, connected(endpoint, AGGREGATOR, AGG) as agg:
        agg.welcome()
        access.path.write_text("{")
        logged(logs, "access.json is invalid", agg)
        agg.post(message("agg", "client/3"))
        agg.flush()
        with connected(endpoint, AGGREGATOR, AGG) as again:
            again.pause(0.1)
    with pytest.raises(BrokerError, match=r"access.json is invalid"):
        BrokerServer(ANY, tmp_path / "ledger", keys=BrokerKeys(OWN, access))


# ---- enrolment


def test_a_key_is_handed_in_with_an_invite(tmp_path, access, logs):
    rights = Rights(name="lab", roles=("worker",), clients=((0, 9),))
    invite = access.invite(rights, uses=1, expires_at=time.time() + 60)
    with with_keys(tmp_path, access) as endpoint:
        token = InviteToken(endpoint, OWN.public, invite)
        enroll(token, WORK.public, 5.0)
        enroll(token, WORK.public, 5.0)  # as if the answer had been lost
        assert access.load().keys[WORK.public].name == "lab-1"
        with pytest.raises(EnrolmentError, match="no uses left") as caught:
            enroll(token, KeyPair.new().public, 5.0)
        assert caught.value.fault is EnrolmentFault.REFUSED
        with (
            connected(endpoint, AGGREGATOR, AGG) as agg,
            connected(endpoint, WORKER, WORK) as worker,
        ):
            agg.welcome()
            worker.welcome()
        with connected(endpoint, WORKER, invite) as stranger, pytest.raises(Rejected) as refused:
            stranger.welcome()  # all that an invite's key may do is enrol another
        assert refused.value.code == RejectCode.KEY


def test_an_invite_that_cannot_be_used_is_refused_by_kind(tmp_path, access, monkeypatch):
    rights = Rights(name="lab", roles=("worker",))
    expired = access.invite(rights, uses=1, expires_at=time.time() - 1)
    with with_keys(tmp_path, access) as endpoint:
        for own, broker, fault, reason in (
            (expired, OWN.public, EnrolmentFault.REFUSED, "expired"),
            (KeyPair.new(), OWN.public, EnrolmentFault.UNKNOWN_INVITE, "revoked"),
            (expired, AGG.public, EnrolmentFault.OTHER_BROKER, "is not the broker"),
        ):
            with pytest.raises(EnrolmentError, match=reason) as caught:
                enroll(InviteToken(endpoint, broker, own), WORK.public, 5.0)
            assert caught.value.fault is fault
    with pytest.raises(EnrolmentError, match="did not answer in time") as caught:
        enroll(InviteToken(endpoint, OWN.public, expired), WORK.public, 0.2)
    assert caught.value.fault is EnrolmentFault.NO_ANSWER
    with serving(tmp_path / "b") as endpoint, pytest.raises(EnrolmentError) as caught:
        enroll(InviteToken(endpoint, OWN.public, expired), WORK.public, 5.0)
    assert caught.value.fault is EnrolmentFault.OTHER_BROKER
    with pytest.raises(EnrolmentError, match="does not resolve") as caught:
        enroll(InviteToken("tcp://no.such.host.invalid:1", OWN.public, expired), WORK.public, 5.0)
    assert caught.value.fault is EnrolmentFault.ADDRESS
