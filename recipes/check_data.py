"""List everything that is wrong with a data set, in one pass, before anything is trained on it.

    python recipes/check_data.py --dataset path/to/data
    python recipes/check_data.py --dataset path/to/data --columns image caption --missing true

Every picture of the training, validation and test rows is decoded and every text read. A broken line of a .jsonl file is told by file, line
and column; a row by its number from 0, field and file. Tables are read one by one where they cannot be read together. A picture that the
``metadata`` file beside it does not list and a link to nothing are told, too. The exit status is 1 where anything is wrong.
"""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pyarrow import compute
from torch import Tensor

from mmvae.data import Column, ImageColumn, Rows, as_modalities, load_rows, splits
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


@dataclass(frozen=True)
class Part:
    """Rows that are read together, by the name that errors call them, and the files that they are of."""

    name: str
    data: Any
    files: list[str]


def columns_of(data: Any, args: CheckArguments, name: str) -> list[Column]:
    """The columns of pictures and texts of a split."""
    features, made = features_of(data), {}
    for column in args.columns or features:
        if column not in features:
            raise ValueError(f"{name} has no column {column!r}, expected one of {list(features)}")
        if isinstance(features[column], datasets.Image):
            made[column] = ImageColumn(column, 8, max_pixels=args.max_pixels)
        elif args.columns or getattr(features[column], "dtype", "") in ("string", "large_string"):
            made[column] = Words(column)
    if not made:
        raise ValueError(f"{name} has no column of pictures or texts, expected some beside {list(features)}")
    return as_modalities(made) if args.missing else list(made.values())


def main() -> None:
    """Load, check, tell."""
    (args,) = parse(CheckArguments)
    path = Path(args.dataset).expanduser()
    files = local_files(path) if path.exists() else {}
    problems = dead_links(path) + list(itertools.chain.from_iterable(broken_rows(names).values() for names in files.values()))
    try:
        read = splits(args.dataset, on_bad_row="skip").values()
        parts = [Part(args.dataset, data, files.get(str(getattr(data, "split", None)), [])) for data in read]
    except ValueError as error:  # of one file, or of them all, as beside pictures a line that is broken spoils them all
        parts, damaged = one_by_one(list(itertools.chain.from_iterable(files.values())))
        problems += damaged
        why = str(error).removeprefix(f"{args.dataset}: ")
        problems += [str(error)] * (not any(why in told for told in problems))
    problems += unlisted(parts) + list(itertools.chain.from_iterable(bad_rows(part, args) for part in parts))
    problems = list(dict.fromkeys(problems))  # a file may be of two splits
    print(*problems, sep="\n")
    print(f"{len(problems)} problems" if problems else "nothing is wrong")
    sys.exit(bool(problems))


def dead_links(folder: Path) -> list[str]:
    """Links below a folder that lead to nothing, which no reader sees."""
    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink() and not path.exists())
    return [f"{path}: leads to {os.readlink(path)}, which does not exist" for path in links]


def unlisted(parts: list[Part]) -> list[str]:
    """Pictures that lie beside a ``metadata`` file which does not list them, so that they are no rows."""
    files = dict.fromkeys(itertools.chain.from_iterable(part.files for part in parts))
    if not any(Path(name).stem == "metadata" for name in files):
        return []
    tables = ((features_of(part.data), part.data.with_format("arrow")[:]) for part in parts)
    listed = {os.path.abspath(name) for features, table in tables for name in pictures(features, table.to_struct_array()) if name}
    found = (name for name in files if Path(name).suffix.lower() in PICTURES)
    return [f"{name}: is not listed in the metadata file beside it" for name in found if os.path.abspath(name) not in listed]


def pictures(feature: Any, values: Any) -> Iterator[str | None]:
    """The files of the pictures that a column's values hold, also those in lists and mappings."""
    if isinstance(feature, datasets.Image):
        yield from compute.struct_field(values, "path").to_pylist()
    elif isinstance(feature, datasets.List | datasets.LargeList):
        yield from pictures(feature.feature, compute.list_flatten(values))
    elif isinstance(feature, dict):
        for name, inner in feature.items():
            yield from pictures(inner, compute.struct_field(values, name))


def one_by_one(files: Iterable[str]) -> tuple[list[Part], list[str]]:
    """What can be read of tables of which one is damaged, and what is wrong with the others."""
    read, damaged = [], []
    for name in files if {Path(name).suffix.lower() for name in files} <= TABLES.keys() else ():
        try:
            read.append(Part(name, load_rows(name, on_bad_row="skip"), [name]))
        except ValueError as error:
            damaged.append(str(error))
    return read, damaged


def broken_rows(files: Iterable[str]) -> dict[int, str]:
    """What is wrong with broken lines of the ``.jsonl`` files of a split, by the rows that they become, numbered through those files."""
    kinds: Kinds = {}
    lines = ((file, *line) for file in files if file.lower().endswith(".jsonl") for line in read_lines(file, kinds))
    return {row: f"{file}: line {number}, {why}" for row, (file, number, why) in enumerate(lines) if isinstance(why, str)}


def bad_rows(part: Part, args: CheckArguments) -> list[str]:
    """What is wrong with the rows of a part, but for those that broken lines of its own became."""
    try:
        bad = Rows(part.data, columns_of(part.data, args, part.name), name=part.name, memory_limit=0, on_bad_row="skip").bad
    except NoneKept as error:
        bad = error.bad
    except ValueError as error:  # of the part as a whole
        return [str(error)]
    lines = all(name.lower().endswith(".jsonl") for name in part.files)  # beside pictures they are no rows
    told = broken_rows(part.files) if lines else {}
    return [why for row, why in sorted(bad.items()) if file_row(part.data, row) not in told]


if __name__ == "__main__":
    main()
