r"""Classifiers on the latent: a VAE and a linear layer or a small network that reads its posterior.

    logits = head(features(q(z|x))),    features = E[z], or [E[z], log Var z], or a sample z;  the mean in evaluation

Three ways to train, with labels y, the number of a class or -100 where it is not known:

    fine-tuned     loss = -log p(y|x)                    ``alpha`` None
    frozen         the same after :meth:`HeadedVAE.freeze`: a probe; no weight or statistic of the VAE changes
    jointly        loss = -ELBO - alpha log p(y|x)       rows without a label count in the ELBO alone

``from_pretrained`` takes the folder of a VAE, to which it adds a new head, and a VAE's takes the folder of a classifier. The head's shape
is told by the fields ``classifier_*`` of the VAE's configuration and by transformers' ``num_labels`` or ``id2label``.
Shapes: ``B`` batch, ``N`` classes, ``*event`` the latent's event.

References:
    Kingma et al. (2014), Semi-supervised learning with deep generative models, https://arxiv.org/abs/1406.5298 (M1, and its alpha)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from mmvae.aggregation import Posterior
from mmvae.models.base import VAE
from mmvae.models.classes import UNKNOWN, checked_labels
from mmvae.models.configuration import MMVAEConfig, VAEConfig
from mmvae.models.headed import HeadedVAE
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.inherited import refuse_unknown
from mmvae.models.mmvae import MMVAE
from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.models.topic_vae import TopicVAE, TopicVAEConfig
from mmvae.noise import fold, keyed_uniform
from mmvae.objectives import Objective

_OPTIONS = ("alpha", "beta", "num_samples", "objective", "sample_posterior")  # of LatentClassifier.bound, beside the key
_FEATURES = 0x66656174  # keeps the noise of what the head reads apart from that of the ELBO


@dataclass
class ClassifierOutput(ModelOutput):
    """What ``forward`` returns: what transformers' classifiers do, and the parts of the loss. Nats; None where it does not apply.

    Attributes:
        loss: (), mean over rows of ``loss_rows``; None without labels.
        logits: (B, N).
        loss_rows: (B,), the cross-entropy, or jointly minus the VAE's objective plus alpha times that.
        cross_entropy: (B,), -log p(y|x), 0 for a row without a label.
        elbo, log_px, kl: (B,), of the VAE, jointly; see :class:`mmvae.models.base.VAEOutput`.
        latent_mean, latent_logvar: (B, *event), the posterior's mean and the log of its variance.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_rows: Tensor | None = None
    cross_entropy: Tensor | None = None
    elbo: Tensor | None = None
    log_px: Tensor | None = None
    kl: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_logvar: Tensor | None = None


class LatentClassifier(HeadedVAE):
    """A VAE, ``base_model``, with a ``head`` that gives the class of a row; see the module's docstring. One subclass per kind of VAE.

    Without ``alpha`` nothing is decoded, so the decoder and the prior have no gradient. ``Trainer`` and the recipes know; your own loop
    over ``DistributedDataParallel`` wants ``find_unused_parameters=True``, or :func:`mmvae.optimization.freeze_unreached` before it.
    """

    vae_class: ClassVar[type[VAE]]

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        if config.num_labels < 2:
            raise ValueError(f"{type(config).__name__}.num_labels: received {config.num_labels}, expected at least 2 classes")
        vae = self.vae_class(config)
        setattr(self, self.base_model_prefix, vae)
        width, hidden = math.prod(vae.latent_shape) * (2 if config.classifier_features == "moments" else 1), config.classifier_hidden_size
        if not width:
            raise ValueError(f"{type(config).__name__}.latent_dim: received 0, expected at least 1: a classifier reads the latent")
        layers = [nn.Dropout(config.classifier_dropout)]
        if hidden:
            layers += [nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(config.classifier_dropout)]
        self.head = nn.Sequential(*layers, nn.Linear(hidden or width, config.num_labels))
        self.post_init()

    def bound(
        self,
        inputs: dict[str, Any],
        /,
        labels: Tensor | None = None,
        alpha: float | None = None,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        **kwargs: Any,
    ) -> ClassifierOutput:
        r"""Logits, and with labels the loss: the body of every classifier's ``forward``.

        Arguments:
            inputs: the VAE's, by name.
            labels: (B,) int64, the numbers of classes, or -100 for a row without a label. None: there is no loss, and nothing is decoded.
            alpha: weight of the cross-entropy beside the VAE's objective; None: as the configuration's ``classifier_alpha`` says, and where
                that is None too, the cross-entropy is the loss, and nothing is decoded.
            beta, num_samples, objective: of the VAE's objective; see :meth:`mmvae.models.base.VAE.bound`.
            noise_key: (B,) int64 keys of all noise but dropout; torch's generator when None.
            sample_posterior: sample, or use the mean; None samples in training mode only.
            kwargs: what transformers hands to every model and this one has no use for; any other name is a TypeError.

        Raises:
            ValueError: for labels that are not (B,) whole numbers; in the host's memory also for one that is no class.
        """
        refuse_unknown(self, kwargs, _OPTIONS)
        alpha = self.config.classifier_alpha if alpha is None else alpha
        sampled = self.training if sample_posterior is None else sample_posterior
        q = self.base_model.posterior(**inputs)
        mean, logvar = q.mixture.mean, q.mixture.variance.log()
        logits = self.head(self._features(q, mean, logvar, noise_key, sampled).flatten(1).to(self.dtype)).float()
        latent = {"latent_mean": mean, "latent_logvar": logvar}
        if labels is None:
            return ClassifierOutput(logits=logits, **latent)
        labels = checked_labels("labels", labels, logits.shape[:1], logits.shape[1], UNKNOWN)
        loss_rows = cross_entropy = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="none")
        if alpha is not None:
            out = self.base_model.bound(inputs, beta, num_samples, objective, noise_key, sampled, q=q)
            loss_rows = out.loss_rows + alpha * cross_entropy
            latent |= {name: out[name] for name in ("elbo", "log_px", "kl")}
        return ClassifierOutput(loss=loss_rows.mean(), logits=logits, loss_rows=loss_rows, cross_entropy=cross_entropy, **latent)

    def _features(self, q: Posterior, mean: Tensor, logvar: Tensor, key: Tensor | None, sampled: bool) -> Tensor:
        """What the head reads: (B, *event), or (B, 2 * D, ...) of both moments."""
        if self.config.classifier_features == "moments":
            return torch.cat([mean, logvar], 1)
        if self.config.classifier_features == "mean" or not sampled:
            return mean
        uniform = torch.rand(len(mean), device=mean.device) if key is None else keyed_uniform(fold(_FEATURES, key), ())
        one, _ = q.at(q.draw(uniform))  # a mixture's component, by its weight
        return (one.loc + one.stddev * self.base_model._normal(one, key, 1, 0, one.event_shape, _FEATURES))[0]


class ImageVAEForImageClassification(LatentClassifier):
    """An :class:`ImageVAE` with a head; see the module's docstring. ``pipeline("image-classification")`` takes its folder.

    Example:
        >>> model = ImageVAEForImageClassification(ImageVAEConfig(image_size=16, latent_dim=4, num_labels=10)).eval()
        >>> model(torch.zeros(2, 3, 16, 16)).logits.shape
        torch.Size([2, 10])
    """

    config: ImageVAEConfig
    config_class = ImageVAEConfig
    vae_class = ImageVAE
    base_model_prefix = "image_vae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, *, noise_key: Tensor | None = None, **options: Any
    ) -> ClassifierOutput:
        """Logits, and with labels the loss; see :meth:`LatentClassifier.bound`.

        Arguments:
            pixel_values: (B, C, H, W), uint8 or float in [0, 1].
            options: of :meth:`LatentClassifier.bound`.
        """
        return self.bound({"pixel_values": pixel_values}, labels, noise_key=noise_key, **options)


class TextVAEForSequenceClassification(LatentClassifier):
    """A :class:`TextVAE` with a head; see the module's docstring. ``pipeline("text-classification")`` takes its folder.

    Example:
        >>> model = TextVAEForSequenceClassification(TextVAEConfig(vocab_size=100, latent_dim=4, num_labels=6)).eval()
        >>> model(torch.tensor([[1, 5, 6, 2]])).logits.shape
        torch.Size([1, 6])
    """

    config: TextVAEConfig
    config_class = TextVAEConfig
    vae_class = TextVAE
    base_model_prefix = "text_vae"
    main_input_name = "input_ids"
    input_modalities = ("text",)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the VAE's vocabulary; see :meth:`TextVAE.resize_token_embeddings`."""
        return self.base_model.resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        noise_key: Tensor | None = None,
        **options: Any,
    ) -> ClassifierOutput:
        """Logits, and with labels the loss; see :meth:`LatentClassifier.bound`.

        Arguments:
            input_ids: (B, T) int64, BOS ... EOS, padded at either side.
            attention_mask: (B, T), 1 on real tokens; made from ``pad_token_id`` when None.
            options: of :meth:`LatentClassifier.bound`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.bound(inputs, labels, noise_key=noise_key, **options)


class TopicVAEForSequenceClassification(LatentClassifier):
    """A :class:`TopicVAE` with a head; see the module's docstring. No pipeline: those of texts want a tokenizer.

    Example:
        >>> model = TopicVAEForSequenceClassification(TopicVAEConfig(vocabulary=["goal", "game", "vote"], num_labels=2)).eval()
        >>> model(torch.tensor([[1, 2, 0]])).logits.shape
        torch.Size([1, 2])
    """

    config: TopicVAEConfig
    config_class = TopicVAEConfig
    vae_class = TopicVAE
    base_model_prefix = "topic_vae"
    main_input_name = "word_counts"
    input_modalities = ("topic",)

    @can_return_tuple
    def forward(
        self, word_counts: Tensor, labels: Tensor | None = None, *, noise_key: Tensor | None = None, **options: Any
    ) -> ClassifierOutput:
        """Logits, and with labels the loss; see :meth:`LatentClassifier.bound`.

        Arguments:
            word_counts: (B, V) of any dtype, >= 0.
            options: of :meth:`LatentClassifier.bound`.
        """
        return self.bound({"word_counts": word_counts}, labels, noise_key=noise_key, **options)


class MMVAEForClassification(LatentClassifier):
    """An :class:`MMVAE` with a head on the shared latent, from whatever modalities a row has; see the module's docstring.

    Example:
        >>> both = {"image": ImageVAEConfig(image_size=16, latent_dim=4), "text": TextVAEConfig(vocab_size=50, latent_dim=4)}
        >>> model = MMVAEForClassification(MMVAEConfig(modalities=both, num_labels=9)).eval()
        >>> model(pixel_values=torch.zeros(2, 3, 16, 16)).logits.shape
        torch.Size([2, 9])
    """

    config: MMVAEConfig
    config_class = MMVAEConfig
    vae_class = MMVAE
    base_model_prefix = "mmvae"

    def __init__(self, config: MMVAEConfig):
        super().__init__(config)
        self.main_input_name = self.base_model.main_input_name

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the columns of ``present``."""
        return self.base_model.modalities

    @can_return_tuple
    def forward(
        self,
        labels: Tensor | None = None,
        alpha: float | None = None,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        **inputs: Any,
    ) -> ClassifierOutput:
        """Logits, and with labels the loss; see :meth:`LatentClassifier.bound`.

        Arguments:
            objective: (terms, beta) -> (B,) nats; the configuration's when None.
            inputs: of any of the modalities, ``present`` and ``visible``: as for :meth:`MMVAE.posterior`. In training the configuration's
                ``modality_dropout`` hides some.
        """
        inputs, objective = self.base_model.hide_some(inputs, noise_key), objective or self.config.maximised
        return self.bound(inputs, labels, alpha, beta, num_samples, objective, noise_key, sample_posterior)


def classifier_of(config: Any, among: Sequence[type[LatentClassifier]] | None = None) -> type[LatentClassifier]:
    """The classifier of a kind of configuration.

    Arguments:
        config: of a VAE.
        among: classifiers that are allowed; all when None.

    Raises:
        ValueError: for one of which there is none.
    """
    kinds = among or LatentClassifier.__subclasses__()
    found = next((kind for kind in kinds if isinstance(config, kind.config_class)), None)
    if found is None:
        expected = ", ".join(sorted(kind.config_class.model_type for kind in kinds))
        raise ValueError(f"classifier: received a model of type {config.model_type}, expected one of {expected}")
    return found
