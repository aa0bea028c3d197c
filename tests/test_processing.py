import json
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPTNeoXTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from mmvae import MMVAEConfig, MMVAEProcessor, TextVAE, TextVAEConfig
from mmvae.data import ImageColumn
from mmvae.experiment import make_tokenizer
from mmvae.processing import (
    ImageVAEImageProcessor,
    ImageVAEImageProcessorPil,
    decode_text,
    load_tokenizer,
    train_tokenizer,
)

SENTENCES = [
    "big red heart at top left on dark",
    "small <unk> ellipse on light",
    "big heart",
    "the company 's shares | fell $ N",
]
BACKENDS = pytest.mark.parametrize("backend", [ImageVAEImageProcessor, ImageVAEImageProcessorPil])


def processor(backend=ImageVAEImageProcessor, side=28, **options):
    return backend(size={"height": side, "width": side}, **options)


def pixel_values(images, backend=ImageVAEImageProcessor, **options) -> torch.Tensor:
    return processor(backend, **options)(images, return_tensors="pt").pixel_values


# --- images


@BACKENDS
@pytest.mark.parametrize("num_channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_every_mode_gives_pixels_in_range(backend, num_channels, mode):
    x = pixel_values([Image.new(mode, (30, 20))], backend, num_channels=num_channels)
    assert x.shape == (1, num_channels, 28, 28)
    assert x.dtype == torch.float32
    assert 0 <= x.min() <= x.max() <= 1


@BACKENDS
def test_the_same_picture_in_any_dress(backend):
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    expected = torch.from_numpy(grey).view(1, 1, 28, 28) / 255
    dresses = [
        grey,
        [grey],
        grey[None],
        grey[..., None],
        grey[None, None],
        torch.from_numpy(grey),
        [torch.from_numpy(grey)],
    ]
    dresses += [Image.fromarray(grey), [Image.fromarray(grey).convert("RGB")], grey / 255, torch.from_numpy(grey) / 255]
    dresses += [np.repeat(grey[..., None], 3, -1), [np.repeat(grey[None], 3, 0)], np.repeat(grey[None, None], 3, 1)]
    for dress in dresses:
        torch.testing.assert_close(pixel_values(dress, backend, num_channels=1), expected, atol=1e-6, rtol=0)


@BACKENDS
def test_list_of_grey_arrays_is_a_batch(backend):
    images = [np.full((28, 28), value, np.uint8) for value in (0, 51, 255)]
    assert pixel_values(images, backend, num_channels=3)[:, :, 3, 3].tolist() == [
        [0.0] * 3,
        [pytest.approx(0.2)] * 3,
        [1.0] * 3,
    ]


@BACKENDS
def test_a_list_may_mix_pictures_with_and_without_channels(backend, tmp_path):
    grey = np.full((28, 28), 51, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    dresses = [grey, grey[None], Image.fromarray(grey), torch.from_numpy(grey), str(tmp_path / "grey.png")]
    for first in range(len(dresses)):
        x = pixel_values(dresses[first:] + dresses[:first], backend)
        assert torch.equal(x, torch.full((5, 3, 28, 28), 51) / 255)
    with pytest.raises(ValueError, match=r"\(28,\)"):
        pixel_values([grey, grey[0]], backend)


@BACKENDS
@pytest.mark.parametrize(("n", "num_channels"), [(5, 1), (4, 1), (4, 3), (3, 1), (3, 4)])
def test_a_stack_of_grey_images_needs_a_channel_axis(backend, n, num_channels):
    stack = np.zeros((n, 28, 28), np.uint8)
    for images in (stack, torch.from_numpy(stack)):
        with pytest.raises(ValueError, match=rf"shape \({n}, 28, 28\), expected .*a list of \(H, W\) arrays, or \(N, C, H, W\)"):
            pixel_values(images, backend, num_channels=num_channels)
    for images in (stack[:, None], list(stack)):
        assert pixel_values(images, backend, num_channels=num_channels).shape == (n, num_channels, 28, 28)


@BACKENDS
def test_one_picture_may_come_bare(backend):
    for shape, num_channels in [((3, 28, 28), 3), ((4, 28, 28), 4), ((1, 28, 28), 3), ((28, 28, 4), 3), ((28, 28, 1), 3)]:
        assert len(pixel_values(np.zeros(shape, np.uint8), backend, num_channels=num_channels)) == 1
    named = pixel_values(np.zeros((4, 28, 28), np.uint8), backend, num_channels=3, input_data_format="channels_first")
    assert named.shape == (1, 3, 28, 28)


@BACKENDS
@pytest.mark.parametrize("background", [(255, 255, 255), (0, 102, 255)])
def test_transparency_shows_the_stated_colour(backend, background):
    clear = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    shown = pixel_values(clear, backend, num_channels=3, background=background)[0, :, 0, 0]
    assert (shown * 255).round().tolist() == list(background)
    assert pixel_values(clear, backend, num_channels=4)[0, :, 0, 0].tolist() == [1, 0, 0, 0]


@BACKENDS
def test_one_channel_is_luma(backend):
    red = pixel_values(Image.new("RGB", (28, 28), (255, 0, 0)), backend, num_channels=1)
    assert red[0, 0, 0, 0].item() == pytest.approx(76 / 255)


def test_backends_agree_on_a_real_resize():
    ramp = Image.fromarray(np.add.outer(np.arange(90), np.arange(60)).astype(np.uint8)).convert("RGB")
    ours, pil = (pixel_values(ramp, backend, side=32) for backend in (ImageVAEImageProcessor, ImageVAEImageProcessorPil))
    assert (ours - pil).abs().max() <= 1.5 / 255


@BACKENDS
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (20, 24), (32, 32)])
@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_pixels_are_those_of_training(backend, shape, mode, num_channels, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8))
    column = ImageColumn("image", (32, 28), num_channels, background=(0, 102, 255), resize=mode)
    trained = column.pack(column.prepare([picture]))[0] / 255
    options = {"num_channels": num_channels, "background": (0, 102, 255), "resize_mode": mode}
    backend(size={"height": 32, "width": 28}, **options).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["resize_mode"] == mode
    published = backend.from_pretrained(tmp_path)
    assert torch.equal(published([picture], return_tensors="pt").pixel_values[0], trained)
    by_call = backend(size={"height": 32, "width": 28}, num_channels=num_channels, background=(0, 102, 255))
    assert torch.equal(by_call([picture], resize_mode=mode, return_tensors="pt").pixel_values[0], trained)


@BACKENDS
def test_pictures_are_cropped_unless_told_otherwise(backend):
    assert backend().resize_mode == ImageColumn("image", 8).resize == "crop"


@BACKENDS
def test_other_ways_to_resize(backend):
    picture = Image.new("RGB", (90, 40))
    assert processor(backend)(picture, do_resize=False, return_tensors="pt").pixel_values.shape == (1, 3, 40, 90)
    assert backend(size={"shortest_edge": 20})(picture, return_tensors="pt").pixel_values.shape == (1, 3, 20, 45)
    with pytest.raises(ValueError, match="resize_mode: got 'squeeze', expected one of crop, pad, stretch"):
        processor(backend, resize_mode="squeeze")(picture)
    with pytest.raises(ValueError, match="resample: got .*, expected bilinear"):
        processor(backend, resample=0)(picture)


def test_paths_are_read_by_the_same_rules(tmp_path):
    image = Image.new("RGBA", (28, 28), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    for path in (str(tmp_path / "clear.png"), tmp_path / "clear.png", [tmp_path / "clear.png"]):
        assert torch.equal(pixel_values(path), pixel_values(image))


def test_bytes_stay_bytes_without_rescale():
    x = processor(do_rescale=False)(Image.new("L", (28, 28), 9), return_tensors="pt").pixel_values
    assert x.dtype == torch.uint8
    assert x.unique().tolist() == [9]


@BACKENDS
def test_bad_images_are_refused(backend):
    for image, message in [
        (np.full((28, 28), np.nan, np.float32), "nan"),
        (np.full((28, 28), 1.5, np.float32), "1.5"),
        (np.full((28, 28), -1, np.int64), "-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            pixel_values(image, backend)
    with pytest.raises(ValueError, match="num_channels: got 2"):
        pixel_values(np.zeros((28, 28), np.uint8), backend, num_channels=2)
    with pytest.raises(ValueError, match="background: got"):
        pixel_values(np.zeros((28, 28), np.uint8), backend, background=(1, 2))


@BACKENDS
def test_image_processor_round_trip(backend, tmp_path):
    before = processor(backend, num_channels=1, background=(1, 2, 3), resize_mode="pad")
    before.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ImageVAEImageProcessor"  # either backend loads it
    after = backend.from_pretrained(tmp_path)
    image = Image.new("RGBA", (9, 9), (7, 7, 7, 99))
    assert torch.equal(*(p(image, return_tensors="pt").pixel_values for p in (before, after)))
    assert after.to_dict() == before.to_dict() | {"background": [1, 2, 3]}


# --- text


@pytest.mark.parametrize(("kind", "size"), [("whitespace", 100), ("bpe", 300)])
def test_sentences_come_back(kind, size):
    tokenizer = train_tokenizer(SENTENCES, kind=kind, vocab_size=size)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    ids, mask = batch.input_ids, batch.attention_mask
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == tokenizer.eos_token_id).all()
    assert torch.equal(ids == tokenizer.pad_token_id, mask == 0)
    assert ids[1].tolist().count(tokenizer.unk_token_id) == 1
    assert decode_text(tokenizer, ids) == SENTENCES
    assert tokenizer.decode(ids[1], skip_special_tokens=False).startswith("<bos>")
    assert tokenizer.decode(ids[2], skip_special_tokens=True) == SENTENCES[2]


@pytest.mark.parametrize("kind", ["whitespace", "bpe"])
def test_tokenizer_round_trip(kind, tmp_path):
    before = train_tokenizer(SENTENCES, kind=kind, vocab_size=300, lowercase=True)
    before.save_pretrained(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*SENTENCES, "", "  BIG  heart ", "unheard of", "ÜÑÏ ❤️ 好"]
    assert after(texts).input_ids == before(texts).input_ids
    assert len(after) == len(before)
    assert after.model_input_names == ["input_ids", "attention_mask"]
    ids = torch.tensor([before(texts[1]).input_ids])
    assert decode_text(after, ids) == decode_text(before, ids) == [SENTENCES[1]]
    assert load_tokenizer(str(tmp_path))(texts).input_ids == before(texts).input_ids


@pytest.mark.parametrize("kind", ["whitespace", "bpe"])
def test_vocabulary_does_not_depend_on_the_order_of_texts(kind):
    texts = [f"w{i % 7} w{i % 5} v{i % 3}" for i in range(60)]
    vocabularies = [train_tokenizer(order, kind=kind, vocab_size=270).get_vocab() for order in (texts, texts[::-1], texts)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_size_and_frequency_choose_the_words():
    texts = ["a a a a b b b c c d d e"]
    limited = train_tokenizer(texts, vocab_size=7).get_vocab()
    assert sorted(limited, key=limited.get) == ["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "c"]
    frequent = train_tokenizer(texts, min_frequency=2).get_vocab()
    assert sorted(frequent, key=frequent.get)[4:] == ["a", "b", "c", "d"]


def test_unknown_and_empty_rows():
    tokenizer = train_tokenizer(SENTENCES)
    assert tokenizer("").input_ids == tokenizer("   ").input_ids == [1, 2]
    assert tokenizer("nothing known").input_ids == [1, 3, 3, 2]
    assert decode_text(tokenizer, torch.tensor([[1, 2, 0, 0], [1, 3, 3, 2]])) == ["", "<unk> <unk>"]


def test_generated_text_ends_at_the_first_eos():
    tokenizer = train_tokenizer(SENTENCES)
    big, heart = tokenizer.convert_tokens_to_ids(["big", "heart"])
    assert decode_text(tokenizer, torch.tensor([[1, big, heart, 2, big], [big, heart, heart, big, 0]])) == [
        "big heart",
        "big heart heart big",
    ]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "0 distinct words"),
        (["", " "], {}, "0 distinct words"),
        (["a a", "a"], {}, "1 distinct words"),
        (["a b"], {"min_frequency": 2}, "0 distinct words occur 2 times"),
        ([], {"kind": "bpe"}, "expected at least one"),
        (["a b"], {"kind": "bpe", "vocab_size": 200}, "vocab_size: got 200"),
        (["a b"], {"vocab_size": 5}, "vocab_size: got 5"),
        (["a b"], {"kind": "letters"}, "kind: got 'letters'"),
        (["a b", "c <eos> d"], {}, r"texts\[1\]: got text with the reserved word '<eos>'"),
        (["a b", "c <EOS> d"], {"lowercase": True}, r"texts\[1\]: got text with the reserved word '<eos>'"),
        (["a b", "c <Bos> d"], {"lowercase": True, "kind": "bpe"}, r"texts\[1\]: got text with the reserved word '<bos>'"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, **options)


def test_rows_must_be_strings():
    with pytest.raises(TypeError, match=r"texts\[1\]: got NoneType"):
        train_tokenizer(["a b", None])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_can_write_anything(text):
    text = unicodedata.normalize("NFC", text)
    assert decode_text(BPE, torch.tensor([BPE(text).input_ids])) == [text]


BPE = train_tokenizer(SENTENCES, kind="bpe", vocab_size=300)


def pretrained(folder, **special) -> str:
    """A tokenizer folder such as other libraries publish: words, no template, and only the special tokens given."""
    tokens = ["[UNK]", "a", "b", *special.values()]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(tokens))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        ends = [(special[name], tokenizer.token_to_id(special[name])) for name in ("cls_token", "sep_token")]
        tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "bos", "eos", "pad"),
    [
        ({}, "<bos>", "<eos>", "<pad>"),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[P]"}, "<s>", "</s>", "[P]"),
        ({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, "[CLS]", "[SEP]", "[PAD]"),
        ({"bos_token": "<|end|>", "eos_token": "<|end|>"}, "<|end|>", "<|end|>", "<pad>"),
    ],
)
def test_any_pretrained_tokenizer_serves(special, bos, eos, pad, tmp_path):
    tokenizer = load_tokenizer(pretrained(tmp_path / "theirs", **special))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, eos, pad)
    batch = tokenizer(["a b", "a"], padding=True, return_tensors="pt")
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert batch.input_ids.tolist() == [[ends[0], 1, 2, ends[1]], [ends[0], 1, ends[1], tokenizer.pad_token_id]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert decode_text(tokenizer, batch.input_ids) == ["a b", "a"]
    tokenizer.save_pretrained(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(["a b"]).input_ids == tokenizer(["a b"]).input_ids


def test_an_unknown_word_is_no_padding(tmp_path):
    theirs = pretrained(tmp_path / "theirs", bos_token="<s>", eos_token="</s>", pad_token="[UNK]", unk_token="[UNK]")
    tokenizer, ids = make_tokenizer(theirs, [], 0)
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.pad_token_id) == ("<pad>", "[UNK]", len(tokenizer) - 1)
    batch = tokenizer(["a zzz b", "a"], padding=True, return_tensors="pt")
    assert decode_text(tokenizer, batch.input_ids) == ["a [UNK] b", "a"]
    model = TextVAE(TextVAEConfig(**ids, embedding_size=4, hidden_size=4, latent_dim=2))
    assert model.num_tokens(batch.input_ids).tolist() == model.num_tokens(**batch).tolist() == [4, 2]
    tokenizer.save_pretrained(tmp_path / "ours")
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(["a zzz b", "a"], padding=True).input_ids == batch.input_ids.tolist()


def test_ids_may_have_gaps(tmp_path):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    tokenizer, ids = make_tokenizer(str(tmp_path), [], 0)
    assert ids["vocab_size"] == 10 > len(tokenizer)
    config = TextVAEConfig(**ids, embedding_size=4, hidden_size=4, latent_dim=2)
    assert TextVAE(config)(**tokenizer(["a b"], return_tensors="pt")).loss.isfinite()
    MMVAEProcessor({"text": tokenizer}).check(MMVAEConfig(modalities={"text": config}, latent_dim=2))


_NEOX = {"vocab": {"<|endoftext|>": 0, "<|padding|>": 1, "a": 2, "b": 3, "Ġ": 4, "Ġb": 5}, "merges": [("Ġ", "b")]}


@pytest.mark.parametrize(
    "theirs",
    [
        T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁b", -1.0)], extra_ids=2),
        GPTNeoXTokenizer(**_NEOX),
        GPTNeoXTokenizer(**_NEOX, add_bos_token=True, add_eos_token=True),
    ],
    ids=["t5", "neox", "neox-with-ends"],
)
def test_a_model_s_own_tokenizer_keeps_its_ends_when_saved(theirs, tmp_path):
    """Such a class sets its own template whenever it is built, whatever the file says."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_tokenizer(str(tmp_path / "theirs"))
    words = theirs("a b", add_special_tokens=False).input_ids
    assert ours("a b").input_ids == [ours.bos_token_id, *words, ours.eos_token_id]
    ours.save_pretrained(tmp_path / "ours")
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(["a b", ""]).input_ids == ours(["a b", ""]).input_ids
    assert (len(again), again.special_tokens_map) == (len(ours), ours.special_tokens_map)
    assert again.extra_special_tokens == ours.extra_special_tokens == theirs.extra_special_tokens


def test_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_penn_treebank(real_data):
    texts = (real_data / "ptb" / "train.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer(texts, vocab_size=10_002)  # 9,998 words, and "<unk>" among the four special tokens
    ids = tokenizer(texts).input_ids
    assert len(tokenizer) == 10_002
    assert (len(ids), sum(map(len, ids)) - len(ids)) == (42_068, 929_589)  # EOS counted, BOS not
    assert sum(row.count(tokenizer.unk_token_id) for row in ids) == sum(text.split().count("<unk>") for text in texts) == 45_020
    assert decode_text(tokenizer, torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids[:200]], True)) == texts[:200]
