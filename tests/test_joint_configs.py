"""Every recipes/configs/joint_*.yaml is the method of its paper, trains on rows that lack modalities, and generates both ways."""

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from recipe_runs import recipe
from torch.distributions import Independent, Normal, kl_divergence

from mmvae.data import Loader, Rows, sprites
from mmvae.experiment import parse
from mmvae.noise import fold

CONFIGS = {
    path.stem.removeprefix("joint_"): path for path in sorted((Path(__file__).parent.parent / "recipes/configs").glob("joint_*.yaml"))
}
TINY = {"image": {"image_size": 16, "hidden_channels": [4, 8], "norm": "none"}, "text": {"embedding_size": 8, "hidden_size": 8}}
OF_THE_METHOD = (
    "inference_aggregation",
    "latent_dim",
    "private_dims",
    "num_samples",
    "aggregation",
    "aggregation_options",
    "objective",
    "objective_options",
    "draw",
    "max_steps",  # of five minutes
    "monitor",
    "densities",  # of its private latents
)
BETA = 0.7


@cache
def made(name: str) -> tuple:
    """The model of a config with tiny networks, as the recipe makes it, its options, and columns of 16 x 16 sprites."""
    module = recipe("joint_vae")
    args, joint = parse(module.JointRun, module.JointArguments, argv=["--config", str(CONFIGS[name])])
    joint.vaes = TINY
    model, _, columns = module.build(args, joint, {"train": sprites(3, num_rows=50, image_size=16)})
    return model, args, columns


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


def test_every_named_method_has_a_config():
    assert set(CONFIGS) == {"mvae", "mmvae", "mopoe", "mvtcae", "mmvm", "mmvaeplus", "jmvae"}


def test_networks_and_rows_are_the_same(name):
    module = recipe("joint_vae")

    def common(method: str) -> dict:
        both = parse(module.JointRun, module.JointArguments, argv=["--config", str(CONFIGS[method])])
        own = {*OF_THE_METHOD, "output_dir"}
        return {key: value for part in both for key, value in vars(part).items() if key not in own}

    assert common(name) == common("mopoe")
    sizes = [{key: p.shape for key, p in made(method)[0].vaes.named_parameters()} for method in (name, "mopoe")]
    assert sizes[0] == sizes[1]
    header = CONFIGS[name].read_text()
    assert f"--config recipes/configs/joint_{name}.yaml" in header
    assert f"output_dir: outputs/joint_{name}\n" in header


def test_it_trains_on_rows_that_lack_modalities_and_generates_both_ways(name):
    model, args, columns = made.__wrapped__(name)  # one of its own: the other tests want theirs untrained
    rows = Rows(sprites(3, num_rows=24, image_size=16), columns, drop={"text": 0.5, "image": 0.3})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for n, batch in zip(range(2), Loader(rows, 12, pool=0).batches(0), strict=True):
        assert 12 < batch["present"].sum() < 24
        inputs = {key: value for key, value in batch.items() if key in model.input_names}
        out = model(**inputs, beta=BETA, num_samples=args.num_samples, noise_key=fold(n, batch["row"]))
        optimizer.zero_grad()
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        assert out.loss.isfinite()
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    model.eval()
    words = model.generate("text", pixel_values=inputs["pixel_values"], max_new_tokens=4)
    pictures = model.generate("image", input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert words.shape[0] == pictures.shape[0] == 12
    assert pictures.shape[1:] == (3, 16, 16)
    assert pictures.isfinite().all()


def normal(q) -> Independent:
    return Independent(Normal(q.loc, (0.5 * q.logvar).exp()), 1)


def test_the_objective_is_that_of_the_paper(name):
    """Each paper's formula, from the decoders' likelihoods, the encoders' normals and torch's own divergences."""
    model, args, columns = made(name)
    rows = Rows(sprites(3, num_rows=5, image_size=16), columns)
    batch = next(Loader(rows, 5).batches(0))
    inputs, key = {key: value for key, value in batch.items() if key in model.input_names}, fold(0, batch["row"])
    model.train()  # as it is trained: private latents of the other modality come from the auxiliary prior
    with torch.no_grad():
        got = -model(**inputs, beta=BETA, num_samples=args.num_samples, noise_key=key).loss_rows
        q = model.posterior(**inputs)
        terms = model.terms(q, inputs, args.num_samples, key)
        own, p = [normal(expert) for expert in q.experts.values()], Independent(Normal(torch.zeros_like(terms.z), 1.0), 1)
        components = normal(q.mixture.components)
        one = [Independent(Normal(*moments), 1) for moments in zip(components.mean, components.stddev, strict=True)]
        each = torch.stack([component.log_prob(terms.z) for component in one])  # (K, S, K, B)
        log_mixture = each.logsumexp(0) - math.log(len(each))
        log_own = torch.stack([each[k, :, k] for k in range(len(each))], 1)  # (S, K, B)
        prior = Independent(Normal(torch.zeros_like(components.mean), 1.0), 1)
        divergence = kl_divergence(components, prior)  # (K, B)
        angle = BETA * sum(terms.private.values())  # what is private counts with the component that it was inferred in
        image, text = terms.log_px["image"] + angle, 30 * terms.log_px["text"]
        both = image + text
        ratio = BETA * (p.log_prob(terms.z) - log_mixture)
        product = 1 / sum(1 / e.variance for e in own)
        members = q.members[:, 0].tolist()
        to_own = sum(kl_divergence(one[-1], expert) for expert in own)
    alpha = {"mvtcae": 5 / 6, "jmvae": 0.1}.get(name)
    expected = {
        "mvae": lambda: (image[:, 0] + text[:, 1] + both[:, 2]).mean(0) - BETA * divergence.sum(0),
        "mmvae": lambda: ((both + ratio).logsumexp(0) - math.log(len(both))).mean(0),
        "mopoe": lambda: (both - BETA * divergence).mean((0, 1)),
        "mvtcae": lambda: (
            ((2 - alpha) / 2 * (both - angle) + angle).mean((0, 1)) - BETA * ((1 - alpha) * divergence[0] + alpha / 2 * to_own)
        ),
        "mmvm": lambda: (torch.stack([image[:, 0], text[:, 1]], 1) - BETA * (log_own - log_mixture)).sum(1).mean(0),
        "mmvaeplus": lambda: (both + ratio).mean((0, 1)),
        "jmvae": lambda: both.mean((0, 1)) - BETA * divergence[0] - alpha * to_own,
    }[name]()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    singles, whole = [[True, False], [False, True]], [[True, True]]
    assert members == {"mmvae": singles, "mmvm": singles, "mmvaeplus": singles, "mvtcae": whole, "jmvae": whole}.get(name, singles + whole)
    if members[-1:] == whole:
        precision = 1 / product + (1 if name == "mvae" else 0)
        torch.testing.assert_close(components.variance[-1], 1 / precision, rtol=1e-4, atol=1e-5)
    assert (len(both) > 1) == (name == "mmvae")
    assert model.config.private_dims == ({"image": 6, "text": 4} if name == "mmvaeplus" else {"image": 2})
    if name == "mmvaeplus":
        assert ((terms.private["image"] != 0).all((0, 2)) == torch.tensor([True, False])).all()
