"""M1 + M2: figures are of x, M1 stays as it is, one folder tells classes and draws by class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import run
from transformers import AutoModel

from mmvae import ImageVAE, ImageVAEConfig, ImageVAEImageProcessor, MMVAEConfig, StackedVAE, StackedVAEConfig, TextVAE, TextVAEConfig
from mmvae.models.stacked import _BELOW
from mmvae.noise import fold

N, B = 3, 4
KEY = torch.arange(B)


def make(kind: str) -> tuple[StackedVAE, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if kind == "image":
        below = ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=3, likelihood="bernoulli"))
        inputs = {"pixel_values": torch.rand(B, 1, 8, 8).round()}
    else:
        below = TextVAE(TextVAEConfig(vocab_size=12, embedding_size=4, hidden_size=5, latent_dim=3, tie_word_embeddings=True))
        inputs = {"input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 2, 0, 0], [1, 8, 9, 2]])}
    with torch.no_grad():
        below.to_moments.weight.mul_(10)  # rows whose latents differ by more than their noise
    return StackedVAE.over(below, num_classes=N, latent_dim=2, hidden_size=6, classifier_alpha=20).eval(), inputs


def test_an_m2_that_knows_only_the_standard_normal_changes_no_figure():
    model, inputs = make("image")
    with torch.no_grad():
        for part in (model.decoder, model.to_moments, model.class_moments, model.classifier):
            for parameter in part.parameters():
                parameter.zero_()  # p(z1|y, z2) = N(0, I), q(z2|z1, y) = p(z2), q(y|z1) = p(y)
    own, key = model.log_marginal(7, noise_key=KEY, **inputs), fold(_BELOW, KEY)
    torch.testing.assert_close(own, model.below.log_marginal(7, noise_key=key, **inputs))
    out = model(**inputs, noise_key=KEY, sample_posterior=True)
    torch.testing.assert_close(out.elbo, model.below.log_marginal(1, noise_key=key, **inputs))
    torch.testing.assert_close(out.log_px - out.kl, out.elbo)
    assert (out.class_log_probs.exp() - 1 / N).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["image", "text"])
def test_figures_are_bounds_of_x(kind):
    model, inputs = make(kind)
    elbo = torch.stack([model(**inputs, noise_key=fold(n, KEY), sample_posterior=True).elbo for n in range(20)]).mean(0)
    assert (elbo <= model.log_marginal(50, noise_key=KEY, **inputs) + 0.1).all()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_m1_stays_as_it_is_and_a_folder_holds_both(kind, tmp_path):
    model, inputs = make(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = model.classify(**inputs)[[0, 1, 3], [0, 1, 2]].sum()
    model.train()
    assert not model.below.training and model.encoder.training
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(50):
        loss = model(**inputs, labels=torch.tensor([0, 1, -100, 2]), sample_posterior=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("below.") for name in changed)
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype="float32").eval()
    assert isinstance(again, StackedVAE) and isinstance(again.below, type(model.below)) and not again.below.encoder.training
    assert not any(parameter.requires_grad for parameter in again.below.parameters()) and again.encoder[0].weight.requires_grad
    assert torch.equal(again.classify(**inputs), model.classify(**inputs))
    assert model.classify(**inputs)[[0, 1, 3], [0, 1, 2]].sum() > told
    drawn = [each.generate(class_labels=[2, 0], generator=torch.Generator().manual_seed(0)) for each in (model, again)]
    assert torch.equal(*drawn) and len(drawn[0]) == 2
    if "input_ids" in inputs:
        words = {"do_sample": True, "top_k": 0}
        drawn = [model.generate(class_labels=[2, 0], generator=torch.Generator().manual_seed(0), **words) for _ in range(2)]
        assert torch.equal(*drawn)
    assert len(again.sample(3)) == 3 and len(again.reconstruct(**inputs)) == B


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(ValueError, match="StackedVAEConfig.below, num_classes: received 'image_vae' with 0 classes"):
        StackedVAE(StackedVAEConfig(below=ImageVAEConfig(image_size=8)))
    for below in (ImageVAEConfig(image_size=8, spatial_latent=True), ImageVAEConfig(image_size=8, num_classes=2)):
        with pytest.raises(ValueError, match="expected a VAE of one modality without classes whose latent is a vector"):
            StackedVAE(StackedVAEConfig(below=below, num_classes=2))
    posed = {"image_size": 16, "hidden_channels": [8], "latent_dim": 6, "pose": "rotation+shift"}
    with pytest.raises(ValueError, match="received pose 'rotation.shift' with prior 'standard_normal'"):
        StackedVAE(StackedVAEConfig(below=ImageVAEConfig(**posed), num_classes=2))
    assert StackedVAE(StackedVAEConfig(below=ImageVAEConfig(**posed, prior="mixture"), num_classes=2)).below.pose is not None
    with pytest.raises(ValueError, match="StackedVAEConfig.below: received model_type 'mmvae'"):
        StackedVAE(StackedVAEConfig(below=MMVAEConfig(modalities={"image": ImageVAEConfig(image_size=8)}), num_classes=2))


def test_no_samples_of_a_likelihood_are_refused():
    model, inputs = make("image")
    with pytest.raises(ValueError, match="num_samples: received 0, expected at least 1"):
        model.log_marginal(0, **inputs)


def test_the_recipe_leaves_a_folder_that_classifies_and_draws(tmp_path):
    rng, data, below = np.random.default_rng(0), tmp_path / "data", tmp_path / "below"
    for split, count in (("train", 12), ("validation", 4)):
        for number, name in enumerate(("dark", "light")):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(110 * number, 110 * number + 100, (8, 8), dtype=np.uint8)
                Image.fromarray(picture).save(data / split / name / f"{i}.png")
    make("image")[0].below.save_pretrained(below)
    ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1).save_pretrained(below)
    options = ["--dataset", str(data), "--vae", str(below), "--output_dir", str(tmp_path / "out"), "--mixed_precision", "no"]
    options += ["--labels_per_class", "2", "--label_repeats", "2", "--batch_size", "8", "--num_epochs", "2", "--hidden_size", "8"]
    assert run("stacked_vae", [*options, "--latent_dim", "2", "--spread_neighbours", "5", "--augmentation", '{"shift": 1}'])["exit"] == 0
    small = ["--dataset", "sprites:1:20", "--vae", str(below), "--output_dir", str(tmp_path / "sprites"), "--max_steps", "1"]
    assert run("stacked_vae", [*small, "--latent_dim", "2", "--hidden_size", "8"])["exit"] == 0, (
        "the classes of the built-in data are guessed"
    )
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert {"accuracy", "neg_elbo_nats", "kl_nats"} < figures.keys() and (tmp_path / "out" / "figures" / "classes.png").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.generate(class_labels=" in card and "pipeline_tag: unconditional-image-generation" in card
    run("evaluate", ["--model", str(tmp_path / "out"), "--dataset", str(data), "--split", "validation", "--importance_samples", "2"])
