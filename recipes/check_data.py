"""List everything that is wrong with a data set, in one pass, before anything is trained on it.

    python recipes/check_data.py --dataset path/to/data
    python recipes/check_data.py --dataset path/to/data --columns image caption --missing true

Every picture of every split is decoded and every text read. A broken line of a .jsonl file is told by file, line and column; a row by its
number from 0, field and file. Tables are read one by one where one is damaged. A picture that the ``metadata`` file beside it does not
list and a link to nothing are told, too. The exit status is 1 where anything is wrong.
"""

import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from mmvae.data import BadRow, Column, ImageColumn, Rows, as_modalities, broken_lines, load_rows, splits
from mmvae.data.columns import Ragged, check_text
from mmvae.data.lines import Kinds, NoneKept, read_lines
from mmvae.data.loading import TABLES, features_of, local_files
from mmvae.data.selection import file_row
from mmvae.options import parse

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class CheckArguments:
    """Options of a check."""

    dataset: str = field(default="sprites:5", metadata={"help": "Hub id, local folder or file, or sprites:LEVEL[:ROWS] (built in)"})
    columns: list[str] | None = field(default=None, metadata={"help": "of pictures and texts; all by default"})
    missing: bool = field(default=False, metadata={"help": "whether a row may lack some of the columns, as for a joint model"})
    max_pixels: int = field(default=16_000_000, metadata={"help": "the largest width x height of a picture"})


@dataclass(frozen=True)
class Words(Column):
    """Texts that are only read."""

    name: str
    prefix: str = ""
    modality: str = ""
    input_names = ("input_ids",)

    def prepare(self, values: Any) -> list[np.ndarray]:
        """An array for each text."""
        for value in values:
            check_text(value)
        return [np.zeros(1, np.int32) for _ in values]

    def pack(self, prepared: Any) -> Ragged:
        """All in one."""
        return Ragged.of(prepared)

    def collate(self, packed: Ragged, keys: Tensor) -> dict[str, Tensor]:
        """Nothing that a model could use."""
        return {"input_ids": packed.lengths}

    def filler(self) -> np.ndarray:
        """An empty text."""
        return np.zeros(1, np.int32)


def columns_of(data: Any, args: CheckArguments) -> list[Column]:
    """The columns of pictures and texts of a split."""
    features, made = features_of(data), {}
    for name in args.columns or features:
        if name not in features:
            raise ValueError(f"columns: received {name!r}, expected some of {list(features)}")
        if isinstance(features[name], datasets.Image):
            made[name] = ImageColumn(name, 8, max_pixels=args.max_pixels)
        elif args.columns or getattr(features[name], "dtype", "") in ("string", "large_string"):
            made[name] = Words(name)
    if not made:
        raise ValueError(f"{args.dataset} has no column of pictures or texts, expected some beside {list(features)}")
    return as_modalities(made) if args.missing else list(made.values())


def main() -> None:
    """Load, check, tell."""
    (args,) = parse(CheckArguments)
    path = Path(args.dataset).expanduser()
    files = local_files(path) if path.exists() else {}
    lines = {split: [name for name in names if name.lower().endswith(".jsonl")] for split, names in files.items()}
    broken = list(itertools.chain.from_iterable(map(broken_lines, lines.values())))
    problems = dead_links(path) + broken
    told = {split: broken_rows(names) for split, names in lines.items()} if lines == files else {}  # beside pictures they are no rows
    try:
        loaded = [(args.dataset, data) for data in splits(args.dataset, on_bad_row="skip").values()]
        problems += unlisted(files, (data for _, data in loaded))
    except BadRow as error:  # beside pictures, a line that is broken spoils them all
        loaded, damaged = one_by_one(list(itertools.chain.from_iterable(files.values())))
        problems += damaged or [str(error)] * (not broken)
    for name, data in loaded:
        already = told.get(str(getattr(data, "split", None)), ())
        problems += [why for row, why in bad_rows(data, columns_of(data, args), name) if row not in already]
    print(*problems, sep="\n")
    print(f"{len(problems)} problems" if problems else "nothing is wrong")
    sys.exit(bool(problems))


def dead_links(folder: Path) -> list[str]:
    """Links below a folder that lead to nothing, which no reader sees."""
    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink() and not path.exists())
    return [f"{path}: leads to {os.readlink(path)}, which does not exist" for path in links]


def unlisted(files: dict[str, list[str]], loaded: Iterable[Any]) -> list[str]:
    """Pictures that lie beside a ``metadata`` file which does not list them, so that they are no rows."""
    if not any(Path(name).stem == "metadata" for names in files.values() for name in names):
        return []
    listed = set()
    for data in loaded:
        for column in (name for name, feature in features_of(data).items() if isinstance(feature, datasets.Image)):
            values = data.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            listed |= {os.path.abspath(row[column]["path"]) for row in values if row[column] and row[column]["path"]}
    found = dict.fromkeys(name for names in files.values() for name in names if Path(name).suffix.lower() in PICTURES)
    return [f"{name}: is not listed in the metadata file beside it" for name in found if os.path.abspath(name) not in listed]


def one_by_one(files: list[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """What can be read of tables of which one is damaged, each by its name, and what is wrong with the others."""
    loaded, damaged = [], []
    for name in files if {Path(name).suffix.lower() for name in files} <= TABLES.keys() else ():
        try:
            loaded.append((name, load_rows(name, on_bad_row="skip")))
        except (BadRow, ValueError) as error:
            damaged.append(str(error))
    return loaded, damaged


def broken_rows(files: Iterable[str]) -> set[int]:
    """The rows that broken lines of some files of a split become, numbered through all of them."""
    kinds: Kinds = {}
    lines = itertools.chain.from_iterable(read_lines(file, kinds) for file in files)
    return {number for number, (_, row) in enumerate(lines) if isinstance(row, str)}


def bad_rows(data: Any, columns: list[Column], name: str) -> list[tuple[int, str]]:
    """What is wrong with the rows of a split, with their numbers in the file."""
    try:
        bad = Rows(data, columns, name=name, memory_limit=0, on_bad_row="skip").bad
    except NoneKept as error:
        bad = error.bad
    except ValueError as error:  # of the split as a whole
        return [(-1, str(error))]
    return [(file_row(data, row), told) for row, told in sorted(bad.items())]


if __name__ == "__main__":
    main()
