"""What a text VAE writes: sentences of latents or of classes, and reconstructions, by transformers' generation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from mmvae.models.base import seeded
from mmvae.models.classes import ClassVAE
from mmvae.recurrent import GRUState

# what sees every row by itself, whatever others there are; a function of the caller's may not
_BY_ROW = (
    MaxLengthCriteria,
    EosTokenCriteria,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
)


def _number(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and fits(value)


_WHOLE = ("a whole number from 1 on", lambda value: isinstance(value, int) and value >= 1)
_OF_ANY = {  # what each must be
    "num_beams": _WHOLE,
    "num_return_sequences": _WHOLE,
    "guidance_scale": ("none or 1: there is no prompt to guide by", lambda value: value == 1),
}
_OF_SAMPLING = {
    "temperature": ("more than 0", _number(lambda value: 0 < value < math.inf)),
    "top_k": ("0 (all) or more", _number(lambda value: value >= 0)),
    "top_p": ("in (0, 1]", _number(lambda value: 0 < value <= 1)),
    "top_h": ("in (0, 1]", _number(lambda value: 0 < value <= 1)),
    "min_p": ("in [0, 1]", _number(lambda value: 0 <= value <= 1)),
    "typical_p": ("in (0, 1]", _number(lambda value: 0 < value <= 1)),
    "epsilon_cutoff": ("in [0, 1)", _number(lambda value: 0 <= value < 1)),
    "eta_cutoff": ("in [0, 1)", _number(lambda value: 0 <= value < 1)),
}
_OF_BEAMS = {
    "length_penalty": ("a finite number", _number(math.isfinite)),
    "early_stopping": ("True, False or 'never'", lambda value: isinstance(value, bool) or value == "never"),
}


def settled(name: str, options: Mapping[str, Any], folder: GenerationConfig) -> Any:
    """What an option of ``generate`` comes to: as it is given, else as a given ``generation_config`` has it, else as the folder's has."""
    if name in options:
        return options[name]
    own = getattr(options.get("generation_config"), name, None)
    return getattr(folder, name) if own is None else own


def check_strategy(options: Mapping[str, Any], folder: GenerationConfig) -> None:
    """Refuse options of ``generate`` that are out of range, or that the strategy would not use.

    Arguments:
        options: that were given.
        folder: what holds where they say nothing; options in a ``generation_config`` are transformers' to check.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    rules = {name: rule for name, rule in (_OF_ANY | _OF_SAMPLING | _OF_BEAMS).items() if options.get(name) is not None}
    for name, (expected, fits) in rules.items():
        if not fits(options[name]):
            raise ValueError(f"{name}: received {options[name]!r}, expected {expected}")
    samples, beams = settled("do_sample", options, folder), (settled("num_beams", options, folder) or 1) > 1
    for name in rules:
        if name in _OF_SAMPLING and not samples:
            how = f"a {'beam' if beams else 'greedy'} search, which draws nothing"
            raise ValueError(f"{name}: received {options[name]!r} for {how}: expected do_sample=True, or no {name}")
        if name in _OF_BEAMS and not beams:
            raise ValueError(f"{name}: received {options[name]!r} for one beam: expected num_beams from 2 on, or no {name}")


def largest(scores: Tensor) -> Tensor:
    """``scores.argmax(-1)`` of (N, V), the first of equal ones; of a large vocabulary on a CPU by blocks, in a third of the time.

    There ``amax`` is vectorised and ``argmax`` is not, so the block with the largest score is found first, then the place in it.
    """
    size = scores.shape[1]
    width = math.isqrt(size)
    if not scores.is_cpu or size < 1024:
        return scores.argmax(-1)
    whole = size // width * width
    tops = scores[:, :whole].unflatten(1, (-1, width)).amax(-1)
    tops = tops if whole == size else torch.cat([tops, scores[:, whole:].amax(-1, keepdim=True)], 1)
    places = (tops.argmax(-1, keepdim=True) * width + torch.arange(width)).clamp_max(size - 1)
    return places.gather(1, scores.gather(1, places).argmax(-1, keepdim=True)).squeeze(1)


class TextGeneration(ClassVAE, GenerationMixin):
    """The part of a :class:`mmvae.TextVAE` that writes; shapes are those of ``mmvae/models/text_vae.py``."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        source: Tensor | None = None,
        past_key_values: GRUState | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` needs for the next token: the new tokens only, once there is a state."""
        seen = 0 if past_key_values is None else past_key_values.length
        kept = {name: kwargs.get(name) for name in ("use_cache", "output_hidden_states")}
        kept |= {name: value for name, value in (("class_labels", class_labels), ("source", source)) if value is not None}
        return {"input_ids": input_ids[:, seen:], "latents": latents, "past_key_values": past_key_values, **kept}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        source: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Token ids of sentences, BOS first, by any strategy of transformers' ``GenerationMixin``.

        Options that are always the same may lie in ``generation_config``, which the folder of a text model keeps; those of a model that
        holds a text model (joint, stacked, with a head) keep none: give them as options. A ``generation_config`` among the options goes
        before the folder's, which still tells what that one leaves open.

        Arguments:
            input_ids: (B, T) sentences to reconstruct from their posterior means; not a prefix.
            latents: (B, D), instead.
            class_labels: (B,) classes of a model that has them; alone, with latents from p(z): ``generate(class_labels=[3, 3, 7])``. With
                ``input_ids`` the likeliest classes when None.
            generator: makes latents that are drawn, and sampled words, repeatable; torch's global generator when None.
            source: (B, L, F) to attend to, see :meth:`mmvae.TextVAE.decode`.
            options: of ``GenerationMixin.generate``: ``max_new_tokens`` (64), ``num_beams``, ``temperature``, ``do_sample`` (of the 50
                likeliest words, of all with ``top_k=0``), ...

        Returns:
            (B * num_return_sequences, T) int64, padded at the right with ``pad_token_id``.

        Raises:
            ValueError: when neither or both are given, latents that are not (B, D) finite numbers, and options that :func:`check_strategy`
                refuses.
        """
        if (latents is None) == (input_ids is None) and (input_ids is not None or class_labels is None):
            raise ValueError(f"generate: received {'neither' if latents is None else 'both'} latents and input_ids, expected one of them")
        if input_ids is not None:
            given = {"input_ids": input_ids, "attention_mask": options.pop("attention_mask", None), "class_labels": class_labels}
            given |= {"source": source, "generator": generator}
            return self.reconstruct(**{name: value for name, value in given.items() if value is not None}, **options)
        latents = self._latents_for(class_labels, generator) if latents is None else latents
        if not isinstance(latents, Tensor) or latents.dim() != 2 or not len(latents):
            received = f"shape {tuple(latents.shape)}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
            raise ValueError(f"latents: received {received}, expected (rows, {self.config.latent_dim}), at least one row")
        self.check_latents(latents)
        if latents.is_cpu and not latents.isfinite().all():
            row, unit = (~latents.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"latents: received {latents[row, unit]:g} in row {row}, expected finite numbers")
        check_strategy(options, self.generation_config)
        if source is not None:
            self.check_source(source, len(latents))
            options["source"] = source
        if class_labels is not None or self.config.num_classes:
            self.with_class(latents, class_labels)  # refuses what is wrong by its name
            options["class_labels"] = torch.as_tensor(class_labels, device=latents.device).expand(len(latents))
        if all(settled(name, options, self.generation_config) is None for name in ("max_new_tokens", "max_length")):
            options["max_new_tokens"] = 64  # as an option: in generation_config it would silently win over a caller's max_length
        with seeded(generator):
            return GenerationMixin.generate(self, latents=latents, **options)

    def check_source(self, source: Tensor | None, rows: int) -> None:
        """Refuse a source that is not (rows, L, ``source_size``)."""
        size = self.config.source_size
        if source is not None and (not size or source.dim() != 3 or source.shape[::2] != (rows, size)):
            expected = f"({rows}, tokens, {size})" if size else "None where source_size is 0"
            raise ValueError(f"source: received shape {tuple(source.shape)}, expected {expected}")

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: logits_process.LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        """transformers' greedy and random decoding, save that finished rows leave the batch and logits are made in chunks of rows.

        What regards a batch as a whole, or asks for more than tokens, is left to transformers.
        """
        by_row = all(type(each) in _BY_ROW for each in (*logits_processor, *stopping_criteria))
        if not by_row or generation_config.return_dict_in_generate or kwargs.get("streamer") or kwargs.get("synced_gpus"):
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        cpu, length, pad = input_ids.device.type == "cpu", input_ids.shape[1], generation_config.pad_token_id
        chunk = max(1, (1 << 22 if cpu else 1 << 28) // self.config.vocab_size)  # on a CPU logits that stay in the cache
        latents, hidden = self.with_class(kwargs["latents"], kwargs.get("class_labels")).to(self.dtype), None
        source = kwargs.get("source")
        rows = torch.arange(len(input_ids), device=input_ids.device)
        written = F.pad(input_ids, (0, stopping_criteria.max_length - length), value=pad)
        lengths, done = torch.full_like(rows, length), torch.zeros_like(rows, dtype=torch.bool)
        for end in range(length, written.shape[1]):
            new = written[rows, 0 if hidden is None else end - 1 : end]
            states, hidden = self.decoder(new, latents[rows], hidden, source)
            parts = zip(written[rows, :end].split(chunk), states[:, -1].split(chunk), strict=True)
            tokens = torch.cat([self._choose(logits_processor(ids, self.lm_head(h).float()), generation_config) for ids, h in parts])
            written[rows, end], lengths[rows] = tokens.masked_fill(done, pad), lengths[rows] + ~done
            done = done | stopping_criteria(written[rows, : end + 1], None)
            if cpu or end % 8 == 0:  # elsewhere the host would wait for the device
                if done.all():
                    break
                source = source if source is None or not done.any() else source[~done]
                rows, hidden, done = rows[~done], hidden[:, ~done], done[~done]
        return written[:, : int(lengths.max())]

    def _beam_search(self, input_ids: Tensor, *args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """transformers' beam search, which fills a row that has ended with EOS where PAD is token 0, padded as other sentences are."""
        found = super()._beam_search(input_ids, *args, generation_config=generation_config, **kwargs)
        if generation_config.eos_token_id is not None:
            written = (found if isinstance(found, Tensor) else found.sequences)[:, input_ids.shape[1] :]
            ends = torch.isin(written, torch.as_tensor(generation_config.eos_token_id, device=written.device)).long()
            written.masked_fill_(ends.cumsum(1) > ends, generation_config.pad_token_id)
        return found

    @staticmethod
    def _choose(scores: Tensor, generation_config: GenerationConfig) -> Tensor:
        """The next tokens (N,) by their scores (N, V)."""
        return scores.softmax(-1).multinomial(1).squeeze(1) if generation_config.do_sample else largest(scores)

    def reconstruct(self, **inputs: Any) -> Tensor:
        """Sentences of the posterior's mean; see :meth:`ClassVAE.reconstruct`. A language model has none: ValueError."""
        self._needs_latent("reconstruct")
        return super().reconstruct(**inputs)

    def interpolate(self, *ends: Tensor, **options: Any) -> Tensor:
        """Sentences between latents; see :meth:`ClassVAE.interpolate`. A language model has none: ValueError."""
        self._needs_latent("interpolate")
        return super().interpolate(*ends, **options)

    def _needs_latent(self, what: str) -> None:
        if not self.config.latent_dim:
            raise ValueError(f"{what}: received a {type(self).__name__} with latent_dim 0, a language model, expected one with a latent")

    def render(self, z: Tensor, **options: Any) -> Tensor:
        """Sentences as token ids; see :meth:`generate`."""
        return self.generate(latents=z, **options)
