"""A simulated run with keys: revoked, replaced and enrolled while everything else fails, too."""

from dataclasses import dataclass

from fedmq.broker.access.rights import Origin, Rights
from fedmq.broker.errors import AccessError, Rejected
from fedmq.broker.virtual.disk import Crash
from fedmq.broker.wire.addresses import AGGREGATOR, EVALUATOR, OBSERVER, WORKER
from fedmq.nodes.simulation.virtual_run import Simulation
from tests.sim.access import VirtualAccessFile, key_of
from tests.sim.strangers import MALLORY, Guest

REVOKED, SPARE = "worker-1", "worker-2"
USES = 2
"""Keys that may be handed in with the guests' invite."""
_FOR_EVER = 1e15


@dataclass(frozen=True)
class KeyPlan:
    """What happens to the keys of a history; times are in seconds from its start.

    revoke_s: when the key of a worker is revoked; a spare worker with an invite then takes over its
        clients. None for never.
    replace: node whose key is replaced by a new one, and when; None for none.
    guests: number of holders of one invite, which lets `USES` keys in.
    edits: times at which a key of an observer is authorised.
    """

    revoke_s: float | None = None
    replace: tuple[str, float] | None = None
    guests: int = 0
    edits: tuple[float, ...] = ()


class KeyedSimulation(Simulation):
    """A `Simulation` in which each node has a key.

    Args:
        keys: what happens to the keys.
        file: has the access file, and takes the place of files.
        setup, workers, ...: see `Simulation`.

    Attributes:
        operator: the person who edits the access file.
        guests: holders of invites.
        uses: number of keys that each invite lets in, by its public key.
        revoked_at: when a key was revoked or replaced, by key, in true time.
    """

    def __init__(
        self, keys, file, setup, workers, folder, seed, chances, settings, ledger_settings, on_start
    ):
        self._keys, self.guests, self.uses, self.revoked_at = keys, [], {}, {}
        self.file, self.operator = file, VirtualAccessFile(file)
        total = setup.problem.clients
        for index in range(workers):
            ranges = ((index * total // workers, (index + 1) * total // workers - 1),)
            self._authorize(f"worker-{index}", WORKER, ranges)
        self._authorize(AGGREGATOR, AGGREGATOR)
        self._authorize(EVALUATOR, EVALUATOR)
        self._authorize(MALLORY, WORKER, ())
        names = (*(f"worker-{index}" for index in range(workers)), AGGREGATOR, EVALUATOR)
        super().__init__(
            setup,
            workers,
            folder,
            seed,
            chances,
            settings,
            ledger_settings,
            on_start,
            VirtualAccessFile(self.file),
            {name: Origin(key_of(name), "10.0.0.1") for name in names},
        )
        self.file.broker = self.broker
        if keys.revoke_s is not None:
            self.network.after(keys.revoke_s, self._revoke)
        if keys.replace is not None:
            self.network.after(keys.replace[1], lambda: self._replace(keys.replace[0]))
        for number, at in enumerate(keys.edits):
            name = f"observer-{number}"
            self.network.after(
                at,
                lambda name=name: self._edit(lambda: self._authorize(name, OBSERVER), lambda: None),
            )
        invite = self._invite("guests", OBSERVER, USES)
        for number in range(keys.guests):
            name = f"guest-{number}"
            self.guests.append(Guest(self.network, name, invite, key_of(name)))

    def _calm_down(self):
        super()._calm_down()
        self.file.broker = None

    def _started(self, node, again):
        super()._started(node, again)
        exited = node.port.on_exit

        def on_exit():
            exited()
            # A person starts a node again whose key has rights: the broker had not noticed yet, or
            # another session had its name or its clients.
            if isinstance(node.ended, Rejected):
                self._later(2.0, start_again)

        def start_again():
            if self._has_rights(node.hello.node):
                again()
            else:
                self.network.after(1.0, start_again)

        node.port.on_exit = on_exit

    # ---- the person who edits the file

    def _authorize(self, name, role, clients=None):
        self.operator.authorize(Rights(name=name, key=key_of(name), roles=(role,), clients=clients))

    def _invite(self, name, role, uses, clients=None):
        self.file.broker, broker = None, self.file.broker
        rights = Rights(name=name, roles=(role,), clients=clients)
        invite = self.operator.invite(rights, uses, _FOR_EVER).public
        self.file.broker, self.uses[invite] = broker, uses
        return invite

    def _has_rights(self, name):
        return self.origins[name].key in self.operator.load().keys

    def _edit(self, change, then):
        """Change the file, again and again until it is changed; then go on."""
        try:
            change()
        except (AccessError, Crash):
            self.network.after(1.0, lambda: self._edit(change, then))
        else:
            then()

    def _revoke(self):
        """Revoke a worker's key, and invite the worker that takes over its clients."""
        key = self.origins[REVOKED].key
        before = next(each for each in reversed(self.sessions) if each.hello.node == REVOKED)

        def revoke():
            if key in self.operator.load().keys:
                self.operator.revoke(key)

        def go_on():
            self.revoked_at.setdefault(key, self.network.now)
            self._count("key revoked")
            invite = self._invite("spare", WORKER, 1, before.hello.clients)
            self.origins[SPARE] = Origin(key_of(SPARE), "10.0.0.2")
            guest = Guest(self.network, "guest-spare", invite, key_of(SPARE), start)
            self.guests.append(guest)

        def start():
            self.start_worker(SPARE, before.hello.clients, before.store)

        self._edit(revoke, go_on)

    def _replace(self, name):
        """Replace a node's key; a session with the old one ends, and the next one has the new."""
        old, new = self.origins[name].key, key_of(f"{name} again")

        def replace():
            if old in self.operator.load().keys:
                self.operator.replace(name, new)

        def go_on():
            if new in self.operator.load().keys:  # else the old one has been revoked
                self.revoked_at.setdefault(old, self.network.now)
                self._count("key replaced")
                self.origins[name] = Origin(new, "10.0.0.3")

        self._edit(replace, go_on)
