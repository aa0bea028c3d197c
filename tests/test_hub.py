import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import BertConfig, BertModel

from mmvae.hub import check_repo_id, model_card, push, write_card, write_metrics
from mmvae.pictures import grid, table
from mmvae.processing import train_tokenizer
from mmvae.record import command, public

SECRET = "hf_local_alice"
ARGV = ["recipes/text_vae.py", "--dataset", "ptb", "--push_to_hub", "alice/tiny", "--hub_token", SECRET]


def save_model(folder: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **size)).save_pretrained(folder)
    train_tokenizer(["a small heart", "a big red ellipse"]).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder as a recipe leaves it, beside things that stay at home."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    save_model(folder)
    grid(torch.rand(4, 3, 8, 8), folder / "figures" / "samples.png")
    for name in (
        "checkpoints/step-1/model.safetensors",
        "history.jsonl",
        "bad_rows.txt",
        "notes.txt",
        "credentials.json",
        "draft.md",
        "lora.safetensors",
        ".metrics.json.tmp",
        "logs/events.json",
        "optimizer.bin",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays at home")
    write_metrics(
        folder,
        {"neg_elbo_nats": 101.25, "kl_nats": 7.5, "psnr_db": float("inf")},
        seconds=12.34,
        dataset="ptb",
        hyperparameters={"latent_dim": 32, "hub_token": SECRET, "dataset": Path.home() / "data"},
        argv=ARGV,
    )
    write_card(
        folder,
        repo_id="alice/tiny",
        sentences={"Reconstructions": table({"original": ["a <unk>"], "reconstruction": ["a | b"]})},
    )
    return folder


def test_metrics_tell_how_to_get_them_again(folder):
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"] == {"neg_elbo_nats": 101.25, "kl_nats": 7.5, "psnr_db": "inf"}
    assert record["command"].endswith("python recipes/text_vae.py --dataset ptb --push_to_hub alice/tiny")
    assert record["seconds"] == 12.3
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["hyperparameters"] == {"latent_dim": 32, "dataset": "~/data"}
    assert {"commit", "hardware", "split", "dataset"} <= set(record)


def test_dataset_paths_are_not_told(tmp_path):
    data = tmp_path / "my_data"
    data.mkdir()
    path = write_metrics(tmp_path / "out", {}, seconds=1, dataset=str(data), argv=["r.py", f"--dataset={data}"])
    assert json.loads(path.read_text())["dataset"] == "my_data"
    assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["r.py", "--hub_token", "secret", "--seed", "1"], "r.py --seed 1"),
        (["r.py", "--hub-token=secret", "--seed=1"], "r.py --seed=1"),
        (["r.py", "--token", "--seed", "1"], "r.py --seed 1"),
        (["r.py", "--note", "my hf_abcdefghijkl"], "r.py --note 'my ***'"),
        (["r.py", "--max_new_tokens", "4", "--tokenizer", "bpe"], "r.py --max_new_tokens 4 --tokenizer bpe"),
        ([str(Path.home() / "r.py"), str(Path.cwd() / "out")], "'~/r.py' ./out"),
        (["/data/jane/r.py", "--data=/data/jane/ptb", "a/b", "c=a/b", "words:/data/jane/mnist"], "r.py --data=ptb a/b c=a/b words:mnist"),
    ],
)
def test_command_keeps_no_secret_and_no_place(argv, shown):
    assert command(argv).split(maxsplit=1)[1].removeprefix("launch ") == shown


def test_token_of_the_login_is_blanked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    assert public(["x unusual-token y", {"api_key": 1, "seed": 2}]) == ["x *** y", {"seed": 2}]


def test_card_tells_to_import_mmvae_first(folder):
    text = (folder / "README.md").read_text()
    assert text.index("pip install mmvae") < text.index("import mmvae  # first") < text.index("AutoModel.from_pretrained")
    assert 'AutoModel.from_pretrained("alice/tiny"' in text
    assert "(figures/samples.png)" in text
    assert "a &lt;unk&gt; | a \\| b" in text
    assert "| neg\\_elbo\\_nats | 101.25 |" in text
    assert "recipes/text_vae.py --dataset ptb" in text


def test_card_has_a_model_index(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license, data.model_name) == ("mmvae", "apache-2.0", "tiny")
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "neg_elbo_nats": 101.25,
        "kl_nats": 7.5,
    }


@pytest.mark.parametrize(
    ("kind", "tag", "call"),
    [
        ("image_vae", "unconditional-image-generation", "model.sample(8)"),
        ("text_vae", "text-generation", "decode_text"),
        ("topic_vae", None, "model.topics"),
        ("mmvae", None, "model.retrieve"),
    ],
)
def test_card_knows_the_modality(folder, tmp_path, kind, tag, call):
    modalities = {"modalities": {"image": {}, "text": {}}} if kind == "mmvae" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"], **modalities}))
    (tmp_path / "metrics.json").write_text((folder / "metrics.json").read_text())
    card = model_card(tmp_path, license="mit", tags=["sprites"], language="en")
    assert card.data.pipeline_tag == tag and all(result.task_type == (tag or "other") for result in card.data.eval_results)
    assert {"mmvae", "vae", kind, "sprites"} == set(card.data.tags)
    code = str(card).split("```python\n")[1].split("```")[0]
    compile(code, "snippet", "exec")
    assert call in code


def test_card_needs_metrics(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"metrics\.json: not found"):
        write_card(tmp_path)


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "alice/", "alice/a b", "../x", "alice/x.git", "/abs/path"])
def test_repo_id_is_checked_before_any_work(repo_id, tmp_path):
    with pytest.raises(ValueError, match="repo_id: got"):
        check_repo_id(repo_id)
    with pytest.raises(ValueError, match="repo_id: got"):
        push(tmp_path / "does not exist", repo_id)


def test_push_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no model\.safetensors"):
        push(tmp_path, "alice/tiny")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors, expected a model folder"):
        push(tmp_path, "alice/tiny")


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory) -> dict:
    """What happened when the folder was pushed and fetched, see hub_scenario.py."""
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    root = Path(__file__).parent.parent
    env |= {"HF_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    env |= {
        "PYTHONPATH": str(root),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    script = [sys.executable, Path(__file__).with_name("hub_scenario.py"), folder]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "HTTP Request" not in done.stdout + done.stderr  # an address for an upload can hold a signature
    return json.loads(done.stdout.splitlines()[-1])


def test_push_and_back(seen):
    assert seen["url"].endswith("/alice/tiny")
    assert seen["weights_equal"]
    assert seen["tokens"] == train_tokenizer(["a small heart", "a big red ellipse"])("a small heart").input_ids
    assert set(seen["unknown_endpoints"]) <= {"GET /api/agent-harnesses"}  # which the client asks for its user agent


@pytest.mark.parametrize(
    ("name", "kind", "files"),
    [
        ("text_vae", "TextVAE", {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "figures/curves.png"}),
        ("image_vae", "ImageVAE", {"preprocessor_config.json", "figures/samples.png", "figures/reconstructions.png"}),
        ("joint_vae", "MMVAE", {"processor_config.json", "words/tokenizer.json", "words/tokenizer_config.json"}),
    ],
)
def test_a_recipe_pushes_its_folder_and_it_comes_back(seen, name, kind, files):
    own = seen["own"][name]
    assert (own["class"], own["private"], own["weights_equal"], own["latents_equal"]) == (kind, True, True, True)
    assert {"README.md", "config.json", "metrics.json", "model.safetensors"} | files <= set(own["files"])
    assert not [file for file in own["files"] if file.startswith(("checkpoints", "samples", "mmvae"))]


def test_push_is_one_commit_of_the_model_alone(seen):
    expected = [
        ".gitattributes",
        "README.md",
        "config.json",
        "figures/samples.png",
        "metrics.json",
        "model.safetensors",
    ]
    assert seen["first"]["files"] == [*expected, "tokenizer.json", "tokenizer_config.json"]
    assert seen["first"]["commits"] == 2  # the repository's own and ours


def test_private_stays_private(seen):
    assert seen["first"]["private"]
    assert seen["stranger"][0] == "OSError"
    kind, message = seen["public_asked_private"]
    assert kind == "ValueError"
    assert message.startswith("private: alice/open exists and is public, expected a private repository")


def test_interrupted_push_leaves_the_old_revision(seen):
    assert "500" in seen["broken"][1]
    assert seen["after_failure"] == seen["first"]
    assert seen["old_revision_whole"]


def test_next_push_completes_and_tidies(seen):
    assert seen["second"]["commits"] == 4  # a person's is the third
    assert "figures/renamed.png" in seen["second"]["files"]
    assert "figures/samples.png" not in seen["second"]["files"]
    assert {"assets/banner.png", "unet/x.safetensors"} <= set(seen["second"]["files"])  # which are somebody else's
    assert "model-00001-of-00002.safetensors" not in seen["second"]["files"]
    assert seen["branches"] == ["main", "trial"]


@pytest.mark.parametrize(("place", "whole"), [("model.safetensors", "TextVAE"), ("train.jsonl", 300)])
@pytest.mark.parametrize("fault", ["cut", "half", "byte", "429", "503"])
def test_a_faulty_hub_is_tried_again_then_named_and_nothing_half_is_kept(seen, place, whole, fault):
    lasting, name = seen["faults"][f"{place} {fault} lasting"], {"TextVAE": "alice/vae", 300: "alice/rows"}[whole]
    assert name in lasting["outcome"]
    assert lasting["requests"] < 20 and lasting["slept"] <= 40
    assert lasting["halves"] == [] and lasting["then"] == whole
    if fault == "byte":
        assert ("sha256" in lasting["outcome"] and "force_download=True" in lasting["outcome"]) or "force_redownload" in lasting["outcome"]
    elif fault != "half":  # which comes too short: that is an error at once
        passing = seen["faults"][f"{place} {fault} passing"]
        assert passing["outcome"] == whole and 0 < passing["slept"] <= lasting["slept"]


def test_offline_the_cache_is_enough_and_its_lack_is_told(seen):
    kept = [seen["faults"][f"{place} offline kept"] for place in ("model.safetensors", "train.jsonl")]
    assert [case["outcome"] for case in kept] == ["TextVAE", 300]
    lacking = [seen["faults"][f"{place} offline"] for place in ("model.safetensors", "train.jsonl")]
    assert "alice/vae: cannot be fetched from the Hub" in lacking[0]["outcome"] and "couldn't connect" in lacking[0]["outcome"]
    assert "alice/rows is neither a local path nor reachable on the Hub" in lacking[1]["outcome"]
    assert not any(case["requests"] or case["slept"] for case in kept + lacking)


def test_a_push_that_fails_leaves_the_old_revision_and_the_next_one_completes(seen):
    assert seen["faults"]["push /__lfs__/ passing"]["outcome"] == "vae"
    for place, named in (("/__lfs__/", "uploading 'model.safetensors'"), ("/commit/", "503 Service Unavailable")):
        case = seen["faults"][f"push {place} lasting"]
        assert named in case["outcome"] and case["old"] and case["then"] == "vae"


def test_no_file_holds_the_token(folder, seen):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if SECRET.encode() in path.read_bytes() or str(Path.home()).encode() + b"/" in path.read_bytes()]
