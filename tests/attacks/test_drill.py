"""A drill: many kinds of attacks on an honest run, each rejected with its type, in both columns.

``loopback``: no keys, so role, session, name and limits alone stand in the way. ``keys``: the
attacker holds a valid key with lesser rights (a worker of client 9, of this run alone). After each
attack, the honest run commits another version, and nothing of the attacker has reached a node.
"""

import pytest

from fedmq.broker.settings import BrokerSettings, Limits
from tests.attacks.acts import Stage
from tests.attacks.kinds import KINDS
from tests.attacks.peer import Peer
from tests.attacks.world import MALLORY, outcome, world_of

LIMITS = Limits(runs=3, nodes=40, clients=8, waiting=5)


@pytest.mark.parametrize("keys", [False, True], ids=["loopback", "keys"])
@pytest.mark.parametrize("kind", KINDS, ids=[ascii(each.name) for each in KINDS])
def test_each_kind_is_rejected_with_its_type(kind, keys, tmp_path):
    expected = kind.expected(keys)
    if expected is None:
        pytest.skip("there is no such attack without keys")
    with world_of(tmp_path, keys=keys, settings=BrokerSettings(limits=LIMITS)) as world:
        stage = Stage(world)
        heard = kind.attack(stage)
        world.advance(0.2)
        found = outcome(heard.drain() if isinstance(heard, Peer) else heard)
        assert found in (expected if isinstance(expected, tuple) else (expected,))
        stage.run.round()
        assert stage.run.senders() <= {*stage.run.peers, *([MALLORY] if kind.accepted else [])}
        assert len(world.messages(MALLORY)) == kind.accepted


def test_there_are_at_least_forty_kinds():
    assert len({each.name for each in KINDS}) == len(KINDS) >= 40
