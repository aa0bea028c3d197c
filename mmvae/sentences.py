"""What a text VAE writes: its reconstructions beside the true sentences, and how different its samples are.

Figures are called ``reconstruction/<score>`` (see :func:`mmvae.metrics.text_scores`) and ``samples/<figure>`` (see
:func:`mmvae.metrics.diversity` and :func:`forward_perplexity`). They depend neither on batch size nor on the number of ranks,
nor on the ``generation_config`` of the model's folder: sentences are made by the options that are given here.

Reverse perplexity is the other way round, that of real rows under a language model trained on samples: ``recipes/evaluate.py`` with
``--samples_file`` writes them, ``recipes/text_vae.py --latent_dim 0`` trains on them with the tokenizer of the model that wrote them, and
``recipes/evaluate.py`` gives its perplexity on the real rows.

References:
    Zhao et al. (2018), Adversarially regularized autoencoders, §5 (forward and reverse perplexity), https://arxiv.org/abs/1706.04223
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig

from mmvae.coherence import CHUNK, chunks
from mmvae.data import Loader, Rows, TextColumn
from mmvae.evaluation import evaluate_elbo
from mmvae.metrics import diversity, perplexity, text_scores
from mmvae.models.base import seeded
from mmvae.models.text_vae import TextVAE
from mmvae.noise import fold
from mmvae.processing import decode_text

_SAMPLES = 0x73616D70  # keeps the samples' noise apart from other noise


@contextlib.contextmanager
def _no_defaults(model: TextVAE) -> Iterator[None]:
    """Let the model write without what its ``generation_config`` holds but BOS, EOS and PAD."""
    own, model.generation_config = model.generation_config, GenerationConfig.from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def evaluate_sentences(
    accelerator: Accelerator,
    model: TextVAE,
    tokenizer: Any,
    rows: Rows,
    truths: Sequence[str],
    known: Sequence[str] | None = None,
    reference: tuple[TextVAE, Any] | None = None,
    *,
    num_generated: int = 1000,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    suppress_tokens: list[int] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Draw sentences word by word, and reconstruct as many first rows from their posterior's mean, where there is one.

    Latents of the sentences that are drawn come from :meth:`mmvae.TextVAE.sample_prior`: the prior, or the density fitted in its place.

    Arguments:
        accelerator: its ranks share the work, and all get the figures.
        model: in evaluation mode, not wrapped.
        tokenizer: the model's.
        rows: with one column of text.
        truths: the texts of the data set by the row's number.
        known: training texts as the tokenizer writes them, which samples may repeat, where there are any.
        reference: a language model and its tokenizer, which score the samples.
        num_generated: rows, and samples; at least two.
        num_beams: of reconstructions.
        max_new_tokens: of samples.
        suppress_tokens: ids that are never written, ``[tokenizer.unk_token_id]`` for example.
        seed: of the samples.
    """
    drawn = samples(accelerator, model, tokenizer, num_generated, max_new_tokens, suppress_tokens, seed=seed)
    figures = {"samples": diversity(drawn, known) | (forward_perplexity(accelerator, *reference, drawn) if reference else {})}
    if model.config.latent_dim:
        parts, options = [], {"num_beams": num_beams, "suppress_tokens": suppress_tokens}
        for n, numbers, inputs in chunks(accelerator, model, rows, num_generated):
            longest = inputs["input_ids"].shape[1] + 10
            with _no_defaults(model):
                made = decode_text(tokenizer, model.reconstruct(**inputs, **options, max_new_tokens=longest))
            parts += [(n, text, truths[number]) for text, number in zip(made, numbers.tolist(), strict=True)]
        made, true = zip(*[part[1:] for part in sorted(gather_object(parts), key=lambda part: part[0])], strict=True)
        figures["reconstruction"] = text_scores(made, true)
    return {f"{kind}/{name}": value for kind, each in figures.items() for name, value in each.items()}


@torch.no_grad()
def samples(
    accelerator: Accelerator,
    model: TextVAE,
    tokenizer: Any,
    num_samples: int,
    max_new_tokens: int = 64,
    suppress_tokens: list[int] | None = None,
    *,
    seed: int = 0,
) -> list[str]:
    """Sentences, every word drawn from all words but suppressed ones, in an order that the number of ranks does not change.

    Their latents are of the prior, or of the density that was fitted in its place.

    Arguments:
        accelerator, model, tokenizer, suppress_tokens, seed: as for :func:`evaluate_sentences`.
        num_samples: how many.
        max_new_tokens: of each, EOS included; a longer one is cut.
    """
    drawn, options = [], {"max_new_tokens": max_new_tokens, "suppress_tokens": suppress_tokens}
    for n in range(accelerator.process_index, -(-num_samples // CHUNK), accelerator.num_processes):
        with seeded(torch.Generator().manual_seed(fold(seed, _SAMPLES, n))), _no_defaults(model):
            part = min(CHUNK, num_samples - n * CHUNK)
            texts = decode_text(tokenizer, model.sample(part, do_sample=True, top_k=0, **options))
        drawn += [(n, text) for text in texts]
    return [text for _, text in sorted(gather_object(drawn), key=lambda part: part[0])]


def forward_perplexity(accelerator: Accelerator, model: TextVAE, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """How probable sentences are under a language model, best one that was trained on real rows.

    Arguments:
        accelerator: its ranks share the sentences, and all get the figures.
        model: the language model, in evaluation mode, not wrapped.
        tokenizer: its own. A sentence's tokens are those that it makes of the text, and EOS, also of a sentence that was cut at its longest
            length; a word that it does not know is one token, <unk>.
        texts: sentences, the same on every rank.

    Returns:
        ``forward_nll_nats`` per sentence, ``forward_perplexity`` per token, and ``forward_unknown``, the share of <unk> in the tokens.

    Raises:
        ValueError: for a model with a latent, whose likelihood is no exact figure.
    """
    check_language_model(model)
    rows = Rows(Dataset.from_dict({"text": list(texts)}), TextColumn("text", tokenizer), name="samples")
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    figures = evaluate_elbo(accelerator, model, Loader(rows, CHUNK, shuffle=False, **place))
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    nll, tokens = figures["neg_elbo_nats"], figures["tokens"]
    shown = {"forward_nll_nats": nll, "forward_perplexity": perplexity(nll, tokens)}
    return shown | {"forward_unknown": unknown / (tokens * len(texts))}


def check_language_model(model: Any) -> None:
    """Refuse what is no language model, a `TextVAE` of ``latent_dim`` 0, whose likelihood is exact: ValueError."""
    if not isinstance(model, TextVAE) or model.config.latent_dim:
        received = f"latent_dim {model.config.latent_dim}" if isinstance(model, TextVAE) else type(model).__name__
        raise ValueError(f"reference: received a model with {received}, expected 0, a language model")
