"""The benchmarks as a user runs them, on tiny sizes, and that what they compare is the same work."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from recipe_runs import pictures, recipe, sentences

ROOT = Path(__file__).parent.parent


def test_benchmark_joint(tmp_path):
    sizes = ["--image_size", "8", "--num_tokens", "4", "--latent_dim", "4", "--batch_size", "8", "--repeats", "1"]
    options = ["--modalities", "1", "2", "4", "--kinds", "image", "text", "--missing", "0.5", *sizes, "--output", str(tmp_path / "figures")]
    command = [sys.executable, "-W", "error", str(ROOT / "recipes" / "benchmark_joint.py"), *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| M | alone ms | joint ms |" in done.stdout
    figures = json.loads((tmp_path / "figures").read_text())
    one, two, four = figures["results"]
    assert [result["M"] for result in figures["results"]] == [1, 2, 4]
    assert one["state MiB"] < two["state MiB"] < four["state MiB"] < 2.2 * two["state MiB"]  # every modality twice, and the prior once
    for result in figures["results"]:
        assert result["lowest"] <= result["ratio"] <= result["highest"]
        assert result["alone MiB"] < result["joint MiB"] < 2 * result["alone MiB"]
        assert 0 < result["bf16 error"] < 0.05  # 0 would be float32
    assert set(figures["fit"]) == {"ms of one more modality", "offset ms", "largest deviation"}
    assert figures["arguments"]["missing"] == 0.5


def test_benchmark(tmp_path, monkeypatch, capsys):
    data = ["--text", sentences(tmp_path / "words"), "--images", pictures(tmp_path / "pictures"), "--output", tmp_path / "figures.json"]
    sizes = ["--image_size", "16", "--text_batch", "8", "--image_batch", "8", "--steps", "1", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["recipes/benchmark.py", *map(str, data), *sizes])
    recipe("benchmark").main()
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "| text training | tokens/s |" in printed and "| image training | images/s |" in printed
    for result in figures["results"].values():
        assert result["ratio"] == pytest.approx(result["mmvae"] / result["reference"])


@pytest.fixture(scope="module")
def joint():
    return recipe("benchmark_joint")


def test_joint_and_alone_train_the_same_parameters(joint):
    args = joint.BenchmarkArguments(kinds=["image", "text"], image_size=8, num_tokens=4, latent_dim=4, batch_size=8)
    model, inputs, present = joint.build(args, 3)

    def trained(losses):
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}

    assert trained(joint.joint(model, inputs, present)) == trained(joint.alone(model, inputs)) != set()


def test_kept_counts_bytes_once_and_no_parameters(joint):
    model = torch.nn.Linear(256, 1024, bias=False)
    x = torch.ones(1024, 256)
    assert joint.kept(lambda: [model(x)], model) == 1  # the input alone
    assert joint.kept(lambda: [model(x), model(x).square()], model) == 1 + 4  # the same input once, and what is squared


def test_bf16_refuses_a_gradient_that_is_missing(joint):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

        def losses(self):
            yield self.used(torch.ones(1, 1)).sum()

    model = Half()
    with pytest.raises(FloatingPointError, match=r"unused\.weight"):
        joint.bf16_error(partial(model.losses), model, 0)
