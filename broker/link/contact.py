"""The states of a link, and when to report that a node is not connected to its run.

Part of the Link core and pure like it: the time is an argument.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

from fedmq.broker.link.events import BackInTouch, OutOfTouch
from fedmq.broker.wire.schema import Serving, StorageFull, Wait

_FIRST_REPORTS_S = (3.0, 10.0, 30.0)
_EACH_S = 60.0
"""Time between later reports."""
_ANSWER_LASTS_S = 5.0
"""Silence after which a broker that has answered is gone: the node sends Hello each second."""

_STOPPED_S = 5.0
"""A wake later than this means that this node was suspended; that time does not count."""


class LinkState(enum.IntEnum):
    """The state of a link."""

    CONNECTING = 1
    """Not admitted yet; sends Hello each second."""
    CONNECTED = 2
    """Sends what is posted, and heartbeats."""
    RECONNECTING = 3
    """Was admitted, and lost its session or the broker; keeps what is posted, sends Hello."""
    BLOCKED = 4
    """The broker cannot write its ledger; keeps what is posted, and sends Hello a little later."""
    ENDED = 5
    """Handles no event any more."""


class LinkEvent(enum.IntEnum):
    """What happens to a link."""

    WELCOME = 1
    """The broker admits the node, or knows its session."""
    UNKNOWN_SESSION = 2
    """The broker does not know the session: it has started again, or the session has left."""
    SILENCE = 3
    """Nothing has arrived for a lease."""
    STORAGE_FULL = 4
    """The broker cannot write its ledger."""
    REJECT = 5
    """The broker does not admit the node."""
    RUN_END = 6
    """The run has ended."""
    GIVE_UP = 7
    """The node has been out of touch for as long as it may be."""
    OTHER_RUN = 8
    """The broker welcomes an admitted node to another run of the same id."""


_END = dict.fromkeys((LinkEvent.REJECT, LinkEvent.RUN_END, LinkEvent.GIVE_UP), LinkState.ENDED)
_ADMITTED = {
    LinkEvent.WELCOME: LinkState.CONNECTED,
    LinkEvent.STORAGE_FULL: LinkState.BLOCKED,
    LinkEvent.OTHER_RUN: LinkState.ENDED,
    **_END,
}
LINK: Mapping[LinkState, Mapping[LinkEvent, LinkState]] = {
    LinkState.CONNECTING: {
        LinkEvent.WELCOME: LinkState.CONNECTED,
        LinkEvent.STORAGE_FULL: LinkState.BLOCKED,
        **_END,
    },
    LinkState.CONNECTED: {
        LinkEvent.UNKNOWN_SESSION: LinkState.RECONNECTING,
        LinkEvent.SILENCE: LinkState.RECONNECTING,
        **_ADMITTED,
    },
    LinkState.RECONNECTING: _ADMITTED,
    LinkState.BLOCKED: _ADMITTED,
    LinkState.ENDED: {},
}
"""The next state after an event; one that is not listed for a state has no effect in it."""


class _Mode(enum.Enum):
    SILENT = enum.auto()
    """The broker does not answer."""
    ANSWERED = enum.auto()
    """The broker answers, but the node cannot join a run now."""
    CONNECTED = enum.auto()


class Contact:
    """A node's contact with its broker: connected, answered without admission, or silent.

    The last two are reported after 3, 10 and 30 s, and then each minute.

    Attributes:
        give_up_s: seconds without a connection after which the node ends; infinite by default.
    """

    def __init__(self) -> None:
        self.give_up_s = math.inf
        self._mode = _Mode.SILENT
        """What is reported: unlike the link's state, it depends on the answers to each Hello."""
        self._began = math.inf
        """Start of the present mode; while connected, arrival of the last frame."""
        self._reports = 0
        """Number of reports in the present mode."""
        self._report_s = _FIRST_REPORTS_S[0]
        """Seconds in the present mode after which the next report is due."""
        self._away_since = math.inf
        """Time of the last frame while connected; the node has been out of touch since then."""
        self._waited_since = math.inf
        """As `_away_since`, but without the time in which this node was suspended."""
        self._last_answer = -math.inf
        """Time of the last answer that did not admit the node."""
        self._answer: Wait | StorageFull | None = None
        """That answer, in the mode ANSWERED."""
        self._reported = False
        """Whether a report has been made since the node was last connected."""
        self._admitted = False
        """Whether the node has been connected."""

    @property
    def due(self) -> float:
        """Time at which `wake` or `given_up` has something to report, unless a frame arrives."""
        due = min(self._began + self._report_s, self._waited_since + self.give_up_s)
        if self._answer is not None:
            return min(due, self._last_answer + _ANSWER_LASTS_S)
        return due

    def begin(self, now: float) -> None:
        """Begin to look for the broker."""
        if self._began == math.inf:
            self._began = self._away_since = self._waited_since = now

    def connected(self, now: float) -> BackInTouch | None:
        """Note a frame on the connection; return a report if the node was out of touch."""
        away_s = now - self._away_since
        self._began = self._away_since = self._waited_since = now
        if self._mode is _Mode.CONNECTED and not self._reported:
            return None  # the usual case
        back = BackInTouch(away_s) if self._reported and self._admitted else None
        self._mode, self._answer = _Mode.CONNECTED, None
        self._reported, self._admitted = False, True
        self._count_reports(0)
        return back

    def answered(self, answer: Wait | StorageFull, now: float) -> None:
        """Note an answer of the broker that does not admit the node now."""
        if self._mode is not _Mode.ANSWERED:
            self._mode, self._began = _Mode.ANSWERED, now
            self._count_reports(0)
        self._answer, self._last_answer = answer, now

    def wake(self, now: float) -> OutOfTouch | None:
        """Return the report that is due, or None."""
        if self._mode is _Mode.ANSWERED and now >= self._last_answer + _ANSWER_LASTS_S:
            self._mode, self._began, self._answer = _Mode.SILENT, self._last_answer, None
            self._count_reports(0)
        if now < self._began + self._report_s:
            return None
        while now >= self._began + self._report_s:
            self._count_reports(self._reports + 1)
        self._reported = True
        return OutOfTouch(now - self._began, self._answer, self._admitted)

    def validate_state(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        if (self._mode is _Mode.ANSWERED) != (self._answer is not None):
            raise AssertionError(f"the contact is {self._mode.name}, its answer {self._answer}")
        if self._report_s != _report_s(self._reports):
            raise AssertionError(f"report {self._reports} is due after {self._report_s} s")
        if self._waited_since < self._away_since:
            raise AssertionError("the node has waited for longer than it was out of touch")

    def _count_reports(self, number: int) -> None:
        self._reports, self._report_s = number, _report_s(number)

    def given_up(self, now: float) -> OutOfTouch | None:
        """Return what the node has waited for, if the limit is reached; call it before `wake`."""
        late = now - self.due
        if late > _STOPPED_S:
            self._waited_since += late
        if now < self._waited_since + self.give_up_s:
            return None
        return OutOfTouch(now - self._away_since, self._answer, self._admitted)


def _report_s(number: int) -> float:
    """Return the seconds after which a report is due; reports are numbered from 0."""
    if number < len(_FIRST_REPORTS_S):
        return _FIRST_REPORTS_S[number]
    return _FIRST_REPORTS_S[-1] + _EACH_S * (number + 1 - len(_FIRST_REPORTS_S))


def sentence(report: OutOfTouch, endpoint: str, run: str) -> str:
    """Return a report as a sentence for people.

    Args:
        report: the report.
        endpoint: of the broker.
        run: id of the run that the node wants to join; empty for any.
    """
    for_s = f"for {report.seconds:.0f} s"
    match report.answer:
        case None if report.admitted:
            return f"no answer from the broker at {endpoint} {for_s}"
        case None:
            return f"waiting for the broker at {endpoint} {for_s}"
        case StorageFull(reason=reason):
            return f"the broker at {endpoint} has not been able to write {for_s}: {reason}"
        case Wait(crowded=True, reason=reason):
            return (
                f"the broker at {endpoint} lets no more nodes wait {for_s}, trying again: {reason}"
            )
        case Wait(serving=serving):
            wanted = f"run {run}" if run else "a run to start"
            return f"the broker at {endpoint} {_served(serving)}; waiting for {wanted} {for_s}"


def _served(serving: object) -> str:
    if not isinstance(serving, Serving):  # there are no runs, or the broker is older than 1.3
        return "has no run for this node yet"
    ended = f"; {_runs(serving.ended, serving.others_ended)} ended" if serving.ended else ""
    if not serving.runs:
        return f"serves no run now{ended}"
    return f"serves {_runs(serving.runs, serving.others)}{ended}"


def _runs(names: tuple[str, ...], others: int) -> str:
    more = f" and {others} others" if others else ""
    return f"run{'s' if len(names) > 1 else ''} {', '.join(names)}{more}"
