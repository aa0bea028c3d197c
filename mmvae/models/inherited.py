"""What every configuration inherits from transformers, where a file could hold something hostile: checked before transformers reads it."""

from collections.abc import Mapping
from typing import Any

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
