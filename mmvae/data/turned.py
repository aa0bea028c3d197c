r"""Pictures turned by a known angle: what a latent knows of the angle can be measured, because the data says what it is.

    angle ~ U[0, 2 pi),    a pure function of (seed, split, row), clockwise; bilinear, and what turns into view is black

The seed is of the data, not of a run, so that every run sees the same pictures.
"""

import math
import zlib
from functools import partial
from typing import Any

import datasets
import torch
from PIL import Image

from mmvae.data.images import open_image
from mmvae.noise import fold, keyed_uniform

_ANGLES = 0x7475726E6564


def angles(num_rows: int, split: str = "train", seed: int = 0) -> list[float]:
    """The angle of every row in radians, in [0, 2 pi)."""
    keys = fold(seed, _ANGLES, zlib.crc32(split.encode()), torch.arange(num_rows))
    return (2 * math.pi * keyed_uniform(keys)).tolist()


def add_turns(rows: Any, split: str, column: str = "image", seed: int = 0) -> datasets.Dataset:
    """Rows whose pictures are turned, and a further column, ``angle``, that says by how much.

    Arguments:
        rows: a `datasets.Dataset` of pictures.
        split, seed: another one gives other angles.
        column: of the pictures.

    Raises:
        ValueError: a stream, or rows that have a column "angle".
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"got {type(rows).__name__}, expected a data set that is neither generated nor streamed, for pictures to be turned"
        )
    if "angle" in rows.column_names:
        raise ValueError(f"columns: got {rows.column_names}, expected no 'angle'")
    declared = isinstance(rows.features[column], datasets.Image)
    rows = rows.add_column("angle", angles(len(rows), split, seed)).cast_column(column, datasets.Image(decode=False))
    features = datasets.Features(rows.features | {"angle": datasets.Value("float32"), column: datasets.Image()})
    return rows.map(partial(_turned, column=column, paths=declared), features=features, desc="turning")


def _turned(row: dict[str, Any], column: str, paths: bool) -> dict[str, Any]:
    image = open_image(row[column], paths=paths)
    image = image.convert("RGBA") if image.mode in ("P", "PA", "LA") else image  # numbers of a palette do not mix
    return {column: image.rotate(-math.degrees(row["angle"]), Image.Resampling.BILINEAR)}
