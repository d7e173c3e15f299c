"""The hypernetwork: what it makes, and its gradient."""

import pytest
import torch

from fedmq.algorithms.pfedhn.algorithm import PFedHN
from fedmq.algorithms.pfedhn.hypernetwork import HyperNet
from fedmq.algorithms.problems.image import ImageClassification
from tests.algorithms.hyper import Local, reference, small

# ---- the hypernetwork


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_theta_is_that_of_an_ordinary_network_with_these_parameters(layers):
    net = HyperNet.of(3, 5, layers, 11)
    phi, v = net.initial(4), torch.randn(3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net.theta(phi, v), reference(net, phi)(v).detach())


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_product_is_the_gradient_of_theta_times_delta_by_autograd(layers):
    net = HyperNet.of(3, 5, layers, 11)
    source = torch.Generator().manual_seed(1)
    phi, v = net.initial(4), torch.randn(3, generator=source)
    delta = torch.randn(11, generator=source)
    module, point = reference(net, phi), v.clone().requires_grad_()
    (module(point) @ delta).backward()
    pulled, total = net.vjp(phi, v, delta), torch.zeros(net.layout.dim)
    net.add(total, pulled, delta, 2.0)
    expected = torch.cat([each.grad.reshape(-1) for each in module.parameters()])
    torch.testing.assert_close(total, 2 * expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pulled.embedding, point.grad, rtol=1e-6, atol=1e-7)
    assert not phi.requires_grad


def test_its_size_is_the_papers():
    """D_e = 13 for 50 clients: 13 * 100 + 100, 3 * (100 * 100 + 100), and 101 a weight."""
    problem = ImageClassification("mnist-mini", "cnn-mnist", 50, "iid", 0)
    state = PFedHN().start(problem)
    assert state.embeddings.shape == (50, 13)
    assert len(state.phi) == 1400 + 3 * 10100 + 101 * 21840


@pytest.mark.parametrize(("clients", "length"), [(2, 1), (4, 2), (7, 2), (10, 3), (50, 13)])
def test_an_embedding_has_1_plus_a_quarter_not_a_quarter_of_1_plus_n(clients, length):
    """int(1 + n / 4); int((1 + n) / 4) is another number, 0 of two clients."""
    state = small().start(Local(clients))
    assert state.embeddings.shape == (clients, length)


def test_embeddings_and_phi_follow_from_the_seed_alone():
    one, same, other = (small(seed=s).start(Local(4)) for s in (1, 1, 2))
    assert one.phi.equal(same.phi)
    assert one.embeddings.equal(same.embeddings)
    assert not one.phi.equal(other.phi)
    assert not one.embeddings.equal(other.embeddings)
