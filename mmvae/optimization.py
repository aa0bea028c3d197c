r"""One optimizer step that is the same for any accumulation and any number of ranks, and the moving average of the weights.

The gradient of a step is that of the mean over the rows of the global batch,

    g = 1/n \sum_{ranks} \sum_{micro-batches} \sum_{rows} w_row \nabla loss_row,        n = num_rows

however the rows are split: each micro-batch contributes its weighted *sum* times ``world_size / n``, and data-parallel
training averages over ranks.

Shapes: ``b`` rows of a micro-batch, ``B`` rows of this rank.

References:
    Child (2021), Very deep VAEs (steps that are not finite are skipped), https://arxiv.org/abs/2011.10650
    Polyak, Juditsky (1992), Acceleration of stochastic approximation by averaging, https://doi.org/10.1137/0330046
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler


class EMA:
    r"""Exponential moving average of a model's floating-point parameters, :math:`\bar w \leftarrow d \bar w + (1 - d) w`, kept in float32.

    At update ``t`` the decay is ``min(decay, (1 + t) / (10 + t))``, so that early averages forget the initial weights.

    Arguments:
        model: the module, wrapped or not; construct the average after ``accelerator.prepare``, when the weights are
            where they will stay.
        decay: d, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: expected 0 <= decay < 1")
        self.decay, self.count = decay, 0
        self._parameters = {n: p for n, p in unwrap(model).named_parameters() if p.is_floating_point()}
        self.weights = {n: p.detach().float().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights; call once per optimizer step."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` the model has the averaged weights; afterwards it has its own again, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._assign(self.weights)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name and the number of updates."""
        return {"weights": dict(self.weights), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the averages of :meth:`state_dict`; raises ValueError, before anything is changed, when a name or shape differs."""
        shapes = {name: tuple(w.shape) for name, w in state["weights"].items()}
        expected = {name: tuple(w.shape) for name, w in self.weights.items()}
        if shapes != expected:
            wrong = sorted(n for n in {**shapes, **expected} if shapes.get(n) != expected.get(n))
            raise ValueError(f"averaged weights {wrong[0]!r}: shape {shapes.get(wrong[0])}, expected {expected.get(wrong[0])}")
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        self.count = state["count"]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside any nesting of data-parallel and ``torch.compile`` wrappers: the one whose state-dict keys are clean."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif is_compiled_module(model):
            model = model._orig_mod
        else:
            return model


def lay_out_gradients(model: DistributedDataParallel) -> None:
    """Make data-parallel training decide now where in its messages each gradient lies, by the parameters alone.

    Otherwise it does so after the first step that a process takes. Where a number lies decides the order in which three ranks or more are
    added up, so a run that was stopped would end with other bits. Every rank calls it at the same time.
    """
    inner = model.module
    own = inner.__dict__.get("forward")  # Accelerate's, with autocast
    inner.forward = lambda _: sum(parameter.sum() for parameter in inner.parameters() if parameter.requires_grad)
    try:
        # on GPUs it wants an argument to move there; the next forward pass takes up what this backward pass has found
        model(torch.zeros(())).backward()
        model.zero_grad()
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def freeze_unreached(model: nn.Module, value: Tensor) -> None:
    """Let parameters that a value does not depend on take no gradient: data-parallel training waits for every one that does.

    Arguments:
        model: the module, not wrapped yet.
        value: (), made by it.
    """
    value.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad()


def update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Callable[[dict[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    *,
    accumulation: int = 1,
    max_grad_norm: float | None = None,
    scheduler: LRScheduler | None = None,
    ema: EMA | None = None,
    trained: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Take one optimizer step on this rank's share of a global batch: backward by micro-batches, clip, step, average the weights.

    When a loss or gradient is not finite on any rank, no rank takes the step: weights, buffers such as running means, moments and the
    optimizer's step count stay. With fused Adam or AdamW and with a gradient scaler this costs no wait for the device; other optimizers
    need one per step.

    Arguments:
        accelerator: has prepared ``model`` and ``optimizer``, and not ``scheduler``, which it would advance once per
            rank.
        model: its parameters are clipped and its gradients reduced.
        optimizer: steps these parameters; ``AdamW(..., fused=True)`` is the fast choice.
        losses: micro-batch -> (b,) loss per row, nats; must run ``model`` through its forward.
        batch: tensors; those whose first dimension is B are split by rows. ``row_weight`` (B,) float and ``num_rows``
            () int, the rows of the global batch.
        accumulation: number of micro-batches, >= 1; a share of fewer rows has fewer.
        max_grad_norm: clip the gradient to this L2 norm, > 0; None clips nothing.
        scheduler: stepped once, whether or not the step was taken, so that the learning rate is a pure function of the
            step.
        ema: updated once.
        trained: names of the parameters that take this step; all do when None.

    Returns:
        ``loss`` () (averaging it over ranks gives the mean over the global batch), ``grad_norm`` () before clipping,
        ``skipped`` () 0 or 1, ``not_finite`` (B,) bool, the rows whose loss is not. Tensors on the device; nothing waits for them.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation={accumulation}: expected at least 1")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm}: expected above 0, or None to clip nothing")
    optimizer.zero_grad()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]
    loss, not_finite = _backward(accelerator, model, losses, batch, accumulation)
    for name, parameter in unwrap(model).named_parameters() if trained is not None else ():
        if name not in trained:
            parameter.grad = None  # after backward: data-parallel training waits for the gradient of every one
    norm = accelerator.clip_grad_norm_(model.parameters(), float("inf") if max_grad_norm is None else max_grad_norm)
    skipped = (~(norm.isfinite() & loss.isfinite())).float()
    if accelerator.num_processes > 1:  # the norm is that of all ranks, the loss a rank's own
        skipped = accelerator.reduce(skipped, "sum").clamp(max=1.0)
    _step(accelerator, optimizer, skipped, scheduler)
    for buffer, before in buffers:
        buffer.copy_(torch.where(skipped.bool(), before, buffer))
    optimizer.zero_grad()
    if ema is not None:
        ema.update()
    return {"loss": loss, "grad_norm": norm, "skipped": skipped, "not_finite": not_finite}


def _backward(
    accelerator: Accelerator, model: nn.Module, losses: Callable, batch: Mapping[str, Tensor], accumulation: int
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradients of every micro-batch, reduced over ranks with the last; the detached loss, and rows that are not finite."""
    scale = accelerator.num_processes / batch["num_rows"]
    total, not_finite = torch.zeros((), device=batch["row_weight"].device), []
    pieces = list(micro_batches(batch, accumulation))
    for piece in pieces:
        last = piece is pieces[-1]
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            rows = losses(piece)
            if rows.shape != piece["row_weight"].shape:
                raise ValueError(f"losses() gave shape {tuple(rows.shape)}, expected one loss per row: {tuple(piece['row_weight'].shape)}")
            loss = (rows.float() * piece["row_weight"]).sum() * scale
            # times 1, or NaN where the loss is not finite: a gradient scaler looks at gradients alone
            guard = 1 + 0 * loss.detach()
            accelerator.backward(loss * guard * accelerator.gradient_accumulation_steps)
            total += loss.detach()
            not_finite.append(~rows.detach().isfinite())
    return total, torch.cat(not_finite)


def micro_batches(batch: Mapping[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """Split a batch by rows into ``count`` parts of almost equal size, without empty ones; other tensors go to all parts."""
    size = len(batch["row_weight"])
    for i in range(count):
        start, end = i * size // count, (i + 1) * size // count
        if end > start:
            yield {name: x[start:end] if x.ndim and len(x) == size else x for name, x in batch.items()}


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What accelerate wraps, or what is not wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _step(accelerator: Accelerator, optimizer: torch.optim.Optimizer, skipped: Tensor, scheduler: LRScheduler | None) -> None:
    inner = inner_optimizer(optimizer)
    if accelerator.scaler is not None:
        optimizer.step()  # the scaler finds what is not finite by itself
    elif isinstance(inner, torch.optim.Adam) and inner.defaults["fused"]:
        # the fused kernels return at once when found_inf is 1, and torch then takes back its advance of the step count (_fused_adam)
        inner.found_inf = skipped
        try:
            optimizer.step()
        finally:
            del inner.found_inf
    elif not skipped.item():
        optimizer.step()
    if scheduler is not None:
        with warnings.catch_warnings():
            # a skipped first step looks to torch like a scheduler called too early
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            scheduler.step()
