"""The training loop: order of the data, logging, evaluation, early stopping, checkpoints and exact resume.

``fit`` knows nothing of models and never steps an optimizer: the recipe's ``step(batch, n)`` does, with :func:`update`.
Everything that happens is a pure function of (seed, step, rank) and of what the checkpoint holds, so a run that was
stopped anywhere and started again ends with the same bits (same machine, same number of threads and ranks) as one that
never stopped. A step sees the same rows for any number of ranks, so these may change between runs.

Nothing waits for the device except at log points, evaluations and checkpoints.

References:
    Accelerate, https://huggingface.co/docs/accelerate ; design of the checkpoints: :mod:`mmvae.checkpoint`
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from mmvae import checkpoint
from mmvae.checkpoint import CheckpointError
from mmvae.loop import Batches, Run, Step, to_device, train_epoch
from mmvae.optimization import EMA, lay_out_gradients, micro_batches, unwrap, update
from mmvae.processes import Signals, locked, stranger
from mmvae.snapshot import check_whole, load_weights

logger = logging.getLogger(__name__)

__all__ = ["EMA", "Batches", "Result", "Step", "evaluate", "fit", "load_weights", "micro_batches", "unwrap", "update"]


@dataclass(frozen=True)
class Result:
    """What :func:`fit` returns.

    ``checkpoint`` is the folder of the best evaluation, or the last one when nothing was monitored or that of the best is gone or
    damaged, which a warning tells: ``best_step`` and ``best_value`` are None then. ``seconds`` counts all lives of the run.
    """

    step: int
    epoch: int
    best_step: int | None
    best_value: float | None
    checkpoint: Path | None
    history: list[dict[str, float]]
    seconds: float


# ---- evaluation


def evaluate(
    accelerator: Accelerator,
    measure: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    loader: Batches,
    *,
    models: Iterable[nn.Module],
) -> dict[str, float]:
    r"""Means over all rows of all ranks, :math:`\sum w_i v_i / \sum w_i`, summed in float64: independent of batch size and number of ranks.

    Arguments:
        accelerator: sums over its ranks.
        measure: batch on the device -> named (b,) values, one per row.
        loader: its epoch 0 is read.
        models: put into evaluation mode meanwhile.

    Returns:
        The mean of each value.

    Raises:
        ValueError: a value is not one per row, or there are no rows.
    """
    sums: dict[str, Tensor] = {}
    weight = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    with _evaluation_mode(models), torch.inference_mode():
        total = None
        with contextlib.suppress(TypeError):  # the length of a stream is not known
            total = len(loader)
        hidden = None if accelerator.is_main_process else True  # None: where nobody looks on, at no terminal
        for batch in tqdm(loader.batches(0), "evaluating", total, leave=False, unit="batch", disable=hidden):
            batch = to_device(accelerator.device, batch)
            w = batch["row_weight"].double()
            weight = weight + w.sum()
            for name, value in measure(batch).items():
                if value.shape != w.shape:
                    raise ValueError(f"measure() gave {name!r} of shape {tuple(value.shape)}, expected one value per row: {tuple(w.shape)}")
                part = torch.where(w > 0, value.double() * w, 0.0).sum()  # a filler row counts nothing, not even NaN
                sums[name] = sums[name] + part if name in sums else part
        totals = accelerator.reduce(torch.stack([weight, *sums.values()]), "sum").tolist()
    if not totals[0]:
        raise ValueError(f"evaluation of {type(loader).__name__} {loader.fingerprint}: it has no rows")
    return {name: total / totals[0] for name, total in zip(sums, totals[1:], strict=True)}


@contextlib.contextmanager
def _evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


# ---- training


def fit(
    accelerator: Accelerator,
    step: Step,
    loader: Batches,
    *,
    state: Mapping[str, Any],
    folder: str | Path,
    max_steps: int | None = None,
    num_epochs: int | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    monitor: str | None = "nll",
    patience: int | None = None,
    patience_from: int = 0,
    log_every: int = 50,
    save_every: int = 1000,
    keep: int = 2,
    resume: str | Path = "auto",
    info: Mapping[str, Any] | None = None,
    allow_changes: Iterable[str] = (),
    seed: int = 0,
    max_skipped: int = 10,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> Result:
    """Train until ``max_steps``, ``num_epochs`` or ``patience`` is reached; stop and start as often as you like.

    SIGTERM or SIGINT: all ranks finish the same step, save, and the process exits with 143 or 130; a second signal,
    more than a second later, exits at once. The loss of the launcher counts as SIGTERM. (Ranks agree on that step by one
    small message on the CPU per step, which waits for no device.)

    Arguments:
        accelerator: its ranks train, each with a copy of the model, its main process writes and reports.
        step: (batch on the device, number of steps done) -> scalars to log, tensors on the device, and the ``not_finite`` of
            :func:`update`; one optimizer step.
        loader: :class:`Batches`; its ``fingerprint`` becomes part of ``info``.
        state: entries that make up the run, each with ``state_dict`` and ``load_state_dict``: model, optimizer,
            scheduler, ema, ...
        folder: checkpoints and ``history.jsonl`` are written here; one that all machines share.
        evaluate: run on every rank, returns the same figures on each.
        eval_every: steps between evaluations; None: at the end of every epoch. The end of the run is always evaluated.
        monitor: figure of ``evaluate`` of which less is better, that decides which checkpoint is the best; None: none is.
        patience: evaluations in a row without improvement after which training stops.
        patience_from: step from which such evaluations count: the beginning of the last phase of several.
        log_every: steps over which logged values are averaged.
        save_every: steps between checkpoints; improvements and the end are saved too.
        keep: checkpoints to keep besides the best.
        resume: ``"auto"``: from the newest checkpoint that verifies, or from the start; ``"never"``: refuses a folder
            with checkpoints; else a path. One of another folder is only begun with: later lives go on from what ``folder`` has since then,
            and the best is the best of ``folder``.
        info: JSON that describes the run (config, batch size, ...). Resuming with other values is refused.
        allow_changes: fields of ``info`` that may differ.
        seed: ``torch.manual_seed(fold(seed, step, rank))`` is called before every step.
        max_skipped: steps in a row that are not finite after which training stops; of a gradient scaler, whose loss is not finite.
        on_log: called on the main process with every line of the history.

    Returns:
        :class:`Result`. A run that was finished before returns at once.

    Raises:
        CheckpointError: no resuming from that folder; says which file and why, or which fields of ``info`` differ. Or the folder
            cannot be written, or not every rank sees it, or another process trains into it, which is waited for ten seconds.
        FloatingPointError: ``max_skipped`` steps in a row were not finite, or a gradient scaler has shrunk below 2^-14; names the
            step, the rows, their ranks and the last good checkpoint.
        SystemExit: after SIGTERM (143) or SIGINT (130).
    """
    check_whole(accelerator)
    if max_steps is None and num_epochs is None:
        raise ValueError("max_steps=None and num_epochs=None: expected one of them, or training would never end")
    if evaluate is None and patience is not None:
        raise ValueError(f"patience={patience} needs evaluate")
    for name, value in {
        "log_every": log_every,
        "save_every": save_every,
        "keep": keep,
        "eval_every": eval_every,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    info = json.loads(json.dumps(dict(info or {}) | {"data": loader.fingerprint, "seed": seed}))
    run = Run(
        accelerator=accelerator, state=state, folder=Path(folder), info=info, seed=seed, max_steps=max_steps, num_epochs=num_epochs,
        patience=patience, patience_from=patience_from, evaluate=evaluate, eval_every=eval_every, monitor=monitor, log_every=log_every,
        save_every=save_every, keep=keep, max_skipped=max_skipped, on_log=on_log, file_rows=getattr(loader, "file_rows", list),
    )  # fmt: skip
    with locked(run.folder) if accelerator.is_main_process else contextlib.nullcontext() as refusal, Signals() as signals:
        if run.agree(refusal is not None):
            raise CheckpointError(refusal or f"{folder}: the main process was refused")
        if accelerator.num_processes > 1 and (lost := stranger(run.folder, accelerator.process_index, run.agree)):
            raise CheckpointError(f"{folder}: rank {lost} does not see what the main process wrote there, expected a folder that all share")
        run.restore(resume, set(allow_changes))
        for entry in state.values():
            if isinstance(entry, DistributedDataParallel):
                lay_out_gradients(entry)
        with run.progress_bar(loader):
            run.settle(signals)
            while not run.done():
                train_epoch(run, step, loader, signals)
    accelerator.wait_for_everyone()
    at = run.progress
    best_step, best_value, kept = _best(run)
    return Result(at.step, at.epoch, best_step, best_value, kept, list(at.history), run.elapsed())


def _best(run: Run) -> tuple[int | None, float | None, Path | None]:
    """Step, figure and checkpoint of the best evaluation; where there is none, or no longer its checkpoint, the last checkpoint alone."""
    at, last = run.progress, checkpoint.find(run.folder, run.progress.step) or run.last
    if at.best_step is None:
        return None, None, last
    found = checkpoint.find(run.folder, at.best_step)
    try:
        checkpoint.verify(found or run.folder / f"step-{at.best_step:08d}")
    except CheckpointError as error:
        told = "the best weights, those of step %d, are lost, and the last ones, of step %d, are taken: %s"
        logger.warning(told, at.best_step, at.step, error)
        return None, None, last
    return at.best_step, at.best_value, found
