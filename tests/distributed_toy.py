"""A toy run with everything that makes exact resume hard: dropout, keyed noise, accumulation, an incomplete last batch, EMA, a schedule.

Imported by the tests, and run as a script in processes of its own:

    torchrun --nproc_per_node 2 tests/distributed_toy.py train '{"folder": ...}'      several ranks
    python tests/distributed_toy.py kill '{"folder": ..., "kills": 12}'               a server that forks runs and kills them
"""

import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mmvae import checkpoint
from mmvae.data import BadRow
from mmvae.noise import fold, keyed_normal
from mmvae.training import EMA, evaluate, fit, load_weights, update


class ToyLoader:
    """The interface of mmvae's Loader over made-up rows of four numbers."""

    def __init__(self, num_rows=11, batch_size=4, *, seed=0, rank=0, world_size=1, fingerprint="toy"):
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.fingerprint = rank, world_size, fingerprint
        self.x = keyed_normal(fold(seed, torch.arange(num_rows)), (4,))

    def __len__(self):
        return math.ceil(self.num_rows / self.batch_size)

    def batches(self, epoch, start=0):
        order = fold(self.seed, epoch, torch.arange(self.num_rows)).argsort()
        for rows in order.split(self.batch_size)[start : len(self)]:
            n = len(rows)
            share = rows[self.rank * n // self.world_size : (self.rank + 1) * n // self.world_size]
            weight = torch.ones(len(share))
            if not len(share):
                share, weight = rows[:1], torch.zeros(1)
            yield {"row": share, "row_weight": weight, "x": self.x[share], "num_rows": torch.tensor(n)}


class ToyModel(torch.nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 4))

    def forward(self, x, noise):
        return ((self.inner(x + 0.1 * noise) - x) ** 2).sum(-1)


def make(
    *,
    dropout=0.1,
    lr=0.05,
    fused=True,
    accumulation=2,
    world=None,
    batch_size=4,
    num_rows=11,
    nan_from=None,
    nan_rank=0,
    hook=None,
    **options,
):
    """The arguments of ``fit`` for a toy run, and its objects."""
    accelerator = world or Accelerator(cpu=True)
    torch.manual_seed(0)
    plain = ToyModel(dropout)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=lr, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + 0.1 * n))
    model, optimizer = accelerator.prepare(plain, optimizer)
    ema = EMA(model, 0.9)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    train = ToyLoader(num_rows, batch_size, **ranks)
    held_out = ToyLoader(7, 3, seed=9, **ranks)

    def step(batch, n):
        if hook is not None:
            hook(n)
        bad = nan_from is not None and n >= nan_from and accelerator.process_index == nan_rank

        def losses(part):
            loss = model(part["x"], keyed_normal(fold(0, n, part["row"]), (4,)))
            return loss.where(part["row"] != part["row"].max(), math.nan) if bad else loss

        return update(
            accelerator,
            model,
            optimizer,
            losses,
            batch,
            accumulation=accumulation,
            max_grad_norm=1.0,
            scheduler=scheduler,
            ema=ema,
        ) | {"beta": min(1.0, n / 10)}

    def measure(batch):
        return {"nll": model(batch["x"], keyed_normal(fold(1, batch["row"]), (4,)))}

    def validate():
        with ema.applied():
            return evaluate(accelerator, measure, held_out, models=[model])

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    arguments = {"num_epochs": 2, "log_every": 2, "save_every": 1, "evaluate": validate} | options
    return accelerator, step, train, {"state": state, **arguments}


def run(folder, **options):
    """A toy run in this process; returns the result and its state dicts."""
    accelerator, step, loader, arguments = make(**options)
    result = fit(accelerator, step, loader, folder=folder, **arguments)
    return result, arguments["state"]


def digest(folder):
    """sha256 of everything deterministic in the newest checkpoint, the history included."""
    newest, _ = checkpoint.newest(folder)
    state, manifest = checkpoint.load(newest)
    del state["clock"]
    text = json.dumps(_plain(state), sort_keys=True) + (Path(folder) / "history.jsonl").read_text()
    return hashlib.sha256(text.encode()).hexdigest(), manifest["step"]


def _plain(value):
    if isinstance(value, torch.Tensor):
        return [
            str(value.dtype),
            list(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex(),
        ]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def train(options):
    """Runs one after the other on every rank; each rank writes what came of them to a file of its own."""
    torch.set_num_threads(1)
    world = Accelerator(cpu=True)
    outcomes = [_outcome(world, **each) for each in options["runs"]]
    (Path(options["report"]) / f"rank{world.process_index}.json").write_text(json.dumps(outcomes))
    world.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # the teardown of gloo sometimes aborts after all work is done


def _outcome(world, folder, stop_at=None, raise_at=None, apart=False, **options):
    folder = Path(folder, str(world.process_index)) if apart else Path(folder)  # as on machines that share none
    if raise_at is not None and world.process_index == world.num_processes - 1:  # what a row that only one rank reads does

        def refuse(n):
            if n == raise_at:
                raise BadRow("rows: row 7, field 'image': cut short")

        options["hook"] = refuse
    if stop_at is not None and world.process_index == world.num_processes - 1:  # only one rank gets the signal
        options["hook"] = lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == stop_at else None
    outcome = {"world": world.num_processes}
    try:
        result, state = run(folder, world=world, **options)
        best = ToyModel()
        load_weights(best, result.checkpoint)
        outcome |= {
            "step": result.step,
            "history": result.history,
            "best": _plain(best.state_dict()),
            "digest": digest(folder),
        }
        outcome["weights"] = [p.tolist() for p in state["model"].parameters()]
    except SystemExit as stopped:
        outcome["exit"] = stopped.code
    except (FloatingPointError, checkpoint.CheckpointError) as error:
        outcome["error"] = str(error)
    world.wait_for_everyone()
    world.free_memory()
    return outcome


def kill(options):
    """Fork runs and SIGKILL them at random times until each has ended; print what came of them."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks: a child killed while it holds it stops all
    folder, rng = Path(options.pop("folder")), random.Random(0)
    kills, most = 0, options.pop("kills")
    options = {"num_epochs": 8, "log_every": 4, "save_every": 2} | options
    run(folder / "warm", **options)
    started = time.monotonic()
    run(folder / "reference", **options)
    seconds = time.monotonic() - started
    digests, landed = [], []
    while kills < most:
        root = folder / f"run{len(digests)}"
        while True:
            child = os.fork()
            if child == 0:
                try:
                    run(root, **options)
                finally:
                    os._exit(0)
            time.sleep(rng.uniform(0, 0.9 * seconds))
            if kills < most:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                last = checkpoint.newest(root)[0]
                landed.append(-1 if last is None else int(last.name[5:13]))
            else:
                break
        digests.append(digest(root)[0])
    outcome = {"reference": digest(folder / "reference")[0], "digests": digests, "landed": landed, "kills": kills}
    print(json.dumps(outcome | {"second_signal": _signal_twice(folder / "twice")}))


def _signal_twice(folder):
    """Exit code of a run that gets SIGTERM in a step that does not end, and again a second later."""
    child = os.fork()
    if child == 0:
        run(folder, hook=lambda n: ((folder / "ready").touch(), time.sleep(60), time.sleep(60)))
        os._exit(0)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    for wait in (1.2, 0):
        os.kill(child, signal.SIGTERM)
        time.sleep(wait)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    {"train": train, "kill": kill}[sys.argv[1]](json.loads(sys.argv[2]))
