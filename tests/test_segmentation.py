"""Masks from the latent: the loss is what it says, a frozen VAE stays as it is, a pose moves the mask with the picture."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from recipe_runs import run
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSemanticSegmentation, AutoProcessor, pipeline

from mmvae import ImageVAE, ImageVAEConfig, ImageVAEForImageClassification, ImageVAEForSemanticSegmentation, ImageVAEImageProcessor
from mmvae.objectives import dreg
from mmvae.pose import POSES

KEY = torch.arange(3)
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def build(**options):
    torch.manual_seed(0)
    config = {"image_size": 16, "hidden_channels": [8, 8], "latent_dim": 6, "num_labels": 3} | options
    return ImageVAEForSemanticSegmentation(ImageVAEConfig(**config))


@pytest.mark.parametrize(
    "options", [{}, {"latent_dim": 2, "spatial_latent": True}, {"pose": "rotation+shift"}, {"image_size": [18, 14]}, {"patch_size": 4}]
)
def test_the_loss_is_the_cross_entropy_and_jointly_also_the_bound(options):
    model, (height, width) = build(**options), ImageVAEConfig(image_size=options.get("image_size", 16)).height_width
    pixels, labels = F.interpolate(PIXELS, (height, width)), F.interpolate(LABELS[:, None], (height, width))[:, 0].clone()
    labels[0], labels[1, :3] = 255, 255
    given = {"noise_key": KEY, "sample_posterior": True}
    out, joint = model(pixels, labels, **given), model(pixels, labels, alpha=3.0, **given)
    by_hand = -F.log_softmax(out.logits, 1).gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
    by_hand = (by_hand * (labels != 255)).sum((1, 2))
    assert out.logits.shape == (3, 3, height, width)
    torch.testing.assert_close(out.loss_rows, by_hand)
    assert out.loss_rows[0] == 0  # a row without labels
    torch.testing.assert_close(out.loss, by_hand.mean())
    alone = model.image_vae(pixels, **given)
    torch.testing.assert_close(out.elbo, alone.elbo)
    torch.testing.assert_close(joint.loss_rows, alone.loss_rows + 3 * by_hand)
    torch.testing.assert_close(model(pixels, **given).logits, out.logits)
    joint.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pseudo_inputs_of_a_vamp_prior_are_not_masked():
    model = build(pose="rotation+shift", prior="vamp", prior_components=4).eval()
    logits = model(PIXELS).logits
    with torch.no_grad():
        pseudo = [parameter for name, parameter in model.named_parameters() if "pseudo" in name]
        [parameter.copy_(torch.rand_like(parameter)) for parameter in pseudo]
    assert pseudo and torch.equal(model(PIXELS).logits, logits)


def test_the_pipeline_draws_masks_at_the_pictures_size(tmp_path):
    model = build(id2label={0: "ground", 1: "cat", 2: "dog"}).eval()
    model.save_pretrained(tmp_path)
    processor = ImageVAEImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    picture = Pillow.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    with torch.no_grad():
        mask = model(**processor(picture, return_tensors="pt")).logits.argmax(1)[0]
    told = pipeline("image-segmentation", model=str(tmp_path), device="cpu")(picture.resize((48, 32), Pillow.Resampling.NEAREST))
    assert {each["label"] for each in told} <= set(model.config.id2label.values()) and {each["mask"].size for each in told} == {(48, 32)}
    same = {each["label"]: np.asarray(each["mask"]) > 0 for each in pipeline("image-segmentation", model=str(tmp_path))(picture)}
    for number, name in model.config.id2label.items():
        assert np.array_equal(same.get(name, np.zeros((16, 16), bool)), mask.numpy() == number)


def test_a_mask_has_two_classes():
    with pytest.raises(ValueError, match="num_labels: received 1, expected at least 2"):
        build(num_labels=1)


def test_evaluation_uses_the_mean_and_training_samples():
    model = build().eval()
    assert torch.equal(model(PIXELS).logits, model(PIXELS).logits)
    assert torch.equal(model(PIXELS).latents, model.image_vae.encode(PIXELS).mean)
    model.train()
    assert not torch.equal(model(PIXELS).logits, model(PIXELS).logits)


def test_nothing_goes_around_the_latent():
    model = build().eval()
    assert not torch.allclose(*model(PIXELS[:2]).logits)
    torch.nn.init.zeros_(model.image_vae.to_moments.weight)  # all pictures have one posterior
    assert torch.equal(*model(PIXELS[:2]).logits)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_frozen_vae_stays_as_it_is_bit_for_bit(norm):
    model = build(norm=norm, dropout=0.5).freeze().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(PIXELS, LABELS).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("mask_head.")}
    model.freeze(False).train()
    model(PIXELS, LABELS).loss.backward()
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if name.startswith("image_vae.encoder"))


@pytest.mark.parametrize("kind", ["rotation", "rotation+shift"])
def test_a_mask_is_turned_and_shifted_as_the_picture_is(kind):
    model = build(image_size=32, pose=kind, num_labels=2)
    pose, (height, width) = model.image_vae.pose, model.config.trunk_size
    mask = torch.full((5, 1, height, width), -8.0)
    mask[:, :, height // 4 : height // 2, width // 4 : 3 * width // 4] = 8.0  # above the middle
    angles, shifts = torch.linspace(-3, 2.5, 5), torch.linspace(-0.5, 0.4, 5)[:, None] * torch.tensor([1.0, -1.0])
    z = torch.cat([torch.zeros(5, 6 - POSES[kind]), pose.latent(angles, shifts)], 1)
    picture = pose.place(torch.ones(5, 1, height, width), mask, torch.zeros(5, 1), z[:, -POSES[kind] :])
    logits = model._placed(torch.cat([torch.zeros_like(mask), mask], 1), z)
    assert torch.equal(logits.argmax(1), (picture[:, 0] > 0.5).long())
    down, across = torch.meshgrid(*(torch.linspace(-1, 1, 32),) * 2, indexing="ij")
    found = logits.argmax(1)
    for i in range(5):  # and it is where the pose says: above the middle, turned clockwise, shifted
        place = torch.stack([across[found[i] == 1].mean(), down[found[i] == 1].mean()])
        away = 0.25 * pose.window
        wanted = away * torch.tensor([math.sin(angles[i]), -math.cos(angles[i])]) + shifts[i] * (kind == "rotation+shift")
        assert (place - wanted).abs().max() < 0.05


def test_folders_of_the_head_and_of_its_base(tmp_path):
    base = ImageVAE(build().config).eval()
    base.save_pretrained(tmp_path / "base")
    head = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "base", num_labels=2, id2label={0: "ground", 1: "heart"})
    assert type(head) is ImageVAEForSemanticSegmentation and head.config.num_labels == 2
    assert all(torch.equal(value, head.image_vae.state_dict()[name]) for name, value in base.state_dict().items())
    assert head.mask_head[0].weight.std() > 0.02  # a new head is not near zero
    head.save_pretrained(tmp_path / "head")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "head")
    assert again.config.id2label == {0: "ground", 1: "heart"}
    assert torch.equal(again(PIXELS).logits, head.eval()(PIXELS).logits)
    classifier = ImageVAEForImageClassification.from_pretrained(tmp_path / "head")  # one head may follow another
    assert all(torch.equal(value, classifier.image_vae.state_dict()[name]) for name, value in base.state_dict().items())
    bare = AutoModel.from_pretrained(tmp_path / "head")
    assert type(bare) is ImageVAE
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in base.state_dict().items())


def test_a_folder_whose_base_does_not_fit_says_which_field_differs(tmp_path):
    ImageVAE(build().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its weights do not fit: latent_dim: has .*, asked for 9"):
        ImageVAEForSemanticSegmentation.from_pretrained(tmp_path, latent_dim=9, num_labels=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:, :8], r"shape \(3, 8, 16\), expected \(3, 16, 16\)"),
        (LABELS.float(), "torch.float32"),
        (LABELS + 1, "received 3 in row 0, expected 0 to 2, or 255"),
        (-LABELS.long(), "received -"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=f"labels: .*{message}"):
        build()(PIXELS, labels)


def test_a_misspelt_argument_is_named():
    with pytest.raises(TypeError, match="'label_s'; the nearest one is 'labels'"):
        build()(PIXELS, label_s=LABELS)


def test_a_vae_with_classes_is_refused():
    with pytest.raises(ValueError, match=r"num_classes: received 4 .*expected 0"):
        build(num_classes=4)


def test_the_mask_is_that_of_the_first_sample():
    model = build()
    one, several = model(PIXELS, noise_key=KEY), model(PIXELS, noise_key=KEY, num_samples=3)
    torch.testing.assert_close(one.logits, several.logits)
    assert not torch.allclose(one.log_px, several.log_px)


def test_an_objective_that_weighs_the_gradient_of_the_latent_is_refused():
    for objective in (dreg, partial(dreg, looser=False)):
        with pytest.raises(ValueError, match="objective: received dreg, expected another"):
            build()(PIXELS, LABELS, objective=objective, num_samples=3)


# ---- the recipe


def figures_of(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


SMALL = ["--batch_size", "16", "--max_steps", "3", "--warmup_steps", "2", "--log_every", "1", "--importance_samples", "2"]
SMALL += ["--mixed_precision", "no", "--kl_options", '{"steps": 10}']


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Pictures of 16x16 with black and white masks beside them."""
    folder = tmp_path_factory.mktemp("masked")
    down, across = np.mgrid[:16, :16]
    features = Features({"image": Image(), "mask": Image()})
    for split, first, rows in (("train", 0, 24), ("validation", 24, 8), ("test", 32, 8)):
        masks = [255 * ((down - 4 - i % 8) ** 2 + (across - 5 - i % 7) ** 2 < 16).astype(np.uint8) for i in range(first, first + rows)]
        pictures = [np.repeat(mask[..., None], 3, 2) // 2 + 60 for mask in masks]
        Dataset.from_dict({"image": pictures, "mask": masks}, features).to_parquet(folder / f"{split}.parquet")
    return folder


ARCHITECTURE = '{"image_size": 16, "hidden_channels": [8, 8], "latent_dim": 4}'


@pytest.fixture(scope="module")
def jointly(masked, tmp_path_factory):
    """A model that was trained from scratch, by the recipe."""
    folder = tmp_path_factory.mktemp("jointly")
    told = ["--dataset", str(masked), "--mask_values", "0", "255", "--class_names", "ground", "disc", "--horizontal_flip", "0.5"]
    run("segmentation", [*told, "--architecture", ARCHITECTURE, "--output_dir", str(folder), *SMALL])
    return folder


def test_from_scratch_the_recipe_trains_jointly_and_leaves_a_folder(jointly):
    model, figures = AutoModelForSemanticSegmentation.from_pretrained(jointly), figures_of(jointly)
    assert model.config.id2label == {0: "ground", 1: "disc"} and model.config.classifier_alpha == 1
    assert {"foreground_iou", "mean_iou", "cross_entropy_nats", "nll_nats", "psnr_db"} <= figures.keys()
    assert 0 <= figures["foreground_iou"] <= 1 and figures["foreground_iou"] <= 2 * figures["mean_iou"]
    card = (jointly / "README.md").read_text()
    assert "figures/masks.png" in card and "AutoModelForSemanticSegmentation" in card and (jointly / "figures" / "masks.png").is_file()
    inputs = AutoProcessor.from_pretrained(jointly)(np.zeros((16, 16, 3), np.uint8), return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2, 16, 16)


def test_the_recipe_leaves_a_frozen_vae_as_it_was(masked, jointly, tmp_path):
    told = ["--dataset", str(masked), "--mask_values", "0", "255", "--vae", str(jointly), "--head_only", "true"]
    run("segmentation", [*told, "--output_dir", str(tmp_path), *SMALL])
    before, after = (load_file(folder / "model.safetensors") for folder in (jointly, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("mask_head.")}
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path).config.classifier_alpha is None


def test_the_recipe_lays_transparent_pictures_on_colours(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for i in range(30):
        pixels = np.full((16, 16, 4), 200, np.uint8)
        pixels[..., 3] = 255 * (np.abs(np.mgrid[:16, :16] - 8).max(0) < 3 + i % 4)
        Pillow.fromarray(pixels).save(tmp_path / "data" / "train" / f"{i}.png")
    told = ["--dataset", str(tmp_path / "data"), "--mask_column", "alpha", "--architecture", ARCHITECTURE]
    run("segmentation", [*told, "--output_dir", str(tmp_path / "model"), *SMALL])
    assert figures_of(tmp_path / "model")["foreground_iou"] >= 0
    assert AutoModel.from_pretrained(tmp_path / "model").config.num_channels == 3


def test_as_many_classes_as_the_head_has(masked, jointly, tmp_path):
    told = ["--dataset", str(masked), "--mask_values", "0", "128", "255", "--vae", str(jointly), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"mask_values: received \[0, 128, 255\], expected 2 of them, the classes of"):
        run("segmentation", [*told, *SMALL])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head_only", "true"], "head_only: received True with joint=False, vae=None"),
        (["--vae", "somewhere", "--architecture", "{}"], "architecture: received '{}' with --vae somewhere"),
        (["--class_names", "one"], "class_names: received .*'one'"),
        (["--mask_values", "0", "7"], "row 0, field 'mask': got the value 1 in a mask, expected one of .0, 7."),
        (["--mask_column", "shade"], "no column 'shade'"),
        (["--architecture", '{"image_size": 32}'], "row 0, field 'image': got 64 x 64 pixels .*expected 32 x 32"),
        (["--mask_column", "alpha", "--architecture", '{"num_channels": 1}'], "num_channels: received 1 with --mask_column alpha"),
        (["--architecture", '{"likelihood": "bernoulli", "binarize": "dynamic"}'], "binarize: received 'dynamic', expected 'none'"),
        (["--monitor", "kl_nats"], "monitor: received 'kl_nats', expected one of cross_entropy_nats, last"),
    ],
)
def test_bad_options_are_named_before_the_first_step(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("segmentation", ["--dataset", "sprites:5:2", *options, "--output_dir", str(tmp_path), *SMALL])
