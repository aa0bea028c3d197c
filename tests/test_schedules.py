"""Schedules: end points, shapes, purity, and finite for any step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmvae.schedules import RAMPS, SCHEDULES, constant, cyclical, linear, sigmoid


def test_every_schedule_is_in_the_table():
    assert SCHEDULES == {"constant": constant, "linear": linear, "sigmoid": sigmoid, "cyclical": cyclical}


def test_linear():
    weight = linear(10, start=0.2, stop=0.8, delay=5)
    assert [weight(step) for step in (0, 5, 10, 15, 10**9)] == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
    assert linear(4, start=1.0, stop=0.0)(3) == pytest.approx(0.25)


def test_sigmoid_is_the_logistic_function():
    weight = sigmoid(midpoint=100, slope=0.1, stop=2.0)
    for step in (0, 50, 100, 137, 200):
        assert weight(step) == pytest.approx(2 / (1 + math.exp(-0.1 * (step - 100))), rel=1e-9)
    assert weight(100) == 1.0
    assert sigmoid(midpoint=80)(0) == pytest.approx(1 / (1 + math.exp(6.25)))
    assert sigmoid(midpoint=1e9, slope=1e3)(0) == 0.0
    with pytest.raises(ValueError, match="midpoint: received 0, expected a finite number above 0"):
        sigmoid(midpoint=0)
    assert sigmoid(midpoint=0, slope=1e3)(10**9) == 1.0


@pytest.mark.parametrize("shape", sorted(RAMPS))
def test_cyclical(shape):
    weight = cyclical(100, ramp=0.5, shape=shape, start=0.1, stop=0.9, cycles=3)
    for cycle in range(3):
        assert weight(100 * cycle) == pytest.approx(0.1)
        assert weight(100 * cycle + 25) == pytest.approx(0.5)
        rise = [weight(100 * cycle + step) for step in range(51)]
        assert rise == sorted(rise)
        assert {weight(100 * cycle + step) for step in range(50, 100)} == {weight(50)}
    assert weight(99) == pytest.approx(0.9)
    assert weight(300) == weight(10**9) == 0.9
    assert cyclical(100, shape=shape)(10**6) == pytest.approx(0.0)


def test_cyclical_shapes_differ_where_they_should():
    linear_, cosine, logistic = (cyclical(100, ramp=1.0, shape=shape)(10) for shape in ("linear", "cosine", "sigmoid"))
    assert linear_ == pytest.approx(0.1)
    assert cosine == pytest.approx((1 - math.cos(0.1 * math.pi)) / 2)
    assert logistic < cosine < linear_


POSITIVE = st.floats(1e-6, 1e12)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), POSITIVE, POSITIVE, st.floats(0, 1e6), st.integers(0, 2**63))
def test_pure_finite_and_between_the_end_points(name, scale, other, stop, step):
    options = {
        "constant": {"weight": stop},
        "linear": {"steps": scale, "start": 0.0, "stop": stop, "delay": other},
        "sigmoid": {"midpoint": other, "slope": scale, "stop": stop},
        "cyclical": {"period": scale, "ramp": min(1.0, other), "stop": stop, "shape": "sigmoid"},
    }[name]
    first, second = SCHEDULES[name](**options), SCHEDULES[name](**options)
    value = first(step)
    first(step + 17)  # asking for another step changes nothing
    assert first(step) == value == second(step)
    assert 0.0 <= value <= stop * (1 + 1e-9)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: constant(-1.0), "weight"),
        (lambda: constant(math.nan), "weight"),
        (lambda: linear(0), "steps"),
        (lambda: linear(math.inf), "steps"),
        (lambda: linear("1e2"), "steps"),
        (lambda: linear(100, start="1e-2"), "start"),
        (lambda: cyclical(10, ramp="0.5"), "ramp"),
        (lambda: cyclical(10, cycles="3"), "cycles"),
        (lambda: linear(5, stop=math.nan), "stop"),
        (lambda: linear(5, delay=-1), "delay"),
        (lambda: sigmoid(slope=0), "slope"),
        (lambda: sigmoid(midpoint=-math.inf), "midpoint"),
        (lambda: cyclical(0), "period"),
        (lambda: cyclical(10, ramp=0), "ramp"),
        (lambda: cyclical(10, ramp=1.5), "ramp"),
        (lambda: cyclical(10, shape="cos"), "shape"),
    ],
)
def test_errors_name_the_argument(make, field):
    with pytest.raises(ValueError, match=f"^{field}: received"):
        make()
