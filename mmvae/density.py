r"""What every density has that is estimated after training: standardisation, checks, the split of rows, figures. The kinds: ``densities``.

    log p(x | c) = log p_u((x - loc) / scale | (clip(c) - context_loc) / context_scale) - sum_d log scale_d

A context outside the box that the fit has seen counts as the nearest point of that box (``clip``): beyond it a network knows nothing, and a
scale that it extrapolates explodes.
Everything is float32, also under autocast and in a model of half precision. What is estimated are buffers, not parameters: no optimizer of
the model moves them and no data-parallel wrapper waits for their gradients.
Shapes: ``N`` rows, ``R`` draws of every row, ``D`` the density's dimensions, ``C`` its context's.
"""

import difflib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Values = tuple[Tensor, Tensor | None]
"""Standardised x (R, N, D) and context (R, N, C), or None."""

_HELD_OUT = (0.1, 2000)
_CHUNK = 4096
_MOST_NUMBERS = 2**28


def check_integer(name: str, value: Any, least: int) -> None:
    """Refuse ``value`` unless it is an integer of at least ``least``.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: received {value!r}, expected an integer of at least {least}")


def check_size(name: str, value: Any, number: int) -> None:
    """Refuse options that would make a density of more than 2^28 numbers, a GiB.

    Raises:
        ValueError: naming the option.
    """
    if number > _MOST_NUMBERS:
        raise ValueError(f"{name}: received {value!r}, which makes {number:,} numbers, expected at most {_MOST_NUMBERS:,}")


class TooFewRows(ValueError):
    """There are not as many rows as a density needs."""


class Density(nn.Module):
    """A density over vectors that is estimated from rows; a new kind is a subclass in ``densities`` and a line in its table.

    A kind builds its tensors in ``__init__`` from plain options, on the CPU even where a model is built on the meta device, because their
    values are needed; every buffer is saved.

    Arguments:
        dim: D, at least 1.
        context_dim: C; 0 when nothing is given.
    """

    fitted: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int, context_dim: int = 0):
        super().__init__()
        check_integer("dim", dim, 1), check_integer("context_dim", context_dim, 0)
        self.dim, self.context_dim = dim, context_dim
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool, device="cpu"))
        for name, size in {"": dim, "context_": context_dim}.items():
            if size:
                self.register_buffer(f"{name}loc", torch.zeros(size, device="cpu"))
                self.register_buffer(f"{name}scale", torch.ones(size, device="cpu"))
        if context_dim:
            self.register_buffer("context_low", torch.zeros(context_dim, device="cpu"))
            self.register_buffer("context_high", torch.zeros(context_dim, device="cpu"))

    def reset_parameters(self) -> None:
        """Forget the fit; for a model whose file holds no density."""
        nn.init.zeros_(self.fitted)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, with gradient to ``x`` and ``context``.

        Arguments:
            x: (*, D).
            context: (*, C), broadcasting against ``x``; None exactly when ``context_dim`` is 0.

        Returns:
            (*,) float32.

        Raises:
            RuntimeError: before it is fitted.
            ValueError: for a size or a context that does not fit.
        """
        self._require_fit()
        self._check(x, context)
        if context is not None:
            leading = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            x, context = x.expand(*leading, -1), context.expand(*leading, -1)
        with torch.autocast(x.device.type, enabled=False):
            return self._log_prob(*self._standardised(x, context)) - self.scale.log().sum()

    @torch.no_grad()
    def sample(self, given: int | Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the density: a number of rows, or one row for every row of the context.

        Arguments:
            given: n when ``context_dim`` is 0, else the context (B, C).
            generator: makes the draw repeatable; torch's global generator when None.

        Returns:
            (n, D) or (B, D) float32, on the density's device.

        Raises:
            RuntimeError: before it is fitted.
            ValueError: for a number where a context is needed and the other way round, or a size that does not fit.
        """
        self._require_fit()
        context = given if isinstance(given, Tensor) else None
        self._check(None, context)
        if context is None:
            check_integer("given", given, 1)
        elif context.dim() != 2:
            raise ValueError(f"context: received shape {tuple(context.shape)}, expected (B, {self.context_dim})")
        with torch.autocast(self.loc.device.type, enabled=False):
            u = self._sample(given if context is None else len(context), self._standardised(None, context)[1], generator)
            return u * self.scale + self.loc

    def fit(self, x: Tensor, context: Tensor | None = None, *, seed: int = 0, **training: Any) -> dict[str, float]:
        """Estimate the density; the same data, seed and number of threads give the same bits.

        A tenth of the rows, at most 2,000, is held out, with all draws of a row.

        Arguments:
            x: (N, D), or (R, N, D) for R draws of every row, for example samples of its posterior.
            context: (N, C) or (R, N, C) like ``x``; None exactly when ``context_dim`` is 0.
            seed: of the split, the first values and the order of rows.
            training: options of the kind, named in its docstring.

        Returns:
            ``train_log_prob_nats`` and ``held_out_log_prob_nats`` (means over rows), ``seconds``, ``train_rows``, ``held_out_rows``, and
            what the kind adds.

        Raises:
            ValueError: for a size or a context that does not fit, too few rows, a value that is not finite, a constant column of ``x``.
            TypeError: for an unknown option, naming the nearest one.
            FloatingPointError: when the fit itself does not stay finite; the density is then not fitted.
        """
        start = time.perf_counter()
        self.check_training(training)
        self._check_rows(x, context)
        rows = x.shape[-2]
        held_rows = min(max(2, round(_HELD_OUT[0] * rows)), _HELD_OUT[1])
        self._check_number(rows, rows - held_rows)
        with torch.inference_mode(False), torch.no_grad():
            self.fitted.fill_(False)
            x, context = (None if v is None else v.detach().to(self.loc).view(-1, *v.shape[-2:]) for v in (x, context))
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(self.loc.device)
            self._estimate_scales(x, context)
            held, train = (
                [v if v is None else v[:, part] for v in self._standardised(x, context)] for part in order.tensor_split([held_rows])
            )
            figures = self._fit(tuple(train), tuple(held), seed, **training)
            figures |= {f"{name}_log_prob_nats": self._mean_log_prob(values) for name, values in (("train", train), ("held_out", held))}
            if not all(map(math.isfinite, figures.values())):
                raise FloatingPointError(f"{type(self).__name__}.fit: received the figures {figures}, expected finite ones")
            self.fitted.fill_(True)
        return figures | {"seconds": time.perf_counter() - start, "train_rows": rows - held_rows, "held_out_rows": held_rows}

    def _log_prob(self, u: Tensor, context: Tensor | None) -> Tensor:
        """(*,) nats of standardised values (*, D) and (*, C)."""
        raise NotImplementedError

    def _sample(self, num_samples: int, context: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """(n, D) standardised values."""
        raise NotImplementedError

    def _fit(self, train: Values, held: Values, seed: int, **training: Any) -> dict[str, float]:
        """Estimate from standardised values; whatever else is worth knowing, by name."""
        raise NotImplementedError

    def _check_number(self, rows: int, train_rows: int) -> None:
        if rows < 20:
            raise TooFewRows(f"x: received {rows} rows, expected at least 20")

    def _normal(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """(n, D) standard normal numbers; the same on every device for a generator of the CPU."""
        device = self.loc.device if generator is None else generator.device
        return torch.randn(num_samples, self.dim, generator=generator, device=device).to(self.loc.device)

    def _mean_log_prob(self, values: Sequence[Tensor | None]) -> float:
        """Mean over rows of the first draw, in nats of the values as they came."""
        x, context = (None if v is None else v[0].split(_CHUNK) for v in values)
        parts = [self._log_prob(u, None if context is None else context[i]) for i, u in enumerate(x)]
        return float(torch.cat(parts).double().mean() - self.scale.double().log().sum())

    def _standardised(self, x: Tensor | None, context: Tensor | None) -> Values:
        if x is not None:
            x = (x.float() - self.loc) / self.scale
        if context is not None:
            context = (context.float().clamp(self.context_low, self.context_high) - self.context_loc) / self.context_scale
        return x, context

    def _estimate_scales(self, x: Tensor, context: Tensor | None) -> None:
        for name, value in {"": x, "context_": context}.items():
            if value is None:
                continue
            flat = value.flatten(0, 1).double()
            loc, scale = flat.mean(0), flat.std(0)
            constant = (flat == flat[0]).all(0)
            if constant.any() and not name:
                raise ValueError(f"x: column {int(constant.nonzero()[0])} has the same value in every row, which has no density")
            getattr(self, f"{name}loc").copy_(loc)
            getattr(self, f"{name}scale").copy_(scale.masked_fill(constant, 1.0))  # a constant context says nothing
        if context is not None:
            self.context_low.copy_(context.amin((0, 1))), self.context_high.copy_(context.amax((0, 1)))

    def _require_fit(self) -> None:
        if not self.fitted:
            raise RuntimeError(
                f"{type(self).__name__}: not fitted yet; call fit(x, context) first, or load a model that holds a fitted one"
            )

    def _check(self, x: Tensor | None, context: Tensor | None) -> None:
        if x is not None and x.shape[-1:] != (self.dim,):
            raise ValueError(f"x: received shape {tuple(x.shape)}, expected (*, {self.dim})")
        if context is None and self.context_dim:
            raise ValueError(f"context: received None, expected (*, {self.context_dim}), for the density is conditional")
        if context is not None and not self.context_dim:
            raise ValueError(f"context: received shape {tuple(context.shape)}, expected None, for the density has context_dim = 0")
        if context is not None and context.shape[-1:] != (self.context_dim,):
            raise ValueError(f"context: received shape {tuple(context.shape)}, expected (*, {self.context_dim})")

    def check_training(self, training: Mapping[str, Any]) -> None:
        """Refuse training options that :meth:`fit` does not take, or values of another kind; raises what it raises for them."""
        known = {n: p.default for n, p in inspect.signature(self._fit).parameters.items() if n not in ("train", "held", "seed")}
        for name, value in training.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, sorted(known), 1, 0.0)[0]
                raise TypeError(f"{type(self).__name__}.fit: unknown option {name!r} = {value!r}; the nearest one is {nearest!r}")
            if isinstance(known[name], int):
                check_integer(name, value, 1)
            elif not isinstance(value, int | float):
                raise ValueError(f"{name}: received {value!r}, expected a number")

    def _check_rows(self, x: Tensor, context: Tensor | None) -> None:
        self._check(x, context)
        if x.dim() not in (2, 3):
            raise ValueError(f"x: received shape {tuple(x.shape)}, expected (N, {self.dim}) or (R, N, {self.dim})")
        if context is not None and context.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"context: received shape {tuple(context.shape)}, expected {(*x.shape[:-1], self.context_dim)}, the rows of x")
        for name, value in {"x": x, "context": context}.items():
            value = None if value is None else value.float()
            if value is not None and not value.isfinite().all():
                row, column = (~value.isfinite()).nonzero()[0, -2:].tolist()
                at = value.reshape(-1, *value.shape[-2:])[:, row, column]
                raise ValueError(f"{name}: received {at[~at.isfinite()][0].item()} in row {row}, column {column}, expected finite values")

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "Density":
        """Moves between devices only: half a float's digits would not hold a Cholesky factor, nor a spline's knots."""

        def move(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
