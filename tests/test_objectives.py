"""Objectives: with the exact posterior every bound is log p(x); otherwise they are ordered, and gradients are what they claim."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from linear_gaussian import linear_gaussian

from mmvae.aggregation import Posterior, alone
from mmvae.distributions import DiagNormal, GaussianMixture, kl
from mmvae.objectives import OBJECTIVES, capacity, dreg, elbo, iwae, log_importance
from mmvae.terms import Terms, free_bits, kl_to_prior

SAMPLED = {"sample_posterior": True}


def bound(objective, exact: bool, num_samples: int, beta: float = 1.0):
    model, x = linear_gaussian(exact)
    return model, x, model(x, objective=objective, num_samples=num_samples, beta=beta, **SAMPLED)


@pytest.mark.parametrize("num_samples", [1, 2, 17])
@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_importance_weighted_bounds_are_exact_with_the_exact_posterior(name, num_samples):
    model, x, out = bound(OBJECTIVES[name], True, num_samples)
    torch.testing.assert_close(-out.loss_rows, model.exact_log_marginal(x))


def test_elbo_is_exact_with_the_exact_posterior():
    model, x, _ = bound(elbo, True, 1)
    out = model(x, num_samples=200_000, **SAMPLED)
    torch.testing.assert_close(out.elbo, model.exact_log_marginal(x), atol=0.03, rtol=0)
    torch.testing.assert_close(out.elbo, -out.loss_rows)


def test_elbo_falls_short_by_the_divergence_from_the_exact_posterior():
    model, x, _ = bound(elbo, False, 1)
    exact, _ = linear_gaussian(True)
    gap = kl(model.encode(values=x), exact.encode(values=x))
    out = model(x, num_samples=200_000, **SAMPLED)
    assert gap.min() > 0.1
    torch.testing.assert_close(out.elbo + gap, model.exact_log_marginal(x), atol=0.03, rtol=0)


def test_capacity_is_the_elbo_about_the_capacity():
    given = terms()
    below, above = kl_to_prior(given).min().item() - 1, kl_to_prior(given).max().item() + 1
    reached, short = capacity(given, nats=below, strength=3.0), capacity(given, nats=above, strength=3.0)
    torch.testing.assert_close(reached, elbo(given, beta=3.0) + 3 * below)  # more than the capacity: a weight on what is over it
    torch.testing.assert_close(short, elbo(given, beta=-3.0) - 3 * above)  # less: a reward for more
    torch.testing.assert_close(capacity(given, beta=0.25, nats=4 * below, strength=3.0), reached)  # the schedule opens it


def test_what_is_maximised_beside_the_objective_is_part_of_the_loss_alone():
    model, x = linear_gaussian(True)
    q = model.posterior(values=x)
    made = model.terms(q, {"values": x}, 3, None)
    plain, more = (model.weigh(each, 1.0, elbo) for each in (made, replace(made, auxiliary=torch.full((3, 1, len(x)), 2.5))))
    torch.testing.assert_close(more.loss_rows, plain.loss_rows - 2.5)
    torch.testing.assert_close(more.loss, plain.loss - 2.5)
    assert torch.equal(more.elbo, plain.elbo)
    torch.testing.assert_close(log_importance(replace(made, auxiliary=torch.ones(3, 1, len(x)))), log_importance(made))


def test_iwae_rises_with_the_number_of_samples():
    values = []
    for num_samples in (1, 2, 4, 16, 64):
        model, x, _ = bound(iwae, False, 1)
        copies = x.repeat_interleave(2000, 0)
        values.append(-model(copies, objective=iwae, num_samples=num_samples, **SAMPLED).loss.item())
    exact = model.exact_log_marginal(x).mean().item()
    assert values == sorted(values)
    assert values[0] < values[-1] - 0.05
    assert exact - 0.04 < values[-1] < exact + 0.04


def test_iwae_with_one_sample_is_the_sampled_elbo():
    for beta in (1.0, 0.3):
        torch.manual_seed(0)
        model, x, out = bound(iwae, False, 1, beta)
        q, p, z = model.encode(values=x), model.prior(), out.latents
        expected = out.log_px - beta * (q.log_prob(z) - p.log_prob(z))
        torch.testing.assert_close(-out.loss_rows, expected)


def gradients(objective, exact: bool, num_samples: int, rows: int):
    torch.manual_seed(0)
    model, x = linear_gaussian(exact)
    copies = x[:1].expand(rows, -1)
    out = model(copies, objective=objective, num_samples=num_samples, **SAMPLED)
    names = [name for name, _ in model.named_parameters()]
    return out.loss.detach(), dict(zip(names, torch.autograd.grad(out.loss, list(model.parameters()))))


def test_dreg_has_the_value_of_iwae_and_its_decoder_gradient():
    for rows, num_samples in ((1, 1), (5, 1), (5, 8)):
        (loss, grads), (value, reference) = (gradients(objective, False, num_samples, rows) for objective in (dreg, iwae))
        torch.testing.assert_close(loss, value)
        for name in ("weight", "bias"):
            torch.testing.assert_close(grads[name], reference[name])
        assert not torch.allclose(grads["shift"], reference["shift"])


def test_dreg_has_the_encoder_gradient_of_iwae_in_expectation_with_less_variance():
    (_, grads), (_, reference) = (gradients(objective, False, 4, 20_000) for objective in (dreg, iwae))
    for name in ("shift", "widen"):
        torch.testing.assert_close(grads[name], reference[name], atol=0.01, rtol=0.05)
    spread = [torch.stack([g(objective) for _ in range(60)]).var(0).sum() for objective, g in ((dreg, one_row), (iwae, one_row))]
    assert spread[0] < spread[1]


def one_row(objective):
    model, x = linear_gaussian(False)
    return torch.autograd.grad(model(x, objective=objective, num_samples=8, **SAMPLED).loss, model.shift)[0]


def mixture_gradients(objective, copies: int, samples: int, beta: float, components: int = 2, seed: int = 0):
    """Value and gradients of q's parameters (2K,) and of a decoder's (1,), of a mean over ``copies`` of one row in one dimension."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.linspace(-0.6, 0.8, components, dtype=torch.float64).requires_grad_()
    logvar = torch.linspace(-1.0, 0.5, components, dtype=torch.float64).requires_grad_()
    decoder = torch.tensor([1.3], dtype=torch.float64).requires_grad_()
    q = DiagNormal(*(v[:, None, None].expand(-1, copies, 1) for v in (loc, logvar)))
    members = torch.ones(components, copies, 1, dtype=torch.bool)
    posterior = Posterior(GaussianMixture(q, torch.zeros(components, copies, dtype=torch.float64)), {}, members[0], members)
    z = posterior.mixture.stratified(samples, torch.randn(samples, components, copies, 1, generator=generator, dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.float64)
    log_px = DiagNormal(decoder * z, zero - 1).log_prob(torch.tensor([1.0], dtype=torch.float64))
    value = objective(Terms(z, {"a": log_px}, posterior, DiagNormal(zero, zero)), beta).mean()
    gradients = torch.autograd.grad(value, (loc, logvar, decoder))
    return value.detach(), torch.cat(gradients[:2]), gradients[2]


@pytest.mark.parametrize("beta", [1.0, 0.3, 2.0])
def test_dreg_has_the_encoder_gradient_of_iwae_in_expectation_for_every_beta(beta):
    _, grads, _ = mixture_gradients(dreg, 100_000, 4, beta, components=1)
    _, reference, _ = mixture_gradients(iwae, 100_000, 4, beta, components=1, seed=1)
    torch.testing.assert_close(grads, reference, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(("samples", "beta"), [(1, 1.0), (1, 0.3), (6, 1.0), (6, 0.3)])
def test_looser_dreg_has_the_value_and_the_decoder_gradient_of_looser_iwae(samples, beta):
    looser = partial(dreg, looser=True), partial(iwae, looser=True)
    (value, grads, decoder), (expected, reference, right) = (mixture_gradients(f, 100, samples, beta) for f in looser)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(decoder, right)
    assert not torch.allclose(grads, reference)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_looser_dreg_has_the_encoder_gradient_of_looser_iwae_in_expectation_with_one_sample(beta):
    _, grads, _ = mixture_gradients(partial(dreg, looser=True), 200_000, 1, beta)
    _, reference, _ = mixture_gradients(partial(iwae, looser=True), 200_000, 1, beta, seed=1)
    torch.testing.assert_close(grads, reference, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("objective", [iwae, dreg])
def test_looser_of_one_component_is_the_bound_itself(objective):
    for samples in (1, 5):
        found = [mixture_gradients(partial(objective, looser=looser), 20, samples, 0.6, components=1) for looser in (True, False)]
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected)


def test_looser_is_the_mean_of_the_components_bounds():
    t = terms(components=3, samples=5)
    each = (t.likelihood() + 0.7 * t.log_ratio()).logsumexp(0) - math.log(5)
    expected = (t.q.mixture.log_weights.exp() * each).sum(0)
    torch.testing.assert_close(iwae(t, 0.7, looser=True), expected)
    assert (expected < iwae(t, 0.7)).all()


def test_dreg_leaves_an_exact_encoder_alone():
    _, grads = gradients(dreg, True, 8, 5)
    _, reference = gradients(iwae, True, 8, 5)
    for name in ("shift", "widen"):
        assert grads[name].abs().max() < 1e-6
        assert reference[name].abs().max() > 1e-3  # the score term that dreg is free of


def terms(rows: int = 4, samples: int = 3, components: int = 1, prior=None) -> Terms:
    q = DiagNormal(torch.randn(components, rows, 2), torch.randn(components, rows, 2))
    seen = torch.ones(components, rows, 1, dtype=torch.bool)
    posterior = Posterior(GaussianMixture(q, torch.randn(components, rows)), {}, seen[0], seen)
    z = posterior.mixture.stratified(samples)
    log_px = {"a": torch.randn(samples, components, rows), "b": torch.randn(samples, components, rows)}
    return Terms(z, log_px, posterior, prior or DiagNormal(torch.zeros(2), torch.zeros(2)))


def test_elbo_of_a_mixture_weighs_its_components():
    t = terms(components=3, samples=5)
    w = t.q.mixture.log_weights.exp()
    torch.testing.assert_close(w.sum(0), torch.ones(4))
    log_px = t.log_px["a"] + t.log_px["b"]
    expected = (w * (log_px - 0.7 * (t.q.mixture.log_prob(t.z) - t.prior.log_prob(t.z)))).sum(1).mean(0)
    torch.testing.assert_close(elbo(t, 0.7), expected)


def test_an_absent_component_does_not_count():
    for objective in (elbo, iwae, dreg):
        t = terms(components=3)
        logits = t.q.mixture.log_weights.clone()
        logits[1] = -math.inf
        t.log_px["a"][:, 1] = 1e6
        keep = [0, 2]
        q = t.q.mixture.components
        with_, without = (
            Terms(t.z[:, k], {n: v[:, k] for n, v in t.log_px.items()}, make_posterior(q.loc[k], q.logvar[k], logits[k]), t.prior)
            for k in ([0, 1, 2], keep)
        )
        torch.testing.assert_close(objective(with_, 1.0), objective(without, 1.0))


def make_posterior(loc, logvar, logits) -> Posterior:
    seen = torch.ones(*loc.shape[:2], 1, dtype=torch.bool)
    return Posterior(GaussianMixture(DiagNormal(loc, logvar), logits), {}, seen[0], seen)


def test_a_mixture_of_equal_components_is_one_component():
    loc, logvar = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    noise, log_px = torch.randn(6, 1, 4, 2), torch.randn(6, 1, 4)
    bounds = []
    for copies in (1, 3):
        q = make_posterior(loc.expand(copies, 4, 2), logvar.expand(copies, 4, 2), torch.zeros(copies, 4))
        z = q.mixture.stratified(6, noise.expand(6, copies, 4, 2))
        t = Terms(z, {"a": log_px.expand(6, copies, 4)}, q, DiagNormal(torch.zeros(2), torch.zeros(2)))
        bounds.append(torch.stack([iwae(t), -kl_to_prior(t).mean((0, 1)) if copies > 1 else t.log_ratio().mean((0, 1))]))
    torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("objective", [iwae, dreg])
def test_looser_takes_all_components_where_there_are_several_samples(objective):
    t = terms(components=1)
    components = t.q.mixture.components
    drawn = replace(t, components=components.expand((len(t.z), *components.batch_shape)))
    with pytest.raises(ValueError, match="looser: received True with one component drawn for each of"):
        objective(drawn, looser=True)
    objective(drawn)


def test_scales_weigh_the_likelihoods():
    t = terms(components=2)
    weighed = replace(t, log_px={"a": 2.5 * t.log_px["a"], "b": t.log_px["b"]})
    for objective in (elbo, iwae, partial(iwae, looser=True), dreg):
        torch.testing.assert_close(objective(replace(t, scales={"a": 2.5}), 0.7), objective(weighed, 0.7))
        assert not torch.allclose(objective(weighed, 0.7), objective(t, 0.7))
    torch.testing.assert_close(log_importance(replace(t, scales={"a": 2.5})), log_importance(weighed))


def test_free_bits_of_components_fall_into_dimensions():
    t = terms(components=3)
    q = t.q.mixture.components
    each = (0.5 * (q.logvar.exp() + q.loc**2 - 1 - q.logvar)).clamp_min(0.8).sum(-1)
    expected = (t.q.mixture.log_weights.exp() * (t.likelihood().mean(0) - 0.5 * each)).sum(0)
    torch.testing.assert_close(elbo(t, 0.5, free_bits=0.8, divergence="components"), expected)
    with pytest.raises(ValueError, match="free_bits_per: received 'dimension' with a mixture"):
        elbo(t, free_bits=0.8)
    mixed = replace(t, prior=GaussianMixture(DiagNormal(torch.randn(2, 1, 2), torch.zeros(2, 1, 2)), torch.zeros(2, 1)))
    torch.testing.assert_close(kl_to_prior(mixed, divergence="components"), q.log_prob(t.z) - mixed.prior.log_prob(t.z))


def test_private_latents_count_in_every_objective():
    t = terms()
    private = torch.randn(3, 1, 4)
    more = Terms(t.z, t.log_px, t.q, t.prior, {"w": private})
    torch.testing.assert_close(elbo(more, 0.5), elbo(t, 0.5) + 0.5 * private.sum(1).mean(0))
    expected = (t.likelihood() + t.log_ratio() + private).sum(1).logsumexp(0) - math.log(3)
    torch.testing.assert_close(iwae(more), expected)


@pytest.mark.parametrize("objective", [elbo, iwae, dreg])
def test_a_latent_component_is_bounded_by_the_enumerated_likelihood(objective):
    """log p(x) = log sum_k p(k) p(x|k), with q(z|k) = p(z): exact for q(k) = p(k|x), and never exceeded by the elbo."""
    log_px, log_pk = torch.randn(1, 3, 4), torch.randn(3, 4).log_softmax(0)
    exact = (log_px[0] + log_pk).logsumexp(0)
    for log_qk in ((log_px[0] + log_pk).log_softmax(0), torch.randn(3, 4).log_softmax(0), (9 * torch.randn(3, 4)).log_softmax(0)):
        log_qk.requires_grad_()
        q = make_posterior(torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), log_qk)
        z = q.mixture.stratified(1)
        value = objective(Terms(z, {"a": log_px}, q, DiagNormal(torch.zeros(2), torch.zeros(2)), log_pk=log_pk))
        assert (value <= exact + 1e-5).all()
        if objective is not elbo or torch.allclose(log_qk, (log_px[0] + log_pk).log_softmax(0)):
            torch.testing.assert_close(value, exact)
        value.sum().backward()
        assert log_qk.grad is None or log_qk.grad.isfinite().all()


def test_one_drawn_component_has_the_bound_of_all_in_expectation():
    q = make_posterior(torch.randn(3, 1, 2), torch.randn(3, 1, 2), torch.randn(3, 1))
    prior, samples = DiagNormal(torch.zeros(2), torch.zeros(2)), 300_000
    every, drawn = q.mixture.stratified(samples), q.mixture.sample((samples,)).unsqueeze(1)
    for objective in (elbo, iwae):
        values = [
            objective(Terms(z, {"a": -(z - 0.3).square().sum(-1)}, q, prior, log_weights=weights))
            for z, weights in ((every, None), (drawn, torch.zeros(1, 1)))
        ]
        torch.testing.assert_close(*values, atol=0.05, rtol=0)
    t = Terms(drawn.requires_grad_(), {"a": -drawn.square().sum(-1)}, q, prior, log_weights=torch.zeros(1, 1))
    torch.testing.assert_close(dreg(t), iwae(t))


def test_free_bits_per_dimension_unit_row_and_batch():
    kl_ = torch.tensor([[0.1, 0.5], [0.3, 0.0]], requires_grad=True)  # (B, D)
    assert torch.equal(free_bits(kl_, 0.2), torch.tensor([[0.2, 0.5], [0.3, 0.2]]))
    assert torch.equal(torch.autograd.grad(free_bits(kl_, 0.2).sum(), kl_)[0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert torch.equal(free_bits(kl_, 0.22, "unit"), torch.tensor([[0.22, 0.5], [0.22, 0.0]]))  # means over rows: .2 and .25
    assert torch.equal(torch.autograd.grad(free_bits(kl_, 0.22, "unit").sum(), kl_)[0], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    rows = torch.tensor([0.1, 0.5], requires_grad=True)  # (B,)
    assert torch.equal(free_bits(rows, 0.2, "row"), torch.tensor([0.2, 0.5]))
    assert torch.equal(torch.autograd.grad(free_bits(rows, 0.2, "row").sum(), rows)[0], torch.tensor([0.0, 1.0]))
    assert torch.equal(free_bits(rows, 0.2, "batch"), rows)
    assert torch.equal(free_bits(rows, 0.4, "batch"), torch.tensor([0.4, 0.4]))
    assert not torch.autograd.grad(free_bits(rows, 0.4, "batch").sum(), rows)[0].any()
    with pytest.raises(ValueError, match="free_bits_per: received 'word', expected 'dimension', 'unit', 'row' or 'batch'"):
        free_bits(rows, 0.4, "word")


def test_free_bits_of_a_mean_are_those_of_the_rows_that_have_the_component():
    kl_, here = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[False, True], [True, True]])  # (K, B)
    assert torch.equal(free_bits(kl_, 2.0, "batch", here), torch.tensor([[0.0, 3.0], [2.0, 2.0]]))
    likely = torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # of two classes, whose rows differ: .3 and 1 in the mean
    assert torch.equal(free_bits(kl_, 0.5, "batch", likely), torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    per_unit = kl_.unsqueeze(-1)
    assert torch.equal(free_bits(per_unit, 2.0, "unit", here), torch.tensor([[0.0, 3.0], [2.0, 2.0]]).unsqueeze(-1))
    t = terms(components=3)
    assert torch.equal(elbo(t, free_bits={"row": 0.0, "unit": 0.0}), elbo(t))  # off, also where the divergence has no dimensions


def test_free_bits_of_a_row_hold_for_every_component_that_a_sample_drew():
    """Drawn for every sample, or decoded one after the other: the same floors."""
    t = terms(components=3)
    t = replace(t, prior=GaussianMixture(t.q.mixture.components, t.q.mixture.log_weights))  # no closed form
    index = torch.arange(3).unsqueeze(1).expand(3, t.z.shape[2])
    components, members = t.q.at(index)
    rows = torch.arange(t.z.shape[2])
    z = t.z[0][index, rows].unsqueeze(1)  # sample s is of component s
    log_px = {name: value[0][index, rows].unsqueeze(1) for name, value in t.log_px.items()}
    drawn = Terms(z, log_px, t.q, t.prior, components=components, members=members, log_weights=torch.zeros(1, z.shape[2]))
    one = Terms(t.z[:1], {name: value[:1] for name, value in t.log_px.items()}, t.q, t.prior)
    each = kl_to_prior(drawn, 2.0, "row", "components").squeeze(1)
    torch.testing.assert_close(each, kl_to_prior(one, 2.0, "row", "components").squeeze(0))
    assert each.min() == 2 and each.max() > 2


def test_elbo_with_free_bits():
    t = terms()
    q = t.q.mixture.components
    per_dimension = (0.5 * (q.logvar.exp() + q.loc**2 - 1 - q.logvar)).squeeze(0)
    log_px = t.likelihood().mean((0, 1))
    for per, floor in (
        ("dimension", per_dimension.clamp_min(0.8).sum(1)),
        ("unit", torch.where(per_dimension.mean(0) > 0.8, per_dimension, torch.tensor(0.8)).sum(1)),
        ("row", per_dimension.sum(1).clamp_min(0.8)),
        ("batch", per_dimension.sum(1)),
    ):
        torch.testing.assert_close(elbo(t, 0.5, free_bits=0.8, free_bits_per=per), log_px - 0.5 * floor)
    units = torch.where(per_dimension.mean(0) > 0.8, per_dimension, torch.tensor(0.8)).sum(1)
    for floors in ({"unit": 0.8, "row": 2.0}, {"row": 2.0, "unit": 0.8}):
        torch.testing.assert_close(elbo(t, 0.5, free_bits=floors), log_px - 0.5 * units.clamp_min(2.0))
    torch.testing.assert_close(elbo(t, 0.5, free_bits={"row": 0.8}), elbo(t, 0.5, free_bits=0.8, free_bits_per="row"))
    with pytest.raises(ValueError, match="free_bits_per: received 'word', expected 'dimension'"):
        elbo(t, free_bits={"word": 1.0})
    huge = elbo(t, 1.0, free_bits=100.0, free_bits_per="batch")
    torch.testing.assert_close(huge, log_px - 100.0)
    mixture = terms(prior=GaussianMixture(DiagNormal(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2)), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="free_bits_per: received 'dimension' with a mixture"):
        elbo(mixture, free_bits=0.1)
    assert elbo(mixture, free_bits=0.1, free_bits_per="row").shape == (4,)


def test_a_floor_is_of_the_mean_over_the_samples_where_the_divergence_is_sampled():
    """Each sample's estimate spreads beyond the floor: the mean of floored ones would not tend to the floored divergence."""
    exact = terms(samples=20_000, prior=DiagNormal(torch.full((2,), 0.5), torch.zeros(2)))
    same = GaussianMixture(DiagNormal(torch.full((2, 1, 2), 0.5), torch.zeros(2, 1, 2)), torch.zeros(2, 1))
    divergence, log_px = kl_to_prior(exact)[0, 0], exact.likelihood().mean((0, 1))
    for nats in (divergence.min().item() / 2, 0.9 * divergence.mean().item(), 2 * divergence.max().item()):
        of_batch = divergence if divergence.mean() > nats else torch.full((4,), nats)
        for per, floored in (("row", divergence.clamp_min(nats)), ("batch", of_batch)):
            bound = elbo(replace(exact, prior=same), free_bits=nats, free_bits_per=per)
            torch.testing.assert_close(bound, log_px - floored, atol=0.05, rtol=0)


@pytest.mark.parametrize("per", ["row", "batch"])
def test_a_floor_is_of_the_divergence_of_the_whole_mixture(per):
    """Not of each component's share, of which some are below it where the divergence is not."""
    t = replace(terms(components=3, samples=7), private={"w": torch.randn(7, 3, 4)})
    weights = t.q.mixture.log_weights.exp()
    shares = t.q.mixture.log_prob(t.z) - t.prior.log_prob(t.z)
    divergence = (weights * shares).sum(1).mean(0)
    nats = divergence.min().item() - 1e-3
    assert (shares.mean(0) < nats).any()
    torch.testing.assert_close(elbo(t, free_bits=nats, free_bits_per=per), elbo(t))
    above = elbo(t, free_bits=divergence.max().item() + 1, free_bits_per=per)
    torch.testing.assert_close(above, elbo(t) + divergence - divergence.max() - 1)
    assert kl_to_prior(t, nats, per).shape == (7, 3, 4)


def test_reported_figures_are_those_of_the_plain_bound():
    model, x = linear_gaussian(False)
    for objective in (partial(elbo, free_bits=5.0), iwae, dreg):
        torch.manual_seed(0)
        out = model(x, objective=objective, beta=0.1, num_samples=3, **SAMPLED)
        torch.manual_seed(0)
        plain = model(x, num_samples=3, **SAMPLED)
        torch.testing.assert_close(out.elbo, -plain.loss_rows)
        torch.testing.assert_close(out.elbo, out.log_px - out.kl)
        torch.testing.assert_close(out.kl, kl(model.encode(values=x), model.prior()))


def test_alone_is_a_posterior_of_one_component():
    q = DiagNormal(torch.randn(4, 2), torch.randn(4, 2))
    posterior = alone("image", q)
    assert posterior.mixture.components.batch_shape == (1, 4)
    assert posterior.visible.shape == (4, 1)
    assert posterior.members.shape == (1, 4, 1)
    z = torch.randn(3, 4, 2)
    torch.testing.assert_close(posterior.mixture.log_prob(z), q.log_prob(z))
