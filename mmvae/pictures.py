"""What a person looks at: grids of pictures, tables of sentences.

Pictures are small PNG files. Nothing here keeps state between calls (no ``pyplot``), so it works in threads and without a display.

Shapes: ``N`` pictures, ``D`` latent units, ``K`` steps of a walk, ``C,H,W`` image with 1, 3 or 4 channels.
"""

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from mmvae.charts import save_figure

_SHOWN_PIXELS = 64  # smaller pictures are enlarged, so that 28 pixels can be looked at


def _rgb(pixels: Tensor) -> Tensor:
    """(N, 1 | 3 | 4, H, W) uint8 or float in [0, 1] to (N, 3, H', W') float on the CPU, laid on white, small ones enlarged."""
    pixels = _opaque(pixels)
    return interpolate(pixels, scale_factor=max(_SHOWN_PIXELS // max(pixels.shape[-2:]), 1), mode="nearest")


def _opaque(pixels: Tensor) -> Tensor:
    """The same of the same size."""
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3, 4) or pixels.numel() == 0:
        raise ValueError(f"pixels: got shape {tuple(pixels.shape)}, expected (N, C, H, W) with C in 1, 3, 4 and N >= 1")
    pixels = pixels.detach().cpu()
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
    low, high = pixels.min().item(), pixels.max().item()
    if not (0 <= low and high <= 1):  # written so that NaN fails
        raise ValueError(f"pixels: got values in [{low:.4g}, {high:.4g}], expected [0, 1] or uint8")
    if pixels.shape[1] == 4:
        pixels = pixels[:, :3] * pixels[:, 3:] + 1 - pixels[:, 3:]
    return pixels.expand(-1, 3, -1, -1)


def _arrange(pixels: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) to one (H', W', 3) uint8 picture on a white ground."""
    return make_grid(_rgb(pixels), nrow=columns, padding=2, pad_value=1).mul(255).round().byte().permute(1, 2, 0)


def grid(pixels: Tensor, path: str | Path, columns: int | None = None) -> Path:
    """Pictures side by side, row after row: samples, or walks between pictures, one per row.

    Arguments:
        pixels: (N, C, H, W) float in [0, 1] or uint8; or (N, K, C, H, W), one row of K pictures for each of the N.
        path: the PNG file; its folder is made.
        columns: pictures in a row; by default K, or as many as make the grid nearly square.

    Returns:
        The path.

    Raises:
        ValueError: another shape, or values outside [0, 1] (NaN too).
    """
    if pixels.ndim == 5:
        columns, pixels = columns or pixels.shape[1], pixels.flatten(0, 1)
    path = Path(path)
    picture = Image.fromarray(_arrange(pixels, columns or round(len(pixels) ** 0.5 + 0.49)).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", optimize=True)
    return path


def reconstructions(originals: Tensor, reconstructed: Tensor, path: str | Path, columns: int = 8) -> Path:
    """Originals, and under each of them what the model made of it.

    Arguments:
        originals: (N, C, H, W) float in [0, 1] or uint8.
        reconstructed: (N, C, H, W) float in [0, 1] or uint8.
        path: the PNG file; its folder is made.
        columns: pairs in a row.

    Returns:
        The path.

    Raises:
        ValueError: numbers of pictures that differ, or what ``grid`` refuses.
    """
    if len(originals) != len(reconstructed):
        raise ValueError(f"reconstructed: got {len(reconstructed)} pictures, expected {len(originals)}, one for each original")
    columns = min(columns, len(originals))
    above, below = _rgb(originals), _rgb(reconstructed)
    blank = torch.ones(-len(above) % columns, *above.shape[1:])  # fills the last row, so that every pair stays together
    rows = [torch.cat([side, blank]).unflatten(0, (-1, columns)) for side in (above, below)]
    return grid(torch.stack(rows, 1).flatten(0, 2), path, columns)


def overlaid(pixels: Tensor, masks: Tensor, strength: float = 0.6) -> Tensor:
    """Pictures in grey under their masks, each class but the first in a colour of its own.

    Arguments:
        pixels: (N, C, H, W) float in [0, 1] or uint8.
        masks: (N, H, W) whole numbers; what is negative or 255 is not coloured.
        strength: of the colours, in [0, 1].

    Returns:
        (N, 3, H, W) float in [0, 1].
    """
    shown, masks = _opaque(pixels), masks.detach().cpu().long()
    grey = shown.mean(1, keepdim=True).expand_as(shown)
    colours = torch.tensor(colormaps["tab10"].colors, dtype=torch.float32)[(masks - 1).clamp(0) % 10].movedim(-1, 1)
    return torch.lerp(grey, colours, strength * ((masks > 0) & (masks != 255)).unsqueeze(1).float())


def captioned(pixels: Tensor, captions: Sequence[str], path: str | Path, columns: int = 4, title: str = "") -> Path:
    """Pictures with a caption under each: what belongs together, given or generated.

    Arguments:
        pixels: (N, C, H, W) float in [0, 1] or uint8.
        captions: N texts; long ones are wrapped.
        path: the PNG file; its folder is made.
        columns: pictures in a row.
        title: a line above them.

    Returns:
        The path.

    Raises:
        ValueError: another shape, values outside [0, 1], or not one caption for each picture.
    """
    if len(captions) != len(pixels):
        raise ValueError(f"captions: got {len(captions)} for {len(pixels)} pictures, expected one for each")
    shown, rows = _rgb(pixels).movedim(1, -1), -(-len(captions) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.2 * rows + 0.4), dpi=80)
    figure.suptitle(title, fontsize=10)
    for number, (picture, caption) in enumerate(zip(shown, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(picture.numpy(), interpolation="nearest")
        axes.set_xticks([]), axes.set_yticks([])
        axes.set_xlabel(textwrap.fill(caption.replace("$", r"\$"), 26), fontsize=7)
    figure.tight_layout()
    return save_figure(figure, path)


def side_by_side(
    pairs: Mapping[str, Tensor | Sequence[str]],
    folder: str | Path,
    title: str,
    further: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """What belongs together in two modalities: pictures with captions or above each other as a figure, texts as a table.

    Arguments:
        pairs: pictures (N, C, H, W) or N texts, by modality.
        folder: of the figure, which is called as the title.
        title: what is shown.
        further: more texts for the table, by name; pictures among them are left out.

    Returns:
        Markdown by title; empty where there are fewer than two columns of text.
    """
    texts = {name: list(value) for name, value in {**pairs, **(further or {})}.items() if not isinstance(value, Tensor)}
    shown = [value for value in pairs.values() if isinstance(value, Tensor)]
    path = Path(folder) / f"{title.replace(' ', '_')}.png"
    if len(shown) == 1 and len(pairs) == 2:
        captioned(shown[0], next(list(value) for value in pairs.values() if not isinstance(value, Tensor)), path, title=title)
    elif len(shown) == 2:
        reconstructions(*shown, path)
    return {title.capitalize(): table(texts)} if len(texts) > 1 else {}


def traversals(pixels: Tensor, labels: Sequence[str], path: str | Path, title: str = "") -> Path:
    """Walks along latent units: row d shows the pictures of unit d as its value grows.

    Arguments:
        pixels: (D, K, C, H, W) float in [0, 1] or uint8.
        labels: D names, for example ``"z17  2.1 nats"``.
        path: the PNG file; its folder is made.
        title: a line above the rows.

    Returns:
        The path.

    Raises:
        ValueError: numbers of rows and labels that differ, or what ``grid`` refuses.
    """
    if pixels.ndim != 5 or len(labels) != len(pixels):
        raise ValueError(f"labels: got {len(labels)} for pixels {tuple(pixels.shape)}, expected one per row of (D, K, C, H, W)")
    picture = _arrange(pixels.flatten(0, 1), pixels.shape[1])
    height, width = picture.shape[0] / 100, picture.shape[1] / 100
    margin, top = 0.9, 0.35 if title else 0.05  # inches
    figure = Figure(figsize=(width + margin, height + top), dpi=100)
    axes = figure.add_axes((margin / (width + margin), 0, width / (width + margin), height / (height + top)))
    axes.imshow(picture.numpy(), interpolation="nearest")
    step = (picture.shape[0] - 2) / len(labels)
    axes.set_yticks([1 + step * (row + 0.5) for row in range(len(labels))], labels, fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    return save_figure(figure, path)


def table(columns: Mapping[str, Sequence[object]]) -> str:
    """Sentences or figures as a Markdown table, shown as they are: "<unk>" and "|" are text, not markup.

    Arguments:
        columns: heading to cells; all columns are equally long.

    Returns:
        The table, one line per row, ending in a newline.

    Raises:
        ValueError: columns of different lengths.

    Example:
        >>> print(table({"original": ["a <unk> heart"], "reconstruction": [""]}), end="")
        | original | reconstruction |
        |---|---|
        | a &lt;unk&gt; heart | *(empty)* |
    """
    lengths = {name: len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"columns: got lengths {lengths}, expected one or more columns of the same length")
    rows = [
        [_cell(name) for name in columns],
        *([_cell(cell) for cell in row] for row in zip(*columns.values(), strict=True)),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:], ""])


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = re.sub(r"([\\`*_|\[\]$~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return text or "*(empty)*"
