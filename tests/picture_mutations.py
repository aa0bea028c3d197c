"""Damage pictures of six formats in thousands of ways and count what becomes of them; `test_bad_rows.py` does a few of them.

    python tests/picture_mutations.py --number 3000 --seed 0

Allowed are pixels, (3, 32, 32) uint8, and a ValueError of the form "got ..., expected ...". By default only JPEG, PNG and WEBP are decoded;
here the other three are asked for as well.
"""

import argparse
import io
import random
import resource
import struct
import sys
import time
import warnings
from collections import Counter

import numpy as np
from PIL import Image

from mmvae.data import ImageColumn

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
COLUMN = ImageColumn("image", 32, formats=FORMATS)


def encoded(format: str) -> bytes:
    """A picture with something in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels // 32 * 32).save(file, format)
    return file.getvalue()


PICTURES = {format: encoded(format) for format in FORMATS}


def damaged(format: str, chance: random.Random) -> bytes:
    """The bytes of a picture, cut, with other bits, with bytes of another one, or with another size in its header."""
    data = bytearray(PICTURES[format])
    match chance.randrange(6):
        case 0:
            return bytes(data[: chance.randrange(len(data))])
        case 1:
            for _ in range(chance.randrange(1, 20)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 2:
            start = chance.randrange(len(data))
            data[start : start + 40] = chance.randbytes(chance.randrange(80))
        case 3:
            other = PICTURES[chance.choice(FORMATS)]
            data = bytearray(data[: chance.randrange(64)] + other[chance.randrange(64) :])
        case 4:
            place = chance.randrange(min(64, len(data) - 4))
            data[place : place + 4] = struct.pack(chance.choice("<>") + "I", chance.choice([0, 1, 2**16 - 1, 2**20, 2**31 - 1, 2**32 - 1]))
        case 5:
            return chance.choice([b"", b"<html><body>404</body></html>", b"\0" * 100, bytes(data[:12]), chance.randbytes(200)])
    return bytes(data)


def run(number: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """How often what happened to so many pictures, and what failed."""
    counts, failed = Counter(), []
    for n in range(number):
        format = FORMATS[n % len(FORMATS)]
        data = damaged(format, random.Random(f"{seed} {n}"))
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it tolerates in TIFF
            kind = outcome(data)
        kind = "FAILED: over 5 s" if time.perf_counter() - began > 5 else kind
        counts[kind.split(":")[0]] += 1
        if kind.startswith("FAILED"):
            failed.append(f"seed {seed}, number {n}, {format}: {kind}")
    return counts, failed


def outcome(data: bytes) -> str:
    """What became of a picture."""
    try:
        (pixels,) = COLUMN.prepare([data])
    except ValueError as error:
        told = str(error)
        return "refused by name" if told.startswith("got ") and "expected" in told else f"FAILED: {told}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "decoded" if (pixels.shape, pixels.dtype) == ((3, 32, 32), np.uint8) else f"FAILED: {pixels.shape}"


def main() -> None:
    """Damage, decode, count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run(60, args.seed + 1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    counts, failed = run(args.number, args.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(*failed, dict(counts), f"{grown:.0f} MiB more, {time.perf_counter() - began:.0f} s", sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
