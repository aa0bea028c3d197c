"""Captioned sprites: a row is a pure function of its place, and what it says about itself is true."""

import numpy as np
import pytest
import torch

from mmvae.data import parse_caption, sprites
from mmvae.data.sprites import ATTRIBUTES, BACKGROUNDS, COLOURS, SYMMETRY, coverage, render

LEVELS = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_does_not_depend_on_how_many_are_asked_for(level):
    few, many = sprites(level, num_rows=7)[:], sprites(level, num_rows=301)[:]
    for name, values in few.items():
        assert np.array_equal(values, many[name][:7]), name


def test_rows_are_read_alike_in_any_way():
    rows = sprites(5, num_rows=300)
    whole, picked = rows[:], rows[[299, 3, -1]]
    assert np.array_equal(picked["image"], whole["image"][[299, 3, 299]])
    assert rows[3]["caption"] == rows["caption"][3] == rows.select([3])[0]["caption"] == whole["caption"][3]
    assert rows.select_columns(["angle"])[:]["angle"] == whole["angle"]
    with pytest.raises(IndexError):
        rows[300]


def test_splits_levels_and_seeds_share_no_row():
    sets = [sprites(5, split, 400) for split in ("train", "validation", "test")] + [
        sprites(5, num_rows=400, seed=1),
        sprites(4, num_rows=400),
    ]
    pictures = [picture.tobytes() for rows in sets for picture in rows["image"]]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("level", LEVELS)
def test_captions_name_the_labels(level):
    rows = sprites(level, num_rows=300)
    table = rows.select_columns(["caption", *ATTRIBUTES])[:]
    seen = set()
    for i, text in enumerate(table["caption"]):
        named = parse_caption(text)
        assert list(named) == list(ATTRIBUTES)[:level]
        assert all(rows.features[name].int2str(table[name][i]) == value for name, value in named.items())
        seen |= set(named.values())
    assert seen == {value for name in list(ATTRIBUTES)[:level] for value in ATTRIBUTES[name]}


def test_levels_five_reads_as_documented():
    text = "big red heart at top left on dark"
    assert list(parse_caption(text).values()) == ["heart", "big", "red", "top left", "dark"]


@pytest.mark.parametrize(
    "text",
    ["", "red heart", "big heart at top left", "heart on dark", "big red heart at top left on dark ", "big red circle"],
)
def test_other_sentences_are_no_captions(text):
    with pytest.raises(ValueError, match="expected a caption"):
        parse_caption(text)


def test_picture_shows_what_the_labels_say():
    rows = sprites(5, num_rows=200)[:]
    y, x = np.mgrid[:64, :64] + 0.5
    for i, (image, mask) in enumerate(zip(rows["image"], rows["mask"], strict=True)):
        inside, behind = np.median(image[mask == 1], 0), np.median(image[mask == 0], 0)
        assert abs(inside - COLOURS[rows["colour"][i]]).max() < 25
        assert abs(behind - BACKGROUNDS[rows["background"][i]]).max() < 25
        assert int(x[mask == 1].mean() > 32) + 2 * int(y[mask == 1].mean() > 32) == rows["position"][i]
        assert (60 < mask.sum() < 180) if rows["size"][i] == 0 else (200 < mask.sum() < 600)
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any(), "the shape leaves the picture"


def test_below_level_five_the_background_is_dark_and_below_four_it_is_plain():
    rows = sprites(3, num_rows=50)[:]
    assert set(rows["background"]) == {1}
    edge = np.stack([image[0, 0] for image in rows["image"]])
    assert (edge == BACKGROUNDS[1]).all()
    assert sprites(4, num_rows=1)["image"][0][:8].std() > 0.5


@pytest.mark.parametrize("shape", list(ATTRIBUTES["shape"]))
def test_angle_is_the_smallest_that_gives_the_picture(shape):
    number = torch.tensor([ATTRIBUTES["shape"].index(shape)])

    def at(angle):
        return coverage(number, torch.tensor([0.2]), torch.tensor([0.5]), torch.tensor([0.5]), torch.tensor([angle]))

    period = 2 * np.pi / SYMMETRY[shape]
    assert torch.allclose(at(0.3), at(0.3 + period), atol=1e-4)
    assert (at(0.3) - at(0.3 + period / 2)).abs().max() > 0.5
    angles = [a for a, s in zip(*sprites(1, num_rows=500).select_columns(["angle", "shape"])[:].values(), strict=True) if s == number]
    assert 0 <= min(angles) < 0.1 * period and 0.9 * period < max(angles) < period


def test_edges_are_anti_aliased_and_keep_the_area():
    one, side = torch.tensor([0]), torch.tensor([0.2])
    for size in (32, 64, 200):
        covered = coverage(one, side, torch.tensor([0.51]), torch.tensor([0.47]), torch.tensor([0.4]), size)
        assert ((covered > 0.1) & (covered < 0.9)).any()
        assert covered.mean().item() == pytest.approx(0.16, rel=0.01)


def test_render_turns_clockwise():
    heart, mask = render(*(torch.tensor([v]) for v in (2, 1, 0, 1, 0.5, 0.5, np.pi / 2)), image_size=64)
    columns = mask[0].sum(0).nonzero().flatten()
    assert mask[0][:, columns[0]].sum() < mask[0][:, columns[-3]].sum(), "the tip, down at angle 0, points left after a quarter turn"
    assert heart.shape == (1, 64, 64, 3) and heart.dtype == torch.uint8


@pytest.mark.parametrize("arguments", [{"level": 0}, {"level": 6}, {"split": "dev"}, {"num_rows": 0}, {"image_size": 8}])
def test_arguments_outside_their_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sprites(**arguments)
