"""Metrics: closed forms, and log_marginal against the exact log p(x)."""

import math

import pytest
import torch
from linear_gaussian import linear_gaussian

from mmvae.distributions import DiagNormal
from mmvae.metrics import active_units, bits_per_dim, diversity, mutual_information, perplexity, psnr, recall_at, ssim, text_scores
from mmvae.noise import fold


def test_mutual_information_of_posteriors_that_never_overlap_is_the_log_of_their_number():
    q = DiagNormal(100.0 * torch.arange(50.0).unsqueeze(1), torch.zeros(50, 1))
    assert mutual_information(q) == pytest.approx(math.log(50), abs=1e-5)


def test_mutual_information_of_equal_posteriors_is_zero():
    q = DiagNormal(torch.ones(50, 3), torch.ones(50, 3))
    assert mutual_information(q) == pytest.approx(0, abs=1e-5)


def test_mutual_information_of_pairs():
    q = DiagNormal(100.0 * (torch.arange(50) // 2).float().unsqueeze(1), torch.zeros(50, 1))
    assert mutual_information(q) == pytest.approx(math.log(25), abs=1e-5)


def test_mutual_information_of_a_gaussian_channel():
    # z = x + noise with x ~ N(0, 3): I = log(1 + 3) / 2
    q = DiagNormal(3**0.5 * torch.randn(4000, 1), torch.zeros(4000, 1))
    assert mutual_information(q) == pytest.approx(0.5 * math.log(4), abs=0.05)


def test_mutual_information_is_bounded_and_does_not_depend_on_chunks():
    for size in (1, 2, 7, 40):
        q = DiagNormal(5 * torch.randn(size, 2, 2, 2), torch.randn(size, 2, 2, 2), 3)
        z = q.rsample()
        value = mutual_information(q, z)
        assert value <= math.log(size) + 1e-5
        assert mutual_information(q, z, chunk_size=3) == pytest.approx(value, abs=1e-5)


def test_active_units():
    mean = torch.zeros(100, 2, 2, 2)
    mean[:, 0, 0, 0] = torch.randn(100)
    mean[:, 1, 1, 1] = 0.2 * torch.randn(100)
    mean[:, 0, 1, 0] = 0.01 * torch.randn(100)
    mean[:, 1, 0, 0] = 7.0
    assert active_units(mean) == 2
    assert active_units(mean, threshold=0.5) == 1
    assert active_units(torch.tensor([[0.0], [1.0]]), threshold=0.5) == 1  # the variance over N - 1 is 1/2


def test_conversions():
    assert bits_per_dim(3 * 8 * 8 * 5 * math.log(2), 3 * 8 * 8) == pytest.approx(5)
    assert perplexity(12 * math.log(7), 12) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf


def test_psnr_and_ssim_of_each_picture():
    reference = torch.rand(3, 3, 16, 16)
    pixels = reference.clone()
    pixels[1] = (pixels[1] + 0.1).clamp(0, 2)
    received = psnr(pixels, reference)
    assert received.shape == (3,)
    assert received[1].item() == pytest.approx(20, abs=1e-3)
    assert received[0].isinf()
    value = ssim(pixels, reference)
    torch.testing.assert_close(value[[0, 2]], torch.ones(2))
    assert value[1] < 1
    torch.testing.assert_close(ssim(pixels[1:2], reference[1:2]), value[1:2])
    assert ssim(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)).shape == (2,)


@pytest.mark.parametrize("prior", ["standard_normal"])
def test_log_marginal_is_exact_with_the_exact_posterior(prior):
    model, x = linear_gaussian(True, prior=prior)
    for num_samples in (1, 5, 30):
        received = model.log_marginal(values=x, num_samples=num_samples, chunk_size=4)
        torch.testing.assert_close(received.double(), model.exact_log_marginal(x), rtol=1e-6, atol=1e-6)


def test_log_marginal_converges_with_an_inexact_posterior():
    model, x = linear_gaussian(False)
    received = model.log_marginal(values=x, num_samples=20_000)
    torch.testing.assert_close(received.double(), model.exact_log_marginal(x), atol=0.02, rtol=0)


def test_log_marginal_does_not_depend_on_chunks_and_encodes_once_in_bounded_memory():
    model, x = linear_gaussian(False)
    keys = fold(0, torch.arange(len(x)))
    values = []
    for chunk_size in (1, 7, 100, 1000, None):
        model.calls, model.most_rows = 0, 0
        values.append(model.log_marginal(values=x, num_samples=100, chunk_size=chunk_size, noise_key=keys))
        assert model.calls == 1
        assert model.most_rows == min(chunk_size or 512 // len(x), 100) * len(x)
        torch.testing.assert_close(values[-1], values[0])
    model.log_marginal(values=x, num_samples=3000)
    assert model.most_rows <= 512


def test_log_marginal_follows_the_keys():
    model, x = linear_gaussian(False)
    keys = fold(0, torch.arange(len(x)))
    value = model.log_marginal(values=x, num_samples=3, noise_key=keys)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model.log_marginal(values=x[order], num_samples=3, noise_key=keys[order]), value[order])
    assert not torch.allclose(model.log_marginal(values=x, num_samples=3, noise_key=keys + 1), value)
    assert not torch.allclose(model.log_marginal(values=x, num_samples=3), model.log_marginal(values=x, num_samples=3))


def test_recall_counts_the_better_ones():
    scores = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0]])
    assert [recall_at(scores, k).tolist() for k in (1, 2, 3)] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert recall_at(scores, 9).tolist() == [1, 1, 1, 1]
    assert recall_at(scores[:2], 1, torch.tensor([3, 0])).tolist() == [0, 1]


def test_recall_shares_ties_so_that_equal_scores_are_chance():
    assert recall_at(torch.zeros(10, 10), 3).tolist() == pytest.approx([0.3] * 10)
    scores = torch.tensor([[1.0, 5, 1, 1, 0]])  # one is better, three are equal: a third of them has the second place
    assert [recall_at(scores, k).item() for k in (1, 2, 3, 4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert recall_at(torch.full((2, 2), -math.inf), 1).tolist() == [0.5, 0.5]
    random = recall_at(torch.rand(2000, 50), 10, torch.zeros(2000, dtype=torch.int64))
    assert random.mean() == pytest.approx(0.2, abs=0.04)


def test_recall_refuses_what_has_no_order():
    with pytest.raises(ValueError, match="k=1 and 1 scores that are NaN"):
        recall_at(torch.tensor([[math.nan, 1.0]]), 1)
    with pytest.raises(ValueError, match="k=0"):
        recall_at(torch.zeros(1, 1), 0)


def test_text_scores():
    truths = ["a big red heart at top left", "a small  blue square on dark"]
    assert text_scores(["a big red heart at top left", "a small blue square on dark"], truths) == pytest.approx(
        {"exact_match": 1, "bleu": 100, "chrf": 100}
    )
    half = text_scores([truths[0], "nothing"], truths)
    assert half["exact_match"] == 0.5 and 10 < half["bleu"] < 70 and 20 < half["chrf"] < 80
    assert text_scores(["the <unk> b"], ["a <unk> c"])["bleu"] == text_scores(["the unk b"], ["a unk c"])["bleu"], "one word, not three"
    assert text_scores(["", ""], truths) == {"exact_match": 0, "bleu": 0, "chrf": 0}
    assert text_scores(["heart", "square"], ["heart", "ellipse"])["bleu"] == pytest.approx(50)  # no text has two words
    with pytest.raises(ValueError, match="received 1 texts and 2 truths"):
        text_scores(["a"], truths)


def test_bleu_is_that_of_the_paper():
    # Papineni et al. (2002): 4-, 3-, 2- and 1-gram precisions of one sentence, and the penalty for being short
    truth, made = "a b c d e f g", "a b c d f"
    expected = math.exp(1 - 7 / 5) * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert text_scores([made], [truth])["bleu"] == pytest.approx(100 * expected)


def test_diversity_of_texts_that_are_all_alike_and_all_different():
    same = diversity(["a small red heart"] * 5, ["a  small red heart", "other"])
    assert same == pytest.approx({"distinct_1": 4 / 20, "distinct_2": 3 / 15, "self_bleu": 100.0, "repeated": 1.0})
    words = [" ".join(f"w{4 * row + i}" for i in range(4)) for row in range(5)]
    figures = diversity(words)
    assert (figures["distinct_1"], figures["distinct_2"]) == (1, 1) and 0 <= figures["self_bleu"] < 20  # BLEU smooths
    half = diversity(["a b c d", "a b x y", "e f g h"], ["e f g h"])
    assert half["distinct_1"] == pytest.approx(10 / 12) and half["distinct_2"] == pytest.approx(8 / 9)
    assert half["repeated"] == pytest.approx(1 / 3)
    assert diversity(words)["self_bleu"] < half["self_bleu"] < same["self_bleu"]
    assert diversity(["", "a"])["distinct_2"] == 0  # no pair at all
    assert diversity([""] * 5)["self_bleu"] == 100, "a text of no words is like another"
    assert diversity(["<unk> a", "<unk> b", "c d"])["self_bleu"] == diversity(["e a", "e b", "c d"])["self_bleu"], "one word, not three"
    with pytest.raises(ValueError, match="diversity: received 1 texts, expected at least two"):
        diversity(["alone"])
