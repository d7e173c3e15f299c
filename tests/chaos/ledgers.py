"""What a ledger says happened, read while it is written; and whether it all adds up."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedmq.algorithms.allowed import Allowed
from fedmq.broker.core.mailboxes import Mailboxes
from fedmq.broker.inspection.trace import Trace
from fedmq.broker.ledger.blob_store import BlobStore
from fedmq.broker.ledger.entries import (
    Accepted,
    AnyEntry,
    BlobName,
    Consumed,
    Ended,
    Opened,
    Refusal,
)
from fedmq.broker.ledger.reader import LedgerTail, read_entries
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.recovery import Restorer
from fedmq.broker.rejections import Code
from fedmq.broker.wire.encoding import encode_message
from fedmq.broker.wire.schema import Message
from fedmq.nodes.aggregator.computed import Computed
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.messages.actions import EndRun, Handled, Start
from fedmq.nodes.replay.fold import Replay
from fedmq.nodes.run.config import parse
from fedmq.nodes.run.devices import kind_of
from fedmq.nodes.run.digests import model_digest
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.run.version_zero import version_zero
from tests.broker.ledger.payload import open_payload

INBOX = ("aggregator", "node/aggregator")
OWN_CODE = Allowed(modules=frozenset({"chaos_models"}))


@dataclass(frozen=True)
class Seen:
    """An accepted message, where and when."""

    seq: int
    at: float
    message: Message
    consumes: tuple[int, ...] = ()


class Watch:
    """A ledger that is being written, as its test sees it."""

    def __init__(self, folder: Path) -> None:
        self._follower = LedgerTail(folder)
        self.folder = folder
        self.entries: list[AnyEntry] = []
        self.messages: list[Seen] = []

    def read(self) -> None:
        for entry in self._follower.poll():
            self.entries.append(entry)
            if isinstance(entry, Accepted):
                self.messages.append(Seen(entry.seq, entry.at, entry.read(), entry.consumes))

    def of_kind(self, *kinds: str, sender: str = "", **body: object) -> list[Seen]:
        """Messages of these kinds, by this sender if one is named, with this in their body."""
        return [
            each
            for each in self.messages
            if each.message.kind in kinds
            and sender in ("", each.message.sender)
            and all(each.message.body.get(key) == value for key, value in body.items())
        ]

    @property
    def version(self) -> int:
        self.read()
        return max((each.message.body["version"] for each in self.of_kind("version")), default=0)

    def until(self, what: str, condition: Callable[[Watch], object], timeout_s: float = 30) -> None:
        """Read on until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.read()
            if condition(self):
                return
            assert time.monotonic() < deadline, (
                f"waited {timeout_s} s for {what}; at version {self.version}, last of all: "
                f"{[str(each.message)[:300] for each in self.messages[-3:]]}"
            )
            time.sleep(0.02)

    def until_version(self, version: int, timeout_s: float = 30) -> None:
        self.until(f"version {version}", lambda it: it.version >= version, timeout_s)

    def pauses(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between version records that were written from start to end."""
        self.read()
        times = [each.at for each in self.of_kind("version") if start <= each.at <= end]
        return [b - a for a, b in itertools.pairwise(times)]


@dataclass
class Refolded:
    """What a fresh aggregator makes of a ledger's inbox."""

    core: Aggregator
    posts: list[Message] = field(default_factory=list)
    refused: dict[int, Handled] = field(default_factory=dict)
    used: dict[int, list[int]] = field(default_factory=dict)
    """By version: the results in it. The last one was not committed."""


def refold(folder: Path) -> Refolded:
    """Fold an inbox from a ledger once more, from its very start."""
    entries = list(read_entries(folder))
    opened = next(each for each in entries if isinstance(each, Opened))
    payload = open_payload(folder)
    setup = set_up(parse(opened.config), OWN_CODE, opened.run)
    computed = Computed(device=kind_of("cpu"), version_0=version_zero(setup.problem))
    core = Aggregator(setup, opened.run, "aggregator", computed)
    done = Refolded(core)
    actions = core.handle(Start())
    kinds: dict[int, str] = {}
    for event in _inbox(entries, payload):
        done.posts += [each.message for each in actions if isinstance(each, PostMessage)]
        if any(isinstance(each, EndRun) for each in actions):
            break
        kinds[event.seq] = event.message.kind
        version = core.version
        actions = core.handle(event)
        for each in actions:
            if isinstance(each, PostMessage) and each.message.kind == "version":
                version += 1  # what is taken after it counts towards the next
            elif isinstance(each, Handled) and each.refused:
                done.refused[each.seq] = each
            elif isinstance(each, Handled) and kinds[each.seq] == "result":
                done.used.setdefault(version, []).append(each.seq)
    else:
        raise AssertionError("the inbox does not hold the end of the run")
    payload.close()
    return done


def _inbox(entries: list[AnyEntry], payload: BlobStore) -> Iterator[Delivery]:
    source = _StoredBlobs(payload)
    for entry in entries:
        if isinstance(entry, Accepted) and (message := entry.read()).to in INBOX:
            yield Delivery(entry.seq, entry.at, message, source=source)
    # The fold may end with the very last message.
    yield Delivery(len(entries), 0.0, Message(kind="end", id="-", run="-", sender="-", to="-"))


@dataclass(frozen=True)
class _StoredBlobs:
    """The blobs of a ledger's payload."""

    payload: BlobStore

    def read(self, delivery: Delivery, index: int) -> memoryview:
        message = delivery.message
        blob = message.blobs[index]
        name = BlobName(message.run, message.sender, blob.digest)
        return memoryview(self.payload.read(name, 0, blob.size))

    def chunks(self, delivery: Delivery, index: int) -> Iterator[memoryview]:
        yield self.read(delivery, index)


@dataclass(frozen=True)
class Books:
    """The figures of an ended run, after everything has been checked."""

    versions: int
    tasks: int
    used: int
    stale: int
    refused: int
    unused: int
    failed: int
    given_up: int
    open_at_end: int


def check_books(run: Path, model: Path | None = None) -> Books:
    """Check that the ledger of an ended run accounts for everything, and that it can be replayed.

    Args:
        run: folder of the broker, with its ledger and summary.json.
        model: folder of the aggregator, with model.npz.
    """
    watch = Watch(run / "ledger")
    watch.read()
    assert [each.seq for each in watch.entries] == list(range(len(watch.entries)))
    times = [each.at for each in watch.entries]
    assert times == sorted(times), "time runs backwards"
    names = Counter((each.message.sender, each.message.id) for each in watch.messages)
    assert max(names.values()) == 1, f"accepted twice: {names.most_common(3)}"
    _check_balance(watch)
    refolded = refold(watch.folder)
    _check_replay(watch, refolded)
    for _ in (replay := Replay(Trace(watch.folder), allowed=OWN_CODE)).steps():
        pass
    assert replay.record.compared
    books = _fates(watch, refolded)

    finished = watch.of_kind("finished")
    assert len(finished) == 1
    counts = finished[0].message.body
    known = (counts["used"], counts["stale"], counts["unused"])
    assert known == (books.used, books.stale, books.unused)
    versions = [each.message.body for each in watch.of_kind("version")]
    assert [each["version"] for each in versions] == list(range(1, books.versions + 1))
    for body in versions:
        assert body["results"] == len(refolded.used.get(body["version"] - 1, []))

    digest = model_digest(refolded.core.tensors())
    assert digest == versions[-1]["model_digest"]
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        assert summary["model_digest"] == digest
        assert summary["versions"] == books.versions
        results = summary["results"]
        assert results["used"] == sum(each["results"] for each in versions) == books.used
        assert results["stale"] == books.stale
        answers = watch.of_kind("result")
        kinds = ("used", "stale", "refused", "unused")
        assert sum(results[each] for each in kinds) == len(answers)
    if model is not None:
        with np.load(model / "model.npz", allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        assert model_digest(tensors) == digest
    return books


def _check_balance(watch: Watch) -> None:
    """Accepted = consumed + pending + refused, when the run ended and at any broker's restart."""
    kept: set[int] = set()
    consumed: list[int] = []
    refused: list[int] = []
    parked: set[int] = set()
    restorer = Restorer(Mailboxes())
    ended = 0
    for entry in watch.entries:
        match entry:
            case Accepted(seq=seq, consumes=consumes):
                if entry.read().to != "record" and not ended:
                    kept.add(seq)
                consumed += consumes
            case Consumed(of=of):
                consumed += of
            case Refusal(of=int(of), dead_lettered=given_up):
                refused.append(of)
                if given_up:
                    parked.add(of)
            case Ended():
                ended += 1
        if not ended:
            restorer.feed(entry)
    assert ended == 1
    assert len(consumed) == len(set(consumed)), "consumed twice"
    assert len(refused) == len(set(refused)), "refused twice"
    assert set(consumed) | set(refused) <= kept
    assert set(restorer.unfinished) == kept - set(consumed) - parked


def _check_replay(watch: Watch, refolded: Refolded) -> None:
    """What the aggregator said, restarted or not, is what the fold says: each message, once."""
    said = [
        each.message
        for each in watch.messages
        if each.message.sender == "aggregator"
        # It is said when the work beside the inbox has ended, between whatever else is said.
        and not str(each.message.body.get("token")).startswith("commit/")
    ]
    for ours, theirs in zip(refolded.posts, said, strict=False):
        assert encode_message(ours) == encode_message(theirs)
    assert len(said) == len(refolded.posts)
    refused = {
        each.of: Handled(each.of, each.reason, each.code)
        for each in watch.entries
        if isinstance(each, Refusal) and each.of is not None and each.node == "aggregator"
    }
    assert refused == refolded.refused
    strange = [each for each in watch.entries if isinstance(each, Refusal) and each.of is None]
    assert not strange, "the broker refused what a node said"


def _fates(watch: Watch, refolded: Refolded) -> Books:
    """Find the one fate of each task; results that nobody had asked for any more have none."""
    used = {seq for each in refolded.used.values() for seq in each}
    over = set(refolded.used.get(refolded.core.version, []))
    assert len(used) == sum(map(len, refolded.used.values())), "a result was used twice"
    last = max([*used, *refolded.refused, 0])
    fates: dict[str, list[str]] = {each.message.id: [] for each in watch.of_kind("task")}
    tasks = {each.seq: each.message.id for each in watch.of_kind("task")}
    for each in watch.of_kind("result", "failed"):
        task = each.message.re
        assert task in fates, f"{each.message.id} answers no task"
        rejected = refolded.refused.get(each.seq)
        code = rejected.code if rejected is not None else ""
        if each.seq in used:
            fates[task].append("unused" if each.seq in over else "used")
        elif code in (Code.STALE, Code.LATE):
            fates[task].append("stale")
        elif each.message.kind == "failed" and each.seq <= last:
            fates[task].append("failed")
        elif code and code not in (Code.UNKNOWN_TASK, Code.WRONG_NODE):
            fates[task].append("refused")
    for entry in watch.entries:
        if isinstance(entry, Refusal) and entry.of in tasks:
            fates[tasks[entry.of]].append("given up")
    assert all(len(each) <= 1 for each in fates.values()), "a task had two fates"
    without = {name for name, each in fates.items() if not each}
    assert without == set(refolded.core._tasks.in_flight), "a task was lost"
    counted = Counter(fate for each in fates.values() for fate in each)
    return Books(
        versions=refolded.core.version,
        tasks=len(fates),
        used=counted["used"],
        stale=counted["stale"],
        refused=counted["refused"],
        unused=counted["unused"],
        failed=counted["failed"],
        given_up=counted["given up"],
        open_at_end=len(without),
    )
