"""Directions: a density on the circle, and what it costs to tell one."""

import math

import pytest
import torch

from mmvae.direction import ProjectedNormal, divergence, log_ratio
from mmvae.distributions import DiagNormal

CONCENTRATIONS = torch.tensor([0.0, 0.3, 1.0, 4.0, 25.0, 29.99, 30.01, 200.0], dtype=torch.float64)
NODES = 2 * math.pi * torch.arange(40_000, dtype=torch.float64) / 40_000


def projected(size: int = 6) -> ProjectedNormal:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return ProjectedNormal(loc, 0.5 * torch.randn(size, 5, generator=generator, dtype=torch.float64) - 1)


@pytest.mark.parametrize("concentration", CONCENTRATIONS)
def test_the_density_of_an_angle_integrates_to_one_and_its_divergence_is_the_integral(concentration):
    log_f = log_ratio(concentration * NODES.cos(), concentration * NODES.sin())
    torch.testing.assert_close(log_f.exp().mean(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(divergence(concentration), (log_f.exp() * log_f).mean(), atol=2e-6, rtol=1e-6)


def test_the_density_is_that_of_the_angle_of_normal_samples():
    generator = torch.Generator().manual_seed(0)
    for concentration in (0.5, 2.0):
        drawn = torch.randn(400_000, 2, generator=generator) + torch.tensor([concentration, 0.0])
        counted = torch.histc(torch.atan2(drawn[:, 1], drawn[:, 0]), 24, -math.pi, math.pi) / 400_000 * 24
        middle = math.pi * (2 * torch.arange(24) + 1) / 24 - math.pi
        expected = log_ratio(concentration * middle.cos(), concentration * middle.sin()).exp()
        torch.testing.assert_close(counted, expected, atol=0.03, rtol=0.03)


def test_the_gradient_of_the_divergence_is_finite_and_grows_the_width_of_any_angle():
    concentration = torch.tensor([1e-6, 1.0, 29.99, 30.01, 1e5], requires_grad=True)
    divergence(concentration).sum().backward()
    assert concentration.grad.isfinite().all() and (concentration.grad > 0).all()
    torch.testing.assert_close(concentration.grad[2], concentration.grad[3], rtol=1e-2, atol=0)


def test_the_log_density_relative_to_the_prior_has_the_divergence_as_its_mean():
    q = projected()
    prior = DiagNormal(torch.zeros(5), torch.zeros(5))
    torch.manual_seed(0)
    z = q.rsample(torch.Size([200_000]))
    estimate = (q.log_prob(z) - prior.log_prob(z)).mean(0)
    torch.testing.assert_close(estimate, q.kl_per_dimension(prior).sum(1), atol=0.02, rtol=0.02)


def test_the_density_is_one_over_the_plane():
    q = ProjectedNormal(torch.tensor([[0.4, -0.9]]), torch.full((1, 2), -2.0))
    at = torch.linspace(-8, 8, 801)
    plane = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).unsqueeze(2)
    assert q.log_prob(plane).exp().sum().item() * 0.02**2 == pytest.approx(1, abs=1e-3)


def test_the_radius_costs_nothing_and_the_rest_costs_what_a_normal_does():
    q, prior = projected(), DiagNormal(torch.zeros(5), torch.zeros(5))
    far = ProjectedNormal(
        torch.cat([q.loc[:, :3], 7 * q.loc[:, 3:]], 1), torch.cat([q.logvar[:, :3], q.logvar[:, 3:] + 2 * math.log(7)], 1)
    )
    torch.testing.assert_close(far.kl_per_dimension(prior), q.kl_per_dimension(prior))
    torch.testing.assert_close(q.kl_per_dimension(prior)[:, :3], DiagNormal(q.loc, q.logvar).kl_per_dimension(prior)[:, :3])
    assert (q.kl_per_dimension(prior)[:, 3:].sum(1) < DiagNormal(q.loc, q.logvar).kl_per_dimension(prior)[:, 3:].sum(1)).all()


def test_it_stays_what_it_is_in_another_shape():
    q = projected()
    for other in (q.unsqueeze(0), q.expand(torch.Size([3, 6])), q.detach()):
        assert isinstance(other, ProjectedNormal)
        torch.testing.assert_close(other.log_prob(q.mean).expand(3, 6)[0], q.log_prob(q.mean))
