"""Partitions of examples among clients.

A partition gives each example to at most one client (to exactly one unless stated; `Bootstrap` to
any number), gives every client some, and depends on its arguments alone: the same generator state
gives the same partition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.hyperparameters import check_hyperparameters

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Partition(ABC):
    """A partition; call it to assign examples to clients.

    Raises:
        AlgorithmError: at construction, for a parameter that is out of range.
    """

    needs_writers: ClassVar[bool] = False
    """Whether it needs the writer of each example."""
    with_replacement: ClassVar[bool] = False
    """Whether clients can share examples; there can then be more clients than examples."""

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def __call__(
        self,
        labels: NDArray[np.int64],
        groups: NDArray[np.int64] | None,
        clients: int,
        rng: np.random.Generator,
    ) -> Sequence[Indices]:
        """Return the sorted indices of each client's examples.

        Args:
            labels: int64 [n], the class of each example.
            groups: int64 [n], the writer of each example, or None if unknown.
            clients: number of clients, K.
            rng: source of all random draws.

        Raises:
            ProblemError: the examples cannot be assigned to this number of clients.
        """
        if clients < 1:
            raise ProblemError(f"expected at least 1 client, got {clients}")
        if not len(labels) or (clients > len(labels) and not self.with_replacement):
            raise ProblemError(
                f"expected at most {len(labels)} clients, one for each example, got {clients}: "
                "lower clients, or set partition to bootstrap(100), which draws with replacement"
            )
        values = groups if self.needs_writers else labels
        if values is None:
            raise ProblemError(
                "expected a data set with the writer of each example for this partition; data set "
                "'mnist' has them if the data folder holds mnist-writers.npz or "
                "QMNIST/raw/qmnist-train-labels-idx2-int.gz"
            )
        dealt = self._deal(values, clients, rng)
        return dealt if self.with_replacement else [np.sort(part) for part in dealt]

    @abstractmethod
    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> Sequence[Indices]:
        """Assign by the label of each example, or by its writer if ``needs_writers``."""


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

    per_client: Annotated[int, Field(ge=1)] = 2

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        count = clients * self.per_client
        if count > len(values):
            raise ProblemError(
                f"expected at least {count} examples for {clients} clients with {self.per_client} "
                f"shards each, got {len(values)}: lower clients or per_client"
            )
        shards = np.array_split(np.argsort(values, kind="stable"), count)
        chosen = rng.permutation(count).reshape(clients, self.per_client)
        return [np.concatenate([shards[shard] for shard in part]) for part in chosen]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Split every class over the clients in proportions drawn from Dirichlet(alpha).

    A small alpha gives each client few classes and unequal sizes, a large one approaches IID. The
    procedure of Yurochkin et al., ICML 2019, section 4; Hsu et al. 2019 instead draw a class mix of
    equal size for each client. The papers redraw until no client is too small, which need not end;
    here a client with fewer than min_size examples gets random ones of the largest client.
    """

    alpha: Annotated[float, Field(gt=0)]
    min_size: Annotated[int, Field(ge=1)] = 1

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        if clients * self.min_size > len(values):
            raise ProblemError(
                f"expected at least {clients * self.min_size} examples for {clients} clients with "
                f"min_size={self.min_size}, got {len(values)}: lower one of them"
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
                # The largest has more than min_size, because the average is at least that.
                rich = int(np.argmax(sizes))
                parts[poor] = np.append(parts[poor], parts[rich][-1])
                parts[rich] = parts[rich][:-1]
                sizes[poor] += 1
                sizes[rich] -= 1
        return parts


@dataclass(frozen=True)
class Unbalanced(Partition):
    """IID labels in sizes proportional to log-normal weights exp(sigma * N(0, 1)).

    With sigma = 0 all sizes are equal; with 1 the largest of 100 clients has about twelve times
    the median.
    """

    sigma: Annotated[float, Field(ge=0)] = 1.0

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        exponents = self.sigma * rng.standard_normal(clients)
        weights = np.exp(exponents - exponents.max())  # scaled against overflow
        sizes = 1 + _apportion(weights / weights.sum(), len(values) - clients)
        return np.split(rng.permutation(len(values)), np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class ByWriter(Partition):
    """Assign whole writers, the natural partition of handwriting, in sizes as equal as possible.

    In descending order of size, each writer goes to the client with the fewest examples so far (LPT
    scheduling, Graham 1969); the order of equal writers is random.
    """

    needs_writers: ClassVar[bool] = True

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        writers, of_writer = np.unique(values, return_inverse=True)
        if clients > len(writers):
            raise ProblemError(
                f"expected at most {len(writers)} clients, one for each writer, got {clients}: "
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
        # In random order: otherwise client 0 would always have the most productive writer.
        of_example = rng.permutation(clients)[owner][of_writer]
        return _by_owner(of_example, clients)


@dataclass(frozen=True)
class Classes(Partition):
    """Give each client examples of ``per_client`` classes and no others.

    The classes are assigned as evenly as possible; a client has equally many examples of each of
    its own. ``least`` and ``most``: bounds of a client's number of examples, drawn uniformly
    between them; without them, a class is cut into equal parts for its clients. The split of FedRep
    (Collins et al., ICML 2021, section 5) and of pFedHN, which assign shards of classes unevenly.
    """

    per_client: Annotated[int, Field(ge=1)] = 2
    least: Annotated[int, Field(ge=1)] | None = None
    most: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.least is None) != (self.most is None):
            raise ProblemError("least and most: expected both or neither")
        least, most = self.least or self.per_client, self.most or self.per_client
        if not self.per_client <= least <= most:
            raise ProblemError(
                f"least: expected {self.per_client} (per_client) to {self.most} (most), "
                f"got {self.least}"
            )

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if self.per_client > len(classes):
            raise ProblemError(
                f"per_client: expected at most {len(classes)}, the number of classes"
            )
        holders: dict[int, list[int]] = {int(each): [] for each in classes}
        for client in rng.permutation(clients):
            # The classes with the fewest clients so far, in random order of equal ones.
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
                # If a total does not divide evenly, the first classes have one more.
                more = [len(parts[owner]) < totals[owner] % self.per_client for owner in owners]
                sizes = totals[owners] // self.per_client + np.array(more, np.int64)
                if sizes.sum() > len(members):
                    raise ProblemError(
                        f"expected at least {sizes.sum()} examples of class {each} for "
                        f"{len(owners)} clients, got {len(members)}: lower clients or most"
                    )
                shares = np.split(members, np.cumsum(sizes))
            for owner, share in zip(owners, shares, strict=False):
                parts[owner].append(share)
        found = [np.concatenate(part) for part in parts]
        if not all(map(len, found)):
            raise ProblemError(
                f"expected fewer clients than {clients} for {len(values)} examples: lower clients"
            )
        return found


@dataclass(frozen=True)
class Targets(Partition):
    """IID, then without nearly all examples of a few labels of each client.

    labels: number of target labels, drawn for each client; keep: remaining examples of each.
    Jeong et al. 2018, section 4: three target labels, 5 of 200 samples remain.
    """

    labels: Annotated[int, Field(ge=1)] = 3
    keep: Annotated[int, Field(ge=1)] = 5

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if self.labels >= len(classes):
            raise ProblemError(f"labels: expected fewer than {len(classes)}, the number of classes")
        parts = []
        for part in np.array_split(rng.permutation(len(values)), clients):
            left = np.ones(len(part), dtype=bool)
            for label in rng.choice(classes, self.labels, replace=False):
                left[np.flatnonzero(values[part] == label)[self.keep :]] = False
            parts.append(part[left])
        return parts


@dataclass(frozen=True)
class Fallah(Partition):
    """The split of Fallah et al., NeurIPS 2020, section 5, for ten classes.

    Half of the clients have ``a`` examples of each of the first five classes; each of the others
    has a/2 examples of one of the first five, and 2a of one of the last five, in turn. The paper:
    a = 196 on MNIST and 68 on CIFAR-10, 50 clients.
    """

    a: Annotated[int, Field(ge=1)] = 196

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> list[Indices]:
        classes = np.unique(values)
        if len(classes) != 10:
            raise ProblemError(f"expected ten classes for this partition, got {len(classes)}")
        pools = [rng.permutation(np.flatnonzero(values == each)) for each in classes]

        def take(index: int, count: int) -> Indices:
            if len(pools[index]) < count:
                raise ProblemError(
                    f"expected more examples of class {classes[index]} for {clients} clients: "
                    f"lower a, {self.a}, or clients"
                )
            taken, pools[index] = pools[index][:count], pools[index][count:]
            return taken

        found: list[Indices] = [np.empty(0, np.int64)] * clients
        for turn, client in enumerate(rng.permutation(clients)):
            if turn < clients // 2:
                part = [take(label, self.a) for label in range(5)]
            else:
                label = turn % 5
                part = [take(label, max(1, self.a // 2)), take(5 + label, 2 * self.a)]
            found[client] = np.concatenate(part)
        return found


@dataclass(frozen=True)
class Bootstrap(Partition):
    """Draw ``size`` examples for each client, with replacement.

    The number of clients is free: a client's examples are drawn when they are asked for, from its
    own generator. Without ``alpha``, all examples are equally likely. With it, a client's class mix
    is drawn from Dirichlet(alpha) first, as in Hsu et al. 2019, who draw without replacement while
    a class has examples left.
    """

    with_replacement: ClassVar[bool] = True

    size: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)] | None = None

    def _deal(self, values: Indices, clients: int, rng: np.random.Generator) -> Sequence[Indices]:
        pools = [np.arange(len(values))]
        if self.alpha is not None:
            pools = [np.flatnonzero(values == each) for each in np.unique(values)]
        return _DrawnParts(pools, clients, self, int(rng.integers(1 << 63)))


class _DrawnParts(Sequence[Indices]):
    """Parts that are drawn at each access, from one pool of examples or one for each class."""

    def __init__(self, pools: list[Indices], clients: int, how: Bootstrap, seed: int) -> None:
        self._pools, self._clients, self._how, self._seed = pools, clients, how, seed

    def __len__(self) -> int:
        return self._clients

    @overload
    def __getitem__(self, index: int) -> Indices: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Indices]: ...

    def __getitem__(self, index: int | slice) -> Indices | Sequence[Indices]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._clients))]
        client = range(self._clients)[index]
        rng, size = np.random.default_rng((self._seed, client)), self._how.size
        counts = [size]
        if self._how.alpha is not None:
            mix = rng.dirichlet(np.full(len(self._pools), float(self._how.alpha)))
            counts = rng.multinomial(size, mix).tolist()
        drawn = [
            pool[rng.integers(len(pool), size=count)]
            for pool, count in zip(self._pools, counts, strict=True)
        ]
        return np.sort(np.concatenate(drawn))


PARTITIONS: Mapping[str, Callable[..., Partition]] = {
    "iid": Iid,
    "shards": Shards,
    "dirichlet": Dirichlet,
    "unbalanced": Unbalanced,
    "by_writer": ByWriter,
    "classes": Classes,
    "targets": Targets,
    "fallah": Fallah,
    "bootstrap": Bootstrap,
}
"""Factories by name, for spec strings such as ``dirichlet(0.5)``."""


def _by_owner(owner: Indices, clients: int) -> list[Indices]:
    """Return the sorted indices of each client's examples, in one pass."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _apportion(shares: NDArray[np.float64], total: int) -> Indices:
    """Return whole sizes in these proportions, which sum to total exactly."""
    edges = np.rint(np.cumsum(shares) * total).astype(np.int64)
    edges[-1] = total  # the shares sum to 1 only up to rounding
    return np.diff(np.minimum(edges, total), prepend=0)
