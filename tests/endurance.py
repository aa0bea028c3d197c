"""What takes longer than the suite may: full disks, steps that are not finite, and a long run with many saves.

    python tests/endurance.py disk      50 saves onto a file system that is full at another byte each time (needs unshare)
    python tests/endurance.py nans      100 steps whose loss, gradient or input is made not finite
    python tests/endurance.py soak      100,000 steps with 1,000 saves and 10 resumes: memory and open files

Each prints one line of JSON; the exit code is 1 when anything was lost or not told.
"""

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
from pathlib import Path

import torch
from distributed_toy import make, run

from mmvae import checkpoint
from mmvae.checkpoint import CheckpointError
from mmvae.training import fit


def disk(root: Path) -> dict:
    """Mount 4 MiB as root of a name space of its own, and save there."""
    mount = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, root, sys.executable, __file__, "filled", root], capture_output=True, text=True
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


def nans(root: Path) -> dict:
    """Spoil 100 of 400 steps at random places, and read every checkpoint."""
    rng = random.Random(0)
    bad = {n: (rng.choice(["loss", "gradient", "input"]), rng.choice([math.nan, math.inf])) for n in rng.sample(range(400), 100)}
    accelerator, step, loader, arguments = make(num_epochs=None, max_steps=400, save_every=5, evaluate=None, max_skipped=50, log_every=5)
    weights = list(arguments["state"]["model"].parameters())
    now: dict = {}
    for weight in weights:
        weight.register_hook(lambda g, mine=weight: g * now["value"] if now.get("place") == "gradient" and mine is now["weight"] else g)
    arguments["state"]["model"].register_forward_hook(lambda *a: a[2] * now["value"] if now.get("place") == "loss" else a[2])
    arguments["state"]["model"].inner[1].register_forward_hook(lambda *a: a[2] + now["value"] if now.get("place") == "input" else a[2])
    spoilt = wrong = 0

    def spoiling(batch, n):
        now.clear()
        if n in bad:
            now.update(place=bad[n][0], value=bad[n][1], weight=rng.choice(weights))
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
    check(None)
    told = {int(line.split()[1][:-1]) - 1 for line in said.getvalue().splitlines() if "not taken" in line and "rows " in line}
    wrong = len(told ^ set(bad))
    taken = int(arguments["state"]["optimizer"].state_dict()["state"][0]["step"])
    outcome = {"steps": result.step, "not_finite": len(bad), "told": len(told), "spoilt_checkpoints": spoilt, "taken": taken}
    return outcome | {"fault": bool(spoilt or wrong or taken != 300)}


def soak(root: Path) -> dict:
    """Ten lives of 10,000 steps, one save for each hundred."""
    options = {"num_epochs": None, "save_every": 100, "log_every": 1000, "eval_every": 5000, "accumulation": 1}
    memory, files, started = [], [], time.monotonic()
    for life in range(1, 11):
        with contextlib.redirect_stdout(io.StringIO()):
            run(root, max_steps=10_000 * life, **options)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))
    drift = memory[-1] / memory[0] - 1
    outcome = {"steps": 100_000, "drift": round(drift, 4), "files": files, "folders": len(list(root.glob("step-*")))}
    return outcome | {"seconds": round(time.monotonic() - started), "fault": drift >= 0.02 or len(set(files)) > 1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(folder)
        outcome = {"disk": disk, "filled": filled, "nans": nans, "soak": soak}[sys.argv[1]](given)
    print(json.dumps(outcome))
    sys.exit(outcome["fault"])
