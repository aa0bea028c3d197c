"""Data sets with bad rows in known places; `test_bad_rows.py` reads small ones.

    python tests/bad_rows.py --number 100000 --bad 10000 --kinds jsonl parquet folder

Of every kind exactly the bad rows must be left out, and every good one come once: by one process, with two workers, and streamed.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from PIL import Image

from mmvae.data import ImageColumn, Loader, Rows, TextColumn, load_rows
from mmvae.processing import train_tokenizer


def make(folder: Path, kind: str, number: int, bad: int, seed: int = 0) -> set[int]:
    """Write a data set of a kind and return the numbers of its bad rows."""
    chosen = set(random.Random(seed).sample(range(number), bad))
    (folder / "train").mkdir(parents=True)
    if kind == "folder":
        for row in range(number):
            (folder / "train" / f"{row:06d}.png").write_bytes(picture(row)[: 40 if row in chosen else None])
    elif kind == "parquet":
        table = {"image": [{"bytes": picture(row)[: 40 if row in chosen else None], "path": None} for row in range(number)]}
        rows = datasets.Dataset.from_dict(table, features=datasets.Features({"image": datasets.Image(decode=False)}))
        rows.to_parquet(folder / "train" / "a.parquet")
    else:
        wrong = ['{"text": "w1"', "oh", '{"text": 5}', '{"text": null}', "[]", '{"text": "\\ud800"}']
        lines = [wrong[row % len(wrong)] if row in chosen else json.dumps({"text": f"w{row % 9} w1"}) for row in range(number)]
        (folder / "train" / "a.jsonl").write_text("\n".join(lines) + "\n")
    return chosen


def picture(row: int) -> bytes:
    """A small PNG file, another one for every row up to 256."""
    file = io.BytesIO()
    Image.new("L", (4, 4), row % 256).save(file, "PNG")
    return file.getvalue()


def read(folder: Path, kind: str, streaming: bool = False, num_workers: int = 0) -> tuple[Rows, list[dict[str, torch.Tensor]]]:
    """The rows of a data set without the bad ones, and all batches of an epoch."""
    data = load_rows(str(folder), streaming=streaming, on_bad_row="skip")
    words = train_tokenizer([f"w{n}" for n in range(9)])
    column = TextColumn("text", words) if kind == "jsonl" else ImageColumn("image", 4, 1)
    rows = Rows(data, column, name=str(folder), memory_limit=0, on_bad_row="skip", num_workers=num_workers)
    return rows, list(Loader(rows, 64, pool=2).batches(0))


def main() -> None:
    """Write, read, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "parquet", "folder"])
    args = parser.parse_args()
    failed = False
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as place:
            datasets.config.HF_DATASETS_CACHE = f"{place}/cache"
            bad = make(Path(place, "data"), kind, args.number, args.bad)
            for options in ({}, {"num_workers": 2}, {"streaming": True}):
                began = time.perf_counter()
                rows, batches = read(Path(place, "data"), kind, **options)
                came = torch.cat([batch["row"] for batch in batches])
                right = set(rows.bad) == bad and sorted(came.tolist()) == sorted({*range(args.number)} - bad)
                failed |= not right
                told = f"{len(rows.bad)} left out, {len(came)} read, {'all right' if right else 'WRONG'}"
                print(f"{kind} {options}: {told}, {time.perf_counter() - began:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    main()
