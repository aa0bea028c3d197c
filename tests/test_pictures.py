import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmvae.charts import bars, curves
from mmvae.pictures import grid, reconstructions, table, traversals


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_grid_places_every_picture(tmp_path):
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).float()
    path = grid(colours.view(5, 3, 1, 1).expand(5, 3, 64, 64), tmp_path / "new folder" / "grid.png", columns=3)
    shown = pixels_of(path)
    assert shown.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    centres = [shown[33 + 66 * (i // 3), 33 + 66 * (i % 3)] for i in range(5)]
    assert np.array_equal(np.stack(centres), colours.numpy() * 255)
    assert np.array_equal(shown[33 + 66, 33 + 132], [255, 255, 255])  # the empty place


def test_small_pictures_are_enlarged_whole(tmp_path):
    picture = torch.rand(1, 1, 28, 28)
    shown = pixels_of(grid(picture, tmp_path / "one.png"))
    assert shown.shape == (56, 56, 3)
    assert np.array_equal(shown[::2, ::2, 0], (picture[0, 0] * 255).round().numpy())


def test_bytes_and_floats_look_alike(tmp_path):
    picture = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert np.array_equal(pixels_of(grid(picture, tmp_path / "a.png")), pixels_of(grid(picture / 255, tmp_path / "b.png")))


def test_transparency_is_laid_on_white(tmp_path):
    picture = torch.zeros(1, 4, 64, 64)
    assert pixels_of(grid(picture, tmp_path / "a.png")).min() == 255


def test_walks_have_one_row_each(tmp_path):
    assert pixels_of(grid(torch.rand(2, 5, 3, 64, 64), tmp_path / "a.png")).shape == (2 * 66 + 2, 5 * 66 + 2, 3)


def test_reconstructions_stand_under_their_originals(tmp_path):
    originals = torch.linspace(0, 1, 11).view(11, 1, 1, 1).expand(11, 1, 64, 64)
    shown = pixels_of(reconstructions(originals, 1 - originals, tmp_path / "a.png", columns=8))[..., 0].astype(int)
    assert shown.shape == (4 * 66 + 2, 8 * 66 + 2)
    for i in range(11):
        top, left = 33 + 132 * (i // 8), 33 + 66 * (i % 8)
        assert shown[top, left] == round(255 * i / 10)
        assert abs(shown[top, left] + shown[top + 66, left] - 255) <= 1


def test_traversals_name_their_units(tmp_path):
    walks = torch.zeros(3, 5, 1, 64, 64)
    with_names = pixels_of(traversals(walks, ["z1", "z2", "z3"], tmp_path / "a.png", title="units"))
    other_names = pixels_of(traversals(walks, ["z1", "z2", "z9"], tmp_path / "b.png", title="units"))
    assert with_names.shape[1] > 5 * 66
    assert (with_names == 0).all(-1).sum() > 15 * 60**2
    assert not np.array_equal(with_names, other_names)
    with pytest.raises(ValueError, match="labels: got 2"):
        traversals(walks, ["z1", "z2"], tmp_path / "c.png")


def test_bars_have_a_panel_for_each_title(tmp_path):
    panel = {"a word that costs $5": 0.2, "another": 0.1}
    one, six = (pixels_of(bars({f"topic {n}": panel for n in range(count)}, tmp_path / "a.png")) for count in (1, 6))
    assert abs(six.shape[0] - 2 * one.shape[0]) <= 1 and six.shape[1] == one.shape[1]
    longer = pixels_of(bars({"topic 0": panel | {"another": 0.2}}, tmp_path / "b.png"))
    assert (longer != one).any()
    with pytest.raises(ValueError, match="panels: got none"):
        bars({}, tmp_path / "c.png")


def test_curves_share_a_panel_between_training_and_evaluation(tmp_path):
    history = [{"step": step, "epoch": 0, "train/loss": 100 / step, "train/kl": math.log(step)} for step in range(1, 9)]
    two = pixels_of(curves(history, tmp_path / "two.png"))
    same = pixels_of(curves([*history, {"step": 8, "epoch": 1, "eval/loss": 20.0}], tmp_path / "same.png"))
    three = pixels_of(curves([*history, {"step": 8, "epoch": 1, "eval/psnr": 20.0}], tmp_path / "three.png"))
    assert two.shape == same.shape
    assert not np.array_equal(two, same)
    assert three.shape[1] > two.shape[1]


def test_curves_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="history: got 0 records"):
        curves([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"history\[1\]: got keys"):
        curves([{"step": 1, "loss": 2.0}, {"loss": 1.0}], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((1, 1, 4, 4), math.nan), "values"),
        (torch.full((1, 1, 4, 4), 1.5), "values"),
        (torch.full((1, 1, 4, 4), -0.1), "values"),
        (torch.zeros(1, 2, 4, 4), r"got shape \(1, 2, 4, 4\)"),
        (torch.zeros(4, 4), "got shape"),
        (torch.zeros(0, 1, 4, 4), "got shape"),
    ],
)
def test_what_is_not_a_picture_is_refused(pixels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        grid(pixels, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_pairs_must_match(tmp_path):
    with pytest.raises(ValueError, match="reconstructed: got 2 pictures, expected 3"):
        reconstructions(torch.zeros(3, 1, 4, 4), torch.zeros(2, 1, 4, 4), tmp_path / "a.png")


def test_table_shows_markup_as_text():
    lines = table({"a|b": ["<unk> *x* \n y", ""], "nats": [1.23456789, 7]}).splitlines()
    assert lines == [r"| a\|b | nats |", "|---|---|", r"| &lt;unk&gt; \*x\* y | 1.23457 |", "| *(empty)* | 7 |"]
    with pytest.raises(ValueError, match="columns: got lengths"):
        table({"a": [1], "b": [1, 2]})
