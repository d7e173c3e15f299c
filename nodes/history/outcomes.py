"""Outcomes of a run's tasks, results and evaluations.

A result is *used* if it is in a committed version, *stale* or *refused* if it was rejected, and
*unused* otherwise: it was valid, but the version that it was for was not committed. The four add up
to all results that the broker accepted. A task *failed* if its worker reported so, or if it was
rejected or dead-lettered.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedmq.broker.ledger.entries import Refusal
from fedmq.broker.rejections import Code, failure_code_of
from fedmq.broker.wire.schema import Message
from fedmq.nodes.history.facts import SentTask, natural

_STALE = (Code.STALE, Code.LATE)
UNUSED, NO_ANSWER = "unused", "no-answer"
"""Codes of a client whose result is in no version, and of one that has not answered."""
IN_FLIGHT = (UNUSED, NO_ANSWER, Code.RUN_OVER)
"""Codes of clients whose task was in flight, or had just come back, when the run ended."""
_RESULT, _TASK, _EVALUATION, _USED, _REJECTED = 1, 2, 3, 4, 8
"""Bits of an entry: what it is in the lowest two, and the outcome of a result."""
_WHAT = 3
_LARGEST = (1 << 31) - 1
"""Largest client, version and staleness that are kept for an entry."""


Subject = Literal["task", "result", "evaluation"]


class ResultOutcome(enum.StrEnum):
    """Outcome of a result, as far as it is known.

    OPEN: in no version yet. It is unused if the run ends, or has ended, without it.
    """

    OPEN = "open"
    USED = "used"
    REJECTED = "rejected"


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


@dataclass(slots=True)
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

    what: what failed or was rejected.
    client: its client; None for an evaluation on the problem's test data.
    code, reason: the code, and the sentence of the node that reported it.
    where: file and line of the user's code that raised the error, or "".
    """

    what: Subject
    client: int | None
    code: str
    reason: str
    where: str = ""


class Outcomes:
    """Counts of one run. Memory: 17 bytes for each task and answer, 16 for each version.

    Attributes:
        results: number of results that the broker accepted.
        used: number of results in committed versions.
        staleness: number of used results by staleness, in versions.
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
        self.staleness: Counter[int] = Counter()
        self.rejected: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.failed_evaluations = 0
        self.last: LastFailure | None = None
        self.unaccepted = 0
        self.cohorts = Cohorts()
        self.clients: dict[int, ClientRecord] = {}
        self._open: dict[int, int] = {}
        """Rows of the results that are in no version and were not rejected, by their numbers."""
        # Of each version: number of the last message that it includes, and its own number.
        self._positions, self._versions = array("q"), array("q")
        # Each task, evaluation and result has a row in these arrays. Other entries have none, nor
        # have those of other runs: a ledger may have many.
        self._seqs = array("q")  # ascending
        # Bits; client; and version of the model, or the staleness of a used result. -1 for none.
        self._bits, self._clients, self._bases = bytearray(), array("i"), array("i")

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
        """Return the clients that got tasks but have no result in any version.

        Those without a failure have the code `UNUSED` or `NO_ANSWER`, and no reason.
        """
        found = {k: each for k, each in self.clients.items() if each.tasks and not each.good}
        for client in {self._clients[row] for row in self._open.values()} & found.keys():
            found[client] = replace(found[client], code=UNUSED, reason="")
        for client, each in found.items():
            if not each.code and not each.reason:
                found[client] = replace(each, code=NO_ANSWER)
        return dict(sorted(found.items()))

    def outcome_of(self, seq: int) -> ResultOutcome | None:
        """Return the outcome of a result by the number of its entry; None for other entries."""
        row = self._row_of(seq)
        bits = 0 if row is None else self._bits[row]
        if bits & _WHAT != _RESULT:
            return None
        return (
            ResultOutcome.REJECTED
            if bits & _REJECTED
            else ResultOutcome.USED
            if bits & _USED
            else ResultOutcome.OPEN
        )

    def staleness_of(self, seq: int) -> int | None:
        """Return the staleness of a used result in versions; None for all others."""
        row = self._row_of(seq)
        if row is None or not self._bits[row] & _USED or self._bases[row] < 0:
            return None
        return self._bases[row]

    def staleness_at(self, seq: int, version: int) -> int:
        """Return by how many versions a message was late when the aggregator handled it.

        It is known once the version after it is in the ledger.

        Args:
            seq: number of its entry.
            version: version of the model that it refers to.
        """
        used = self.staleness_of(seq)
        if used is not None:
            return used
        found = bisect.bisect_left(self._positions, seq)
        return (self._versions[found - 1] if found else 0) - version

    # ---- entries

    def sent(self, task: SentTask) -> None:
        """Count a task or an evaluation; one that is delivered again has not failed."""
        if task.is_evaluation:
            self.failed_evaluations -= task.redelivered is not None
        elif task.client is None:
            return
        elif task.redelivered is not None:
            self.failed[task.redelivered] -= 1
        else:
            self.clients.setdefault(task.client, ClientRecord()).tasks += 1
        self._note(task.seq, _EVALUATION if task.is_evaluation else _TASK, task.client)

    def answered(self, seq: int, message: Message, task: SentTask | None) -> None:
        """Count an answer to a task or an evaluation.

        Args:
            seq: number of its entry.
            message: a result, score or failure.
            task: the one that it answers; None if none was open.
        """
        if message.kind == "result":
            self.results += 1
            client = None if task is None or task.is_evaluation else task.client
            if client is None:
                client = natural(message.body.get("client"))
            self._open[seq] = len(self._seqs)
            self._note(seq, _RESULT, client, natural(message.body.get("model_version")))
        elif message.kind == "failed" and task is not None:
            reason = str(message.body.get("reason", ""))
            code = failure_code_of(str(message.body.get("code", "")), reason)
            where = str(message.body.get("where", ""))
            what: Subject = "evaluation" if task.is_evaluation else "task"
            self._failed(LastFailure(what, task.client, code, reason, where))

    def committed(self, body: Mapping[str, Any]) -> None:
        """Count a version, by the body of the aggregator's message."""
        version, position = natural(body.get("version")), natural(body.get("position"))
        results = natural(body.get("results"))
        if position is None:
            return
        if version is not None:
            self._positions.append(position)
            self._versions.append(version)
        if results is None:
            return
        self.used += results
        cohort, late = natural(body.get("cohort")), natural(body.get("late"))
        if cohort is not None:
            self.cohorts.add(results, late or 0, cohort)
        # Results that came while the version was being committed are for the next one.
        handled = itertools.takewhile(position.__ge__, self._open)
        for seq in list(itertools.islice(handled, results)):
            row = self._open.pop(seq)
            self._bits[row] |= _USED
            if version is not None and self._bases[row] >= 0:
                stale = version - 1 - self._bases[row]
                self._bases[row] = min(max(0, stale), _LARGEST)
            self._count_use(row, 1)

    def rejection(self, refusal: Refusal) -> None:
        """Count the rejection of a message or a post."""
        of, code = refusal.of, refusal.known_code
        if of is None:
            self.unaccepted += 1
            return
        row = self._row_of(of)
        if row is None:
            return
        bits = self._bits[row]
        client = self._clients[row] if self._clients[row] >= 0 else None
        if bits & _WHAT == _RESULT:
            self.rejected[code] += 1
            self._open.pop(of, None)
            if bits & _USED:  # deferred during the commit of a version, then rejected
                self._count_use(row, -1)
            self._bits[row] = _RESULT | _REJECTED
            self._blame(LastFailure("result", client, code, refusal.reason))
        else:
            what: Subject = "evaluation" if bits == _EVALUATION else "task"
            self._failed(LastFailure(what, client, code, refusal.reason))

    def rejected_score(self, refusal: Refusal) -> None:
        """Count an evaluation whose score was invalid."""
        self._failed(LastFailure("evaluation", None, refusal.known_code, refusal.reason))

    def extended(self) -> None:
        """Forget the open results: versions after the run's end do not include them."""
        self._open.clear()

    # ----

    def _count_use(self, row: int, number: int) -> None:
        """Count a result as used, or with -1 as not used."""
        record = self.clients.get(self._clients[row])
        if record is not None:
            record.good += number
        stale = self._bases[row]
        if stale >= 0:
            self.staleness[stale] += number
            if not self.staleness[stale]:
                del self.staleness[stale]

    def _failed(self, failure: LastFailure) -> None:
        if failure.what == "evaluation":
            self.failed_evaluations += 1
            self.last = failure
        else:
            self.failed[failure.code] += 1
            self._blame(failure)

    def _blame(self, failure: LastFailure) -> None:
        if failure.code not in (*_STALE, Code.RUN_OVER):  # these results only came late
            self.last = failure
        record = None if failure.client is None else self.clients.get(failure.client)
        if record is not None:
            record.code, record.reason = failure.code, failure.reason

    def _note(self, seq: int, bits: int, client: int | None, base: int | None = None) -> None:
        self._seqs.append(seq)
        self._bits.append(bits)
        self._clients.append(-1 if client is None or client > _LARGEST else client)
        self._bases.append(-1 if base is None or base > _LARGEST else base)

    def _row_of(self, seq: int) -> int | None:
        """Return the row of an entry, or None."""
        row = bisect.bisect_left(self._seqs, seq)
        return row if row < len(self._seqs) and self._seqs[row] == seq else None
