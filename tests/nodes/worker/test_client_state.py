"""Clients' states on their worker's disk."""

import pytest
import torch

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.schema import Blob, Message
from fedmq.nodes.errors import NodeError
from fedmq.nodes.worker.client_state import ClientStateStore, SavedClientState

LOCAL = Payload(
    weights={"w": torch.tensor([[0.5, -1.0], [3.25, 1e-9]]), "b": torch.zeros(0)},
    exact={"steps": torch.tensor([2**53 + 1]), "mask": torch.tensor([True, False])},
    numbers={"round": 7, "lr": 0.1, "name": "x"},
)


def kept(task="aggregator/3", local=LOCAL, data=(b"result", b"", b"\0" * 100), seq=7):
    result = Message(
        kind="result",
        id=f"{task}/result",
        run="run",
        sender="w0",
        to="aggregator",
        re=task,
        body={"numbers": {"n": 3}, "groups": []},
        blobs=tuple(Blob.of(each) for each in data),
    )
    return SavedClientState(task, seq, local, result, tuple(data))


def same(one, other):
    assert (one.task, one.seq, one.message) == (other.task, other.seq, other.message)
    assert [bytes(each) for each in one.data] == [bytes(each) for each in other.data]
    assert one.local.numbers == other.local.numbers
    for mine, theirs in (
        (one.local.weights, other.local.weights),
        (one.local.exact, other.local.exact),
    ):
        assert list(mine) == list(theirs)
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name])
    return True


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_saved_state_is_read_back(tmp_path, where):
    locals_ = ClientStateStore(tmp_path / "w0" / "run" if where == "disk" else None)
    assert locals_.get(3) is None
    locals_.put(3, kept())
    assert same(locals_.get(3), kept())
    assert locals_.get(0) is None
    newer = kept("aggregator/9", seq=10**13)
    assert locals_.put(3, newer) is newer
    assert same(locals_.get(3), newer)


def test_a_restarted_worker_finds_the_state(tmp_path):
    ClientStateStore(tmp_path).put(3, kept())
    assert same(ClientStateStore(tmp_path).get(3), kept())


def test_a_state_without_tensors_is_saved_too(tmp_path):
    only = kept(local=Payload(numbers={"seen": 1}), data=())
    ClientStateStore(tmp_path).put(0, only)
    assert same(ClientStateStore(tmp_path).get(0), only)


def test_each_worker_and_run_has_its_own_states(tmp_path):
    ClientStateStore(tmp_path / "one").put(0, kept())
    assert ClientStateStore(tmp_path / "another").get(0) is None


def file_of(tmp_path):
    ClientStateStore(tmp_path).put(0, kept())
    (path,) = (tmp_path / "client-0").iterdir()
    assert path.name == "000000000007.state"
    return path


@pytest.mark.slow
def test_any_damage_is_an_error_that_names_the_file(tmp_path):
    path = file_of(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 1, 23, 24, len(whole) - 1)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [whole + b"x", bytes(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(NodeError, match=r"local state of client 0 in .*: damaged") as caught:
            ClientStateStore(tmp_path).get(0)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert same(ClientStateStore(tmp_path).get(0), kept())


def test_a_file_or_folder_that_cannot_be_written_is_an_error(tmp_path):
    locals_ = ClientStateStore(tmp_path / "state")
    (tmp_path / "state" / "client-0").write_text("")
    with pytest.raises(NodeError, match=r"cannot write .*client-0"):
        locals_.put(0, kept())
    with pytest.raises(NodeError, match=r"cannot read .*client-0"):
        locals_.get(0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match="cannot make"):
        ClientStateStore(tmp_path / "file" / "state")
