"""What a text VAE writes: its reconstructions beside the true sentences, and how different its samples are.

Figures are called ``reconstruction/<score>`` (see :func:`mmvae.metrics.text_scores`) and ``samples/<figure>`` (see
:func:`mmvae.metrics.diversity`). They depend neither on batch size nor on the number of ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmvae.coherence import CHUNK, chunks
from mmvae.data import Rows
from mmvae.metrics import diversity, text_scores
from mmvae.models.base import seeded
from mmvae.models.text_vae import TextVAE
from mmvae.noise import fold
from mmvae.processing import decode_text

_SAMPLES = 0x73616D70  # keeps the samples' noise apart from other noise


@torch.no_grad()
def evaluate_sentences(
    accelerator: Accelerator,
    model: TextVAE,
    tokenizer: Any,
    rows: Rows,
    truths: Sequence[str],
    known: Sequence[str] | None = None,
    *,
    num_generated: int = 1000,
    num_beams: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Draw sentences from the prior, word by word, and reconstruct as many first rows from their posterior's mean, where there is one.

    Arguments:
        accelerator: its ranks share the work, and all get the figures.
        model: in evaluation mode, not wrapped.
        tokenizer: the model's.
        rows: with one column of text.
        truths: the texts of the data set by the row's number.
        known: training texts, which samples may repeat, where there are any.
        num_generated: rows, and samples; at least two.
        num_beams: of reconstructions.
        seed: of the samples.
    """
    figures = {"samples": diversity(samples(accelerator, model, tokenizer, num_generated, seed=seed), known)}
    if model.config.latent_dim:
        parts = []
        for n, numbers, inputs in chunks(accelerator, model, rows, num_generated):
            longest = inputs["input_ids"].shape[1] + 10
            made = decode_text(tokenizer, model.reconstruct(**inputs, num_beams=num_beams, max_new_tokens=longest))
            parts += [(n, text, truths[number]) for text, number in zip(made, numbers.tolist(), strict=True)]
        made, true = zip(*[part[1:] for part in sorted(gather_object(parts), key=lambda part: part[0])], strict=True)
        figures["reconstruction"] = text_scores(made, true)
    return {f"{kind}/{name}": value for kind, each in figures.items() for name, value in each.items()}


@torch.no_grad()
def samples(accelerator: Accelerator, model: TextVAE, tokenizer: Any, num_samples: int, *, seed: int = 0) -> list[str]:
    """Sentences from the prior, every word drawn, in an order that the number of ranks does not change.

    Arguments:
        accelerator, model, tokenizer, seed: as for :func:`evaluate_sentences`.
        num_samples: how many.
    """
    drawn = []
    for n in range(accelerator.process_index, -(-num_samples // CHUNK), accelerator.num_processes):
        with seeded(torch.Generator().manual_seed(fold(seed, _SAMPLES, n))):  # words are drawn by torch's global generator
            texts = decode_text(tokenizer, model.sample(min(CHUNK, num_samples - n * CHUNK), do_sample=True))
        drawn += [(n, text) for text in texts]
    return [text for _, text in sorted(gather_object(drawn), key=lambda part: part[0])]
