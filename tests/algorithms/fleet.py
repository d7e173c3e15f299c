"""A whole run in memory: the Aggregator and Worker cores, and nothing between them."""

from fedmq.algorithms.toolkit.returned import result_of
from fedmq.broker.link.events import Delivery, PostMessage
from fedmq.broker.wire.encoding import decode_message, encode_message
from fedmq.broker.wire.schema import Blob, Message
from fedmq.nodes.aggregator.core import Aggregator
from fedmq.nodes.aggregator.driver import AggregatorDriver
from fedmq.nodes.messages.actions import AckUpTo, Handled, Start
from fedmq.nodes.run.config import build
from fedmq.nodes.run.setup import set_up
from fedmq.nodes.worker.client_state import ClientStateStore
from fedmq.nodes.worker.core import (
    Evaluate,
    Evaluated,
    Failed,
    SaveClientState,
    Saved,
    Train,
    Trained,
    Worker,
)


def make_setup(schedule, problem="Tiny", clients=2, codec="raw", algorithm=None, **run):
    """Return what a configuration with a user's own problem is set up to."""
    return set_up(
        build(
            {
                "run": {"versions": 3, "evaluate_every": 0, **run},
                "problem": {"name": f"tests.algorithms.tiny:{problem}", "clients": clients},
                "algorithm": {"name": "fedavg", "epochs": 1, **(algorithm or {})},
                "schedule": schedule,
                "codec": {"up": codec},
            }
        )
    )


def posted(worker, actions, save):
    """Carry out what follows a training, as a worker's program does; return the post."""
    (action,) = actions
    if isinstance(action, SaveClientState):
        (action,) = worker.handle(Saved(save(action.client, action.kept)))
    assert isinstance(action, PostMessage)
    return action


class Fleet:
    """One aggregator, and a worker for each client: ``w0`` hosts client 0, and so on.

    The fleet is the port of the aggregator's driver.

    Attributes:
        actions: everything that the aggregator wanted done.
        tasks: (message, data) of the tasks that are out, oldest first.
        records: messages that are kept, not delivered.
        ticks: tokens of the timers that it asked for.
        commits: work beside the inbox that has not ended.
        inbox: what it was given, in order.
        checkpoint: its newest checkpoint, as it is handed to its next session, or None.
        settled: every message up to this number is not given to its next session, but for
            those of the numbers ``untold``.
        done_with, codes: reason and code (or "") by the number of the message that was dealt with.
        finished: why the run ended, or None.
        pace: seconds from one message in its inbox to the next.
    """

    def __init__(self, setup, *, join=True, computed=None, workers=True):
        self.setup = setup
        self.pace = 1.0
        self.core = Aggregator(setup, "run", "aggregator", computed)
        self.driver = AggregatorDriver(self.core, self)
        names = {f"w{k}": k for k in range(setup.problem.clients if workers else 0)}
        self.locals = {name: ClientStateStore() for name in names}
        self.workers = {
            name: Worker(setup, "run", name, [(k, k)], self.locals[name])
            for name, k in names.items()
        }
        self.evaluator = Worker(setup, "run", "evaluator")
        self.actions, self.inbox, self.commits = [], [], []
        self.tasks, self.evaluations, self.records, self.ticks = [], [], [], []
        self.checkpoint, self.settled, self.untold = None, 0, ()
        self.done_with, self.codes, self.finished, self.seq, self.given = {}, {}, None, 0, 0
        self.act(self.core.handle(Start()))
        if join:
            for k in range(setup.problem.clients):
                self.join(k)

    # ---- what the aggregator hears

    def hear(self, message, data=()):
        """Put a message into the aggregator's inbox; return its number."""
        self.seq += 1
        delivery = Delivery(
            self.seq, self.seq * self.pace, over_the_wire(message), dict(enumerate(data))
        )
        self.inbox.append(delivery)
        self.act(self.driver.handle(delivery))
        return delivery.seq

    def reason(self, message, data=()):
        """Return why a message was refused, or ""; None if nothing has been said of it yet."""
        return self.done_with.get(self.hear(message, data))

    def say(self, kind, body, sender="broker", re=None):
        """Put a message without data into the aggregator's inbox; return its number."""
        name = f"{sender}/{self.seq}"
        return self.hear(
            Message(kind=kind, id=name, run="run", sender=sender, to="aggregator", re=re, body=body)
        )

    def join(self, k):
        """Worker k joins, with client k."""
        return self.say("joined", {"node": f"w{k}", "role": "worker", "clients": [[k, k]]})

    def join_evaluator(self):
        """The evaluator joins."""
        return self.say("joined", {"node": "evaluator", "role": "evaluator", "clients": []})

    def leave(self, node):
        """A node's lease lapses."""
        return self.say("left", {"node": node, "reason": "lease"})

    # ---- what it says

    def act(self, actions):
        """Note what the aggregator has dealt with, and carry out its actions."""
        self.actions += actions
        for action in actions:
            if isinstance(action, AckUpTo):
                self.settled, self.untold = self.seq, action.but
            elif isinstance(action, Handled):
                assert action.seq not in self.done_with, "a message was dealt with twice"
                self.done_with[action.seq] = action.refused
                self.codes[action.seq] = action.code
        self.driver.carry_out(actions)

    def done(self, seqs, refused=None, codes=None):
        """Do nothing: `act` has noted it."""

    def begin_commit(self, commit):
        """Leave the work for later."""
        self.commits.append(commit)

    def log_failure(self, reason, error):
        """Do nothing: `over` has the reason."""

    def save_model(self, core):
        """Do nothing."""

    def over(self, reason):
        """End the run."""
        assert self.finished is None, "the run ended twice"
        self.finished = reason

    def post(self, message, data, consumes):
        """Take what the aggregator posted, as the broker does."""
        match message.to:
            case "checkpoint":
                self.checkpoint = Delivery(0, 0.0, over_the_wire(message), dict(enumerate(data)))
                self.records.append(message)
            case "timer":
                self.ticks.append(message.body["token"])
            case "evaluator":
                self.evaluations.append((message, data))
            case _ if message.kind == "evaluate":
                self.evaluations.append((message, data))
            case "record":
                self.records.append(message)
            case _:
                self.tasks.append((message, data))

    # ---- what the others do

    def work(self, message, data):
        """Return (message, data) of what comes of a task, from whoever hosts its client."""
        worker = self.workers[f"w{message.body['client']}"]
        self.given += 1
        task = Delivery(self.given, 0.0, over_the_wire(message), dict(enumerate(data)))
        (train,) = worker.handle(task)
        assert isinstance(train, Train)
        at = train.at(self.setup, "cpu")
        sent = result_of(self.setup.algorithm.train(train.task, at), "train")
        post = posted(worker, worker.handle(Trained(*sent, 0.0)), self.keep)
        return post.message, post.data

    def keep(self, client, kept):
        """Save what a client keeps; return what stands."""
        return self.locals[f"w{client}"].put(client, kept)

    def score(self, message, data, *, fails=False):
        """Return what the evaluator says to an evaluation."""
        client = message.body.get("client")
        worker = self.evaluator if client is None else self.workers[f"w{client}"]
        (action,) = worker.handle(Delivery(0, 0.0, over_the_wire(message), dict(enumerate(data))))
        assert isinstance(action, Evaluate)
        metrics = action.metrics(self.setup, "cpu")
        (post,) = worker.handle(Failed("no memory") if fails else Evaluated(metrics))
        return post.message

    def run(self, rng=None, limit=1000):
        """Work on tasks, one after the other or in random order, until the run ends."""
        for _ in range(limit):
            while self.commits:
                self.say("tick", {"token": self.commits.pop(0).token})
            if self.finished is not None or not self.tasks:
                return self
            index = rng.randrange(len(self.tasks)) if rng else 0
            self.hear(*self.work(*self.tasks.pop(index)))
        raise AssertionError("the run does not end")

    @property
    def versions(self):
        """Return the records of the committed versions."""
        return [each.body for each in self.records if each.kind == "version"]

    @property
    def counts(self):
        """Return (used, stale, refused, dropped)."""
        counts = self.core._results.counts
        return counts.used, counts.stale, counts.refused, counts.dropped


def over_the_wire(message):
    """Return a message as it arrives."""
    return decode_message(encode_message(message))


def changed(message, **fields):
    """Return a message with some fields replaced, its body's keys among them."""
    body = {**message.body, **fields.pop("body", {})}
    names = ("kind", "id", "run", "sender", "to", "re", "blobs")
    kept = {name: getattr(message, name) for name in names}
    return Message(**{**kept, "body": body, **fields})


def with_data(message, data, **fields):
    """Return (message, data) of a message that carries other bytes."""
    blobs = tuple(Blob.of(each) for each in data)
    return changed(message, blobs=blobs, **fields), tuple(data)
