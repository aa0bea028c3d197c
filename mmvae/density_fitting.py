r"""Densities over the latents of a trained model, so that what it makes from nothing or, a joint one, from one modality is coherent.

    latent (of a joint model: shared): p(z);    private_m: p(w_m | z)
    shared_given_m: p(z | moments of q(z|x_m)), from rows that have more than x_m

Reference: Ghosh et al. (2020), From variational to deterministic autoencoders, https://arxiv.org/abs/1903.12436
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmvae.data import Loader, Rows
from mmvae.densities import build_density
from mmvae.density import Density, TooFewRows
from mmvae.evaluation import model_inputs
from mmvae.models.base import VAE

logger = logging.getLogger(__name__)

_MOST_STREAMED = 100_000  # rows of a stream, which may have no end


def rows_to_fit(rows: Rows, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of every training row, copies left out, of a stream of the first ``_MOST_STREAMED``: what densities are fitted to."""
    batches = Loader(rows, batch_size, seed=seed).batches(0)
    for batch in islice(batches, -(-_MOST_STREAMED // batch_size) if rows.streamed else None):
        kept = (batch["row"] >= rows.num_copies).nonzero().flatten()
        if len(kept):
            yield {name: value[kept] if value.dim() else value for name, value in batch.items()}


@torch.no_grad()
def fit_densities(
    model: VAE, batches: Iterable[Mapping[str, Tensor]], options: Mapping[str, Mapping[str, Any]], *, num_draws: int = 4, seed: int = 0
) -> dict[str, float]:
    """Fit what ``model.sample`` and ``generate`` then use, and put it into the model and its configuration, to be saved with it.

    Arguments:
        model: trained; its posteriors are read in evaluation mode.
        batches: of training rows, at least one, on any device.
        options: of :func:`mmvae.densities.build_density` by the name of the density, as in ``VAEConfig.densities``; and "training",
            the options of its fit, which are not kept.
        num_draws: samples of each row's posterior.
        seed: of the draws and the fits.

    A density that has too few rows is left out with a warning.

    Returns:
        Figures by name: ``densities/shared/held_out_log_prob_nats`` and so on.

    Raises:
        ValueError: for a density that the model cannot have, and what the fits refuse.
    """
    model.eval()
    latents: dict[str, list[tuple[Tensor, Tensor | None]]] = {name: [] for name in options}
    figures: dict[str, float] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in model_inputs(model, batch).items()}
            for name, pair in _pairs(model, inputs, options, num_draws).items():
                latents[name].append(pair)
        for name, density in unfitted(model, options).items():
            x, context = (None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*latents[name], strict=True))
            try:
                fit = density.to(model.device).fit(x, context, seed=seed, **options[name].get("training", {}))
            except TooFewRows as error:
                logger.warning("density %s is not fitted, and the prior stays in its place: %s", name, error)
                continue
            figures |= {f"densities/{name}/{figure}": value for figure, value in fit.items()}
            model.densities[name] = density
            model.config.densities = model.config.densities | {name: _kind(options[name])}
    return figures


def unfitted(model: VAE, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Density]:
    """The densities that :func:`fit_densities` will fit: what is wrong with the options is told here, before any work."""
    made = {}
    for name, kind in options.items():
        training = kind.get("training", {}) if isinstance(kind, Mapping) else None
        if not isinstance(training, Mapping):
            raise ValueError(f"densities: {name}: received {kind!r}, expected a mapping of options, as its training is")
        made[name] = build_density(*model.density_dims(name), _kind(kind))
        made[name].check_training(training)
    return made


def latents_from(model: VAE) -> str:
    """Where :meth:`mmvae.models.base.VAE.sample_prior` takes latents from: the "density" fitted to them, or else the "prior"."""
    return "density" if model.config.latent_density in model.densities else "prior"


def _kind(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "training"}


def _pairs(model: VAE, inputs: Mapping[str, Tensor], names: Iterable[str], num_draws: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Draws (R, N, D) of what each density is over, and what it is conditioned on, (R, N, C)."""
    q = model.posterior(**inputs)
    z = q.mixture.sample((num_draws,))
    z = z.flatten(2)  # a spatial latent too is a vector here
    pairs: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name in names:
        what, modality = model.config.density(name)
        if what == "latent":
            pairs[name] = z, None
            continue
        seen, expert = q.visible[:, model.modalities.index(modality)], q.experts[modality]
        if what == "private":
            pairs[name] = q.private[modality].sample((num_draws,))[:, seen], z[:, seen]
        else:
            rows = seen & (q.visible.sum(1) > 1)
            moments = torch.cat([expert.loc, expert.logvar], -1)[rows]
            pairs[name] = z[:, rows], moments.expand(num_draws, *moments.shape)
    return pairs
