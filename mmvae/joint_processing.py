"""One processor for all modalities of a joint model: raw pictures, sentences, documents and sounds, any of them missing, to its inputs.

A folder holds ``processor_config.json``, which names the parts in the order of the model's modalities, and each part in a
folder of the modality's name, so that two tokenizers do not overwrite each other.

Shapes: ``B`` batch, ``M`` modalities, ``C`` channels, ``H, W`` height and width, ``T`` tokens.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.image_processing_utils import BaseImageProcessor

from mmvae.folder import naming
from mmvae.models.configuration import input_name, prefixes
from mmvae.models.inherited import nearest
from mmvae.processing import decode_text, vocabulary_size
from mmvae.vectorizer import TopicVAEVectorizer

__all__ = ["MMVAEProcessor"]

_KINDS = {
    "image_processor": (BaseImageProcessor, AutoImageProcessor, "preprocessor_config.json"),
    "tokenizer": (PreTrainedTokenizerBase, AutoTokenizer, "tokenizer.json or tokenizer_config.json"),
    "vectorizer": (TopicVAEVectorizer, TopicVAEVectorizer, "preprocessor_config.json"),
    "feature_extractor": (SequenceFeatureExtractor, AutoFeatureExtractor, "preprocessor_config.json"),
}
_ABSENT = {"image_processor": Image.new("L", (1, 1)), "feature_extractor": np.zeros(1, np.float32)}
_OF_TEXTS = ("input_ids", "attention_mask")  # all that a model reads of what a tokenizer gives
_ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _kind(name: str, part: Any) -> str:
    for kind, (base, *_) in _KINDS.items():
        if isinstance(part, base):
            return kind
    expected = "expected an image processor, a tokenizer, a vectorizer or a feature extractor"
    raise TypeError(f"modalities[{name!r}]: got {type(part).__name__}, {expected}")


def check_facts(what: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a processor that does not fit a model; ``facts`` are (the processor's, the model's) by field. ValueError."""
    for field, (got, expected) in facts.items():
        if got != expected:
            if isinstance(got, list):  # of words
                place, pair = next((n, pair) for n, pair in enumerate(zip_longest(got, expected)) if pair[0] != pair[1])
                words = zip((got, expected), pair, strict=True)
                got, expected = (f"of {len(all_)} words, number {place} {word!r}" for all_, word in words)
            raise ValueError(f"{what}: got {field} {got}, expected the model's, {expected}")


def facts_of_words(tokenizer: Any, config: Any) -> dict[str, int]:
    """What a model's configuration must say of a tokenizer, by field; this may know fewer words, and have no such special token."""
    ends = {field: getattr(tokenizer, field) for field in _ENDS}
    size = max(vocabulary_size(tokenizer), getattr(config, "vocab_size", None) or 0)
    return {"vocab_size": size} | {field: number for field, number in ends.items() if number is not None}


def _listed(values: Any, kind: str) -> Any:
    """The values of some rows as a list, None where one is missing; one value, a sound as an array too, or pictures in one as it is."""
    one = (str, bytes, Mapping, Image.Image, os.PathLike, *((Tensor, np.ndarray) if kind == "image_processor" else ()))
    sound = kind == "feature_extractor" and isinstance(values, Tensor | np.ndarray) and values.ndim == 1 and values.dtype != object
    if isinstance(values, one) or sound or not hasattr(values, "__len__"):
        return values
    nulls = values.isna() if hasattr(values, "isna") else [value is None for value in values]  # of pandas NaN and NA, too
    return [None if null else value for value, null in zip(values, nulls, strict=True)]


class MMVAEProcessor(ProcessorMixin):
    """The processors of a joint model's modalities, by name, in the order of the columns of ``present``.

    ``save_pretrained`` may write into the model's folder; ``AutoProcessor.from_pretrained`` reads it after ``import mmvae``.

    Arguments:
        modalities: image processors, tokenizers, of topics vectorizers, and of modalities of one's own feature extractors of transformers
            (such as of sounds, ``Wav2Vec2FeatureExtractor``) by name; names are identifiers.

    Raises:
        ValueError: no modality, or a name that is no identifier.
        TypeError: a part that is none of these.

    Example:
        >>> from mmvae.processing import ImageVAEImageProcessor, train_tokenizer
        >>> parts = {"image": ImageVAEImageProcessor(), "text": train_tokenizer(["a big red heart"])}
        >>> inputs = MMVAEProcessor(parts)(images=[None, Image.new("RGB", (64, 64))], text=["a big heart", None])
        >>> inputs["present"].tolist(), tuple(inputs["pixel_values"].shape), inputs["input_ids"].tolist()
        ([[False, True], [True, False]], (2, 3, 64, 64), [[1, 4, 5, 6, 2], [1, 2, 0, 0, 0]])
    """

    def __init__(self, modalities: Mapping[str, Any]) -> None:
        if not modalities:
            raise ValueError("modalities: got none, expected at least one")
        for name in modalities:
            if not name.isidentifier():  # it becomes a folder's name, too
                raise ValueError(f"modalities: got the name {name!r}, expected letters, digits and underscores")
        super().__init__()
        self.kinds = {name: _kind(name, part) for name, part in modalities.items()}
        self.parts = dict(modalities)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the order of the columns of ``present``."""
        return tuple(self.parts)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first modality's that has one, which ``Trainer`` asks for its special tokens; where none has, one that has none."""
        return next((part for name, part in self.parts.items() if self.kinds[name] == "tokenizer"), PreTrainedTokenizerBase())

    @property
    def model_input_names(self) -> list[str]:
        """What the model's inputs are called, "present" among them."""
        return [name for names in self._names().values() for name in names.values()] + ["present"]

    def _names(self) -> dict[str, dict[str, str]]:
        """By modality: the name of an input in the batch by what the part calls it."""
        names = {modality: part.model_input_names for modality, part in self.parts.items()}
        for modality, kind in self.kinds.items():
            if kind == "tokenizer":
                names[modality] = [name for name in _OF_TEXTS if name in names[modality]]
        before = prefixes(names)
        return {modality: {name: input_name(before[modality], name) for name in own} for modality, own in names.items()}

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> BatchFeature:
        """Inputs of the model from pictures and sentences, one kind alone or several.

        Arguments:
            images: a picture or a list of B of them, for the only image modality. In a list ``None`` is a row without one. A column of a
                data set or of a data frame, and an array of sentences, is as good as a list.
            text: a sentence or a list of B of them, for the only text modality, in the same way.
            return_tensors: as for every processor.
            padding, truncation, max_length: of every tokenizer; ``padding`` of every feature extractor, too.
            images_kwargs, audio_kwargs: options of every image processor and of every feature extractor, ``{"sampling_rate": 16000}``.
            named: the same by modality, ``en=[...], de=[...]``; documents for topics, and sounds, are given in no other way.

        Returns:
            The inputs of the modalities that were given, batch first. If a list held ``None`` also ``present`` (B,M) bool, and what
            stands in the place of what is absent is finite: black pixels, BOS EOS, no words, silence.

        Raises:
            ValueError: nothing given, an unknown modality, ``images`` or ``text`` where several modalities could be meant, different
                numbers of rows, or a row that has nothing.
        """
        given = self._given(images, text, named)
        rows = {name: values if isinstance(values, list | tuple) else None for name, values in given.items()}
        options = {"image_processor": dict(images_kwargs or {}), "tokenizer": {"padding": padding}, "vectorizer": {}}
        options["feature_extractor"] = {"padding": padding, **(audio_kwargs or {})}
        options["tokenizer"] |= {} if truncation is None else {"truncation": truncation}
        options["tokenizer"] |= {} if max_length is None else {"max_length": max_length}
        batch: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for name, values in given.items():
            kind = self.kinds[name]
            values = [values] if isinstance(values, str) else values
            if rows[name] is not None:
                absent = _ABSENT.get(kind, "")
                values = [absent if value is None else value for value in values]
            inputs = self.parts[name](values, **options[kind], return_tensors=return_tensors)
            names = self._names()[name]
            batch |= {names[key]: value for key, value in inputs.items() if key in names}
            sizes[name] = len(inputs[next(iter(names))])
        if len(set(sizes.values())) > 1:
            raise ValueError(f"got different numbers of rows, {sizes}, expected the same")
        if any(value is None for values in rows.values() for value in values or ()):
            batch["present"] = self._present(rows, next(iter(sizes.values())))
        return BatchFeature(batch, tensor_type=return_tensors)

    def _given(self, images: Any, text: Any, named: dict[str, Any]) -> dict[str, Any]:
        """What was given by modality; a modality that bears the name of an argument is meant by it."""
        given = dict(named)
        for name, values, kind in (("images", images, "image_processor"), ("text", text, "tokenizer")):
            if values is not None:
                modality = name if name in self.parts else self._only(kind, name)
                if modality in given:
                    raise ValueError(f"got both {name} and {modality}, which are the same modality, expected one of them")
                given[modality] = values
        for name in given:
            if name not in self.parts:
                raise ValueError(
                    f"got the modality {name!r}, expected one of {list(self.parts)}; the nearest is {nearest(name, self.parts)!r}"
                )
        given = {name: _listed(given[name], self.kinds[name]) for name in self.parts if given.get(name) is not None}
        if not given:
            raise ValueError(f"got no input, expected images, text or one of {list(self.parts)}")
        if empty := [name for name, values in given.items() if isinstance(values, list | tuple) and not values]:
            raise ValueError(f"{empty[0]}: got an empty list, expected at least one row")
        return given

    def _only(self, kind: str, argument: str) -> str:
        fitting = [name for name in self.parts if self.kinds[name] == kind]
        if len(fitting) != 1:
            found = f"several have one, {fitting}: name one of them" if fitting else f"none of {list(self.parts)} has one"
            raise ValueError(f"{argument}: expected the only modality with a {kind.replace('_', ' ')}, but {found}")
        return fitting[0]

    def _present(self, rows: Mapping[str, Sequence[Any] | None], size: int) -> Tensor:
        present = torch.zeros(size, len(self.parts), dtype=torch.bool)
        for column, name in enumerate(self.parts):
            if name in rows:
                present[:, column] = torch.tensor([value is not None for value in rows[name] or [True] * size])
        if not present.any(1).all():
            raise ValueError(f"row {int(present.any(1).int().argmin())}: got no modality, expected one of {list(rows)}")
        return present

    def batch_decode(self, ids: Any, modality: str | None = None) -> list[str]:
        """The sentences that a reader should see, without BOS, EOS and padding; see ``mmvae.processing.decode_text``.

        Arguments:
            ids: (B,T) token ids, for example of ``generate``.
            modality: whose they are; needed where there are several tokenizers.

        Raises:
            ValueError: ``modality`` has no tokenizer, or it is not given and there are several.
        """
        name = self._only("tokenizer", "modality") if modality is None else modality
        texts = [name for name, kind in self.kinds.items() if kind == "tokenizer"]
        if name not in texts:
            raise ValueError(f"modality: got {modality!r}, expected one of {texts}, which have a tokenizer")
        return decode_text(self.parts[name], torch.as_tensor(ids))

    def decode(self, ids: Any, modality: str | None = None) -> str:
        """The same of one row, (T,) token ids."""
        return self.batch_decode(torch.as_tensor(ids).unsqueeze(0), modality)[0]

    def check(self, config: Any) -> None:
        """Refuse a processor that does not fit a model.

        Arguments:
            config: the model's ``MMVAEConfig``.

        Raises:
            ValueError: other modalities or another order, another size of the vocabulary, other special tokens, words or pictures.
        """
        if list(config.modalities) != list(self.parts):
            raise ValueError(
                f"processor: got the modalities {list(self.parts)}, expected the model's, {list(config.modalities)}, in their order"
            )
        for name, child in config.modalities.items():
            check_facts(f"processor of {name!r}", self._facts(name, child))

    def _facts(self, name: str, child: Any) -> dict[str, tuple[Any, Any]]:
        """What the processor and the model must agree on: (the processor's, the model's) by field, as far as the model states it."""
        part = self.parts[name]
        if self.kinds[name] == "feature_extractor":
            return {}
        if self.kinds[name] == "tokenizer":
            facts = facts_of_words(part, child)
        elif self.kinds[name] == "vectorizer":
            facts = {"vocabulary": part.vocabulary}
        else:
            size = part.size
            facts = {"num_channels": getattr(part, "num_channels", 3), "image_size": (size["height"], size["width"])}
        stated = {field: getattr(child, field, None) for field in facts}
        if stated[next(iter(facts))] is None:
            raise ValueError(f"processor of {name!r}: got {type(part).__name__}, expected one that suits a {child.model_type!r} model")
        if isinstance(stated.get("image_size"), int):
            stated["image_size"] = (stated["image_size"],) * 2
        return {f: (facts[f], tuple(s) if f == "image_size" else s) for f, s in stated.items() if s is not None}

    def to_dict(self) -> dict[str, Any]:
        """What ``processor_config.json`` holds: the parts' names and kinds, in order."""
        return {"processor_class": type(self).__name__, "parts": [[name, kind] for name, kind in self.kinds.items()]}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write the processor; the parts come into folders of the modalities' names.

        Arguments:
            save_directory: folder, the model's for example.
            push_to_hub: whether to publish it, too.
            kwargs: ``repo_id`` (by default the folder's name) and other options of ``push_to_hub``.
        """
        for name, part in self.parts.items():
            part.save_pretrained(Path(save_directory) / name)
        files = super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A processor from a folder or from the Hub; an error in a file names the file, and of a part its folder."""
        with naming(pretrained_model_name_or_path, kwargs.get("subfolder"), "processor_config.json"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        parts = (processor_dict or {}).get("parts")
        listed = isinstance(parts, list) and all(isinstance(part, list) and len(part) == 2 for part in parts)
        if not listed or not all(str(name).isidentifier() and kind in _KINDS for name, kind in parts):
            raise ValueError(
                f"{name_or_path}: processor_config.json has the parts {parts!r}, expected pairs of a name and one of {list(_KINDS)}"
            )
        below = kwargs.pop("subfolder", "") or ""
        kwargs.pop("_from_auto", None)
        read = {}
        for name, kind in parts:
            _, reader, files = _KINDS[kind]
            with naming(name_or_path, below, name, files):
                read[name] = reader.from_pretrained(name_or_path, subfolder=str(Path(below, name)), **kwargs)
        return [read]
