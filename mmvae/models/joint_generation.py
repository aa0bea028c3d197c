r"""What a joint model makes: whatever is missing from whatever is given, or everything from the prior (or its density).

    z ~ q(z|given), p(z|x_m) or p(z);    w_m ~ q(w_m|x_m) where x_m is given, else p(w_m|z) or its prior;    x_m ~ p(x_m|z, w_m)

Densities that were fitted after training (:func:`mmvae.density_fitting.fit_densities`) take the place of the priors that training used.
Shapes: ``B`` batch, ``D`` shared latent.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal
from mmvae.models.base import VAE, seeded
from mmvae.models.inherited import FOREIGN_ARGUMENTS

_MOST_DIFFERENCES = 1 << 24  # numbers held at once while latents are compared
_MOST_ROWS = 256  # encoded at once to be compared


class JointGeneration(VAE):
    """Generation for a model with ``vaes``, ``auxiliary`` and ``densities`` by modality, as :class:`mmvae.models.mmvae.MMVAE` has."""

    @torch.no_grad()
    def generate(
        self,
        target: str | Sequence[str],
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        sample: bool = True,
        **inputs: Any,
    ) -> Any:
        """Make one modality, or several that belong together, from whatever is given; from ``sample_prior`` when nothing is.

        Arguments:
            target: name of a modality, or several names.
            num_samples: of each row, next to each other; or, when nothing is given, how many.
            generator: makes the latents (and sampled words) repeatable; torch's global generator when None.
            sample: draw latents, or take the posterior's most informed mean, that of :meth:`mmvae.aggregation.Posterior.fullest`.
            inputs: of any of the modalities, as for :meth:`posterior`; the rest are options of the targets' ``render``, but for tensors
                that ``forward`` passes over, too, such as ``token_type_ids``. The folder of a joint model keeps no
                ``generation_config`` of its texts.

        Returns:
            (B * num_samples, ...): pixels, token ids, or whatever the target renders; by name where several were asked for.

        Raises:
            ValueError: for a target that the model has not, and for ``present`` or ``visible`` without any input.
            TypeError: for an option that no target takes.
        """
        names = [target] if isinstance(target, str) else list(target)
        own, options = self.split(inputs)
        masks = {name: options.pop(name) for name in ("present", "visible") if name in options}
        options = {name: value for name, value in options.items() if not (name in FOREIGN_ARGUMENTS and isinstance(value, Tensor))}
        vaes = {name: self._modality(name) for name in names}
        conditions = {name: {k: v for k, v in own[name].items() if k in vae.condition_names} for name, vae in vaes.items()}
        encoded = {f"{name}_{k}": v for name, vae in self.vaes.items() for k, v in own[name].items() if k in vae.input_names}
        if masks and not encoded:
            raise ValueError(f"{', '.join(masks)}: received without any input, expected the inputs that it is about")
        accepted = {name: self._accepted(name, options) for name in names}
        for option in options.keys() - {option for taken in accepted.values() for option in taken}:
            raise TypeError(f"generate: received {option!r}, expected an input of {list(self.vaes)} or an option of {names}")
        with seeded(generator):
            q = self.posterior(**encoded, **masks) if encoded else None
            z = self.sample_prior(num_samples) if q is None else self._latents(q, num_samples, sample)
            repeats = 1 if q is None else num_samples
            made = {}
            for name in names:
                w = self._private_latents(name, z, q, num_samples, sample)
                given = {k: v.repeat_interleave(repeats, 0) for k, v in (self.source_of(name, q) | conditions[name]).items()}
                made[name] = self.vaes[name].render(z if w is None else torch.cat([z, w], -1), **given, **accepted[name])
        return made[target] if isinstance(target, str) else made

    def get_input_embeddings(self) -> Any:
        """A joint model has none of its own: each of its texts has one, which :attr:`vaes` gives, and resizes."""
        expected = f"that of a text: model.vaes[NAME], NAME one of {list(self.vaes)}"
        raise NotImplementedError(f"received a {type(self).__name__}, which has no embedding of its own, expected {expected}")

    def source_of(self, name: str, q: Any) -> dict[str, Tensor]:
        """What a modality's decoder attends to, where it has a source: its states (B, L, F), 0 in rows where q saw the modality itself.

        So what was inferred from everything is decoded from the latent alone, and decoders never attend to each other's texts at once.
        """
        states = None if q is None else q.states.get(self.config.sources.get(name))
        if states is None:
            return {}
        return {"source": states * ~q.visible[:, list(self.vaes).index(name)].view(-1, 1, 1)}

    def _accepted(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(self.vaes[name].render).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return {option: value for option, value in options.items() if anything or option in parameters}

    def sample(
        self, num_samples: int, generator: torch.Generator | None = None, target: str | Sequence[str] | None = None, **options: Any
    ) -> Any:
        """Things that were never seen, from ``sample_prior``: of one modality, or of several (all when None) that belong together."""
        return self.generate(list(self.vaes) if target is None else target, num_samples, generator, **options)

    def reconstruct(self, target: str | Sequence[str] | None = None, **inputs: Any) -> Any:
        """Render the posterior's most informed mean, as one modality or as several (all when None)."""
        return self.generate(list(self.vaes) if target is None else target, sample=False, **inputs)

    @torch.no_grad()
    def render(self, z: Tensor, target: str, private: Tensor | None = None, **options: Any) -> Tensor:
        """What a person looks at, of one modality, from shared latents (B, D) and private ones (B, *), their prior's mean when None."""
        vae = self._modality(target)
        if target in self.auxiliary:
            w = self.auxiliary[target](None, self.device).loc.expand(len(z), -1) if private is None else private
            z = torch.cat([z, w], -1)
        return vae.render(z, **options)

    def _latents(self, q: Any, num_samples: int, sample: bool) -> Tensor:
        """(B * num_samples, D), a row's samples next to each other."""
        if not sample:
            rows = torch.arange(q.mixture.batch_shape[0], device=self.device)
            return q.mixture.components.loc[q.fullest(), rows].repeat_interleave(num_samples, 0)
        z = q.mixture.sample((num_samples,)).transpose(0, 1).clone()
        nothing = ~q.visible.any(1)
        if bool(nothing.any()):
            z[nothing] = self.sample_prior(int(nothing.sum()) * num_samples).unflatten(0, (-1, num_samples)).to(z)
        for m, (name, expert) in enumerate(q.experts.items()):
            density = f"shared_given_{name}"
            alone = q.visible[:, m] & (q.visible.sum(1) == 1)
            if density in self.densities and bool(alone.any()):
                context = torch.cat([expert.loc, expert.logvar], -1)[alone].repeat_interleave(num_samples, 0)
                z[alone] = self.densities[density].sample(context).unflatten(0, (-1, num_samples)).to(z)
        return z.flatten(0, 1)

    def _private_latents(self, name: str, z: Tensor, q: Any, num_samples: int, sample: bool) -> Tensor | None:
        """w (N, *) for latents z (N, D), or None where the modality has none."""
        if name not in self.auxiliary:
            return None
        if f"private_{name}" in self.densities and sample:
            w = self.densities[f"private_{name}"].sample(z)
        else:
            prior = self.auxiliary[name](None, self.device)
            if q is None:  # the auxiliary prior is for reconstruction across modalities only
                prior = DiagNormal(torch.zeros_like(prior.loc), torch.zeros_like(prior.loc))
            prior = prior.expand(torch.Size([len(z)]))
            w = prior.sample() if sample else prior.mean
        if q is None:
            return w
        inferred = q.private[name]
        own = (inferred.sample((num_samples,)) if sample else inferred.mean.expand(num_samples, -1, -1)).transpose(0, 1).flatten(0, 1)
        seen = q.visible[:, list(self.vaes).index(name)].repeat_interleave(num_samples).unsqueeze(1)
        return torch.where(seen, own, w.to(own))

    @torch.no_grad()
    def retrieve(
        self, queries: Mapping[str, Any], candidates: Mapping[str, Any], num_results: int = 10, reference: Mapping[str, Any] | None = None
    ) -> Tensor:
        r"""The candidates nearest to each query by the overlap of their posteriors, :math:`\log \int q(z|a)\, q(z|b)\, dz`.

        Rows are encoded and compared in parts, so memory grows with B + N and not with B * N.

        Arguments:
            queries, candidates: inputs of any modalities, B and N rows: pictures and sentences, for example.
            num_results: of each query; all N where there are fewer.
            reference: rows of the queries' kind, some hundreds, which may be the queries. What a candidate overlaps with these is
                subtracted, see :func:`crowding`, so that one that is near to everything does not come first everywhere.

        Returns:
            (B, num_results) int64, numbers of candidates, best first.
        """
        a, b = self._moments_of(queries), self._moments_of(candidates)
        num_results = min(num_results, len(b.loc))
        crowd = 0.0 if reference is None else crowding(self._moments_of(reference), b)
        return torch.cat([(overlap(part, b) - crowd).topk(num_results, 1).indices for part in parts_of(a, len(b.loc))])

    def _moments_of(self, inputs: Mapping[str, Any]) -> DiagNormal:
        moments = []
        for n in range(0, max(1, len(self._given(inputs).present)), _MOST_ROWS):
            part = {name: value[n : n + _MOST_ROWS] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            q = self.posterior(**part).mixture
            moments.append((q.mean, q.variance.log()))
        return DiagNormal(*(torch.cat(each) for each in zip(*moments, strict=True)))


def overlap(a: DiagNormal, b: DiagNormal) -> Tensor:
    r""":math:`\log \int a(z)\, b(z)\, dz` of every pair in nats; a, b of batches (B,), (N,). Returns (B, N)."""
    variance = a.variance.unsqueeze(1) + b.variance
    return DiagNormal(b.mean.expand_as(variance), variance.log()).log_prob(a.mean.unsqueeze(1))


def crowding(reference: DiagNormal, candidates: DiagNormal) -> Tensor:
    r""":math:`\log \tfrac1R \sum_r \int q_r(z)\, b(z)\, dz`: what candidates of batch (N,) overlap with anything, (N,) nats.

    Subtracted from :func:`overlap` it makes a likelihood ratio, :math:`\log p(a, b) / p(b)` up to what depends on a alone: the inverted
    softmax of Smith et al. (2017), https://arxiv.org/abs/1702.03859.
    """
    parts = [overlap(part, candidates).logsumexp(0) for part in parts_of(reference, len(candidates.loc))]
    return torch.stack(parts).logsumexp(0) - math.log(len(reference.loc))


def parts_of(q: DiagNormal, candidates: int) -> list[DiagNormal]:
    """Parts of a batch (R,) whose differences from so many candidates fit in memory."""
    size = max(1, _MOST_DIFFERENCES // max(1, candidates * q.loc.shape[-1]))
    return [DiagNormal(*moments) for moments in zip(q.loc.split(size), q.logvar.split(size), strict=True)]
