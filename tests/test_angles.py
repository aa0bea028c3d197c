"""Angles: known turns are found again, an offset changes nothing, symmetric shapes are measured modulo their symmetry."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from recipe_runs import recipe, run

from mmvae import ImageVAE, ImageVAEConfig, TextVAE, TextVAEConfig
from mmvae.angles import angle_told, angular_error, circular_correlation, fitted_offset, wrapped
from mmvae.data import load_rows, splits
from mmvae.data.turned import add_turns, angles
from mmvae.processing import ImageVAEImageProcessor

TRUE = 2 * math.pi * torch.rand(2000, generator=torch.Generator().manual_seed(0))
NOISE = math.radians(5) * torch.randn(2000, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("symmetry", [1, 2, 4])
@pytest.mark.parametrize("offset", [0.0, 0.3, -3.0])
def test_a_known_turn_with_any_offset_is_no_error(symmetry, offset):
    jumps = 2 * math.pi / symmetry * torch.randint(-3, 4, TRUE.shape)  # which of its like angles is told
    found = TRUE + offset + jumps
    fitted = fitted_offset(found, TRUE, symmetry)
    assert abs(wrapped(torch.tensor(fitted - offset), symmetry)) < 1e-5
    assert angular_error(found, TRUE, symmetry, fitted).max() < 1e-5
    sampling = 3 / math.sqrt(len(TRUE))  # R of a finite sample is not 0
    assert circular_correlation(found, TRUE, symmetry) == pytest.approx(1, abs=sampling)
    assert circular_correlation(-found, TRUE, symmetry) == pytest.approx(-1, abs=sampling)


@pytest.mark.parametrize("symmetry", [1, 2, 4])
def test_noise_gives_its_own_mean_error_and_correlation(symmetry):
    found = TRUE + NOISE + 1.0
    error = angular_error(found, TRUE, symmetry, fitted_offset(found, TRUE, symmetry))
    assert math.degrees(error.mean()) == pytest.approx(5 * math.sqrt(2 / math.pi), rel=0.06)
    expected = math.exp(-((symmetry * math.radians(5)) ** 2) / 2)
    assert circular_correlation(found, TRUE, symmetry) == pytest.approx(expected, abs=0.07)


@pytest.mark.parametrize("symmetry", [1, 2, 4])
def test_chance_is_half_of_the_largest_error(symmetry):
    found = TRUE.roll(1)
    error = angular_error(found, TRUE, symmetry, fitted_offset(found, TRUE, symmetry))
    assert math.degrees(error.mean()) == pytest.approx(90 / symmetry, rel=0.06)
    assert abs(circular_correlation(found, TRUE, symmetry)) < 0.1
    assert error.max() <= math.pi / symmetry + 1e-9


def test_wrapping_changes_no_direction():
    angle = torch.linspace(-20, 20, 99)
    for symmetry in (1, 2, 4):
        small = wrapped(angle, symmetry)
        assert small.min() >= -math.pi / symmetry and small.max() < math.pi / symmetry
        torch.testing.assert_close((symmetry * small).cos(), (symmetry * angle).cos(), atol=1e-4, rtol=0)


def test_what_a_latent_tells_of_the_angle():
    noise = torch.randn(2000, 3, generator=torch.Generator().manual_seed(2))
    plain, half, nothing = (
        torch.cat([extra, noise], 1)
        for extra in (torch.stack([TRUE.cos(), TRUE.sin()], 1), wrapped(TRUE)[:, None] / 2, torch.zeros(2000, 1))
    )
    told = {
        name: angle_told(x[:1500], TRUE[:1500], x[1500:], TRUE[1500:]) for name, x in (("plain", plain), ("half", half), ("no", nothing))
    }
    assert told["plain"]["linear"] > 0.999 and told["plain"]["mlp"] > 0.95
    assert told["half"]["linear"] < 0.6 < 0.9 < told["half"]["mlp"]  # an angle on the line, with a break
    assert max(told["no"].values()) < 0.05
    twice = angle_told(plain[:1500], TRUE[:1500], plain[1500:], TRUE[1500:], symmetry=2)
    assert twice["linear"] < 0.1 < 0.8 < twice["mlp"]


# ---- data


@pytest.mark.parametrize(("shape", "sizes"), [("heart", {0, 1}), ("ellipse", {0, 1}), ("big ellipse", {1}), ("small red heart", {0})])
def test_centred_sprites_are_one_shape_in_the_middle(shape, sizes):
    rows = splits(f"sprites:3:40:{shape}")["train"][:]
    assert len(rows["image"]) == 40 and all(set(shape.split()) <= set(caption.split()) for caption in rows["caption"])
    assert set(rows["size"]) == sizes
    down, across = np.mgrid[:64, :64] + 0.5
    for mask in rows["mask"]:
        assert max(abs(across[mask == 1].mean() - 32), abs(down[mask == 1].mean() - 32)) < 3  # a heart is heavier above
    again = load_rows(f"sprites:3:40:{shape}").select([7]).select_columns(["mask", "angle"])[0]
    assert np.array_equal(again["mask"], rows["mask"][7]) and again["angle"] == rows["angle"][7]
    period = math.pi if "ellipse" in shape else 2 * math.pi
    assert 0 <= min(rows["angle"]) and 0.8 * period < max(rows["angle"]) < period


def test_centred_sprites_that_there_are_not():
    for bad in ("sprites:3:40:circle", "sprites:5:40:heart", "sprites:3:40:big red heart at top left"):
        with pytest.raises(ValueError, match=r"expected a caption|centred must be a caption without a place, at levels 1\.\.\.3"):
            load_rows(bad)


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """Pictures with a bar from the middle upwards."""
    folder = tmp_path_factory.mktemp("bars")
    pixels = np.zeros((32, 32), np.uint8)
    pixels[2:16, 14:18] = 255
    features = Features({"image": Image()})
    for split, rows in (("train", 30), ("test", 10)):
        Dataset.from_dict({"image": [Pillow.fromarray(pixels)] * rows}, features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_pictures_are_turned_clockwise_by_the_angle_that_they_tell(bars):
    found = splits(f"turned:{bars}")
    assert {split: len(part) for split, part in found.items()} == {"train": 29, "validation": 1, "test": 10}
    rows = found["test"]
    assert rows["angle"][:] == pytest.approx(angles(10, "test"))
    down, across = np.mgrid[:32, :32] - 15.5
    for image, angle in zip(rows["image"], rows["angle"], strict=True):
        weight = np.asarray(image) / np.asarray(image).sum()
        assert math.atan2((weight * across).sum(), -(weight * down).sum()) % (2 * math.pi) == pytest.approx(angle, abs=0.02)
    assert splits(f"turned:{bars}")["test"]["angle"][:] == rows["angle"][:] != splits(f"turned:{bars}")["train"]["angle"][:10]


def test_what_cannot_be_turned(bars):
    for dataset, message in ((f"turned:turned:{bars}", "expected no 'angle'"), ("turned:sprites:3", "neither generated nor streamed")):
        with pytest.raises(ValueError, match=message):
            load_rows(dataset)
    with pytest.raises(ValueError, match="neither generated nor streamed"):
        load_rows(f"turned:{bars}", streaming=True)
    with pytest.raises(ValueError, match="expected no 'angle'"):
        add_turns(Dataset.from_dict({"image": [], "angle": []}), "train")


# ---- the recipe


@pytest.mark.parametrize("pose", ["rotation", "none"])
def test_the_recipe_measures_a_folder(pose, tmp_path, capsys):
    torch.manual_seed(0)
    model = ImageVAE(ImageVAEConfig(image_size=16, hidden_channels=[8, 8], latent_dim=6, pose=pose))
    model.save_pretrained(tmp_path)
    ImageVAEImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    options = ["--dataset", "sprites:3:60", "--fit_rows", "60", "--max_rows", "40", "--importance_samples", "2"]
    run("angle", ["--model", str(tmp_path), *options])
    record = json.loads((tmp_path / "angle.json").read_text())
    figures = record["metrics"]
    assert record["rows"] == 40 and "nll_nats" in figures and "heart" in capsys.readouterr().out
    for shape, chance in (("heart", 180), ("ellipse", 90), ("square", 45)):
        assert f"{shape}: R2 of the angle in the content, mlp" in figures
        error = figures.get(f"{shape}: mean absolute error, degrees")
        assert (error is None) == (pose == "none") and (error is None or 0 < error < chance), "half of the largest one is chance"


def test_a_model_of_no_pictures_is_named(tmp_path):
    TextVAE(TextVAEConfig(vocab_size=9, embedding_size=2, hidden_size=2, latent_dim=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="received .*, a TextVAE, expected an ImageVAE"):
        run("angle", ["--model", str(tmp_path), "--dataset", "sprites:3:60"])


def test_data_without_an_angle_is_named(tmp_path):
    pictures = Dataset.from_dict({"image": [Pillow.new("RGB", (16, 16))] * 4}, Features({"image": Image()}))
    pictures.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has no column 'angle'"):
        run("angle", ["--model", str(tmp_path), "--dataset", str(tmp_path / "train.parquet")])


def test_rows_are_measured_by_shape_with_its_symmetry():
    module = recipe("angle")
    data = {split: load_rows(f"sprites:3:{rows}:heart", "train").select(range(rows)) for split, rows in (("train", 8), ("validation", 6))}
    found = module.groups(data, 1)
    assert list(found) == ["heart"] and found["heart"][0] == 1 and found["heart"][1]["validation"].tolist() == list(range(6))
    mixed = {split: load_rows("sprites:3:50").select(range(50)) for split in ("train", "validation")}
    assert {name: symmetry for name, (symmetry, _) in module.groups(mixed, 1).items()} == {"square": 4, "ellipse": 2, "heart": 1}
    plain = {"train": Dataset.from_dict({"angle": [0.0, 1.0]})}
    assert module.groups(plain, 3)["all"][0] == 3
