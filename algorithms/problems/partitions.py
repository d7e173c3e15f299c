"""How examples are dealt to clients.

Every partition gives an example to one client at most (all of them are dealt unless it says
otherwise), leaves no client empty, and is a function of its arguments alone: the same
generator state deals the same hands.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmq.algorithms.errors import ProblemError

Indices = NDArray[np.int64]


class Partition(ABC):
    """One way of dealing examples to clients; call it to deal."""

    needs_writers: ClassVar[bool] = False
    """Whether it needs to know who wrote each example."""

    def __call__(
        self,
        labels: NDArray[np.int64],
        groups: NDArray[np.int64] | None,
        clients: int,
        rng: np.random.Generator,
    ) -> list[Indices]:
        """Return the sorted indices of each client's examples.

        Args:
            labels: int64 [n], the class of each example.
            groups: int64 [n], the writer of each example, or None where nobody knows.
            clients: how many clients to deal to, K.
            rng: the source of all chance.

        Raises:
            ProblemError: these examples cannot be dealt to so many clients in this way.
        """
        if clients < 1:
            raise ProblemError(f"expected at least 1 client, got {clients}")
        if clients > len(labels):
            raise ProblemError(
                f"{clients} clients cannot share {len(labels)} examples: lower clients"
            )
        values = groups if self.needs_writers else labels
        if values is None:
            raise ProblemError(
                "this partition needs to know who wrote each example, and these data do not say; "
                "data set 'mnist' does if the data folder holds mnist-writers.npz or "
                "QMNIST/raw/qmnist-train-labels-idx2-int.gz"
            )
        return [np.sort(part) for part in self._deal(values, clients, rng)]

    @abstractmethod
    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Deal by the label of each example, or by its writer where ``needs_writers``."""


@dataclass(frozen=True)
class Iid(Partition):
    """Shuffle, then cut into K parts whose sizes differ by at most one."""

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        return np.array_split(rng.permutation(len(values)), clients)


@dataclass(frozen=True)
class Shards(Partition):
    """Sort by label, cut into K * per_client shards, give each client per_client of them.

    The pathological non-IID partition of McMahan et al., AISTATS 2017, section 3: on MNIST
    with two shards most clients see two digits.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        _require_int("per_client", self.per_client)

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        count = clients * self.per_client
        if count > len(values):
            raise ProblemError(
                f"{clients} clients with {self.per_client} shards each need {count} examples, "
                f"got {len(values)}: lower clients or per_client"
            )
        shards = np.array_split(np.argsort(values, kind="stable"), count)
        hands = rng.permutation(count).reshape(clients, self.per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Split every class over the clients in proportions drawn from Dirichlet(alpha).

    A small alpha gives each client few classes and unequal sizes, a large one approaches
    IID. The procedure of Yurochkin et al., ICML 2019, section 4; Hsu et al. 2019 draw a
    class mix for each client instead, of equal size. The papers redraw until no client is
    too small, which need not end; here clients with fewer than min_size examples are
    given random ones of the client that has most.
    """

    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        _require_number("alpha", self.alpha, positive=True)
        _require_int("min_size", self.min_size)

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        if clients * self.min_size > len(values):
            raise ProblemError(
                f"{clients} clients with min_size={self.min_size} need "
                f"{clients * self.min_size} examples, got {len(values)}: lower one of them"
            )
        owner = np.empty(len(values), dtype=np.int64)
        for label in np.unique(values):
            members = rng.permutation(np.flatnonzero(values == label))
            shares = rng.dirichlet(np.full(clients, float(self.alpha)))
            sizes = _apportion(shares, len(members))
            owner[members] = np.repeat(np.arange(clients), sizes)
        parts = [rng.permutation(part) for part in _by_owner(owner, clients)]
        sizes = np.array([len(part) for part in parts])
        for poor in np.flatnonzero(sizes < self.min_size):
            while sizes[poor] < self.min_size:
                # The richest has more than min_size, since the average is at least that.
                rich = int(np.argmax(sizes))
                parts[poor] = np.append(parts[poor], parts[rich][-1])
                parts[rich] = parts[rich][:-1]
                sizes[poor] += 1
                sizes[rich] -= 1
        return parts


@dataclass(frozen=True)
class Unbalanced(Partition):
    """Deal IID labels in sizes proportional to log-normal weights exp(sigma * N(0, 1)).

    With sigma = 0 all sizes are equal; with 1 the largest of 100 clients has about
    twelve times the median.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _require_number("sigma", self.sigma, positive=False)

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        exponents = self.sigma * rng.standard_normal(clients)
        weights = np.exp(exponents - exponents.max())  # scaled, so that none overflows
        sizes = 1 + _apportion(weights / weights.sum(), len(values) - clients)
        return np.split(rng.permutation(len(values)), np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class ByWriter(Partition):
    """Deal whole writers, the natural partition of handwriting, in sizes as equal as may be.

    The writer with most examples goes first, to the client that has fewest so far (LPT
    scheduling, Graham 1969); the order of equal writers is random.
    """

    needs_writers: ClassVar[bool] = True

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        writers, of_writer = np.unique(values, return_inverse=True)
        if clients > len(writers):
            raise ProblemError(
                f"{clients} clients cannot share {len(writers)} writers, who are not divided: "
                "lower clients or choose another partition"
            )
        counts = np.bincount(of_writer)
        shuffled = rng.permutation(len(writers))
        sizes = np.zeros(clients, dtype=np.int64)
        owner = np.empty(len(writers), dtype=np.int64)
        for writer in shuffled[np.argsort(-counts[shuffled], kind="stable")]:
            client = int(np.argmin(sizes))
            owner[writer] = client
            sizes[client] += counts[writer]
        # Deal the hands out at random: otherwise client 0 always has the most productive writer.
        of_example = rng.permutation(clients)[owner][of_writer]
        return _by_owner(of_example, clients)


@dataclass(frozen=True)
class Classes(Partition):
    """Give each client examples of so many classes and no others.

    The classes are shared out as evenly as may be; a client has equally many examples of each
    of its own. ``least`` and ``most``: a client gets so many examples in all, drawn uniformly
    between the two; without them, a class is cut into equal parts for those who have it. The
    split of FedRep (Collins et al., ICML 2021, section 5) and of pFedHN, which deal shards of
    classes unevenly.
    """

    per_client: int = 2
    least: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        _require_int("per_client", self.per_client)
        if (self.least is None) != (self.most is None):
            raise ProblemError("least and most must be given together")
        if self.least is not None and self.most is not None:
            _require_int("least", self.least)
            _require_int("most", self.most)
            if not self.per_client <= self.least <= self.most:
                raise ProblemError(
                    f"least must be from per_client, {self.per_client}, to most, {self.most}, "
                    f"got {self.least}"
                )

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if self.per_client > len(classes):
            raise ProblemError(f"per_client must be at most {len(classes)}, the number of classes")
        holders: dict[int, list[int]] = {int(each): [] for each in classes}
        for client in rng.permutation(clients):
            # Those that fewest have so far; chance decides between equals.
            order = sorted(holders, key=lambda each: (len(holders[each]), rng.random()))
            for each in order[: self.per_client]:
                holders[each].append(int(client))
        totals = None
        if self.least is not None and self.most is not None:
            totals = rng.integers(self.least, self.most + 1, clients)
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for each, owners in holders.items():
            members = rng.permutation(np.flatnonzero(values == each))
            if totals is None:
                shares = np.array_split(members, max(1, len(owners)))
            else:
                # Of a total that does not divide evenly, the first classes have one more.
                more = [len(parts[owner]) < totals[owner] % self.per_client for owner in owners]
                sizes = totals[owners] // self.per_client + np.array(more, np.int64)
                if sizes.sum() > len(members):
                    raise ProblemError(
                        f"{len(owners)} clients want {sizes.sum()} examples of class {each}, "
                        f"there are {len(members)}: lower clients or most"
                    )
                shares = np.split(members, np.cumsum(sizes))
            for owner, share in zip(owners, shares, strict=False):
                parts[owner].append(share)
        hands = [np.concatenate(part) for part in parts]
        if not all(map(len, hands)):
            raise ProblemError(f"{clients} clients are too many for {len(values)} examples")
        return hands


@dataclass(frozen=True)
class Targets(Partition):
    """Deal IID, then take nearly all examples of a few labels from each client.

    labels: target labels of a client, drawn for each; keep: examples of each that stay.
    Jeong et al. 2018, section 4: three target labels, 5 of 200 samples stay.
    """

    labels: int = 3
    keep: int = 5

    def __post_init__(self) -> None:
        _require_int("labels", self.labels)
        _require_int("keep", self.keep)

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if self.labels >= len(classes):
            raise ProblemError(f"labels must be below {len(classes)}, the number of classes")
        hands = []
        for hand in np.array_split(rng.permutation(len(values)), clients):
            left = np.ones(len(hand), dtype=bool)
            for label in rng.choice(classes, self.labels, replace=False):
                left[np.flatnonzero(values[hand] == label)[self.keep :]] = False
            hands.append(hand[left])
        return hands


@dataclass(frozen=True)
class Fallah(Partition):
    """The split of Fallah et al., NeurIPS 2020, section 5, for ten classes.

    Half of the clients have a examples of each of the first five classes; each of the other
    half has a/2 of one of the first five, and 2a of one of the others. The paper: a = 196 on
    MNIST and 68 on CIFAR-10, 50 clients. The classes of the second half are taken in turn.
    """

    a: int = 196

    def __post_init__(self) -> None:
        _require_int("a", self.a)

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if len(classes) != 10:
            raise ProblemError(f"this partition is for ten classes, these data have {len(classes)}")
        pools = [rng.permutation(np.flatnonzero(values == each)) for each in classes]

        def take(index: int, count: int) -> Indices:
            if len(pools[index]) < count:
                raise ProblemError(
                    f"class {classes[index]} has too few examples for {clients} clients: lower a, "
                    f"{self.a}, or clients"
                )
            taken, pools[index] = pools[index][:count], pools[index][count:]
            return taken

        hands: list[Indices] = [np.empty(0, np.int64)] * clients
        for turn, client in enumerate(rng.permutation(clients)):
            if turn < clients // 2:
                hand = [take(label, self.a) for label in range(5)]
            else:
                label = turn % 5
                hand = [take(label, max(1, self.a // 2)), take(5 + label, 2 * self.a)]
            hands[client] = np.concatenate(hand)
        return hands


PARTITIONS: Mapping[str, Callable[..., Partition]] = {
    "iid": Iid,
    "shards": Shards,
    "dirichlet": Dirichlet,
    "unbalanced": Unbalanced,
    "by_writer": ByWriter,
    "classes": Classes,
    "targets": Targets,
    "fallah": Fallah,
}
"""Factories by name, for spec strings such as ``dirichlet(0.5)``."""


def _by_owner(owner: Indices, clients: int) -> list[Indices]:
    """Return the sorted indices of what each client has, in one pass for all of them."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Return whole sizes in these proportions, which sum to total exactly."""
    edges = np.rint(np.cumsum(shares) * total).astype(np.int64)
    edges[-1] = total  # the shares sum to 1 only up to rounding
    return np.diff(np.minimum(edges, total), prepend=0)


def _require_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProblemError(f"{name} must be a whole number of at least 1, got {value!r}")


def _require_number(name: str, value: object, *, positive: bool) -> None:
    bound = "above 0" if positive else "of at least 0"
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (positive and value == 0):  # type: ignore[operator] # good
        raise ProblemError(f"{name} must be a number {bound}, got {value!r}")
