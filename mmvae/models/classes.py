r"""Classes: a VAE of one modality in which the class y of a row is a latent too, which some rows tell (M2).

    p(x, y, z) = p(y) p(z) p(x|y, z),    q(y, z|x) = q(y|x) q(z|x, y),    p(y) = 1 / N

A row that tells its class is bounded by L, one that does not by U; beside that bound a row that tells it trains the classifier q(y|x):

    L(x, y) = E_{q(z|x,y)}[log p(x|y, z)] + log p(y) - KL(q(z|x, y) || p(z))    bounds log p(x, y); alpha log q(y|x) is added
    U(x) = sum_y q(y|x) (L(x, y) - log q(y|x))                                  bounds log p(x)

So a class is a component of the posterior: N components weighed by q(y|x), or by 1 and 0 where y is told, and p(y) is what the objectives
know as ``log_pk``. Every class that has a weight is decoded, which for rows without a label costs N times what one class does;
``least_probability`` leaves out the hopeless ones. ``iwae`` and ``dreg`` sum over the classes exactly, and so train q(y|x) by labels alone.

Under ``transformers.Trainer`` the data set's column is called ``label``; another one needs ``remove_unused_columns=False``.

Shapes: ``S`` samples, ``N`` classes, ``B`` batch, ``D`` latent, ``F`` features that both q(y|x) and q(z|x, y) read.

References:
    Kingma et al. (2014), Semi-supervised learning with deep generative models, eq. 6-9, https://arxiv.org/abs/1406.5298
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from mmvae.aggregation import Posterior
from mmvae.distributions import DiagNormal, GaussianMixture, at_least_float32
from mmvae.models.base import VAEOutput, seeded
from mmvae.models.configuration import VAEConfig
from mmvae.models.unimodal import VAEModel
from mmvae.nn import some_rows
from mmvae.objectives import Objective
from mmvae.terms import Terms

UNKNOWN = -100
"""The label of a row that does not tell its class, as everywhere in torch and transformers."""


@strict
class ClassVAEConfig(VAEConfig):
    """What the configuration of a modality that can have classes adds. The hidden layer and dropout of a classifier are q(y|x)'s too.

    Arguments:
        num_classes: N, from 2; 0: the model has no classes.
        classifier_alpha: alpha, weight of log q(y|x) of the rows that tell their class, in nats of the objective; 1 when None.
        least_probability: in training, a class that q(y|x) thinks less probable than this is left out of the row's bound, as if q(y|x) were
            0, unless it is the likeliest: still a bound, and nearly as cheap as one class once the classifier is sure.
    """

    num_classes: int = 0
    least_probability: float | int = 0.0

    ranges: ClassVar[dict[str, tuple[float, float]]] = VAEConfig.ranges | {"num_classes": (0, 65_536), "least_probability": (0, 1)}

    def validate_architecture(self) -> None:
        """Check the fields; see :meth:`VAEConfig.validate_architecture`."""
        super().validate_architecture()
        if self.num_classes == 1:
            raise ValueError(f"{type(self).__name__}.num_classes: received 1, expected at least 2, or 0 for a model without classes")


@dataclass(frozen=True)
class ClassPosterior(Posterior):
    """q(y, z|x): component k is q(z|x, y = k), and its weight what is known of the class.

    Attributes:
        log_qy: (N, B) nats, log q(y|x), whatever the rows tell.
        labels: (B,) int64, the classes that the rows tell, -100 where they do not.
    """

    log_qy: Tensor
    labels: Tensor


def checked_labels(name: str, labels: Any, shape: Sequence[int], num_classes: int, unknown: int | None = None) -> Tensor:
    """Labels as an int64 tensor that broadcasts to ``shape``.

    Arguments:
        name: of the argument, for the error.
        labels: whole numbers, a tensor or a sequence.
        num_classes: N.
        unknown: what stands where a label is not known; None: all are.

    Raises:
        ValueError: for labels that are no whole numbers, of another shape, or of a class that there is not; the last only in the host's
            memory: on an accelerator the comparison would wait for the device.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # names, None, lists of different lengths
        raise ValueError(f"{name}: received {labels!r:.80}, expected whole numbers, 0 to {num_classes - 1}") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: received {labels.dtype}, expected whole numbers")
    if labels.dim() > len(shape) or any(size not in (1, of) for size, of in zip(reversed(labels.shape), reversed(shape), strict=False)):
        raise ValueError(f"{name}: received shape {tuple(labels.shape)}, expected {tuple(shape)}")
    labels = labels.long()
    wrong = torch.atleast_1d((labels >= num_classes) | (labels < 0))
    wrong = wrong if unknown is None else wrong & (labels != unknown)
    if labels.is_cpu and not torch.compiler.is_compiling() and wrong.any():
        value, row = int(torch.atleast_1d(labels)[wrong][0]), int(wrong.nonzero()[0, 0])
        more = "" if unknown is None else f", or {unknown} where it is not known"
        raise ValueError(f"{name}: received {value} in row {row}, expected 0 to {num_classes - 1}{more}")
    return labels


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without the classes that rows tell."""
    return {name: value for name, value in inputs.items() if name != "labels"}


class ClassVAE(VAEModel):
    """A modality that can have classes; without them (``num_classes`` 0) it is just that modality, and takes no notice of labels.

    Its author writes, beside what :class:`VAEModel` asks for, ``features``, reads q(z|x) off them by :meth:`latent_given` in ``encode``,
    calls :meth:`build_classes` in ``__init__``, and decodes ``with_class(z, class_labels)``, which is ``num_classes`` wider than z.
    """

    config: ClassVAEConfig
    to_moments: nn.Module
    inference_modules = (*VAEModel.inference_modules, "classifier", "class_moments")

    def __init__(self, config: ClassVAEConfig):
        super().__init__(config)
        if config.num_classes:
            self.input_names = (*type(self).input_names, "labels")
            self.condition_names = ("class_labels",)

    def features(self, **inputs: Tensor) -> Tensor:
        """(B, F), what the posterior reads."""
        raise NotImplementedError

    def build_classes(self, features: int) -> None:
        """Make q(y|x), and what the class adds to the moments of q(z|x, y); nothing without classes."""
        classes, hidden, dropout = self.config.num_classes, self.config.classifier_hidden_size, self.config.classifier_dropout
        layers = [nn.Linear(features, hidden), nn.SiLU(), nn.Dropout(dropout)] if hidden else []
        last = nn.Linear(hidden or features, classes) if classes else None
        self.classifier = nn.Sequential(nn.Dropout(dropout), *layers, last) if classes else None
        self.class_moments = nn.Embedding(classes, 2 * self.config.latent_dim) if classes else None

    def with_class(self, z: Tensor, class_labels: Tensor | Sequence[int] | None) -> Tensor:
        """z (*, B, D) with the class, one of N, after it: (*, B, D + N). Just z for a model without classes.

        Raises:
            ValueError: for no classes, classes that are not the model's, or any where it has none.
        """
        classes, name = self.config.num_classes, type(self).__name__
        if not classes and class_labels is not None:
            raise ValueError(f"class_labels: received {class_labels!r} for a {name} without classes, expected None")
        if not classes:
            return z
        if class_labels is None:
            raise ValueError(f"class_labels: received None for a {name} with {classes} classes, expected the class of every row")
        labels = checked_labels("class_labels", class_labels, z.shape[:-1], classes).to(z.device)
        return torch.cat([z, F.one_hot(labels, classes).to(z.dtype).expand(*z.shape[:-1], classes)], -1)

    def latent_given(self, features: Tensor) -> DiagNormal:
        """q(z|x) from features; with classes the normal of the same mean and variance as sum_y q(y|x) q(z|x, y)."""
        if not self.config.num_classes:
            return DiagNormal(*self.to_moments(features).chunk(2, 1), len(self.latent_shape))
        mixture = GaussianMixture(self._given_class(features), self._log_qy(features))
        return DiagNormal(mixture.mean, mixture.variance.log())

    def _given_class(self, features: Tensor) -> DiagNormal:
        """q(z|x, y) of every class, batch (N, B)."""
        return DiagNormal(*(self.to_moments(features) + self.class_moments.weight.unsqueeze(1)).chunk(2, -1))

    def _log_qy(self, features: Tensor) -> Tensor:
        """log q(y|x), (N, B) nats."""
        return at_least_float32(self.classifier(features)).log_softmax(-1).T

    @torch.no_grad()
    def classify(self, **inputs: Tensor) -> Tensor:
        """log q(y|x), (B, N) nats, from the modality's inputs; ValueError of a model without classes."""
        if not self.config.num_classes:
            raise ValueError("num_classes: received 0, expected a model that was made with classes")
        return self._log_qy(self.features(**self._only(type(self).input_names, inputs))).T

    def posterior(self, labels: Tensor | None = None, **inputs: Tensor) -> Posterior:
        """q(y, z|x).

        Arguments:
            labels: (B,) int64, the classes that rows tell, -100 where they do not; none do when None.
            inputs: of the modality.
        """
        if not self.config.num_classes:
            return super().posterior(**inputs)
        features = self.features(**self._only(type(self).input_names, inputs))
        log_qy, components = self._log_qy(features), self._given_class(features)
        classes, rows = log_qy.shape
        told = torch.full((rows,), UNKNOWN) if labels is None else checked_labels("labels", labels, (rows,), classes, UNKNOWN)
        told = told.expand(rows).to(log_qy.device)
        log_weights = self._known(log_qy, told)
        mixture, seen = GaussianMixture(components, log_weights), torch.ones(rows, 1, dtype=torch.bool, device=told.device)
        experts = {self.main_input_name: DiagNormal(mixture.mean, mixture.variance.log())}
        return ClassPosterior(mixture, experts, seen, (log_weights > -math.inf).unsqueeze(-1), log_qy, told)

    def _known(self, log_qy: Tensor, labels: Tensor) -> Tensor:
        """log of the classes' weights, (N, B): q(y|x), in training without hopeless classes; 0 and -inf where a row tells its class."""
        least, classes = self.config.least_probability, torch.arange(len(log_qy), device=log_qy.device).unsqueeze(1)
        if self.training and least:
            log_qy = log_qy.masked_fill(log_qy < log_qy.amax(0).clamp(max=math.log(least)), -math.inf)
        return torch.where(labels == UNKNOWN, log_qy, torch.zeros_like(log_qy).masked_fill(classes != labels, -math.inf))

    def log_px(self, z: Tensor, q: Posterior, **inputs: Tensor) -> dict[str, Tensor]:
        """log p(x|y, z), (S, N, B) nats; 0 for the classes that have no weight, which are not decoded."""
        if not self.config.num_classes:
            return super().log_px(z, q, **inputs)
        target = self.target(**self._only(type(self).input_names, inputs))
        here = q.mixture.log_weights > -math.inf
        pairs = some_rows(here.flatten())
        if pairs is None:
            pairs = torch.arange(here.numel(), device=here.device)
        labels, rows = pairs // here.shape[1], pairs % here.shape[1]
        value = self.decode(z.flatten(1, 2)[:, pairs], class_labels=labels).log_prob(target[rows])
        all_pairs = value.new_zeros(len(z), here.numel()).index_copy(1, pairs, value)
        return {self.main_input_name: all_pairs.unflatten(1, here.shape)}

    def terms(
        self, q: Posterior, inputs: dict[str, Tensor], num_samples: int, noise_key: Tensor | None, sample: bool = True, first: int = 0
    ) -> Terms:
        """Latents of every class and the likelihoods under them; see :meth:`VAE.terms`."""
        terms = super().terms(q, inputs, num_samples, noise_key, sample, first)
        classes = self.config.num_classes
        return replace(terms, log_pk=terms.z.new_full((classes, 1), -math.log(classes))) if classes else terms

    def weigh(self, terms: Terms, beta: float, objective: Objective) -> VAEOutput:
        """Minus the objective and minus alpha log q(y|x) of the rows that tell their class; see :meth:`VAE.bound`."""
        out = super().weigh(terms, beta, objective)
        if not self.config.num_classes:
            return out
        q, alpha = terms.q, 1.0 if self.config.classifier_alpha is None else self.config.classifier_alpha
        told = q.labels != UNKNOWN
        log_qy = torch.where(told, q.log_qy.gather(0, q.labels.clamp_min(0).unsqueeze(0))[0], 0.0)
        loss_rows = out.loss_rows - alpha * log_qy
        return VAEOutput(**{**out, "loss": loss_rows.mean(), "loss_rows": loss_rows, "class_log_probs": q.log_qy.T})

    def sample(
        self, num_samples: int, generator: torch.Generator | None = None, class_labels: Tensor | Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """Draw from p(y) and p(z) and render; see :meth:`VAE.sample`.

        Arguments:
            class_labels: (num_samples,), instead of classes from p(y).
        """
        classes = self.config.num_classes
        if classes and class_labels is None:
            device = None if generator is None else generator.device
            class_labels = torch.randint(classes, (num_samples,), generator=generator, device=device)
        if class_labels is not None:
            options["class_labels"] = class_labels
        return super().sample(num_samples, generator, **options)

    def generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Things of given classes, ``generate(class_labels=[3, 3, 7])``.

        Arguments:
            class_labels: (B,) whole numbers; None for a model without classes.
            latents: (B, *event); drawn from p(z) when None.
            generator: makes these (and sampled words) repeatable; torch's global generator when None.
            options: handed to :meth:`render`.

        Raises:
            ValueError: for neither classes nor latents, and for classes that the model has not.
        """
        if latents is None:
            latents = self._latents_for(class_labels, generator)
        with seeded(generator):
            return self.render(latents, **options if class_labels is None else {**options, "class_labels": class_labels})

    def _latents_for(self, class_labels: Tensor | Sequence[int] | None, generator: torch.Generator | None) -> Tensor:
        """One latent from p(z) for every class that is asked for."""
        if class_labels is None:
            raise ValueError("generate: received neither class_labels nor latents, expected one of them")
        if isinstance(class_labels, int) or getattr(class_labels, "ndim", 1) != 1:
            raise ValueError(f"class_labels: received {class_labels!r}, expected one class for every row, such as [{class_labels}]")
        return self.sample_prior(len(class_labels), generator)

    @torch.no_grad()
    def reconstruct(self, **inputs: Any) -> Tensor:
        """Render the mean of q(z|x, y) in the class that a row tells, else in the likeliest one; see :meth:`VAE.reconstruct`.

        With ``class_labels`` it is rendered in these classes instead: what is x's own, on another class.
        """
        if not self.config.num_classes:
            return super().reconstruct(**inputs)
        q = self.posterior(**self._only(self.input_names, inputs))
        likeliest = q.mixture.log_weights.argmax(0)
        z = q.mixture.components.mean[likeliest, torch.arange(len(likeliest), device=likeliest.device)]
        options = {name: value for name, value in inputs.items() if name not in self.input_names}
        return self.render(z, **{"class_labels": likeliest, **options})

    def interpolate(
        self, start: Tensor, end: Tensor, num_steps: int = 8, class_labels: Tensor | Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """Render the straight line between latents, each in one class (B,); see :meth:`VAE.interpolate`."""
        if class_labels is not None:
            options["class_labels"] = torch.as_tensor(class_labels).repeat_interleave(num_steps)
        return super().interpolate(start, end, num_steps, **options)
