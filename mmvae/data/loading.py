r"""Any data set by one name: the built-in sprites, a local file or folder, or an id on the Hub.

| name                                     | data                                                                                    |
|------------------------------------------|-----------------------------------------------------------------------------------------|
| ``sprites``, ``sprites:3``               | built-in captioned sprites, of a level (see `mmvae.data.sprites`)                       |
| ``sprites:3:2000``                       | the same with so many training rows; 10,000 otherwise                                   |
| ``sprites:3:2000:heart``                 | the same, hearts alone, in the middle of the picture; or "big heart", "big red heart"   |
| ``words:NAME``                           | pictures of digits by any name of this table, with a column ``word`` (`mmvae.data.digits`) |
| ``turned:NAME``                          | pictures by any name of this table, each turned by its ``angle`` (`mmvae.data.turned`)  |
| a folder                                 | pictures (`imagefolder` layout), or jsonl, csv, tsv, parquet or text files, one per split |
| a file                                   | that file as the split "train"                                                          |
| anything else                            | an id on the Hub                                                                        |
| ``NAME:CONFIGURATION``                   | of a folder or an id that has several configurations, that one                          |

A name that exists on disk is never looked up on the Hub. Nothing is written beside the data: `datasets` keeps what it
makes of it in its own cache. It also says which files of a folder are data, of which split, by their names or by the data
set card. Of local csv files only an empty cell is a missing value, where nobody says otherwise; of those of the Hub, and of
a ``metadata.csv`` beside pictures, the words "NA", "None", "null" and their like are missing values, too.
"""

import functools
import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.text.text import TextConfig
from huggingface_hub.errors import HFValidationError

from mmvae.data.digits import add_words
from mmvae.data.lines import BadRow, broken_lines, rows_of_lines
from mmvae.data.selection import select
from mmvae.data.sprites import sprites
from mmvae.data.turned import add_turns
from mmvae.noise import fold

TABLES = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
"""Endings of tables, and what `datasets` calls their kind."""
_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train", "training"), "test": ("test", "testing")}
_COMMON = {
    "image": ("image", "img", "picture", "pixel_values"),
    "text": ("text", "caption", "sentence", "content", "question", "document"),
    "label": ("label", "labels", "class", "category", "fine_label"),
}
_WORDS = {"keep_default_na": False, "na_values": [""]}  # of a csv file: "NA", "None" and "null" are words, an empty cell is missing
_NESTED = (dict, list, datasets.List, datasets.LargeList)
_SPLITS = ("train", "validation", "test")
_HELD_OUT = 0x68656C64
_FIRST_HELD_OUT = 26  # the smallest row number that the rule of `splits` holds out
_SPRITE_ROWS = {"train": 10_000, "validation": 1_000, "test": 1_000}


def load_rows(dataset: str, split: str = "train", *, streaming: bool = False, on_bad_row: str = "error", **options: Any) -> Any:
    """One split of a data set.

    Arguments:
        dataset: a name of the table at the head of this file.
        split: "train", "validation" (also found as valid, val or dev), "test", or any other split that the data set
            has.
        streaming: read rows as they are needed instead of indexing the set first: for sets larger than the disk. The
            built-in sprites ignore it.
        on_bad_row: "skip" makes a broken line of a local ``.jsonl`` file a row without values, which `Rows` then skips; otherwise it is an
            error.
        options: for the sprites those of `mmvae.data.sprites.sprites`, otherwise those of `datasets.load_dataset`.

    Returns:
        A `datasets.Dataset`, `datasets.IterableDataset` or `mmvae.data.Sprites`.

    Raises:
        FileNotFoundError: ``dataset`` is a path and does not exist, or an id that the Hub does not give.
        BadRow: a broken line of a ``.jsonl`` file, by file, line and column, or whatever else cannot be read; of a stream only later. A
            value of another kind than those before it in its split, too: of a stream only where one file holds both.
        ValueError: the split does not exist, or a file is empty.
    """
    return _pick(_load(dataset, streaming, options, on_bad_row), split, dataset)


def splits(dataset: str, *, streaming: bool = False, on_bad_row: str = "error", **options: Any) -> dict[str, Any]:
    """Training, validation and, where there is one, test rows.

    A data set without a validation split gives one up from its training rows, about 5 %: row i is held out if a fixed hash of i is
    divisible by 20, the same rows for every run, and for a stream the same as for the indexed set. A set of at most 26 rows, which has
    no such row, holds out its last one.

    Arguments:
        dataset, streaming, on_bad_row, options: as for `load_rows`.

    Returns:
        ``{"train": ..., "validation": ..., "test": ...}``, the last only where it exists.

    Raises:
        FileNotFoundError, BadRow: as for `load_rows`.
        ValueError: there is no training split, or it has fewer than two rows.
    """
    loaded = _load(dataset, streaming, options, on_bad_row)
    found = {split: loaded[name] for split in _ALIASES if (name := _find(loaded, split)) is not None}
    if "train" not in found:
        raise ValueError(f"{dataset} has no split 'train', expected one of {', '.join(loaded)}")
    if "validation" not in found:
        found["train"], found["validation"] = _hold_out(found["train"], dataset)
    return {split: found[split] for split in _SPLITS if split in found}


def _load(dataset: str, streaming: bool, options: dict[str, Any], on_bad_row: str = "error") -> dict[str, Any]:
    if dataset.split(":")[0] == "sprites" and not Path(dataset).exists():
        level, rows, centred = [*dataset.split(":"), "", "", ""][1:4]
        level, rows = level or str(options.pop("level", 3)), rows or str(_SPRITE_ROWS["train"])
        if not level.isdecimal() or not rows.isdecimal() or dataset.count(":") > 3:
            expected = "expected sprites:1 to sprites:5, sprites:5:ROWS, or sprites:3:ROWS:SHAPE"
            raise ValueError(f"{dataset} names the level {level!r} and {rows!r} rows, {expected}")
        sizes = _SPRITE_ROWS | {"train": int(rows)}
        return {split: sprites(int(level), split, **{"num_rows": n, "centred": centred or None, **options}) for split, n in sizes.items()}
    if dataset.startswith("words:") and not Path(dataset).exists():
        return {
            split: add_words(rows, split) for split, rows in _load(dataset.removeprefix("words:"), streaming, options, on_bad_row).items()
        }
    if dataset.startswith("turned:") and not Path(dataset).exists():
        upright = _load(dataset.removeprefix("turned:"), streaming, options, on_bad_row)
        return {split: add_turns(rows, split, find_column(rows, "image")) for split, rows in upright.items()}
    path, (name, _, configuration) = Path(dataset).expanduser(), dataset.rpartition(":")
    if name and not path.exists() and not Path(name).expanduser().is_file():
        return _load(name, streaming, options | {"name": configuration}, on_bad_row)
    try:
        return _load_local(path, dataset, streaming, options, on_bad_row) if path.exists() else _load_remote(dataset, streaming, options)
    except ValueError as error:
        if not str(error).startswith("Config name is missing"):
            raise
        found = str(error).split("[")[-1].split("]")[0]
        raise ValueError(f"{dataset} has the configurations {found}, expected one of them behind it, {dataset}:NAME") from error


def _load_remote(dataset: str, streaming: bool, options: dict[str, Any]) -> dict[str, Any]:
    here = dataset in {*TABLES.values(), "imagefolder"} and not options  # `datasets` would read the working directory
    if dataset.startswith((".", "/", "~")) or Path(dataset).suffix.lower() in TABLES or here:
        raise FileNotFoundError(f"{dataset} does not exist, expected a file, a folder, a Hub id or 'sprites'")
    try:
        return datasets.load_dataset(dataset, streaming=streaming, **options)
    except (ConnectionError, FileNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{dataset} is neither a local path nor reachable on the Hub ({error})") from error
    except Exception as error:  # of the HTTP library too, and of a damaged file
        error.add_note(
            f'{dataset} cannot be read from the Hub; if a file of it is damaged, download_mode="force_redownload" fetches it again'
        )
        raise


def _load_local(path: Path, dataset: str, streaming: bool, options: dict[str, Any], on_bad_row: str) -> dict[str, Any]:
    builder = _builder(path, dataset, options)
    found = _data_files(builder)
    files = sorted(Path(name) for names in found.values() for name in names)
    _refuse_empty(files)
    if on_bad_row == "skip" and all(file.suffix.lower() == ".jsonl" and file.is_file() for file in files):
        return rows_of_lines(found, streaming)
    try:
        if streaming:
            return builder.as_streaming_dataset()
        if not Path(builder.cache_dir).exists() and getattr(builder.config, "features", None) is None:
            _refuse_broken(found, "field ")  # `datasets` makes "7" of a 7 in a later file than the texts
        how = {name: options[name] for name in ("download_config", "download_mode", "num_proc", "verification_mode") if name in options}
        builder.download_and_prepare(**how)
        return builder.as_dataset(in_memory=options.get("keep_in_memory", False))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        try:
            _refuse_broken(found)
        except BadRow as broken:
            raise broken from error
        raise BadRow(f"{dataset}: {error.__cause__ or error}") from error


def _builder(path: Path, dataset: str, options: dict[str, Any]) -> datasets.DatasetBuilder:
    """What `datasets` reads a file or folder with, which knows the files of every split. Options and a data set card go before _WORDS."""
    options = {name: value for name, value in options.items() if name not in ("keep_in_memory", "num_proc", "verification_mode")}
    source = str(path.resolve())  # "text" is a name of `datasets` itself
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in TABLES:
            raise ValueError(f"{dataset} has the ending {path.suffix!r}, expected one of {', '.join(TABLES)}")
        source, tabs = TABLES[suffix], {"sep": "\t"} if suffix == ".tsv" else {}
        options = {"data_files": {"train": glob.escape(str(path))}} | tabs | options
    elif source != glob.escape(source):
        raise ValueError(f"{dataset} has one of * ? [ in its path, which `datasets` takes for a pattern, expected a folder without")
    builder = datasets.load_dataset_builder(source, **options)
    config = builder.config
    if isinstance(config, CsvConfig) and config.keep_default_na and config.na_values is None:
        return datasets.load_dataset_builder(source, **_WORDS | options)
    if isinstance(config, TextConfig) and config.encoding == "utf-8":
        return datasets.load_dataset_builder(source, **{"encoding": "utf-8-sig"} | options)  # without a byte order mark
    return builder


def _data_files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    return {str(split): list(names) for split, names in builder.config.data_files.items()}


def local_files(path: Path) -> dict[str, list[str]]:
    """The files that are read of a file or folder, by split, in order: not what lies beside them, as a licence does."""
    return _data_files(_builder(path, str(path), {}))


def _refuse_empty(files: list[Path]) -> None:
    """Name an empty table, of which `datasets` says only that something failed; files beside pictures are not tables."""
    tables = {file.suffix.lower() for file in files} <= TABLES.keys()
    for file in files if tables else ():
        if file.is_file() and file.stat().st_size < 4096 and not file.read_bytes().strip():
            raise ValueError(f"{file} is empty, expected rows")


def _refuse_broken(files: dict[str, list[str]], only: str = "") -> None:
    """Name the first broken line of ``.jsonl`` files by split."""
    for names in files.values():
        for broken in broken_lines((name for name in names if name.lower().endswith(".jsonl")), only):
            raise BadRow(broken)


def _find(loaded: Iterable[str], split: str) -> str | None:
    return next((name for name in _ALIASES.get(split, (split,)) if name in loaded), None)


def _pick(loaded: dict[str, Any], split: str, dataset: str) -> Any:
    name = _find(loaded, split)
    if name is None:
        raise ValueError(f"{dataset} has no split {split!r}, expected one of {', '.join(loaded)}")
    return loaded[name]


def _hold_out(train: Any, dataset: str) -> tuple[Any, Any]:
    """Training rows and the ones held out, by the rule that `splits` states."""
    streamed = isinstance(train, datasets.IterableDataset)
    raw = train.cast(datasets.Features()) if streamed and train.features else train  # a filter would decode every picture
    size = sum(1 for _ in raw.take(_FIRST_HELD_OUT + 1)) if streamed else len(train)  # a stream is counted as far as it matters
    if size < 2:
        raise ValueError(f"{dataset} has {size} training rows and no validation split, expected at least 2 rows")
    last = size - 1 if size <= _FIRST_HELD_OUT else None
    if not streamed:
        held = fold(_HELD_OUT, torch.arange(size)) % 20 == 0 if last is None else torch.arange(size) == last
        return tuple(select(train, rows.nonzero().flatten().tolist()) for rows in (~held, held))
    parts = (raw.filter(functools.partial(_belongs, last=last, held=held), with_indices=True) for held in (False, True))
    return tuple(part.cast(train.features) if train.features else part for part in parts)


def _belongs(row: Any, number: int, last: int | None, held: bool) -> bool:
    """Whether a stream's row is in the held-out part, or in the other one."""
    return (fold(_HELD_OUT, number) % 20 == 0 if last is None else number == last) == held


def features_of(rows: Any) -> dict[str, Any]:
    """Column names and their `datasets` features; a stream that does not know them is asked for its first row."""
    if rows.features is not None:
        return dict(rows.features)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the stream has no rows, expected at least 1")
    return dict(datasets.Dataset.from_list([first], on_mixed_types="use_json").features)


def find_column(rows: Any, kind: str, name: str | None = None) -> str:
    """The column that holds pictures, text or labels.

    Arguments:
        rows: what `load_rows` gives.
        kind: "image", "text" or "label".
        name: the user's choice, which only has to exist, and to be no list or mapping where it is not of pictures.

    Returns:
        ``name``; else the only column of that kind; else the one with a common name (text, caption, ...).

    Raises:
        ValueError: the column does not exist, or none or several fit. The message lists the columns.
    """
    features = features_of(rows)
    nested = [column for column, feature in features.items() if kind != "image" and isinstance(feature, _NESTED)]
    listed = ", ".join(f"{column} ({_describe(feature)})" for column, feature in features.items() if column not in nested) or "none"
    listed += f"; flatten nested columns first: {', '.join(nested)}" if nested else ""
    if kind not in _COMMON:
        raise ValueError(f"kind must be one of {', '.join(_COMMON)}, got {kind!r}")
    if name is not None:
        if name not in features or name in nested:
            raise ValueError(f"no {'plain ' * (name in nested)}column {name!r}, expected one of: {listed}")
        return name
    fitting = [column for column, feature in features.items() if _fits(feature, kind)]
    common = [column for column in _COMMON[kind] if column in (fitting or features.keys() - set(nested))]
    if len(fitting) == 1 or common:
        return common[0] if common else fitting[0]
    found = f"several {kind} columns" if fitting else f"no {kind} column"
    raise ValueError(f"found {found}; name one of: {listed}")


def _fits(feature: Any, kind: str) -> bool:
    if kind == "image":
        return isinstance(feature, datasets.Image)
    if kind == "text":
        return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    return isinstance(feature, datasets.ClassLabel)


def _describe(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
