"""Payloads as messages."""

import torch

from fedmq.algorithms.base import Payload
from fedmq.broker.wire.schema import MAX_BUFFERS, Message
from fedmq.nodes.messages.payloads import RAW, pack, unpack


def there_and_back(payload):
    packed = pack(payload, RAW, 0)
    about = {"kind": "x", "id": "a/1", "run": "r", "sender": "a", "to": "record"}
    message = Message(**about, body=dict(packed.body), blobs=packed.blobs)
    return packed, unpack(message, packed.data.__getitem__)


def of_clients(count):
    """Return the tensors of a server that trains on each client's uploads."""
    tensors = {}
    for client in range(count):
        tensors[f"{client}.features"] = torch.full((3, 2), float(client))
        tensors[f"{client}.ids"] = torch.arange(3) + client
    return tensors


def test_a_message_of_many_clients_tensors_has_few_blobs():
    """A message cannot have more than MAX_BUFFERS blobs."""
    tensors = of_clients(100)
    packed, back = there_and_back(Payload(exact=tensors))
    assert len(packed.blobs) < MAX_BUFFERS
    assert set(back.exact) == set(tensors)
    assert all(torch.equal(back.exact[name], each) for name, each in tensors.items())


def test_few_clients_have_a_blob_each_which_is_stored_once():
    before, _ = there_and_back(Payload(exact=of_clients(5)))
    tensors = of_clients(5)
    tensors["3.features"] += 0.5
    after, _ = there_and_back(Payload(exact=tensors))
    assert len(set(before.blobs) ^ set(after.blobs)) == 2


def test_a_state_dict_as_weights_has_few_blobs():
    """Each BatchNorm's integer counter interrupts the run of its floats."""
    weights = {}
    for n in range(100):
        weights |= {f"{n}.weight": torch.full((2,), n), f"{n}.mean": torch.full((2,), float(n))}
    packed, back = there_and_back(Payload(weights, of_clients(100)))
    assert len(packed.blobs) < MAX_BUFFERS - 15
    assert set(back.weights) == set(weights)
    assert all(torch.equal(back.weights[name], each) for name, each in weights.items())


def test_a_few_runs_of_weights_stay_in_their_order():
    weights = {f"{n}": torch.tensor(n if n % 2 else float(n)) for n in range(48)}
    _, back = there_and_back(Payload(weights))
    assert list(back.weights) == list(weights)
