"""Likelihoods: every density is normalised, and a batch moves the running scale exactly as documented."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, ContinuousBernoulli, Laplace, Normal

from mmvae.likelihoods import LIKELIHOODS, SCALES, Likelihood, bernoulli, continuous_bernoulli, discretized_logistic, gaussian
from mmvae.models.image_vae import ImageVAEConfig

LEVELS = torch.arange(256, dtype=torch.float64).view(256, 1, 1, 1) / 255
LOCS = [-30.0, -1.0, -0.002, 0.0, 0.1, 0.5, 127.5 / 255, 1.0, 1.002, 2.0, 30.0]
LOG_SCALES = [-20.0, -9.0, -5.0, -2.0, 0.0, 3.0, 20.0]


def one_pixel(*values: float, dtype=torch.float64) -> torch.Tensor:
    """A picture of one pixel with these values as its channels."""
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_discretized_logistic_sums_to_one(dtype):
    loc, log_scale = torch.cartesian_prod(torch.tensor(LOCS), torch.tensor(LOG_SCALES)).to(dtype).view(-1, 2, 1, 1, 1).unbind(1)
    log_prob = discretized_logistic(loc, log_scale).log_prob(LEVELS.to(dtype).unsqueeze(1))
    assert log_prob.shape == (256, len(LOCS) * len(LOG_SCALES))
    assert log_prob.isfinite().all()
    assert (log_prob.double().exp().sum(0) - 1).abs().max() < (1e-9 if dtype == torch.float64 else 1e-3)


def test_discretized_logistic_is_the_difference_of_distribution_functions():
    p = discretized_logistic(one_pixel(0.4), one_pixel(0.3))
    scale = 0.1 * math.exp(0.3)
    upper, lower = (((LEVELS + side / 510 - 0.4) / scale).sigmoid().flatten() for side in (1, -1))
    torch.testing.assert_close(p.log_prob(LEVELS)[1:-1].exp(), (upper - lower)[1:-1])
    torch.testing.assert_close(p.log_prob(LEVELS[[0, 255]]).exp(), torch.stack([upper[0], 1 - lower[-1]]))


def test_discretized_logistic_samples_follow_it():
    p = discretized_logistic(one_pixel(0.1), one_pixel(-0.5))
    counts = torch.bincount((p.sample((50_000,)) * 255).round().long().flatten(), minlength=256)
    probability = p.log_prob(LEVELS).exp()
    kept = probability * 50_000 > 20
    chi2 = ((counts - 50_000 * probability) ** 2 / (50_000 * probability))[kept].sum()
    assert chi2 < kept.sum() + 5 * (2 * kept.sum()).sqrt()


def test_discretized_logistic_has_gradients_at_the_extremes():
    loc = torch.tensor(LOCS).view(-1, 1, 1, 1, 1).requires_grad_()
    log_scale = torch.tensor(LOG_SCALES).view(-1, 1, 1, 1).requires_grad_()
    value = LEVELS.float()[[0, 1, 128, 254, 255]].view(-1, 1, 1, 1, 1, 1)
    discretized_logistic(loc + 0 * log_scale, log_scale + 0 * loc).log_prob(value).sum().backward()
    assert loc.grad.isfinite().all()
    assert log_scale.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_continuous_bernoulli_integrates_to_one(dtype):
    logits = [-1e4, -30.0, -15.0, -8.0, -3.0, -0.05, -0.0101, -0.0099, 0.0, 0.003, 0.01, 1.0, 5.0, 12.0, 100.0]
    p = continuous_bernoulli(torch.tensor(logits, dtype=dtype).view(-1, 1, 1, 1))
    x = torch.linspace(0, 1, 50_001, dtype=torch.float64)
    density = p.log_prob(x.to(dtype).view(-1, 1, 1, 1, 1)).double().exp()
    assert density.isfinite().all()
    assert (torch.trapezoid(density, x, dim=0) - 1).abs().max() < (1e-6 if dtype == torch.float64 else 1e-5)


def test_continuous_bernoulli_equals_that_of_torch_where_torch_is_accurate():
    logits, x = torch.linspace(-6, 6, 13, dtype=torch.float64).view(1, 1, 13), torch.rand(4, 1, 1, 13, dtype=torch.float64)
    reference = ContinuousBernoulli(logits=logits)
    p = continuous_bernoulli(logits)
    torch.testing.assert_close(p.log_prob(x), reference.log_prob(x).flatten(1).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(p.mean, reference.mean, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_continuous_bernoulli_is_finite_and_pulls_back():
    logits = torch.tensor([-1e4, -16.0, 0.0, 16.0, 1e4]).view(1, 1, 5).requires_grad_()
    (-continuous_bernoulli(logits).log_prob(torch.full((1, 1, 1, 5), 0.5))).sum().backward()
    gradient = logits.grad.flatten()
    assert gradient.isfinite().all()
    assert (gradient[:2] < 0).all()
    assert (gradient[3:] > 0).all()
    small = torch.tensor([-0.0099, 0.0, 0.0101], dtype=torch.float64).view(1, 1, 3).requires_grad_()
    torch.autograd.gradcheck(lambda l: continuous_bernoulli(l).log_prob(torch.full((1, 1, 1, 3), 0.3)), (small,))


def test_bernoulli_sums_to_one_over_binary_pictures():
    logits = torch.randn(1, 2, 2, dtype=torch.float64)
    pictures = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 1, 2, 2).double()
    assert bernoulli(logits).log_prob(pictures).exp().sum() == pytest.approx(1)
    torch.testing.assert_close(bernoulli(logits).log_prob(pictures), Bernoulli(logits=logits).log_prob(pictures).sum((1, 2, 3)))
    assert bernoulli(torch.full((1, 1, 1), 1e4)).log_prob(torch.zeros(1, 1, 1, 1)).item() == -1e4


@pytest.mark.parametrize(("name", "reference"), [("gaussian", Normal), ("laplace", Laplace)])
@pytest.mark.parametrize("mode", SCALES)
def test_location_scale_families(name, reference, mode):
    likelihood = Likelihood(name, mode, 0.3).eval()
    output, x = torch.randn(5, 2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    p = likelihood(output)
    assert (p.batch_shape, p.event_shape) == ((5, 2), (3, 4, 4))
    expected = reference(output, torch.tensor(0.3)).log_prob(x).sum((-1, -2, -3))
    torch.testing.assert_close(p.log_prob(x), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(p.mean, output)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_whatever_the_network(name, dtype):
    likelihood = Likelihood(name)
    output = torch.randn(2, 3 * likelihood.parameters_per_value, 4, 4, dtype=dtype, requires_grad=True)
    for training in (True, False):
        p = likelihood.train(training)(output)
        log_prob = p.log_prob(torch.randint(0, 2, (2, 3, 4, 4)).float())
        assert log_prob.dtype == torch.float32
        assert log_prob.shape == (2,)
        assert p.mean.shape == (2, 3, 4, 4)
    assert torch.autograd.grad(log_prob.sum(), output)[0].isfinite().all()


@pytest.mark.parametrize(("name", "power"), [("gaussian", 2), ("laplace", 1)])
def test_the_optimal_scale_follows_the_batches_and_stands_still_in_evaluation(name, power):
    assert Likelihood(name, "optimal", 1).scale.moment.dtype == torch.float32  # a whole number in a file is a number
    likelihood = Likelihood(name, "optimal", 0.5)
    output, x = torch.zeros(4, 1, 8, 8, requires_grad=True), torch.rand(4, 1, 8, 8)
    before = likelihood.scale.moment.item()
    optimum = x.abs().pow(power).mean().item()
    family = {"gaussian": Normal, "laplace": Laplace}[name]
    score = likelihood(output).log_prob(x)
    torch.testing.assert_close(score, family(0.0, 0.5).log_prob(x).sum((1, 2, 3)))
    assert likelihood.scale.moment.item() == before  # scoring observes nothing; its gradient does
    (-score).mean().backward()
    moved = 0.95 * before + 0.05 * optimum
    assert likelihood.scale.moment.item() == pytest.approx(moved)
    likelihood.eval()
    score = likelihood(output).log_prob(x)
    score.sum().backward()
    torch.testing.assert_close(score, family(0.0, moved ** (1 / power)).log_prob(x).sum((1, 2, 3)))
    assert likelihood.scale.moment.item() == pytest.approx(moved)
    likelihood.train()
    for _ in range(400):
        likelihood(output).log_prob(x).sum().backward()
    best = likelihood.eval()(output).log_prob(x).sum()
    for factor in (0.9, 1.1):  # the optimum of the likelihood in closed form
        likelihood.scale.moment.fill_(optimum * factor)
        assert likelihood(output).log_prob(x).sum() < best


def test_the_optimal_scale_is_that_of_the_scores_that_count():
    likelihood = Likelihood("gaussian", "optimal", 0.5)
    output, x = torch.zeros(2, 3, 1, 8, 8, requires_grad=True), torch.rand(3, 1, 8, 8)
    weights = torch.tensor([[0.2, 0.0, 1.0], [0.8, 0.0, 0.0]])
    with torch.no_grad():
        output[:, 1] = output[1, 2] = 100.0  # what nobody asks for
    for _ in range(400):
        (weights * -likelihood(output).log_prob(x)).sum().backward()
    assert likelihood.scale.moment.item() == pytest.approx(x[[0, 2]].square().mean().item())
    (0 * likelihood(output).log_prob(x)).sum().backward()
    assert likelihood.scale.moment.item() == pytest.approx(x[[0, 2]].square().mean().item())


def test_scoring_without_gradients_observes_nothing():
    likelihood = Likelihood("gaussian", "optimal", 0.5)
    output, x = torch.zeros(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    before = likelihood.scale.moment.clone()
    with torch.no_grad():
        score = likelihood(output).log_prob(x)
    assert torch.equal(likelihood.scale.moment, before)
    assert torch.equal(likelihood.eval()(output).log_prob(x), score)


def test_the_learned_scale_reaches_the_optimum():
    likelihood = Likelihood("gaussian", "learned", 0.1)
    output, x = torch.zeros(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (-likelihood(output).log_prob(x).mean()).backward()
        optimizer.step()
    assert likelihood.scale(output).item() == pytest.approx(x.square().mean().sqrt().item(), rel=0.01)


def test_scales_at_the_extremes_stay_finite():
    for name in ("gaussian", "laplace"):
        likelihood = Likelihood(name, "optimal")
        for value in (0.0, 1e4):
            for _ in range(500):
                log_prob = likelihood(torch.zeros(1, 1, 2, 2, requires_grad=True)).log_prob(torch.full((1, 1, 2, 2), value))
                log_prob.sum().backward()
            assert log_prob.isfinite().all()
    learned = Likelihood("gaussian", "learned")
    with torch.no_grad():
        learned.scale.log_scale_tenth.fill_(-1e4)
    (-learned(torch.zeros(1, 1, 2, 2)).log_prob(torch.ones(1, 1, 2, 2))).sum().backward()
    assert learned.scale.log_scale_tenth.grad < 0  # descent pulls it back


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"likelihood: received 'poisson', expected one of \['bernoulli'"):
        Likelihood("poisson")
    with pytest.raises(ValueError, match="scale_mode: received 'best'"):
        Likelihood("gaussian", "best")
    assert Likelihood("gaussian").scale.mode == ImageVAEConfig().scale_mode == "learned"
    assert torch.equal(gaussian(torch.zeros(1, 1, 1), torch.tensor(2.0)).stddev, torch.full((1, 1, 1), 2.0))
