r"""A sentence VAE: GRU encoder, GRU decoder that is fed the latent as its initial state and at every step.

    q(z|x) = N(mu(s), sigma^2(s)),  s the encoder's summary;    p(x|z) = prod_t softmax(W h_t + b)_{x_t},
    h_0 = tanh(U z),  h_t = GRU([e(x_{t-1}); z], h_{t-1})

With D = 0 that is a language model: there is no encoder, the KL divergence is 0 and the ELBO is log p(x), exactly.
A decoder may also attend to the encoder's states of another text, its source: p(x|z, source) then. Never to those of its own text.
A row is BOS ... EOS, padded at either side; EOS is scored, BOS is not, padding never. Losses are sums over a row's tokens, in nats.
Shapes: ``B`` batch, ``T`` tokens with BOS, ``D`` latent, ``H`` hidden, ``V`` vocabulary.

References:
    Bowman et al. (2016), Generating sentences from a continuous space, https://arxiv.org/abs/1511.06349
    Luong et al. (2015), Effective approaches to attention-based neural machine translation, https://arxiv.org/abs/1508.04025
    Zhao et al. (2017), Learning discourse-level diversity with conditional VAEs, https://arxiv.org/abs/1703.10960 (bag of words)
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from mmvae.distributions import Autoregressive, DiagNormal, at_least_float32
from mmvae.models.base import VAEOutput
from mmvae.models.classes import ClassVAE, ClassVAEConfig
from mmvae.models.inherited import refuse_unknown
from mmvae.models.text_generation import TextGeneration
from mmvae.nn import ScaledMean, fold_leading
from mmvae.objectives import Objective
from mmvae.recurrent import GRUDecoder, GRUEncoder, GRUState, check_ids, linear_cross_entropy, right_padded, sentences

_OF_A_LATENT = ("bidirectional", "bow_weight", "encoder_dropout", "encoder_layers", "latent_skip", "mean_scale", "num_classes", "pooling")
_OF_A_LATENT += ("prior", "share_embeddings")


@strict
class TextVAEConfig(ClassVAEConfig):
    """Configuration of a :class:`TextVAE`, with classes or without; see :class:`ClassVAEConfig`.

    Arguments:
        latent_dim: D; 0: a language model, for which what is about an encoder or a latent keeps its default.
        vocab_size: V; 2 to 4,194,304.
        embedding_size: of a token.
        hidden_size: H, per direction in the encoder.
        encoder_layers, decoder_layers: GRU layers.
        bidirectional: read rows in both directions.
        pooling: what the posterior reads of the encoder's states: the "last" one, or their "mean" or "max".
        embedding_dropout: on the embeddings of the decoder's inputs, [0, 1).
        encoder_dropout: on the embeddings of the encoder's inputs, [0, 1).
        dropout: on the decoder's outputs and between layers, [0, 1).
        word_dropout: share of the decoder's input words that training replaces by ``unk_token_id``.
        latent_skip: add a linear map of z to every state of the decoder, too.
        mean_scale: gamma of :class:`mmvae.nn.ScaledMean`, normalisation of the posterior's mean over the batch; 0: none.
        bow_weight: weight of the auxiliary log p(words|z), their order left out, beside the objective in training; 0: none.
        source_size: width of the states of a source that the decoder attends to, ``states_size`` of that one's configuration; 0: none.
        source_dropout: share of the training rows that do not see their source, [0, 1], so that the latent alone is of use, too.
        tie_word_embeddings: the output layer's weights are the decoder's embedding.
        share_embeddings: the encoder reads the decoder's embedding.
        pad_token_id, bos_token_id, eos_token_id, unk_token_id: as the tokenizer has them; where pad is BOS or EOS too (GPT-2), give masks.
    """

    model_type = "text_vae"

    latent_dim: int = 32
    vocab_size: int = 10_000
    embedding_size: int = 256
    hidden_size: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 1
    bidirectional: bool = False
    pooling: str = "last"
    embedding_dropout: float | int = 0.0
    encoder_dropout: float | int = 0.0
    dropout: float | int = 0.0
    word_dropout: float | int = 0.0
    latent_skip: bool = False
    mean_scale: float | int = 0.0
    bow_weight: float | int = 0.0
    source_size: int = 0
    source_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    share_embeddings: bool = False
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    unk_token_id: int = 3

    ranges: ClassVar[dict[str, tuple[float, float]]] = ClassVAEConfig.ranges | {
        "latent_dim": (0, 65_536),
        "vocab_size": (2, 4_194_304),
        "embedding_size": (1, 16_384),
        "hidden_size": (1, 16_384),
        "encoder_layers": (1, 16),
        "decoder_layers": (1, 16),
        "embedding_dropout": (0, 0.99),
        "encoder_dropout": (0, 0.99),
        "dropout": (0, 0.99),
        "word_dropout": (0, 1),
        "mean_scale": (0, 100),
        "bow_weight": (0, 1e6),
        "source_size": (0, 65_536),
        "source_dropout": (0, 1),
    }

    choices: ClassVar[dict[str, Sequence[Any]]] = ClassVAEConfig.choices | {"pooling": ("last", "mean", "max")}

    def validate_architecture(self) -> None:
        """Check the fields; see :meth:`VAEConfig.validate_architecture`."""
        super().validate_architecture()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"TextVAEConfig.{name}: received {getattr(self, name)}, expected 0 to {self.vocab_size - 1}")
        if self.source_size and self.num_classes:
            raise ValueError(f"TextVAEConfig.source_size: received {self.source_size}, expected 0 with {self.num_classes} classes")
        for name in () if self.latent_dim else _OF_A_LATENT:
            if getattr(self, name) != getattr(TextVAEConfig, name):
                expected = f"expected {getattr(TextVAEConfig, name)!r} with latent_dim 0, a language model"
                raise ValueError(f"TextVAEConfig.{name}: received {getattr(self, name)!r}, {expected}")

    @property
    def states_size(self) -> int:
        """Width of the encoder's states."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    def _densities(self) -> dict[str, tuple[str, str | None]]:
        return super()._densities() if self.latent_dim else {}


class TextVAE(TextGeneration, ClassVAE):
    """GRU sentence VAE; see the module's docstring for the equations.

    Example:
        >>> model = TextVAE(TextVAEConfig(vocab_size=100, hidden_size=16, latent_dim=4)).eval()
        >>> z = model.encode(input_ids=torch.tensor([[1, 5, 6, 2]])).mean
        >>> model.generate(latents=z, max_new_tokens=5).shape[0], model.decode(z).log_prob(torch.tensor([[5, 6, 2]])).shape
        (1, torch.Size([1]))
    """

    config: TextVAEConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)
    base_model_prefix = "text_vae"
    input_names = ("input_ids", "attention_mask")
    inference_modules = (*ClassVAE.inference_modules, "encoder_embedding")
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "decoder.embed_tokens.weight"}
    _no_split_modules: ClassVar[list[str]] = ["GRUEncoder", "GRUDecoder"]

    def __init__(self, config: TextVAEConfig):
        super().__init__(config)
        self.condition_names = (*self.condition_names, "source") if config.source_size else self.condition_names
        size, latent = config.hidden_size, config.latent_dim + config.num_classes
        options = {"num_layers": config.decoder_layers, "embedding_dropout": config.embedding_dropout, "dropout": config.dropout}
        options |= {"tied": config.tie_word_embeddings, "skip": config.latent_skip}
        options |= {"source_size": config.source_size, "source_dropout": config.source_dropout}
        self.decoder = GRUDecoder(config.vocab_size, config.embedding_size, size, latent, **options)
        if config.latent_dim:
            self._build_encoder(config)
        else:
            self.encoder, self.encoder_embedding, self.to_moments = None, None, nn.Identity()
        self.word_bag = nn.Linear(latent, config.vocab_size) if config.bow_weight else None
        self.lm_head = nn.Linear(config.embedding_size if config.tie_word_embeddings else config.hidden_size, config.vocab_size)
        self.build_classes(self.encoder.output_size if self.encoder else 0)
        self.latent_prior = self.build_prior()
        self.post_init()

    def _build_encoder(self, config: TextVAEConfig) -> None:
        self.encoder_embedding = None if config.share_embeddings else nn.Embedding(config.vocab_size, config.embedding_size)
        self.encoder_dropout = nn.Dropout(config.encoder_dropout)
        options = {"bidirectional": config.bidirectional, "dropout": config.encoder_dropout, "pooling": config.pooling}
        self.encoder = GRUEncoder(config.embedding_size, config.hidden_size, config.encoder_layers, **options)
        self.to_moments = nn.Linear(self.encoder.output_size, 2 * config.latent_dim)
        if config.mean_scale:
            self.to_moments = nn.Sequential(self.to_moments, ScaledMean(config.latent_dim, config.mean_scale))

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.decoder.embed_tokens = value

    def hidden_layers(self) -> list[nn.Module]:
        """The encoder's embeddings, then its layers: states (B, T, H * directions) of rows padded at the right, arbitrary on padding."""
        return [] if self.encoder is None else [self.encoder_dropout, *self.encoder.states]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary, the encoder's own embedding and the bag of words included."""
        resized = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.encoder_embedding is not None and len(self.encoder_embedding.weight) != self.config.vocab_size:
            self.encoder_embedding = self._get_resized_embeddings(self.encoder_embedding, self.config.vocab_size)
        if self.word_bag is not None and len(self.word_bag.weight) != self.config.vocab_size:
            self.word_bag = self._get_resized_lm_head(self.word_bag, self.config.vocab_size)
        return resized

    @property
    def pseudo_input_shape(self) -> tuple[int, ...]:
        """(T, E): embeddings of a pseudo-sentence of 16 tokens."""
        return (16, self.config.embedding_size)

    def encode_pseudo_inputs(self, pseudo_inputs: Tensor) -> DiagNormal:
        """q(z|u) of pseudo-sentences given as embeddings, (K, T, E)."""
        return self.encode(inputs_embeds=0.1 * pseudo_inputs)

    def encode(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> DiagNormal:
        """q(z|x).

        Arguments:
            input_ids: (B, T) int64, BOS ... EOS, padded at either side.
            attention_mask: (B, T), 1 on real tokens; made from ``pad_token_id`` when None.
            inputs_embeds: (B, T, E) instead of ``input_ids``.

        Returns:
            DiagNormal of batch (B,) and event (D,). A row without a real token counts as one padding token.

        Raises:
            TypeError: for ids or a mask that are not tensors.
            ValueError: for ids of another shape than (B, T), a mask of another shape than theirs, or none where padding is BOS or EOS.
        """
        return self.latent_given(self.features(input_ids, attention_mask, inputs_embeds))

    def features(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The encoder's summary (B, F) of rows that are given as to :meth:`encode`."""
        return self._read(input_ids, attention_mask, inputs_embeds)[1]

    def encode_with_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[DiagNormal, Tensor]:
        """q(z|x), and the encoder's states (B, T, F), 0 on padding: the ``source`` of another text. Arguments as for :meth:`encode`."""
        states, summary, real = self._read(input_ids, attention_mask, None)
        return self.latent_given(summary), states * real.unsqueeze(-1)

    def _read(self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's states (B, T, F), its summary, and where the states are of real tokens, (B, T) bool."""
        if self.encoder is None:
            real = self._sentences(input_ids, attention_mask)[1]
            return torch.zeros(*real.shape, 0, device=self.device), torch.zeros(len(real), 0, device=self.device), real
        if inputs_embeds is None:
            input_ids, real = self._sentences(input_ids, attention_mask)
            inputs_embeds = (self.decoder.embed_tokens if self.encoder_embedding is None else self.encoder_embedding)(input_ids)
        else:
            mask = inputs_embeds.new_ones(inputs_embeds.shape[:2]) if attention_mask is None else attention_mask
            inputs_embeds, real = right_padded(inputs_embeds, mask)
        return *self.encoder(self.encoder_dropout(inputs_embeds), real.sum(1).clamp_min(1)), real

    def decode(self, z: Tensor, class_labels: Tensor | None = None, source: Tensor | None = None) -> Autoregressive:
        """p(x|z), p(x|y, z) or p(x|z, source), teacher-forced; its event is what :meth:`target` gives.

        Arguments:
            z: (*, B, D).
            class_labels: y, (*, B) int64, of a model with classes.
            source: (B, L, F) of :meth:`encode_with_states`; a state of nothing but 0 is none. None: p(x|z) of the latent alone.

        Raises:
            ValueError: for latents of another width, classes that are not the model's, or a source of another shape.
        """
        self.check_latents(z)
        self.check_source(source, z.shape[-2] if z.dim() > 1 else 1)
        z = self.with_class(z, class_labels)
        return Autoregressive(lambda target: self._token_log_prob(z, target, source), z.shape[:-1])

    def auxiliary_log_prob(self, z: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
        """In training that of the words, their order left out (Zhao et al., 2017); see :meth:`VAE.auxiliary_log_prob`."""
        if self.word_bag is None or not self.training:
            return None
        classes = torch.arange(z.shape[1], device=z.device).unsqueeze(1) if self.config.num_classes else None
        log_p = at_least_float32(self.word_bag(self.with_class(z, classes).to(self.dtype))).log_softmax(-1)
        wanted = self.target(**self._only(type(self).input_names, inputs)).expand(*z.shape[:3], -1)
        said = log_p.gather(-1, wanted.clamp_min(0)).masked_fill(wanted == -100, 0.0)
        return self.config.bow_weight * said.sum(-1)

    def target(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What is scored: the tokens after BOS, (B, T - 1) int64, padding at the right and -100."""
        input_ids, real = self._sentences(input_ids, attention_mask)
        return input_ids[:, 1:].masked_fill(~real[:, 1:], -100)

    def num_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens that are scored of every row, (B,)."""
        return (self.target(input_ids, attention_mask) != -100).sum(1)

    def _token_log_prob(self, z: Tensor, target: Tensor, source: Tensor | None) -> Tensor:
        """(*, B, T) nats, 0 where the target is -100."""
        target = target.expand(*z.shape[:-1], target.shape[-1])
        if not target.shape[-1]:
            return z.new_zeros(target.shape)  # nothing after BOS
        flat, _ = fold_leading(z, 1)
        wanted = target.reshape(-1, target.shape[-1])
        inputs = torch.cat([torch.full_like(wanted[:, :1], self.config.bos_token_id), wanted[:, :-1]], 1)
        inputs = inputs.masked_fill(inputs == -100, self.config.pad_token_id)
        if self.training and self.config.word_dropout:
            dropped = torch.rand(inputs[:, 1:].shape, device=inputs.device) < self.config.word_dropout
            inputs = torch.cat([inputs[:, :1], inputs[:, 1:].masked_fill(dropped, self.config.unk_token_id)], 1)
        states = self.decoder(inputs, flat.to(self.dtype), source=source)[0]
        scored = wanted != -100
        nll = linear_cross_entropy(states[scored], self.lm_head.weight, self.lm_head.bias, wanted[scored])
        return nll.new_zeros(wanted.shape).masked_scatter(scored, -nll).reshape(target.shape)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        latents: Tensor | None = None,
        beta: float = 1.0,
        num_samples: int = 1,
        objective: Objective | None = None,
        noise_key: Tensor | None = None,
        sample_posterior: bool | None = None,
        past_key_values: GRUState | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_loss: bool = True,
        **kwargs: Any,
    ) -> VAEOutput:
        """Minus the objective, and what it is made of; see :meth:`VAE.bound`. With ``latents``: the logits of the next tokens instead.

        Arguments:
            input_ids: (B, T) int64, BOS ... EOS, padded at either side.
            attention_mask: (B, T), 1 on real tokens; made from ``pad_token_id`` when None.
            latents: (B, D); then ``input_ids`` is a prefix and the output holds ``logits`` (B, T, V). A model with classes takes
                ``class_labels`` (B,) with them, and otherwise ``labels`` (B,), -100 where unknown; not as arguments of their own, which
                would keep ``Trainer`` from a loss without labels; nor is ``source``, as for :meth:`decode`.
            past_key_values, use_cache: the decoder's state while generating.
            return_loss: there for ``transformers.Trainer``; the loss is always returned.
            kwargs: those, and what transformers hands to every model and this one has no use for; any other name is a TypeError.
        """
        refuse_unknown(self, kwargs)
        if latents is not None:
            self.check_latents(latents)
            check_ids(input_ids)
            self.check_source(kwargs.get("source"), len(input_ids))
            latents = self.with_class(latents, kwargs.get("class_labels"))
            hidden = None if past_key_values is None else past_key_values.hidden
            seen = 0 if past_key_values is None else past_key_values.length
            states, hidden = self.decoder(input_ids, latents.to(self.dtype), hidden, kwargs.get("source"))
            state = GRUState(hidden, seen + input_ids.shape[1]) if use_cache else None
            return VAEOutput(logits=self.lm_head(states), past_key_values=state, hidden_states=(states,) if output_hidden_states else None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": kwargs.get("labels"), "source": kwargs.get("source")}
        return self.bound(inputs, beta, num_samples, objective, noise_key, sample_posterior, output_hidden_states)

    def _sentences(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        own = self.config
        return sentences(input_ids, attention_mask, own.pad_token_id, (own.bos_token_id, own.eos_token_id), own.vocab_size)
