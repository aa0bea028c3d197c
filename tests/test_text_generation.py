"""That greedy and random decoding writes what transformers' own loop writes, with less work."""

import math
from unittest import mock

import pytest
import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper

from mmvae import TextVAE, TextVAEConfig
from mmvae.models.text_generation import largest

EOS = 2
GREEDY = [{}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {"min_new_tokens": 5, "bad_words_ids": [[5], [6, 7]]}]
GREEDY += [{"do_sample": True, "top_k": 1}, {"max_length": 2}, {"eos_token_id": [EOS, 7, 9]}, {"suppress_tokens": [EOS]}]


@pytest.fixture(scope="module", params=[{}, {"num_classes": 3, "decoder_layers": 2}], ids=str)
def model(request):
    torch.manual_seed(2)
    model = TextVAE(TextVAEConfig(vocab_size=12, embedding_size=6, hidden_size=8, latent_dim=3, **request.param)).eval()
    with torch.no_grad():
        for parameter in (*model.decoder.parameters(), model.lm_head.weight):
            parameter.normal_(std=1.5)  # sentences of many lengths
        model.lm_head.bias[0] = -100.0  # and no padding inside them
        model.lm_head.bias[EOS] += 2.0
    return model


def write(model, latents, **options):
    classes = {"class_labels": torch.arange(len(latents)) % 3} if model.config.num_classes else {}
    return model.generate(latents=latents, **classes, **{"max_new_tokens": 15} | options)


@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_what_is_written_is_what_transformers_writes(model, options):
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    ours = write(model, z, **options)
    with mock.patch.object(TextVAE, "_sample", GenerationMixin._sample):
        assert torch.equal(ours, write(model, z, **options))
    if not options:
        assert len((ours != model.config.pad_token_id).sum(1).unique()) > 3


def test_random_words_have_their_probability(model):
    torch.manual_seed(1)
    z, classes = torch.randn(1, 3), {"class_labels": torch.tensor([1])} if model.config.num_classes else {}
    every = {"latents": z.expand(4000, -1)} | {name: label.expand(4000) for name, label in classes.items()}
    words = model.generate(**every, max_new_tokens=2, do_sample=True, top_k=0)
    first, second = words[:, 1], words[:, 2]
    common = int(first.masked_fill(first == EOS, -1).mode().values)
    p = model(input_ids=torch.tensor([[1, common]]), latents=z, **classes).logits[0].softmax(-1)
    for drawn, expected in ((first, p[0]), (second[first == common], p[1])):
        share = drawn.bincount(minlength=12) / len(drawn)
        assert ((share - expected).abs() < 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-3).all()


def test_a_generator_makes_sampled_words_repeatable_too(model):
    ids = torch.tensor([[1, 5, 6, EOS], [1, 7, 8, EOS]])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8}
    given = {"latents": torch.randn(2, 3)} | ({"class_labels": torch.tensor([1, 2])} if model.config.num_classes else {})
    writers = [lambda g: model.generate(**given, generator=g, **options), lambda g: model.sample(2, g, **options)]
    writers += [
        lambda g: model.generate(input_ids=ids, generator=g, **options),
        lambda g: model.reconstruct(input_ids=ids, generator=g, **options),
    ]
    for write_by in writers:
        same, again, other = (write_by(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(same, again) and not (same.shape == other.shape and torch.equal(same, other))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model.generate(**given, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(torch.rand(2), expected)  # torch's own generator is left as it was


def test_finished_rows_leave_the_batch(model):
    seen, z = [], torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    words = write(model, z)
    hook.remove()
    lengths = (words != model.config.pad_token_id).sum(1)
    assert seen == [int((lengths > end).sum()) for end in range(1, words.shape[1])]
    assert seen[-1] < seen[0] == 40


def test_what_looks_at_the_whole_batch_is_left_to_transformers(model):
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    asked = []

    def allowed(row, words):
        asked.append(row)
        return [4 + row]

    assert write(model, z, prefix_allowed_tokens_fn=allowed, max_new_tokens=2).tolist() == [[1, 4 + row, 4 + row] for row in range(5)]
    assert asked == [0, 1, 2, 3, 4] * 2

    class Mine(TopKLogitsWarper):
        def __call__(self, input_ids, scores):
            assert len(scores) == 5
            return scores

    write(model, z, logits_processor=LogitsProcessorList([Mine(2)]))
    assert len(write(model, z, return_dict_in_generate=True, output_scores=True).scores[-1]) == 5


@pytest.mark.parametrize("size", [1, 50, 1024, 1087, 1088, 1089, 10_002])
def test_the_largest_score_is_that_of_argmax(size):
    scores = torch.randn(200, size)
    scores[:20] = scores[:20].round()  # equal ones
    scores[20, size // 2], scores[21, size - 1], scores[22, 0] = math.inf, math.inf, math.nan
    scores[23] = -math.inf
    assert torch.equal(largest(scores), scores.argmax(-1))
