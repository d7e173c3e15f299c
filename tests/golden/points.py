"""The problem of the golden traces. It must stay as it is: they are replayed for ever."""

import torch
import torch.nn.functional as F
from torch import nn

from fedmq.algorithms.problems.base import Examples, Problem


class Points(Problem):
    """Two classes of points in the plane; client k has 4 + 2k of them."""

    def __init__(self, clients=6, seed=0):
        self.clients, self.seed = clients, seed

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def client(self, index):
        return self._points(100 + index, 4 + 2 * index)

    def test(self):
        return self._points(99, 40)

    def loss(self, outputs, y):
        return F.cross_entropy(outputs, y)

    def metrics(self, outputs, y):
        accuracy = (outputs.argmax(dim=1) == y).float().mean().item()
        return {"loss": self.loss(outputs, y).item(), "accuracy": accuracy}

    def _points(self, seed, n):
        x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
        return Examples(x, (x[:, 0] + x[:, 1] > 0).long())
