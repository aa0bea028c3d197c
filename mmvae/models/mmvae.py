r"""A joint VAE over any set of modalities, any of which may be missing in any row.

    q(z|x) = aggregation of the visible modalities' q(z|x_m);    p(x|z) = prod_m p(x_m | z, w_m)

A modality whose latent is wider than the shared one keeps the rest, w_m, to itself: its encoder gives [z, w_m]. Where z came from other
modalities, training draws w_m from a learned auxiliary prior instead of q(w_m|x_m), so that w_m cannot carry what z should (MMVAE+).
Nothing here knows a modality: children are built by ``AutoModel`` from their configurations.
Shapes: ``S`` samples, ``K`` components, ``B`` batch, ``M`` modalities in the order of the configuration, ``D`` shared latent.

References:
    Wu, Goodman (2018), MVAE, https://arxiv.org/abs/1802.05335; Shi et al. (2019), MMVAE, https://arxiv.org/abs/1911.03393
    Sutter et al. (2021), MoPoE, https://arxiv.org/abs/2105.02470; Lee, Pavlovic (2021), DMVAE, https://arxiv.org/abs/2012.13024
    Palumbo et al. (2023), MMVAE+, https://openreview.net/forum?id=sdQGxouELX
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils.generic import can_return_tuple

from mmvae.aggregation import JointPosterior, hide, poe
from mmvae.distributions import DiagNormal
from mmvae.models.base import VAEOutput
from mmvae.models.configuration import MMVAEConfig, input_name, prefixes
from mmvae.models.inherited import FOREIGN_ARGUMENTS, nearest
from mmvae.models.joint_generation import JointGeneration
from mmvae.nn import some_rows, take_rows, unless_seen
from mmvae.noise import fold, keyed_uniform
from mmvae.objectives import Objective
from mmvae.priors import PRIORS, LearnedNormal
from mmvae.terms import Terms

_COMPONENT, _PRIVATE, _HIDDEN = 0x636F6D70, 0x70726976, 0x68696464  # keep the noise of each apart
_FEW = 4  # components up to which draw="auto" decodes all


@dataclass(frozen=True)
class _Given:
    """Each modality's own inputs by the names that it knows, and the masks, (B, M) bool."""

    inputs: dict[str, dict[str, Tensor]]
    conditions: dict[str, dict[str, Tensor]]
    present: Tensor
    visible: Tensor


class MMVAE(JointGeneration):
    """Joint VAE over a mapping of modalities; see the module's docstring for the equations.

    Inputs go by the children's names; where two modalities have an input of the same name, each puts its own name before it:
    ``en_input_ids``, which works always. A modality without any input is missing in every row; ``present`` says what is missing in which
    row, and an input may hold anything finite where it is missing. ``transformers.Trainer`` reads names off the signature of ``forward``,
    which cannot have them: give it ``remove_unused_columns=False``.

    Example:
        >>> from mmvae import ImageVAEConfig, TextVAEConfig
        >>> both = {"image": ImageVAEConfig(image_size=16, latent_dim=4), "text": TextVAEConfig(vocab_size=50, latent_dim=4)}
        >>> model = MMVAE(MMVAEConfig(modalities=both)).eval()
        >>> model.generate(pixel_values=torch.zeros(2, 3, 16, 16), target="text", max_new_tokens=5).shape[0]
        2
    """

    config: MMVAEConfig
    base_model_prefix = "mmvae"

    def __init__(self, config: MMVAEConfig):
        super().__init__(config)
        if not config.modalities:
            raise ValueError("MMVAEConfig.modalities: received none, expected at least one")
        dtype = torch.get_default_dtype()  # in which this model is being made, whatever the children's configurations say
        self.vaes = nn.ModuleDict({name: AutoModel.from_config(child, dtype=dtype) for name, child in config.modalities.items()})
        for name, vae in self.vaes.items():
            if len(vae.latent_shape) != 1:
                raise ValueError(f"modalities[{name!r}]: received a latent of shape {vae.latent_shape}, expected a vector")
        takes = {name: (*vae.input_names, *vae.condition_names) for name, vae in self.vaes.items()}
        before = prefixes({name: vae.input_names for name, vae in self.vaes.items()})
        self._names = {name: {child: input_name(before[name], child) for child in children} for name, children in takes.items()}
        self.main_input_name = self.input_names[0]
        shapes = [vae.pseudo_input_shape for vae in self.vaes.values()]
        pseudo = (sum(map(math.prod, shapes)),) if all(shapes) else ()
        self.latent_prior = PRIORS[config.prior]((config.latent_dim,), config.prior_components, pseudo)
        self.auxiliary = nn.ModuleDict({name: LearnedNormal((dim,)) for name, dim in config.private_dims.items()})
        self.post_init()
        for name, vae in self.vaes.items():  # post_init looks at direct children only
            tied = vae.all_tied_weights_keys.items()
            self.all_tied_weights_keys.update({f"vaes.{name}.{key}": f"vaes.{name}.{source}" for key, source in tied})

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the columns of ``present``."""
        return tuple(self.vaes)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The children's inputs, "present" and "visible"."""
        names = (self._names[name][child] for name, vae in self.vaes.items() for child in vae.input_names)
        return (*names, "present", "visible")

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What the children's p(x|z) may depend on besides z."""
        return tuple(self._names[name][child] for name, vae in self.vaes.items() for child in vae.condition_names)

    def density_dims(self, name: str) -> tuple[int, int]:
        """Size of what a density is over, and of what it is conditioned on."""
        (what, modality), dim = self.config.density(name), self.config.latent_dim
        return (self.config.private_dims[modality], dim) if what == "private" else (dim, 2 * dim if what == "given" else 0)

    def _modality(self, name: str) -> Any:
        if name not in self.vaes:
            raise ValueError(f"target: received {name!r}, expected one of {list(self.vaes)}")
        return self.vaes[name]

    def split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Each modality's own inputs and conditions by the names that it knows, and what no modality takes. What is None is not given."""
        rest = {name: value for name, value in inputs.items() if value is not None}
        own, taken = {}, set()  # two modalities may share a condition
        for modality, names in self._names.items():
            aliases = {alias: child for child, name in names.items() for alias in (name, f"{modality}_{child}")}
            own[modality] = {child: rest[alias] for alias, child in aliases.items() if alias in rest}
            taken |= aliases.keys()
        return own, {name: value for name, value in rest.items() if name not in taken}

    def _given(self, received: Mapping[str, Any]) -> _Given:
        own, rest = self.split(received)
        masks = {name: rest.pop(name, None) for name in ("present", "visible")}
        known = [*self.input_names, *self.condition_names, "labels"]
        for name in (name for name in rest if name not in FOREIGN_ARGUMENTS):
            raise TypeError(f"{type(self).__name__}: unknown input {name!r}; the nearest one is {nearest(name, known)!r}")
        inputs = {name: {k: v for k, v in own[name].items() if k in vae.input_names} for name, vae in self.vaes.items()}
        if not any(inputs.values()):
            raise ValueError(f"inputs: received none of any modality, expected some of {list(self.input_names[:-2])}")
        sizes = {f"{name}: {child}": len(value) for name, parts in own.items() for child, value in parts.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"inputs: received different numbers of rows, {sizes}, expected the same")
        here = torch.tensor([bool(parts) for parts in inputs.values()], device=self.device).expand(next(iter(sizes.values())), -1)
        present = self._mask("present", masks["present"], here, inputs)
        visible = present if masks["visible"] is None else present & self._mask("visible", masks["visible"], here, inputs)
        conditions = {name: {k: v for k, v in own[name].items() if k in vae.condition_names} for name, vae in self.vaes.items()}
        return _Given(inputs, conditions, present, visible)

    def _mask(self, name: str, mask: Tensor | None, here: Tensor, inputs: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        if mask is None:
            return here
        if tuple(mask.shape) != tuple(here.shape):
            raise ValueError(f"{name}: received shape {tuple(mask.shape)}, expected (rows, modalities) = {tuple(here.shape)}")
        mask = mask.to(here.device).bool()
        if not all(inputs.values()) and bool((mask & ~here).any()):
            missing = [modality for modality, parts in inputs.items() if not parts]
            raise ValueError(f"{name}: received True for {missing} in some rows, expected their inputs too")
        return mask

    def posterior(self, **inputs: Any) -> JointPosterior:
        """q(z|x) of whatever is visible; a row where nothing is gets the prior.

        Arguments:
            inputs: of any of the modalities; ``present`` and ``visible`` (B, M) bool: what is there and scored, and what of it the encoders
                see (the same when None).

        Raises:
            TypeError: for an input that no modality takes.
            ValueError: for no input, inputs of different numbers of rows, masks of another shape or that claim what is not given.
        """
        given, dim = self._given(inputs), self.config.latent_dim
        read = {name: self._expert(name, given.inputs[name], given.visible[:, m]) for m, name in enumerate(self.vaes)}
        experts, states = ({name: each[part] for name, each in read.items() if each[part] is not None} for part in (0, 1))
        shared = {name: DiagNormal(q.loc[:, :dim], q.logvar[:, :dim]) for name, q in experts.items()}
        private = {name: DiagNormal(experts[name].loc[:, dim:], experts[name].logvar[:, dim:]) for name in self.auxiliary}
        q = self.config.aggregate(self.training)(shared, given.visible, self.prior())
        return JointPosterior(q.mixture, q.experts, q.visible, q.members, private, states)

    def _expert(self, name: str, inputs: dict[str, Tensor], visible: Tensor) -> tuple[DiagNormal, Tensor | None]:
        """q(z, w_m|x_m), batch (B,), encoded where it is visible; N(0, I) elsewhere. Of a source its states too, 0 elsewhere."""
        vae = self.vaes[name]
        blank = torch.zeros(len(visible), *vae.latent_shape, device=self.device)
        if not inputs:
            return DiagNormal(blank, blank), None
        rows, is_source = some_rows(visible), name in self.config.sources.values()
        inputs = take_rows(inputs, rows)
        with unless_seen(vae, visible, rows):
            q, states = vae.encode_with_states(**inputs) if is_source else (vae.encode(**inputs), None)
        if rows is None:
            return q, states

        def placed(part: Tensor) -> Tensor:
            seen = visible[rows].view(-1, *[1] * (part.dim() - 1))
            return part.new_zeros(len(visible), *part.shape[1:]).index_copy(0, rows, torch.where(seen, part, 0.0))

        return DiagNormal(placed(q.loc), placed(q.logvar)), None if states is None else placed(states)

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u) of pseudo-inputs of all modalities, one after the other in (K, *): the product of their experts."""
        shapes, dim = [vae.pseudo_input_shape for vae in self.vaes.values()], self.config.latent_dim
        parts = pseudo_inputs.split([math.prod(shape) for shape in shapes], 1)
        experts = {}
        for (name, vae), part, shape in zip(self.vaes.items(), parts, shapes, strict=True):
            q = vae.encode_pseudo_inputs(part.unflatten(1, shape))
            experts[name] = DiagNormal(q.loc[:, :dim], q.logvar[:, :dim])
        visible = torch.ones(len(pseudo_inputs), len(experts), dtype=torch.bool, device=self.device)
        product = poe(experts, visible, DiagNormal(*torch.zeros(2, dim, device=self.device))).mixture.components
        return DiagNormal(product.loc[0], product.logvar[0])

    def terms(
        self, q: JointPosterior, inputs: dict[str, Any], num_samples: int, noise_key: Tensor | None, sample: bool = True, first: int = 0
    ) -> Terms:
        """Draw z of every component, or of one drawn per row, and the private latents; score what is present. See :meth:`VAE.terms`.

        In training a modality that a component is not made of gets its private latent from the auxiliary prior, and its term counts no
        divergence; in evaluation every visible modality's comes from q(w_m|x_m), and the others' from p(w_m): a true bound.
        """
        if self.config.draw == "one" or (self.config.draw == "auto" and len(q.members) > _FEW):
            index = q.draw(self._uniform(q, num_samples, noise_key, first)) if sample else q.fullest().expand(num_samples, -1)
            components, members = q.at(index)
            noise = self._normal(components, noise_key, num_samples, first, components.event_shape).unsqueeze(1) if sample else 0.0
            z = components.loc + components.stddev * noise
            drawn = {"components": components, "members": members, "log_weights": torch.zeros(z.shape[1:3], device=z.device)}
        else:
            z, members, drawn = self._draw(q, num_samples, noise_key, sample, first), q.members, {}
        private, ratios = self._private(q, members, z, noise_key, sample, first)
        return Terms(z, self.log_px(z, q, private, **inputs), q, self.prior(), ratios, **drawn)

    def _uniform(self, q: JointPosterior, num_samples: int, key: Tensor | None, first: int) -> Tensor:
        """(S, B) in (0, 1), by (key, number of the sample): which component each sample comes from."""
        rows = q.mixture.batch_shape[0]
        if key is None:
            return torch.rand(num_samples, rows, device=self.device)
        samples = torch.arange(first, first + num_samples, device=key.device).unsqueeze(1)
        return keyed_uniform(fold(_COMPONENT, key, samples).flatten(), ()).view(num_samples, rows)

    def _private(
        self, q: JointPosterior, members: Tensor, z: Tensor, key: Tensor | None, sample: bool, first: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Private latents (S, K, B, *) and log p(w) - log q(w) (S, K, B) by modality."""
        latents, ratios = {}, {}
        for m, name in enumerate(self.vaes):
            if name not in self.auxiliary:
                continue
            q_w, blank = q.private[name], torch.zeros(self.config.private_dims[name], device=self.device)
            p_w = DiagNormal(blank, blank)
            other = self.auxiliary[name](None, self.device) if self.training else p_w
            own = members[..., m] if self.training else q.visible[:, m].expand(members.shape[:-1])
            noise = self._normal(q_w, key, len(z), first, (z.shape[1], *q_w.event_shape), _PRIVATE + m).movedim(2, 1) if sample else 0.0
            inferred = (q_w.loc + q_w.stddev * noise).expand(*z.shape[:3], -1)
            latents[name] = torch.where(own.unsqueeze(-1), inferred, other.loc + other.stddev * noise)
            ratios[name] = torch.where(own, p_w.log_prob(inferred) - q_w.log_prob(inferred), 0.0)
        return latents, ratios

    def log_px(self, z: Tensor, q: JointPosterior, private: Mapping[str, Tensor] | None = None, **inputs: Any) -> dict[str, Tensor]:
        """log p(x_m|z, w_m) of every modality, (S, K, B) nats; 0 where it or the component is not present, and is not decoded.

        Arguments:
            z: (S, K, B, D).
            q: the posterior of the inputs.
            private: w_m (S, K, B, *) by modality; the means of q(w_m|x_m) when None.
            inputs: as for :meth:`posterior`.
        """
        given, here = self._given(inputs), q.mixture.log_weights > -math.inf  # (K, B)
        here = here.expand(-1, z.shape[2]) if len(here) == z.shape[1] else here.new_ones(z.shape[1:3])  # or one was drawn, of those present
        private = {name: w.loc.expand(*z.shape[:3], -1) for name, w in q.private.items()} if private is None else private
        values = dict.fromkeys(self.vaes, torch.zeros(z.shape[:3], device=z.device))
        for m, (name, vae) in enumerate(self.vaes.items()):
            if not given.inputs[name]:
                continue
            latent = torch.cat([z, private[name]], -1) if name in private else z
            conditions = self.source_of(name, q) | given.conditions[name]
            kept = (here & given.present[:, m]).flatten()
            rows = None if (pairs := some_rows(kept)) is None else pairs % z.shape[2]
            with unless_seen(vae, kept, pairs):
                p = vae.decode(latent if pairs is None else latent.flatten(1, 2)[:, pairs], **take_rows(conditions, rows))
                log_prob = p.log_prob(vae.target(**take_rows(given.inputs[name], rows)))
            if pairs is not None:
                log_prob = log_prob.new_zeros(len(z), len(kept)).index_copy(1, pairs, log_prob.where(kept[pairs], 0.0)).view(z.shape[:3])
            values[name] = log_prob
        return values

    def weigh(self, terms: Terms, beta: float, objective: Objective) -> VAEOutput:
        """With the configuration's likelihood weights, which no figure sees; see :meth:`VAE.weigh`."""
        return super().weigh(replace(terms, scales=dict(self.config.likelihood_weights)), beta, objective)

    @can_return_tuple
    def forward(
        self,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        return_loss: bool = True,
        **inputs: Any,
    ) -> VAEOutput:
        """Minus the objective, and what it is made of; see :meth:`VAE.bound`.

        Arguments:
            objective: (terms, beta) -> (B,) nats; the configuration's when None.
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            inputs: as for :meth:`posterior`.
        """
        inputs = self.hide_some(inputs, noise_key)
        return self.bound(inputs, beta, num_samples, objective or self.config.maximised, noise_key, sample_posterior)

    def hide_some(self, inputs: dict[str, Any], key: Tensor | None = None) -> dict[str, Any]:
        """Inputs, and in training what modality dropout leaves of them to the encoders, where they do not say what is ``visible``."""
        if not self.training or not self.config.modality_dropout or inputs.get("visible") is not None:
            return inputs
        present = self._given(inputs).present
        share = torch.tensor([float(self.config.modality_dropout.get(name, 0.0)) for name in self.vaes], device=self.device)
        uniform = torch.rand(present.shape, device=self.device) if key is None else keyed_uniform(fold(_HIDDEN, key), share.shape)
        return inputs | {"visible": hide(present, share, uniform)}

    @torch.no_grad()
    def log_conditional(
        self, target: str | Sequence[str], num_samples: int = 100, noise_key: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        r"""Importance-sampled :math:`\log p(x_{target} \mid x_{others}) = \log p(x) - \log p(x_{others})`, in nats.

        A difference of two estimates, so a bound in neither direction; both come down to the truth as ``num_samples`` grows. Of a target
        that has a source it is :math:`\log p(x_{target} \mid x_{others})` of the model whose decoder attends to it.

        Arguments:
            target: names of modalities.
            num_samples, noise_key, inputs: as for :meth:`log_marginal`.

        Returns:
            (B,) float32.
        """
        names = [target] if isinstance(target, str) else list(target)
        given = self._given(inputs)
        for name in names:
            if self._modality(name) is not None and not given.inputs[name]:
                raise ValueError(f"target: received {name!r} without its inputs, expected what is to be scored")
        others = given.present.clone()
        others[:, [self.modalities.index(name) for name in names]] = False
        options = {"num_samples": num_samples, "noise_key": noise_key}
        if not self.config.sources.keys().isdisjoint(names):  # a decoder attends to its source where its own modality is hidden
            inputs["visible"] = torch.where(others.any(1, keepdim=True), others, given.visible)
        joint = self.log_marginal(**options, **inputs)
        rest = self.log_marginal(**options, **inputs | {"present": others, "visible": others})
        return joint - torch.where(others.any(1), rest, 0.0)  # the likelihood of nothing is 1
