"""The real recipes on tiny data: in this process, on several ranks, and killed in the middle of a step.

Imported by the tests, and run as a script in processes of its own:

    torchrun --nproc_per_node 2 tests/recipe_runs.py ranks '{"report": ..., "runs": [...]}'
    python tests/recipe_runs.py kill '{"runs": [...]}'
"""

import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from distributed_toy import digest
from PIL import Image

from mmvae import experiment
from mmvae.optimization import unwrap

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = ["--batch_size", "8", "--num_epochs", "2", "--warmup_steps", "2", "--log_every", "1", "--save_every", "2", "--latent_dim", "4"]
TINY += ["--importance_samples", "3", "--mixed_precision", "no", "--kl_options", '{"steps": 10}', "--learning_rate", "0.003"]
TEXT = ["--hidden_size", "16", "--embedding_size", "16", "--objective_options", "{}", *TINY]
IMAGE = ["--image_size", "16", "--hidden_channels", "8", "16", "--max_grad_norm", "1000", *TINY]
# everything that makes exact resume hard
TEXT_ALL = [
    "--embedding_dropout",
    "0.2",
    "--encoder_dropout",
    "0.2",
    "--dropout",
    "0.2",
    "--word_dropout",
    "0.3",
    "--bidirectional",
    "true",
]
TEXT_ALL = [*TEXT, *TEXT_ALL, "--accumulation", "2", "--ema_decay", "0.9"]
IMAGE_ALL = ["--horizontal_flip", "0.5", "--vertical_flip", "0.5", "--shift", "2", "--min_scale", "0.7", "--rotation", "10"]
IMAGE_ALL += ["--brightness", "0.2", "--binarize", "dynamic", "--likelihood", "bernoulli", "--dropout", "0.2", "--input_noise", "0.1"]
IMAGE_ALL = [*IMAGE, *IMAGE_ALL, "--accumulation", "2", "--ema_decay", "0.9"]


def sentences(folder: Path, train: int = 20, validation: int = 9, test: int = 7) -> Path:
    """A folder of jsonl files; the last training batch of 8 is not full."""
    rng, words = random.Random(0), ["red", "blue", "big", "small", "heart", "square", "at", "top", "left", "on", "dark"]
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        rows = [{"label": i % 2, "text": " ".join(rng.choices(words, k=rng.randint(1, 9)))} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pictures(folder: Path, train: int = 20, validation: int = 9, size: int = 20) -> Path:
    """An image folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(folder / split / f"{i:04d}.jpg")
    return folder


def recipe(name: str):
    """The module of a recipe."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, argv: list[str], *, signal_at: int | None = None, number: int = signal.SIGTERM, whole: bool = True) -> dict:
    """Run a recipe's ``main`` here.

    ``signal_at``: the number of the optimizer step before whose end this process sends itself the signal. ``whole``: evaluate and
    write the model folder too. Returns the exit status, the history and a digest of the weights that this rank ended training with.
    """
    outcome, steps = {"exit": 0}, iter(range(1_000_000))
    update, load_weights = experiment.update, experiment.load_weights

    def signalling(*args, **options):
        if next(steps) == signal_at:
            os.kill(os.getpid(), number)
        return update(*args, **options)

    def observing(model, folder):
        weights = {name: x.tolist() for name, x in unwrap(model).state_dict().items()}
        outcome["weights"] = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
        load_weights(model, folder)

    module = recipe(name)
    if not whole:
        module.finish = lambda *_, **__: None
    with (
        mock.patch.multiple(experiment, update=signalling, load_weights=observing),
        mock.patch.object(sys, "argv", [f"recipes/{name}.py", *map(str, argv)]),
    ):
        try:
            module.main()
        except SystemExit as stopped:
            outcome["exit"] = stopped.code
    if "--output_dir" in argv:
        folder = Path(argv[argv.index("--output_dir") + 1])
        lines = (folder / "checkpoints" / "history.jsonl").read_text().splitlines()
        outcome |= {"history": [json.loads(line) for line in lines], "digest": end(folder)}
    return outcome


def end(folder: Path) -> list:
    """What must not depend on when a run was stopped: its last checkpoint and history, and of a finished run its weights and figures."""
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "model.safetensors",) if path.exists()]
    files += [json.loads(path.read_text())["metrics"] for path in (folder / "metrics.json",) if path.exists()]
    return [*digest(folder / "checkpoints"), *files]


def ranks(options: dict) -> None:
    """Runs one after the other on every rank; each rank writes what came of them to a file of its own."""
    from accelerate import Accelerator

    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it would take the process group from the runs that follow
    world = Accelerator(cpu=True)
    outcomes = []
    for each in options["runs"]:
        if each.pop("signal_rank", world.process_index) != world.process_index:
            each.pop("signal_at")
        outcomes.append(run(**each) | {"world": world.num_processes})
        world.wait_for_everyone()
    (Path(options["report"]) / f"rank{world.process_index}.json").write_text(json.dumps(outcomes))
    world.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # the teardown of gloo sometimes aborts after all work is done


def kill(options: dict) -> None:
    """Fork each run, let it SIGKILL itself in the middle of a step, and run it again to its end."""
    torch.set_num_threads(1)
    for each in options["runs"]:
        for life, at in enumerate([*each.pop("kill_at"), None]):
            child = os.fork()
            if child == 0:
                try:
                    run(**each, signal_at=at, number=signal.SIGKILL)
                finally:
                    os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) == (at is not None), f"life {life} of {each}: status {status}"


if __name__ == "__main__":
    {"ranks": ranks, "kill": kill}[sys.argv[1]](json.loads(sys.argv[2]))
