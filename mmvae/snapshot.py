"""The state of live objects (model, optimizer, scheduler, average, ...) as plain nested data, and back.

Data-parallel and compiled models are unwrapped, so their keys are clean, and a checkpoint does not know how many ranks wrote it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmvae import checkpoint
from mmvae.checkpoint import CheckpointError
from mmvae.optimization import EMA, inner_optimizer, unwrap


def check_whole(accelerator: Accelerator) -> None:
    """Refuse ranks that have a share of the weights each: ValueError."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"distributed_type: received {kind.value}, expected a copy of the model on every rank, such as MULTI_GPU")


def state_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of every object."""
    return {name: (unwrap(value) if isinstance(value, nn.Module) else value).state_dict() for name, value in objects.items()}


def load_state(source: Path, objects: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Load a saved state into the objects; names, shapes, dtypes and groups of all of them are checked before any is changed.

    An optimizer whose learning rate comes from a ``LambdaLR`` (what ``get_scheduler`` of transformers gives) takes up moments and counts
    only: the rate at every step, the weight decay and the betas are those that it was made with now.

    Raises:
        CheckpointError: naming ``source``, the entry, what it has and what was expected.
    """
    if set(state) != set(objects):
        raise CheckpointError(f"{source}: has the entries {sorted(state)}, expected {sorted(objects)}")
    for name, value in objects.items():
        _check(f"{source}: entry {name!r}", value, state[name])
    state = _with_own_rates(objects, state)
    for name, value in objects.items():
        (unwrap(value) if isinstance(value, nn.Module) else value).load_state_dict(state[name])
        if isinstance(value, Optimizer):
            keep_layout(inner_optimizer(value))


def _with_own_rates(objects: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state with the hyperparameters of the objects, and the learning rates of the saved step that follow from them."""
    state = dict(state)
    for name, scheduler in objects.items():
        if not isinstance(scheduler, LambdaLR):
            continue  # there the saved rate may be a function of all steps before
        rates = [base * factor(state[name]["last_epoch"]) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        own = {"base_lrs": scheduler.base_lrs, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
        state[name] = state[name] | own
        for entry, optimizer in objects.items():
            if isinstance(optimizer, Optimizer) and inner_optimizer(optimizer) is inner_optimizer(scheduler.optimizer):
                groups = zip(optimizer.param_groups, state[entry]["param_groups"], rates, strict=True)
                merged = [now | {"params": then["params"], "lr": rate} for now, then, rate in groups]
                state[entry] = state[entry] | {"param_groups": merged}
    return state


def keep_layout(optimizer: Optimizer) -> None:
    """Lay an optimizer's loaded moments out in memory as their parameters are.

    Fused AdamW walks memory without looking at strides: next to channels-last weights, contiguous moments (which is what a file holds)
    would be taken for those of other weights, without an error.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_weights(model: nn.Module, folder: str | Path, *, entry: str = "model", ema: str = "ema") -> None:
    """Load the weights to publish from a checkpoint of :func:`mmvae.training.fit`: its model, with averaged weights where it has them.

    Arguments:
        model: wrapped or not.
        folder: the checkpoint, such as ``Result.checkpoint``.
        entry: name of the model in the state that was given to ``fit``.
        ema: name of its :class:`EMA` there, if any.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model; ``model`` is unchanged then.
    """
    state, _ = checkpoint.load(folder)
    if entry not in state:
        raise CheckpointError(f"{folder}: has no entry {entry!r}, only {sorted(state)}")
    weights, averages = dict(state[entry]), state.get(ema, {"weights": {}})["weights"]
    model, first = unwrap(model), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        averaged = first.setdefault(id(parameter), name)  # a tied weight is averaged once, by its first name
        if averaged in averages and name in weights:
            weights[name] = averages[averaged].to(weights[name].dtype)
    _check(f"{folder}: entry {entry!r}", model, weights)
    model.load_state_dict(weights)


def _check(what: str, value: Any, saved: Mapping[str, Any]) -> None:
    """Whether ``saved`` fits ``value``, as far as torch would only find out after changing half of it."""
    if isinstance(value, nn.Module):
        now, then = ({name: (str(x.dtype), tuple(x.shape)) for name, x in d.items()} for d in (unwrap(value).state_dict(), saved))
    elif isinstance(value, Optimizer):
        now, then = ({f"group {i}": len(g["params"]) for i, g in enumerate(d["param_groups"])} for d in (value.state_dict(), saved))
    elif isinstance(value, EMA):
        now, then = ({name: tuple(w.shape) for name, w in weights.items()} for weights in (value.weights, saved["weights"]))
    else:
        return
    changes = checkpoint.compare(then, now)
    if changes:
        raise CheckpointError(f"{what} does not fit ({len(changes)} differences, saved -> expected): {'; '.join(changes[:3])}")
