"""Aggregations against densities written out by hand; absence, order and neighbours change nothing."""

from itertools import combinations

import pytest
import torch

from mmvae.aggregation import AGGREGATIONS, Posterior, mixture, moe, mopoe, poe, product
from mmvae.distributions import LOGVAR_RANGE, DiagNormal, GaussianMixture

NAMES = ("image", "text", "sound")
STANDARD = DiagNormal(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
OTHER = DiagNormal(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, -0.7], dtype=torch.float64))
SEEN = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
OPTIONS = {
    "poe": [{}, {"prior_expert": True}, {"pooling": "geometric"}, {"prior_expert": True, "pooling": "geometric"}],
    "moe": [{}, {"prior_expert": True}],
    "mopoe": [{}, {"prior_expert": True}, {"pooling": "geometric"}],
    "mixture": [{"subsets": [["image"], ["text", "image"]]}, {"subsets": [["sound"], list(NAMES)], "prior_expert": True}],
}
CASES = [(name, options) for name, each in OPTIONS.items() for options in each]
every = pytest.mark.parametrize(("name", "options"), CASES)


def test_every_aggregation_is_tried():
    assert set(OPTIONS) == set(AGGREGATIONS)


def make(size: int = 4, names=NAMES, dtype=torch.float64) -> dict[str, DiagNormal]:
    return {name: DiagNormal(torch.randn(size, 2, dtype=dtype), torch.randn(size, 2, dtype=dtype)) for name in names}


def points(rows: int = 4) -> torch.Tensor:
    return torch.randn(7, rows, 2, dtype=torch.float64)


def product_log_prob(z, experts: list[DiagNormal], geometric: bool = False):
    """Normalised product of normals on a row, by precisions one after another."""
    precision = sum((-q.logvar).exp() for q in experts)
    loc = sum((-q.logvar).exp() * q.loc for q in experts) / precision
    precision = precision / len(experts) if geometric else precision
    return DiagNormal(loc, -precision.log()).log_prob(z)


def by_hand(z, experts, visible, prior, subsets, prior_expert=False, pooling="product"):
    """Row by row and subset by subset."""
    found = []
    for row, seen in enumerate(visible.tolist()):
        here = [name for name, is_seen in zip(experts, seen) if is_seen]
        wholly = [subset for subset in subsets if set(subset) <= set(here)] or [here]
        values = []
        for subset in wholly:
            members = [DiagNormal(experts[name].loc[row], experts[name].logvar[row]) for name in subset]
            values.append(product_log_prob(z[:, row], members + [prior] * prior_expert, pooling == "geometric"))
        found.append(torch.stack(values).logsumexp(0) - torch.tensor(len(values)).log())
    return torch.stack(found, -1)


def subsets_of(name, options, names=NAMES):
    singles = [[n] for n in names]
    every_one = [list(subset) for size in range(1, len(names) + 1) for subset in combinations(names, size)]
    return {"poe": [list(names)], "moe": singles, "mopoe": every_one}.get(name) or options["subsets"]


@every
@pytest.mark.parametrize("prior", [STANDARD, OTHER])
def test_densities_are_those_written_out_by_hand(name, options, prior):
    experts, z = make(), points()
    q = AGGREGATIONS[name](experts, SEEN, prior, **options)
    rest = {key: value for key, value in options.items() if key != "subsets"}
    torch.testing.assert_close(q.mixture.log_prob(z), by_hand(z, experts, SEEN, prior, subsets_of(name, options), **rest))


def test_poe_is_proportional_to_the_product_of_densities():
    experts, z = make(), points()
    for options, prior in (({}, 0.0), ({"prior_expert": True}, OTHER.log_prob(z))):
        log_q = poe(experts, SEEN, OTHER, **options).mixture.log_prob(z)
        total = prior + sum(torch.where(SEEN[:, m], experts[name].log_prob(z), 0.0) for m, name in enumerate(NAMES))
        torch.testing.assert_close((log_q - total).diff(dim=0), torch.zeros(6, 4, dtype=torch.float64))


def test_mopoe_of_two():
    names = NAMES[:2]
    experts, z, seen = make(names=names), points(), torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    q = mopoe(experts, seen, STANDARD)
    assert q.members[:, 0].tolist() == [[True, False], [False, True], [True, True]]
    torch.testing.assert_close(q.mixture.log_prob(z), by_hand(z, experts, seen, STANDARD, [["image"], ["text"], ["image", "text"]]))


def test_the_geometric_mean_of_equal_experts_is_the_expert():
    one = make(names=["image"])["image"]
    experts, z = dict.fromkeys(NAMES, one), points()
    for aggregation in (poe, mopoe):
        torch.testing.assert_close(aggregation(experts, SEEN, OTHER, pooling="geometric").mixture.log_prob(z), one.log_prob(z))
    sharper = poe(experts, SEEN, OTHER).mixture.components
    torch.testing.assert_close(sharper.logvar[0], one.logvar - SEEN.sum(1, keepdim=True).log())


@every
def test_the_order_of_modalities_changes_nothing(name, options):
    experts, z, order = make(), points(), [2, 0, 1]
    expected = AGGREGATIONS[name](experts, SEEN, OTHER, **options)
    turned = AGGREGATIONS[name]({NAMES[m]: experts[NAMES[m]] for m in order}, SEEN[:, order], OTHER, **options)
    torch.testing.assert_close(turned.mixture.log_prob(z), expected.mixture.log_prob(z))
    torch.testing.assert_close(turned.mixture.mean, expected.mixture.mean)
    assert list(turned.experts) == [NAMES[m] for m in order]


@every
def test_hiding_a_modality_equals_never_having_had_it(name, options):
    experts, z = make(), points()
    seen = torch.ones(4, 3, dtype=torch.bool)
    seen[:, 1] = False
    fewer = {n: experts[n] for n in ("image", "sound")}
    left = {"subsets": [s for s in options["subsets"] if "text" not in s]} if name == "mixture" else {}
    hidden = AGGREGATIONS[name](experts, seen, OTHER, **options)
    never = AGGREGATIONS[name](fewer, seen[:, [0, 2]], OTHER, **{**options, **left})
    torch.testing.assert_close(hidden.mixture.log_prob(z), never.mixture.log_prob(z))


@every
def test_rows_do_not_depend_on_each_other(name, options):
    experts, z = make(), points()
    whole = AGGREGATIONS[name](experts, SEEN, OTHER, **options)
    for row in range(4):
        alone = {n: DiagNormal(q.loc[row : row + 1], q.logvar[row : row + 1]) for n, q in experts.items()}
        one = AGGREGATIONS[name](alone, SEEN[row : row + 1], OTHER, **options)
        torch.testing.assert_close(one.mixture.log_prob(z[:, row : row + 1])[:, 0], whole.mixture.log_prob(z)[:, row])
        assert torch.equal(one.members[:, 0], whole.members[:, row])


@every
def test_with_nothing_visible_the_posterior_is_the_prior(name, options):
    experts, z, seen = make(), points(), SEEN.clone()
    seen[1] = False
    mixed = GaussianMixture(DiagNormal(torch.randn(3, 1, 2), torch.randn(3, 1, 2)), torch.randn(3, 1))
    for prior, stands_in in ((OTHER, OTHER), (mixed, STANDARD)):
        q = AGGREGATIONS[name](experts, seen, prior, **options)
        torch.testing.assert_close(q.mixture.log_prob(z)[:, 1], stands_in.log_prob(z)[:, 1])
        assert q.mixture.log_weights.isfinite().sum(0)[1] == 1
        assert not q.members[:, 1].any()


@every
def test_weights_are_uniform_over_the_components_that_are_present(name, options):
    q = AGGREGATIONS[name](make(), SEEN, OTHER, **options)
    present = q.mixture.log_weights > -torch.inf
    assert torch.equal(present, q.members.any(-1))
    torch.testing.assert_close(q.mixture.log_weights.exp(), present / present.sum(0, dtype=torch.float64))
    assert q.mixture.components.loc.isfinite().all()
    assert q.mixture.components.logvar.isfinite().all()
    assert not (q.members & ~SEEN).any()


@every
def test_what_is_not_visible_takes_no_gradient_whatever_it_is(name, options):
    for absurd in (1e30, -1e30, 0.0):
        loc = {n: torch.randn(4, 2).requires_grad_() for n in NAMES}
        logvar = {n: torch.randn(4, 2).requires_grad_() for n in NAMES}
        with torch.no_grad():
            for m, n in enumerate(NAMES):
                loc[n][~SEEN[:, m]], logvar[n][~SEEN[:, m]] = absurd, absurd
        q = AGGREGATIONS[name]({n: DiagNormal(loc[n], logvar[n]) for n in NAMES}, SEEN, OTHER, **options)
        z = q.mixture.stratified(3)
        value = q.mixture.log_prob(z) + sum(expert.log_prob(z) for expert in q.experts.values())
        torch.where(q.mixture.log_weights.exp() > 0, value, 0.0).sum().backward()
        for m, n in enumerate(NAMES):
            for leaf in (loc[n], logvar[n]):
                assert leaf.grad.isfinite().all()
                assert not leaf.grad[~SEEN[:, m]].any()
                assert leaf.grad[0].any()


@pytest.mark.parametrize("pooling", ["product", "geometric"])
@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_products_are_finite_and_right_over_the_whole_range_of_logvar(pooling, margin):
    values = torch.tensor([LOGVAR_RANGE[0] + margin, LOGVAR_RANGE[1] - margin, 0.0, -5.0])
    logvar = torch.cartesian_prod(values, values, values).T.unsqueeze(-1).requires_grad_()  # (M, B, D)
    loc = (torch.randn(3, logvar.shape[1], 1) * 100).requires_grad_()
    members = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool).unsqueeze(1).expand(-1, logvar.shape[1], -1)
    prior = DiagNormal(torch.zeros(1), torch.zeros(1))
    q = product(DiagNormal(loc, logvar), members, prior, pooling=pooling)
    double = product(DiagNormal(loc.double(), logvar.double()), members, prior, pooling=pooling)
    torch.testing.assert_close(q.loc.double(), double.loc, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(q.logvar.double(), double.logvar, rtol=1e-5, atol=1e-5)
    totals = (p.loc.sum() / 100 + p.logvar.sum() for p in (q, double))
    for grad, right in zip(*(torch.autograd.grad(total, (loc, logvar)) for total in totals), strict=True):
        assert grad.isfinite().all()
        if margin:  # at the very bound rounding decides on which side of it the product lies
            torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-4)


def test_products_keep_float32_under_autocast():
    experts = {name: DiagNormal(torch.randn(4, 2), torch.randn(4, 2)) for name in NAMES}
    prior = DiagNormal(torch.zeros(2), torch.zeros(2))
    expected = mopoe(experts, SEEN, prior)
    with torch.autocast("cpu", torch.bfloat16):
        q = mopoe(experts, SEEN, prior)
    assert q.mixture.components.loc.dtype == torch.float32
    assert torch.equal(q.mixture.components.loc, expected.mixture.components.loc)


def test_a_latent_may_be_a_picture():
    flat = make()
    maps = {name: DiagNormal(q.loc.reshape(4, 2, 1, 1), q.logvar.reshape(4, 2, 1, 1), 3) for name, q in flat.items()}
    prior = DiagNormal(OTHER.loc.reshape(2, 1, 1), OTHER.logvar.reshape(2, 1, 1), 3)
    z = points()
    for name, options in CASES:
        q, expected = (AGGREGATIONS[name](e, SEEN, p, **options) for e, p in ((maps, prior), (flat, OTHER)))
        torch.testing.assert_close(q.mixture.log_prob(z.reshape(7, 4, 2, 1, 1)), expected.mixture.log_prob(z))


def test_eight_modalities_have_255_components():
    names = [f"m{n}" for n in range(8)]
    experts, seen = make(names=names), torch.rand(4, 8) < 0.7
    q = mopoe(experts, seen, STANDARD)
    assert q.mixture.components.batch_shape == (255, 4)
    assert q.mixture.log_weights.isfinite().sum(0).tolist() == [max(1, 2**n - 1) for n in seen.sum(1).tolist()]
    with pytest.raises(ValueError, match="mopoe: received 9 modalities, expected at most 8; use 'moe', or 'mixture' with subsets"):
        mopoe(make(names=[*names, "m8"]), torch.ones(4, 9, dtype=torch.bool), STANDARD)


def test_a_drawn_component_is_one_of_those_present_as_often_as_it_weighs():
    uniform = (torch.arange(60.0) + 0.5) / 60
    seen = torch.tensor([[0, 1, 1]], dtype=torch.bool).expand(60, -1)
    experts = {name: DiagNormal(torch.full((60, 2), float(m)), torch.zeros(60, 2)) for m, name in enumerate(NAMES)}
    q = moe(experts, seen, STANDARD)
    assert q.draw(uniform).tolist() == [1] * 30 + [2] * 30
    log_weights = torch.tensor([[0.1], [0.0], [0.9]]).log().expand(-1, 60)
    weighted = Posterior(GaussianMixture(q.mixture.components, log_weights), {}, seen, q.members)
    assert weighted.draw(torch.stack([uniform, 1 - uniform])).tolist() == [[0] * 6 + [2] * 54, [2] * 54 + [0] * 6]


def test_a_drawn_component_is_that_component():
    q = mopoe(make(), SEEN, STANDARD)
    index = q.draw(torch.rand(5, 4))
    components, members = q.at(index)
    assert components.batch_shape == (5, 1, 4)
    assert members.shape == (5, 1, 4, 3)
    for sample, of_rows in enumerate(index.tolist()):
        for row, k in enumerate(of_rows):
            for name in ("loc", "logvar"):
                assert torch.equal(getattr(components, name)[sample, 0, row], getattr(q.mixture.components, name)[k, row])
            assert torch.equal(members[sample, 0, row], q.members[k, row])
    one, members = q.at(index[0])
    assert torch.equal(one.loc, components.loc[0])
    assert members.shape == (1, 4, 3)


def test_no_uniform_draws_an_absent_component():
    seen = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    for uniform in (0.0, 0.49999, 0.5, 1 - 2**-24, 1.0):
        for name, options in CASES:
            q = AGGREGATIONS[name](make(5, dtype=torch.float32), seen, STANDARD, **options)
            index = q.draw(torch.full((5,), uniform))
            assert q.mixture.log_weights[index, torch.arange(5)].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, v: poe({}, v[:, :0], STANDARD), "experts: received none, expected at least one modality"),
        (lambda e, v: moe({}, v[:, :0], STANDARD), "experts: received none"),
        (lambda e, v: mopoe({}, v[:, :0], STANDARD), "experts: received none"),
        (lambda e, v: poe(e, v, STANDARD, pooling="mean"), "pooling: received 'mean', expected 'product' or 'geometric'"),
        (lambda e, v: poe(e, v[:, :2], STANDARD), r"visible: received torch.bool of shape \(4, 2\), expected bool of shape \(4, 3\)"),
        (lambda e, v: poe(e, v.float(), STANDARD), "visible: received torch.float32"),
        (lambda e, v: mixture(e, v, STANDARD, []), r"subsets: received \[\], expected a list of lists of names among \['image', 'text'"),
        (lambda e, v: mixture(e, v, STANDARD, "image"), "subsets: received 'image', expected a list of lists"),
        (lambda e, v: mixture(e, v, STANDARD, ["image"]), "subsets: received 'image', expected a non-empty list of names"),
        (lambda e, v: mixture(e, v, STANDARD, [["image"], []]), r"subsets: received \[\], expected a non-empty list"),
        (lambda e, v: mixture(e, v, STANDARD, [["image", "txt"]]), r"subsets: received \['image', 'txt'\], expected a non-empty list"),
        (lambda e, v: mixture(e, v, STANDARD, [["text", "image"], ["image", "text"]]), "expected each subset once"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(), SEEN)
