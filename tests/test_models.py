"""The contract that every VAEModel keeps, whatever its modality. To add one: a function that builds it, in ``MODELS``."""

import json

import pytest
import torch
from linear_gaussian import linear_gaussian
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import mmvae
from mmvae.distributions import DiagNormal
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.models.topic_vae import TopicVAE, TopicVAEConfig
from mmvae.models.unimodal import VAEModel
from mmvae.noise import fold
from mmvae.objectives import OBJECTIVES
from mmvae.priors import PRIORS

IMAGE = {"image_size": 16, "num_channels": 1, "hidden_channels": [4, 8], "latent_dim": 3, "prior_components": 4}
TEXT = {"vocab_size": 20, "embedding_size": 6, "hidden_size": 8, "latent_dim": 3, "prior_components": 4}
TOPIC = {"vocabulary": [f"word{i}" for i in range(30)], "hidden_size": 30, "latent_dim": 3, "dropout": 0.0, "prior_components": 4}


def pictures(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randint(0, 256, (rows, 1, 16, 16), dtype=torch.uint8)}


def sentences(rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (rows, 9))
    lengths = torch.arange(rows) % 7 + 2
    ids[:, 0] = 1
    ids[torch.arange(rows), lengths - 1] = 2
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def documents(rows: int) -> dict[str, torch.Tensor]:
    """Of about 15 words each; the first one has none."""
    return {"word_counts": torch.poisson(torch.full((rows, 30), 0.5)) * (torch.arange(rows) > 0).unsqueeze(1)}


MODELS = {
    "image": lambda **kw: (ImageVAE(ImageVAEConfig(**IMAGE | kw)), pictures),
    "image without norm": lambda **kw: (ImageVAE(ImageVAEConfig(**IMAGE | {"norm": "none", "likelihood": "laplace"} | kw)), pictures),
    "image, discretized": lambda **kw: (ImageVAE(ImageVAEConfig(**IMAGE | {"likelihood": "discretized_logistic"} | kw)), pictures),
    "image, spatial latent": lambda **kw: (ImageVAE(ImageVAEConfig(**IMAGE | {"spatial_latent": True} | kw)), pictures),
    "image, turned": lambda **kw: (ImageVAE(ImageVAEConfig(**IMAGE | {"pose": "rotation", "latent_dim": 5} | kw)), pictures),
    "image, turned and shifted": lambda **kw: (
        ImageVAE(ImageVAEConfig(**IMAGE | {"pose": "rotation+shift", "pose_window": 0.6, "latent_dim": 7} | kw)),
        pictures,
    ),
    "text": lambda **kw: (TextVAE(TextVAEConfig(**TEXT | kw)), sentences),
    "text, deep": lambda **kw: (
        TextVAE(TextVAEConfig(**TEXT | {"encoder_layers": 2, "decoder_layers": 2, "bidirectional": True, "bow_weight": 0.5} | kw)),
        sentences,
    ),
    "text, tied": lambda **kw: (
        TextVAE(TextVAEConfig(**TEXT | {"tie_word_embeddings": True, "share_embeddings": True} | kw)),
        sentences,
    ),
    "topic": lambda **kw: (TopicVAE(TopicVAEConfig(**TOPIC | kw)), documents),
    "topic, mixture": lambda **kw: (TopicVAE(TopicVAEConfig(**TOPIC | {"mixing": "mixture"} | kw)), documents),
}


@pytest.fixture(params=MODELS)
def made(request) -> tuple[VAEModel, dict[str, torch.Tensor]]:
    model, inputs = MODELS[request.param]()
    return model.eval(), inputs(5)


def test_shapes(made):
    model, inputs = made
    q = model.encode(**inputs)
    assert isinstance(q, DiagNormal)
    assert q.batch_shape == (5,)
    assert q.event_shape == model.latent_shape
    target = model.target(**inputs)
    for leading in ((), (2,), (3, 2)):
        p = model.decode(torch.randn(*leading, 5, *model.latent_shape))
        assert p.batch_shape == (*leading, 5)
        log_prob = p.log_prob(target)
        assert log_prob.shape == (*leading, 5)
        assert log_prob.dtype == torch.float32
    assert model.decode(torch.randn(model.latent_shape)).log_prob(target[0]).shape == ()
    assert len(model.render(q.mean)) == 5
    assert len(model.reconstruct(**inputs)) == 5
    assert len(model.sample(4)) == 4
    assert len(model.interpolate(q.mean[:2], q.mean[2:4], 3)) == 6


def test_output(made):
    model, inputs = made
    out = model(**inputs)
    assert next(iter(out)) == "loss"
    assert all(isinstance(value, torch.Tensor) for value in out.values())
    assert out.loss.shape == ()
    for name in ("loss_rows", "elbo", "log_px", "kl"):
        assert out[name].shape == (5,)
    for name in ("latents", "latent_mean", "latent_logvar"):
        assert out[name].shape == (5, *model.latent_shape)
    torch.testing.assert_close(out.loss, out.loss_rows.mean())
    torch.testing.assert_close(out.elbo, -out.loss_rows)
    torch.testing.assert_close(out.elbo, out.log_px - out.kl)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, out.values(), strict=True))
    halved = model(**inputs, beta=0.5)
    torch.testing.assert_close(halved.loss_rows, -(out.log_px - 0.5 * out.kl))
    torch.testing.assert_close(halved.elbo, out.elbo)


def test_evaluation_is_deterministic_and_uses_the_mean(made):
    model, inputs = made
    out, again = model(**inputs), model(**inputs)
    assert all(torch.equal(out[name], again[name]) for name in out)
    torch.testing.assert_close(out.latents, model.encode(**inputs).mean)
    assert not torch.equal(model(**inputs, sample_posterior=True).latents, out.latents)
    model.train()
    assert not torch.equal(model(**inputs).latents, out.latents)
    assert torch.equal(model(**inputs, sample_posterior=False).latents, model(**inputs, sample_posterior=False).latent_mean)


def test_a_row_does_not_depend_on_the_rows_beside_it(made):
    model, inputs = made
    keys = fold(0, torch.arange(5))
    for objective in OBJECTIVES.values():
        options = {"objective": objective, "num_samples": 3, "sample_posterior": True}
        whole = model(**inputs, noise_key=keys, **options)
        order = torch.tensor([3, 0, 4])
        part = model(**{name: value[order] for name, value in inputs.items()}, noise_key=keys[order], **options)
        for name in ("loss_rows", "elbo", "latents"):
            torch.testing.assert_close(part[name], whole[name][order], rtol=1e-4, atol=1e-4)


def test_noise_keys_make_a_training_loss_repeatable(made):
    model, inputs = made
    keys = fold(0, 7, torch.arange(5))
    out, again, other = (model(**inputs, noise_key=k, sample_posterior=True, num_samples=2) for k in (keys, keys, keys + 1))
    assert torch.equal(out.loss_rows, again.loss_rows)
    assert not torch.equal(out.loss_rows, other.loss_rows)
    more = model(**inputs, noise_key=keys, sample_posterior=True, num_samples=4)
    assert torch.equal(more.latents, out.latents)  # the first samples do not depend on their number
    assert len(model.log_marginal(**inputs, num_samples=3, noise_key=keys)) == 5


def test_log_marginal_is_above_the_bound(made):
    model, inputs = made
    keys = fold(0, torch.arange(5))
    elbo = torch.stack([model(**inputs, noise_key=keys + i, sample_posterior=True).elbo for i in range(8)]).mean(0)
    assert (model.log_marginal(**inputs, num_samples=32, noise_key=keys) > elbo - 1).all()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_under_every_prior(name, prior):
    model, inputs = MODELS[name](prior=prior)
    batch = inputs(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(12):
        loss = model(**batch, noise_key=fold(step, torch.arange(8)), beta=0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()


def test_save_and_load(made, tmp_path):
    model, inputs = made
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.01 if tensor.is_floating_point() else 0)
    expected = model(**inputs)
    for folder, options in (("whole", {}), ("shards", {"max_shard_size": "2KB"})):
        model.save_pretrained(tmp_path / folder, **options)
        again, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert again.config.to_json_string() == model.config.to_json_string()
        assert not again.training
        received = again(**inputs)
        assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert not list(tmp_path.rglob("*.bin"))


def test_a_bf16_folder_reloads_as_bf16(made, tmp_path):
    model, inputs = made
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    out = again(**inputs)
    assert torch.equal(out.loss, model(**inputs).loss)
    assert out.loss.dtype == torch.float32
    assert type(model).from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    again.train()(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in again.parameters() if p.grad is not None)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", ["image", "image, spatial latent", "text, deep", "text, tied"])
def test_whatever_a_checkpoint_lacks_is_initialised_as_in_a_new_model(name, prior, tmp_path):
    options = {"prior": prior} | ({"likelihood": "gaussian", "scale_mode": "optimal"} if name.startswith("image") else {})
    model, inputs = MODELS[name](**options)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = next(iter(state))
    save_file({kept: state[kept]}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "manifest.json").unlink()
    again, info = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert len(info["missing_keys"]) >= len(state) - 1
    torch.testing.assert_close(again.state_dict()[kept], state[kept])
    for key, tensor in again.state_dict().items():
        first = model.state_dict()[key]
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all(), key
        assert (first.float().std(correction=0) == 0) == (tensor.float().std(correction=0) == 0), key
        assert tensor.float().abs().max() <= 3 * first.float().abs().max() + 1e-6, key
        if first.float().std(correction=0) == 0:
            assert torch.equal(tensor, first), key  # constants, the running scale among them
    assert again(**inputs(3)).loss.isfinite()


def test_auto_classes(made, tmp_path):
    model, inputs = made
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.model_type
    assert type(again).__name__ in mmvae.__all__


def test_wrong_arguments_are_named(made):
    model, inputs = made
    with pytest.raises(ValueError, match=r"latents: received shape \(5, 4.*expected"):
        model.decode(torch.zeros(5, 4, *model.latent_shape[1:]))
    for call in (model, model.log_marginal):
        with pytest.raises(ValueError, match="num_samples: received 0, expected at least 1"):
            call(**inputs, num_samples=0)
    z = torch.zeros(1, *model.latent_shape)
    with pytest.raises(ValueError, match="num_steps: received 1, expected at least 2"):
        model.interpolate(z, z, 1)
    with pytest.raises(TypeError):
        model.encode(**inputs, nonsense=1)


def test_samples_follow_the_generator(made):
    model, _ = made
    first, second, other = (model.sample_prior(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    model.sample_prior(4, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (4, *model.latent_shape)


def test_interpolation_starts_and_ends_at_the_ends(made):
    model, _ = made
    start, end = model.sample_prior(2), model.sample_prior(2)
    seen = []
    model.render = lambda z: seen.append(z) or z
    model.interpolate(start, end, 5)
    line = seen[0].unflatten(0, (2, 5))
    torch.testing.assert_close(line[:, 0], start)
    torch.testing.assert_close(line[:, -1], end)
    torch.testing.assert_close(line[:, 2], (start + end) / 2)


def test_the_contract_holds_for_a_model_from_outside():
    model, x = linear_gaussian()
    assert model.posterior(values=x).mixture.batch_shape == (6,)
    assert model.eval()(x).latents.shape == (6, 3)


class ClassConditional(type(linear_gaussian()[0])):
    """p(x|z, y): the class moves the mean."""

    condition_names = ("class_labels",)

    def decode(self, z, class_labels):
        return super().decode(z + class_labels.unsqueeze(-1))


def test_conditions_reach_the_decoder_and_nothing_else():
    model, x = linear_gaussian()
    conditional = ClassConditional(model.config).double()
    labels = torch.arange(6)
    bound = {"noise_key": labels, "sample_posterior": True}
    out = VAEModel.forward(conditional, values=x, class_labels=labels, **bound)
    z = out.latents
    torch.testing.assert_close(out.log_px, conditional.decode(z, labels).log_prob(x))
    plain = VAEModel.forward(conditional, values=x, class_labels=0 * labels, **bound)
    torch.testing.assert_close(plain.elbo, model(x, **bound).elbo)
    assert not torch.allclose(out.elbo[1:], plain.elbo[1:])
    assert conditional.log_marginal(values=x, class_labels=labels, num_samples=3).shape == (6,)


@pytest.mark.parametrize(("call", "name"), [("log_marginal", "chunk_size"), ("log_marginal", "num_samples"), ("sample", "num_samples")])
def test_counts_below_one_are_named(call, name):
    model, x = linear_gaussian()
    inputs = {"values": x} if call == "log_marginal" else {}
    with pytest.raises(ValueError, match=f"{name}: received -1"):
        getattr(model, call)(**inputs, **{name: -1})
