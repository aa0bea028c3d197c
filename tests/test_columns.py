"""Columns: every kind of picture and text to defined arrays."""

import io
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmvae.data import Augmentation, ImageColumn, LabelColumn, TextColumn
from mmvae.noise import fold
from mmvae.processing import train_tokenizer

GREEN = (0, 255, 0)


def tokenizer(words="a b c d e"):
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *words.split()]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), names, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def pixels(value, channels=3, **options):
    column = ImageColumn("image", (2, 3), channels, **{"background": GREEN, "formats": ("JPEG", "PNG", "WEBP", "TIFF"), **options})
    return column.pack(column.prepare([value]))[0]


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def filled(mode, colour):
    return Image.new(mode, (3, 2), colour)


def palette(**info):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    image.info |= info
    return image


MODES = {
    "1": (filled("1", 1), (255, 255, 255)),
    "L": (filled("L", 77), (77, 77, 77)),
    "LA": (filled("LA", (77, 255)), (77, 77, 77)),
    "LA clear": (filled("LA", (77, 0)), GREEN),
    "P": (palette(), (200, 100, 50)),
    "P clear": (palette(transparency=1), GREEN),
    "P half": (palette(transparency=bytes([255, 128])), (100, 177, 25)),
    "RGB": (filled("RGB", (200, 100, 50)), (200, 100, 50)),
    "RGB clear": (encoded(filled("RGB", (200, 100, 50)), transparency=(200, 100, 50)), GREEN),
    "RGBA": (filled("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
    "RGBA half": (filled("RGBA", (200, 100, 50, 128)), (100, 177, 25)),
    "CMYK": (filled("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "I;16": (Image.fromarray(np.full((2, 3), 257 * 60, np.uint16)), (60, 60, 60)),
    "I;16 PNG": (encoded(Image.fromarray(np.full((2, 3), 65535, np.uint16))), (255, 255, 255)),
    "I": (filled("I", 257 * 60), (60, 60, 60)),
    "F": (filled("F", 0.2), (51, 51, 51)),
    "F TIFF": (encoded(filled("F", 0.2), "TIFF"), (51, 51, 51)),
    "array": (np.full((2, 3), 9, np.uint8), (9, 9, 9)),
    "list": ([[9, 9, 9], [9, 9, 9]], (9, 9, 9)),
    "int16 array": (np.full((2, 3), 200, np.int16), (200, 200, 200)),
    "int32 array": (np.full((2, 3), 200, np.int32), (200, 200, 200)),
    "uint16 array": (np.full((2, 3), 257 * 60, np.uint16), (60, 60, 60)),
    "bool array": (np.ones((2, 3), bool), (255, 255, 255)),
    "float CHW tensor": (torch.full((1, 2, 3), 0.2), (51, 51, 51)),
    "HWC": (np.tile(np.array([1, 2, 3], np.uint8), (2, 3, 1)), (1, 2, 3)),
    "CHW": (np.broadcast_to(np.array([1, 2, 3, 0], np.uint8)[:, None, None], (4, 8, 12)), GREEN),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_defined_pixels(name):
    value, colour = MODES[name]
    assert (pixels(value).int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 1
    grey = torch.tensor(colour).float() @ torch.tensor([0.299, 0.587, 0.114])
    assert (pixels(value, 1).float() - grey).abs().max() <= 1.1
    assert pixels(value, 4).shape == (4, 2, 3)


def test_four_channels_keep_transparency():
    assert pixels(filled("RGBA", (200, 100, 50, 128)), 4)[:, 0, 0].tolist() == [200, 100, 50, 128]
    assert pixels(filled("RGB", (200, 100, 50)), 4)[:, 0, 0].tolist() == [200, 100, 50, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_turns_the_picture_upright(orientation, format):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3)
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
             6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    assert np.array_equal(pixels(encoded(stored, format, exif=exif), 1)[0], upright)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "NoneType"),
        ("a.png", "str"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (b"", "cannot be decoded"),
        (b"<html>", "cannot be decoded"),
        (encoded(filled("RGB", 0).resize((90, 90)))[:-40], "cannot be decoded"),
        (encoded(filled("RGB", 0), "BMP"), r"cannot be decoded \(it is a BMP\), .*WEBP.*: convert it, .* or name BMP in"),
        (encoded(filled("RGB", 0), "GIF"), r"cannot be decoded \(it is a GIF\), .*WEBP.*: convert it, .* or name GIF in"),
        (encoded(Image.new("L", (4001, 4000))), "4001 x 4000"),
        (np.array([[0.5, np.nan]]), "finite"),
        (np.array([[0.5, 1.5]]), r"\[0, 1\]"),
        (filled("F", 3.0), r"\[0, 1\]"),
        (filled("I", 70000), "65535"),
        (np.full((2, 3), 256), "255"),
        (np.full((2, 3), 257, np.int16), "255"),
        (np.full((2, 3), 257, np.int32), "255"),
        (np.zeros((2, 3, 5)), "shape"),
        (np.zeros((0, 3), np.uint8), "3 x 0 pixels"),
    ],
)
def test_bad_pictures_are_refused(value, message):
    with pytest.raises(ValueError, match="(?s)^got .*expected") as caught:
        pixels(value)
    assert re.search(message, str(caught.value))


def test_resize_modes():
    wide = Image.new("RGB", (8, 2), (10, 20, 30))
    wide.paste((200, 200, 200), (0, 0, 2, 2))
    frame = {"image_size": 4, "background": GREEN}
    crop, pad, stretch = (ImageColumn("image", resize=mode, **frame).prepare([wide])[0] for mode in ("crop", "pad", "stretch"))
    assert (crop == np.array([10, 20, 30])[:, None, None]).all(), "the bright edge is cut off"
    assert (pad[:, [0, 1, 3]][:, [0, 2]] == np.array(GREEN)[:, None, None]).all() and pad[0, 1].tolist() == stretch[0, 1].tolist()
    assert stretch[0, 0, 0] > 150 and stretch[0, 0, 3] == 10
    transparent = ImageColumn("image", 4, 4, resize="pad").prepare([wide])[0]
    assert transparent[3, 0, 0] == 0 and transparent[3, 1, 0] == 255


@pytest.mark.parametrize("mode", ["crop", "stretch"])
def test_a_picture_that_grows_beyond_memory_is_refused_before_it_is_resized(mode):
    thread = np.zeros((1_000_000, 1), np.uint8)
    with pytest.raises(ValueError, match=r"^got 1000000 x 1 pixels \(height x width\), .* 64 x 64, expected at most 32000000$"):
        ImageColumn("image", 64, 1, resize=mode).prepare([thread])
    assert ImageColumn("image", 64, 1, resize="pad").prepare([thread])[0].shape == (1, 64, 64)


@pytest.mark.parametrize(
    "argument",
    [{"image_size": 0}, {"num_channels": 2}, {"background": 256}, {"background": (1, 2)}, {"resize": "zoom"}],
)
def test_image_column_checks_its_arguments(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        ImageColumn("image", **{"image_size": 4, **argument})


def photos(n=6, channels=3):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, channels, 9, 12), dtype=np.uint8))


EVERYTHING = Augmentation(0.5, 0.5, 2, 0.5, 20, 0.3, 0.3, 0.3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_augmentation_depends_on_the_key_alone(channels):
    images, keys = photos(channels=channels), fold(0, 1, torch.arange(6))
    together = EVERYTHING(images, keys)
    assert torch.equal(together, torch.cat([EVERYTHING(images[i : i + 1], keys[i : i + 1]) for i in range(6)]))
    assert not torch.equal(together, EVERYTHING(images, fold(0, 2, torch.arange(6))))
    assert together.dtype == torch.uint8 and together.shape == images.shape


def test_no_augmentation_is_no_change():
    assert Augmentation()(photos(), torch.arange(6)) is not None and torch.equal(Augmentation()(photos(), torch.arange(6)), photos())


def test_flips_shift_and_turn_are_what_they_are_called():
    images, keys = photos(), fold(0, torch.arange(6))
    assert torch.equal(Augmentation(horizontal_flip=1)(images, keys), images.flip(-1))
    assert torch.equal(Augmentation(vertical_flip=1)(images, keys), images.flip(-2))
    shifted = Augmentation(shift=1)(images, keys)
    padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    windows = [[padded[i, :, y : y + 9, x : x + 12] for y in range(3) for x in range(3)] for i in range(6)]
    assert all(any(torch.equal(shifted[i], window) for window in windows[i]) for i in range(6))
    flat = torch.full((4, 3, 9, 12), 100, dtype=torch.uint8)
    assert torch.equal(Augmentation(min_scale=0.3, rotation=90)(flat, keys[:4]), flat), "edges are repeated, not filled"


@pytest.mark.parametrize("argument", [{"horizontal_flip": 1.1}, {"min_scale": 0}, {"rotation": math.nan}, {"brightness": -1}])
def test_augmentation_checks_its_arguments(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        Augmentation(**argument)


def test_text_is_framed_and_padded():
    column = TextColumn("text", tokenizer(), 6)
    prepared = column.prepare(["a b", "", "zzz \x00 <unk>", " c \r\n d "])
    assert [ids.tolist() for ids in prepared] == [[1, 4, 5, 2], [1, 2], [1, 3, 3, 3, 2], [1, 6, 7, 2]]
    out = column.collate(column.pack(prepared)[torch.tensor([1, 0, 3])], torch.zeros(3))
    assert out["input_ids"].tolist() == [[1, 2, 0, 0], [1, 4, 5, 2], [1, 6, 7, 2]] and out["input_ids"].dtype == torch.int64
    assert out["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_long_text_is_an_error_unless_truncation_is_asked_for():
    with pytest.raises(ValueError, match="got 7 tokens, expected at most 4"):
        TextColumn("text", tokenizer(), 4).prepare(["a b c d e"])
    column = TextColumn("text", tokenizer(), 4, truncate=True)
    assert [ids.tolist() for ids in column.prepare(["a b c d e", "a b"])] == [[1, 4, 5, 2], [1, 4, 5, 2]]
    assert column.num_truncated == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "an empty cell"), (3, "int"), ("a \ud800", "surrogate at character 2"), ("a <eos> b", "BOS, EOS"), ("a <pad> b", "or PAD")],
)
def test_bad_text_is_refused(value, message):
    with pytest.raises(ValueError, match=f"got .*{message}.*expected"):
        TextColumn("text", tokenizer(), 9).prepare(["a", value])


PIECES = ["a", "b ", " ", "\t", "\0", "\ufeff", "\r\n", "\u200d", "\u2028", "\x85", "👩\u200d👧", "\u05e9\u05dc", "e\u0301", "\u00e9"]
PIECES += ["\ud800", "<eos>", "<unk>", "𝄞", "x" * 3000]


@pytest.mark.parametrize("kind", ["whitespace", "bpe"])
def test_text_of_every_kind_has_tokens_or_is_refused_by_name(kind):
    chance, counts = random.Random(0), Counter()
    words = train_tokenizer(["a b c d e"], kind, vocab_size=270)
    column = TextColumn("text", words, max_length=30_000)
    for _ in range(1000):
        drawn = [chance.choice(PIECES) if chance.random() < 0.8 else chr(chance.randrange(0x110000)) for _ in range(chance.randrange(9))]
        text = "".join(drawn)
        wrong = any(0xD800 <= ord(character) < 0xE000 for character in text) or "<eos>" in text
        if wrong:
            with pytest.raises(ValueError, match="surrogate at character|BOS, EOS or PAD"):
                column.prepare([text])
        else:
            (ids,) = column.prepare([text])
            assert (ids[0], ids[-1]) == (words.bos_token_id, words.eos_token_id) and len(ids) >= 2, text
            assert not {words.bos_token_id, words.eos_token_id, words.pad_token_id} & {*ids[1:-1].tolist()}
        counts["refused" if wrong else "accepted"] += 1
    assert counts["accepted"] > 500 and counts["refused"] > 100
    assert np.array_equal(*column.prepare(["e\u0301", "\u00e9"])), "two ways to write one letter"


def test_text_column_needs_special_tokens():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), pad_token="<unk>")
    with pytest.raises(ValueError, match="no bos_token_id"):
        TextColumn("text", bare)
    with pytest.raises(ValueError, match="max_length"):
        TextColumn("text", tokenizer(), 1)


def test_labels_by_name_or_number():
    column = LabelColumn("label", ("cat", "dog"))
    packed = column.pack(column.prepare(["dog", 0, np.int64(1)]))
    assert column.collate(packed, torch.zeros(3))["labels"].tolist() == [1, 0, 1]
    for bad in (-1, 2, 0.5, math.nan, "cow", None, True, 2**70):
        with pytest.raises(ValueError, match=r"got .*, expected a number in 0\.\.\.1"):
            column.prepare([bad])
    with pytest.raises(ValueError, match="different"):
        LabelColumn("label", ("cat", "cat"))
