"""Texts made from texts: the decoder attends to its source's states, in the rows that have one, and to nothing else."""

import itertools
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import GenerationMixin

from mmvae import MMVAE, ImageVAEConfig, MMVAEConfig, TextVAE, TextVAEConfig

SMALL = {"vocab_size": 12, "embedding_size": 6, "hidden_size": 8, "latent_dim": 3}
PAD, BOS, EOS, SIZE = 0, 1, 2, 16
EN = torch.tensor([[BOS, 5, 6, 7, EOS], [BOS, 9, EOS, PAD, PAD], [BOS, 4, 4, EOS, PAD], [BOS, 8, EOS, PAD, PAD]])
DE = torch.tensor([[BOS, 8, 9, EOS], [BOS, 7, 7, EOS], [BOS, EOS, PAD, PAD], [BOS, 10, EOS, PAD]])


def sharp(model):
    """Predictions far from uniform, which hang on the source."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


def text(**options) -> TextVAE:
    torch.manual_seed(0)
    return sharp(TextVAE(TextVAEConfig(**SMALL | {"source_size": SIZE} | options)))


def joint(sources=None, **options) -> MMVAE:
    torch.manual_seed(0)
    sources = {"de": "en", "en": "de"} if sources is None else sources
    vaes = {name: TextVAEConfig(**SMALL, bidirectional=True, source_size=SIZE if name in sources else 0) for name in ("en", "de")}
    return sharp(MMVAE(MMVAEConfig(**{"modalities": vaes, "sources": sources, "aggregation": "poe"} | options)))


def source(rows: int = 4, length: int = 5) -> torch.Tensor:
    states = torch.randn(rows, length, SIZE, generator=torch.Generator().manual_seed(1))
    states[1:2, 2:] = 0
    return states


def seen(*names: str, rows: int = 4) -> torch.Tensor:
    return torch.tensor([name in names for name in ("en", "de")]).expand(rows, 2)


def test_without_a_source_it_is_the_model_without_attention_bit_for_bit():
    attending, plain = text(), text(source_size=0)
    plain.load_state_dict({name: x for name, x in attending.state_dict().items() if "attention" not in name})
    z, target = torch.randn(2, 1, 4, 3), DE[:, 1:]
    expected = plain.decode(z).log_prob(target)
    for nothing in (None, torch.zeros(4, 5, SIZE), torch.zeros(4, 0, SIZE)):
        assert torch.equal(attending.decode(z, source=nothing).log_prob(target), expected)
        for options in ({}, {"num_beams": 3}):
            written = attending.generate(latents=z[0, 0], source=nothing, max_new_tokens=6, **options)
            assert torch.equal(written, plain.generate(latents=z[0, 0], max_new_tokens=6, **options))
    some = source()
    some[2] = 0  # a row of several that has no source
    log_prob = attending.decode(z, source=some).log_prob(target)
    assert torch.equal(log_prob[..., 2], expected[..., 2]) and (log_prob != expected)[..., [0, 1, 3]].all()


def test_with_a_source_probabilities_of_all_sentences_sum_to_one():
    model, longest = text(vocab_size=4), 3
    words = [token for token in range(4) if token != EOS]
    complete = [[*w, EOS] for n in range(longest) for w in itertools.product(words, repeat=n)]
    target = torch.tensor([s + [-100] * (longest - len(s)) for s in complete + [[*w] for w in itertools.product(words, repeat=longest)]])
    z, states = torch.randn(1, 3).expand(len(target), 3), source(1).expand(len(target), -1, -1)
    assert model.decode(z, source=states).log_prob(target).double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_vocabulary_loss_in_chunks_is_that_of_the_logits_and_has_its_gradient():
    model, z, states = text(decoder_layers=2, tie_word_embeddings=True), torch.randn(3, 4, 3), source()  # three samples of four rows
    gradients = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            logits = torch.stack([model(DE[:, :-1], latents=each, source=states).logits for each in z])
            each = F.cross_entropy(logits.flatten(0, 2), DE[:, 1:].repeat(3, 1).flatten(), reduction="none", ignore_index=PAD).view(
                3, 4, -1
            )
            nll = each.sum(-1)
        else:
            nll = -model.decode(z, source=states).log_prob(DE[:, 1:].masked_fill(DE[:, 1:] == PAD, -100))
        nll.mean().backward()
        gradients.append(
            [nll.detach(), *(p.grad.clone() for name, p in model.named_parameters() if name.startswith(("decoder", "lm_head")))]
        )
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert all(g.any() for g in (model.decoder.attention.to_query.weight.grad, model.decoder.attention.from_source.weight.grad))


def test_generation_from_the_cache_is_that_of_teacher_forcing():
    model, z, states = text(), torch.randn(4, 3), source()
    with torch.no_grad():
        model.lm_head.bias[PAD] -= 1000
    tokens = torch.full((4, 1), BOS)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens, latents=z, source=states).logits[:, -1:].argmax(-1)], 1)
    after = (tokens == EOS).cumsum(1) - (tokens == EOS).int() > 0
    expected = tokens.masked_fill(after, PAD)
    for options in ({}, {"use_cache": False}, {"do_sample": True, "top_k": 1}):
        written = model.generate(latents=z, source=states, max_new_tokens=6, **options)
        assert torch.equal(written, expected[:, : written.shape[1]]) and not expected[:, written.shape[1] :].any()
        with mock.patch.object(TextVAE, "_sample", GenerationMixin._sample):
            assert torch.equal(model.generate(latents=z, source=states, max_new_tokens=6, **options), written)
    assert not torch.equal(written, model.generate(latents=z, max_new_tokens=6)[:, : written.shape[1]])
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 5, "length_penalty": 0.0, "return_dict_in_generate": True}
    found = model.generate(latents=z, source=states, output_scores=True, **options)
    ids = found.sequences[:, 1:]
    target = ids.masked_fill((ids == EOS).cumsum(1) - (ids == EOS).int() > 0, -100)
    own = model.decode(z.repeat_interleave(2, 0), source=states.repeat_interleave(2, 0)).log_prob(target)
    torch.testing.assert_close(own, found.sequences_scores, atol=1e-3, rtol=1e-3)  # beams keep their source


def test_a_rows_tokens_reach_its_decoder_by_the_latent_alone():
    model, z = joint(), torch.randn(1, 1, 4, 3)  # given: it depends on nothing
    q = model.posterior(en_input_ids=EN, de_input_ids=DE, visible=seen("en"))
    q.states["en"].retain_grad()
    log_px = model.log_px(z, q, en_input_ids=EN, de_input_ids=DE)
    log_px["de"][0, 0, 1].backward(retain_graph=True)
    assert q.states["en"].grad[1].any() and not q.states["en"].grad[[0, 2, 3]].any()  # its own row's source alone
    assert not q.states["en"].grad[1, 3:].any() and not q.states["de"].any()
    parts = [(name, p.grad) for name, p in model.named_parameters() if ".encoder" in name and p.grad is not None]
    assert {name.split(".")[1] for name, grad in parts if grad.any()} == {"en"}
    for visible, target in ((seen("en"), "en"), (seen("en", "de"), "en"), (seen("en", "de"), "de"), (seen("de"), "de")):
        model.zero_grad()
        q = model.posterior(en_input_ids=EN, de_input_ids=DE, visible=visible)
        model.log_px(z, q, en_input_ids=EN, de_input_ids=DE)[target].sum().backward()
        assert not any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".encoder" in name)


def test_what_is_seen_whole_is_scored_as_without_sources_bit_for_bit():
    attending, plain = joint(), joint({})
    plain.load_state_dict({name: x for name, x in attending.state_dict().items() if "attention" not in name})
    inputs = {"en_input_ids": EN, "de_input_ids": DE, "noise_key": torch.arange(4)}
    assert torch.equal(attending(**inputs).loss_rows, plain(**inputs).loss_rows)
    assert torch.equal(attending.log_marginal(5, **inputs), plain.log_marginal(5, **inputs))
    one = inputs | {"visible": torch.tensor([[True, False], [True, True], [False, True], [True, False]])}
    different = attending(**one).log_px_by_modality != plain(**one).log_px_by_modality
    assert different.tolist() == [[False, True], [False, False], [True, False], [False, True]]


def test_rows_that_are_permuted_alone_or_longer_have_the_same_results():
    model, order = joint(), torch.tensor([2, 0, 3, 1])
    present = torch.tensor([[True, True], [False, True], [True, True], [True, False]])
    inputs = {"en_input_ids": EN, "de_input_ids": DE, "present": present, "visible": present & torch.tensor([True, False])}
    inputs["noise_key"] = torch.arange(4)
    whole = model(**inputs).log_px_by_modality
    torch.testing.assert_close(model(**{name: x[order] for name, x in inputs.items()}).log_px_by_modality, whole[order])
    for row in range(4):
        torch.testing.assert_close(model(**{name: x[row : row + 1] for name, x in inputs.items()}).log_px_by_modality, whole[row : row + 1])
    longer = torch.cat([torch.full((4, 395), PAD), EN], 1)  # 400 tokens, most of them padding, at the left
    torch.testing.assert_close(model(**inputs | {"en_input_ids": longer}).log_px_by_modality, whole)
    made = model.generate("de", en_input_ids=EN, sample=False, max_new_tokens=5)
    torch.testing.assert_close(model.generate("de", en_input_ids=EN[order], sample=False, max_new_tokens=5), made[order])
    twice = model.generate("de", num_samples=2, en_input_ids=EN, sample=False, max_new_tokens=5)
    assert torch.equal(twice[::2], made) and torch.equal(twice[1::2], made)
    z, q = model.posterior(en_input_ids=EN).mixture.mean, model.posterior(en_input_ids=EN)
    assert torch.equal(model.render(z, "de", source=q.states["en"], max_new_tokens=5), made)


def test_the_conditional_likelihood_is_that_of_the_decoder_that_attends():
    model = joint({"de": "en"})
    with torch.no_grad():  # the latent says nothing, so that it is known exactly
        for part in (model.vaes["de"].decoder.to_state.weight, model.vaes["de"].decoder.gru.weight_ih_l0[:, -3:]):
            part.zero_()
    states = model.posterior(en_input_ids=EN).states["en"]
    target = model.vaes["de"].target(DE)
    expected = model.vaes["de"].decode(torch.zeros(4, 3), source=states).log_prob(target)
    alone = model.vaes["de"].decode(torch.zeros(4, 3)).log_prob(target)
    present = torch.tensor([[True, True], [True, True], [True, True], [False, True]])
    found = model.log_conditional("de", 4, torch.arange(4), en_input_ids=EN, de_input_ids=DE, present=present)
    torch.testing.assert_close(found[:3], expected[:3], atol=2e-4, rtol=1e-4)
    assert ((expected - alone)[:3].abs() > 0.05).all()
    alone = {"de_input_ids": DE[3:], "noise_key": torch.arange(3, 4)}
    torch.testing.assert_close(found[3:], model.log_marginal(4, **alone))  # with nothing to read it is log p(de)


def test_a_source_is_learned_from_where_a_latent_has_no_room():
    torch.manual_seed(0)
    vaes = {
        name: TextVAEConfig(**SMALL | {"latent_dim": 1, "hidden_size": 16}, bidirectional=True, source_size=32) for name in ("en", "de")
    }
    model = MMVAE(MMVAEConfig(modalities=vaes, sources={"de": "en", "en": "de"}, aggregation="poe")).train()
    words = torch.randint(4, 12, (64, 4))
    ids = torch.cat([torch.full((64, 1), BOS), words, torch.full((64, 1), EOS)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(en_input_ids=ids, de_input_ids=ids, visible=seen("en", rows=64)).loss.backward()
        optimizer.step()
    model.eval()
    made = model.generate("de", en_input_ids=ids, max_new_tokens=5)
    alone = model.render(model.posterior(en_input_ids=ids).mixture.mean, "de", max_new_tokens=5)
    assert (made[:, 1:5] == words).float().mean() > 0.8 > 2 * (alone[:, 1:5] == words[:, : alone.shape[1] - 1]).float().mean()


TWO = {"en": TextVAEConfig(**SMALL), "de": TextVAEConfig(**SMALL), "image": ImageVAEConfig(image_size=8, latent_dim=3)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MMVAEConfig(modalities=TWO, sources={"de": "fr"}),
            "sources: received 'fr' for 'de', expected another modality that is a text",
        ),
        (lambda: MMVAEConfig(modalities=TWO, sources={"de": "de"}), "sources: received 'de' for 'de'"),
        (lambda: MMVAEConfig(modalities=TWO, sources={"de": "image"}), "sources: received 'image' for 'de'"),
        (lambda: MMVAEConfig(modalities=TWO, sources={"image": "en"}), r"modalities\['image'\].source_size: received None, expected 8"),
        (lambda: MMVAEConfig(modalities=TWO, sources={"de": "en"}), r"modalities\['de'\].source_size: received 0, expected 8, the size of"),
        (lambda: TextVAEConfig(**SMALL, source_size=8, num_classes=3), "TextVAEConfig.source_size: received 8, expected 0 with 3 classes"),
        (lambda: text().decode(torch.zeros(4, 3), source=source(3)), r"source: received shape \(3, 5, 16\), expected \(4, tokens, 16\)"),
        (lambda: text().generate(latents=torch.zeros(4, 3), source=source()[..., :8]), r"source: received shape \(4, 5, 8\), expected"),
        (lambda: text(source_size=0).decode(torch.zeros(4, 3), source=source()), "expected None where source_size is 0"),
        (lambda: text(source_size=0)(EN, source=source()), "unknown argument 'source'"),
    ],
)
def test_what_cannot_be_a_source_is_named(build, message):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        build()
