"""What a text VAE writes is measured the same on any batch, and by what it says."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from mmvae import TextVAE, TextVAEConfig
from mmvae.data import Rows, TextColumn
from mmvae.processing import train_tokenizer
from mmvae.sentences import evaluate_sentences, forward_perplexity, samples

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


def test_figures_are_of_the_options_given_not_of_the_folders(trained, tmp_path):
    model, tokenizer, rows = trained
    accelerator = Accelerator(cpu=True)
    expected = evaluate_sentences(accelerator, model, tokenizer, rows, TEXTS, num_generated=30)
    model.save_pretrained(tmp_path)
    told = TextVAE.from_pretrained(tmp_path).eval()
    for name, value in {"do_sample": True, "temperature": 3.0, "top_p": 0.5, "num_beams": 2, "repetition_penalty": 1.5}.items():
        setattr(told.generation_config, name, value)
    told.save_pretrained(tmp_path)
    told = TextVAE.from_pretrained(tmp_path).eval()
    assert evaluate_sentences(accelerator, told, tokenizer, rows, TEXTS, num_generated=30) == expected
    assert told.generation_config.temperature == 3.0  # and the model keeps its own


def test_the_first_samples_are_those_drawn_first(trained, monkeypatch):
    model, tokenizer, _ = trained
    monkeypatch.setattr("mmvae.sentences.CHUNK", 5)
    drawn = samples(Accelerator(cpu=True), model, tokenizer, 15)
    assert drawn[:5] == samples(Accelerator(cpu=True), model, tokenizer, 5)  # not those first in the alphabet, which are like each other
    assert len(drawn) == 15 and len(set(drawn)) > 5


def test_samples_are_as_long_as_is_asked_for(trained):
    model, tokenizer, _ = trained
    assert {len(text.split()) for text in samples(Accelerator(cpu=True), model, tokenizer, 15, 2)} == {2}


def test_what_is_suppressed_is_not_written(trained):
    model, tokenizer, rows = trained
    word = tokenizer.convert_tokens_to_ids("w1")
    free, without = (samples(Accelerator(cpu=True), model, tokenizer, 30, suppress_tokens=given) for given in (None, [word]))
    assert any("w1" in text.split() for text in free) and not any("w1" in text.split() for text in without)
    figures = [
        evaluate_sentences(Accelerator(cpu=True), model, tokenizer, rows, TEXTS, num_generated=30, suppress_tokens=given)
        for given in (None, [word])
    ]
    assert figures[1]["reconstruction/exact_match"] < figures[0]["reconstruction/exact_match"]


def test_every_word_that_the_model_gives_weight_may_be_drawn():
    """transformers draws from the 50 likeliest words unless told."""
    words = [f"word{i}" for i in range(120)]
    tokenizer = train_tokenizer(words)
    model = language_model(tokenizer)
    with torch.no_grad():
        model.lm_head.bias += 1e-3 * torch.arange(len(tokenizer))  # no two alike
    told = {word for text in samples(Accelerator(cpu=True), model, tokenizer, 120) for word in text.split()}
    assert len(told & set(words)) > 100


def language_model(tokenizer, **log_probs: float) -> TextVAE:
    """A language model that draws every token by itself: those named with a probability, the others alike."""
    model = TextVAE(TextVAEConfig(vocab_size=len(tokenizer), embedding_size=4, hidden_size=4, latent_dim=0)).eval()
    ids = tokenizer.convert_tokens_to_ids(list(log_probs))
    rest = (1 - sum(math.exp(value) for value in log_probs.values())) / (len(tokenizer) - len(ids))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(math.log(rest))
        model.lm_head.bias[ids] = torch.tensor(list(log_probs.values()))
    return model


def test_forward_perplexity_is_that_of_every_token_eos_included(trained):
    model, tokenizer, rows = trained
    accelerator, texts = Accelerator(cpu=True), ["w0 w1 w0", "", "w0 never"]
    alike = forward_perplexity(accelerator, language_model(tokenizer), tokenizer, texts)
    assert alike["forward_perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)  # whatever the texts are
    few = language_model(tokenizer, w0=math.log(0.5), **{"<unk>": math.log(0.125), "<eos>": math.log(0.25)})
    figures = forward_perplexity(accelerator, few, tokenizer, ["w0 w0", "", "w0 never"])
    nats = 3 * math.log(2) + math.log(8) + 3 * math.log(4)  # w0 three times, the unknown word, EOS three times
    assert figures["forward_nll_nats"] == pytest.approx(nats / 3, rel=1e-5)
    assert figures["forward_perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-5)
    assert figures["forward_unknown"] == pytest.approx(1 / 7)
    both = train_tokenizer(TEXTS)
    both.unk_token = both.eos_token  # as GPT-2 has it
    assert forward_perplexity(accelerator, few, both, ["w0 w0", ""])["forward_unknown"] == 0
    scored = evaluate_sentences(accelerator, model, tokenizer, rows, TEXTS, reference=(few, tokenizer), num_generated=10)
    drawn = samples(accelerator, model, tokenizer, 10)
    assert scored["samples/forward_perplexity"] == forward_perplexity(accelerator, few, tokenizer, drawn)["forward_perplexity"]
    with pytest.raises(ValueError, match="reference: received a model with latent_dim 8, expected 0"):
        forward_perplexity(accelerator, model, tokenizer, texts)
