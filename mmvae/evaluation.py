r"""All figures of a VAE on a data set, by rows, over any number of ranks.

Every figure is at weight 1, without free bits or dropout, with the posterior sampled; the noise of a row is keyed by (seed, row), so a
figure does not depend on batch size or number of ranks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmvae.distributions import DiagNormal
from mmvae.metrics import active_units, bits_per_dim, mutual_information, perplexity, psnr, ssim
from mmvae.models.classes import without_labels
from mmvae.models.configuration import VAEConfig, input_name
from mmvae.models.image_configuration import BINARIZATIONS
from mmvae.models.unimodal import VAEModel
from mmvae.noise import fold, keyed_normal, keyed_uniform
from mmvae.objectives import elbo
from mmvae.optimization import unwrap
from mmvae.training import evaluate

_ELBO, _MARGINAL, _PIXELS, _INFORMATION, _LABELS = 0x656C626F, 0x6D617267, 0x70697865, 0x696E666F, 0x6C616265  # noise of each apart
_MOST_MOMENTS = 1 << 26  # numbers kept for active units and mutual information, on each rank
_MOST_PAIRED = 10_000  # rows, chosen by key, of which every pair is compared for the mutual information

Transform = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]


def binarization(mode: str) -> Transform | None:
    r"""Make pixels 0 or 1: "none"; "threshold" at 1/2; or "dynamic", :math:`P(x = 1) =` pixel, drawn by the row's key.

    Raises:
        ValueError: for another mode.
    """
    if mode not in BINARIZATIONS:
        raise ValueError(f"binarize: received {mode!r}, expected one of {list(BINARIZATIONS)}")
    if mode == "none":
        return None

    def transform(batch: dict[str, Tensor], keys: Tensor) -> dict[str, Tensor]:
        pixels = batch["pixel_values"]
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        level = keyed_uniform(fold(_PIXELS, keys), pixels.shape[1:]) if mode == "dynamic" else 0.5
        return {**batch, "pixel_values": (pixels > level).float()}

    return transform


def refuse_grey(config: VAEConfig, loaders: Mapping[str, Any]) -> None:
    """A Bernoulli gives probabilities to pixels of 0 and 1 only: what it gives to grey ones is no likelihood.

    Arguments:
        config: of a VAE of pictures, or of one that has such children, whose inputs bear their names where they must.
        loaders: by split; of each the first batch is looked at.

    Raises:
        ValueError: for grey pixels that nothing makes 0 or 1, naming the modality and the split.
    """
    for name, child in getattr(config, "modalities", {"": config}).items():
        if getattr(child, "likelihood", None) != "bernoulli" or child.binarize != "none":
            continue
        for split, loader in loaders.items():
            batch = next(loader.batches(0))
            pixels = batch[own if (own := input_name(name, "pixel_values")) in batch else "pixel_values"]
            grey = pixels[(pixels != 0) & (pixels != 255)]
            if len(grey):
                raise ValueError(
                    f"{input_name(name, 'binarize')}: received 'none' with likelihood 'bernoulli' and a pixel of {grey[0].item()} in split "
                    f"{split!r}, expected 0 and 255 only: choose another likelihood, or binarize 'dynamic' where the recipe takes it"
                )


def model_inputs(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that the model takes."""
    inner = unwrap(model)
    names = (*inner.input_names, *inner.condition_names)
    return {name: value for name, value in batch.items() if name in names}


class _Moments:
    """Posterior means and log-variances of the rows of all ranks, by row number, as far as they fit."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.parts, self.size = accelerator, [], 0

    def add(self, mean: Tensor, logvar: Tensor, row: Tensor, weight: Tensor) -> None:
        if self.size < _MOST_MOMENTS:
            row = torch.where(weight > 0, row, -1)
            self.parts.append((row, torch.cat([mean.flatten(1), logvar.flatten(1)], 1).float()))
            self.size += self.parts[-1][1].numel()

    def gathered(self) -> tuple[DiagNormal, Tensor]:
        """The posterior (N,) and the row numbers (N,), ascending."""
        rows, moments = (self.accelerator.pad_across_processes(torch.cat(x), pad_index=-1) for x in zip(*self.parts, strict=True))
        rows, moments = self.accelerator.gather(rows), self.accelerator.gather(moments)
        order = rows.argsort()[(rows < 0).sum() :]
        return DiagNormal(*moments[order].chunk(2, 1)), rows[order]


def evaluate_elbo(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Any,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    detailed: bool = False,
) -> dict[str, float]:
    """-ELBO and its parts.

    Arguments:
        accelerator: its ranks share the rows.
        model: prepared by it.
        loader: of the rows; see :class:`mmvae.data.Loader`.
        seed: of the posterior's noise and of ``transform``.
        transform: (batch, keys (B,)) -> batch, on the device: binarisation, for example.
        detailed: also the mutual information (of at most 10,000 rows), and for pictures PSNR and, from 6 pixels a side, SSIM of the
            reconstructions.

    Returns:
        ``neg_elbo_nats``, ``reconstruction_nats``, ``kl_nats`` per row; where there is a latent, and more than one row, ``active_units``;
        for texts ``tokens`` per row; of a joint model ``reconstruction_nats_<modality>``, in which a row without it counts 0; of a model
        with classes, which is not told them here, ``accuracy`` of q(y|x) among the rows that have a label, where there are any. In detail
        ``mutual_information_nats``; where the posterior is a mixture, of classes or of modalities, it is that of a normal with the
        mixture's mean and variance in its place, no estimate of the mixture's own.
    """
    moments, latent = _Moments(accelerator), math.prod(unwrap(model).latent_shape)

    def measure(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        key = fold(seed, _ELBO, batch["row"])
        inputs = without_labels(model_inputs(model, transform(batch, key) if transform else batch))  # figures are of x alone
        out = model(**inputs, sample_posterior=True, noise_key=key, objective=elbo)  # that of training may want another aggregation
        if latent:
            moments.add(out.latent_mean, out.latent_logvar, batch["row"], batch["row_weight"])
        values = {"neg_elbo_nats": -out.elbo, "reconstruction_nats": -out.log_px, "kl_nats": out.kl}
        if not isinstance(unwrap(model), VAEModel):
            each = out.log_px.unsqueeze(1) if out.log_px_by_modality is None else out.log_px_by_modality  # None: a joint model of one
            return values | {f"reconstruction_nats_{name}": -each[:, m] for m, name in enumerate(unwrap(model).modalities)}
        if out.class_log_probs is not None and "labels" in batch:
            told = batch["labels"] >= 0
            values |= {"accuracy": told & (out.class_log_probs.argmax(1) == batch["labels"]), "labelled": told}
        return values | _of_modality(unwrap(model), inputs, detailed)

    figures = evaluate(accelerator, measure, loader, models=[model])
    labelled = figures.pop("labelled", None)
    if labelled is not None:  # 0 of no row would be no figure
        right = figures.pop("accuracy")
        figures |= {"accuracy": right / labelled} if labelled else {}
    if not latent:
        return figures
    q, rows = moments.gathered()
    if len(q.mean) > 1:
        figures["active_units"] = active_units(q.mean)
    if detailed:
        few = fold(seed, _INFORMATION, rows).argsort()[:_MOST_PAIRED]
        q = DiagNormal(q.loc[few], q.logvar[few])
        noise = keyed_normal(fold(seed, _INFORMATION, rows[few]), q.event_shape)
        figures["mutual_information_nats"] = mutual_information(q, q.mean + q.stddev * noise)
    return figures


def _of_modality(model: VAEModel, inputs: Mapping[str, Tensor], detailed: bool) -> dict[str, Tensor]:
    """What only text or only pictures have."""
    tokens = model.num_tokens(**inputs)
    if tokens is not None:
        return {"tokens": tokens}
    original = model.target(**inputs)
    if not detailed or original.dim() != 4:  # no pictures
        return {}
    pixels, original = model.reconstruct(**inputs), original.float()
    return {"psnr_db": psnr(pixels, original)} | ({"ssim": ssim(pixels, original)} if min(original.shape[-2:]) > 5 else {})


def evaluate_vae(
    accelerator: Accelerator,
    model: torch.nn.Module,
    loader: Any,
    *,
    num_samples: int = 100,
    seed: int = 0,
    transform: Transform | None = None,
) -> dict[str, float]:
    r"""Everything: :func:`evaluate_elbo` in detail, and the importance-sampled log-likelihood with what follows from it.

    Arguments:
        accelerator, model, loader, seed, transform: as for :func:`evaluate_elbo`.
        num_samples: importance samples per row; 0 leaves the likelihood out.

    Returns:
        Also ``nll_nats`` per row, which without a latent is -ELBO, no estimate; for text ``perplexity``
        :math:`e^{\mathrm{nll} / \mathrm{tokens}}` and ``perplexity_elbo``; for 8-bit pictures with a discretized likelihood, and without
        ``transform``, ``bits_per_dim`` and ``bits_per_dim_elbo``.
    """
    figures = evaluate_elbo(accelerator, model, loader, seed=seed, transform=transform, detailed=True)
    inner = unwrap(model)

    def measure(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = transform(batch, fold(seed, _ELBO, batch["row"])) if transform else batch
        inputs = without_labels(model_inputs(inner, batch))
        key = fold(seed, _MARGINAL, batch["row"])
        with accelerator.autocast():
            return {"nll_nats": -inner.log_marginal(num_samples=num_samples, noise_key=key, **inputs)}

    if not math.prod(inner.latent_shape):
        figures["nll_nats"] = figures["neg_elbo_nats"]
    elif num_samples:
        figures |= evaluate(accelerator, measure, loader, models=[inner])
        figures["importance_samples"] = num_samples
    if figures.get("tokens"):  # 0 where no document has a known word
        figures["perplexity_elbo"] = perplexity(figures["neg_elbo_nats"], figures["tokens"])
        if "nll_nats" in figures:
            figures["perplexity"] = perplexity(figures["nll_nats"], figures["tokens"])
    elif transform is None and getattr(inner.config, "likelihood", None) == "discretized_logistic":
        dims = math.prod(inner.config.height_width) * inner.config.num_channels
        figures["bits_per_dim_elbo"] = bits_per_dim(figures["neg_elbo_nats"], dims)
        if "nll_nats" in figures:
            figures["bits_per_dim"] = bits_per_dim(figures["nll_nats"], dims)
    return figures


def predict(
    accelerator: Accelerator, model: torch.nn.Module, loader: Any, *, seed: int = 0, transform: Transform | None = None
) -> tuple[Tensor, Tensor]:
    """What a classifier tells of every row, in evaluation mode.

    Arguments:
        accelerator, model, loader, seed, transform: as for :func:`evaluate_elbo`; the model is one of :mod:`mmvae.models.heads`.

    Returns:
        Logits (N, C) float32 and labels (N,) int64 of the rows of all ranks in their order, in the host's memory.
    """
    parts: list[tuple[Tensor, ...]] = []

    def measure(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = model_inputs(model, transform(batch, fold(seed, _LABELS, batch["row"])) if transform else batch)
        labels = inputs.pop("labels")
        parts.append((torch.where(batch["row_weight"] > 0, batch["row"], -1), labels, model(**inputs).logits.float()))
        return {}

    evaluate(accelerator, measure, loader, models=[model])
    padded = (accelerator.pad_across_processes(torch.cat(part), pad_index=-1) for part in zip(*parts, strict=True))
    rows, labels, logits = (accelerator.gather(part).cpu() for part in padded)
    order = rows.argsort()[(rows < 0).sum() :]
    return logits[order], labels[order]


def evaluate_conditional(
    accelerator: Accelerator, model: torch.nn.Module, loader: Any, *, num_samples: int = 100, seed: int = 0
) -> dict[str, float]:
    r"""Minus :math:`\log p(x_m \mid x_{others})` of every modality of a joint model, over the rows that have it and another one.

    Arguments:
        accelerator, model, loader, num_samples, seed: as for :func:`evaluate_vae`.

    Returns:
        ``conditional_nll_nats_<modality>`` per row that has both; nothing where no row has. Of a modality whose decoder attends to a
        source ``conditional_nll_nats_<modality>_attending_to_<source>``: all other figures are of decoders that see the latent alone.
    """
    inner = unwrap(model)

    def measure(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs, key = model_inputs(inner, batch), fold(seed, _MARGINAL, batch["row"])
        values = {}
        for m, name in enumerate(inner.modalities):
            both = (inputs["present"][:, m] & (inputs["present"].sum(1) > 1)).float()
            with accelerator.autocast():
                nll = -inner.log_conditional(name, num_samples=num_samples, noise_key=key, **inputs)
            values |= {f"{name} sum": torch.where(both > 0, nll, 0.0), f"{name} rows": both}
        return values

    means = evaluate(accelerator, measure, loader, models=[inner])
    found = [name for name in inner.modalities if means[f"{name} rows"]]
    seen = {name: f"_attending_to_{source}" for name, source in inner.config.sources.items()}
    return {f"conditional_nll_nats_{name}{seen.get(name, '')}": means[f"{name} sum"] / means[f"{name} rows"] for name in found}
