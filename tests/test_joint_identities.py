"""Joint objectives where everything is known: linear-Gaussian modalities, whose exact posterior is the product with the prior expert."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from linear_gaussian import JointLinearGaussian, sigma_points

from mmvae.aggregation import mixture, moe, mopoe, poe
from mmvae.distributions import DiagNormal, kl
from mmvae.objectives import OBJECTIVES, capacity, dreg, elbo, iwae, jmvae, log_importance, mmvm, mvae, mvtcae
from mmvae.terms import Terms

TWO, THREE = ("image", "text"), ("image", "text", "sound")
exact_poe = partial(poe, prior_expert=True)
CASES = {
    "elbo of a product": (elbo, exact_poe),
    "elbo of a geometric mean": (elbo, partial(poe, pooling="geometric", prior_expert=True)),
    "elbo of mopoe": (elbo, mopoe),
    "elbo of mopoe's components": (partial(elbo, divergence="components", free_bits=0.5), mopoe),
    "capacity of a product": (partial(capacity, nats=2.0), exact_poe),
    "iwae of moe": (iwae, moe),
    "iwae looser": (partial(iwae, looser=True), moe),
    "dreg of mopoe": (dreg, mopoe),
    "dreg looser": (partial(dreg, looser=True), moe),
    "mvae": (partial(mvae, free_bits=0.2), partial(mopoe, prior_expert=True)),
    "mvtcae": (mvtcae, exact_poe),
    "mmvm": (partial(mmvm, prior_weight=0.3), moe),
    "mmvm pairwise": (partial(mmvm, regularizer="pairwise"), moe),
    "jmvae": (jmvae, exact_poe),
}


def test_every_objective_is_tried():
    assert {getattr(objective, "func", objective) for objective, _ in CASES.values()} == set(OBJECTIVES.values())


def noise_of(members, samples: int, dim: int):
    """(S, K, B, D), which depends on the modalities of a component and not on its place: the same in every model that has it."""
    found = torch.empty(samples, *members.shape[:2], dim, dtype=torch.float64)
    for k, row in [(k, row) for k in range(len(members)) for row in range(members.shape[1])]:
        code = "".join("01"[is_in] for is_in in members[k, row].tolist())
        found[:, k, row] = torch.randn(samples, dim, generator=torch.Generator().manual_seed(int(code, 2) * 100 + row), dtype=torch.float64)
    return found


def terms_of(model, x, visible, aggregation, noise=None, present=None, columns=None, samples=4):
    """Terms as a joint model makes them. ``columns``: the places of its modalities among THREE, on which the noise depends."""
    q = aggregation(model.experts(x), visible, model.prior)
    if noise is None:
        columns = list(range(len(model.names))) if columns is None else columns
        placed = torch.zeros(*q.members.shape[:2], 3, dtype=torch.bool)
        placed[..., columns] = q.members
        noise = noise_of(placed, samples, model.latent_dim)
    z = q.mixture.stratified(len(noise), noise)
    return Terms(z, model.log_px(z, x, visible if present is None else present), q, model.prior)


def seen(*rows: str):
    return torch.tensor([[c == "1" for c in row] for row in rows])


@pytest.mark.parametrize("names", [("image",), TWO, THREE])
@pytest.mark.parametrize("samples", [1, 5])
def test_with_the_exact_posterior_every_importance_weight_is_the_likelihood(names, samples):
    model = JointLinearGaussian(names)
    x, visible = model.rows(), torch.rand(6, len(names)) < 0.6
    visible[:, 0] |= ~visible.any(1)
    t = terms_of(model, x, visible, exact_poe, torch.randn(samples, 1, 6, 3, dtype=torch.float64))
    exact = model.log_marginal(x, visible)
    torch.testing.assert_close(log_importance(t), exact.expand(samples, 6))
    for objective in (iwae, dreg, partial(iwae, looser=True), partial(dreg, looser=True)):
        torch.testing.assert_close(objective(t), exact)


def test_with_the_exact_posterior_the_elbo_is_the_likelihood():
    model = JointLinearGaussian(THREE)
    x, visible = model.rows(4), seen("111", "101", "010", "001")
    t = terms_of(model, x, visible, exact_poe, sigma_points(3).expand(-1, -1, 4, -1))
    torch.testing.assert_close(elbo(t), model.log_marginal(x, visible))
    torch.testing.assert_close(elbo(t, divergence="components"), elbo(t))


def test_with_an_inexact_posterior_the_elbo_falls_short_by_the_divergence():
    wrong, right = JointLinearGaussian(TWO, error=1.0), JointLinearGaussian(TWO)
    x, visible = wrong.rows(3), seen("11", "10", "01")
    t = terms_of(wrong, x, visible, exact_poe, sigma_points(3).expand(-1, -1, 3, -1))
    exact = exact_poe(right.experts(x), visible, right.prior).mixture.components
    gap = kl(t.q.mixture.components, exact)[0]
    assert gap.min() > 0.1
    torch.testing.assert_close(elbo(t) + gap, right.log_marginal(x, visible))


def test_a_modality_that_is_scored_but_not_seen_has_its_conditional_likelihood():
    """log p(x_seen, x_hidden) from q(z|x_seen): the bound falls short by the divergence between the two posteriors."""
    model = JointLinearGaussian(TWO)
    x, visible, present = model.rows(2), seen("10", "01"), seen("11", "11")
    t = terms_of(model, x, visible, exact_poe, sigma_points(3).expand(-1, -1, 2, -1), present)
    gap = kl(t.q.mixture.components, exact_poe(model.experts(x), present, model.prior).mixture.components)[0]
    torch.testing.assert_close(elbo(t) + gap, model.log_marginal(x, present))


def test_mvae_of_exact_posteriors_is_the_sum_of_the_likelihoods_of_its_subsets():
    model = JointLinearGaussian(TWO)
    x, visible = model.rows(3), seen("11", "10", "01")
    t = terms_of(model, x, visible, partial(mopoe, prior_expert=True), sigma_points(3).expand(-1, 3, 3, -1))
    alone = [model.log_marginal(x, seen(code, code, code)) for code in ("10", "01")]
    joint = model.log_marginal(x, seen("11", "11", "11"))
    torch.testing.assert_close(mvae(t), torch.stack([joint[0] + alone[0][0] + alone[1][0], alone[0][1], alone[1][2]]))


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_objectives_that_reduce_to_the_elbo(error):
    model = JointLinearGaussian(THREE, error=error)
    x, visible = model.rows(4), seen("111", "101", "010", "000")
    full = partial(mixture, subsets=[list(THREE)], prior_expert=True)
    t = terms_of(model, x, visible, full)
    private = {name: torch.where(visible[:, m], torch.randn(4, 1, 4), 0.0).double() for m, name in enumerate(THREE)}
    for terms in (t, replace(t, private=private), replace(t, scales={"text": 3.0})):
        for beta in (1.0, 0.4):
            expected = elbo(terms, beta)
            for objective in (mvae, partial(mvtcae, alpha=0.0), partial(jmvae, alpha=0.0), partial(elbo, divergence="components")):
                torch.testing.assert_close(objective(terms, beta), expected)
        torch.testing.assert_close(mvae(terms, 0.4, free_bits=0.7), elbo(terms, 0.4, free_bits=0.7))
        torch.testing.assert_close(jmvae(terms, 0.4, 0.0, free_bits=5.0, free_bits_per="row"), elbo(terms, 0.4, 5.0, "row"))


def test_mvtcae_and_jmvae_by_hand():
    model = JointLinearGaussian(THREE, error=1.0)
    x, visible = model.rows(2), seen("111", "101")
    t = terms_of(model, x, visible, exact_poe)
    q, log_px = t.q.mixture.components, t.likelihood().mean((0, 1))
    aligned = [sum(kl(q, t.q.experts[THREE[m]])[0, row] for m in members) for row, members in enumerate(((0, 1, 2), (0, 2)))]
    aligned, n, to_prior = torch.stack(aligned), torch.tensor([3.0, 2.0]), kl(q, model.prior)[0]
    expected = (n - 0.8) / n * log_px - 0.5 * (0.2 * to_prior + 0.8 / n * aligned)
    torch.testing.assert_close(mvtcae(t, 0.5, alpha=0.8), expected)
    torch.testing.assert_close(jmvae(t, 0.5, alpha=0.3), log_px - 0.5 * to_prior - 0.3 * aligned)
    private = {"text": torch.randn(4, 1, 2).double()}
    for objective in (mvtcae, jmvae):
        more = objective(replace(t, private=private), 0.5) - objective(t, 0.5)
        torch.testing.assert_close(more, 0.5 * private["text"].mean((0, 1)))


def test_mmvm_by_hand():
    model = JointLinearGaussian(THREE, error=1.0)
    x, visible = model.rows(2), seen("111", "101")
    t = terms_of(model, x, visible, moe)
    private = {name: torch.randn(4, 3, 2).double() for name in THREE}
    for regularizer in ("mixture", "pairwise"):
        for row, here in ((0, [0, 1, 2]), (1, [0, 2])):
            experts = [DiagNormal(q.loc[row], q.logvar[row]) for q in t.q.experts.values()]
            expected = 0.0
            for m in here:
                z = t.z[:, m, row]
                log_q = torch.stack([experts[other].log_prob(z) for other in here]) - torch.tensor(len(here)).log()
                pairwise = sum(kl(experts[m], experts[other]) for other in here) / len(here)
                gap = (experts[m].log_prob(z) - log_q.logsumexp(0)).mean() if regularizer == "mixture" else pairwise
                score = (t.log_px[THREE[m]] + 0.6 * private[THREE[m]])[:, m, row].mean()
                expected = expected + score - 0.6 * (gap + 0.2 * kl(experts[m], model.prior))
            value = mmvm(replace(t, private=private), 0.6, prior_weight=0.2, regularizer=regularizer)[row]
            torch.testing.assert_close(value, expected)


def test_mmvm_of_one_modality_has_no_divergence_but_that_from_the_prior():
    model = JointLinearGaussian(("image",), error=1.0)
    x, visible = model.rows(), torch.ones(6, 1, dtype=torch.bool)
    t = terms_of(model, x, visible, moe)
    for regularizer in ("mixture", "pairwise"):
        torch.testing.assert_close(mmvm(t, regularizer=regularizer), t.likelihood().mean((0, 1)))
        torch.testing.assert_close(mmvm(t, 0.7, 1.0, regularizer), elbo(t, 0.7))


def test_bounds_are_ordered():
    model = JointLinearGaussian(THREE, error=1.0)
    x, visible = model.rows(3), seen("111", "101", "010")
    for aggregation in (moe, mopoe):
        count = len(aggregation(model.experts(x), visible, model.prior).members)
        t = terms_of(model, x, visible, aggregation, torch.randn(4000, count, 3, 3, dtype=torch.float64))
        exact, mixed = model.log_marginal(x, visible), elbo(t)
        components, looser, tight = elbo(t, divergence="components"), iwae(t, looser=True), iwae(t)
        assert (components[:2] < mixed[:2] - 0.05).all()  # the divergence of a mixture is at most the mean of its components'
        torch.testing.assert_close(components[2:], mixed[2:], atol=0.3, rtol=0)
        assert (mixed < tight).all()
        assert (looser <= tight + 1e-9).all()
        torch.testing.assert_close(tight, exact, atol=0.1, rtol=0)
        assert (mmvm(t) >= mmvm(t, regularizer="pairwise")).all() if aggregation is moe else True


def result(model, objective, t):
    """The value of every row, and the gradients of everything that was learned, by modality."""
    value = objective(t, 0.7)
    leaves = [model.shift, model.widen, *model.weight.values()]
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return value, [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]


@pytest.mark.parametrize("case", CASES)
def test_hiding_a_modality_equals_never_having_had_it(case):
    objective, aggregation = CASES[case]
    more, fewer = JointLinearGaussian(THREE, error=1.0), JointLinearGaussian(TWO, error=1.0)
    x, visible = more.rows(3), seen("110", "100", "010")
    value, grads = result(more, objective, terms_of(more, x, visible, aggregation))
    expected, right = result(fewer, objective, terms_of(fewer, x, visible[:, :2], aggregation, columns=[0, 1]))
    torch.testing.assert_close(value, expected)
    for grad, other in zip(grads[:2], right[:2]):
        torch.testing.assert_close(grad[:2], other)
        assert not grad[2].any()
    for grad, other in zip(grads[2:], right[2:]):
        torch.testing.assert_close(grad, other)
    assert not grads[4].any()


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_modalities_changes_nothing(case):
    objective, aggregation = CASES[case]
    model, turned = JointLinearGaussian(THREE, error=1.0), JointLinearGaussian(THREE, error=1.0)
    order = [2, 0, 1]
    turned.names = tuple(THREE[m] for m in order)
    x, visible = model.rows(4), seen("111", "101", "010", "110")
    value, grads = result(model, objective, terms_of(model, x, visible, aggregation))
    other, right = result(turned, objective, terms_of(turned, x, visible[:, order], aggregation, columns=order))
    torch.testing.assert_close(value, other)
    for grad, expected in zip(grads[2:], right[2:]):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_row_does_not_depend_on_the_rows_beside_it(case):
    objective, aggregation = CASES[case]
    model = JointLinearGaussian(THREE, error=1.0)
    x, visible = model.rows(4), seen("111", "101", "010", "000")
    t = terms_of(model, x, visible, aggregation)
    whole = objective(t, 0.7)
    assert whole.isfinite().all()
    noise = torch.randn(4, *t.z.shape[1:], dtype=torch.float64)
    whole = objective(terms_of(model, x, visible, aggregation, noise), 0.7)
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in x.items()}
        part = objective(terms_of(model, one, visible[row : row + 1], aggregation, noise[:, :, row : row + 1]), 0.7)
        torch.testing.assert_close(part, whole[row : row + 1])


def test_absurd_inputs_that_are_not_visible_reach_no_objective():
    """Neither the value nor a gradient of what is there depends on what absent encoders say."""
    for objective, aggregation in CASES.values():
        found = []
        for absurd in (0.0, 1e30):
            model = JointLinearGaussian(THREE, error=1.0)
            x, visible = model.rows(2), seen("110", "100")
            x["sound"][:], x["text"][1] = absurd, -absurd
            found.append(result(model, objective, terms_of(model, x, visible, aggregation)))
        torch.testing.assert_close(*found)


SUMS = [case for case in CASES if CASES[case][1] is not exact_poe and case not in ("iwae of moe", "dreg of mopoe")]


@pytest.mark.parametrize("case", SUMS)
def test_one_drawn_component_gives_the_objective_in_expectation(case):
    """Every component drawn as often as it weighs: the mean over draws is exact where the objective is a sum over components."""
    objective, aggregation = CASES[case]
    model = JointLinearGaussian(THREE, error=1.0)
    x, visible = model.rows(2), seen("111", "101")
    t = terms_of(model, x, visible, aggregation)
    draws = 21 if len(t.q.members) == 7 else 6  # a multiple of the components present in either row: 7 and 3, or 3 and 2
    index = t.q.draw(((torch.arange(draws) + 0.5) / draws).double().unsqueeze(1).expand(-1, 2))
    drawn = []
    for k in index:
        log_px = {name: value[:, k, torch.arange(2)].unsqueeze(1) for name, value in t.log_px.items()}
        components, members = t.q.at(k)
        held = {"log_weights": torch.zeros(1, 2), "members": members, "components": components}
        drawn.append(objective(Terms(t.z[:, k, torch.arange(2)].unsqueeze(1), log_px, t.q, t.prior, **held), 0.7))
    torch.testing.assert_close(torch.stack(drawn).mean(0), objective(t, 0.7))
    if "looser" in case:
        return
    one = terms_of(model, x, visible, aggregation, samples=1)  # now every sample draws its own component, all of them in one Terms
    components, members = one.q.at(index)
    log_px = {name: value[0, index, torch.arange(2)].unsqueeze(1) for name, value in one.log_px.items()}
    held = {"log_weights": torch.zeros(1, 2), "members": members, "components": components}
    every_draw = Terms(one.z[0, index, torch.arange(2)].unsqueeze(1), log_px, one.q, one.prior, **held)
    torch.testing.assert_close(objective(every_draw, 0.7), objective(one, 0.7))


def test_objectives_say_which_posterior_they_need():
    model = JointLinearGaussian(THREE)
    x, visible = model.rows(2), seen("111", "101")
    for objective in (mvtcae, jmvae):
        with pytest.raises(ValueError, match=f"{objective.__name__}: received a posterior of 3 components, expected one"):
            objective(terms_of(model, x, visible, moe))
    with pytest.raises(ValueError, match=r"mmvm: received 7 components of 3 modalities, expected one each \(aggregation 'moe'\)"):
        mmvm(terms_of(model, x, visible, mopoe))
    t = terms_of(model, x, visible, moe)
    with pytest.raises(ValueError, match="regularizer: received 'jsd', expected 'mixture' or 'pairwise'"):
        mmvm(t, regularizer="jsd")
    with pytest.raises(ValueError, match="divergence: received 'upper', expected 'mixture' or 'components'"):
        elbo(t, divergence="upper")
    one = replace(t, z=t.z[:, :1], log_weights=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="components: received None for z of 1 of 3 components, expected those that z was drawn from"):
        elbo(one, divergence="components")
