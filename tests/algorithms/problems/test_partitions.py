import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmq.algorithms.errors import ProblemError
from fedmq.algorithms.problems import PARTITIONS
from fedmq.algorithms.problems.partitions import _by_owner
from fedmq.codecs.errors import SpecError
from fedmq.codecs.spec import build


def deal(spec, labels, clients, seed=0, groups=None):
    """Deal labels by a spec string."""
    partition = build(spec, PARTITIONS, "partition")
    return partition(labels, groups, clients, np.random.default_rng(seed))


def balanced(n=1000, classes=10):
    """Return labels with every class equally often."""
    return np.arange(n) % classes


def mean_share_of_the_top_class(parts, labels):
    """Return what part of a client's examples its commonest class has, on average."""
    return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])


WHOLE = ["by_writer", "dirichlet", "iid", "shards", "unbalanced"]
"""The partitions that deal every example."""


@st.composite
def cases(draw):
    """Return a spec, labels, writers and a number of clients that can be dealt."""
    n = draw(st.integers(1, 120))
    classes = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.integers(0, classes, n)
    groups = rng.integers(0, draw(st.integers(1, 40)), n) * 1000
    kind = draw(st.sampled_from(WHOLE))
    most = len(np.unique(groups)) if kind == "by_writer" else n
    clients = draw(st.integers(1, most))
    each = draw(st.integers(1, n // clients))
    alpha = draw(st.floats(1e-4, 1e4) | st.sampled_from([1e-300, 1e300]))
    sigma = draw(st.floats(0, 1e6))
    arguments = {
        "iid": "",
        "shards": f"({each})",
        "dirichlet": f"({alpha!r}, min_size={each})",
        "unbalanced": f"(sigma={sigma!r})",
        "by_writer": "",
    }
    return kind + arguments[kind], labels, groups, clients


@pytest.mark.slow
@given(case=cases(), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=300, deadline=None)
def test_every_example_goes_to_exactly_one_client_and_no_client_is_empty(case, seed):
    """This holds for every partition that deals all."""
    spec, labels, groups, clients = case
    parts = deal(spec, labels, clients, seed, groups)
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@given(case=cases(), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=100, deadline=None)
def test_the_same_seed_deals_the_same_hands(case, seed):
    """Workers on different hosts deal for themselves and must agree."""
    spec, labels, groups, clients = case
    once, again = (deal(spec, labels, clients, seed, groups) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["iid", "shards", "dirichlet(1)", "unbalanced", "by_writer"])
def test_another_seed_deals_other_hands(kind):
    """The seed matters to every partition."""
    labels = balanced()
    one, other = (deal(kind, labels, 10, seed, np.arange(1000) // 7) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(n=st.integers(1, 200), data=st.data())
@settings(deadline=None)
def test_iid_sizes_differ_by_at_most_one(n, data):
    """Also where the clients do not divide the examples."""
    clients = data.draw(st.integers(1, n))
    sizes = [len(part) for part in deal("iid", np.zeros(n, dtype=np.int64), clients)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
@given(case=cases().filter(lambda case: case[0].startswith("shards")))
@settings(deadline=None)
def test_shards_cross_few_borders_between_labels(case):
    """Cutting a sorted list in S parts makes at most S + classes - 1 runs of one label."""
    spec, labels, _, clients = case
    shards = clients * build(spec, PARTITIONS, "partition").per_client
    seen = sum(len(np.unique(labels[part])) for part in deal(spec, labels, clients))
    assert seen <= shards + len(np.unique(labels)) - 1


@pytest.mark.parametrize("per_client", [1, 2, 5])
def test_shards_that_divide_the_classes_hold_one_label_each(per_client):
    """McMahan et al.: most clients see two digits."""
    labels = balanced(1000, 10)
    parts = deal(f"shards({per_client})", labels, 20)
    assert max(len(np.unique(labels[part])) for part in parts) <= per_client
    assert {len(part) for part in parts} == {50}


def test_a_smaller_alpha_skews_the_labels_more():
    """From nearly IID to nearly one class a client."""
    labels = balanced(5000, 10)
    skews = [
        np.mean(
            [
                mean_share_of_the_top_class(deal(f"dirichlet({alpha})", labels, 20, seed), labels)
                for seed in range(5)
            ]
        )
        for alpha in (100, 1, 0.1, 0.01)
    ]
    assert skews == sorted(skews)
    assert skews[0] < 0.2, "alpha = 100 should be nearly IID"
    assert skews[-1] > 0.8, "alpha = 0.01 should leave nearly one class to each client"


@pytest.mark.parametrize("alpha", [0.001, 0.1, 1])
def test_dirichlet_gives_every_client_at_least_min_size(alpha):
    """Without drawing again and again."""
    sizes = [len(part) for part in deal(f"dirichlet({alpha}, min_size=10)", balanced(), 100)]
    assert min(sizes) == max(sizes) == 10, "100 clients, 1000 examples: only one way to do it"
    assert min(map(len, deal(f"dirichlet({alpha}, 25)", balanced(), 20))) >= 25


def test_a_larger_sigma_spreads_the_sizes_more():
    """With sigma 0, all are equal."""

    def spread(sigma):
        parts = deal(f"unbalanced({sigma})", balanced(10_000), 50)
        return np.std([len(part) for part in parts])

    assert spread(0) == 0
    assert spread(0) < spread(0.3) < spread(1) < spread(2)


def test_unbalanced_labels_are_iid():
    """Only the sizes differ."""
    labels = balanced(20_000)
    largest = max(deal("unbalanced(1)", labels, 10), key=len)
    shares = np.bincount(labels[largest]) / len(largest)
    assert abs(shares - 0.1).max() < 0.02


@given(case=cases().filter(lambda case: case[0] == "by_writer"), seed=st.integers(0, 99))
@settings(deadline=None)
def test_by_writer_never_divides_a_writer(case, seed):
    """And the sizes differ by no more than one writer has written."""
    spec, labels, groups, clients = case
    parts = deal(spec, labels, clients, seed, groups)
    writers = [set(groups[part]) for part in parts]
    assert sum(map(len, writers)) == len(set(groups))
    # No single move of a whole writer can even the sizes out more than LPT leaves them.
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= np.bincount(groups // 1000).max()


def test_by_writer_takes_the_labels_as_they_come():
    """10 + 40 = 20 + 30."""
    groups = np.repeat([7, 3, 9, 1], [10, 20, 30, 40])
    parts = deal("by_writer", np.zeros(100, dtype=np.int64), 2, groups=groups)
    assert sorted(map(len, parts)) == [50, 50]


@pytest.mark.parametrize(
    ("spec", "clients", "message"),
    [
        ("iid", 0, "at least 1 client, got 0"),
        ("iid", 11, "expected at most 10 clients, one for each example, got 11"),
        ("shards(3)", 4, "expected at least 12 examples for 4 clients with 3 shards each, got 10"),
        (
            "dirichlet(1, min_size=4)",
            3,
            "at least 12 examples for 3 clients with min_size=4, got 10",
        ),
        ("by_writer", 4, "expected at most 3 clients, one for each writer, got 4"),
    ],
)
def test_what_cannot_be_dealt_is_refused_in_one_sentence(spec, clients, message):
    """The sentence says what was needed and what was there."""
    labels, groups = balanced(10), np.array([5, 5, 5, 6, 6, 6, 6, 6, 6, 7])
    with pytest.raises(ProblemError, match=message):
        deal(spec, labels, clients, groups=groups)


def test_by_writer_without_writers_names_the_remedy():
    """It says which data set has writers, and from which file."""
    with pytest.raises(ProblemError, match=r"data set 'mnist' has them if .*mnist-writers\.npz"):
        deal("by_writer", balanced(10), 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shards(0)", "per_client: expected a number greater than or equal to 1, got 0"),
        ("shards(2.5)", "per_client: expected a whole number, got 2.5"),
        ("shards(many)", "per_client: expected a whole number, got 'many'"),
        ("dirichlet", "missing a required argument: 'alpha'"),
        ("dirichlet(0)", "alpha: expected a number greater than 0, got 0"),
        ("dirichlet(-1.5)", "alpha: expected a number greater than 0, got -1.5"),
        ("dirichlet(1e999)", "alpha: expected a finite number, got inf"),
        ("dirichlet(low)", "alpha: expected a number, got 'low'"),
        (
            "dirichlet(1, min_size=0)",
            "min_size: expected a number greater than or equal to 1",
        ),
        ("unbalanced(-1)", "sigma: expected a number greater than or equal to 0, got -1"),
        ("unbalanced(sigma=True)", "sigma: expected a number, got True"),
        ("bootstrap", "missing a required argument: 'size'"),
        ("bootstrap(0)", "size: expected a number greater than or equal to 1"),
        ("bootstrap(5, 0)", "alpha: expected a number greater than 0"),
        ("iid(3)", "too many positional arguments"),
        ("shard(2)", r"unknown partition 'shard' \(did you mean 'shards'\?\)"),
    ],
)
def test_a_bad_parameter_is_refused_when_the_spec_is_read(spec, message):
    """Before any data are read."""
    with pytest.raises(SpecError, match=message):
        build(spec, PARTITIONS, "partition")


def test_bootstrap_draws_for_each_client_with_replacement():
    labels = balanced(50)
    parts = deal("bootstrap(100)", labels, 1_000_000)
    assert len(parts) == 1_000_000
    chosen = [parts[each] for each in (0, 1, 999_999)]
    assert all(len(part) == 100 and part.dtype == np.int64 for part in chosen)
    assert all((np.diff(part) >= 0).all() and (np.diff(part) == 0).any() for part in chosen)
    assert not np.array_equal(chosen[0], chosen[1])
    np.testing.assert_array_equal(parts[-1], chosen[2])
    counts = np.bincount(np.concatenate(parts[:500]), minlength=50)
    assert counts.min() > 0.8 * counts.mean()
    with pytest.raises(IndexError):
        parts[1_000_000]


def test_a_bootstrapped_client_depends_on_its_number_alone():
    labels = balanced(50)
    for spec in ("bootstrap(20)", "bootstrap(20, 0.5)"):
        few, many = deal(spec, labels, 3), deal(spec, labels, 5000)
        np.testing.assert_array_equal(few[2], many[2])
        assert not np.array_equal(few[2], deal(spec, labels, 3, seed=1)[2])


def test_bootstrap_with_a_small_alpha_gives_few_classes():
    labels = balanced(1000)
    skewed, even = (deal(f"bootstrap(100, {alpha})", labels, 200) for alpha in (0.1, 1000))
    assert mean_share_of_the_top_class(skewed, labels) > 0.5
    assert mean_share_of_the_top_class(even, labels) < 0.2
    assert {len(part) for part in skewed} == {100}


@pytest.mark.parametrize(
    "spec", ["classes(3)", "classes(3, 30, 40)", "targets(2, keep=4)", "fallah(6)"]
)
def test_what_deals_a_part_deals_no_example_twice_and_the_same_again(spec):
    labels = balanced(1000, 10)
    parts, again = deal(spec, labels, 12), deal(spec, labels, 12)
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt)
    assert all(len(part) for part in parts)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert any(
        len(a) != len(b) or (a != b).any()
        for a, b in zip(parts, deal(spec, labels, 12, 1), strict=True)
    )


def test_classes_gives_each_client_so_many_classes_equally_and_in_range():
    """FedRep's setting: 100 clients, five classes, 60 to 100 images."""
    labels = balanced(20000, 10)
    parts = deal("classes(5, 60, 100)", labels, 100)
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    assert ((counts > 0).sum(axis=1) == 5).all()
    assert all(60 <= len(part) <= 100 for part in parts)
    assert len({len(part) for part in parts}) > 10
    held = [row[row > 0] for row in counts]
    assert all(row.max() - row.min() <= 1 for row in held)
    assert (np.abs((counts > 0).sum(axis=0) - 50) <= 1).all()  # classes are shared out evenly


def test_classes_without_a_size_deals_all_of_the_classes_that_somebody_has():
    labels = balanced(1000, 10)
    parts = deal("classes(2)", labels, 10)
    assert sum(map(len, parts)) == 1000
    assert all(len(np.unique(labels[part])) == 2 for part in parts)


def test_targets_leaves_five_of_three_labels():
    """Jeong et al.: 2,000 images a device; most of three labels go."""
    labels = balanced(20000, 10)
    for part in deal("targets(3, keep=5)", labels, 10):
        counts = np.sort(np.bincount(labels[part], minlength=10))
        assert counts[:3].tolist() == [5, 5, 5]
        assert counts[3] > 150


def test_fallah_is_the_papers_split():
    """50 clients, a = 196, on labels as frequent as MNIST's rarest."""
    labels = balanced(54210, 10)
    counts = np.array(
        [np.bincount(labels[p], minlength=10) for p in deal("fallah(196)", labels, 50)]
    )
    first = [row for row in counts.tolist() if sum(n > 0 for n in row) == 5]
    second = [row for row in counts.tolist() if sum(n > 0 for n in row) == 2]
    assert (len(first), len(second)) == (25, 25)
    assert all(row == [196] * 5 + [0] * 5 for row in first)
    assert all(sorted(row[:5])[-1] == 98 and sorted(row[5:])[-1] == 392 for row in second)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("classes(0)", "per_client"),
        ("classes(2, least=5)", "expected both or neither"),
        ("classes(2, 9, 8)", "least: expected 2"),
        ("classes(11)", "at most 10"),
        ("classes(2, 500, 500)", "lower clients or most"),
        ("targets(10)", "labels: expected fewer than 10"),
        ("fallah(60)", "lower a"),
    ],
)
def test_what_cannot_be_dealt_is_said(spec, said):
    with pytest.raises((ProblemError, SpecError), match=said):
        deal(spec, balanced(1000, 10), 20)


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(10, 12))
def test_one_pass_finds_what_a_pass_for_each_client_does(owners, clients):
    owner = np.array(owners, np.int64)
    found = _by_owner(owner, clients)
    assert len(found) == clients
    for client, part in enumerate(found):
        assert part.dtype == np.int64
        assert np.array_equal(part, np.flatnonzero(owner == client))


# Hands that were dealt before the examples of all clients were found in one pass.
DEALT = {
    ("iid", 7): "cda77a75ae987f09082783cb2a31221c",
    ("dirichlet(0.5)", 100): "b05ce02303d3543cfdc4bba4cdd074f1",
    ("dirichlet(0.05, 3)", 100): "e74438065fbac33a9a24b3cc343efced",
    ("by_writer", 100): "f26bddb98e20c0d9babfc055a1324b1b",
    ("shards(2)", 100): "c9b2fa6a6c0a0e22b52aa220702b90fd",
    ("classes(2)", 100): "571f6e5a1e5b4c6ea9d6d71f3de26b39",
}


@pytest.mark.parametrize(("spec", "clients"), DEALT)
def test_hands_are_dealt_as_they_always_were(spec, clients):
    rng = np.random.default_rng(5)
    labels, groups = rng.integers(0, 10, 60000), rng.integers(0, 3000, 60000)
    hasher = xxhash.xxh3_128()
    for part in build(spec, PARTITIONS, "partition")(
        labels, groups, clients, np.random.default_rng(3)
    ):
        hasher.update(np.int64(len(part)).tobytes() + part.tobytes())
    assert hasher.hexdigest() == DEALT[spec, clients]
