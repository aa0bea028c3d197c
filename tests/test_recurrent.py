"""The GRU trunk: padding that changes nothing, and token losses equal to those of torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmvae.recurrent import GRUEncoder, linear_cross_entropy


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_gru_encoder_equals_torch_on_each_row_alone(layers, bidirectional):
    encoder = GRUEncoder(5, 7, layers, bidirectional).double()
    reference = nn.GRU(5, 7, layers, batch_first=True, bidirectional=bidirectional).double()
    for i in range(layers):
        for gru, suffix in [(encoder.forwards[i], ""), *([(encoder.backwards[i], "_reverse")] if bidirectional else [])]:
            for name, parameter in gru.named_parameters():
                getattr(reference, name.replace("_l0", f"_l{i}{suffix}")).data.copy_(parameter.data)
    lengths = torch.tensor([4, 9, 1, 6])
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    x[torch.arange(9) >= lengths.unsqueeze(1)] = 1e6  # padding must not matter
    states, summary = encoder(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected, last = reference(x[row : row + 1, :length])
        torch.testing.assert_close(states[row, :length], expected[0])
        torch.testing.assert_close(summary[row], last[-2 if bidirectional else -1 :].flatten())
        for pooling, pooled in {"mean": expected[0].mean(0), "max": expected[0].amax(0)}.items():
            encoder.pooling = pooling
            torch.testing.assert_close(encoder(x, lengths)[1][row], pooled)


def test_both_directions_read_what_dropout_left_of_the_layer_below():
    encoder, lengths = GRUEncoder(3, 4, 2, True, dropout=1.0), torch.tensor([2, 6])
    nothing, something = (encoder(x, lengths)[1] for x in (torch.zeros(2, 6, 3), torch.randn(2, 6, 3)))
    torch.testing.assert_close(something, nothing)  # as by nn.GRU
    assert not torch.allclose(encoder.eval()(torch.randn(2, 6, 3), lengths)[1], encoder(torch.zeros(2, 6, 3), lengths)[1])


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_padding_takes_no_gradient(pooling):
    encoder = GRUEncoder(3, 4, 2, True, pooling=pooling)
    x = torch.randn(2, 6, 3, requires_grad=True)
    summary = encoder(x, torch.tensor([2, 6]))[1]
    gradient = torch.autograd.grad(summary.sum(), x)[0]
    assert not gradient[0, 2:].any()
    assert gradient[0, :2].any()
    assert gradient[1].abs().sum(1).all()


@pytest.mark.parametrize("max_logits", [1, 40, 1 << 24], ids=["one row at a time", "chunks", "at once"])
@pytest.mark.parametrize("even", [True, False], ids=["equal rows", "weighted rows"])
def test_linear_cross_entropy_equals_torch(max_logits, even):
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((17, 6), (11, 6), (11,))]
    target = torch.randint(0, 11, (17,))
    weights = torch.full((17,), 0.3) if even else torch.rand(17)
    received = linear_cross_entropy(*parameters, target, max_logits)
    expected = F.cross_entropy(F.linear(*parameters), target, reduction="none")
    torch.testing.assert_close(received, expected)
    gradients = torch.autograd.grad((weights * received).sum(), parameters)
    for gradient, reference in zip(gradients, torch.autograd.grad((weights * expected).sum(), parameters)):
        torch.testing.assert_close(gradient, reference)


def test_linear_cross_entropy_makes_no_gradient_that_nobody_wants():
    x, weight, bias = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True), torch.zeros(9, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(x, weight, bias, torch.arange(6))
    assert counter.get_total_flops() == 2 * 6 * 4 * 9


def test_linear_cross_entropy_of_some_frozen_parameters():
    x, weight, bias = torch.randn(7, 6), torch.randn(11, 6), torch.randn(11)
    target = torch.randint(0, 11, (7,))
    for frozen in range(3):
        parameters = [p.clone().requires_grad_(i == frozen) for i, p in enumerate((x, weight, bias))]
        linear_cross_entropy(*parameters, target).sum().backward()
        reference = [p.detach().clone().requires_grad_(i == frozen) for i, p in enumerate(parameters)]
        F.cross_entropy(F.linear(*reference), target, reduction="sum").backward()
        torch.testing.assert_close(parameters[frozen].grad, reference[frozen].grad)
    assert not linear_cross_entropy(x, weight, bias, target).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_in_low_precision(dtype):
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((17, 6), (11, 6), (11,))]
    low = [p.detach().to(dtype).requires_grad_() for p in parameters]
    target = torch.randint(0, 11, (17,))
    expected = F.cross_entropy(F.linear(*parameters), target, reduction="none")
    plain = linear_cross_entropy(*low, target)
    with torch.autocast("cpu", dtype):
        cast = linear_cross_entropy(*parameters, target)
    for received, leaves in ((plain, low), (cast, parameters)):
        assert received.dtype == torch.float32
        torch.testing.assert_close(received, expected, atol=0.05, rtol=0.02)
        for gradient, p in zip(torch.autograd.grad(received.sum(), leaves), leaves):
            assert gradient.dtype == p.dtype
            assert gradient.isfinite().all()


@pytest.mark.parametrize("even", [True, False], ids=["equal rows", "weighted rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_are_summed_as_well_as_one(dtype, even):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=generator) * 0.3 for shape in ((2000, 16), (100, 16), (100,))]
    target = (torch.rand(2000, generator=generator) ** 4 * 100).long()
    weights = torch.full((2000,), 0.25) if even else torch.rand(2000, generator=generator)

    def gradients(loss, dtype):
        leaves = [p.to(dtype).requires_grad_() for p in exact]
        return torch.autograd.grad((weights * loss(*leaves)).sum(), leaves)

    def plain(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="none")

    found = (plain, torch.float32), (plain, dtype), (lambda *leaves: linear_cross_entropy(*leaves, target, 400), dtype)
    for reference, once, chunked in zip(*(gradients(*each) for each in found), strict=True):
        assert (chunked.float() - reference).norm() < 1.5 * (once.float() - reference).norm()


def test_linear_cross_entropy_says_that_it_has_no_second_derivative():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((6, 4), (9, 4), (9,)))
    loss = linear_cross_entropy(x, weight, bias, torch.arange(6)).sum()
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: received create_graph=True, expected False"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("even", [True, False])
def test_linear_cross_entropy_of_no_tokens(even):
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((0, 6), (11, 6), (11,))]
    received = linear_cross_entropy(*parameters, torch.zeros(0, dtype=torch.long))
    assert received.shape == (0,)
    gradients = torch.autograd.grad(received.sum() if even else (received * torch.rand(0)).sum(), parameters)
    assert not any(gradient.any() for gradient in gradients)


def test_a_nan_upstream_stays_one():
    x = torch.randn(3, 6, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(11, 6), torch.randn(11), torch.tensor([1, 2, 3]))
    gradient = torch.autograd.grad(loss, x, torch.tensor([1.0, torch.nan, 1.0]))[0]
    assert torch.equal(gradient.isnan().any(1), torch.tensor([False, True, False]))
