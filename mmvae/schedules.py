r"""Weights as pure functions of the optimizer step: nothing to checkpoint, nothing that accumulation or world size could change.

A schedule is a callable ``step -> weight``; ``step`` counts optimizer steps from 0. A configuration may give steps as a share of a run's.

References:
    Bowman et al. (2016), Generating sentences from a continuous space, https://arxiv.org/abs/1511.06349 (sigmoid annealing)
    Fu et al. (2019), Cyclical annealing schedule, https://arxiv.org/abs/1903.10145
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

Schedule = Callable[[int], float]


def _check(name: str, value: float, positive: bool = False) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: received {value!r}, expected a finite number {'above' if positive else 'at least'} 0")


def constant(weight: float = 1.0) -> Schedule:
    """Always ``weight``."""
    _check("weight", weight)
    return lambda step: weight


def linear(steps: int, start: float = 0.0, stop: float = 1.0, delay: int = 0) -> Schedule:
    """``start`` for ``delay`` steps, then a straight line to ``stop`` that takes ``steps``, then ``stop``."""
    _check("steps", steps, positive=True), _check("start", start), _check("stop", stop), _check("delay", delay)
    return lambda step: start + (stop - start) * min(max((step - delay) / steps, 0.0), 1.0)


def sigmoid(midpoint: float = 2500.0, slope: float | None = None, stop: float = 1.0) -> Schedule:
    r"""Logistic annealing, :math:`\mathrm{stop} / (1 + e^{-\mathrm{slope}\,(t - \mathrm{midpoint})})`; slope 6.25 / midpoint when None."""
    _check("midpoint", midpoint, positive=slope is None), _check("stop", stop)
    slope = 6.25 / midpoint if slope is None else slope
    _check("slope", slope, positive=True)
    return lambda step: stop * _logistic(slope * (step - midpoint))


def cyclical(
    period: int, ramp: float = 0.5, shape: str = "linear", start: float = 0.0, stop: float = 1.0, cycles: int | None = None
) -> Schedule:
    r"""In every period of ``period`` steps the weight rises from ``start`` to ``stop`` during the first ``ramp`` share, then stays.

    With :math:`v \in [0, 1]` the position on the ramp, the shapes are linear :math:`v`, cosine :math:`(1 - \cos \pi v) / 2` and
    sigmoid :math:`1 / (1 + e^{-(12 v - 6)})`, the last rescaled to reach 0 and 1 exactly.

    Arguments:
        period: steps of one cycle.
        ramp: share of a cycle that rises, in (0, 1].
        shape: "linear", "cosine" or "sigmoid".
        start, stop: weights at the two ends of the ramp.
        cycles: number of cycles after which the weight stays at ``stop``; None for ever.
    """
    _check("period", period, positive=True), _check("start", start), _check("stop", stop)
    _check("cycles", 1 if cycles is None else cycles, positive=True), _check("ramp", ramp, positive=True)
    if ramp > 1:
        raise ValueError(f"ramp: received {ramp!r}, expected a share in (0, 1]")
    if shape not in RAMPS:
        raise ValueError(f"shape: received {shape!r}, expected one of {sorted(RAMPS)}")

    def weight(step: int) -> float:
        if cycles is not None and step >= cycles * period:
            return stop
        return start + (stop - start) * RAMPS[shape](min(step % period / (period * ramp), 1.0))

    return weight


def in_steps(options: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Options of a run's schedule, learning rate or phase, of which those in ``STEP_OPTIONS`` that are floats up to 1 are shares of it.

    Arguments:
        options: by name.
        steps: of the run.

    Example:
        >>> in_steps({"steps": 0.1, "start": 0.1, "delay": 5}, 200)
        {'steps': 20, 'start': 0.1, 'delay': 5}
    """
    shares = {name for name in STEP_OPTIONS & options.keys() if isinstance(options[name], float) and 0 < options[name] <= 1}
    return {name: max(1, round(value * steps)) if name in shares else value for name, value in options.items()}


def _logistic(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda v: v,
    "cosine": lambda v: 0.5 - 0.5 * math.cos(math.pi * v),
    "sigmoid": lambda v: (_logistic(12 * v - 6) - _logistic(-6)) / (_logistic(6) - _logistic(-6)),
}
STEP_OPTIONS = {"steps", "delay", "midpoint", "period", "num_decay_steps", "num_stable_steps", "timescale"}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "sigmoid": sigmoid,
    "cyclical": cyclical,
}
