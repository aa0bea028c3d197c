"""The recipes as a user runs them: complete folders, the same figures again, exact resume, several ranks, streams, trackers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from recipe_runs import IMAGE, IMAGE_ALL, TEXT, TEXT_ALL, end, pictures, run, sentences
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import mmvae
from mmvae import ImageVAEConfig, MMVAEConfig
from mmvae.evaluation import refuse_grey
from mmvae.processing import train_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("recipe_runs.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny sets by recipe."""
    root = tmp_path_factory.mktemp("data")
    return {"text_vae": str(sentences(root / "words")), "image_vae": str(pictures(root / "pictures"))}


def environment(**more):
    path = os.pathsep.join([str(SCRIPT.parent), str(ROOT), *sys.path])
    return os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | more


def arguments(data, name, options, folder, *more):
    return {"name": name, "argv": ["--dataset", data[name], "--output_dir", str(folder), *options, *more]}


@pytest.fixture(scope="module", autouse=True)
def killing(data, tmp_path_factory):
    """Runs that are killed in a process of its own, begun before anything else: two cores wait together faster than one."""
    root = tmp_path_factory.mktemp("killed")
    runs = [
        arguments(data, "text_vae", TEXT_ALL, root / "text_vae") | {"kill_at": [3], "whole": False},
        arguments(data, "image_vae", IMAGE_ALL, root / "image_vae") | {"kill_at": [4], "whole": False},
    ]
    command = [sys.executable, str(SCRIPT), "kill", json.dumps({"report": str(root), "runs": runs})]
    with (root / "errors").open("w") as errors:
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=errors)
        yield process, root
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Runs that never stopped, with everything that makes resuming hard."""
    root = tmp_path_factory.mktemp("finished")
    runs = {"text_vae": (TEXT_ALL, "tensorboard"), "image_vae": (IMAGE_ALL, "tensorboard")}
    for name, (options, tracker) in runs.items():
        run(**arguments(data, name, options, root / name, "--tracker", tracker))
    return root


# ---- as a user does it


@pytest.fixture(scope="module")
def launched(data, tmp_path_factory):
    """``accelerate launch`` with a config file and overrides, in a process of its own."""
    folder = tmp_path_factory.mktemp("launched")
    options = {"hidden_size": 99, "embedding_size": 16, "latent_dim": 4, "batch_size": 8, "num_epochs": 1, "importance_samples": 3}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(options | {"kl_options": {"steps": 10}, "lr_schedule": "cosine"}))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "recipes/text_vae.py",
        "--config",
        folder / "tiny.yaml",
    ]
    command += ["--dataset", data["text_vae"], "--output_dir", folder / "run", "--hidden_size", "16", "--hub_token", "hf_secretsecret"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done.stdout + done.stderr


FILES = ["README.md", "config.json", "metrics.json", "model.safetensors", "figures/curves.png"]
OWN = {
    "text_vae": ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "figures/sentences.md"],
    "image_vae": ["preprocessor_config.json", *(f"figures/{n}.png" for n in ("reconstructions", "samples", "interpolation", "traversals"))],
}


def test_accelerate_launch_with_a_config_file_and_overrides(launched, data):
    folder, output = launched
    assert [name for name in [*FILES, *OWN["text_vae"]] if not (folder / name).is_file()] == []
    config, record = json.loads((folder / "config.json").read_text()), json.loads((folder / "metrics.json").read_text())
    assert (config["hidden_size"], config["embedding_size"]) == (16, 16)
    assert record["command"].startswith("accelerate launch recipes/text_vae.py --config tiny.yaml --dataset words --output_dir run")
    assert (record["dataset"], record["split"], record["hyperparameters"]["lr_schedule"]) == ("words", "test", "cosine")
    assert record["hyperparameters"]["mixed_precision"] in ("no", "bf16")  # what "auto" became
    assert "Traceback" not in output
    assert "Warning" not in output


def test_nothing_to_publish_holds_a_token_or_a_path_of_this_machine(launched, data):
    folder, output = launched
    assert "hf_secretsecret" not in output
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert b"hf_secretsecret" not in path.read_bytes(), path
        if "checkpoints" not in path.parts:
            assert str(folder.parent).encode() not in path.read_bytes(), path
            assert str(Path(data["text_vae"]).parent).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["text_vae", "image_vae"])
def test_a_finished_folder_is_complete_and_loads(finished, name):
    folder = finished / name
    assert [file for file in [*FILES, *OWN[name]] if not (folder / file).is_file()] == []
    card = (folder / "README.md").read_text()
    assert "import mmvae  # first" in card and "neg\\_elbo\\_nats" in card
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert {key: x for key, x in model.state_dict().items() if key in weights}.keys() == weights.keys()
    if name == "text_vae":
        inputs = processor(["red heart", "small blue square on dark"], padding=True, return_tensors="pt")
        assert model.reconstruct(**inputs, max_new_tokens=5).shape[0] == 2
    else:
        inputs = processor([torch.zeros(3, 20, 20, dtype=torch.uint8)], return_tensors="pt")
        assert model.reconstruct(**inputs).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("name", "split"), [("text_vae", "test"), ("image_vae", "validation")])
def test_evaluate_gives_the_figures_of_the_run(finished, data, name, split, tmp_path):
    folder, record = finished / name, json.loads((finished / name / "metrics.json").read_text())
    assert record["split"] == split
    options = ["--model", folder, "--dataset", data[name], "--split", split, "--batch_size", "4", "--importance_samples", "3"]
    run("evaluate", [*options, "--output", tmp_path / "figures.json"])
    again = json.loads((tmp_path / "figures.json").read_text())
    written = {key: again["metrics"].pop(key) for key in list(again["metrics"]) if key.startswith(("reconstruction/", "samples/"))}
    assert bool(written) == (name == "text_vae")
    assert again["metrics"] == pytest.approx(record["metrics"], rel=1e-5, abs=1e-5)
    assert {key: again[key] for key in ("model", "dataset", "split", "seed")} == {
        "model": name,
        "dataset": Path(data[name]).name,
        "split": split,
        "seed": 0,
    }
    assert again["rows"] == {"text_vae": 7, "image_vae": 9}[name]


def test_evaluate_keeps_unknown_tokens_out_where_there_are_some(finished, data, tmp_path):
    options = ["--suppress_unknown", "true", "--importance_samples", "0", "--output", tmp_path / "figures.json"]
    run("evaluate", ["--model", finished / "text_vae", "--dataset", data["text_vae"], *options])
    assert json.loads((tmp_path / "figures.json").read_text())["suppress_unknown"] is True
    with pytest.raises(ValueError, match="suppress_unknown: received True for a ImageVAE, expected a text VAE with one of its own"):
        run("evaluate", ["--model", finished / "image_vae", "--dataset", data["image_vae"], "--split", "validation", *options])


def test_evaluate_finds_the_held_out_rows_of_a_set_without_a_validation_split(data, tmp_path):
    (tmp_path / "only.txt").write_text((Path(data["text_vae"]) / "train.jsonl").read_text().replace('"', ""))
    run("text_vae", ["--dataset", str(tmp_path / "only.txt"), "--output_dir", str(tmp_path / "run"), *TEXT, "--num_epochs", "1"])
    options = ["--model", tmp_path / "run", "--dataset", tmp_path / "only.txt", "--split", "validation", "--importance_samples", "3"]
    run("evaluate", options)
    again = json.loads((tmp_path / "run" / "evaluation-validation.json").read_text())
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["metrics"] == pytest.approx(record["metrics"], rel=1e-5, abs=1e-5)
    assert str(tmp_path) not in (tmp_path / "run" / "evaluation-validation.json").read_text()


@pytest.mark.parametrize("validation", [1, 8])
def test_few_pictures_are_enough(tmp_path, validation):
    pictures(tmp_path / "data", train=3, validation=validation)
    run("image_vae", ["--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), *IMAGE, "--max_steps", "1"])
    assert (tmp_path / "run" / "figures" / "interpolation.png").is_file()


@pytest.mark.parametrize("train", [3, 24])
def test_a_density_is_fitted_where_there_are_rows_enough(tmp_path, train):
    pictures(tmp_path / "data", train=train, validation=1)
    asked = ["--densities", '{"latent": {"kind": "mixture", "num_components": 2}}', "--pose", "rotation+shift", "--latent_dim", "6"]
    run("image_vae", ["--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), *IMAGE, "--max_steps", "1", *asked])
    config, record = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "metrics.json"))
    assert list(config["densities"]) == ["latent"][: train > 20]
    assert ("densities/latent/held_out_log_prob_nats" in record["metrics"]) == (train > 20)


def test_trackers_get_figures_pictures_and_sentences(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, kind, tag in (("text_vae", "tensors", "samples/text_summary"), ("image_vae", "images", "samples")):
        events = EventAccumulator(str(finished / name / "mmvae"))
        events.Reload()
        losses = events.Scalars("train/loss")
        history = [json.loads(line) for line in (finished / name / "checkpoints" / "history.jsonl").read_text().splitlines()]
        assert [x.step for x in losses] == [line["step"] for line in history if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
        assert "eval/neg_elbo_nats" in events.Tags()["scalars"]
        found = next(each for each in events.Tags()[kind] if each.startswith(tag))
        assert {x.step for x in (events.Tensors if kind == "tensors" else events.Images)(found)} == {3, 6}


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("text_vae", ["--text_column", "words"], r"no column 'words', expected one of: label \(int64\), text \(string\)"),
        ("image_vae", ["--image_column", "words"], r"no column 'words', expected one of: image \(Image\)"),
        ("text_vae", ["--objective", "elbow"], r"objective: received 'elbow', expected one of \['capacity', 'dreg', 'elbo', 'iwae', "),
        ("text_vae", ["--kl_schedule", "step"], r"kl_schedule: received 'step', expected one of \['constant'"),
        ("text_vae", ["--lr_schedule", "step"], r"lr_schedule: received 'step', expected one of \['constant'"),
        ("text_vae", ["--latent_dims", "3"], r"unknown option '--latent_dims'; the nearest one is '--latent_dim'"),
        ("image_vae", ["--binarize", "always"], r"ImageVAEConfig.binarize: received 'always', expected one of 'none', "),
        ("image_vae", ["--horizontal_flip", "2"], "horizontal_flip is a probability"),
        ("text_vae", ["--max_length", "4"], r"row \d+, field 'text': got \d+ tokens, expected at most 4"),
        ("image_vae", ["--streaming"], "max_steps: received None with streaming, expected a number"),
        (
            "image_vae",
            ["--likelihood", "bernoulli"],
            "binarize: received 'none' with likelihood 'bernoulli' and a pixel of .*choose another",
        ),
        ("text_vae", ["--prior_components", "7"], "prior_components: received 7 with prior 'standard_normal', expected a mixture or vamp"),
        ("text_vae", ["--compile"], "compile: received True, expected False: a GRU"),
        ("text_vae", ["--prior", "vamp", "--objective_options", '{"free_bits": 1}'], "with prior 'vamp', expected free_bits_per 'row' or"),
    ],
)
def test_wrong_options_are_named(data, tmp_path, name, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        run(name, ["--dataset", data[name], "--output_dir", str(tmp_path), "--mixed_precision", "no", *options])
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("option", [["--prior", "mixture"], ["--prior", "vamp"], ["--objective", "iwae"], ["--kl_schedule", "constant"]])
def test_one_option_may_change_and_the_others_stay_as_they_are(data, tmp_path, option):
    small = ["--hidden_size", "16", "--embedding_size", "16", "--max_steps", "1", "--mixed_precision", "no"]
    small += ["--prior_components", "3"] if option[0] == "--prior" else []
    options = ["--dataset", data["text_vae"], "--output_dir", str(tmp_path), *small, *option]
    assert len(run("text_vae", options, whole=False)["history"]) > 0


def test_a_bernoulli_takes_pixels_of_0_and_255(data):
    white, grey = (torch.tensor([[0, pixel]], dtype=torch.uint8) for pixel in (255, 254))
    batches = {"train": {"pixel_values": white}, "test": {"pixel_values": grey}}
    loaders = {split: SimpleNamespace(batches=lambda epoch, batch=batch: iter([batch])) for split, batch in batches.items()}

    def refuse(loaders, **options):
        config = ImageVAEConfig(**options)
        refuse_grey(config, loaders), refuse_grey(MMVAEConfig(modalities={"image": config}), loaders)

    refuse({"train": loaders["train"]}, likelihood="bernoulli")
    refuse(loaders, likelihood="bernoulli", binarize="dynamic"), refuse(loaders, likelihood="continuous_bernoulli")
    with pytest.raises(ValueError, match="binarize: received 'none' .* a pixel of 254 in split 'test'"):
        refuse(loaders, likelihood="bernoulli")
    with pytest.raises(ValueError, match="image_binarize: received 'none' .* a pixel of 254 in split 'test'"):
        refuse_grey(MMVAEConfig(modalities={"image": ImageVAEConfig(likelihood="bernoulli")}), loaders)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, which looks at it
def test_a_compiled_run_is_the_same_run(data, finished, tmp_path, monkeypatch):
    compiled, compile_in_place = [], torch.nn.Module.compile

    def without_a_compiler(module):  # what the code is made into is torch's affair, and takes a minute
        compiled.append(type(module).__name__)
        compile_in_place(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    run(**arguments(data, "image_vae", IMAGE_ALL, tmp_path, "--compile"))
    assert compiled == ["ConvEncoder", "ConvDecoder"]
    same, own = (load_file(folder / "model.safetensors") for folder in (finished / "image_vae", tmp_path))
    assert same.keys() == own.keys()
    losses = [
        json.loads((folder / "metrics.json").read_text())["metrics"]["neg_elbo_nats"] for folder in (finished / "image_vae", tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_missing_split_lists_the_splits(finished, data, tmp_path):
    with pytest.raises(ValueError, match="has no split 'final', expected one of train, validation, test"):
        run("evaluate", ["--model", finished / "text_vae", "--dataset", data["text_vae"], "--split", "final"])
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has no split 'train', expected one of test"):
        run("text_vae", ["--dataset", str(tmp_path), "--output_dir", str(tmp_path / "run")])


# ---- stop and start


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [("text_vae", TEXT_ALL, [0, 3]), ("image_vae", IMAGE_ALL, [2])],  # 2: the last one of an epoch, where an evaluation is due
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(finished, data, tmp_path, name, options, steps):
    command = arguments(data, name, options, tmp_path)
    for life, step in enumerate(steps):
        assert run(**command, signal_at=step - sum(steps[:life]) - life)["exit"] == 143
        assert (tmp_path / "checkpoints" / f"step-{step + 1:08d}").is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert run(**command)["exit"] == 0
    assert end(tmp_path) == end(finished / name)
    if name == "image_vae":
        assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]


def test_a_run_that_was_killed_ends_with_the_same_bits(finished, killing):
    process, root = killing
    assert process.wait(timeout=200) == 0, (root / "errors").read_text()[-3000:]
    for name in ("text_vae", "image_vae"):
        assert end(root / name) == end(finished / name)[:2]


def test_a_stream_trains_and_goes_on_where_it_was(tmp_path):
    pictures(tmp_path / "data", train=200, validation=4, size=224)
    options = ["--dataset", str(tmp_path / "data"), "--streaming", *IMAGE, "--max_steps", "2", "--shift", "2", "--save_every", "1"]
    assert run("image_vae", [*options, "--output_dir", str(tmp_path / "whole")], whole=False)["exit"] == 0
    part = [*options, "--output_dir", str(tmp_path / "part")]
    assert run("image_vae", part, signal_at=0, whole=False)["exit"] == 143
    run("image_vae", part, whole=False)
    assert end(tmp_path / "part") == end(tmp_path / "whole")


# ---- several ranks

PLAIN = {
    "text": ("text_vae", TEXT),
    "group": ("image_vae", [*IMAGE, "--norm", "group", "--scale_mode", "learned"]),
    "none": ("image_vae", [*IMAGE, "--norm", "none", "--likelihood", "bernoulli", "--binarize", "dynamic", "--horizontal_flip", "0.5"]),
}


def joint_evaluation(root: Path) -> list[str]:
    """Options that evaluate an untrained joint model on rows of a picture, two languages and a class, any of which may lack."""
    colours = {"red": "rot", "green": "grün", "blue": "blau", "pink": "rosa"}
    for split, size in (("train", 30), ("test", 104)):  # two chunks of 100, one for each rank
        which = ["pink" if i == 90 else list(colours)[i * i % 7 % 4] for i in range(size)]  # no training row is pink
        columns = {
            "image": [None if i % 5 == 1 else Image.new("RGB", (8, 8), colour) for i, colour in enumerate(which)],
            "en": [None if i % 7 == 2 else f"a {colour} square" for i, colour in enumerate(which)],
            "de": [None if i % 6 == 3 else f"ein Quadrat in {colours[colour]}" for i, colour in enumerate(which)],
            "colour": [None if i == 4 else colour for i, colour in enumerate(which)],
        }
        texts = dict.fromkeys(("en", "de", "colour"), datasets.Value("string"))
        rows = datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), **texts))
        (root / "rows").mkdir(exist_ok=True, parents=True)
        rows.to_parquet(root / "rows" / f"{split}.parquet")
    tokenizer = train_tokenizer([*columns["en"][3:9], *columns["de"][4:9]])
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "embedding_size": 8, "hidden_size": 8, "latent_dim": 2}
    image = mmvae.ImageVAEConfig(image_size=8, hidden_channels=[4, 4], norm="none", latent_dim=2)
    vaes = {"image": image, "en": mmvae.TextVAEConfig(**text), "de": mmvae.TextVAEConfig(**text)}
    mmvae.MMVAE(mmvae.MMVAEConfig(modalities=vaes)).save_pretrained(root / "model")
    pictures = mmvae.ImageVAEImageProcessor(size={"height": 8, "width": 8})
    mmvae.MMVAEProcessor({"image": pictures, "en": tokenizer, "de": tokenizer}).save_pretrained(root / "model")
    options = ["--model", root / "model", "--dataset", root / "rows", "--label", "colour", "--importance_samples", "2"]
    return [*map(str, options), "--conditional_samples", "2", "--num_generated", "102", "--batch_size", "30"]


def classification(data: dict, joint: str, folder: Path) -> list[str]:
    """Options of a classifier of sentences."""
    vae = {"text": {"hidden_size": 8, "embedding_size": 8, "latent_dim": 4}}
    argv = ["--dataset", str(data["text_vae"]), "--joint", joint, "--vaes", json.dumps(vae), "--batch_size", "8", "--num_epochs", "2"]
    return [*argv, "--log_every", "1", "--mixed_precision", "no", "--output_dir", str(folder)]


@pytest.fixture(scope="module")
def ranks(finished, data, tmp_path_factory):
    """Many runs on two gloo ranks, in one launch."""
    root = tmp_path_factory.mktemp("ranks")
    part = {"whole": False}
    runs = {key: arguments(data, name, options, root / key) | part for key, (name, options) in PLAIN.items()}
    for name, options in (("text_vae", TEXT_ALL), ("image_vae", IMAGE_ALL)):
        stopped = arguments(data, name, options, root / f"{name} stopped") | part
        runs[name] = arguments(data, name, options, root / name) | part
        runs[f"{name} stopped"] = stopped | {"signal_at": 3, "signal_rank": 1}
        runs[f"{name} resumed"] = stopped
    for name, split in (("text_vae", "test"), ("image_vae", "validation")):
        argv = ["--model", str(finished / name), "--dataset", data[name], "--split", split, "--importance_samples", "3"]
        runs[f"evaluate {name}"] = {"name": "evaluate", "argv": [*argv, "--output", str(root / f"{name}.json")]}
    runs |= {
        f"classify {joint}": {"name": "classification", "argv": classification(data, joint, root / joint)} for joint in ("true", "false")
    }
    runs["evaluate joint"] = {"name": "evaluate", "argv": [*joint_evaluation(root / "joint"), "--output", str(root / "joint.json")]}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT), "ranks"]
    command.append(json.dumps({"report": str(root), "runs": list(runs.values())}))
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    reports = [root / f"rank{rank}.json" for rank in (0, 1)]
    assert all(report.exists() for report in reports), process.stderr[-3000:]
    outcomes = [dict(zip(runs, json.loads(report.read_text()), strict=True)) for report in reports]
    assert all(outcome["world"] == 2 for report in outcomes for outcome in report.values())
    return root, outcomes


@pytest.mark.parametrize("key", PLAIN)
def test_two_ranks_and_three_micro_batches_follow_the_curve_of_one(ranks, data, tmp_path, key):
    name, options = PLAIN[key]
    one = run(**arguments(data, name, options, tmp_path / "one"), whole=False)["history"]
    three = run(**arguments(data, name, options, tmp_path / "three", "--accumulation", "3"), whole=False)["history"]
    for other in (ranks[1][0][key]["history"], three):
        for mine, theirs in zip(one, other, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        betas = [[line["train/beta"] for line in history if "train/beta" in line] for history in (one, other)]
        assert betas[0] == betas[1] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_ranks_never_drift_apart(ranks):
    _, (first, second) = ranks
    for key in ("text", "group", "none", "text_vae", "image_vae"):
        assert first[key]["weights"] == second[key]["weights"], key
    assert len({first[key]["weights"] for key in ("text", "group", "none", "text_vae", "image_vae")}) == 5


@pytest.mark.parametrize("name", ["text_vae", "image_vae"])
def test_ranks_stop_together_and_end_with_the_same_bits(ranks, name):
    _, reports = ranks
    for report in reports:
        assert report[f"{name} stopped"]["exit"] == 128 + signal.SIGTERM
        assert report[f"{name} stopped"]["digest"][1] == 4
        assert report[f"{name} resumed"]["digest"] == report[name]["digest"]
        assert report[f"{name} resumed"]["weights"] == report[name]["weights"]
        assert report[name]["digest"][1] == 6


@pytest.mark.parametrize("name", ["text_vae", "image_vae"])
def test_figures_do_not_depend_on_the_number_of_ranks(ranks, finished, data, tmp_path, name):
    again = json.loads((ranks[0] / f"{name}.json").read_text())["metrics"]
    expected = json.loads((finished / name / "metrics.json").read_text())["metrics"]
    if name == "text_vae":  # what it writes, too
        options = ["--model", finished / name, "--dataset", data[name], "--importance_samples", "0", "--output", tmp_path / "one.json"]
        run("evaluate", options)
        expected |= json.loads((tmp_path / "one.json").read_text())["metrics"]
    assert again == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_figures_of_a_joint_model_do_not_depend_on_the_number_of_ranks_or_the_batch_size(ranks, tmp_path):
    run("evaluate", [*joint_evaluation(tmp_path), "--batch_size", "7", "--output", str(tmp_path / "one.json")])
    one, two = (json.loads(path.read_text())["metrics"] for path in (tmp_path / "one.json", ranks[0] / "joint.json"))
    ways = {"image_to_en/recall_at_1", "all_to_de/bleu", "en_to_de/tfidf_bleu", "de_to_en/tfidf_chrf", "joint/coherence"}
    assert ways | {"probe/all", "probe/image", "probe/majority", "conditional_nll_nats_en", "image/classifier_accuracy"} <= one.keys()
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("joint", ["true", "false"])
def test_two_ranks_train_and_measure_the_classifier_that_one_does(ranks, data, tmp_path, joint):
    one = run("classification", classification(data, joint, tmp_path))
    first, second = (report[f"classify {joint}"] for report in ranks[1])
    assert first["exit"] == 0 and first["weights"] == second["weights"]
    for mine, theirs in zip(one["history"], first["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    again, expected = (json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (ranks[0] / joint, tmp_path))
    assert {"accuracy", "macro_f1", "calibration_error"} <= expected.keys()
    assert again == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- the launch configuration


def test_the_launch_configuration_is_understood():
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = ROOT / "recipes" / "configs" / "accelerate_ddp.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.mixed_precision) == ("MULTI_GPU", "bf16")
    args = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "recipes/text_vae.py"])
    args = _validate_launch_command(args)[0]
    assert (args.num_processes, args.mixed_precision, args.multi_gpu, args.use_fsdp) == (2, "bf16", True, False)
