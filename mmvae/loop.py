"""What happens between two steps of a training run: logging, evaluation, checkpoints, signals; :func:`mmvae.training.fit` drives it.

Deterministic figures (:class:`Progress`) are kept apart from clocks and rates: the former are saved and come out the
same after any stop and resume.
"""

import contextlib
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from mmvae import checkpoint
from mmvae.checkpoint import CheckpointError
from mmvae.noise import fold
from mmvae.processes import Signals
from mmvae.snapshot import load_state, state_of

Step = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
_EVALUATION = 1  # keeps the random numbers of an evaluation apart from those of the step
_LEAST_SCALE = 2**-14  # of a float16 gradient; losses of pictures in nats begin with one of about 1


class Batches(Protocol):
    """What ``fit`` and ``evaluate`` need of a loader."""

    fingerprint: str

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """This rank's share of every global batch of the epoch from number ``start`` on, with ``row`` and ``row_weight`` (B,)."""


@dataclass
class Progress:
    """Where a run is: all of it deterministic, and JSON in the checkpoint."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    evaluated: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0
    skipped: int = 0
    window: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class Run:
    """One call of :func:`mmvae.training.fit`, where the fields are described, and what is due between two of its steps."""

    accelerator: Accelerator
    state: Mapping[str, Any]
    folder: Path
    info: dict[str, Any]
    seed: int
    max_steps: int | None
    num_epochs: int | None
    patience: int | None
    patience_from: int
    evaluate: Callable[[], Mapping[str, float]] | None
    eval_every: int | None
    monitor: str | None
    log_every: int
    save_every: int
    keep: int
    max_skipped: int
    on_log: Callable[[dict[str, float]], None] | None
    file_rows: Callable[[Iterable[int]], list[int]] = list  # what the loader calls rows in messages
    progress: Progress = field(default_factory=Progress)
    pending: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)  # values of the last steps, still on the device; rows
    saved: tuple[int, int] = (0, 0)  # (step, step of the last evaluation) of the last checkpoint
    last: Path | None = None
    damaged: list[Path] = field(default_factory=list)  # checkpoints that were passed over
    history_whole: bool | None = None  # whether history.jsonl has every line, None before it is written
    origin: str | None = None  # the checkpoint of another folder that it began with
    seconds: float = 0.0
    lap: tuple[float, int, int] = (0.0, 0, 0)  # time, steps, rows since when rates are counted

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        if self.accelerator.scaler is not None:
            self.state = {**self.state, "scaler": self.accelerator.scaler}
        if reserved := {"progress", "clock"} & set(self.state):
            raise ValueError(f"state entry {reserved.pop()!r}: this name is taken by fit()")
        self.agreement = None
        if self.accelerator.num_processes > 1:
            self.agreement = torch.distributed.new_group(backend="gloo")  # on the CPU, so that asking waits for no device

    def done(self) -> bool:
        """Whether the run has reached its end: a function of the progress alone."""
        at = self.progress
        return (
            (self.max_steps is not None and at.step >= self.max_steps)
            or (self.num_epochs is not None and at.epoch >= self.num_epochs)
            or (self.patience is not None and at.stale >= self.patience)
        )

    def settle(self, signals: Signals) -> None:
        """All that is due between two steps: log, evaluate, save, stop."""
        at = self.progress
        stop = self.agree(signals.received)
        if at.step % self.log_every == 0 or self.done():
            self.log()
        improved = False
        if not stop and self.evaluation_due():
            improved = self.run_evaluation()
            stop = self.agree(signals.received)
        if self.done():
            self.log()
        due = stop or improved or self.done() or at.step % self.save_every == 0
        if due and (at.step, at.evaluated) != self.saved:
            self.save()
        if stop:
            self.accelerator.wait_for_everyone()
            self.say(f"stopped by {signal.Signals(stop).name} at step {at.step}; last checkpoint: {self.last}")
            raise SystemExit(128 + stop)

    def agree(self, received: int) -> int:
        """The signal that any rank has received, 0 for none: the same on all ranks at the same step."""
        if self.agreement is None:
            return received
        flag = torch.tensor(received)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.agreement)
        return int(flag)

    def elapsed(self) -> float:
        """Seconds spent in this life of the run and those before."""
        return self.seconds + time.monotonic() - self.started

    # logging

    def record(self, values: Mapping[str, Tensor | float], batch: Mapping[str, Tensor]) -> None:
        self.pending.append((dict(values), batch["row"]))
        since, steps, total = self.lap
        self.lap = (since, steps + 1, total + len(batch["row"]) * self.accelerator.num_processes)
        self.bar.update()

    def flush(self) -> None:
        """Bring the values of the pending steps to the host, averaged over ranks; tell the steps that were skipped."""
        at, pending = self.progress, self.pending
        self.pending = []
        rows = [values for values, _ in pending]
        not_finite = [values.pop("not_finite", None) for values in rows]
        names = [name for name, value in rows[0].items() if isinstance(value, Tensor)] if rows else []
        if names:
            table = torch.stack([torch.stack([row[name].detach().float() for name in names]) for row in rows])
            each = self.accelerator.gather(table[None])  # one by one, as the order of a sum depends on how many steps are pending
            for row, values in zip(rows, (sum(each.unbind(0)) / len(each)).tolist(), strict=True):
                row.update(zip(names, values, strict=True))
        for n, row in enumerate(rows):
            at.skipped = at.skipped + 1 if row.get("skipped") else 0
            if at.skipped:
                self.tell_skipped(at.step - len(rows) + 1 + n, pending[n][1], not_finite[n])
        scaler = self.accelerator.scaler
        if rows and scaler is not None and scaler.get_scale() < _LEAST_SCALE:
            raise FloatingPointError(
                f"step {at.step}: the scale of float16 gradients has shrunk to {scaler.get_scale():.3g}, so they vanish: "
                f"train with mixed_precision bf16 or no; the last good checkpoint is {checkpoint.newest(self.folder)[0] or 'none'}"
            )
        at.window += rows

    def tell_skipped(self, n: int, rows: Tensor, not_finite: Tensor | None) -> None:
        """Name the rows that made step ``n`` not finite; stop after too many such steps in a row. ``rows``: (B,) of this rank."""
        bad = rows[not_finite.cpu()] if not_finite is not None else rows[:0]
        shown = torch.full((2, 8), -1)  # the first rows whose loss is not finite, and the first of all
        for line, found in zip(shown, (bad, rows), strict=True):
            line[: len(found)] = found[:8]
        ranks = self.accelerator.gather(shown[None].to(self.accelerator.device)).tolist()
        of_loss = any(max(first) >= 0 for first, _ in ranks)
        named = [self.file_rows(row for row in (first if of_loss else every) if row >= 0) for first, every in ranks]
        where = ", ".join(f"rows {', '.join(map(str, found))} on rank {rank}" for rank, found in enumerate(named) if found)
        reason = f"step {n}: not taken, {'the loss' if of_loss else 'no loss, but a gradient'} was not finite: {where}"
        self.say(reason)
        if self.progress.skipped >= self.max_skipped and (of_loss or self.accelerator.scaler is None):  # else it looks for its scale
            raise FloatingPointError(
                f"{reason}; these are {self.progress.skipped} steps in a row; the last good checkpoint is "
                f"{checkpoint.newest(self.folder)[0] or 'none'}"
            )

    def log(self) -> None:
        self.flush()
        window, self.progress.window = self.progress.window, []
        if not window:
            return
        means = {f"train/{name}": sum(row[name] for row in window) / len(window) for name in window[0]}
        since, steps, rows = self.lap
        seconds = max(time.monotonic() - since, 1e-9)
        self.publish(means, {"steps_per_second": steps / seconds, "rows_per_second": rows / seconds})
        self.lap = (time.monotonic(), 0, 0)

    def publish(self, values: dict[str, float], rates: dict[str, float]) -> None:
        """One line of history: deterministic figures into the checkpoint and the file, rates only to the screen and the trackers."""
        at = self.progress
        line = {"step": at.step, "epoch": at.epoch, **values}
        at.history.append(line)
        self.accelerator.log(values | rates, step=at.step)
        if not self.accelerator.is_main_process:
            return
        self.write_history()
        text = "  ".join(f"{name.removeprefix('train/')} {value:.5g}" for name, value in (values | rates).items())
        if self.bar.disable or not rates:
            self.say(f"step {at.step}  epoch {at.epoch}  {text}")
        else:
            self.bar.set_postfix_str(text)
        if self.on_log is not None:
            self.on_log(line)

    def write_history(self) -> None:
        """Append the last line to ``history.jsonl``; write all of it first, and after the disk refused one: the checkpoint has it too."""
        path, draft, whole = self.folder / "history.jsonl", self.folder / ".history.jsonl", self.history_whole
        lines = "".join(json.dumps(line) + "\n" for line in self.progress.history[-1 if whole else 0 :])
        self.history_whole = True
        try:
            with (path if whole else draft).open("a" if whole else "w", encoding="utf-8") as file:
                file.write(lines)
            if not whole:
                draft.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # all names refuse where the disk can only be read
                draft.unlink(missing_ok=True)
            self.history_whole = False
            if whole is not False:
                warnings.warn(f"{path}: cannot be written: {error}: the run goes on, and writes it when it can", stacklevel=2)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def progress_bar(self, loader: Batches) -> tqdm:
        total, at = self.max_steps, self.progress
        if total is None:
            with contextlib.suppress(TypeError):  # the length of a stream is not known
                total = self.num_epochs * len(loader)
        self.bar = tqdm(total=total, initial=at.step, unit="step", disable=None if self.accelerator.is_main_process else True)
        self.lap = (time.monotonic(), 0, 0)
        return self.bar

    # evaluation

    def evaluation_due(self) -> bool:
        at = self.progress
        if self.evaluate is None or at.evaluated == at.step:
            return False
        return self.done() or (at.batch == 0 if self.eval_every is None else at.step % self.eval_every == 0)

    def run_evaluation(self) -> bool:
        """Evaluate and publish; returns whether the monitored figure is the best so far."""
        at = self.progress
        torch.manual_seed(fold(self.seed, at.step, self.accelerator.process_index, _EVALUATION))
        figures = dict(self.evaluate())
        at.evaluated = at.step
        self.publish({f"eval/{name}": value for name, value in figures.items()}, {})
        self.lap = (time.monotonic(), 0, 0)
        if self.monitor is None:
            return False
        if self.monitor not in figures:
            raise ValueError(f"monitor={self.monitor!r}: evaluate() gave {sorted(figures)}")
        value, best = figures[self.monitor], at.best_value
        improved = math.isfinite(value) and (best is None or value < best)
        at.stale = 0 if improved or at.step < self.patience_from else at.stale + 1
        if improved:
            at.best_step, at.best_value = at.step, value
        return improved

    # checkpoints

    def save(self) -> None:
        self.flush()
        at = self.progress
        state = state_of(self.state)
        self.saved = (at.step, at.evaluated)
        if self.accelerator.is_main_process:
            state |= {"progress": asdict(at), "clock": {"seconds": self.elapsed()}}
            options = {"keep": self.keep, "best": at.best_step, "info": self.info, "damaged": self.damaged, "origin": self.origin}
            self.last = checkpoint.save(self.folder, at.step, state, **options)
        self.lap = (time.monotonic(), 0, 0)

    def restore(self, resume: str | Path, allowed: set[str]) -> None:
        """Load the checkpoint to go on from, if there is one; everything is checked before anything is changed."""
        if (source := self.choose(resume)) is not None:
            saved, manifest = checkpoint.load(source)
            changes = [c for c in checkpoint.compare(manifest["info"], self.info) if c.split(":")[0] not in allowed]
            if changes:
                told = f"{source}: the run has changed since this checkpoint was written (allow_changes lets what it names through):\n  "
                raise CheckpointError(told + "\n  ".join(changes))
            clock, progress = saved.pop("clock"), Progress(**saved.pop("progress"))
            load_state(source, self.state, saved)
            self.origin = manifest.get("origin")
            if source.resolve().parent != self.folder.resolve():
                self.origin = str(source.resolve())
                progress.best_step, progress.best_value, progress.stale = None, None, 0  # the best so far lies there, not here
            self.progress, self.seconds, self.last = progress, clock["seconds"], source
            self.saved = (progress.step, progress.evaluated)
        if self.accelerator.is_main_process:
            self.write_history()
            self.say(f"resumed from {source}" if source else f"starting from step 0 in {self.folder}")
        self.accelerator.wait_for_everyone()

    def choose(self, resume: str | Path) -> Path | None:
        source, passed_over = checkpoint.choose(self.folder, resume)
        self.damaged = [path for path, _ in passed_over]
        for path, reason in passed_over:
            self.say(f"passed over {path.name}: {reason}")
        names = gather_object([source and source.name])
        if len(set(names)) > 1:
            raise CheckpointError(f"{self.folder}: the ranks would go on from {names}, expected the same: is the folder shared by all?")
        return source


def train_epoch(run: Run, step: Step, loader: Batches, signals: Signals) -> None:
    """Train to the end of the epoch, or of the run, from where the run is."""
    at, accelerator = run.progress, run.accelerator
    batches = iter(loader.batches(at.epoch, at.batch))
    batch = next(batches, None)
    if batch is None:
        raise ValueError(
            f"epoch {at.epoch} has no batch number {at.batch}: the loader is empty or shorter than when the checkpoint was written"
        )
    while batch is not None and not run.done():
        torch.manual_seed(fold(run.seed, at.step, accelerator.process_index))
        values = step(to_device(accelerator.device, batch), at.step)
        run.record(values, batch)
        failure = None
        try:
            batch = next(batches, None)  # made on the host while the device still works on the step
        except Exception as error:  # the step is done, and a row after the last step is nobody's
            failure = error
        at.step += 1
        at.epoch, at.batch = (at.epoch + 1, 0) if batch is None else (at.epoch, at.batch + 1)
        run.settle(signals)
        if failure is not None and not run.done():
            raise failure


def to_device(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on ``device``; copies from pinned memory are not waited for."""
    return {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in batch.items()}
