"""Nested data as a JSON outline and a flat dict of named tensors, and back exactly.

JSON knows neither tensors, tuples, keys that are not strings, nor NaN: in the outline these become an object of one
item,

    {"$tensor": name}   {"$tuple": [...]}   {"$items": [[key, value], ...]}   {"$float": "nan"}

Names of tensors are JSON pointers without the first slash: ``weights/encoder.weight``, ``state/0/exp_avg``.

References:
    RFC 6901, JSON Pointer, https://www.rfc-editor.org/rfc/rfc6901
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def split(value: Any, where: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take nested data apart.

    Arguments:
        value: mappings (str or int keys), lists, tuples, tensors, and JSON values; a mapping of any kind comes back as
            a dict.
        where: its name in error messages.

    Returns:
        The outline, which ``json.dumps`` accepts, and the tensors, contiguous on the CPU. No two share memory: tied
        ones appear once.

    Raises:
        TypeError: naming the place and what was found there.
    """
    tensors: dict[str, Tensor] = {}
    return _split(value, where, "", tensors, {}), tensors


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Put together again what :func:`split` took apart."""
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value), None):
        case "$tensor":
            return tensors[value["$tensor"]]
        case "$tuple":
            return tuple(join(item, tensors) for item in value["$tuple"])
        case "$items":
            return {key: join(item, tensors) for key, item in value["$items"]}
        case "$float":
            return float(value["$float"])
    return {key: join(item, tensors) for key, item in value.items()}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two nested mappings differ, each as ``"config.latent_dim: 32 -> 16"``."""
    changes = []
    for key in {**old, **new}:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += [f"{key}.{change}" for change in compare(before, after)]
        elif before != after:
            changes.append(f"{key}: {before} -> {after}")
    return changes


def _split(value: Any, where: str, name: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> Any:
    if isinstance(value, Tensor):
        return {"$tensor": _put(value, name, tensors, seen)}
    if isinstance(value, Mapping):
        parts = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}, expected str or int")
            child = str(key).replace("~", "~0").replace("/", "~1")
            parts.append((key, _split(item, f"{where}[{key!r}]", f"{name}/{child}" if name else child, tensors, seen)))
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(parts) if plain else {"$items": [list(part) for part in parts]}
    if type(value) in (list, tuple):
        parts = [_split(item, f"{where}[{i}]", f"{name}/{i}" if name else str(i), tensors, seen) for i, item in enumerate(value)]
        return parts if type(value) is list else {"$tuple": parts}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    raise TypeError(f"{where} is a {type(value).__name__}: expected a tensor, dict, list, tuple or JSON value")


def _put(value: Tensor, name: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> str:
    """Add one tensor under a free name; tied tensors are written once, other views of one storage as copies."""
    value = value.detach()
    same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
    if value.numel() and same in seen:
        return seen[same]
    while name in tensors:  # {0: ..., "0": ...} would meet here
        name += "'"
    place = (value.device, value.untyped_storage().data_ptr())
    whole = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous() and place not in seen
    tensors[name] = value.cpu() if whole else value.contiguous().clone().cpu()
    seen[same] = seen[place] = name
    return name
