"""A broker and nodes in virtual time, for the tests of this folder."""

import random

from fedmq.broker.link.node_link import NodeLink
from fedmq.broker.settings import BrokerSettings, LedgerSettings
from fedmq.broker.virtual.broker import VirtualBroker
from fedmq.broker.virtual.machine import Machine
from fedmq.broker.virtual.network import VirtualNetwork
from fedmq.broker.virtual.node import VirtualPort

SETTINGS = BrokerSettings(lease_s=10.0, beat_s=1.0)


class World:
    """A broker, and the sessions of nodes that tests start."""

    def __init__(self, folder, seed=0, faults=None):
        self.network = VirtualNetwork(random.Random(seed), faults)  # noqa: S311 - a test's dice
        self.broker = VirtualBroker(
            self.network, folder, SETTINGS, LedgerSettings(share_files=False)
        )
        self.ports = []

    def port(self, name, machine=None, **more):
        port = VirtualPort(self.network, machine or Machine(self.network), name, **more)
        self.ports.append(port)
        return port

    def link(self, hello):
        """Return a link that the test itself uses, once it is admitted, and its port."""
        port = self.port(hello.node)
        link = NodeLink(port, hello)
        link.welcome()
        return link, port

    def start(self, hello, program, **more):
        """Start a program in a greenlet; it gets its admitted link. Return its port."""
        port = self.port(hello.node, **more)

        def run():
            link = NodeLink(port, hello)
            try:
                link.welcome()
                program(link)
            finally:
                link.close()

        port.run(run)
        return port

    def run(self, seconds):
        """Let time pass."""
        over = []
        self.network.after(seconds, lambda: over.append(True))
        while not over:
            assert self.network.step()

    def until(self, condition, seconds=60.0):
        limit = self.network.now + seconds
        while not condition():
            assert self.network.now < limit, "it does not happen"
            assert self.network.step(), "nothing happens any more"

    def close(self):
        for port in self.ports:
            port.kill()
        self.broker.crash()
