"""Two gloo ranks train a joint model on rows that lack captions: nobody waits for anybody, and the curve is that of one rank."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import datasets
import pytest
from PIL import Image
from recipe_runs import TINY, ranks
from test_recipes import environment

from mmvae.data import ImageColumn, Loader, Rows, TextColumn, as_modalities, load_rows
from mmvae.processing import train_tokenizer

COLOURS = ["red", "green", "blue", "pink"]
VAES = {"image": {"image_size": 8, "hidden_channels": [4, 8], "norm": "none"}, "text": {"embedding_size": 8, "hidden_size": 8}}
JOINT = ["--modalities", "image:image,text:text", "--vaes", json.dumps(VAES), "--densities", "{}", "--likelihood_weights", '{"text": 3}']
JOINT += [*TINY, "--batch_size", "4", "--save_every", "100"]
PRIVATE = ["--private_dims", '{"image": 2, "text": 1}']
METHODS = {
    "mopoe": PRIVATE,
    "one drawn": ["--draw", "one", "--num_samples", "2", *PRIVATE],
    "mvtcae": ["--aggregation", "poe", "--objective", "mvtcae", "--prior", "vamp", "--prior_components", "3"],
    "mmvm": ["--aggregation", "moe", "--objective", "mmvm"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """22 rows of which 14 lack the caption and one the picture: the last batch of 4 is not full."""
    folder = tmp_path_factory.mktemp("rows")
    for split, size in (("train", 22), ("validation", 5)):
        pictures = [None if i == 3 else Image.new("RGB", (8, 8), COLOURS[i % 4]) for i in range(size)]
        texts = [f"a {'big ' * (i % 2)}{COLOURS[i % 4]} square" if i % 3 == 0 else None for i in range(size)]
        rows = datasets.Dataset.from_dict(
            {"image": pictures, "text": texts}, datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        )
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def train(data: str, folder: str) -> None:
    """Every method on one rank and then on two, in processes of their own that are forked from this one, which saves them the imports."""
    for world in (1, 2):
        place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        report = Path(folder, str(world))
        report.mkdir()
        runs = [["--dataset", data, "--output_dir", str(report / method), *JOINT, *options] for method, options in METHODS.items()]
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
                try:
                    ranks({"report": str(report), "runs": [{"name": "joint_vae", "argv": argv, "whole": False} for argv in runs]})
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def outcomes(data, tmp_path_factory) -> dict[str, list[dict]]:
    """What came of every method: on one rank alone, on the first of two and on the second. A hang ends it."""
    root = tmp_path_factory.mktemp("ranks")
    with (root / "errors").open("w") as errors:
        command = [sys.executable, __file__, data, str(root)]
        process = subprocess.Popen(command, env=environment(), stdout=errors, stderr=errors, start_new_session=True)
        try:
            assert process.wait(timeout=280) == 0, (root / "errors").read_text()[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    reports = [json.loads((root / f"{world}/rank{rank}.json").read_text()) for world, rank in ((1, 0), (2, 0), (2, 1))]
    assert [[outcome["world"] for outcome in report] for report in reports] == [[world] * len(METHODS) for world in (1, 2, 2)]
    return {method: [report[n] for report in reports] for n, method in enumerate(METHODS)}


def test_some_shares_lack_what_the_other_rank_has_and_some_batches_lack_it_altogether(data):
    """Else the tests below would show nothing. Rows without a caption come together: batches are bucketed by length."""
    tokenizer = train_tokenizer(["a big red green blue pink square"])
    columns = as_modalities({"image": ImageColumn("image", (8, 8), 3), "text": TextColumn("text", tokenizer)})
    rows = Rows(load_rows(data), columns)
    shares = [[b["present"][:, 1].any() for e in (0, 1) for b in Loader(rows, 4, rank=r, world_size=2).batches(e)] for r in (0, 1)]
    kinds = {tuple(map(bool, pair)) for pair in zip(*shares, strict=True)}
    assert (False, False) in kinds
    assert kinds & {(True, False), (False, True)}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_follow_the_curve_of_one(outcomes, method):
    one, first, _ = (outcome["history"] for outcome in outcomes[method])
    losses = [line["train/loss"] for line in one if "train/loss" in line]
    assert len(losses) == len(set(losses)) == 12
    for mine, theirs in zip(one, first, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_never_drift_apart(outcomes, method):
    _, first, second = outcomes[method]
    assert first["weights"] == second["weights"]


if __name__ == "__main__":
    train(*sys.argv[1:])
