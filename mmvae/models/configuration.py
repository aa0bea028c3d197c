"""Strictness about names and values: the configuration that all VAEs share, and what their ``forward`` refuses."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from mmvae.priors import PRIORS

# Names that transformers itself hands to a config beside its fields.
_FOREIGN = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


@strict
class VAEConfig(PreTrainedConfig):
    """What the configurations of all VAEs share. A name that is not a field is an error that names the nearest field.

    Arguments:
        latent_dim: size of the latent vector, or its channels when it is spatial; 1 to 65,536.
        prior: a key of ``mmvae.priors.PRIORS``.
        prior_components: K of a mixture or Vamp prior; 1 to 10,000.
    """

    latent_dim: int = 64
    prior: str = "standard_normal"
    prior_components: int = 50

    # Allowed closed ranges and sets of values, by field; subclasses add theirs.
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"latent_dim": (1, 65_536), "prior_components": (1, 10_000)}
    choices: ClassVar[dict[str, Sequence[Any]]] = {"prior": tuple(PRIORS)}

    def __post_init__(self, **kwargs: Any) -> None:
        known = {f.name for f in fields(self)}
        for name in kwargs.keys() - _FOREIGN:
            nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise ValueError(f"{type(self).__name__}: unknown field {name!r} = {kwargs[name]!r}; the nearest one is {nearest!r}")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check every field against ``ranges`` and ``choices`` before any module is built.

        Raises:
            ValueError: naming the field, its value and what was expected.
        """
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is not None and not low <= item <= high:  # false for NaN too
                    raise ValueError(f"{type(self).__name__}.{name}: received {value!r}, expected {low} to {high}")
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{type(self).__name__}.{name}: received {getattr(self, name)!r}, expected one of {expected}")


# What transformers' Trainer, collators, tokenizers, pipelines and generation hand to any model's forward, needed or not.
FOREIGN_ARGUMENTS = {
    "cache_position",
    "head_mask",
    "interpolate_pos_encoding",
    "label",
    "label_ids",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "pixel_mask",
    "position_ids",
    "return_dict",
    "special_tokens_mask",
    "token_type_ids",
    "use_cache",
}


def refuse_unknown(module: nn.Module, received: Mapping[str, Any]) -> None:
    """Name a misspelt argument of ``module.forward``, which must swallow ``FOREIGN_ARGUMENTS`` and nothing else.

    Arguments:
        module: whose ``forward`` was called.
        received: the arguments that none of its parameters took.

    Raises:
        TypeError: naming the argument and the parameter nearest to it.
    """
    for name in received.keys() - FOREIGN_ARGUMENTS:
        nearest = difflib.get_close_matches(name, inspect.signature(module.forward).parameters.keys() - {"kwargs"}, 1, 0.0)[0]
        raise TypeError(f"{type(module).__name__}.forward: unknown argument {name!r}; the nearest one is {nearest!r}")
