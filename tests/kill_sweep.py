"""Kill training anywhere: a run that was killed again and again must end with the bits of one that never was.

    python tests/kill_sweep.py random --kills 100                at random times
    python tests/kill_sweep.py random --kills 50 --ranks 2       one of two gloo ranks, both, or their launcher
    python tests/kill_sweep.py random --kills 50 --signal TERM   a signal that the run may answer
    python tests/kill_sweep.py operations                        before every write, flush, rename and deletion
    python tests/kill_sweep.py operations --plant seeds          with a planted fault, which must be caught: seeds, in_place or epoch

What is trained is the joint recipe's model in small, with all that makes it hard: dropout, noise, augmentation, missing modalities, a
schedule of the learning rate, averaged weights, two micro-batches, an incomplete last batch. A life of a run is a process forked from this
one, which has imported everything, so that kills land in the run and not in its imports. Each writes a ledger of the rows of every step
and of every save. The exit code is 1 when a checkpoint was lost, a run got stuck, its bits or the order of its rows differ, a life hung,
or when the kills landed where they prove nothing, or not at all.
"""

import argparse
import contextlib
import ctypes
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState
from distributed_toy import digest
from PIL import Image
from recipe_runs import TINY, recipe
from test_joint_ranks import free_port
from tqdm.auto import tqdm

from mmvae import MMVAE, checkpoint, experiment, loop
from mmvae.data import Loader, Rows, splits

COLOURS = ["red", "green", "blue", "pink"]
VAES = {"image": {"image_size": 8, "hidden_channels": [4, 8], "norm": "none", "dropout": 0.1}}
VAES["text"] = {"embedding_size": 8, "hidden_size": 8, "dropout": 0.1, "word_dropout": 0.2}
OPTIONS = [*TINY, "--modalities", "image:image,text:text", "--vaes", json.dumps(VAES), "--densities", "{}", "--likelihood_weights", "{}"]
OPTIONS += ["--augmentation", '{"image": {"horizontal_flip": 0.5, "shift": 1}}', "--batch_size", "4", "--accumulation", "2"]
OPTIONS += ["--ema_decay", "0.9", "--log_every", "4"]
DURABLE = ("chmod", "fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
SET_CHILD_SUBREAPER = 36  # of prctl
HANG = 30.0  # seconds


# ---- one life of a run, in a process of its own


def rows_in(folder: Path) -> str:
    """22 rows of which 14 lack the caption and one the picture: the last batch of 4 is not full."""
    for split, size in (("train", 22), ("validation", 5)):
        pictures = [None if i == 3 else Image.new("RGB", (8, 8), COLOURS[i % 4]) for i in range(size)]
        texts = [f"a {'big ' * (i % 2)}{COLOURS[i % 4]} square" if i % 3 == 0 else None for i in range(size)]
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        datasets.Dataset.from_dict({"image": pictures, "text": texts}, features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


class World:
    """What every life shares: the data and the model, made once."""

    def __init__(self, root: Path, steps: int, save_every: int) -> None:
        (root / "rows").mkdir(parents=True)
        self.root, self.steps, self.save_every = root, steps, save_every
        module = recipe("joint_vae")
        argv = [*OPTIONS, "--dataset", rows_in(root / "rows"), "--max_steps", str(steps), "--save_every", str(save_every)]
        self.args, joint = experiment.parse(module.JointRun, module.JointArguments, argv=[*argv, "--eval_every", str(2 * save_every)])
        data = splits(self.args.dataset)
        model, _, columns = module.build(self.args, joint, data)
        changed = [module.replace(c, augmentation=joint.augmentation[c.modality]) if c.modality == "image" else c for c in columns]
        self.config = model.config
        self.rows = {"train": Rows(data["train"], changed, on_bad_row="skip_empty"), "validation": Rows(data["validation"], columns)}
        for split in self.rows:
            next(Loader(self.rows[split], 4).batches(0))
        with contextlib.redirect_stdout(io.StringIO()):
            self.args.max_steps = save_every
            self.train(root / "warm")
            self.args.max_steps = steps
        AcceleratorState._reset_state(reset_partial_state=True)  # so that a life finds out by itself which rank it is
        GradientState._reset_state()

    def train(self, folder: Path) -> None:
        self.args.output_dir = str(folder)
        accelerator = experiment.start(self.args)
        torch.manual_seed(self.args.seed)
        experiment.train(accelerator, self.args, MMVAE(self.config), experiment.make_loaders(accelerator, self.args, self.rows))

    def life(self, folder: Path, *, ranks: int = 1, plant: str | None = None, crash: int | None = None) -> int:
        """Start one; returns its process, which of several ranks is the launcher's."""
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child:
            return child
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            if ranks == 1:
                self.live(folder, plant, crash)
            else:
                launch(ranks, lambda: self.live(folder, plant, crash))
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def live(self, folder: Path, plant: str | None, crash: int | None) -> None:
        rank = os.environ.get("RANK", "0")
        (folder / f"process-{rank}").write_text(str(os.getpid()))
        if plant is not None:
            PLANTS[plant]()
        keep_ledger(folder / f"ledger-{rank}")
        if rank == "0":
            count_operations(folder / "operations", crash)
        self.train(folder)


def launch(ranks: int, live: Callable[[], None]) -> None:
    """What torchrun does, without its start: when one rank fails the others get SIGTERM, and after a while SIGKILL."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "sweep"}
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                live()
            except SystemExit as stopped:
                os._exit(stopped.code)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # the teardown of gloo sometimes aborts after all work is done
        running.add(child)
    forward = lambda number, _: [os.kill(process, number) for process in running]  # noqa: E731
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = 0
    while running:
        process, ended = os.wait()
        running.remove(process)
        if ended and not status:
            status = abs(os.waitstatus_to_exitcode(ended))
            forward(signal.SIGTERM, None)
            signal.signal(signal.SIGALRM, lambda *_: forward(signal.SIGKILL, None))
            signal.alarm(int(HANG))
    if status:
        raise SystemExit(status)


def keep_ledger(path: Path) -> None:
    """Write down the rows of every step, before it is taken, and the begin and end of every save."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    update, save = experiment.update, checkpoint.save

    def write(*what: object) -> None:
        os.write(file, json.dumps(what).encode() + b"\n")

    def recorded(*args, **options):
        write("step", options["scheduler"].last_epoch, options["batch"]["row"].tolist())
        return update(*args, **options)

    def timed(root, step, *args, **options):
        write("save", step)
        saved = save(root, step, *args, **options)
        write("saved", step)
        return saved

    experiment.update, checkpoint.save = recorded, timed


def count_operations(path: Path, crash: int | None) -> None:
    """Count what changes the disk, and die before operation number ``crash``."""
    numbers = itertools.count(1)

    def counted(function):
        @functools.wraps(function)
        def call(*args, **options):
            number = next(numbers)
            if number == crash:
                os.kill(os.getpid(), signal.SIGKILL)
            done = function(*args, **options)
            if crash is None:
                path.write_text(str(number))
            return done

        return call

    for name in DURABLE:
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save_file = counted(checkpoint.save_file)


# ---- faults that the sweep must catch


def plant_seeds() -> None:
    """The seed of a step comes from the state of the process, which no checkpoint restores."""
    numbers = itertools.count()
    loop.fold = lambda *_: next(numbers)


def plant_in_place() -> None:
    """Old checkpoints are deleted first, and the new one is written under its own name."""

    def save(root, step, state, *, info, **_):
        for old in Path(root).glob("step-*"):
            shutil.rmtree(old)
        folder = Path(root, f"step-{step:08d}")
        folder.mkdir(parents=True)
        manifest = checkpoint._manifest(step, checkpoint._write_state(folder, state), info, None)
        checkpoint.write_text(folder / "manifest.json", checkpoint.seal(manifest))
        return folder

    checkpoint.save = save


def plant_epoch() -> None:
    """The order of rows counts the epochs of this process."""
    batches, numbers = Loader.batches, itertools.count()
    Loader.batches = lambda self, epoch, start=0: batches(self, next(numbers) if self.shuffle else epoch, start)


PLANTS = {"seeds": plant_seeds, "in_place": plant_in_place, "epoch": plant_epoch}


# ---- the sweeps


class Sweep:
    """Runs, what was done to them, and what came of them."""

    def __init__(self, world: World, *, ranks: int = 1, plant: str | None = None) -> None:
        self.world, self.name = world, plant or "sweep"
        self.options = {"ranks": ranks, "plant": plant}
        names = ("runs", "kills", "missed", "lost", "stuck", "differ", "order", "hangs", "in_a_save", "after_step_1")
        self.counts = dict.fromkeys(names, 0)
        self.landed: set[int] = set()
        self.trouble: list[str] = []
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)  # ranks that lost their launcher become children of this process
        outcomes = []
        for number in range(2 if plant is None else 1):
            folder = world.root / f"{self.name}-reference{number}"
            started = time.monotonic()
            status = self.wait(world.life(folder, **self.options))
            self.seconds = time.monotonic() - started
            assert status == 0, (folder / "log").read_text()[-2000:]
            outcomes.append((digest(folder / "checkpoints"), self.steps(folder)))
        assert outcomes[0] == outcomes[-1], "two runs that nobody killed differ, so nothing can be shown"
        self.reference, (self.order, _) = outcomes[0][0], outcomes[0][1]
        assert len(self.order) == world.steps
        self.operations = int((folder / "operations").read_text())

    def randomly(self, kills: int, number: int, seed: int = 0) -> "Sweep":
        """Kill at uniformly random times, at most 8 times a run."""
        rng = random.Random(seed)
        while self.counts["kills"] < kills:
            folder = self.begin()
            for _ in range(min(8, kills - self.counts["kills"])):
                child = self.world.life(folder, **self.options)
                time.sleep(rng.uniform(0, 0.6 * self.seconds))
                self.kill(folder, child, number, rng)
                status = self.wait(child)
                if status == 0:
                    break
                self.killed(folder, status, number)
            self.end(folder)
        return self

    def each_operation(self, every: int = 1, first: int = 1) -> "Sweep":
        """Kill before operation n of a run, for every n."""
        for crash in range(first, self.operations + 1, every):
            folder = self.begin()
            status = self.wait(self.world.life(folder, crash=crash, **self.options))
            if status:
                self.killed(folder, status, signal.SIGKILL)
            else:  # there was no such operation, and nothing was shown
                self.counts["missed"] += 1
                self.trouble.append(f"{folder.name}: ended before operation {crash}")
            self.end(folder)
        return self

    def begin(self) -> Path:
        self.counts["runs"] += 1
        return self.world.root / f"{self.name}-{self.counts['runs']}"

    def kill(self, folder: Path, child: int, number: int, rng: random.Random) -> None:
        """One rank, all of them, or the launcher."""
        targets = [[child]]
        with contextlib.suppress(OSError, ValueError):
            ranks = [int((folder / f"process-{rank}").read_text()) for rank in range(self.options["ranks"])]
            if self.options["ranks"] > 1:
                targets += [[rank] for rank in ranks] + [ranks]
        for process in rng.choice(targets):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def wait(self, child: int) -> int:
        """Exit code of a life, after all of its processes are gone; what outlasts the limit is a hang."""
        status, until = 0, time.monotonic() + HANG + 10 * getattr(self, "seconds", HANG)
        while True:
            try:
                process, ended = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return status
            if process == child:
                status, until = os.waitstatus_to_exitcode(ended), time.monotonic() + HANG
            elif not process:
                time.sleep(0.005)
                if time.monotonic() > until:
                    self.counts["hangs"] += 1
                    self.trouble.append(f"a life hangs {HANG:.0f} s after it was over")
                    for remaining in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                        os.kill(int(remaining), signal.SIGKILL)
                    until = time.monotonic() + HANG

    def steps(self, folder: Path) -> tuple[dict[int, list[int]], list]:
        """Rows of each step by its number, and the ledger of the first rank, which saves; a step that came with other rows is trouble."""
        rows: dict[int, list] = {}
        for rank in reversed(range(self.options["ranks"])):
            path = folder / f"ledger-{rank}"
            ledger = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            own: dict[int, list] = {}
            for entry in ledger:
                if entry[0] == "step" and own.setdefault(entry[1], entry[2]) != entry[2]:
                    own[entry[1]] = ["replayed with other rows"]
            for step, ids in own.items():
                rows.setdefault(step, []).append(ids)
        return rows, ledger

    def killed(self, folder: Path, status: int, number: int) -> None:
        """Where the kill landed, and whether it lost a checkpoint."""
        self.counts["kills"] += 1
        ledger = self.steps(folder)[1]
        last = ledger[-1] if ledger else []
        step = max((entry[1] for entry in ledger if entry[0] == "step"), default=-1)  # another rank may be a step ahead of the save
        self.landed.add(step)
        self.counts["after_step_1"] += step >= 1
        self.counts["in_a_save"] += last[:1] == ["save"]
        newest, passed_over = checkpoint.newest(folder / "checkpoints")
        least = max(0, step) // self.world.save_every * self.world.save_every
        if (int(newest.name[5:13]) if newest else 0) < least:
            self.counts["lost"] += 1
            self.trouble.append(f"{folder.name}: killed in step {step} (ledger {last}): {newest} is the newest, {passed_over} passed over")
        if status not in (-number, 128 + number, number, 1) and self.options["ranks"] == 1:
            self.trouble.append(f"{folder.name}: ended with {status}")

    def end(self, folder: Path) -> None:
        """Let the run end by itself, and compare."""
        status = self.wait(self.world.life(folder, **self.options))
        if status:
            self.counts["stuck"] += 1
            self.trouble.append(f"{folder.name}: exit code {status}: {(folder / 'log').read_text()[-600:]}")
            return
        different = digest(folder / "checkpoints") != self.reference
        disorder = self.steps(folder)[0] != self.order
        self.counts["differ"] += different
        self.counts["order"] += disorder
        if not different and not disorder:
            shutil.rmtree(folder)

    def faults(self) -> int:
        return sum(self.counts[name] for name in ("lost", "stuck", "differ", "order", "hangs"))

    def report(self) -> dict:
        """The counts, and how many of the kills landed at different steps."""
        return self.counts | {"landed": len(self.landed), "faults": self.faults(), "trouble": self.trouble[:5]}

    def valid(self, randomly: bool) -> bool:
        """Whether every life that was to be killed was, and of random kills enough landed where they can show something: after step 1, at
        different steps, and inside of saves."""
        kills = self.counts["kills"]
        if not kills or self.counts["missed"]:
            return False
        if not randomly:
            return True
        spread = 0.4 * min(kills, 100, self.world.steps)
        return self.counts["after_step_1"] >= 0.9 * kills and len(self.landed) >= spread and self.counts["in_a_save"] >= 0.1 * kills


def short(folder: Path) -> dict:
    """A few operations of a short run, and each planted fault where it shows; for the suite."""
    world = World(folder, 8, 2)
    sweep = Sweep(world)
    outcome = {"sound": sweep.each_operation(every=sweep.operations // 3, first=sweep.operations // 4).report()}
    outcome["sound"]["valid"] = sweep.valid(randomly=False)
    sweep.operations *= 2
    outcome["missed"] = sweep.each_operation(first=sweep.operations).report() | {"valid": sweep.valid(randomly=False)}
    for plant in PLANTS:
        sweep = Sweep(world, plant=plant)
        # in the last save, which is of the second epoch
        outcome[plant] = sweep.each_operation(every=sweep.operations, first=9 * sweep.operations // 10).report()
    return outcome


def prepare() -> None:
    """What forked processes need of this one."""
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks: a child killed while it holds it stops all


def main() -> int:
    """A sweep by the command line; prints its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=["random", "operations", "short"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--every", type=int, default=1, help="operations: only every so many")
    parser.add_argument("--plant", choices=sorted(PLANTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if args.sweep == "short":
            print(json.dumps(short(Path(folder))))
            return 0
        steps, save_every = (60, 2) if args.sweep == "random" else (8, 2)
        sweep = Sweep(World(Path(folder), steps, save_every), ranks=args.ranks, plant=args.plant)
        if args.sweep == "random":
            sweep.randomly(args.kills, signal.Signals[f"SIG{args.signal}"], args.seed)
        else:
            sweep.each_operation(args.every)
        valid = sweep.valid(randomly=args.sweep == "random" and args.signal == "KILL")
        print(json.dumps(sweep.report() | {"valid": valid, "seconds": round(time.monotonic() - started)}, indent=1))
    return int(not valid or bool(sweep.faults()) != (args.plant is not None))


if __name__ == "__main__":
    sys.exit(main())
