r"""How well an angle is known: errors on the circle, and what a latent beside the angle still tells of it.

A shape that a turn by :math:`2 \pi / n` leaves as it is has angles modulo that: everything is said of :math:`n` times the angle. A model
that never saw an angle may choose its zero, so one offset is fitted, on other rows than those that are measured.

Shapes: ``N`` rows, ``D`` latent; angles are radians.

References:
    Jammalamadaka, SenGupta (2001), Topics in Circular Statistics, section 8.2 (correlation of uniform angles)
"""

import math

import torch
from torch import Tensor


def wrapped(angle: Tensor, symmetry: int = 1) -> Tensor:
    """The same angle in [-pi / symmetry, pi / symmetry)."""
    period = 2 * math.pi / symmetry
    return (angle + period / 2).remainder(period) - period / 2


def fitted_offset(found: Tensor, true: Tensor, symmetry: int = 1) -> float:
    r"""The mean direction of what is found against what is true, :math:`\arg \sum_i e^{i n (\hat\theta_i - \theta_i)} / n`.

    Arguments:
        found, true: (N,).
        symmetry: n.

    Returns:
        An angle in [-pi / n, pi / n].
    """
    turn = symmetry * (found - true).double()
    return math.atan2(turn.sin().sum(), turn.cos().sum()) / symmetry


def angular_error(found: Tensor, true: Tensor, symmetry: int = 1, offset: float = 0.0) -> Tensor:
    """How far apart two angles are, after the offset, modulo the symmetry: (N,) in [0, pi / symmetry]; at random pi / (2 symmetry)."""
    return wrapped((found - true).double() - offset, symmetry).abs()


def circular_correlation(found: Tensor, true: Tensor, symmetry: int = 1) -> float:
    r"""Correlation of angles that are uniform on the circle, :math:`R(n(\hat\theta - \theta)) - R(n(\hat\theta + \theta))`.

    R is the length of the mean of the unit vectors. 1 for equal angles with any offset, -1 for mirrored ones, about 0 where the one tells
    nothing of the other.

    Arguments:
        found, true: (N,).
        symmetry: n.
    """
    found, true = symmetry * found.double(), symmetry * true.double()
    return _length(found - true) - _length(found + true)


def _length(angle: Tensor) -> float:
    return math.hypot(angle.cos().mean(), angle.sin().mean())


def angle_told(
    latent: Tensor, angle: Tensor, test_latent: Tensor, test_angle: Tensor, symmetry: int = 1, seed: int = 0
) -> dict[str, float]:
    r"""How much a regression on the latent tells of :math:`(\cos n\theta, \sin n\theta)`: the share of their variance, on other rows.

    Arguments:
        latent, angle: (N, D) and (N,), to fit.
        test_latent, test_angle: of other rows, to measure.
        symmetry: n.
        seed: of the network.

    Returns:
        ``linear`` and ``mlp`` (two layers of 64): :math:`R^2`, at most 1; 0 or less where the latent tells nothing.
    """
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import r2_score
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, test_x = latent.double().numpy(), test_latent.double().numpy()
    y, test_y = (torch.stack([(symmetry * a).cos(), (symmetry * a).sin()], 1).double().numpy() for a in (angle, test_angle))
    network = MLPRegressor(hidden_layer_sizes=(64, 64), max_iter=200, early_stopping=True, random_state=seed % 2**32)
    fits = {"linear": LinearRegression(), "mlp": network}
    return {name: float(r2_score(test_y, make_pipeline(StandardScaler(), fit).fit(x, y).predict(test_x))) for name, fit in fits.items()}
