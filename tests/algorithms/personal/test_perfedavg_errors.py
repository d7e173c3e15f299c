"""Per-FedAvg against what public re-implementations get wrong."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fedmq.algorithms.personal.perfedavg import PerFedAvg
from fedmq.algorithms.problems.base import Examples
from fedmq.algorithms.problems.models import MODELS
from tests.algorithms.meta import VARIANTS, Local, Watched, evaluated, grad, update
from tests.algorithms.tiny import client, task

# ---- errors of public re-implementations


def test_the_adapted_weights_are_used_unlike_fedreps_local_update_maml():
    """There both losses are back-propagated at w; here the outer one is at z."""
    problem, data = Local(), client(Local()).data
    algorithm = PerFedAvg(variant="fo", steps=1, lr=1.0, inner_lr=2.0, batch_size=None)
    w = algorithm.start(problem).weights
    at_w = grad(w, data)
    found, _ = update(algorithm, problem)
    torch.testing.assert_close(found, -grad(w - 2.0 * at_w, data))
    assert (found + at_w).norm() > 0.1 * at_w.norm()


def test_inner_gradients_keep_their_shape_and_are_not_summed_over_dim_0_unlike_fedreps():
    """One step on the whole set, layer by layer."""
    problem = Local()
    algorithm = PerFedAvg(variant="fo", steps=1, lr=1.0, inner_lr=0.5, batch_size=None)
    module, data = problem.model(), client(problem).data
    names, layers = zip(*module.named_parameters(), strict=True)
    inner = torch.autograd.grad(problem.loss(module(data.x), data.y), layers)
    with torch.no_grad():
        for layer, each in zip(layers, inner, strict=True):
            assert each.shape == layer.shape
            layer.sub_(0.5 * each)
    outer = torch.autograd.grad(problem.loss(module(data.x), data.y), layers)
    result = algorithm.train(task(algorithm.start(problem)), client(problem)).payload
    for name, each in zip(names, outer, strict=True):
        torch.testing.assert_close(result.weights[name], -each)


def test_the_inner_rate_is_the_one_that_is_set_not_a_thousandth_of_lr_as_fedreps():
    problem = Local()
    found = [update(PerFedAvg(inner_lr=rate, lr=0.1), problem)[0] for rate in (1e-4, 0.1, 1.0)]
    assert not found[0].equal(found[1])
    assert (found[2] - found[0]).norm() > 5 * (found[1] - found[0]).norm()


def test_adaptation_is_on_training_examples_never_on_test_ones_unlike_fedbabus():
    problem = Watched()
    evaluated(PerFedAvg(), problem, 1)
    (only,) = problem.points_trained
    assert only.equal(problem.client(1).x)
    assert not torch.isin(only, problem.client_test(1).x).any()


def test_test_labels_do_not_change_the_adapted_model_unlike_fedbabus():
    class Mislabelled(Local):
        def client_test(self, index):
            points = super().client_test(index)
            return Examples(points.x, 1 - points.y)

    right, wrong = evaluated(PerFedAvg(), Local()), evaluated(PerFedAvg(), Mislabelled())
    assert right["accuracy"] + wrong["accuracy"] == pytest.approx(1.0)


def test_each_client_adapts_to_its_own_examples_not_to_a_leftover_index_as_fedbabus():
    problem = Watched(4)
    for index in (2, 0, 3):
        problem.points_trained.clear()
        evaluated(PerFedAvg(), problem, index)
        assert problem.points_trained[0].equal(problem.client(index).x)


@pytest.mark.parametrize("key", ["momentum", "weight_decay"])
def test_no_momentum_buffer_is_shared_by_inner_and_outer_steps_as_fedbabus(key):
    with pytest.raises(ValidationError, match="less than or equal to 0"):
        TypeAdapter(PerFedAvg).validate_python({key: 0.9})


def test_every_step_is_a_meta_step_not_one_in_some_as_behind_fedbabus_missing_modulo():
    problem = Watched()
    update(PerFedAvg(variant="fo", steps=5, batch_size=4), problem)
    assert len(problem.seen) == 10


def test_there_is_no_softmax_before_the_cross_entropy_and_no_elu_on_the_logits_unlike_flowers():
    model = MODELS["mlp-elu"]((1, 28, 28), 10)
    kinds = [type(each) for each in model]
    dense = [nn.Linear, nn.ELU] * 2 + [nn.Linear]
    assert kinds == [nn.Flatten, *dense]
    assert sum(each.numel() for each in model.parameters()) == 68_270
    with torch.no_grad():
        logits = model(10 * torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert logits.min() < -1
    assert logits.shape == (50, 10)


def test_hf_is_there_and_is_not_fo_unlike_flowers_pflliband_pfedmes():
    problem = Local()
    options = {"lr": 0.5, "inner_lr": 0.7, "batch_size": 5}
    found = [update(PerFedAvg(variant=each, **options), problem)[0] for each in VARIANTS]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (found[one] - found[other]).norm() > 0.01 * found[one].norm()


@pytest.mark.parametrize("key", ["lr", "inner_lr"])
def test_a_rate_of_zero_is_refused_and_does_not_fall_back_to_another_as_pfedmes(key):
    with pytest.raises(ValidationError, match="greater than 0"):
        TypeAdapter(PerFedAvg).validate_python({key: 0.0})
