"""What a text VAE writes: sentences of latents or of classes, and reconstructions, by transformers' generation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mmvae.models.classes import ClassVAE
from mmvae.recurrent import GRUState


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
        past_key_values: GRUState | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` needs for the next token: the new tokens only, once there is a state."""
        seen = 0 if past_key_values is None else past_key_values.length
        kept = {name: kwargs.get(name) for name in ("use_cache", "output_hidden_states")}
        kept |= {} if class_labels is None else {"class_labels": class_labels}
        return {"input_ids": input_ids[:, seen:], "latents": latents, "past_key_values": past_key_values, **kept}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Token ids of sentences, BOS first, by any strategy of transformers' ``GenerationMixin``.

        Arguments:
            input_ids: (B, T) sentences to reconstruct from their posterior means; not a prefix.
            latents: (B, D), instead.
            class_labels: (B,) classes of a model that has them; alone, with latents from p(z): ``generate(class_labels=[3, 3, 7])``. With
                ``input_ids`` the likeliest classes when None.
            generator: makes these latents repeatable; torch's global generator when None.
            options: of ``GenerationMixin.generate``: ``max_new_tokens`` (64), ``num_beams``, ``do_sample``, ``temperature``, ...

        Returns:
            (B * num_return_sequences, T) int64, padded at the right with ``pad_token_id``.

        Raises:
            ValueError: when neither or both are given.
        """
        if (latents is None) == (input_ids is None) and (input_ids is not None or class_labels is None):
            raise ValueError(f"generate: received {'neither' if latents is None else 'both'} latents and input_ids, expected one of them")
        if input_ids is not None:
            given = {"input_ids": input_ids, "attention_mask": options.pop("attention_mask", None), "class_labels": class_labels}
            return self.reconstruct(**{name: value for name, value in given.items() if value is not None}, **options)
        latents = self._latents_for(class_labels, generator) if latents is None else latents
        self.check_latents(latents)
        if class_labels is not None or self.config.num_classes:
            self.with_class(latents, class_labels)  # refuses what is wrong by its name
            options["class_labels"] = torch.as_tensor(class_labels, device=latents.device).expand(len(latents))
        lengths, defaults = ("max_new_tokens", "max_length"), options.get("generation_config") or self.generation_config
        if all(options.get(name) is None and getattr(defaults, name) is None for name in lengths):
            options["max_new_tokens"] = 64  # as an option: in generation_config it would silently win over a caller's max_length
        return GenerationMixin.generate(self, latents=latents, **options)

    def render(self, z: Tensor, **options: Any) -> Tensor:
        """Sentences as token ids; see :meth:`generate`."""
        return self.generate(latents=z, **options)
