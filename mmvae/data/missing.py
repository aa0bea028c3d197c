r"""Which modalities a row has: what the data lacks, and what is hidden on purpose.

Hiding is a function of (seed, modality, row): with independent uniform numbers u, modality m of row i is hidden where

    u_{m,i} < p_m,

unless that left the row with nothing: then the modality with the largest u_{m,i} - p_m of those that it has stays.

Shapes: ``B`` rows, ``M`` modalities.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmvae import aggregation
from mmvae.models.inherited import nearest
from mmvae.noise import fold, keyed_uniform

_HIDDEN = 0x68696465


def hide(present: Tensor, rows: Tensor, modalities: Sequence[str], drop: Mapping[str, float], seed: int = 0) -> Tensor:
    """What is left of the modalities when some are hidden in a fixed random part of the rows, the same in every epoch.

    Which rows lose a modality depends on its name, not on its place nor on which others there are. Never the last one of a row.

    Arguments:
        present: (B,M) bool.
        rows: (B,) int64 row numbers.
        modalities: M names.
        drop: probability in [0, 1] that a row loses a modality, by name.
        seed: another seed hides others.

    Returns:
        (B,M) bool, a subset of ``present`` with at least one modality where it has one.

    Example:
        >>> hide(torch.ones(6, 2).bool(), torch.arange(6), ["image", "text"], {"text": 0.5})[:, 0].all().item()
        True
    """
    if not drop or not len(rows):
        return present
    names = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") for name in modalities]
    uniform = torch.stack([keyed_uniform(fold(seed, _HIDDEN, name, rows)) for name in names], 1)
    return aggregation.hide(present, torch.tensor([float(drop.get(name, 0.0)) for name in modalities]), uniform)


def check_drop(drop: Mapping[str, float], modalities: Sequence[str]) -> None:
    """Refuse a name that is no modality, and what is no probability.

    Raises:
        ValueError: naming both.
    """
    for name, probability in drop.items():
        if name not in modalities:
            expected = (
                f"one of {', '.join(modalities)}; the nearest is {nearest(name, modalities)!r}"
                if modalities
                else "none: no column is a modality"
            )
            raise ValueError(f"drop: got {name!r}, expected {expected}")
        if not 0 <= probability <= 1:
            raise ValueError(f"drop[{name!r}]: got {probability!r}, expected a probability in [0, 1]")
