"""pFedHN at the server: its step, what it refuses, and its state."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fedmq.algorithms.base import Payload, Result
from fedmq.algorithms.errors import ResultError
from fedmq.algorithms.schedules import Buffered, Rounds, Stream
from fedmq.codecs.formats.streamed import Streamed
from tests.algorithms.hyper import (
    Local,
    Tracked,
    bits,
    commit,
    reference,
    sent,
    small,
    theta,
    trained,
)
from tests.algorithms.tiny import change

# ---- the server's step


def test_one_client_is_trained_as_torch_would_train_hypernetwork_and_embedding():
    """Output gradient theta - theta~ into a descent optimizer, with momentum, decay and clip."""
    problem = Local(1)
    algorithm = small(server_lr=0.2, server_weight_decay=0.01, server_clip=3.0)
    state = algorithm.start(problem)
    module = reference(state.net, state.phi)
    embedding = nn.Parameter(state.embeddings[0].clone())
    every = [*module.parameters(), embedding]
    optimizer = torch.optim.SGD(every, lr=0.2, momentum=0.9, weight_decay=0.01)
    source, clipped = torch.Generator().manual_seed(2), 0
    for turn in range(6):
        delta = 0.2 * turn * torch.randn(22, generator=source)
        optimizer.zero_grad()
        module(embedding).backward(-delta)
        clipped += nn.utils.clip_grad_norm_(every, 3.0).item() > 3
        optimizer.step()
        state = commit(algorithm, Rounds(), state, [(0, sent(state, delta), 5, 0)])
    expected = torch.cat([each.detach().reshape(-1) for each in module.parameters()])
    torch.testing.assert_close(state.phi, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.embeddings[0], embedding.data, rtol=1e-4, atol=1e-5)
    assert 0 < clipped < 6


def test_theta_goes_where_the_client_went_not_the_other_way():
    """A descent step on <theta, theta - theta~>: with the minus sign twice it would flee."""
    problem = Local(2)
    algorithm = small(server_weight_decay=0.0)
    state = algorithm.start(problem)
    before = theta(algorithm.task(state, 1))
    delta = torch.randn(22, generator=torch.Generator().manual_seed(5))
    after = theta(
        algorithm.task(commit(algorithm, Rounds(), state, [(1, sent(state, delta), 1, 0)]), 1)
    )
    assert torch.dot(after - before, delta) > 0


def test_a_round_is_the_mean_of_products_by_examples_and_is_added_up_in_constant_memory():
    problem = Local(3)
    algorithm = small(server_momentum=0.0, server_weight_decay=0.0, server_lr=1.0)
    state = algorithm.start(problem)
    source = torch.Generator().manual_seed(3)
    deltas = [torch.randn(22, generator=source) * 0.1 for _ in range(3)]
    counts = [1, 2, 5]
    results = [(k, sent(state, deltas[k]), counts[k], 0) for k in range(3)]
    new = commit(algorithm, Rounds(), state, results)
    module, v = reference(state.net, state.phi), state.embeddings.clone().requires_grad_()
    sum(n / 8 * (module(v[k]) @ deltas[k]) for k, n in enumerate(counts)).backward()
    expected = torch.cat([each.grad.reshape(-1) for each in module.parameters()])
    torch.testing.assert_close(new.phi - state.phi, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(new.embeddings - state.embeddings, v.grad, rtol=1e-4, atol=1e-6)
    gathered = algorithm.new_accumulator(state)
    size = sum(each.nbytes for each in vars(gathered).values())
    for _ in range(20):
        gathered = algorithm.accumulate(gathered, state, Result(1, 0, sent(state, 0.1), 1), 1.0)
    assert sum(each.nbytes for each in vars(gathered).values()) == size


def test_only_the_embeddings_of_those_who_sent_move_also_under_momentum_and_weight_decay():
    problem, algorithm = Local(3), small()
    state = algorithm.start(problem)
    for _ in range(2):
        state = commit(algorithm, Rounds(), state, [(0, sent(state, 0.3), 1, 0)])
    new = commit(algorithm, Rounds(), state, [(2, sent(state, 0.3), 1, 0)])
    for k, same in ((0, True), (1, True), (2, False)):
        assert new.embeddings[k].equal(state.embeddings[k]) == same
        assert new.embedding_momentum[k].equal(state.embedding_momentum[k]) == same
    assert new.used.tolist() == [2, 0, 1]


def test_the_clipped_norm_is_that_of_phi_and_embeddings_together_also_of_huge_values():
    problem = Local(2)
    algorithm = small(server_momentum=0.0, server_weight_decay=0.0, server_lr=1.0)
    state = algorithm.start(problem)
    for value in (1e4, 1e25):
        new = commit(algorithm, Rounds(), state, [(1, sent(state, value), 1, 0)])
        moved = (new.phi - state.phi).norm(), (new.embeddings - state.embeddings).norm()
        assert math.isclose(math.hypot(*moved), 50.0, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "staleness", "factor"),
    [
        (Buffered(), 3, 0.5),
        (Buffered(), 0, 1.0),
        (Stream(mixing=1.0), 3, 0.5),
        (Stream(mixing=0.6), 0, 0.6),
    ],
)
def test_a_stale_delta_is_multiplied_with_the_current_phi_and_scaled_by_s(
    schedule, staleness, factor
):
    """theta was made from version 0; the product is taken at version 1."""
    problem = Local(2)
    algorithm = small(server_momentum=0.0, server_weight_decay=0.0, server_lr=1.0)
    old = algorithm.start(problem)
    now = commit(algorithm, Rounds(), old, [(0, sent(old, 0.5), 1, 0)])
    late = sent(old, 0.1)
    new = commit(algorithm, schedule, now, [(0, late, 9, staleness)])
    pulled, total = (
        now.net.vjp(now.phi, now.embeddings[0], theta(late)),
        torch.zeros(now.net.layout.dim),
    )
    now.net.add(total, pulled, theta(late), factor)
    torch.testing.assert_close(new.phi - now.phi, total, rtol=1e-4, atol=1e-6)


def test_what_is_not_trained_is_averaged_and_the_largest_count_taken():
    problem, algorithm = Tracked(2), small(batches=2)
    state = algorithm.start(problem)
    results = [trained(algorithm, problem, state, k)[0] for k in range(2)]
    new = commit(algorithm, Rounds(), state, [(k, results[k], 3 * k + 1, 0) for k in range(2)])
    changes = [change(state.partition.sent, each)[state.partition.theta :] for each in results]
    expected = state.shared + 0.2 * changes[0] + 0.8 * changes[1]
    torch.testing.assert_close(new.shared, expected)
    assert state.partition.shared.views(changes[0])["0.bias"].tolist() == [0.0] * 4
    assert new.counters.tolist() == [2]
    mean = algorithm.task(new, 0).exact["1.running_mean"]
    assert mean.equal(algorithm.task(new, 1).exact["1.running_mean"])
    assert not mean.equal(algorithm.task(state, 0).exact["1.running_mean"])


def test_a_version_and_a_result_stay_what_they_were():
    problem, algorithm = Tracked(2), small()
    state = algorithm.start(problem)
    result, _ = trained(algorithm, problem, state)
    before = bits(algorithm.save(state)), bits(result)
    commit(algorithm, Rounds(), state, [(0, result, 1, 0), (1, result, 1, 0)])
    assert (bits(algorithm.save(state)), bits(result)) == before


# ---- results that cannot be used


def hostile(state):
    good = sent(state, 0.1)
    first = next(iter(good.weights))
    yield "another model", {"weights": {"x": torch.zeros(3)}}, "it is missing"
    yield "phi", {"weights": {**good.weights, "phi": state.phi}}, "expected no tensor 'phi'"
    shape = {**good.weights, first: torch.zeros(9)}
    yield "shape", {"weights": shape}, "as torch.float32"
    double = {**good.weights, first: good.weights[first].double()}
    yield "dtype", {"weights": double}, "as torch.float32"
    yield "NaN", {"weights": sent(state, torch.nan).weights}, "NaN or infinite"
    yield "infinite", {"weights": sent(state, torch.inf).weights}, "NaN or infinite"
    yield "huge", {"weights": sent(state, 1e38).weights}, "as large as 1e"
    rest = torch.zeros(state.partition.sent.dim)
    rest[-1] = 1e38
    yield "huge statistics", {"weights": state.partition.sent.views(rest)}, "as large as 1e"


NAMES = [name for name, *_ in hostile(small().start(Tracked(2)))]


@pytest.mark.parametrize("which", NAMES)
def test_a_result_that_cannot_be_used_is_refused_and_the_sum_stays(which):
    algorithm = small()
    state = algorithm.start(Tracked(2))
    gathered = algorithm.accumulate(
        algorithm.new_accumulator(state), state, Result(0, 0, sent(state, 0.1), 1), 2.0
    )
    before = {name: each.clone() for name, each in vars(gathered).items()}
    ((change, message),) = [rest for name, *rest in hostile(state) if name == which]
    payload = dataclasses.replace(sent(state, 0.1), **change)
    with pytest.raises(ResultError, match=message):
        algorithm.accumulate(gathered, state, Result(1, 0, payload, 1), 1.0)
    assert all(each.equal(before[name]) for name, each in vars(gathered).items())


def test_a_client_that_has_no_embedding_is_refused():
    algorithm = small()
    state = algorithm.start(Local(2))
    with pytest.raises(ResultError, match="expected a client from 0 to 1, got 2"):
        algorithm.accumulate(
            algorithm.new_accumulator(state), state, Result(2, 0, sent(state, 0.1), 1), 1.0
        )


def test_a_result_that_is_read_in_pieces_counts_alike():
    problem, algorithm = Local(2), small()
    state = algorithm.start(problem)
    result, _ = trained(algorithm, problem, state)
    shapes = {slot.name: slot.shape for slot in state.partition.sent.weights}
    data = theta(result).numpy().tobytes()
    pieces = Streamed(shapes, lambda: iter([data[:12], data[12:]]))
    streamed = dataclasses.replace(result, weights=pieces)
    whole, parts = (
        algorithm.accumulate(algorithm.new_accumulator(state), state, Result(1, 0, each, 1), 3.0)
        for each in (result, streamed)
    )
    assert whole.phi.equal(parts.phi)
    assert whole.embeddings.equal(parts.embeddings)


# ---- the state


@pytest.mark.parametrize("options", [{}, {"personal_classifier": True}])
@pytest.mark.parametrize("problem", [Local(3), Tracked(3)])
def test_a_state_is_loaded_as_it_was_saved_and_goes_on_to_the_same_bits(problem, options):
    algorithm = small(**options)
    state = algorithm.start(problem)
    for turn in range(3):
        state = commit(algorithm, Rounds(), state, [(turn % 2, sent(state, 0.2), 1, 0)])
    again = algorithm.load(problem, algorithm.save(state))
    assert bits(algorithm.save(again)) == bits(algorithm.save(state))
    assert again.phi_momentum.any()
    assert again.embedding_momentum.any()
    one, other = (
        commit(algorithm, Rounds(), each, [(0, sent(each, -0.3), 1, 0)]) for each in (state, again)
    )
    assert bits(algorithm.save(one)) == bits(algorithm.save(other))
    assert bits(algorithm.task(one, 2)) == bits(algorithm.task(other, 2))


def test_a_state_of_something_else_is_refused():
    algorithm, problem = small(), Tracked(2)
    saved = algorithm.save(algorithm.start(problem))
    hurt = {
        "shape": ({"phi": torch.zeros(3)}, {}, "expected phi as"),
        "NaN": ({"phi": saved.weights["phi"] * torch.nan}, {}, "finite values of phi"),
        "count": ({}, {"used": torch.tensor([0, -1])}, "expected values of used of at least 0"),
        "dtype": ({}, {"used": torch.zeros(2)}, "as torch.int64"),
        "more": ({"psi": torch.zeros(1)}, {}, "expected no tensor"),
    }
    for weights, exact, message in hurt.values():
        other = Payload({**saved.weights, **weights}, {**saved.exact, **exact})
        with pytest.raises(ResultError, match=message):
            algorithm.load(problem, other)
    with pytest.raises(ResultError, match="expected phi as"):
        algorithm.load(Tracked(9), saved)
    with pytest.raises(ResultError, match="expected phi as"):
        small(personal_classifier=True).load(problem, saved)


def test_its_tensors_are_all_that_is_learned():
    problem, algorithm = Tracked(2), small()
    state = algorithm.start(problem)
    tensors = algorithm.tensors(state)
    learned = sum(each.numel() for name, each in tensors.items() if name.startswith("phi."))
    assert learned == len(state.phi)
    assert tensors["embeddings"] is state.embeddings
    assert {"0.bias", "1.running_mean", "1.num_batches_tracked"} < set(tensors)
