"""Masks as data: numbers stay numbers, pictures and masks stay on each other, and overlaps are counted."""

import io

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image
from PIL import Image as Pillow

from mmvae.data import Augmentation, BadRow, ImageColumn, MaskColumn, Rows, on_random_colours, sprites
from mmvae.data.masks import at_sizes, numbers_of
from mmvae.metrics import overlaps
from mmvae.pictures import overlaid

MASK = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("crop", (2, 4), [[0, 1, 1, 0], [0, 0, 0, 0]]),
        ("pad", (2, 4), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ("stretch", (2, 4), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ("crop", (4, 4), [[1, 1, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2),
        ("stretch", (4, 1), [[1], [1], [0], [0]]),
    ],
)
def test_masks_come_back_to_the_pictures_own_sizes(mode, size, expected):
    mask = torch.tensor([[[1, 1], [0, 0]]])
    assert at_sizes(mask, [size], mode)[0].tolist() == expected
    assert at_sizes(mask, None, mode)[0].equal(mask[0])


def test_every_kind_of_mask_gives_its_numbers():
    palette = Pillow.fromarray(MASK)
    palette = palette.convert("P") if palette.mode != "P" else palette
    palette.putdata(MASK.flatten().tolist())
    palette.putpalette([200, 10, 10, 10, 200, 10])
    bits = Pillow.fromarray(MASK.astype(bool))
    for value in (
        MASK,
        MASK.tolist(),
        MASK.astype(bool),
        torch.from_numpy(MASK),
        Pillow.fromarray(MASK),
        bits,
        encoded(palette),
        encoded(bits),
    ):
        assert np.array_equal(numbers_of(value), MASK)


def test_values_become_classes_and_what_is_unlabelled_stays_so():
    column = MaskColumn("mask", (2, 3), (7, 0, 200))
    (found,) = column.prepare([[[7, 0, 200], [255, 7, 0]]])
    assert found.tolist() == [[0, 1, 2], [255, 0, 1]]
    assert MaskColumn("mask", (2, 3), (0, 255)).prepare([255 * MASK])[0].tolist() == MASK.tolist()  # black and white: nothing unlabelled
    with pytest.raises(ValueError, match=r"value 1 in a mask, expected one of \(7, 0, 200\)"):
        column.prepare([MASK])


@pytest.mark.parametrize("bad", [MASK / 2, MASK - 1.0, MASK[None], [[300]], np.empty((0, 2), np.uint8), Pillow.new("RGB", (3, 2)), "mask"])
def test_what_is_no_mask(bad):
    with pytest.raises(ValueError, match="expected"):
        numbers_of(bad)


def test_masks_of_jpeg_are_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        numbers_of(encoded(Pillow.fromarray(MASK), "JPEG"))


def test_a_mask_or_a_picture_of_another_size_names_row_field_and_sizes():
    picture, other = Pillow.new("RGB", (3, 2), "red"), Pillow.new("RGB", (2, 2), "red")
    columns = [ImageColumn("image", (2, 3), resize="refuse"), MaskColumn("mask", (2, 3))]
    features = Features({"image": Image(), "mask": Image()})

    def rows(pictures, masks):
        return Rows(Dataset.from_dict({"image": pictures, "mask": masks}, features), columns, name="set")

    mask, small = Pillow.fromarray(MASK), Pillow.fromarray(MASK[:, :2])
    batch = rows([picture] * 2, [mask] * 2).batch(torch.arange(2), torch.arange(2))
    assert batch["labels"].tolist() == [MASK.tolist()] * 2 and batch["labels"].dtype == torch.uint8
    with pytest.raises(BadRow, match="set: row 1, field 'mask': got a mask of 2 x 2 pixels .*expected 2 x 3"):
        rows([picture] * 2, [mask, small])
    with pytest.raises(BadRow, match="set: row 1, field 'image': got 2 x 2 pixels .*expected 2 x 3"):
        rows([picture, other], [mask] * 2)
    with pytest.raises(BadRow, match="set: row 0, field 'mask'"):
        rows([picture], [None])


def test_arrays_of_a_data_set_and_the_sprites_are_masks():
    declared = Dataset.from_dict({"mask": [MASK]}, Features({"mask": Array2D((2, 3), "uint8")}))
    assert Rows(declared, MaskColumn("mask", (2, 3))).batch(torch.tensor([0]), torch.tensor([0]))["labels"].tolist() == [MASK.tolist()]
    data = sprites(5, num_rows=20)
    found = Rows(data, MaskColumn("mask", 64)).batch(torch.arange(20), torch.arange(20))["labels"]
    assert np.array_equal(found, data[:]["mask"])


def test_masks_of_nothing_but_background_are_told(caplog):
    nothing = np.array([[0, 0, 255]] * 2, np.uint8)
    for last, told in ((nothing, 1), (MASK, 0)):
        caplog.clear()
        masks = [nothing, nothing, last]
        Rows(Dataset.from_dict({"mask": masks}, Features({"mask": Array2D((2, 3), "uint8")})), MaskColumn("mask", (2, 3)), name="set")
        assert len(caplog.messages) == told
        assert not told or "set: field 'mask': got no pixel of (1,) in 3 masks, expected some beside" in caplog.text


def test_pictures_and_masks_move_alike():
    keys, masks = torch.arange(20), torch.randint(2, (20, 8, 8), dtype=torch.uint8)
    move = Augmentation(horizontal_flip=0.5, vertical_flip=0.5, shift=2)
    pixels = ImageColumn("image", 8, 1, augmentation=move).collate(255 * masks[:, None], keys)["pixel_values"]
    labels = MaskColumn("mask", 8, augmentation=Augmentation(0.5, 0.5, 2, brightness=0.3)).collate(masks, keys)["labels"]
    assert torch.equal(pixels[:, 0], 255 * labels) and not torch.equal(labels, masks)
    with pytest.raises(ValueError, match="must not rotate"):
        MaskColumn("mask", 8, augmentation=Augmentation(rotation=10))


def test_what_is_opaque_stays_and_what_is_not_is_one_colour_of_the_key():
    pixels = torch.randint(256, (6, 4, 5, 5), dtype=torch.uint8)
    pixels[:, 3] = torch.tensor([0, 127, 128, 255, 0], dtype=torch.uint8)
    out = on_random_colours({"pixel_values": pixels, "row": torch.arange(6)}, torch.arange(6))
    assert out["labels"].dtype == torch.uint8 and torch.equal(out["labels"], (pixels[:, 3] >= 128).to(torch.uint8))
    assert torch.equal(out["pixel_values"][..., 3], pixels[:, :3, :, 3] / 255)
    behind = out["pixel_values"][..., 0]
    assert torch.equal(behind, out["pixel_values"][..., 4]) and (behind == behind[..., :1]).all()
    assert len(behind[..., 0].unique()) == 18  # other rows, other colours
    one = on_random_colours({"pixel_values": pixels[2:3]}, torch.arange(2, 3))
    assert torch.equal(one["pixel_values"], out["pixel_values"][2:3])
    with pytest.raises(ValueError, match="red, green, blue and alpha"):
        on_random_colours({"pixel_values": pixels[:, :3]}, torch.arange(6))


def test_overlaps_are_those_of_sets():
    predicted, labels = torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 255], [0, 1, -1, 1]])
    both, either = overlaps(predicted, labels, 3)
    assert both.tolist() == [[1, 1, 0], [0, 2, 0]]
    assert either.tolist() == [[1, 2, 1], [1, 3, 0]]
    masks = torch.randint(2, (4, 9, 9))
    found = overlaps(masks, torch.randint(2, (4, 9, 9)).where(masks > 2, masks), 2)
    assert torch.equal(*found)  # the same mask: all of either is in both


def test_masks_are_laid_over_grey_pictures():
    pixels, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, :8], masks[1, :8], masks[1, 8:16] = 1, 255, 2
    shown = overlaid(pixels, masks)
    grey = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.equal(shown[1, :, :8], grey[1, :, :8]) and torch.equal(shown[:, :, 16:], grey[:, :, 16:])
    assert not torch.allclose(shown[0, :, :8], grey[0, :, :8]) and not torch.allclose(shown[1, :, 8:16], grey[1, :, 8:16])
