"""Data for the recipes: loading any set, columns, and batches in a reproducible order."""

from mmvae.data.augmentation import Augmentation
from mmvae.data.batches import Loader
from mmvae.data.columns import Column, ImageColumn, LabelColumn, TextColumn, as_modalities
from mmvae.data.loading import find_classes, find_column, load_rows, splits
from mmvae.data.rows import BadRow, Rows, texts_of
from mmvae.data.sprites import Sprites, parse_caption, sprites

__all__ = [
    "Augmentation",
    "BadRow",
    "Column",
    "ImageColumn",
    "LabelColumn",
    "Loader",
    "Rows",
    "Sprites",
    "TextColumn",
    "as_modalities",
    "find_classes",
    "find_column",
    "load_rows",
    "parse_caption",
    "splits",
    "sprites",
    "texts_of",
]
