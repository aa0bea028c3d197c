"""Charts of a run: curves, confusions, bars, one figure against another. Small PNG files.

Nothing here keeps state between calls (no ``pyplot``), so it works in threads and without a display. Shapes: ``N`` classes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor


def confusions(counts: Tensor, names: Sequence[str], path: str | Path) -> Path:
    """Which class was taken for which: shares of every true class as shades, and the numbers of rows where they can be read.

    Arguments:
        counts: (N, N), a row for every true class; see :func:`mmvae.metrics.confusion`.
        names: of the N classes.
        path: the PNG file; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: not as many names as classes.
    """
    size = len(names)
    if tuple(counts.shape) != (size, size):
        raise ValueError(f"names: got {size} for counts {tuple(counts.shape)}, expected one per class of (N, N)")
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).cpu()
    side = min(2.5 + 0.4 * size, 14)
    figure = Figure(figsize=(side, side), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    labels = [textwrap.shorten(name, 24, placeholder="...") for name in names]
    axes.set_xticks(range(size), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(size), labels, fontsize=8)
    axes.set_xlabel("told", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    for i, j in counts.nonzero().tolist() if size <= 30 else ():
        axes.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 0.5 else "black")
    return save_figure(figure, path)


def bars(panels: Mapping[str, Mapping[str, float]], path: str | Path, columns: int = 5) -> Path:
    """Numbers as bars from above to below: one panel for each title, the words of topics for example.

    Arguments:
        panels: numbers by name, by title.
        path: the PNG file; its folder is made.
        columns: panels in a row.

    Returns:
        The path.

    Raises:
        ValueError: no panels.
    """
    if not panels:
        raise ValueError("panels: got none, expected at least one")
    rows, most = -(-len(panels) // columns), max(map(len, panels.values()))
    figure = Figure(figsize=(2.4 * columns, (0.5 + 0.16 * most) * rows), dpi=90, layout="constrained")
    for number, (title, values) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.barh(range(len(values)), list(values.values()))
        axes.set_yticks(range(len(values)), [textwrap.shorten(name, 24).replace("$", r"\$") for name in values], fontsize=7)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=6)
        axes.set_title(title, fontsize=8)
    return save_figure(figure, path)


def curves(history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """How a run went: one panel for each quantity, over optimizer steps.

    ``train/loss`` and ``eval/loss`` share the panel "loss"; a quantity without numbers has none.

    Arguments:
        history: records such as ``{"step": 100, "train/loss": 120.3, "train/kl": 4.2}``; each may have other keys.
        path: the PNG file; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: a history without any quantity, or a record without "step".
    """
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for i, record in enumerate(history):
        if "step" not in record:
            raise ValueError(f"history[{i}]: got keys {sorted(record)}, expected one named 'step'")
        for name, value in record.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                part, _, quantity = name.rpartition("/")
                panels.setdefault(quantity, {}).setdefault(part, []).append((record["step"], value))
    if not panels:
        raise ValueError(f"history: got {len(history)} records without a quantity, expected at least one, such as 'train/loss'")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), dpi=90, layout="constrained")
    for i, (quantity, parts) in enumerate(panels.items()):
        _curve(figure.add_subplot(rows, columns, i + 1), quantity, parts)
    return save_figure(figure, path)


def _curve(axes, quantity: str, parts: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for part, points in parts.items():
        axes.plot(*zip(*points, strict=True), label=part, linewidth=1.2, marker="." if len(points) < 40 else None)
    axes.set_title(quantity.replace("_", " "), fontsize=10)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if any(parts):
        axes.legend(fontsize=8)


def against(series: Mapping[str, Mapping[object, Sequence[float]]], path: str | Path, across: str = "", up: str = "") -> Path:
    """Repeated measurements of several methods: each one a dot, their means a line.

    Arguments:
        series: the measurements by what they were made at, by method.
        path: the PNG file; its folder is made.
        across, up: what the axes are.

    Returns:
        The path.
    """
    places = list(dict.fromkeys(place for points in series.values() for place in points))
    figure = Figure(figsize=(6, 4), dpi=90, layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    for i, (name, points) in enumerate(series.items()):
        at = [places.index(place) + 0.06 * (i - (len(series) - 1) / 2) for place in points]  # side by side
        (line,) = axes.plot(at, [sum(values) / len(values) for values in points.values()], label=name, linewidth=1.2)
        for x, values in zip(at, points.values(), strict=True):
            axes.plot([x] * len(values), values, ".", color=line.get_color(), alpha=0.6)
    axes.set_xticks(range(len(places)), [str(place) for place in places])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG file, whose folder is made; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
