"""States are saved and loaded by their fields."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmq.algorithms.base import Payload
from fedmq.algorithms.errors import AlgorithmError, ResultError
from fedmq.algorithms.toolkit.flat_model import FlatModel
from fedmq.algorithms.toolkit.layout import Layout
from fedmq.algorithms.toolkit.states import DERIVED, SavedAs, load_state, save_state


@dataclass(frozen=True)
class Inner:
    steps: int
    rate: Tensor


@dataclass(frozen=True)
class State:
    names: tuple[str, ...] = field(metadata=DERIVED)
    phi: Tensor = field(metadata=SavedAs("weights", finite=False).field)
    counts: Tensor = field(metadata=SavedAs(least=0, most=9).field)
    rows: Tensor = field(metadata=SavedAs(any_length=True).field)
    table: np.ndarray
    moments: Mapping[str, Tensor] = field(metadata=SavedAs(prefix="server/").field)
    total: Tensor = field(metadata=DERIVED)
    version: int
    scale: float
    inner: Inner


@dataclass(frozen=True)
class Model:
    layout: Layout
    weights: Tensor
    counters: Tensor
    version: int
    velocity: Tensor


def state(value=1.0, rows=2):
    return State(
        ("a", "b"),
        torch.full((2,), value),
        torch.tensor([1, 2]),
        torch.zeros(rows, 3),
        np.ones((2, 2)),
        {"m": torch.full((2,), value)},
        torch.ones(1),
        7,
        0.5,
        Inner(3, torch.full((1,), value)),
    )


def test_a_state_is_saved_by_its_fields_and_loaded_back():
    first = save_state(state())
    assert list(first.weights) == ["phi"]
    assert list(first.exact) == ["counts", "rows", "table", "server/m", "inner.rate"]
    assert first.numbers == {"version": 7, "scale": 0.5, "inner.steps": 3}
    found = load_state(state(2.0, rows=0), first)
    assert found.phi.tolist() == found.moments["m"].tolist() == [1.0, 1.0]
    assert (found.inner.steps, found.inner.rate.tolist()) == (3, [1.0])
    assert found.rows.shape == (2, 3)
    assert (found.names, found.total.tolist(), found.version) == (("a", "b"), [1.0], 7)
    assert save_state(found).numbers == first.numbers


def test_a_saved_array_is_a_copy():
    one = state()
    save_state(one).exact["table"].zero_()
    assert one.table.all()


def model(seed=0):
    torch.manual_seed(seed)
    flat = FlatModel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    return Model(flat.layout, flat.weights, flat.read_counters(), 3, torch.ones(2))


def test_a_model_is_saved_by_the_names_of_its_tensors():
    one = save_state(model())
    assert list(one.weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(one.exact)[-2:] == ["1.num_batches_tracked", "velocity"]
    found = load_state(model(1), one)
    assert found.weights.equal(model().weights)
    assert found.counters.equal(model().counters)
    assert found.velocity.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {}}, "expected a tensor 'phi', it is missing"),
        ({"phi": torch.zeros(3)}, r"expected phi as torch.float32 \[2\], got torch.float32 \[3\]"),
        ({"counts": torch.zeros(2)}, "expected counts as torch.int64"),
        ({"counts": torch.tensor([0, -1])}, "expected values of counts of at least 0"),
        ({"counts": torch.tensor([0, 10])}, "expected values of counts up to 9 in magnitude"),
        ({"rows": torch.zeros(2, 4)}, r"expected rows as torch.float32 \[2, 3\]"),
        ({"rows": torch.zeros(())}, r"expected rows as torch.float32 \[0, 3\]"),
        ({"rows": torch.full((1, 3), torch.nan)}, "expected finite values of rows"),
        ({"table": torch.zeros(2, 2)}, "expected table as torch.float64"),
        ({"server/m": torch.zeros(1)}, "expected server/m as torch.float32"),
        ({"other": torch.zeros(1)}, "expected no tensor 'other'"),
        ({"inner.rate": torch.zeros(2)}, "expected rate as torch.float32"),
        ({"inner.more": torch.zeros(2)}, "expected no tensor 'more'"),
        ({"numbers": {"scale": 0.5}}, "expected version from 0 to"),
        ({"numbers": {"version": True, "scale": 0.5}}, "expected version from 0 to"),
        ({"numbers": {"version": -1, "scale": 0.5}}, "expected version from 0 to"),
        ({"numbers": {"version": 1, "scale": 1}}, "expected scale as a finite number"),
        ({"numbers": {"version": 1, "scale": float("nan")}}, "expected scale as a finite number"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    good = save_state(state())
    groups = {key: change[key] for key in ("weights", "numbers") if key in change}
    tensors = {key: each for key, each in change.items() if key not in groups}
    weights = {key: each for key, each in tensors.items() if key == "phi"}
    exact = {key: each for key, each in tensors.items() if key != "phi"}
    both = Payload({**good.weights, **weights}, {**good.exact, **exact}, good.numbers)
    with pytest.raises(ResultError, match=message):
        load_state(state(), dataclasses.replace(both, **groups))


def test_infinity_is_loaded_where_a_field_allows_it():
    wild = dataclasses.replace(state(), phi=torch.full((2,), torch.inf))
    assert load_state(state(), save_state(wild)).phi.tolist() == [torch.inf, torch.inf]


@dataclass(frozen=True)
class Listed:
    parts: list[Tensor]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Listed([]), "cannot save field 'parts' of type 'list': override save and load"),
        ({"w": torch.zeros(1)}, "expected a dataclass as state, got 'dict': override save"),
    ],
)
def test_a_state_of_another_kind_is_refused(wrong, message):
    with pytest.raises(AlgorithmError, match=message):
        save_state(wrong)
