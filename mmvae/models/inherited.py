"""What comes from transformers: fields of configurations, where a file could hold something hostile, and arguments of ``forward``."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

# What a file may not hold: these make transformers download, quantize or build something else.
_NOT_FROM_FILES = {"attn_implementation", "auto_map", "experts_implementation", "per_layer_config", "quantization_config"}
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MOST_LABELS = 65_536


def refuse_from_files(where: str, values: Mapping[str, Any]) -> None:
    """Refuse names that a configuration may have in memory, but that no file may give it.

    Raises:
        ValueError: naming the field.
    """
    for name, value in values.items():
        if value is not None and (name in _NOT_FROM_FILES or (name.startswith("_") and name not in ("_name_or_path", "_commit_hash"))):
            raise ValueError(f"{where}.{name}: received {value!r:.80}, expected none in a file")


def check_inherited(where: str, values: Mapping[str, Any]) -> None:
    """Refuse values that transformers' own ``__post_init__`` would stumble over, or take memory for.

    Raises:
        ValueError: naming the field, the value and what was expected.
    """
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and (value if isinstance(value, str) else str(value).removeprefix("torch.")) not in _DTYPES:
            raise ValueError(f"{where}.{name}: received {value!r:.80}, expected one of {', '.join(_DTYPES)}")
    labels, number = values.get("id2label"), values.get("num_labels", 2)
    numbered = isinstance(labels, Mapping) and all(str(key).isdecimal() and isinstance(label, str) for key, label in labels.items())
    if labels is not None and not (numbered and len(labels) <= _MOST_LABELS):
        raise ValueError(f"{where}.id2label: received {labels!r:.80}, expected at most {_MOST_LABELS} names by whole numbers")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= _MOST_LABELS:
        raise ValueError(f"{where}.num_labels: received {number!r:.80}, expected 1 to {_MOST_LABELS}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one probably meant."""
    return difflib.get_close_matches(name, list(known), 1, 0.0)[0]


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


def refuse_unknown(module: nn.Module, received: Mapping[str, Any], taken: Iterable[str] = ()) -> None:
    """Name a misspelt argument of ``module.forward``, which must swallow ``FOREIGN_ARGUMENTS`` and nothing else.

    Arguments:
        module: whose ``forward`` was called.
        received: the arguments that none of its parameters took; conditions of the module are among those that it knows.
        taken: names that it takes without such a parameter.

    Raises:
        TypeError: naming the argument and the parameter nearest to it.
    """
    for name in received.keys() - FOREIGN_ARGUMENTS - set(module.condition_names):
        parameters = inspect.signature(module.forward).parameters.values()
        named = (each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))
        known = {*module.input_names, *taken, *named}
        raise TypeError(f"{type(module).__name__}.forward: unknown argument {name!r}; the nearest one is {nearest(name, known)!r}")
