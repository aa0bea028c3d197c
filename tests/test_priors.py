"""Priors: they broadcast over rows, start where they should, and the Vamp prior is the encoder's own mixture."""

import pytest
import torch

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig, TextVAE, TextVAEConfig, TopicVAE, TopicVAEConfig
from mmvae.distributions import DiagNormal
from mmvae.priors import PRIORS, LaplaceDirichlet

CPU = torch.device("cpu")


def encode(u: torch.Tensor) -> DiagNormal:
    """A made-up encoder: pseudo-inputs (K, 6) to a latent of 3."""
    return DiagNormal(u[:, :3], u[:, 3:])


def build(name: str, event_shape=(3,), num_components: int = 5):
    return PRIORS[name](event_shape, num_components=num_components, pseudo_input_shape=(6,))


@pytest.mark.parametrize("name", PRIORS)
def test_density_and_samples(name):
    p = build(name)(encode, CPU)
    z = p.sample((20_000,)).reshape(-1, 3)
    assert z.shape == (20_000, 3)
    for leading in ((4,), (2, 4), (2, 1, 4)):
        assert p.log_prob(torch.zeros(*leading, 3)).shape == leading
    # E_p[r/p] = 1 for a density r narrower than p: the density is normalised and belongs to the samples
    narrow = DiagNormal(z.mean(0), torch.full((3,), -2.0))
    ratio = (narrow.log_prob(z) - p.log_prob(z.unsqueeze(1)).squeeze(1)).double().exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / len(z) ** 0.5


def test_standard_normal_has_no_parameters():
    prior = build("standard_normal", (2, 3, 3))
    assert not list(prior.parameters())
    p = prior(encode, CPU)
    assert isinstance(p, DiagNormal)
    z = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(p.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3)))


def test_a_new_mixture_is_close_to_the_standard_normal():
    p = build("mixture", (3,), 500)(encode, CPU)
    z = p.sample((20_000,)).reshape(-1, 3)
    assert z.mean(0).abs().max() < 0.2
    assert (z.var(0) - 1).abs().max() < 0.2


def test_mixture_parameters_take_gradients():
    prior = build("mixture", (2, 3, 3))
    prior(encode, CPU).log_prob(torch.randn(4, 2, 3, 3)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.parameters())


def test_vamp_is_the_mixture_of_posteriors_at_the_pseudo_inputs():
    prior = build("vamp")
    with torch.no_grad():
        prior.logits.copy_(torch.randn(5, 1))
    z = torch.randn(4, 3)
    q = encode(prior.pseudo_inputs)
    expected = (q.log_prob(z.unsqueeze(1)) + prior.logits.squeeze(1).log_softmax(0)).logsumexp(1)
    p = prior(encode, CPU)
    torch.testing.assert_close(p.log_prob(z), expected)
    p.log_prob(z).sum().backward()
    assert prior.pseudo_inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_reset_restores_the_distribution_of_first_values(name):
    prior = build(name)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.fill_(torch.nan)
    prior.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in prior.parameters())
    assert not prior.logits.any()


@pytest.mark.parametrize(("topics", "concentration"), [(2, 1.0), (5, 0.3)])
def test_the_dirichlet_prior_has_its_curvature_at_its_peak(topics, concentration):
    def log_density(z: torch.Tensor) -> torch.Tensor:  # of softmax(z) ~ Dirichlet(alpha) in the softmax basis, up to a constant
        return concentration * z.log_softmax(0).sum()

    peak = torch.zeros(topics, dtype=torch.float64)
    covariance = torch.linalg.pinv(-torch.autograd.functional.hessian(log_density, peak))
    p = LaplaceDirichlet((topics,), concentration)(encode, CPU)
    torch.testing.assert_close(p.variance.double(), covariance.diagonal())
    assert not p.mean.any()


IMAGE = ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=3, norm="batch")
WITH_STATISTICS = {
    "image": lambda: ImageVAE(ImageVAEConfig(**IMAGE.to_diff_dict() | {"prior": "vamp", "prior_components": 4})),
    "text": lambda: TextVAE(TextVAEConfig(vocab_size=9, hidden_size=4, latent_dim=3, mean_scale=0.5, prior="vamp", prior_components=4)),
    "topic": lambda: TopicVAE(TopicVAEConfig(vocabulary=["a", "b"], latent_dim=3, dropout=0.0, prior="vamp", prior_components=4)),
    "joint": lambda: MMVAE(MMVAEConfig(modalities={"image": IMAGE}, latent_dim=3, prior="vamp", prior_components=4)),
}


@pytest.mark.parametrize("make", WITH_STATISTICS.values(), ids=WITH_STATISTICS)
def test_pseudo_inputs_are_normalised_by_the_statistics_of_data_and_leave_them(make):
    model, z = make().eval(), torch.randn(5, 3)
    with torch.no_grad():
        for name, statistic in model.named_buffers():
            if "running" in name:
                statistic.add_(torch.rand(statistic.shape))
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert any("running" in name for name in before)
    expected = model.prior().log_prob(z)
    torch.testing.assert_close(model.train().prior().log_prob(z), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(part.training for part in model.modules())
