"""A run written by hand, entry by entry, with one of everything; and ledgers rewritten."""

import msgspec
import torch

from fedmq.algorithms.base import Payload
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.entries import (
    Accepted,
    BlobName,
    Consumed,
    Ended,
    Opened,
    Refusal,
)
from fedmq.broker.ledger.writer import Ledger
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import (
    Blob,
    Message,
    digest,
)
from fedmq.codecs.registry import make_codec
from fedmq.nodes.messages.payloads import Codecs, pack

START = 1_700_000_000.0
CONFIG = '[run]\nid = "{run}"\nseed = 0\n\n[broker]\nretain = "everything"\n'
EVIL = "evil\x1b[31m\u202e name"
W = torch.arange(6.0).reshape(2, 3)
BROKEN = torch.tensor([1.0, float("nan"), -3.0, float("nan")])


class Writer:
    """Writes a run into a ledger; what it says is numbered as the broker does it."""

    def __init__(self, folder, run="r"):
        self.ledger = Ledger(folder)
        self.run = run
        self.first = self.ledger.next_seq
        self.at = START

    def entry(self, kind, **fields):
        self.at += 0.5
        seq = self.ledger.next_seq
        self.ledger.append(kind(seq=seq, at=self.at, **fields))
        return seq

    def open(self):
        self.at -= 0.5
        return self.entry(Opened, run=self.run, config=CONFIG.format(run=self.run), total_clients=4)

    def blob(self, sender, data):
        data = bytes(data)
        if not self.ledger.size_of(BlobName(self.run, sender, digest(data))):
            self.ledger.put(BlobName(self.run, sender, digest(data)), len(data), 0, data)
        return Blob.of(data)

    def say(self, sender, kind, to, body=None, *, name=None, re=None, consumes=(), data=()):
        blobs = tuple(self.blob(sender, each) for each in data)
        message = Message(
            kind=kind,
            id=name or f"{sender}/{self.ledger.next_seq - self.first}",
            run=self.run,
            sender=sender,
            to=to,
            re=re,
            body=body or {},
            blobs=blobs,
        )
        return self.entry(Accepted, message=encode_message(message), consumes=consumes)

    def tensors(self, sender, kind, to, body, tensors, codec="raw", more=(), **fields):
        packed = pack(Payload(tensors, {}, body.pop("numbers", {})), Codecs(make_codec(codec)), 0)
        data = (*packed.data, *more)
        return self.say(sender, kind, to, {**packed.body, **body}, data=data, **fields)

    def joined(self, node, role, clients=()):
        body = {"node": node, "role": role, "session": "s", "clients": list(clients)}
        return self.say("broker", "joined", "aggregator", body)

    def task(self, number, client, version):
        body = {"client": client, "model_version": version, "reply": "update"}
        to = f"client/{client}"
        return self.tensors("aggregator", "task", to, body, {"w": W}, name=f"a/{number}")

    def result(self, node, number, seq, client, version, tensors=None, codec="raw", elapsed_s=0.25):
        body = {"client": client, "model_version": version, "numbers": {"n": 10}}
        body |= {"elapsed_s": elapsed_s, "device": "cpu"}
        return self.tensors(
            node,
            "result",
            "aggregator",
            body,
            tensors or {"w": W + client},
            codec,
            name=f"a/{number}/result",
            re=f"a/{number}",
            consumes=(seq,),
        )


def write(folder, run="r"):
    """Write the story; return the numbers of its entries by name."""
    it = Writer(folder, run)
    at = {"opened": it.open()}
    it.joined("aggregator", "aggregator")
    at["joined"] = it.joined("worker-0", "worker", [[0, 1]])
    it.joined("worker-1", "worker", [[2, 3]])
    it.joined("evaluator", "evaluator")
    it.say("aggregator", "run", "record", {"config": CONFIG.format(run=run)})
    body = {"model_version": 0}
    at["evaluate"] = it.tensors("aggregator", "evaluate", "evaluator", body, {"w": W}, name="a/1")
    at["task"] = it.task(2, 0, 0)
    other = it.task(3, 2, 0)
    at["result"] = it.result("worker-0", 2, at["task"], 0, 0, {"w": W, "b": BROKEN})
    metrics = {"accuracy": 0.5, "loss": float("nan")}
    at["score"] = it.say(
        "evaluator",
        "score",
        "aggregator",
        {"metrics": metrics},
        name="a/1/score",
        re="a/1",
        consumes=(at["evaluate"],),
    )
    # It says that it took longer than the task was out.
    at["half"] = it.result("worker-1", 3, other, 2, 0, codec="cast(float16)", elapsed_s=1e3)
    fold = msgspec.msgpack.encode({"position": at["half"], "hosts": {0: "worker-0", 1: "worker-0"}})
    body = {"version": 1, "position": at["half"], "results": 2, "mean_staleness": 0.0}
    body |= {"max_staleness": 0, "model_digest": "d" * 32, "used": 2}
    at["version"] = it.tensors(
        "aggregator", "version", "checkpoint", body, {"w": W * 2}, more=[fold], name="a/4"
    )
    at["consumed"] = it.entry(
        Consumed, node="aggregator", of=(at["result"], at["score"], at["half"])
    )
    dropped = it.task(5, 1, 1)
    at["failed"] = it.say(
        "worker-0",
        "failed",
        "aggregator",
        {"reason": "dropped on demand"},
        name="a/5/failed",
        re="a/5",
        consumes=(dropped,),
    )
    late = it.task(6, 3, 0)
    at["stale"] = it.result("worker-1", 6, late, 3, 0, {"w": W + 3, "c": torch.tensor([True])})
    body = {"id": "a/6/result", "reason": "too stale", "by": "aggregator"}
    at["told"] = it.say("broker", "refused", "node/worker-1", body, re="a/6/result")
    refusal = {"run": run, "node": "aggregator", "id": "a/6/result", "reason": "too stale"}
    at["refusal"] = it.entry(Refusal, **refusal, of=at["stale"])
    refusal = {"run": run, "node": "broker", "id": "x/1", "reason": "no such address"}
    at["post"] = it.entry(Refusal, **refusal, mark=b"m")
    body = {"node": "worker-1", "role": "worker", "session": "s", "clients": [[2, 3]]}
    body["reason"] = "silent for 10.0 s"
    at["left"] = it.say("broker", "left", "aggregator", body)
    at["pending"] = it.task(7, 2, 1)
    body = {"text": "\x1b]0;owned\x07\n\u202e", "raw": b"\x00\xff", "nan": float("nan")}
    at["evil"] = it.say(EVIL, "note", "record", body)
    at["timer"] = it.say("aggregator", "timer", "timer", {"token": "end", "after_s": 60.0})
    at["ended"] = it.entry(Ended, run=run, reason="enough")
    it.ledger.close()
    return at


def rewrite(source, target, change):
    """Copy a ledger's run; ``change(seq, message, data)`` returns the last two, or None."""
    trace = Trace(source)
    it = Writer(target, trace.run)
    for entry in trace.entries():
        if isinstance(entry, Accepted):
            message = entry.read()
            data = [bytes(trace.blob(message, index)) for index in range(len(message.blobs))]
            changed = change(entry.seq, message, data)
            if changed is not None:
                message, data = changed
                blobs = tuple(it.blob(message.sender, each) for each in data)
                message = msgspec.structs.replace(message, blobs=blobs)
                entry = msgspec.structs.replace(entry, message=encode_message(message))
            else:
                continue
        it.ledger.append(msgspec.structs.replace(entry, seq=it.ledger.next_seq))
    it.ledger.close()
