"""Data for the recipes: loading any set, columns, and batches in a reproducible order."""

from mmvae.data.augmentation import Augmentation
from mmvae.data.batches import Loader
from mmvae.data.columns import Column, ImageColumn, TextColumn, as_modalities
from mmvae.data.labels import LabelColumn, find_classes, read_labels, shown_labels
from mmvae.data.lines import BadRow, broken_lines
from mmvae.data.loading import find_column, load_rows, splits
from mmvae.data.masks import MaskColumn, on_random_colours
from mmvae.data.partly_labelled import PartlyLabelled
from mmvae.data.rows import ON_BAD_ROW, Rows
from mmvae.data.sprites import Sprites, parse_caption, sprites
from mmvae.data.texts import texts_of
from mmvae.data.word_counts import WordCountColumn

__all__ = [
    "ON_BAD_ROW",
    "Augmentation",
    "BadRow",
    "Column",
    "ImageColumn",
    "LabelColumn",
    "Loader",
    "MaskColumn",
    "PartlyLabelled",
    "Rows",
    "Sprites",
    "TextColumn",
    "WordCountColumn",
    "as_modalities",
    "broken_lines",
    "find_classes",
    "find_column",
    "load_rows",
    "on_random_colours",
    "parse_caption",
    "read_labels",
    "shown_labels",
    "splits",
    "sprites",
    "texts_of",
]
