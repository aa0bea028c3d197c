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

from mmvae import ImageVAEConfig, TextVAE, TextVAEConfig

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


def test_benchmark(tmp_path, monkeypatch, capsys, benchmark):
    data = ["--text", sentences(tmp_path / "words"), "--images", pictures(tmp_path / "pictures"), "--output", tmp_path / "figures.json"]
    sizes = {"batch_size": 8, "num_samples": 3, "num_sentences": 20, "num_pictures": 9, "warm_steps": 1, "seconds": 0, "repeats": 1}
    work = "text training 32,image training 28,decoder 28,log,sentences,loading,saving"
    options = [f"--{name}={value}" for name, value in sizes.items()] + ["--work", work, "--streamed_rows", "300", "--clock", "cpu"]
    monkeypatch.setattr(sys, "argv", ["recipes/benchmark.py", *map(str, data), *options])
    benchmark.main()
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "| text training 32 | tokens/s |" in printed and "| image training 28x28x1 | images/s |" in printed
    assert len(figures["results"]) == 8 and len(figures["ceilings"]) == 3
    assert list(figures["memory MiB"]) == ["100 rows", "300 rows"]
    assert figures["results"]["image training 28x28x1"]["GFLOP/s"] > 0
    for result in figures["results"].values():
        assert result["lowest"] == result["ratio"] == result["highest"]
        assert result["ratio"] == pytest.approx(result["mmvae"] / result["reference"])


def test_what_many_gpus_would_do(monkeypatch, capsys):
    scaling = recipe("benchmark_scaling")
    args = scaling.ScalingArguments(gpus=[8, 64], inside=100.0, between=10.0)
    assert scaling.sending(10**9, 1, args) == 0
    assert scaling.sending(10**9, 8, args) == pytest.approx(2 * 7 / 8 * 4 / 100)  # a ring of one node
    assert scaling.sending(10**9, 64, args) == pytest.approx(2 * 7 / 8 * 4 / 100 + 2 * 7 / 8 * 4 / 8 / 10)  # and of eight: an eighth each
    make, batch, _ = scaling.WORK["pictures 28x28x1, default"]
    model, rows = make()
    flops, operators = scaling.counted(model, rows)
    assert scaling.counted(model, rows, few=4)[0] == flops and operators > 100
    command = "recipes/benchmark_scaling.py --work pictures@28 --share 1 --launch 0 --gpus 8 --inside 1"
    monkeypatch.setattr(sys, "argv", [word.replace("@", " ") for word in command.split()])
    scaling.main()
    header, _, line, *_ = capsys.readouterr().out.splitlines()
    told = dict(zip(header.split(" | ")[1:], line.split(" | ")[1:], strict=True))
    assert float(told["arithmetic ms"]) == pytest.approx(1e3 * batch * flops / 989e12, rel=1e-2)
    sums = 2 * 7 / 8 * 4 * model.num_parameters() / 1e9
    alone = batch * flops / 989e12
    assert float(told["efficiency"]) == pytest.approx(alone / (alone + sums - 2 / 3 * alone), rel=1e-2)
    assert int(told["fewest rows |"].rstrip(" |")) == pytest.approx(batch * 1.5 * sums / alone, rel=1e-2)


@pytest.fixture
def benchmark(monkeypatch):
    """The recipe, with those that it is made of on the path as when it runs."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    return recipe("benchmark")


def test_references_do_the_same_work(benchmark):
    from benchmark_references import PlainImageVAE, transposed_decoder, write_sentences

    torch.manual_seed(0)
    model = PlainImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, scale=2.0)).eval()
    x, z = torch.rand(3, 1, 8, 8), torch.randn(3, 2)
    torch.testing.assert_close(model.encode(x)[0], model.vae.encode(x).loc)
    torch.testing.assert_close(model.decode(z).log_prob(x).flatten(1).sum(1), model.vae.decode(z).log_prob(x))
    both = model.log_marginal(x[0], 3000), model.vae.log_marginal(3000, pixel_values=x[:1])[0]
    torch.testing.assert_close(*both, atol=0.05, rtol=0)
    plain = transposed_decoder(ImageVAEConfig(image_size=28, latent_dim=2), 3, 60_000)
    assert plain(z).shape == (3, 3, 28, 28) and abs(sum(p.numel() for p in plain.parameters()) - 60_000) < 2_000
    writer = TextVAE(TextVAEConfig(vocab_size=12, embedding_size=6, hidden_size=8, latent_dim=3)).eval()
    z = 5 * torch.randn(6, 3)
    ours = [[word for word in row[1:] if word not in (0, 2)] for row in writer.generate(latents=z, max_new_tokens=9).tolist()]
    assert [[word for word in row if word] for row in write_sentences(writer, z, 9)] == ours


@pytest.mark.parametrize("network", ["default", "transposed", "levels"])
def test_networks_are_trained_alike(network, tmp_path, monkeypatch, capsys, benchmark):
    command = f"recipes/benchmark_decoder.py --network {network} --steps 2 --batch_size 4 --latent_dim 2 --test_rows 3 --num_samples 2"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--images", str(pictures(tmp_path / "pictures"))])
    recipe("benchmark_decoder").main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["nll_nats"] > 0 and told["parameters"] > told["of the decoder"]
    if network == "transposed":
        model = recipe("benchmark_decoder").build(recipe("benchmark_decoder").DecoderArguments(latent_dim=2))
        assert told["of the decoder"] == pytest.approx(
            sum(p.numel() for p in (*model.from_latent.parameters(), *model.decoder.parameters())), rel=0.02
        )


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
