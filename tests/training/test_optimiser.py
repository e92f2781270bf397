import pytest
import torch

from ifpyro.flow.networks.mlp import MLP
from ifpyro.training import Recipe
from ifpyro.training.optimiser import LARGEST, OrthogonalMomentum, make_optimisers, orthogonal

WITH_MATRICES = Recipe(matrix_rate=0.02)


def matrices(count, size, seed=0):
    """``U``, singular values, ``V`` and their product, double precision."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.double))[0] for _ in "uv")
    s = torch.rand(count, size, generator=generator, dtype=torch.double) + 0.01
    return u, s, v, u @ torch.diag_embed(s) @ v.mT


def test_singular_vectors_stay_and_singular_values_approach_one():
    u, s, v, m = matrices(3, 12)
    inner = u.mT @ orthogonal(m) @ v
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inner, torch.diag_embed(values), atol=1e-12)
    expected = s / s.norm(dim=-1, keepdim=True)
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(values, expected, atol=1e-12)
    large = s > 0.1 * s.amax(-1, keepdim=True)
    assert (values[large] > 0.5).all()
    assert (values < 1.25).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_steps_do_not_depend_on_the_size_of_the_gradient(size):
    m = matrices(1, 6)[3]
    assert torch.allclose(orthogonal(m * size), orthogonal(m), atol=1e-7)
    assert orthogonal(torch.zeros(1, 4, 4)).equal(torch.zeros(1, 4, 4))


def test_first_step_is_along_the_orthogonal_gradient_whatever_the_mix_of_sizes():
    grouped = [matrices(1, size, seed)[3][0] for seed, size in enumerate((4, 6, 4))]
    weights = [torch.nn.Parameter(torch.eye(len(g), dtype=torch.double)) for g in grouped]
    for weight, gradient in zip(weights, grouped, strict=True):
        weight.grad = gradient
    OrthogonalMomentum(weights, rate=0.1, weight_decay=0.5).step()
    for weight, gradient in zip(weights, grouped, strict=True):
        expected = (1 - 0.1 * 0.5) * torch.eye(len(gradient)) - 0.1 * orthogonal(gradient[None])[0]
        assert torch.allclose(weight.detach(), expected, atol=1e-10)


def test_only_moderate_square_matrices_step_so():
    network = MLP(2, width=16, blocks=2)
    adam, matrix = make_optimisers(network, WITH_MATRICES)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)] for p in matrix.param_groups[0]["params"]}
    assert found == {f"{layer}.{k}.weight" for layer in ("first", "second") for k in range(2)}
    rest = {names[id(p)] for p in adam.param_groups[0]["params"]}
    assert rest == set(names.values()) - found
    assert len(make_optimisers(MLP(2, width=LARGEST + 1, blocks=1), WITH_MATRICES)) == 1
    assert len(make_optimisers(network, Recipe())) == 1
