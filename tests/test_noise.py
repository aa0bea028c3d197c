"""Keyed randomness: the right distributions, no correlations, and purity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmvae.noise import fold, keyed_normal, keyed_uniform

KEYS = fold(0, torch.arange(2000))


def test_uniform_is_uniform_over_keys_and_over_positions():
    u = keyed_uniform(KEYS, (50,)).double()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    counts = torch.histc(u[:, 7], bins=20, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert stats.kstest(u[3].numpy(), "uniform").pvalue > 1e-4


def test_normal_is_normal_in_both_halves_of_box_muller():
    x = keyed_normal(KEYS, (51,)).double()
    for part in (x[:, :26], x[:, 26:], x[:, 0], x[:, -1]):
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > 1e-4
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)


@pytest.mark.parametrize(
    "keys",
    [torch.arange(4000), fold(0, torch.arange(4000)), fold(0, 3, torch.arange(4000)), fold(1, torch.arange(4000), 5)],
    ids=["raw", "rows", "step", "part"],
)
def test_neighbouring_keys_and_positions_are_uncorrelated(keys):
    x = keyed_normal(keys, (16,)).double()
    limit = 5 / math.sqrt(len(keys))
    assert torch.corrcoef(x.T).fill_diagonal_(0).abs().max() < limit  # positions of a draw, cosine against sine included
    for lag in (1, 2, 64):
        assert abs((x[lag:] * x[:-lag]).mean()) < limit / 4  # over 16 times as many pairs
        assert abs((x[lag:] ** 2 * x[:-lag] ** 2).mean() - 1) < limit


def test_steps_and_seeds_are_uncorrelated():
    rows = torch.arange(4000)
    draws = [keyed_normal(fold(seed, step, rows)).double() for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (-1, 0))]
    assert torch.corrcoef(torch.stack(draws)).fill_diagonal_(0).abs().max() < 5 / math.sqrt(len(rows))


def test_uniform_never_reaches_zero_or_one():
    # Keys whose first 64 hashed bits are all ones and all zeros: the hash run backwards.
    def unshift(x: int, bits: int) -> int:
        for power in (bits, 2 * bits, 4 * bits):
            x ^= x >> power
        return x

    def key_of(wanted: int) -> int:
        mask, x = (1 << 64) - 1, unshift(wanted, 31)
        for bits, multiplier in ((27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
            x = unshift(x * pow(multiplier, -1, 1 << 64) & mask, bits)
        x = (x - 0x9E3779B97F4A7C15) & mask
        return x - (1 << 64) if x >> 63 else x

    u = keyed_uniform(torch.tensor([key_of(0), key_of((1 << 64) - 1)]))
    assert 0 < u[0] < 1e-6
    assert 1 - 1e-6 < u[1] < 1


@settings(max_examples=100, deadline=None)
@given(st.integers(), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.integers(0, 15))
def test_numbers_and_tensors_fold_alike(seed, parts, which):
    expected = fold(seed, *parts)
    mixed = [torch.tensor([part]) if which >> i & 1 else part for i, part in enumerate(parts)]
    received = fold(seed, *mixed)
    assert isinstance(expected, int)
    assert 0 <= expected < 2**63
    assert int(received) == expected


def test_order_and_number_of_parts_matter():
    keys = [fold(0), fold(0, 0), fold(0, 0, 0), fold(0, 1, 2), fold(0, 2, 1), fold(1, 2), fold(2, 1), fold(0, -1), fold(-1, 0)]
    assert len(set(keys)) == len(keys)


def test_keys_do_not_collide():
    steps, rows = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    assert len(fold(0, steps, rows).unique()) == 90_000


def test_a_row_does_not_depend_on_its_batch():
    whole = keyed_normal(KEYS[:7], (3, 5))
    assert whole.shape == (7, 3, 5)
    assert torch.equal(whole[4:5], keyed_normal(KEYS[4:5], (3, 5)))
    assert torch.equal(whole.flip(0), keyed_normal(KEYS[:7].flip(0), (3, 5)))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3,)])
def test_shapes(shape):
    assert keyed_normal(KEYS[:4], shape).shape == (4, *shape)
    assert keyed_uniform(KEYS[:0], shape).shape == (0, *shape)


def test_numbers_stay_what_they_are():
    """The generator is part of the format of a run: a resumed run must see the same noise in the next version."""
    assert (fold(0, 1, 2), fold(-5, 2**40)) == (7663738859838527782, 298567669570398218)
    expected = torch.tensor([[1.0483, -0.7196, -0.1931]])
    torch.testing.assert_close(keyed_normal(torch.tensor([1]), (3,)), expected, atol=1e-4, rtol=0)
