"""A map of clients by ranges, compared with one that has each client."""

import random

import pytest

from fedmq.broker.wire.client_map import ClientMap


@pytest.mark.parametrize("seed", range(5))
def test_a_map_by_ranges_is_a_map_by_clients(seed):
    dice = random.Random(seed)  # noqa: S311 - a test's own dice
    clients, plain = ClientMap(), {}
    for _ in range(300):
        low = dice.randrange(30)
        high, node = min(29, low + dice.randrange(8)), f"w{dice.randrange(3)}"
        match dice.randrange(4):
            case 0:
                clients.clear(low, high)
                plain = {k: n for k, n in plain.items() if not low <= k <= high}
            case 1:
                removed = clients.remove(node)
                gone = [k for a, b in removed for k in range(a, b + 1)]
                assert gone == sorted(k for k, n in plain.items() if n == node)
                plain = {k: n for k, n in plain.items() if n != node}
            case _:
                clients.assign(low, high, node)
                plain |= dict.fromkeys(range(low, high + 1), node)
        assert {k: n for a, b, n in clients for k in range(a, b + 1)} == plain
        assert [clients.get(k) for k in range(-1, 31)] == [plain.get(k) for k in range(-1, 31)]
        assert len(clients) == len(plain)
        missing = [k for a, b in clients.gaps(30) for k in range(a, b + 1)]
        assert missing == [k for k in range(30) if k not in plain]
        same = {plain.get(k) for k in range(low, high + 1)} == {node}
        assert clients.hosts_all(node, low, high) == same
        again = ClientMap()
        for k in dice.sample(sorted(plain), len(plain)):
            again.assign(k, k, plain[k])
        assert again == clients
