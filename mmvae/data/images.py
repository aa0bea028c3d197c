r"""Any picture to defined 8-bit pixels.

What each mode of a file becomes (``C`` = 1, 3 or 4 channels asked for; ``bg`` = the stated background colour):

| picture                                   | pixels                                                                    |
|-------------------------------------------|---------------------------------------------------------------------------|
| ``1`` (bits)                              | 0 or 255                                                                  |
| ``L``                                     | as it is                                                                  |
| ``P`` (palette)                           | its RGB colours                                                           |
| ``RGB``                                   | as it is                                                                  |
| ``LA PA RGBA``, any mode with a ``tRNS``  | C = 4: RGBA as it is; else :math:`\alpha\,x + (1-\alpha)\,bg`             |
| ``CMYK YCbCr LAB HSV``                    | RGB by Pillow's conversion                                                |
| ``I;16``, ``I``, uint16 arrays            | 16 bits scaled, round(x / 257); outside 0...65535 is refused              |
| other arrays of whole numbers             | as they are; outside 0...255 is refused                                   |
| ``F``, float arrays                       | round(255 x) for x in [0, 1]; NaN, infinities and other values are refused |
| EXIF orientation 1-8                      | turned upright first                                                      |
| animated                                  | the first frame; of GIF files only where ``formats`` names them            |

Colour to grey uses ITU-R 601 luma, grey to colour repeats the channel, and C = 4 of an opaque picture has alpha 255.
Pillow itself reads 16-bit *colour* PNG files with 8 bits per channel; that is kept.

Shapes: ``H,W,C`` in Pillow's and numpy's order, ``(C,H,W)`` in torch's.
"""

import io
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
RESIZES = ("crop", "pad", "stretch", "refuse")
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}  # encodings that `formats` can name, by how files begin
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_EXIF_ORIENTATION = 0x0112
_MOST_RESIZED = 32_000_000


def open_image(
    value: Any, formats: Sequence[str] = ("JPEG", "PNG", "WEBP"), max_pixels: int = 16_000_000, paths: bool = False
) -> Image.Image:
    """A decoded Pillow image, upright, from what a data set's image column holds.

    Arguments:
        value: a Pillow image, encoded bytes, ``{"bytes": ..., "path": ...}`` as `datasets` stores it, or an array or
            tensor of shape (H,W), (H,W,C) or (C,H,W) with whole numbers in 0...255, bool, uint16 or float (in [0, 1]) values. Three
            axes are read as (H,W,C) where the last one can be channels.
        formats: the encodings that may be decoded; everything else is refused before its decoder runs.
        max_pixels: the largest width x height that is decoded (a small file can hold a gigantic picture).
        paths: whether a path without bytes is followed, to a regular file or an address: it says what this machine opens.

    Raises:
        ValueError: the value is not a picture, is damaged, or is larger than ``max_pixels``.
    """
    if isinstance(value, Image.Image):
        image = value
    elif isinstance(value, Mapping | bytes):
        return _decode(value, formats, max_pixels, paths)
    elif isinstance(value, np.ndarray | Tensor | list):
        image = _from_array(np.asarray(value))
    else:
        raise ValueError(f"got {type(value).__name__}, expected a picture (encoded bytes, a Pillow image or an array)")
    _check_size(image, max_pixels)
    return _upright(image)


def _decode(value: Mapping[str, Any] | bytes, formats: Sequence[str], max_pixels: int, paths: bool) -> Image.Image:
    data, path = (value, None) if isinstance(value, bytes) else (value.get("bytes"), value.get("path"))
    head = b""
    if data is None and path is None:
        raise ValueError("got neither bytes nor a path, expected a picture")
    if data is None and not paths:
        raise ValueError(f"got the path {path!r}, expected bytes: paths are followed only where the data set declares an Image feature")
    try:
        with io.BytesIO(data) if data is not None else _open(path) as file:
            head = file.read(16)
            file.seek(0)
            image = Image.open(file, formats=formats)
            _check_size(image, max_pixels)
            image.load()
            return _upright(image)
    except Exception as error:  # decoders raise nearly any exception on damaged files
        size, why, hint = "" if data is None else f" ({len(data)} bytes)", error, ""
        if (kind := next((kind for start, kind in _OTHERS.items() if head.startswith(start)), None)) and kind not in formats:
            why, hint = f"it is a {kind}", f": convert it, to PNG for example, or name {kind} in ImageColumn(formats=...)"
        raise ValueError(
            f"got {path or 'a picture'}{size} that cannot be decoded ({why}), expected one of {', '.join(formats)}{hint}"
        ) from error


def _open(path: str) -> Any:
    local = path.removeprefix("file://")
    if "://" in local:
        return fsspec.open(path, "rb")
    if not stat.S_ISREG(os.stat(local).st_mode):
        raise OSError("not a regular file")
    return open(local, "rb")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ValueError(f"got {width} x {height} pixels, expected between 1 and {max_pixels} (max_pixels)")


def _upright(image: Image.Image) -> Image.Image:
    if not image.info and image.format != "TIFF":  # every other format keeps EXIF there, and asking for it is slow
        return image
    return ImageOps.exif_transpose(image) if image.getexif().get(_EXIF_ORIENTATION, 1) != 1 else image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in MODES and array.shape[0] in MODES:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in MODES):
        raise ValueError(f"got an array of shape {array.shape}, expected (H,W), (H,W,C) or (C,H,W) with C in 1, 3, 4")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array)))


def _eight_bits(array: np.ndarray, sixteen: bool = False) -> np.ndarray:
    """uint8 pixels of an array in any of the number formats that pictures come in; ``sixteen``: also signed ones reach 65535."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise ValueError(f"got float pixels from {array.min(initial=0)} to {array.max(initial=0)}, expected finite values in [0, 1]")
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype.kind not in "iu":
        raise ValueError(f"got pixels of type {array.dtype}, expected whole numbers, bool or float")
    top = 65535 if sixteen or (array.dtype.kind == "u" and array.dtype.itemsize == 2) else 255
    if array.min(initial=0) < 0 or array.max(initial=0) > top:
        raise ValueError(f"got integer pixels from {array.min(initial=0)} to {array.max(initial=0)}, expected 0 to {top}")
    return np.rint(array / (257 if top == 65535 else 1)).astype(np.uint8)


def to_pixels(image: Image.Image, num_channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """Defined pixels of a Pillow image of any mode (the table at the head of this file).

    Arguments:
        image: upright picture.
        num_channels: 1, 3 or 4.
        background: red, green and blue in 0...255 that transparent pictures are laid on.

    Returns:
        (C,H,W) uint8, not to be written into.

    Raises:
        ValueError: values outside what the mode allows.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_eight_bits(np.asarray(image), sixteen=True))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        if num_channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    if image.mode not in ("1", "L", "RGB", "RGBA"):
        image = image.convert("RGB")
    if image.mode != MODES[num_channels]:
        image = image.convert(MODES[num_channels])
    return np.asarray(image).reshape(image.height, image.width, num_channels).transpose(2, 0, 1)


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str, background: tuple[int, int, int]) -> np.ndarray:
    """Bring a picture to one size, bilinear with anti-aliasing.

    Arguments:
        pixels: (C,H,W) uint8.
        size: height and width.
        mode: "crop" covers the frame and keeps its centre, "pad" fits inside it and fills the rest with the
            background (transparent where there is an alpha channel), "stretch" ignores the aspect ratio, "refuse" takes no other size:
            for pictures with masks, which must stay on each other.
        background: colour of the filling.

    Returns:
        (C, *size) uint8.

    Raises:
        ValueError: another size with "refuse", or a picture so long and thin that more than 32 million pixels come between.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    if mode == "refuse":
        raise ValueError(f"got {height} x {width} pixels (height x width), expected {size[0]} x {size[1]}")
    fit = list(size)
    if mode != "stretch":
        scale = (max if mode == "crop" else min)(size[0] / height, size[1] / width)
        fit = [max(round(height * scale), 1), max(round(width * scale), 1)]
    if (between := max(height, fit[0]) * fit[1]) > _MOST_RESIZED:  # the width is resized first
        got = f"got {height} x {width} pixels (height x width), of which {mode!r} makes {between} on the way to {size[0]} x {size[1]}"
        raise ValueError(f"{got}, expected at most {_MOST_RESIZED}")
    resized = tv.resize(torch.from_numpy(np.array(pixels)), fit, interpolation=InterpolationMode.BILINEAR, antialias=True)
    if mode == "crop":
        resized = tv.center_crop(resized, list(size))
    if mode == "pad":
        top, left = (size[0] - fit[0]) // 2, (size[1] - fit[1]) // 2
        padding = [left, top, size[1] - fit[1] - left, size[0] - fit[0] - top]
        resized = tv.pad(resized, padding, fill=_fill(len(pixels), background))
    return resized.numpy()


def _fill(num_channels: int, background: tuple[int, int, int]) -> list[int]:
    pixel = to_pixels(Image.new("RGB", (1, 1), background), num_channels, background).flatten().tolist()
    return [*pixel[:3], 0] if num_channels == 4 else pixel
