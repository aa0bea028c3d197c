"""TextVAE: a normalised distribution over sentences, padding that changes nothing, and generation by every strategy."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.noise import fold
from mmvae.objectives import dreg, elbo

SMALL = {"vocab_size": 20, "embedding_size": 6, "hidden_size": 8, "latent_dim": 3}
BOS, EOS, PAD = 1, 2, 0


def make(**options) -> TextVAE:
    """A small model whose predictions are far from uniform."""
    model = TextVAE(TextVAEConfig(**SMALL | options)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        model.decoder.to_state.weight.mul_(3)
        model.decoder.embed_tokens.weight.mul_(5)
    return model


def batch(*sentences: list[int], width: int | None = None) -> dict[str, torch.Tensor]:
    width = width or max(map(len, sentences))
    ids = torch.tensor([s + [PAD] * (width - len(s)) for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sentences])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"decoder_layers": 2}, {"tie_word_embeddings": True}, {"latent_skip": True}], ids=str)
def test_probabilities_of_all_sentences_sum_to_one(options):
    model, longest = make(vocab_size=4, **options), 3
    words = [token for token in range(4) if token != EOS]
    complete = [[*w, EOS] for n in range(longest) for w in itertools.product(words, repeat=n)]
    unfinished = [list(w) for w in itertools.product(words, repeat=longest)]
    target = torch.tensor([s + [-100] * (longest - len(s)) for s in complete + unfinished])
    z = torch.randn(1, 1, 3).expand(2, len(target), 3)  # (S, B, D)
    total = model.decode(z).log_prob(target).double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_chain_rule_by_hand():
    model = make(decoder_layers=2)
    z, sentence = torch.randn(1, 3), [BOS, 5, 9, 5, EOS]
    hidden, expected = None, 0.0
    for token, following in itertools.pairwise(sentence):
        state, hidden = model.decoder(torch.tensor([[token]]), z, hidden)
        expected += model.lm_head(state)[0, 0].log_softmax(-1)[following].item()
    received = model.decode(z).log_prob(torch.tensor([sentence[1:]]))
    assert received.item() == pytest.approx(expected, abs=1e-4)
    assert model.decode(z).token_log_prob(torch.tensor([[5, -100]]))[0, 1] == 0


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_and_company_change_nothing(layers, bidirectional):
    model = make(encoder_layers=layers, decoder_layers=layers, bidirectional=bidirectional)
    sentences = [[BOS, 5, 6, 7, 8, EOS], [BOS, EOS], [BOS, 9, EOS], [BOS, 5, 6, 7, 8, 11, 12, EOS]]
    keys = fold(0, torch.arange(4))
    whole = model(**batch(*sentences, width=15), noise_key=keys, sample_posterior=True)
    for row, sentence in enumerate(sentences):
        for width in (len(sentence), len(sentence) + 9):
            alone = model(**batch(sentence, width=width), noise_key=keys[row : row + 1], sample_posterior=True)
            for name in ("loss_rows", "latent_mean", "latents", "log_px"):
                torch.testing.assert_close(alone[name][0], whole[name][row], rtol=1e-4, atol=1e-4)
    noisy = batch(*sentences, width=15)
    noisy["input_ids"] = noisy["input_ids"].masked_fill(noisy["attention_mask"] == 0, 13)
    torch.testing.assert_close(model(**noisy).loss_rows, model(**batch(*sentences)).loss_rows, rtol=1e-4, atol=1e-4)


def test_a_missing_mask_is_made_from_the_padding():
    model, inputs = make(), batch([BOS, 5, EOS], [BOS, 5, 6, 7, EOS])
    assert torch.equal(model(input_ids=inputs["input_ids"]).loss_rows, model(**inputs).loss_rows)
    assert model.target(**inputs).tolist() == [[5, EOS, -100, -100], [5, 6, 7, EOS]]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "encoder_layers": 2}], ids=str)
def test_padding_may_be_at_either_side(options):
    model, keys = make(**options), fold(0, torch.arange(3))
    right = batch([BOS, 5, EOS], [BOS, 5, 6, 7, EOS], [BOS, EOS], width=7)
    lengths = right["attention_mask"].sum(1).tolist()
    left = {name: torch.stack([row.roll(7 - n) for row, n in zip(rows, lengths, strict=True)]) for name, rows in right.items()}
    expected = model(**right, noise_key=keys, sample_posterior=True)
    masks = (left["attention_mask"], left["attention_mask"].bool(), left["attention_mask"].float(), None)
    for mask in masks:
        inputs = {"input_ids": left["input_ids"], "attention_mask": mask}
        out = model(**inputs, noise_key=keys, sample_posterior=True)
        for name in ("loss_rows", "latent_mean", "latents", "log_px"):
            assert torch.equal(out[name], expected[name]), name
        assert torch.equal(model.target(**inputs), model.target(**right))
    embedded = {"inputs_embeds": model.encoder_embedding(left["input_ids"]), "attention_mask": left["attention_mask"]}
    assert torch.equal(model.encode(**embedded).mean, expected.latent_mean)
    assert torch.equal(model.generate(**left, max_new_tokens=5), model.generate(**right, max_new_tokens=5))


@pytest.mark.parametrize("special", [{"pad_token_id": EOS}, {"pad_token_id": BOS}], ids=str)
def test_padding_that_looks_like_a_sentence_end_needs_a_mask(special):
    model, inputs = make(**special), batch([BOS, 5, EOS], [BOS, 5, 6, 7, EOS])
    assert model.target(**inputs).tolist() == [[5, EOS, -100, -100], [5, 6, 7, EOS]]
    assert model(**inputs).loss.isfinite()
    for call in (model, model.encode, model.target, model.generate):
        with pytest.raises(ValueError, match="attention_mask: received None, expected a mask since pad_token_id . is also BOS or EOS"):
            call(input_ids=inputs["input_ids"])
    assert model.generate(latents=torch.zeros(2, 3), max_new_tokens=3).shape[0] == 2


def test_what_is_not_a_tensor_is_named():
    model, ids = make(), [[BOS, 5, EOS]]
    for wrong in (ids, np.array(ids)):
        for call in (model, model.encode, model.target, model.reconstruct):
            with pytest.raises(TypeError, match="input_ids: received a (list|ndarray), expected a tensor"):
                call(input_ids=wrong)
            with pytest.raises(TypeError, match="attention_mask: received a (list|ndarray), expected a tensor"):
                call(input_ids=torch.tensor(ids), attention_mask=wrong)
    with pytest.raises(ValueError, match=r"attention_mask: received shape \(1, 2\), expected \(1, 3\)"):
        model(input_ids=torch.tensor(ids), attention_mask=torch.ones(1, 2))


def test_rows_without_words_have_defined_results():
    model = make().train()
    for inputs in (batch([BOS]), batch([BOS], [BOS, 5, EOS]), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}):
        out = model(**inputs)
        assert out.loss_rows.isfinite().all()
        assert out.log_px[0] == 0
        out.loss.backward()
    assert model(**batch([BOS, *[3] * 500, EOS])).loss.isfinite()
    for ids in (None, torch.zeros(3, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="input_ids: received shape .*, expected"):
            model(input_ids=ids)


def greedy(model: TextVAE, z: torch.Tensor, steps: int) -> torch.Tensor:
    tokens, done = torch.full((len(z), 1), BOS), torch.zeros(len(z), dtype=torch.bool)
    for _ in range(steps):
        logits = model(input_ids=tokens, latents=z).logits[:, -1]
        following = logits.argmax(-1).where(~done, PAD)
        tokens, done = torch.cat([tokens, following.unsqueeze(1)], 1), done | (following == EOS)
        if done.all():
            break
    return tokens


@pytest.mark.parametrize("layers", [1, 2])
def test_greedy_generation_equals_a_loop_with_and_without_the_cache(layers):
    model, z = make(decoder_layers=layers), 3 * torch.randn(12, 3)
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1.5
        expected = greedy(model, z, 9)
    lengths = (expected == EOS).int().argmax(1)
    assert len(lengths.unique()) > 1  # some rows end early and are padded
    for use_cache in (True, False):
        assert torch.equal(model.generate(latents=z, max_new_tokens=9, use_cache=use_cache), expected)
    assert torch.equal(model.render(z, max_new_tokens=9), expected)
    alone = model.generate(latents=z[3:4], max_new_tokens=9)[0]
    assert torch.equal(alone, expected[3, : len(alone)])
    assert not expected[3, len(alone) :].any()


def scores(model: TextVAE, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p(ids|z) up to and including EOS."""
    mask = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), (ids[:, :-1] == EOS).cumsum(1) == 0], 1)
    return model.decode(z).log_prob(ids.masked_fill(~mask, -100)[:, 1:])


def test_sentences_of_beams_are_padded_as_others_are():
    model, z = make(), 3 * torch.randn(12, 3)
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1.5
    for options in ({}, {"num_return_sequences": 2}, {"return_dict_in_generate": True}):
        written = model.generate(latents=z, num_beams=4, max_new_tokens=9, **options)
        ids = written.sequences if "return_dict_in_generate" in options else written
        ends = (ids == EOS).sum(1)
        assert ends.max() == 1 and ids.shape[1] > 4
        assert not any(row[row.tolist().index(EOS) + 1 :].any() for row in ids[ends.bool()]), "PAD, which is 0, after EOS"


def test_beams_find_sentences_at_least_as_probable_as_the_greedy_ones():
    model, z = make(), 3 * torch.randn(16, 3)
    with torch.no_grad():
        model.lm_head.bias[EOS] -= 100  # sentences of one length, so that their probabilities compare
        for weight in (model.decoder.gru.weight_ih_l0, model.decoder.gru.weight_hh_l0):
            weight.mul_(4)  # what comes next depends on what was chosen, so that greed does not pay
    options = {"max_new_tokens": 5, "length_penalty": 0.0}
    best = model.generate(latents=z, num_beams=4, **options)
    wide = model.generate(latents=z[:2], num_beams=20, num_return_sequences=1, max_new_tokens=2, length_penalty=0.0)
    low, high = (scores(model, z, ids) for ids in (model.generate(latents=z, max_new_tokens=5), best))
    assert (high > low - 1e-4).all()
    assert (high > low + 1e-3).any()
    pairs = torch.cartesian_prod(torch.arange(20), torch.arange(20))  # 20 beams keep every first word: the search is exhaustive
    exhaustive = torch.stack([scores(model, z[:2], torch.tensor([[BOS, *p]]).expand(2, 3)) for p in pairs.tolist()]).amax(0)
    torch.testing.assert_close(scores(model, z[:2], wide), exhaustive, atol=1e-4, rtol=0)
    returned = model.generate(
        latents=z[:3], num_beams=4, num_return_sequences=3, return_dict_in_generate=True, output_scores=True, **options
    )
    assert returned.sequences.shape == (9, 6)
    own = scores(model, z[:3].repeat_interleave(3, 0), returned.sequences)
    torch.testing.assert_close(own, returned.sequences_scores, atol=1e-3, rtol=1e-3)  # rows and beams stay aligned


def test_sampling_follows_the_distribution():
    model, z = make(), torch.randn(1, 3)
    p = model(input_ids=torch.tensor([[BOS]]), latents=z).logits[0, 0].detach()

    def first(**options) -> torch.Tensor:
        ids = model.generate(latents=z, do_sample=True, max_new_tokens=1, num_return_sequences=4000, **options)
        assert ids.shape == (4000, 2)
        return torch.bincount(ids[:, 1], minlength=20) / 4000

    torch.testing.assert_close(first(top_k=0), p.softmax(0), atol=0.04, rtol=0)
    torch.testing.assert_close(first(top_k=0, temperature=3.0), (p / 3).softmax(0), atol=0.04, rtol=0)
    assert set(first(top_k=2).nonzero().flatten().tolist()) <= set(p.topk(2).indices.tolist())
    order = p.softmax(0).sort(descending=True)
    nucleus = order.indices[: int((order.values.cumsum(0) < 0.5).sum()) + 1]
    assert set(first(top_k=0, top_p=0.5).nonzero().flatten().tolist()) <= set(nucleus.tolist())
    torch.manual_seed(1)
    again = first(top_k=0)
    torch.manual_seed(1)
    assert torch.equal(first(top_k=0), again)


def test_several_returns_stay_beside_their_row():
    model, z = make(), 4 * torch.randn(3, 3)
    ids = model.generate(latents=z, do_sample=True, temperature=1e-4, num_return_sequences=2, max_new_tokens=6)
    assert torch.equal(ids[::2], ids[1::2])
    assert torch.equal(ids[::2], model.generate(latents=z, max_new_tokens=6))


def test_generation_reconstructs_from_ids_and_respects_lengths():
    model, inputs = make(), batch([BOS, 5, 6, 7, EOS], [BOS, 9, EOS])
    expected = model.generate(latents=model.encode(**inputs).mean, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)
    assert torch.equal(model.reconstruct(**inputs, max_new_tokens=6), expected)
    with torch.no_grad():
        model.lm_head.bias[EOS] -= 100
    z = torch.randn(2, 3)
    assert model.generate(latents=z).shape == (2, 65)
    assert model.generate(latents=z, max_length=5).shape == (2, 5)
    assert model.generate(latents=z, generation_config=GenerationConfig(max_length=7, bos_token_id=BOS)).shape == (2, 7)


def test_what_a_given_configuration_leaves_open_is_as_the_folder_has_it():
    model, z = make(), torch.randn(2, 3)
    with torch.no_grad():
        model.lm_head.bias[EOS] -= 100
    model.generation_config.max_length = 100
    assert model.generate(latents=z, generation_config=GenerationConfig(num_beams=2)).shape == (2, 100)
    model.generation_config.max_length, model.generation_config.do_sample = None, True
    assert model.generate(latents=z, generation_config=GenerationConfig(max_new_tokens=5), temperature=0.7).shape == (2, 6)
    with pytest.raises(ValueError, match="temperature: received 0.7 for a greedy search"):
        model.generate(latents=z, generation_config=GenerationConfig(do_sample=False), temperature=0.7)


def test_generation_names_what_is_wrong():
    model = make()
    with pytest.raises(ValueError, match=r"latents: received shape \(2, 4\), expected 3 at dimension -1"):
        model.generate(latents=torch.zeros(2, 4))
    for latents, received in ((torch.zeros(3), r"shape \(3,\)"), (torch.zeros(0, 3), r"shape \(0, 3\)"), ([[0.0, 0.0, 0.0]], "a list")):
        with pytest.raises(ValueError, match=rf"latents: received {received}, expected \(rows, 3\), at least one row"):
            model.generate(latents=latents)
    with pytest.raises(ValueError, match="latents: received nan in row 1, expected finite numbers"):
        model.generate(latents=torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, math.inf]]))
    for given in ({}, {"latents": torch.zeros(1, 3), "input_ids": torch.ones(1, 1, dtype=torch.long)}):
        with pytest.raises(ValueError, match="generate: received (neither|both) latents and input_ids, expected one"):
            model.generate(**given)
    with pytest.raises(ValueError, match="input_ids: received shape None"):
        model(latents=torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams: received 0, expected a whole number from 1 on"),
        (
            {"num_beams": 4, "top_p": 0.5},
            "top_p: received 0.5 for a beam search, which draws nothing: expected do_sample=True, or no top_p",
        ),
        ({"temperature": 0.7}, "temperature: received 0.7 for a greedy search, which draws nothing"),
        ({"temperature": 0}, "temperature: received 0, expected more than 0"),
        ({"temperature": "hot", "do_sample": True}, "temperature: received 'hot', expected more than 0"),
        ({"temperature": -1.0, "do_sample": True}, "temperature: received -1.0, expected more than 0"),
        ({"temperature": math.nan, "do_sample": True}, "temperature: received nan, expected more than 0"),
        ({"top_p": 2.0, "do_sample": True}, r"top_p: received 2.0, expected in \(0, 1\]"),
        ({"top_k": -1, "do_sample": True}, r"top_k: received -1, expected 0 \(all\) or more"),
        ({"top_h": 0.5}, "top_h: received 0.5 for a greedy search, which draws nothing"),
        ({"eta_cutoff": 0.1, "num_beams": 2}, "eta_cutoff: received 0.1 for a beam search, which draws nothing"),
        ({"epsilon_cutoff": -1.0, "do_sample": True}, r"epsilon_cutoff: received -1.0, expected in \[0, 1\)"),
        ({"length_penalty": 2.0}, "length_penalty: received 2.0 for one beam: expected num_beams from 2 on, or no length_penalty"),
        ({"early_stopping": True, "do_sample": True}, "early_stopping: received True for one beam: expected num_beams from 2 on"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping: received 'soon', expected True, False or 'never'"),
        ({"num_return_sequences": 0}, "num_return_sequences: received 0, expected a whole number from 1 on"),
        ({"num_return_sequences": 1.5, "do_sample": True}, "num_return_sequences: received 1.5, expected a whole number from 1 on"),
        ({"guidance_scale": 2.0}, "guidance_scale: received 2.0, expected none or 1: there is no prompt to guide by"),
    ],
)
def test_options_that_a_strategy_cannot_use_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make().generate(latents=torch.zeros(2, 3), **options)


@pytest.mark.parametrize(("token", "row"), [(77, 1), (-5, 0)])
def test_tokens_that_there_are_not_are_named(token, row):
    model, ids = make(), torch.tensor([[BOS, 5, EOS], [BOS, 5, EOS]])
    ids[row, 1] = token
    mask = torch.ones_like(ids)
    for call in (model.encode, model, model.generate):
        with pytest.raises(ValueError, match=rf"input_ids: received {token} in row {row}, expected 0 to \d+: is the tokenizer the model's"):
            call(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("hidden_size", [6, 8])
def test_tied_weights_are_one_tensor_and_survive_saving(hidden_size, tmp_path):
    model = make(tie_word_embeddings=True, hidden_size=hidden_size)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = TextVAE.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.decoder.embed_tokens.weight
    z = torch.randn(2, 3)
    assert torch.equal(again.generate(latents=z), model.generate(latents=z))
    assert make().lm_head.weight is not make().decoder.embed_tokens.weight


def test_a_shared_embedding_is_the_decoders():
    shared, own = make(share_embeddings=True), make()
    assert shared.encoder_embedding is None
    assert own.encoder_embedding.weight.shape == shared.decoder.embed_tokens.weight.shape
    shared.encode(**batch([BOS, 5, EOS])).mean.sum().backward()
    assert shared.decoder.embed_tokens.weight.grad[5].any()
    own.encode(**batch([BOS, 5, EOS])).mean.sum().backward()
    assert own.decoder.embed_tokens.weight.grad is None


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"share_embeddings": True}, {"bow_weight": 1.0}], ids=str)
def test_resizing_the_vocabulary(options):
    model = make(**options)
    inputs = batch([BOS, 5, 6, EOS])
    before = model.encode(**inputs).mean
    model.resize_token_embeddings(25)
    assert model.config.vocab_size == 25
    assert (model.lm_head.weight.shape[0], model.lm_head.bias.shape[0], len(model.decoder.embed_tokens.weight)) == (25, 25, 25)
    torch.testing.assert_close(model.encode(**inputs).mean, before)
    assert model.train()(**batch([BOS, 24, EOS])).loss.isfinite()
    assert type(model)(model.config).state_dict().keys() == model.eval().state_dict().keys()
    assert all(x.shape == model.state_dict()[name].shape for name, x in type(model)(model.config).state_dict().items())
    model.resize_token_embeddings(15)
    assert model(**inputs).loss.isfinite()
    with pytest.raises(ValueError, match="input_ids: received 24 in row 0, expected 0 to 14"):
        model(**batch([BOS, 24, EOS]))


def test_the_bag_of_words_has_the_same_gradient_under_every_objective():
    """dreg scales the gradient of a sample by its weight, but not that of what is maximised beside it."""
    model = make(bow_weight=1.0).train()
    inputs, key = batch([BOS, 5, 6, EOS], [BOS, 7, EOS]), torch.arange(2)

    def of_the_bag(objective):
        grads = []
        for model.config.bow_weight in (1.0, 0.0):
            loss = model(**inputs, num_samples=5, objective=objective, noise_key=key, sample_posterior=True).loss
            grads.append(torch.autograd.grad(loss, model.to_moments.weight)[0])
        return grads[0] - grads[1]

    expected = of_the_bag(elbo)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(of_the_bag(dreg), expected)


def test_word_dropout_hides_words_in_training_only():
    model = make(word_dropout=1.0)
    z, targets = torch.randn(1, 3), torch.tensor([[5, 6, EOS]])
    unknown = make(word_dropout=0.0)
    unknown.load_state_dict(model.state_dict())
    assert torch.equal(model.decode(z).log_prob(targets), unknown.decode(z).log_prob(targets))
    model.train()
    state = model.decoder(torch.tensor([[BOS, 3, 3]]), z)[0]
    expected = model.lm_head(state).log_softmax(-1).gather(2, targets.unsqueeze(2)).sum()
    torch.testing.assert_close(model.decode(z).log_prob(targets)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["embedding_dropout", "encoder_dropout", "dropout", "word_dropout"])
def test_every_dropout_acts_in_training_only(name):
    model, inputs = make(**{name: 0.5}, encoder_layers=2, decoder_layers=2), batch([BOS, *range(4, 12), EOS])
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    model.train()
    losses = {model(**inputs, sample_posterior=False).loss.item() for _ in range(4)}
    assert len(losses) > 1


def test_autocast_keeps_the_loss():
    model, inputs = make(), batch([BOS, 5, 6, 7, EOS], [BOS, 9, EOS])
    expected = model(**inputs).loss_rows
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(**inputs, sample_posterior=False)
    assert out.loss_rows.dtype == torch.float32
    torch.testing.assert_close(out.loss_rows, expected, rtol=0.05, atol=0.1)
    out.loss.backward()
    assert math.isfinite(sum(p.grad.abs().sum().item() for p in model.parameters()))


def test_a_skip_connection_brings_the_latent_to_every_state():
    plain, skips = (make(latent_skip=skip) for skip in (False, True))
    skips.load_state_dict(plain.state_dict(), strict=False)
    ids, z = torch.tensor([[BOS, 5, 6]]), torch.randn(1, 3)
    states = [model(ids, latents=z, output_hidden_states=True).hidden_states[0] for model in (plain, skips)]
    torch.testing.assert_close(states[1] - states[0], skips.decoder.skip(z).unsqueeze(1).expand(-1, 3, -1))
    cached = greedy(skips, z, 5)
    assert torch.equal(cached, skips.generate(latents=z, max_new_tokens=5)[:, : cached.shape[1]])


@pytest.mark.parametrize("classes", [0, 3])
def test_a_bag_of_words_counts_in_training_alone(classes):
    plain, bag = (TextVAE(TextVAEConfig(**SMALL, bow_weight=weight, num_classes=classes)) for weight in (0.0, 0.5))
    bag.load_state_dict(plain.state_dict(), strict=False)
    rows = batch([BOS, 5, 6, 6, EOS], [BOS, 7, EOS])
    options = rows | {"noise_key": torch.arange(2), "sample_posterior": True} | ({"labels": torch.tensor([2, 0])} if classes else {})
    with torch.no_grad():
        out, with_bag = plain.train()(**options), bag.train()(**options)
        z = with_bag.latents
        if classes:
            z = torch.cat([z, torch.nn.functional.one_hot(torch.tensor([2, 0]), 3)], -1)
        said = bag.word_bag(z).log_softmax(-1)
        expected = [said[0, [5, 6, 6, EOS]].sum(), said[1, [7, EOS]].sum()]
    torch.testing.assert_close(out.loss_rows - with_bag.loss_rows, 0.5 * torch.stack(expected))
    assert torch.equal(out.elbo, with_bag.elbo)
    assert torch.equal(plain.eval()(**options).loss, bag.eval()(**options).loss)


def test_a_scaled_mean_survives_saving(tmp_path):
    model = TextVAE(TextVAEConfig(**SMALL, mean_scale=0.7)).train()
    rows = batch(*[[BOS, *torch.randint(4, 20, (3,)).tolist(), EOS] for _ in range(40)])
    model(**rows)
    model.eval().save_pretrained(tmp_path)
    again = TextVAE.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.encode(**rows).mean, model.encode(**rows).mean)
    assert "to_moments.1.norm.running_mean" in again.state_dict()
