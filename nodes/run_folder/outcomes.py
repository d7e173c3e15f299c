"""Outcomes of a run's tasks and results, counted from its ledger.

Summary, view and ``trace stats`` all show these counts. A result is *used* if it is in a committed
version, *stale* or *refused* if it was rejected, and *unused* otherwise: it was valid, but the
version that it was for was not committed. The four add up to all results that the broker accepted.
A task *failed* if its worker reported so, or if the broker dead-lettered it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from fedmq.broker.ledger.entries import Accepted, AnyEntry, Refusal
from fedmq.broker.rejections import Code, failure_code_of
from fedmq.broker.wire.addresses import BROKER, CONTINUED
from fedmq.broker.wire.schema import Message

_STALE = (Code.STALE, Code.LATE)
UNUSED, NO_ANSWER = "unused", "no-answer"
"""Codes of a client whose result is in no version, and of one that has not answered."""
_UNUSED, _NO_ANSWER = "its result is in no version", "no answer"
_NOTHING, _RESULT, _TASK, _EVALUATION = 0, 1, 2, 3


@dataclass
class Cohorts:
    """Completeness of the cohorts of synchronous rounds.

    versions: number of versions with a cohort. whole: number of those that missed no result.
    wanted: number of clients in all cohorts. missing: number of their results that came late or
        not at all.
    last: (results of its own cohort, clients in the cohort) of the newest version.
    """

    versions: int = 0
    wanted: int = 0
    missing: int = 0
    whole: int = 0
    last: tuple[int, int] | None = None

    def add(self, results: int, late: int, cohort: int) -> None:
        """Count a version."""
        own = max(0, results - late)
        self.versions += 1
        self.wanted += cohort
        self.missing += max(0, cohort - own)
        self.whole += own >= cohort
        self.last = own, cohort


@dataclass
class ClientRecord:
    """Outcomes of one client's tasks.

    tasks: number of tasks sent to it. good: number of its results in versions.
    code, reason: why its last failed task or rejected result failed, or "".
    """

    tasks: int = 0
    good: int = 0
    code: str = ""
    reason: str = ""


@dataclass
class LastFailure:
    """The newest failed task, rejected result or failed evaluation.

    what: ``task``, ``result`` or ``evaluation``.
    client: its client; None for an evaluation on the problem's test data.
    where: file and line of the user's code that raised the error, or "".
    """

    what: str
    client: int | None
    code: str
    reason: str
    where: str = ""

    def __str__(self) -> str:
        of = "" if self.client is None else f" of client {self.client}"
        place = f" ({self.where})" if self.where else ""
        return f"{self.what}{of}: {self.reason}{place}"


class Outcomes:
    """Counts of one run, folded entry by entry.

    Attributes:
        results: number of results that the broker accepted.
        used: number of results in committed versions.
        rejected: number of rejected results by code.
        failed: number of failed tasks by code.
        failed_evaluations: number of failed evaluations.
        last: newest failure or rejection, except of late and stale results; or None.
        unaccepted: number of posts of any kind that the broker did not accept.
        cohorts: completeness of synchronous rounds.
        clients: outcomes by client number.
    """

    def __init__(self) -> None:
        self.results = 0
        self.used = 0
        self.rejected: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.failed_evaluations = 0
        self.last: LastFailure | None = None
        self.unaccepted = 0
        self.cohorts = Cohorts()
        self.clients: dict[int, ClientRecord] = {}
        self._out: dict[str, int] = {}
        """Client of each outstanding task, by the task's id."""
        self._evaluations: dict[str, int | None] = {}
        """Client of each outstanding evaluation, by its id; None for the evaluator's."""
        self._given_up: dict[str, str] = {}
        """Code of each dead-lettered task, by its id: it can be redelivered."""
        self._pending: dict[int, int] = {}
        """Client of each result that is not in a version yet, by the result's number."""
        self._finished = False
        # Kind and client of each entry, by its number: compact, as a run has many entries.
        self._kinds = bytearray()
        self._owners = array("q")

    @property
    def stale(self) -> int:
        """Return the number of results that came too many versions late, or after their round."""
        return sum(self.rejected[code] for code in _STALE)

    @property
    def refused(self) -> int:
        """Return the number of results rejected for any other reason."""
        return self.rejected.total() - self.stale

    @property
    def unused(self) -> int:
        """Return the number of results that are in no version although they were not rejected."""
        return max(0, self.results - self.used - self.rejected.total())

    @property
    def without_result(self) -> dict[int, ClientRecord]:
        """Return the clients that got tasks but have no result in any version."""
        found = {k: each for k, each in self.clients.items() if each.tasks and each.good <= 0}
        for client in set(self._pending.values()) & found.keys():
            found[client] = replace(found[client], code=UNUSED, reason=_UNUSED)
        for client, each in found.items():
            if not each.code and not each.reason:
                found[client] = replace(each, code=NO_ANSWER, reason=_NO_ANSWER)
        return dict(sorted(found.items()))

    def feed(self, entry: AnyEntry, message: Message | None, aggregator: str) -> None:
        """Fold the next entry of the ledger.

        Args:
            entry: the entry.
            message: the entry's message, if it has one.
            aggregator: name of the run's aggregator.
        """
        match entry:
            case Accepted(seq=seq) if message is not None and message.sender == aggregator:
                if message.kind == "task":
                    self._task(seq, message)
                elif message.kind == "version":
                    self._version(message.body)
                elif message.kind == "finished":
                    self._finished = True
                elif message.kind == "evaluate":
                    client = natural(message.body.get("client"))
                    self._evaluations[message.id] = client
                    self._note(seq, _EVALUATION, -1 if client is None else client)
            case Accepted(seq=seq) if message is not None and message.sender != BROKER:
                self._answer(seq, message)
            case Accepted() if message is not None and message.kind == CONTINUED:
                if self._finished and message.body["further"]:
                    # Later versions do not include results that were pending at the end.
                    self._finished = False
                    self._pending.clear()
                    self._out.clear()
            case Refusal(of=int(of)):
                self._refusal(of, entry)
            case Refusal():
                self.unaccepted += 1

    def _task(self, seq: int, message: Message) -> None:
        client = natural(message.body.get("client"))
        if client is None:
            return
        given_up = self._given_up.pop(message.id, None)
        if given_up is None:
            self.clients.setdefault(client, ClientRecord()).tasks += 1
        else:
            self.failed[given_up] -= 1  # it was redelivered
        self._out[message.id] = client
        self._note(seq, _TASK, client)

    def _answer(self, seq: int, message: Message) -> None:
        client = self._out.get(message.re or "")
        if message.kind == "result":
            self.results += 1
            if client is None:
                client = natural(message.body.get("client"))
            self._note(seq, _RESULT, -1 if client is None else client)
            if client is not None:
                self._pending[seq] = client
        elif message.kind == "failed" and client is not None:
            code, reason, where = _failure_of(message)
            self.failed[code] += 1
            self._blame("task", client, code, reason, where)
        elif message.kind == "failed" and message.re in self._evaluations:
            self._not_evaluated(self._evaluations[message.re], *_failure_of(message))
        elif message.kind != "score":
            return
        self._out.pop(message.re or "", None)
        self._evaluations.pop(message.re or "", None)

    def _version(self, body: dict[str, Any]) -> None:
        results, position = natural(body.get("results")), natural(body.get("position"))
        if results is None or position is None:
            return
        self.used += results
        cohort, late = natural(body.get("cohort")), natural(body.get("late"))
        if cohort is not None:
            self.cohorts.add(results, late or 0, cohort)
        for seq in [seq for seq in self._pending if seq <= position]:
            client = self._pending.pop(seq)
            if client in self.clients:
                self.clients[client].good += 1

    def _refusal(self, of: int, refusal: Refusal) -> None:
        kind = self._kinds[of] if of < len(self._kinds) else _NOTHING
        if kind == _NOTHING:
            return
        client, code = self._owners[of], refusal.known_code
        if kind == _EVALUATION:
            self._not_evaluated(client if client >= 0 else None, code, refusal.reason)
            return
        if kind == _RESULT:
            self.rejected[code] += 1
            if self._pending.pop(of, None) is None and client in self.clients:
                self.clients[client].good -= 1  # deferred during the commit, then rejected
        else:
            self.failed[code] += 1
            if refusal.dead_lettered:
                self._given_up[refusal.id] = code
        self._blame("result" if kind == _RESULT else "task", client, code, refusal.reason)

    def _not_evaluated(self, client: int | None, code: str, reason: str, where: str = "") -> None:
        self.failed_evaluations += 1
        self.last = LastFailure("evaluation", client, code, reason, where)

    def _blame(self, what: str, client: int, code: str, reason: str, where: str = "") -> None:
        if code not in (*_STALE, Code.RUN_OVER):  # these results only came late
            self.last = LastFailure(what, client if client >= 0 else None, code, reason, where)
        record = self.clients.get(client)
        if record is not None:
            record.code, record.reason = code, reason

    def _note(self, seq: int, kind: int, client: int) -> None:
        missing = seq + 1 - len(self._kinds)
        if missing > 0:
            self._kinds.extend(bytes(missing))
            self._owners.extend([-1] * missing)
        self._kinds[seq], self._owners[seq] = kind, client


def _failure_of(message: Message) -> tuple[str, str, str]:
    """Return code, reason and place in a ``failed`` message."""
    reason = str(message.body.get("reason", ""))
    code = failure_code_of(str(message.body.get("code", "")), reason)
    return code, reason, str(message.body.get("where", ""))


def natural(value: Any) -> int | None:
    """Return a value from a message's body if it is a natural number below 2^62, else None."""
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
    return value if whole else None
