"""Whether what a joint model makes of one modality fits the others: retrieval, words, classes, and sprites as a judge sees them.

Rows are read in chunks of 100 in their own order. Chunk n is the work of rank n modulo the number of ranks, and its latents are drawn by
(seed, n), so a figure depends neither on batch size nor on the number of ranks. Pictures are made from samples of q(z|given), since what
a caption leaves open should vary; texts are compared word for word, so they are made from the posterior's mean, the best guess.

Figures are called ``<from>_to_<to>/<figure>``, and ``joint/<figure>`` where nothing was given; ``all_to_<to>`` is from every
other modality that a row has, of models with three or more.
Shapes: ``N`` rows, ``B`` rows of a chunk, ``M`` modalities.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from mmvae.data import Loader, Rows
from mmvae.distributions import DiagNormal
from mmvae.evaluation import model_inputs
from mmvae.joint_processing import MMVAEProcessor
from mmvae.judge import Judge, strict_captions
from mmvae.loop import to_device
from mmvae.metrics import recall_at, text_scores
from mmvae.models.joint_generation import crowding, overlap, parts_of
from mmvae.models.mmvae import MMVAE
from mmvae.noise import fold

CHUNK = 100
_CROSS, _JOINT = 0x63726F73, 0x6A6F696E  # keep the latents of each apart


@contextlib.contextmanager
def without_densities(model: MMVAE) -> Iterator[None]:
    """Meanwhile ``model`` generates from the priors that it was trained with, whatever was fitted afterwards."""
    fitted, model.densities = model.densities, nn.ModuleDict()
    try:
        yield
    finally:
        model.densities = fitted


def chunks(accelerator: Accelerator, model: MMVAE, rows: Rows, num_rows: int | None = None) -> Iterator[tuple[int, Tensor, dict]]:
    """This rank's chunks of the first rows: their number, the rows' numbers (B,), and the model's inputs."""
    for n, batch in enumerate(Loader(rows, CHUNK, shuffle=False, pool=0).batches(0)):
        size = len(batch["row"]) if num_rows is None else min(num_rows - n * CHUNK, len(batch["row"]))
        if size <= 0:
            return
        if n % accelerator.num_processes == accelerator.process_index:
            inputs = to_device(accelerator.device, model_inputs(model, batch))
            yield n, batch["row"][:size], {name: value[:size] for name, value in inputs.items()}


def _seen(model: MMVAE, inputs: Mapping[str, Tensor], sources: Iterable[str]) -> Tensor:
    """(B, M) bool: what is present of some modalities."""
    columns = [model.modalities.index(name) for name in sources]
    seen = torch.zeros_like(inputs["present"])
    seen[:, columns] = inputs["present"][:, columns]
    return seen


def _sources(model: MMVAE, target: str) -> dict[str, list[str]]:
    """What a modality is made from, by the name that figures bear."""
    others = [name for name in model.modalities if name != target]
    return {name: [name] for name in others} | ({"all": others} if len(others) > 1 else {})


def _mean(parts: list[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Means over the rows of all ranks of figures that are means over some; {} where nobody had any."""
    parts = gather_object(parts)
    total = sum(size for size, _ in parts)
    return {name: sum(size * figures[name] for size, figures in parts) / total for name in (parts[0][1] if parts else ())}


@torch.no_grad()
def cross_generated(
    accelerator: Accelerator,
    model: MMVAE,
    rows: Rows,
    sources: Sequence[str],
    target: str,
    *,
    num_rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[Tensor, Any]]:
    """One modality of real rows, made from others of theirs; each rank gets its chunks.

    Arguments:
        accelerator: its ranks share the rows.
        model: in evaluation mode, not wrapped.
        rows: with the columns of all modalities.
        sources: names of the modalities that are seen, as far as a row has them.
        target: name of the modality that is made. Rows that lack it, or all sources, are left out.
        num_rows: only the first rows; all when None.
        seed: of the latents.
        options: of :meth:`MMVAE.generate`.

    Returns:
        Per chunk the rows' numbers (B,) in the data set, and what was made of them.
    """
    column = model.modalities.index(target)
    for n, numbers, inputs in chunks(accelerator, model, rows, num_rows):
        seen = _seen(model, inputs, sources)
        keep = seen.any(1) & inputs["present"][:, column]
        if keep.any():
            given = {name: value[keep] for name, value in inputs.items()} | {"present": seen[keep], "visible": seen[keep]}
            generator = torch.Generator().manual_seed(fold(seed, _CROSS, n))
            yield numbers[keep.cpu()], model.generate(target, generator=generator, **given, **options)


@torch.no_grad()
def joint_generated(
    accelerator: Accelerator, model: MMVAE, num_generated: int, *, seed: int = 0, **options: Any
) -> Iterator[dict[str, Any]]:
    """All modalities together, nothing given, by name, in chunks; each rank gets its own. Arguments as for :func:`cross_generated`."""
    for n in range(accelerator.process_index, -(-num_generated // CHUNK), accelerator.num_processes):
        generator = torch.Generator().manual_seed(fold(seed, _JOINT, n))
        yield model.sample(min(CHUNK, num_generated - n * CHUNK), generator, **options)


# ---- retrieval


@torch.no_grad()
def retrieval(
    accelerator: Accelerator, model: MMVAE, rows: Rows, first: str, second: str, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    r"""How often a row's other half is among the k nearest by :math:`\log \int q(z|a)\, q(z|b)\, dz`, out of all rows that have both.

    Arguments:
        accelerator, model, rows: as for :func:`cross_generated`.
        first, second: names of modalities.
        ks: k of recall@k.

    Returns:
        Both ways ``<from>_to_<to>/recall_at_<k>``, ``balanced_recall_at_<k>``, which subtracts what a candidate overlaps with all queries,
        ``chance_at_<k>`` = min(1, k / N), in [0, 1], and ``candidates``, N; {} where no row has both. Equal scores share their places,
        see :func:`mmvae.metrics.recall_at`.
    """
    parts = []
    for n, _, inputs in chunks(accelerator, model, rows):
        both = _seen(model, inputs, [first, second]).sum(1) == 2
        if both.any():
            inputs = {name: value[both] for name, value in inputs.items()}
            masks = [_seen(model, inputs, [name]) for name in (first, second)]
            found = [model.posterior(**inputs | {"present": mask, "visible": mask}).mixture for mask in masks]
            parts.append((n, torch.stack([moment.float().cpu() for q in found for moment in (q.mean, q.variance.log())])))
    parts = sorted(gather_object(parts), key=lambda part: part[0])
    if not parts:
        return {}
    a_mean, a_logvar, b_mean, b_logvar = torch.cat([moments for _, moments in parts], 1)
    a, b = DiagNormal(a_mean, a_logvar), DiagNormal(b_mean, b_logvar)
    figures = {}
    for name, queries, candidates in ((f"{first}_to_{second}", a, b), (f"{second}_to_{first}", b, a)):
        figures |= {f"{name}/{figure}": value for figure, value in _recalls(queries, candidates, ks).items()}
        figures |= {f"{name}/chance_at_{k}": min(1.0, k / len(a_mean)) for k in ks}
        figures[f"{name}/candidates"] = len(a_mean)
    return figures


def _recalls(queries: DiagNormal, candidates: DiagNormal, ks: Sequence[int]) -> dict[str, float]:
    """Recall where query i belongs to candidate i, by the overlap and by what of it is not :func:`crowding`."""
    totals, done, crowd = {}, 0, crowding(queries, candidates)
    for part in parts_of(queries, len(candidates.loc)):
        scores, targets = overlap(part, candidates), torch.arange(done, done + len(part.loc))
        done += len(targets)
        for name, by in (("recall", scores), ("balanced_recall", scores - crowd)):
            for k in ks:
                found = recall_at(by, k, targets).sum().item()
                totals[f"{name}_at_{k}"] = totals.get(f"{name}_at_{k}", 0.0) + found / len(queries.loc)
    return totals


# ---- words


def text_coherence(
    accelerator: Accelerator,
    model: MMVAE,
    processor: MMVAEProcessor,
    rows: Rows,
    truths: Mapping[str, Sequence[str | None]],
    *,
    num_rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Texts made from the other modalities against the true ones.

    Arguments:
        accelerator, model, rows, num_rows, seed, options: as for :func:`cross_generated`; of the options ``num_beams``, for example.
        processor: the model's.
        truths: by modality, the texts of the data set by the row's number.

    Returns:
        ``<from>_to_<to>/exact_match``, ``/bleu`` and ``/chrf``, see :func:`mmvae.metrics.text_scores`.
    """
    figures = {}
    for target, true in truths.items():
        for name, sources in _sources(model, target).items():
            found: list[tuple[str, str]] = []
            chosen = {"num_rows": num_rows, "seed": seed, "sample": False} | options
            for numbers, made in cross_generated(accelerator, model, rows, sources, target, **chosen):
                found += zip(processor.batch_decode(made.cpu(), target), (true[i] for i in numbers.tolist()), strict=True)
            found = gather_object(found)
            if found:
                scores = text_scores(*zip(*found, strict=True))
                figures |= {f"{name}_to_{target}/{score}": value for score, value in scores.items()}
    return figures


# ---- classes


def class_coherence(
    accelerator: Accelerator,
    model: MMVAE,
    rows: Rows,
    classifiers: Mapping[str, Callable[[Any], Tensor]],
    labels: Sequence[int],
    *,
    num_rows: int | None = None,
    num_generated: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Share of what was made from another modality that is of the row's class, and of joint samples whose modalities agree.

    Arguments:
        accelerator, model, rows, num_rows, seed: as for :func:`cross_generated`.
        classifiers: by modality, what ``generate`` makes of it (B, ...) -> (B,) int64 class; -1 for nothing that it knows, which is wrong.
        labels: the class of every row of the data set, by its number.
        num_generated: joint samples; 0 leaves them out, as a single classifier does.

    Returns:
        ``<from>_to_<to>/coherence`` for every modality that has a classifier, and ``joint/coherence``.

    References:
        Shi et al. (2019), cross and joint coherence, https://arxiv.org/abs/1911.03393
    """
    figures, labels = {}, torch.as_tensor(labels)
    for target, classify in classifiers.items():
        for name, sources in _sources(model, target).items():
            parts = []
            for numbers, made in cross_generated(accelerator, model, rows, sources, target, num_rows=num_rows, seed=seed):
                right = (classify(made).cpu() == labels[numbers]) & (labels[numbers] >= 0)
                parts.append((len(right), {f"{name}_to_{target}/coherence": right.double().mean().item()}))
            figures |= _mean(parts)
    if num_generated and len(classifiers) > 1:
        parts = []
        for made in joint_generated(accelerator, model, num_generated, seed=seed, target=list(classifiers)):
            seen = torch.stack([classify(made[name]).cpu() for name, classify in classifiers.items()])
            agreed = (seen == seen[0]).all(0) & (seen[0] >= 0)
            parts.append((len(agreed), {"joint/coherence": agreed.double().mean().item()}))
        figures |= _mean(parts)
    return figures


# ---- sprites


def sprites_accuracy(
    accelerator: Accelerator,
    model: MMVAE,
    processor: MMVAEProcessor,
    rows: Rows,
    judge: Judge,
    captions: Sequence[str],
    level: int,
    *,
    num_generated: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Strict accuracy on captioned sprites, every attribute that the caption names right, and that of each attribute.

    Arguments:
        accelerator, model, rows, seed: as for :func:`cross_generated`.
        processor: the model's; it tells which modality is the picture and which the caption.
        judge: see :class:`mmvae.judge.Judge`.
        captions: of the data set, by the row's number.
        level: of the data set.
        num_generated: the first rows that are used, and how many pairs are made of nothing given.

    Returns:
        ``<caption>_to_<picture>/``, ``<picture>_to_<caption>/`` and ``joint/`` with ``strict``, an entry per attribute, and what
        :meth:`mmvae.judge.Strictness.figures` tells besides.

    Raises:
        ValueError: for a model that is not of one picture and one text.
    """
    kinds = {kind: name for name, kind in processor.kinds.items()}
    if sorted(processor.kinds.values()) != ["image_processor", "tokenizer"]:
        raise ValueError(f"model: received the modalities {processor.kinds}, expected one picture and one text")
    picture, caption = kinds["image_processor"], kinds["tokenizer"]
    judge = judge.to(accelerator.device)
    options = {"num_rows": num_generated, "seed": seed}
    drawn, told, joint = [], [], []
    for numbers, pixels in cross_generated(accelerator, model, rows, [caption], picture, **options):
        drawn.append((len(numbers), judge.strict(pixels, [captions[i] for i in numbers.tolist()], level).figures()))
    for numbers, ids in cross_generated(accelerator, model, rows, [picture], caption, sample=False, **options):
        right = strict_captions(processor.batch_decode(ids.cpu(), caption), [captions[i] for i in numbers.tolist()], level)
        told.append((len(numbers), {name: value.double().mean().item() for name, value in right.items()}))
    for made in joint_generated(accelerator, model, num_generated, seed=seed):
        texts = processor.batch_decode(made[caption].cpu(), caption)
        joint.append((len(texts), judge.strict(made[picture], texts, level).figures()))
    named = {f"{caption}_to_{picture}": drawn, f"{picture}_to_{caption}": told, "joint": joint}
    return {f"{name}/{figure}": value for name, parts in named.items() for figure, value in _mean(parts).items()}


# ---- all of them


def evaluate_joint(
    accelerator: Accelerator,
    model: MMVAE,
    processor: MMVAEProcessor,
    rows: Rows,
    truths: Mapping[str, Sequence[str | None]],
    *,
    num_generated: int = 1000,
    num_beams: int = 1,
    judge: Judge | None = None,
    level: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Retrieval between all pairs of modalities, all texts, and sprites where there is a judge: once more without fitted densities.

    Arguments as for :func:`text_coherence` and :func:`sprites_accuracy`; with ``num_generated`` 0 there is retrieval alone.
    """
    figures: dict[str, float] = {}
    for first, second in combinations(model.modalities, 2):
        figures |= retrieval(accelerator, model, rows, first, second)
    if num_generated:
        beams = {"num_beams": num_beams, "num_rows": num_generated}
        figures |= text_coherence(accelerator, model, processor, rows, truths, seed=seed, **beams)
    if not judge or not num_generated:
        return figures
    judged = (accelerator, model, processor, rows, judge, next(iter(truths.values()), ()), level)
    options = {"num_generated": num_generated, "seed": seed}
    figures |= sprites_accuracy(*judged, **options)
    if len(model.densities):
        with without_densities(model):
            figures |= {f"without_densities/{name}": value for name, value in sprites_accuracy(*judged, **options).items()}
    return figures
