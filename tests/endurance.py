"""What takes longer than the suite may: full disks, steps that are not finite, and a long run with many saves.

    python tests/endurance.py disk      50 saves onto a file system that is full at another byte each time (needs unshare)
    python tests/endurance.py nans      100 steps whose loss, gradient or input is made not finite; --ranks 2: on one of two gloo ranks
    python tests/endurance.py retention 500 runs of saves, crashes and damage: which checkpoints are kept
    python tests/endurance.py saving    the share of the time that saving takes in the default runs of two recipes
    python tests/endurance.py soak      100,000 steps with 1,000 saves and 10 resumes: memory and open files

Each prints one line of JSON; the exit code is 1 when anything was lost or not told.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from distributed_toy import make, run
from recipe_runs import recipe

from mmvae import checkpoint, loop
from mmvae.checkpoint import CheckpointError
from mmvae.optimization import unwrap
from mmvae.training import fit


def disk(root: Path) -> dict:
    """Mount 4 MiB as root of a name space of its own, and save there."""
    mount = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, root, sys.executable, __file__, "filled", "--folder", root], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def filled(root: Path) -> dict:
    """Save 50 times where a random number of bytes is free that is not enough."""
    rng = random.Random(0)
    state = {"model": {"w": torch.zeros(200_000)}, "ema": {"w": torch.ones(50_000)}, "progress": {"step": 1}}
    good = checkpoint.save(root / "run", 1, state)
    lost = named = rubbish = 0
    for _ in range(50):
        place = os.statvfs(root)
        free = rng.randrange(1_000_000)
        (root / "filler").write_bytes(bytes(place.f_bavail * place.f_frsize - free))
        try:
            checkpoint.save(root / "run", 2, state)
        except CheckpointError as error:
            named += all(text in str(error) for text in (f"{root}/run/.tmp-2-", "about 1,000,000 bytes", "No space left on device"))
        (root / "filler").unlink()
        lost += checkpoint.newest(root / "run") != (good, [])
        rubbish += len(list((root / "run").iterdir())) - 1
    return {"saves": 50, "lost": lost, "named": named, "rubbish": rubbish, "fault": bool(lost or rubbish or named < 50)}


def nans(root: Path, ranks: int = 1) -> dict:
    """Spoil 100 of 400 steps at random places, each on one rank, and read every checkpoint."""
    if ranks > 1 and "RANK" not in os.environ:
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, "nans", "--ranks", str(ranks)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", *command, "--folder", root], env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1) and done.stdout, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])
    rng = random.Random(0)
    bad = {n: (rng.choice(["loss", "gradient", "input"]), rng.choice([math.nan, math.inf])) for n in rng.sample(range(400), 100)}
    accelerator, step, loader, arguments = make(num_epochs=None, max_steps=400, save_every=5, evaluate=None, max_skipped=50, log_every=5)
    spoiler = {n: rng.randrange(ranks) for n in bad}
    model = unwrap(arguments["state"]["model"])
    weights = list(model.parameters())
    now: dict = {}
    for weight in weights:
        weight.register_hook(lambda g, mine=weight: g * now["value"] if now.get("place") == "gradient" and mine is now["weight"] else g)
    model.register_forward_hook(lambda *a: a[2] * now["value"] if now.get("place") == "loss" else a[2])
    model.inner[1].register_forward_hook(lambda *a: a[2] + now["value"] if now.get("place") == "input" else a[2])
    spoilt = 0

    def spoiling(batch, n):
        now.clear()
        if n in bad:
            weight = rng.choice(weights)
            if spoiler[n] == accelerator.process_index:
                now.update(place=bad[n][0], value=bad[n][1], weight=weight)
        return step(batch, n)

    def check(_):
        nonlocal spoilt
        newest, _ = checkpoint.newest(root)
        if newest is not None:
            state, _ = checkpoint.load(newest)
            tensors = [*state["model"].values(), *state["ema"]["weights"].values()]
            tensors += [value for moments in state["optimizer"]["state"].values() for value in moments.values()]
            spoilt += not all(x.isfinite().all() for x in tensors)

    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = fit(accelerator, spoiling, loader, folder=root, **arguments | {"on_log": check})
    taken = torch.tensor([int(arguments["state"]["optimizer"].state_dict()["state"][0]["step"])])
    ended = [x.tolist() for x in (accelerator.gather(taken), accelerator.gather(torch.cat([w.detach().flatten() for w in weights])[None]))]
    check(None)
    told = {int(line.split()[1][:-1]) - 1: line for line in said.getvalue().splitlines() if "not taken" in line and "rows " in line}
    # a gradient is the sum of all ranks' gradients, so only of a loss is it known whose it was
    blamed = {n: f"on rank {spoiler[n]}" in line and (bad[n][0] == "gradient" or line.count("on rank") == 1) for n, line in told.items()}
    outcome = {"steps": result.step, "not_finite": len(bad), "told": sum(blamed.values()), "spoilt_checkpoints": spoilt, "taken": ended[0]}
    outcome |= {"ranks": ranks, "equal_weights": all(weights == ended[1][0] for weights in ended[1])}
    right = told.keys() == bad.keys() and all(blamed.values()) and ended[0] == [300] * ranks and outcome["equal_weights"]
    return outcome | {"fault": bool(spoilt or not right)}


def saving(root: Path) -> dict:
    """The default runs of two recipes, as long as a thousand steps: seconds of the clock in saving for each second of CPU time in training.

    Other programs can make the former longer but not the latter, so they only make the share larger.
    """
    outcome = {}
    for name in ("image_vae", "text_vae"):
        module, spent, taken = recipe(name), [], []
        arguments = [f"{name}.py", "--max_steps", "1000", "--output_dir", str(root / name)]
        with (
            mock.patch.object(loop.Run, "save", timed(loop.Run.save, spent, time.monotonic)),
            mock.patch.object(module, "train", timed(module.train, taken, time.process_time)),
            mock.patch.object(module, "finish"),
            mock.patch.object(sys, "argv", arguments),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            module.main()
        size = sum(file.stat().st_size for file in checkpoint.newest(root / name / "checkpoints")[0].iterdir())
        share = round(sum(spent) / sum(taken), 4)
        outcome[name] = {"saves": len(spent), "megabytes": round(size / 1e6, 1), "seconds": round(sum(taken)), "share": share}
    return outcome | {"fault": any(each["share"] >= 0.05 for each in outcome.values())}


def timed(function: Callable, seconds: list[float], clock: Callable[[], float]) -> Callable:
    """The function, which notes how long each call took."""

    def call(*args, **options):
        began = clock()
        result = function(*args, **options)
        seconds.append(clock() - began)
        return result

    return call


def retention(root: Path, sequences: int = 500) -> dict:
    """Saves, evaluations that improve, crashes and damage in random order: after each save exactly those are there that the rule keeps."""
    rng = random.Random(0)
    counts = dict.fromkeys(("saves", "deleted", "damaged", "wrong", "rubbish"), 0)
    for number in range(sequences):
        folder, keep, step, best = root / str(number), rng.randint(1, 3), 0, None
        kept: dict[Path, tuple] = {}  # complete checkpoints: step, revision, best step when it was written
        broken = set()
        if rng.random() < 0.2:  # of another run, whose steps are higher
            kept[checkpoint.save(folder, 1000, {})] = (1000, 0, None)
        for _ in range(rng.randint(4, 8)):
            if rng.random() < 0.2:  # a crash where nothing was sealed yet, and one in a deletion
                for name in (f"step-{step + 1:08d}", f".tmp-{step + 1}-{2**22 + 1}", f".tmp-oldstep-00000001-{2**22 + 1}"):
                    (folder / name).mkdir(parents=True, exist_ok=True)
                    (folder / name / "state.json").write_text("{")
                broken.add(folder / f"step-{step + 1:08d}")
            if rng.random() < 0.2 and kept:  # the newest is damaged, and the run goes on from the one before
                newest = max(kept, key=kept.get)
                (newest / "state.json").write_text("{")
                broken.add(newest)
                del kept[newest]
                step, _, best = max(kept.values(), default=(0, 0, None))
                counts["damaged"] += 1
            step += rng.randint(1, 2)
            best = step if rng.random() < 0.3 else best
            written = checkpoint.save(folder, step, {"progress": {"best": best}}, keep=keep, best=best)
            others = sorted((path for path in kept if path != written), key=kept.get, reverse=True)
            gone = [path for path in others[max(keep, 2) - 1 :] if kept[path][0] != best]
            kept[written] = (step, int(written.suffix[1:] or 0), best)
            kept = {path: kept[path] for path in kept if path not in gone}
            counts["saves"] += 1
            counts["deleted"] += len(gone)
            counts["wrong"] += set(folder.glob("step-*")) != {*kept, *broken} or checkpoint.newest(folder)[0] != max(kept, key=kept.get)
            counts["rubbish"] += len(list(folder.glob(".tmp-*")))
    return counts | {"sequences": sequences, "fault": bool(counts["wrong"] or counts["rubbish"])}


def soak(root: Path, first: int = 1000, more: int = 9_900, save_every: int = 100) -> dict:
    """A life of some steps, whose memory is the measure, and ten that go on for more each."""
    options = {"num_epochs": None, "save_every": save_every, "log_every": 1000, "eval_every": 5000, "accumulation": 1}
    memory, files, folders, started = [], [], [], time.monotonic()
    for life in range(11):
        with contextlib.redirect_stdout(io.StringIO()):
            result, _ = run(root, max_steps=first + more * life, **options)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
        folders.append(len(list(root.glob("step-*"))))
    drift = max(memory) / memory[0] - 1
    outcome = {"steps": result.step, "megabytes": [round(each / 1e6, 1) for each in memory], "drift": round(drift, 4), "files": files}
    outcome |= {"folders": max(folders), "seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time())}
    return outcome | {"fault": drift >= 0.02 or len(set(files)) > 1 or max(folders) > 3}


def main() -> None:
    """One of them by the command line; prints its outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["disk", "filled", "nans", "retention", "saving", "soak"])
    parser.add_argument("--ranks", type=int, default=1, help="of nans: 2 spoils one of two gloo ranks")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = globals()[args.what](args.folder or Path(folder), *([args.ranks] if args.what == "nans" else []))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(outcome), flush=True)
    if "RANK" in os.environ:
        os._exit(outcome["fault"])  # the teardown of gloo sometimes aborts after all work is done
    sys.exit(outcome["fault"])


if __name__ == "__main__":
    main()
