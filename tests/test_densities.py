"""Densities fitted after training: known answers, normalisation, repeatability, and the way through a model folder."""

import math

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import MultivariateNormal, Normal
from transformers import PreTrainedConfig, PreTrainedModel

from mmvae.densities import DENSITIES, FlowDensity, GaussianMixtureDensity, build_density
from mmvae.density import Density

SMALL_FLOW = {"kind": "flow", "transforms": 2, "hidden_sizes": [16], "bins": 4}
FAST = {"steps": 60, "batch_size": 64, "learning_rate": 1e-2}


def clusters(rows: int, dim: int = 3) -> torch.Tensor:
    """Two correlated clusters, far from 0 and of scales 1 to 100."""
    centre = torch.where(torch.rand(rows, 1) < 0.3, -3.0, 3.0)
    mix = torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)
    return ((centre + torch.randn(rows, dim)) @ mix.T) * torch.logspace(0, 2, dim) + 50.0


@pytest.fixture(scope="module")
def fitted() -> dict[str, tuple[Density, torch.Tensor | None]]:
    """A fitted density of each sort, and ten rows of its context."""
    torch.manual_seed(1)
    c = torch.randn(600, 2) * 7 + 3
    x = torch.cat([c[:, :1], c.sum(1, keepdim=True).square()], 1) + torch.randn(600, 2)
    mixture = build_density(3, 0, {"kind": "mixture", "num_components": 4})
    diagonal = build_density(3, 0, {"kind": "mixture", "num_components": 6, "covariance": "diagonal"})
    flow, conditional = build_density(3, 0, SMALL_FLOW), build_density(2, 2, SMALL_FLOW)
    data = clusters(600)
    mixture.fit(data), diagonal.fit(data), flow.fit(data, **FAST), conditional.fit(x, c, **FAST)
    return {"mixture": (mixture, None), "diagonal": (diagonal, None), "flow": (flow, None), "conditional": (conditional, c[:10])}


SORTS = ["mixture", "diagonal", "flow", "conditional"]


def draw(density: Density, context: torch.Tensor | None, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if context is None:
        return density.sample(rows, generator)
    return density.sample(context[:1].expand(rows, -1), generator)


@pytest.mark.parametrize("sort", SORTS)
def test_density_is_normalised_and_belongs_to_the_samples(fitted, sort):
    """E_p[r/p] = 1 for a density r narrower than p."""
    density, context = fitted[sort]
    x = draw(density, context, 20_000)
    at = x[x[:, 0].argsort()[4_000]]  # a place inside the support
    near = x[(x - at).div(x.std(0)).square().sum(1).argsort()[:2000]]
    narrow = MultivariateNormal(near.mean(0), near.T.cov())
    c = None if context is None else context[:1]
    ratio = (narrow.log_prob(x) - density.log_prob(x, c)).double().exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / len(x) ** 0.5
    assert ratio.std() / len(x) ** 0.5 < 0.05  # so that the line above says something


@pytest.mark.parametrize("sort", SORTS)
def test_shapes_dtype_and_gradients(fitted, sort):
    density, context = fitted[sort]
    c = None if context is None else context[:4]
    x = density.loc + density.scale * torch.randn(5, 4, density.dim)
    whole = density.log_prob(x.double(), c)
    assert whole.shape == (5, 4) and whole.dtype == torch.float32 and not whole.requires_grad
    row = density.log_prob(x[2, 3], None if c is None else c[3])
    torch.testing.assert_close(row, whole[2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(density.log_prob(x, c), density.log_prob(x.double(), c)) and torch.equal(density.log_prob(x, c), whole)
        assert draw(density, c, 3).dtype == torch.float32
    (gradient,) = torch.autograd.grad(density.log_prob(x.requires_grad_(), c).sum(), x)
    assert gradient.isfinite().all() and gradient.ne(0).any()
    assert not list(density.parameters()) and not any(buffer.requires_grad for buffer in density.buffers())


@pytest.mark.parametrize("sort", SORTS)
def test_samples_are_repeatable_by_the_generator_alone(fitted, sort):
    density, context = fitted[sort]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draw(density, context, 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(first, draw(density, context, 7))
    assert not torch.equal(first, draw(density, context, 7, seed=1))
    assert first.shape == (7, density.dim) and first.isfinite().all() and not first.requires_grad


@pytest.mark.parametrize("sort", SORTS)
def test_far_values_have_finite_low_densities(fitted, sort):
    density, context = fitted[sort]
    c = None if context is None else context[:1]
    near, far = (density.log_prob(density.loc + k * density.scale, c) for k in (0, 1e6))
    assert far.isfinite().all() and (far < near - 1e6).all()


@pytest.mark.parametrize(("covariance", "kind"), [("full", "full"), ("diagonal", "diag")])
def test_mixture_equals_scikit_learn(covariance, kind):
    """The same fit by scikit-learn itself, on the rows that ``fit`` keeps, after the same standardisation."""
    x = clusters(500)
    density = GaussianMixtureDensity(3, num_components=3, covariance=covariance)
    figures = density.fit(x, seed=5)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(5))
    held, train = (((x[part] - x.mean(0)) / x.std(0)).double().numpy() for part in (order[:50], order[50:]))
    expected = GaussianMixture(3, covariance_type=kind, max_iter=200, random_state=5).fit(train)
    log_scale = float(x.std(0).log().sum())
    ours = density.log_prob(x[order[:50]])
    torch.testing.assert_close(ours, torch.from_numpy(expected.score_samples(held)).float() - log_scale, rtol=1e-4, atol=1e-3)
    assert figures["held_out_log_prob_nats"] == pytest.approx(expected.score(held) - log_scale, abs=1e-3)
    assert figures["train_log_prob_nats"] == pytest.approx(expected.score(train) - log_scale, abs=1e-3)
    assert (figures["train_rows"], figures["held_out_rows"], figures["converged"]) == (450, 50, 1)


def test_one_component_is_the_gaussian_of_the_rows():
    """Maximum likelihood in closed form; samples have its moments."""
    x = clusters(400)
    density = GaussianMixtureDensity(3, num_components=1)
    density.fit(x, seed=0)
    train = x[torch.randperm(400, generator=torch.Generator().manual_seed(0))[40:]].double()
    p = MultivariateNormal(train.mean(0), train.T.cov(correction=0))
    torch.testing.assert_close(density.log_prob(x), p.log_prob(x.double()).float(), rtol=1e-4, atol=1e-3)
    sample = density.sample(50_000, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close((sample.mean(0) - p.mean) / p.stddev, torch.zeros(3).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(sample.T.cov() / p.covariance_matrix, torch.ones(3, 3).double(), rtol=0, atol=0.05)


def test_conditional_flow_reaches_the_entropy_and_the_moments():
    """x | c ~ N(sin 2c, (0.05 e^{c/2})^2), then x_2 | x_1, c ~ N(x_1^2 + c, 1): mean, width and dependence all follow the context."""

    def known(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p1 = Normal(torch.sin(2 * c), 0.05 * torch.exp(c / 2))
        x1 = p1.sample()
        p2 = Normal(x1.square() + c, 1.0)
        x2 = p2.sample()
        return torch.cat([x1, x2], 1), (p1.log_prob(x1) + p2.log_prob(x2)).squeeze(1)

    c, unseen = torch.rand(3000, 1) * 4 - 2, torch.rand(3000, 1) * 4 - 2
    x, _ = known(c)
    y, truth = known(unseen)
    density = FlowDensity(2, 1, transforms=2, hidden_sizes=(64, 64))
    figures = density.fit(x, c, steps=300)
    assert abs(density.log_prob(y, unseen).mean() - truth.mean()) < 0.15
    assert figures["train_log_prob_nats"] == pytest.approx(truth.mean().item(), abs=0.2)
    blind = FlowDensity(2, 0, transforms=2, hidden_sizes=(64, 64))
    blind.fit(x, steps=60)
    assert blind.log_prob(y).mean() < truth.mean() - 1  # the context is worth more than a nat
    sample = density.sample(torch.full((4000, 1), 0.5), torch.Generator().manual_seed(0))
    assert sample[:, 0].mean() == pytest.approx(math.sin(1.0), abs=0.03)
    assert sample[:, 0].std() == pytest.approx(0.05 * math.exp(0.25), rel=0.4)
    assert sample[:, 1].mean() == pytest.approx(math.sin(1.0) ** 2 + 0.5, abs=0.15)


def test_flow_in_one_dimension_follows_two_modes():
    x = torch.cat([torch.randn(700, 1) - 4, 0.5 * torch.randn(300, 1) + 3])
    density = build_density(1, 0, {**SMALL_FLOW, "transforms": 3, "bins": 8})
    density.fit(x, steps=200, batch_size=128, learning_rate=2e-2)
    grid = torch.linspace(-60, 60, 20_001).unsqueeze(1)  # the tails are standard normal after standardisation, scale 3.5
    p = density.log_prob(grid).exp()
    assert torch.trapezoid(p, grid.squeeze(1)) == pytest.approx(1, abs=2e-3)
    assert torch.trapezoid(p[grid.squeeze(1) > 0.5], grid[grid > 0.5]) == pytest.approx(0.3, abs=0.08)
    assert p[(grid.squeeze(1) - 0.5).abs().argmin()] < 0.25 * p.max()


@pytest.mark.parametrize("options", [{"kind": "mixture", "num_components": 3}, SMALL_FLOW], ids=lambda options: options["kind"])
def test_fit_is_a_function_of_the_data_and_the_seed(options):
    x = clusters(300)
    training = FAST if options["kind"] == "flow" else {}
    one, two = build_density(3, 0, options), build_density(3, 0, options)
    one.fit(clusters(200), seed=8, **training)  # what it was before does not matter
    torch.manual_seed(1)
    one.fit(x, seed=2, **training)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    with torch.no_grad():
        two.fit(x, seed=2, **training)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    two.fit(x, seed=3, **training)
    assert not torch.equal(one.log_prob(x), two.log_prob(x))


def test_draws_of_a_row_stay_together():
    """R copies of every row are the rows themselves: the same held-out rows, the same figures."""
    x = clusters(300)
    one, two = GaussianMixtureDensity(3, num_components=1), GaussianMixtureDensity(3, num_components=1)
    expected, figures = one.fit(x, seed=1), two.fit(x.expand(4, -1, -1), seed=1)
    for name in ("train_log_prob_nats", "held_out_log_prob_nats", "held_out_rows"):
        assert figures[name] == pytest.approx(expected[name], abs=0.02)
    flow = build_density(3, 2, SMALL_FLOW)
    figures = flow.fit(x.expand(4, -1, -1), torch.randn(4, 300, 2), context_noise=0.1, **FAST)
    assert math.isfinite(figures["held_out_log_prob_nats"]) and flow.fitted


class HolderConfig(PreTrainedConfig):
    model_type = "holder"

    def __init__(self, densities: dict | None = None, **kwargs):
        self.densities = densities or {}
        super().__init__(**kwargs)


class Holder(PreTrainedModel):
    config_class = HolderConfig
    _keep_in_fp32_modules_strict = {"densities"}

    def __init__(self, config: HolderConfig):
        super().__init__(config)
        self.trunk = nn.Linear(3, 3)
        self.densities = nn.ModuleDict({name: build_density(*sizes, options) for name, (*sizes, options) in config.densities.items()})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Density):
            module.reset_parameters()
        else:
            super()._init_weights(module)


HELD = {"mixture": [3, 0, {"kind": "mixture", "num_components": 4}], "flow": [3, 0, SMALL_FLOW], "conditional": [2, 2, SMALL_FLOW]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_folder_holds_densities(fitted, tmp_path, dtype):
    """transformers builds on the meta device: log_prob and samples must come back with the same bits, whatever the model's dtype."""
    model = Holder(HolderConfig(HELD))
    for name, density in model.densities.items():
        density.load_state_dict(fitted[name][0].state_dict())
    model.save_pretrained(tmp_path)
    loaded, report = Holder.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.trunk.weight.dtype == getattr(torch, dtype)
    for name, density in loaded.densities.items():
        expected, context = fitted[name]
        x = draw(expected, context, 50)
        c = None if context is None else context[:1]
        assert torch.equal(draw(density, context, 50), x)
        assert torch.equal(density.log_prob(x, c), expected.log_prob(x, c))
        assert density.state_dict().keys() == expected.state_dict().keys()
        assert not list(density.parameters()) and not any(buffer.requires_grad for buffer in density.buffers())
    cast = loaded.to(torch.bfloat16)
    assert cast.trunk.weight.dtype == torch.bfloat16
    assert {v.dtype for v in cast.densities.state_dict().values() if v.is_floating_point()} == {torch.float32}


def test_a_folder_without_densities_gives_unfitted_ones(tmp_path):
    Holder(HolderConfig()).save_pretrained(tmp_path)
    loaded, report = Holder.from_pretrained(tmp_path, config=HolderConfig(HELD), output_loading_info=True)
    assert report["missing_keys"]
    for name, density in loaded.densities.items():
        with pytest.raises(RuntimeError, match="not fitted yet"):
            density.sample(2)
        x = torch.randn(100, density.dim)
        density.fit(x, torch.randn(100, 2) if name == "conditional" else None, **(FAST if "mixture" not in name else {}))
        fresh = build_density(*HELD[name][:2], HELD[name][2])
        assert density.loc.device.type == "cpu" and density.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.parametrize("kind", DENSITIES)
def test_what_is_not_fitted_says_so(kind):
    density = build_density(3, 0, {"kind": kind})
    for use in (lambda: density.sample(4), lambda: density.log_prob(torch.zeros(3))):
        with pytest.raises(RuntimeError, match=r"not fitted yet; call fit"):
            use()
    with pytest.raises(ValueError, match="row 4, column 1, expected finite"):
        density.fit(clusters(200).index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(torch.nan)))
    with pytest.raises(TypeError, match=r"fit: unknown option 'step' = 3; the nearest one is '(steps|seed|max_iterations)'"):
        density.fit(clusters(200), step=3)
    assert not density.fitted


def test_a_fit_that_breaks_leaves_nothing_fitted(monkeypatch):
    density = build_density(3, 0, SMALL_FLOW)
    x = clusters(200)
    density.fit(x, **FAST)
    with pytest.raises(FloatingPointError, match="expected finite"):
        density.fit(x, steps=5, learning_rate=math.inf)
    assert not density.fitted and not list(density.parameters()) and not any(buffer.requires_grad for buffer in density.buffers())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_density(3, 0, {"kind": "flows"}), "kind: received 'flows'.*nearest one is 'flow'"),
        (lambda: build_density(3, 0, {}), "kind: received None, expected one of 'mixture', 'flow'"),
        (lambda: build_density(3, 0, {"kind": "mixture", "components": 3}), "unknown option 'components' = 3; .* 'num_components'"),
        (lambda: build_density(3, 2, {"kind": "mixture"}), "context_dim: received 2, expected 0"),
        (lambda: build_density(0, 0, {"kind": "flow"}), "dim: received 0"),
        (lambda: build_density(3, 0, {"kind": "mixture", "num_components": 2.5}), "num_components: received 2.5"),
        (lambda: build_density(3, 0, {"kind": "mixture", "covariance": "tied"}), "covariance: received 'tied'"),
        (lambda: build_density(32, 0, {"kind": "flow", "hidden_sizes": [64, 16]}), "hidden_sizes: received 16, expected .* at least 32"),
        (lambda: build_density(3, 0, {"kind": "mixture"}).fit(torch.randn(55, 3)), "received 55 rows, 49 to fit, .* num_components = 50"),
        (lambda: build_density(3, 0, {"kind": "flow"}).fit(torch.randn(5, 3)), "received 5 rows, expected at least 20"),
        (lambda: build_density(3, 0, {"kind": "flow"}).fit(torch.randn(50, 4)), r"x: received shape \(50, 4\), expected \(\*, 3\)"),
        (lambda: build_density(3, 0, {"kind": "flow"}).fit(torch.randn(3)), r"x: received shape \(3,\), expected \(N, 3\)"),
        (lambda: build_density(3, 0, {"kind": "flow"}).fit(torch.ones(50, 3)), "x: column 0 has the same value"),
        (lambda: build_density(3, 2, {"kind": "flow"}).fit(torch.randn(50, 3)), "context: received None"),
        (lambda: build_density(3, 0, {"kind": "flow"}).fit(torch.randn(50, 3), torch.randn(50, 2)), "expected None"),
        (lambda: build_density(3, 2, {"kind": "flow"}).fit(torch.randn(50, 3), torch.randn(40, 2)), r"expected \(50, 2\), the rows of x"),
        (lambda: build_density(3, 2, {"kind": "flow"}).fit(torch.randn(50, 3), torch.full((50, 2), torch.inf)), "context: received inf"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_requests_for_samples_are_named(fitted):
    (mixture, _), (conditional, context) = fitted["mixture"], fitted["conditional"]
    with pytest.raises(ValueError, match="given: received 0, expected an integer of at least 1"):
        mixture.sample(0)
    with pytest.raises(ValueError, match=r"context: received shape \(10, 2\), expected None"):
        mixture.sample(context)
    with pytest.raises(ValueError, match="context: received None"):
        conditional.sample(3)
    with pytest.raises(ValueError, match=r"context: received shape \(2,\), expected \(B, 2\)"):
        conditional.sample(context[0])
    with pytest.raises(ValueError, match=r"context: received shape \(10, 1\), expected \(\*, 2\)"):
        conditional.sample(context[:, :1])
    with pytest.raises(ValueError, match=r"x: received shape \(4,\), expected \(\*, 3\)"):
        mixture.log_prob(torch.zeros(4))


def test_a_context_that_never_changes_says_nothing():
    x = clusters(200)
    density = build_density(3, 1, SMALL_FLOW)
    density.fit(x, torch.full((200, 1), 5.0), **FAST)
    assert density.log_prob(x, torch.full((1,), 5.0)).isfinite().all()
    assert torch.equal(density.log_prob(x, torch.full((1,), 5.0)), density.log_prob(x, torch.zeros(1)))


def test_a_context_outside_what_was_seen_counts_as_its_edge(fitted):
    density, context = fitted["conditional"]
    beyond = torch.stack([torch.full((2,), 1e4), torch.full((2,), -1e4)])
    edge = torch.stack([density.context_high, density.context_low])
    x = draw(density, context, 2)
    assert torch.equal(density.log_prob(x, beyond), density.log_prob(x, edge))
    assert not torch.equal(density.log_prob(x, edge), density.log_prob(x, edge.flip(0)))
    far, near = (density.sample(c, torch.Generator().manual_seed(0)) for c in (beyond, edge))
    assert torch.equal(far, near)
    assert (density.context_low <= context).all() and (context <= density.context_high).all()
