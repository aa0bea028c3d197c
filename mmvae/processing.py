"""What turns a user's images and sentences into a model's tensors: the image processor and tokenizers.

An image processor reads and resizes images by the rules of ``mmvae.data.images`` and divides by 255. A tokenizer emits
``BOS w1 ... wT EOS``.

Shapes: ``B`` batch, ``C`` channels, ``H, W`` height and width, ``T`` tokens.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from mmvae.folder import naming

__all__ = [
    "RESERVED_WORDS",
    "SPECIAL_TOKENS",
    "ImageVAEImageProcessor",
    "ImageVAEImageProcessorKwargs",
    "ImageVAEImageProcessorPil",
    "decode_text",
    "load_tokenizer",
    "train_tokenizer",
    "vocabulary_size",
]

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
RESERVED_WORDS = tuple(token for name, token in SPECIAL_TOKENS.items() if name != "unk_token")


class ImageVAEImageProcessorKwargs(ImagesKwargs, total=False):
    """Options of the image processors beyond those that every image processor has.

    Arguments:
        num_channels: channels of the output: 1 (grey), 3 (RGB) or 4 (RGBA).
        background: the colour (red, green, blue), 0..255, that shows through transparent pixels and fills the padding.
        resize_mode: "crop", "pad", "stretch" or "refuse" (see ``mmvae.data.images.resize``).
    """

    num_channels: int | None
    background: list[int] | tuple[int, ...] | None
    resize_mode: str | None


# `mmvae.data` is imported where it is used: it brings `datasets`, and `import mmvae`, which registers the image processor, must stay quick.
class _Pixels:
    """What the two backends share: the rules for pixels, the defaults, no mean or standard deviation."""

    valid_kwargs = ImageVAEImageProcessorKwargs
    model_input_names = ["pixel_values"]
    size = {"height": 64, "width": 64}
    resample = PILImageResampling.BILINEAR
    do_resize = True
    do_rescale = True
    do_normalize = False
    num_channels = 3
    background = (255, 255, 255)
    resize_mode = "crop"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """An image processor from a folder or from the Hub; an error in its file names the file."""
        with naming(pretrained_model_name_or_path, kwargs.get("subfolder"), "preprocessor_config.json"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is named by a path or an address; leave images as they are."""
        from mmvae.data.images import open_image

        if isinstance(image_url_or_urls, str | os.PathLike):
            return open_image({"bytes": None, "path": os.fspath(image_url_or_urls)}, paths=True)
        return super().fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        """A flat list of images; grey images without a channel axis count as images, also inside a list."""
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 2:
            return [images]
        if isinstance(images, list | tuple) and not any(isinstance(each, list | tuple) or getattr(each, "ndim", 0) > 3 for each in images):
            return list(self.fetch_images(images))
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **options: Any) -> list[Any]:
        """The images, read one by one; several that came without a channel axis are not taken for the channels of one."""
        channels = options.get("num_channels")
        bare = isinstance(images, np.ndarray | Tensor) and images.ndim == 3 and options.get("input_data_format") is None
        if bare and images.shape[-1] not in (1, 3, 4) and images.shape[0] not in (1, channels):
            raise ValueError(
                f"images: got one array of shape {tuple(images.shape)}, expected one picture, (H, W, C) or ({channels}, H, W); "
                "for several pictures a list of (H, W) arrays, or (N, C, H, W)"
            )
        return super()._prepare_image_like_inputs(images, *args, **options)

    def _read(
        self,
        image: Any,
        num_channels: int | None = None,
        background: Sequence[int] | None = None,
        resize_mode: str | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_resize: bool | None = None,
        size: SizeDict | None = None,
        resample: Any = None,
        **_: Any,
    ) -> Tensor:
        """One image to (C, H, W) uint8, resized where ``size`` is a height and a width (the backend does the others)."""
        from mmvae.data.images import RESIZES, open_image, resize, to_pixels

        if num_channels not in (1, 3, 4):
            raise ValueError(f"num_channels: got {num_channels!r}, expected 1 (grey), 3 (RGB) or 4 (RGBA)")
        if background is None or len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError(f"background: got {background!r}, expected red, green and blue in 0..255")
        if isinstance(image, Tensor):
            image = image.cpu().numpy()
        if input_data_format is not None and getattr(image, "ndim", 0) == 3:
            image = np.moveaxis(image, 0, -1) if ChannelDimension(input_data_format) is ChannelDimension.FIRST else image
        pixels = to_pixels(open_image(image, max_pixels=sys.maxsize), num_channels, tuple(background))
        if not do_resize or size is None or not (size.height and size.width):
            return torch.from_numpy(np.array(pixels))
        if resize_mode not in RESIZES:
            raise ValueError(f"resize_mode: got {resize_mode!r}, expected one of {', '.join(RESIZES)}")
        if resample not in (None, PILImageResampling.BILINEAR, InterpolationMode.BILINEAR):
            raise ValueError(f"resample: got {resample!r}, expected bilinear, which the models are trained with")
        return torch.from_numpy(np.array(resize(pixels, (size.height, size.width), resize_mode, tuple(background))))

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any = None) -> list[Tensor]:
        """Masks (H, W) int64 of a model's logits, at the pictures' own sizes: see ``mmvae.data.masks.at_sizes``."""
        from mmvae.data.masks import at_sizes

        return at_sizes(outputs.logits.argmax(1), target_sizes, self.resize_mode)

    def rescale(self, image: Any, scale: float, **_: Any) -> Any:
        """Divide, as the models do with 8-bit pixels: a product with 1/255 differs in the last bit."""
        return (image.float() if isinstance(image, Tensor) else image.astype(np.float32)) / (1 / scale)


class ImageVAEImageProcessor(_Pixels, TorchvisionBackend):
    """Images of any kind to ``pixel_values`` in [0, 1], the range of every likelihood: 8-bit pixels, resized, divided by 255.

    The rules for pixels are those of ``mmvae.data.images``: pictures of Pillow in every mode, paths of JPEG, PNG and WEBP files, arrays and
    tensors (integers in 0..255, uint16 in 0..65535 or floats in [0, 1], which are rounded to 8 bits), with or without a channel axis. With
    ``do_rescale=False`` pixels stay uint8, which the models accept too.

    Arguments:
        size: ``{"height": int, "width": int}`` of the output, or ``{"shortest_edge": int}`` together with ``do_center_crop``.
        num_channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        background: the colour (red, green, blue), 0..255, that shows through transparent pixels and fills the padding.
        resize_mode: how a picture comes to ``height`` and ``width``, as in training: "crop", "pad", "stretch" or "refuse", the ``resize``
            of ``mmvae.data.ImageColumn``, always bilinear.

    Returns:
        When called: a ``BatchFeature`` with ``pixel_values``, (B, C, H, W) float32 if ``return_tensors="pt"``, else a list of (C, H, W).

    Raises:
        ValueError: what is not an image, or has values outside the range of its type; several pictures in one array without a channel
            axis.

    Example:
        >>> processor = ImageVAEImageProcessor(size={"height": 28, "width": 28}, num_channels=1)
        >>> tuple(processor([np.zeros((28, 28), np.uint8)], return_tensors="pt").pixel_values.shape)
        (1, 1, 28, 28)
    """

    def process_image(self, image: Any, device: Any = None, **options: Any) -> Tensor:
        """One image to (C, H, W) uint8 on ``device``."""
        return self._read(image, **options).to(device)


class ImageVAEImageProcessorPil(_Pixels, PilBackend):
    """The same as ``ImageVAEImageProcessor`` with numpy arrays; only a ``shortest_edge`` is resized by Pillow."""

    def process_image(self, image: Any, **options: Any) -> np.ndarray:
        """One image to (C, H, W) uint8."""
        return self._read(image, **options).numpy()


def _refuse_reserved(texts: Iterable[str], normalizer: normalizers.Normalizer) -> Iterator[str]:
    """The texts, checked: strings that do not become, in capitals for example, the words that mark the ends of a sentence."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}]: got {type(text).__name__}, expected str")
        written = normalizer.normalize_str(text)
        if found := [word for word in RESERVED_WORDS if word in written]:
            raise ValueError(f"texts[{i}]: got text with the reserved word {found[0]!r}, expected text without it")
        yield text


def _train_words(texts: Iterable[str], tokenizer: Tokenizer, vocab_size: int, min_frequency: int) -> None:
    """Fill a word-level tokenizer with the most frequent words; of equally frequent ones the alphabetically first.

    Not ``WordLevelTrainer``: where a text already contains "<unk>" that gives the word a second id.
    """
    counts = Counter(
        word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    special = list(SPECIAL_TOKENS.values())
    words = sorted((word for word in counts if word not in special), key=lambda word: (-counts[word], word))
    words = [word for word in words if counts[word] >= min_frequency]
    if len(words) < 2:
        raise ValueError(f"texts: {len(words)} distinct words occur {min_frequency} times or more, expected at least 2")
    vocabulary = (special + words)[:vocab_size]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL_TOKENS["unk_token"])


def _train_bpe(texts: Iterable[str], tokenizer: Tokenizer, vocab_size: int, min_frequency: int) -> None:
    """Fill a byte-level BPE tokenizer; every text can be written in it, so nothing is unknown."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(alphabet) + len(SPECIAL_TOKENS)):
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {least} for kind='bpe' (all bytes)")
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text.strip())
            yield text.replace(SPECIAL_TOKENS["unk_token"], " ")  # one token by itself, not letters to merge

    known = {"special_tokens": list(SPECIAL_TOKENS.values()), "initial_alphabet": sorted(alphabet)}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False, **known)
    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise ValueError("texts: no text that is not empty, expected at least one")


def train_tokenizer(
    texts: Iterable[str], kind: str = "whitespace", vocab_size: int = 10_000, min_frequency: int = 1, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer made from texts: ``BOS w1 ... wT EOS``; the same texts in any order give the same ids.

    Text is put into Unicode normal form C. "<unk>" in a text is the unknown word. Decoding with ``skip_special_tokens=True`` hides unknown
    words; ``decode_text`` shows them.

    Arguments:
        texts: sentences.
        kind: "whitespace" (words between white space) or "bpe" (byte-level pairs, at least 260 tokens).
        vocab_size: the greatest number of ids, the four special tokens included.
        min_frequency: rarer words (pairs) are left out.
        lowercase: whether to fold case, also of what is encoded later.

    Returns:
        A tokenizer with pad, bos, eos and unk tokens (ids 0 to 3) that gives ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: no texts, fewer than two words, a reserved word in a text, a size that is too small, an unknown kind.
        TypeError: a text that is not a string.

    Example:
        >>> tokenizer = train_tokenizer(["a small heart", "a big <unk>"])
        >>> tokenizer("a <unk> heart").input_ids
        [1, 4, 3, 6, 2]
    """
    if kind not in ("whitespace", "bpe"):
        raise ValueError(f"kind: got {kind!r}, expected 'whitespace' or 'bpe'")
    if vocab_size < (least := len(SPECIAL_TOKENS) + 2):
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {least} ({len(SPECIAL_TOKENS)} are special tokens)")
    words = kind == "whitespace"
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=SPECIAL_TOKENS["unk_token"]) if words else models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if words else pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not words:
        tokenizer.decoder = decoders.ByteLevel()
    (_train_words if words else _train_bpe)(_refuse_reserved(texts, tokenizer.normalizer), tokenizer, vocab_size, min_frequency)
    return _with_ends(tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def _with_ends(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that gives BOS ... EOS, of the general class: one of a model's own sets its own ends again wherever it is loaded."""
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, padding_side="right", **options)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B:1 {eos}:1",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    return tokenizer


def load_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Any pretrained tokenizer, made to emit ``BOS ... EOS`` padded on the right.

    What is missing is completed by a stated rule, and logged: BOS and EOS are the CLS and SEP of encoders such as BERT where they
    exist; else, and for PAD always, a new token is added, so the vocabulary grows; see :func:`vocabulary_size`. A PAD that is also the
    unknown word, as descendants of Llama 2 have it, counts as missing: unknown words would vanish with the padding. What is returned is
    a ``PreTrainedTokenizerFast`` wherever the tokenizer is a fast one, so that it emits the same once saved and loaded.

    Arguments:
        name_or_path: an id on the Hub or a local folder.
        options: handed to ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError: a tokenizer that cannot be made to emit BOS ... EOS, or whose files cannot be read.
    """
    with naming(name_or_path, options.get("subfolder"), "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    if tokenizer.pad_token_id == tokenizer.unk_token_id:
        tokenizer.pad_token = None
    stand_ins = {"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token, "pad_token": None}
    missing = {name: token or SPECIAL_TOKENS[name] for name, token in stand_ins.items() if getattr(tokenizer, name) is None}
    if missing:
        logger.warning("%s has no %s: using %s", name_or_path, ", ".join(missing), ", ".join(missing.values()))
        tokenizer.add_special_tokens(missing)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        kept = {name: getattr(tokenizer, name) for name in ("model_max_length", "clean_up_tokenization_spaces", "extra_special_tokens")}
        return _with_ends(tokenizer.backend_tokenizer, **kept, **tokenizer.special_tokens_map)
    tokenizer.padding_side = "right"
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    ends, ids = (tokenizer.bos_token_id, tokenizer.eos_token_id), tokenizer("a").input_ids
    if (ids[0], ids[-1]) != ends or len(ids) < 3:
        raise ValueError(f"tokenizer {name_or_path}: 'a' is encoded as {ids}, expected {ends[0]} (BOS) ... {ends[1]} (EOS)")
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """``vocab_size`` of a model that reads what the tokenizer writes: one more than its largest id, since ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """The sentences that a reader should see: up to the first EOS, without BOS and padding, with unknown words shown.

    Arguments:
        tokenizer: one with bos, eos and pad tokens.
        ids: (B, T) int64 token ids, for example of ``generate``.

    Returns:
        B sentences.
    """
    hidden, sentences = {tokenizer.bos_token_id, tokenizer.pad_token_id}, []
    for row in ids.tolist():
        row = row[1:] if row and row[0] == tokenizer.bos_token_id else row  # BOS and EOS can be one token, as in GPT-2
        row = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        sentences.append(tokenizer.decode([token for token in row if token not in hidden], skip_special_tokens=False))
    return sentences
