"""What a text VAE writes is measured the same on any batch, and by what it says."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from mmvae import TextVAE, TextVAEConfig
from mmvae.data import Rows, TextColumn
from mmvae.processing import train_tokenizer
from mmvae.sentences import evaluate_sentences, samples

TEXTS = [f"w{i % 3} w{i % 5} w{i % 7}" for i in range(30)]


@pytest.fixture(scope="module")
def trained():
    """A small model that knows its thirty sentences."""
    tokenizer = train_tokenizer(TEXTS)
    torch.manual_seed(0)
    model = TextVAE(TextVAEConfig(vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, latent_dim=8))
    optimizer, inputs = torch.optim.AdamW(model.parameters(), lr=1e-2), tokenizer(TEXTS, return_tensors="pt")
    for _ in range(250):
        optimizer.zero_grad()
        model(**inputs, beta=0.01).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer, Rows(Dataset.from_dict({"text": TEXTS}), TextColumn("text", tokenizer))


def test_what_is_known_by_heart_is_written_again(trained, monkeypatch):
    model, tokenizer, rows = trained
    figures = evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, TEXTS, num_generated=30)
    assert figures["reconstruction/exact_match"] > 0.9 and figures["reconstruction/bleu"] > 90
    assert 0 < figures["samples/repeated"] < 1 and 0 < figures["samples/distinct_1"] < 0.5
    monkeypatch.setattr("mmvae.sentences.CHUNK", 30)
    few = evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, num_generated=10)
    assert "samples/repeated" not in few  # nothing is known
    torch.manual_seed(7)  # the samples follow their own seed
    assert few == evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, num_generated=10)
    assert few != evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, num_generated=10, seed=1)


def test_the_first_samples_are_those_drawn_first(trained, monkeypatch):
    model, tokenizer, _ = trained
    monkeypatch.setattr("mmvae.sentences.CHUNK", 5)
    drawn = samples(Accelerator(cpu=True), model, tokenizer, 15)
    assert drawn[:5] == samples(Accelerator(cpu=True), model, tokenizer, 5)  # not those first in the alphabet, which are like each other
    assert len(drawn) == 15 and len(set(drawn)) > 5
