"""Distributions: identities first, then the float32 islands at the edges of three precisions."""

import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from mmvae.distributions import (
    LOGVAR_RANGE,
    Autoregressive,
    DiagNormal,
    GaussianMixture,
    at_least_float32,
    bound,
    kl,
)

EDGES = sorted({sign * value for value in (0.0, 11.0, 20.0, 30.0, 88.0, 100.0, 1e4) for sign in (-1, 1)})
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_normal(*shape: int, event_dims: int = 1, dtype=torch.float64) -> DiagNormal:
    return DiagNormal(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), event_dims)


def test_log_prob_and_kl_equal_those_of_torch():
    for shape, dims in (((4, 3), 1), ((4, 2, 3, 5), 3)):
        q, p = random_normal(*shape, event_dims=dims), random_normal(*shape, event_dims=dims)
        z = torch.randn(7, *shape, dtype=torch.float64)
        reference = Independent(Normal(q.loc, (0.5 * q.logvar).exp()), dims)
        torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
        torch.testing.assert_close(kl(q, p), kl_divergence(reference, Independent(Normal(p.loc, (0.5 * p.logvar).exp()), dims)))
        torch.testing.assert_close(q.kl_per_dimension(p).flatten(1).sum(1), kl(q, p))
        torch.testing.assert_close(q.entropy(), reference.entropy())
        assert q.batch_shape == (4,)
        assert q.event_shape == shape[1:]


def test_kl_equals_its_estimate_from_samples():
    q, p = random_normal(1, 3), random_normal(1, 3)
    z = q.rsample((200_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert abs(ratio.mean() - kl(q, p)) < 5 * ratio.std() / math.sqrt(len(ratio))
    assert torch.equal(kl(q, q), torch.zeros(1, dtype=torch.float64))


def test_rsample_is_location_plus_scaled_noise_and_carries_gradients():
    q = random_normal(4, 3)
    noise = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(q.rsample((5,), noise), q.loc + (0.5 * q.logvar).exp() * noise)
    z = q.rsample((100_000,))
    torch.testing.assert_close(z.mean(0), q.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), q.logvar.exp(), rtol=0.05, atol=0)
    loc, logvar = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda m, v: DiagNormal(m, v).rsample((5,), noise), (loc, logvar))
    torch.autograd.gradcheck(lambda m, v: DiagNormal(m, v).log_prob(noise), (loc, logvar))
    torch.autograd.gradcheck(lambda m, v: kl(DiagNormal(m, v), random_normal_fixed()), (loc, logvar))
    assert not DiagNormal(loc, logvar).detach().rsample().requires_grad


def random_normal_fixed() -> DiagNormal:
    generator = torch.Generator().manual_seed(3)
    return DiagNormal(*torch.randn(2, 4, 3, generator=generator, dtype=torch.float64))


def grid(dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of edges, one per row."""
    pairs = torch.tensor(list(itertools.product(EDGES, EDGES)))
    return tuple(pairs[:, i : i + 1].to(dtype).requires_grad_() for i in range(2))


def standard_normal() -> DiagNormal:
    return DiagNormal(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_edges_of_precision(dtype, autocast):
    """KL, samples, densities and their gradients are finite for every mean and log-variance, and equal to float64's."""
    mu, logvar = grid(dtype)
    noise = torch.linspace(-3, 3, len(mu)).unsqueeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        q, p = DiagNormal(mu, logvar), standard_normal()
        divergence, z = kl(q, p), q.rsample(noise=noise)
        received = {"kl": divergence, "z": z.squeeze(1), "log q": q.log_prob(z), "log p": p.log_prob(z), "log q(0)": q.log_prob(0 * z)}
    wide = mu.detach().double().requires_grad_(), logvar.detach().double().requires_grad_()
    q64, p64 = DiagNormal(*wide), standard_normal()
    fixed = z.detach().double()  # where a tiny scale vanishes beside the mean, only the sample that was drawn can be compared
    expected = {
        "kl": 0.5 * (wide[1].clamp(*LOGVAR_RANGE).exp() + wide[0] ** 2 - 1 - wide[1].clamp(*LOGVAR_RANGE)).squeeze(1),
        "z": q64.rsample(noise=noise.double()).squeeze(1),
        "log q": q64.log_prob(fixed),
        "log p": p64.log_prob(fixed),
        "log q(0)": q64.log_prob(0 * fixed),
    }
    for name, value in received.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    gradients = torch.autograd.grad(divergence.sum(), (mu, logvar), retain_graph=True)
    for gradient, reference in zip(gradients, torch.autograd.grad(kl(q64, p64).sum(), wide)):
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            gradient.double(), reference.to(dtype).double(), rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-7
        )
    for objective in (z.sum(), received["log q"].sum(), (z.clamp(-1, 1).sum() - divergence.sum())):
        for gradient in torch.autograd.grad(objective, (mu, logvar), retain_graph=True):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_beyond_the_bound_pulls_back(dtype):
    logvar = torch.tensor([[-1e4], [-30.0], [30.0], [1e4]]).to(dtype).requires_grad_()
    kl(DiagNormal(torch.zeros(4, 1, dtype=dtype), logvar), standard_normal()).sum().backward()
    assert torch.equal(logvar.grad.sign().flatten().float(), torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    logvar.grad = None
    # an objective that wants still larger or smaller variances gets no gradient out there
    (-kl(DiagNormal(torch.zeros(4, 1, dtype=dtype), logvar), standard_normal())).sum().backward()
    assert not logvar.grad.any()


def test_descent_returns_from_beyond_the_bound():
    logvar = torch.tensor([-1e4, 1e4], requires_grad=True)
    for step in [100.0] * 99 + [1.0] * 110:
        divergence = kl(DiagNormal(torch.zeros(2, 1), logvar.unsqueeze(1)), standard_normal()).sum()
        logvar = (logvar - step * torch.autograd.grad(divergence, logvar)[0].sign()).detach().requires_grad_()
    assert ((logvar > LOGVAR_RANGE[0]) & (logvar < LOGVAR_RANGE[1])).all()


def test_bound_is_the_identity_inside():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: bound(x, -3.0, 3.0), (x,))
    assert torch.equal(bound(x, -1.0, 1.0), x.clamp(-1, 1))
    assert bound(x.half(), -1.0, 1.0).dtype == torch.float16
    assert at_least_float32(x).dtype == torch.float64


def mixture(components: int = 3, rows: int = 4) -> tuple[GaussianMixture, MixtureSameFamily]:
    normals = random_normal(components, rows, 2)
    logits = torch.randn(components, rows, dtype=torch.float64)
    scale = (0.5 * normals.logvar).exp()
    reference = MixtureSameFamily(Categorical(logits=logits.T), Independent(Normal(normals.loc.transpose(0, 1), scale.transpose(0, 1)), 1))
    return GaussianMixture(normals, logits), reference


def test_mixture_equals_that_of_torch():
    p, reference = mixture()
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(p.log_prob(z[0]), reference.log_prob(z[0]))
    torch.testing.assert_close(p.mean, reference.mean)
    assert p.batch_shape == (4,)
    assert p.event_shape == (2,)


def test_mixture_samples_follow_its_density():
    p, reference = mixture(rows=2)
    z = p.sample((100_000,))
    assert z.shape == (100_000, 2, 2)
    torch.testing.assert_close(z.mean(0), reference.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), reference.variance, atol=0, rtol=0.05)
    # E[exp(log r(z) - log p(z))] = 1 for any density r: says that samples and log_prob belong together
    other = DiagNormal(reference.mean, torch.zeros(2, 2, dtype=torch.float64) - 2)
    ratio = (other.log_prob(z) - p.log_prob(z)).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / math.sqrt(len(z))).all()


def test_absent_components_change_nothing_and_take_no_gradient():
    loc, logvar = (torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[1] = -math.inf
    logits.requires_grad_()
    p = GaussianMixture(DiagNormal(loc, logvar), logits)
    keep = [0, 2]
    without = GaussianMixture(DiagNormal(loc[keep], logvar[keep]), logits[keep])
    z = torch.randn(6, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(z), without.log_prob(z))
    torch.testing.assert_close(p.mean, without.mean)
    gradients = torch.autograd.grad(p.log_prob(z).sum(), (loc, logvar, logits))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient[1].any() for gradient in gradients)
    k = (p.sample((2000,)) - loc[1].detach()).norm(dim=-1)
    assert k.isfinite().all()


@pytest.mark.parametrize(("components", "weights"), [((3, 4), (3, 1)), ((3, 1), (3, 4)), ((3, 1), (3, 1))])
def test_components_and_weights_broadcast_over_rows(components, weights):
    normals, logits = random_normal(*components, 2), torch.randn(weights, dtype=torch.float64)
    p, rows = GaussianMixture(normals, logits), max(components[1], weights[1])
    wide = GaussianMixture(DiagNormal(normals.loc.expand(3, rows, 2), normals.logvar.expand(3, rows, 2)), logits.expand(3, rows))
    z = torch.randn(5, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(z), wide.log_prob(z))
    assert p.batch_shape == (rows,)
    assert p.sample((7,)).shape == (7, rows, 2)
    torch.testing.assert_close(p.mean.expand(rows, 2), wide.mean)


def test_stratified_samples_every_component():
    p, _ = mixture()
    noise = torch.randn(5, 3, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(p.stratified(5, noise), p.components.loc + (0.5 * p.components.logvar).exp() * noise)
    assert p.stratified(2).shape == (2, 3, 4, 2)


def test_spatial_mixture():
    p = GaussianMixture(random_normal(3, 4, 2, 5, 5, event_dims=3), torch.zeros(3, 4))
    assert p.sample((6,)).shape == (6, 4, 2, 5, 5)
    assert p.log_prob(p.sample((6,))).shape == (6, 4)
    assert p.mean.shape == (4, 2, 5, 5)


def test_autoregressive_sums_what_is_scored():
    p = Autoregressive(lambda x: torch.where(x == -100, 0.0, -x.float()).to(torch.bfloat16), torch.Size([2]))
    target = torch.tensor([[1, 2, -100], [3, -100, -100]])
    assert torch.equal(p.log_prob(target), torch.tensor([-3.0, -3.0]))
    assert p.log_prob(target).dtype == torch.float32
    assert torch.equal(p.token_log_prob(target)[0].float(), torch.tensor([-1.0, -2.0, 0.0]))
