r"""Topics of documents: a VAE of bags of words whose latent is a document's topics.

    q(z|x) = N(mu(x), sigma^2(x)),  theta = softmax(z);    p(x|z) = prod_n p(x_n | theta) over the words of a document, with W (K, V)

    product:  p(v | theta) = softmax(norm(theta W) + b)_v                ProdLDA: a product of experts
    mixture:  p(v | theta) = sum_k theta_k softmax(norm(W)_k + b)_v      LDA

b is the background, how frequent words are in any document. ``norm`` makes every word's numbers, those of a batch's documents or those of
the topics, of mean 0 and variance 1, and so it is done with the encoder's outputs: without it all topics become one. p(z) is the normal
that is nearest to a Dirichlet (``prior`` "dirichlet"), or any other prior.
Shapes: ``B`` batch, ``V`` words of the vocabulary, ``K`` topics, which are the latent's ``D``.

References:
    Srivastava, Sutton (2017), Autoencoding variational inference for topic models, https://arxiv.org/abs/1703.01488
"""

from collections.abc import Sequence
from dataclasses import field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from mmvae.distributions import BagOfWords, DiagNormal
from mmvae.metrics import relevant_words
from mmvae.models.base import VAEOutput
from mmvae.models.configuration import VAEConfig
from mmvae.models.unimodal import VAEModel
from mmvae.nn import fold_leading
from mmvae.priors import LaplaceDirichlet, Prior


@strict
class TopicVAEConfig(VAEConfig):
    """Configuration of a :class:`TopicVAE`.

    Arguments:
        vocabulary: the V words in the order of the counts, at least two; see :class:`mmvae.vectorizer.TopicVAEVectorizer`.
        latent_dim: K, the number of topics; from 2.
        prior: "dirichlet", or a key of ``mmvae.priors.PRIORS``; in a joint model "standard_normal".
        concentration: of the Dirichlet distribution, for every topic; the smaller, the fewer topics in a document.
        mixing: how topics make the words of a document: "product" or, of three topics or more, "mixture".
        hidden_size: width of the encoder's layers.
        encoder_layers: how many.
        dropout: on the encoder's last layer and, of a product, on the topics of a document, [0, 1).
    """

    model_type = "topic_vae"
    has_no_defaults_at_init = True

    vocabulary: list[str] = field(default_factory=list)
    latent_dim: int = 20
    prior: str = "dirichlet"
    concentration: float | int = 1.0
    mixing: str = "product"
    hidden_size: int = 100
    encoder_layers: int = 2
    dropout: float | int = 0.2

    ranges: ClassVar[dict[str, tuple[float, float]]] = VAEConfig.ranges | {
        "latent_dim": (2, 65_536),
        "concentration": (1e-3, 1e3),
        "hidden_size": (1, 16_384),
        "encoder_layers": (1, 16),
        "dropout": (0, 0.99),
    }
    choices: ClassVar[dict[str, Sequence[Any]]] = VAEConfig.choices | {
        "prior": ("dirichlet", *VAEConfig.choices["prior"]),
        "mixing": ("product", "mixture"),
    }

    def validate_architecture(self) -> None:
        """Check the fields; see :meth:`VAEConfig.validate_architecture`."""
        super().validate_architecture()
        if len(set(self.vocabulary)) < max(2, len(self.vocabulary)):
            received = f"{len(self.vocabulary)} words, {len(set(self.vocabulary))} of them different"
            raise ValueError(f"TopicVAEConfig.vocabulary: received {received}, expected at least 2, and each once")
        if self.mixing == "mixture" and self.latent_dim < 3:
            why = "its topics are normalised over each other, and of two any word would be all in one"
            raise ValueError(f"TopicVAEConfig.latent_dim: received {self.latent_dim} with mixing 'mixture', expected at least 3: {why}")


class _BatchNorm(nn.BatchNorm1d):
    """Normalised over the rows of a batch; one row alone, which has no variance, as in evaluation."""

    def __init__(self, size: int):
        super().__init__(size, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) -> (B, size)."""
        if self.training and len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)


class _Topics(nn.Module):
    """Topics of documents, theta (N, K), to logits of their words (N, V)."""

    def __init__(self, topics: int, words: int, mixing: str, dropout: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(topics, words))
        self.background = nn.Parameter(torch.empty(words))
        self.norm = _BatchNorm(words) if mixing == "product" else None
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Topics at random, and no background."""
        nn.init.xavier_uniform_(self.weight), nn.init.zeros_(self.background)

    def forward(self, theta: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(self.dropout(theta) @ self.weight) + self.background  # a mixture of no topic would have no words
        with torch.autocast(theta.device.type, enabled=False):  # a rare word's probability is nothing in float16
            weight = F.batch_norm(self.weight.float(), None, None, training=True)  # over the topics
            return (theta.float() @ (weight + self.background.float()).softmax(-1)).log()


class TopicVAE(VAEModel):
    """Topics of documents; see the module's docstring for the equations.

    Example:
        >>> model = TopicVAE(TopicVAEConfig(vocabulary=["ball", "goal", "vote", "party"], latent_dim=2)).eval()
        >>> theta = model.document_topics(torch.tensor([[2.0, 1, 0, 0], [0, 0, 0, 0]]))
        >>> theta.shape, [len(words) for words in model.topics(top_k=3)]
        (torch.Size([2, 2]), [3, 3])
    """

    config: TopicVAEConfig
    main_input_name = "word_counts"
    input_modalities = ("topic",)
    base_model_prefix = "topic_vae"
    inference_modules = (*VAEModel.inference_modules, "moments_norm")
    input_names = ("word_counts",)

    def __init__(self, config: TopicVAEConfig):
        super().__init__(config)
        words, size = len(config.vocabulary), config.hidden_size
        sizes = [words, *[size] * config.encoder_layers]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Softplus())]
        self.encoder = nn.Sequential(*layers, nn.Dropout(config.dropout), nn.Linear(size, 2 * config.latent_dim))
        self.moments_norm = _BatchNorm(2 * config.latent_dim)
        self.decoder = _Topics(config.latent_dim, words, config.mixing, config.dropout)
        self.latent_prior = self.build_prior()
        self.post_init()

    def build_prior(self) -> Prior:
        """The prior that the configuration names."""
        if self.config.prior == "dirichlet":
            return LaplaceDirichlet(self.latent_shape, self.config.concentration)
        return super().build_prior()

    @property
    def pseudo_input_shape(self) -> tuple[int, ...]:
        """(V,): a pseudo-document."""
        return (len(self.config.vocabulary),)

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u) of pseudo-documents (K, V), whose logarithmic counts are softplus(u)."""
        return self._latent_given(F.softplus(pseudo_inputs))

    def encode(self, word_counts: Tensor) -> DiagNormal:
        """q(z|x), batch (B,), of documents given as counts (B, V) >= 0 of any dtype; one without a word is a document too.

        Raises:
            TypeError: for counts that are no tensor.
            ValueError: for counts of another shape, and in the host's memory for one that is negative or not finite.
        """
        return self._latent_given(self.target(word_counts).log1p().to(self.dtype))

    def _latent_given(self, log_counts: Tensor) -> DiagNormal:
        return DiagNormal(*self.moments_norm(self.encoder(log_counts)).chunk(2, -1))

    def decode(self, z: Tensor) -> BagOfWords:
        """p(x|z), batch (*, B), event (V,), from z (*, B, K)."""
        self.check_latents(z)
        flat, leading = fold_leading(z.softmax(-1), 1)
        return BagOfWords(self.decoder(flat.to(self.dtype)).reshape(*leading, -1))

    def target(self, word_counts: Tensor) -> Tensor:
        """What is scored: the counts, (B, V) float32."""
        words = len(self.config.vocabulary)
        if not isinstance(word_counts, Tensor):
            raise TypeError(f"word_counts: received a {type(word_counts).__name__}, expected a tensor")
        if word_counts.dim() != 2 or word_counts.shape[1] != words:
            raise ValueError(f"word_counts: received shape {tuple(word_counts.shape)}, expected (batch, {words}), the vocabulary's")
        if word_counts.is_cpu and not torch.compiler.is_compiling() and not (counted := (word_counts >= 0) & word_counts.isfinite()).all():
            row, word = (~counted).nonzero()[0].tolist()
            received = f"{word_counts[row, word]:g} of {self.config.vocabulary[word]!r} in row {row}"
            raise ValueError(f"word_counts: received {received}, expected 0 or more")
        return word_counts.float()

    def num_tokens(self, word_counts: Tensor) -> Tensor:
        """Words of every document, (B,)."""
        return self.target(word_counts).sum(1)

    def render(self, z: Tensor) -> Tensor:
        """What one looks at: the probability of every word, (B, V)."""
        return self.decode(z).mean

    @torch.no_grad()
    def document_topics(self, word_counts: Tensor) -> Tensor:
        """theta at the mean of q(z|x): shares (B, K) of the topics in each document."""
        return self.encode(word_counts).mean.softmax(-1)

    @torch.no_grad()
    def topic_words(self) -> Tensor:
        """log p(v | theta) of documents that have one topic alone, (K, V) nats."""
        decoder, training = self.decoder, self.decoder.training
        theta = torch.eye(self.config.latent_dim, dtype=self.dtype, device=self.device)
        words = BagOfWords(decoder.eval()(theta)).log_probs  # in training they would depend on each other
        decoder.train(training)
        return words

    @property
    def background(self) -> Tensor:
        """b: log p(v) of any document up to a constant, (V,)."""
        return self.decoder.background.detach().float()

    def top_words(self, top_k: int = 10, relevance: float = 0.6) -> Tensor:
        """Numbers of the words that tell every topic, (K, top_k) int64; see :func:`mmvae.metrics.relevant_words`."""
        return relevant_words(self.topic_words(), self.background, top_k, relevance)

    def topics(self, top_k: int = 10, relevance: float = 0.6) -> list[list[str]]:
        """The words that tell every topic, the most relevant first; see :meth:`top_words`."""
        return [[self.config.vocabulary[word] for word in topic] for topic in self.top_words(top_k, relevance).tolist()]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _Topics):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self, word_counts: Tensor, beta: float = 1.0, *, noise_key: Tensor | None = None, return_loss: bool = True, **options: Any
    ) -> VAEOutput:
        """Minus the objective, and what it is made of; see :meth:`VAEModel.forward`.

        Arguments:
            word_counts: (B, V) of any dtype, >= 0.
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            options: of :meth:`VAE.bound`.
        """
        return super().forward(beta=beta, word_counts=word_counts, noise_key=noise_key, **options)
