"""Classification as a user runs it: pictures, texts, modalities that rows lack, few labels, labels that are none, figures, probes."""

import json
import random
import re

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from recipe_runs import end, run
from safetensors.torch import load_file
from transformers import pipeline

from mmvae import (
    ImageVAE,
    ImageVAEConfig,
    ImageVAEImageProcessor,
    MMVAEForClassification,
    StackedVAE,
    TextVAEConfig,
    TextVAEForSequenceClassification,
)
from mmvae.charts import confusions
from mmvae.data import BadRow, LabelColumn, find_classes, load_rows, read_labels, shown_labels
from mmvae.metrics import classification, confusion, per_class
from mmvae.optimization import freeze_unreached
from mmvae.processing import train_tokenizer

TINY = ["--batch_size", "8", "--num_epochs", "2", "--warmup_steps", "2", "--log_every", "1", "--save_every", "2", "--mixed_precision", "no"]
TEXT = [
    *TINY,
    "--learning_rate",
    "0.02",
    "--vaes",
    '{"text": {"embedding_size": 8, "hidden_size": 8, "latent_dim": 4, "encoder_dropout": 0.1}}',
]
WORDS = {"cold": ["ice", "snow", "winter", "frost"], "warm": ["sun", "sand", "summer", "fire"]}


def write(folder, rows_of) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 30), ("validation", 10), ("test", 9)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(rows_of(i)) + "\n" for i in range(count)))
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    rng = random.Random(0)

    def row(i):
        label = ("cold", "warm")[i % 2]
        return {"text": " ".join(rng.choices(WORDS[label], k=rng.randint(1, 4))), "label": label}

    return write(tmp_path_factory.mktemp("texts"), row)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 15), ("validation", 4)):
        for number, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(110 * number, 110 * number + 100, (10, 10), dtype=np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    return str(folder)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=3, norm="batch")).save_pretrained(folder)
    ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1).save_pretrained(folder)
    return str(folder)


def figures_of(folder) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


# ---- runs


def test_texts_from_scratch_stopped_and_resumed(texts, tmp_path):
    command = ["--dataset", texts, *TEXT, "--num_epochs", "12", "--features", "moments", "--head_size", "6", "--ema_decay", "0.5"]
    assert run("classification", [*command, "--output_dir", str(tmp_path / "whole")])["exit"] == 0
    stopped = [*command, "--output_dir", str(tmp_path / "stopped")]
    assert run("classification", stopped, signal_at=5)["exit"] == 143
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    assert run("classification", stopped)["exit"] == 0
    assert end(tmp_path / "stopped") == end(tmp_path / "whole")
    figures, card = figures_of(tmp_path / "whole"), (tmp_path / "whole" / "README.md").read_text()
    assert figures["accuracy"] == 1 - figures["error"] > 0.8
    assert {"macro_f1", "calibration_error", "cross_entropy_nats"} < figures.keys() and "neg_elbo_nats" not in figures
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert "## Classes" in card and "| warm |" in card and "figures/confusions.png" in card
    told = pipeline("text-classification", model=str(tmp_path / "whole"), device="cpu")(["ice snow frost", "sun sand fire"])
    assert [each["label"] for each in told] == ["cold", "warm"]


def test_the_head_of_a_trained_vae_alone(pictures, vae, tmp_path):
    options = ["--dataset", pictures, *TINY, "--vae", vae, "--head_only", "true", "--learning_rate", "0.1", "--head_dropout", "0.1"]
    options += ["--modalities", "photo:image"]
    assert run("classification", [*options, "--augmentation", '{"shift": 1}', "--output_dir", str(tmp_path)])["exit"] == 0
    before, after = load_file(f"{vae}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, after[f"image_vae.{name}"]) for name, value in before.items())
    assert [name for name in after if not name.startswith("image_vae.")] == ["head.1.bias", "head.1.weight"]
    assert vae not in (tmp_path / "README.md").read_text() + (tmp_path / "metrics.json").read_text()
    told = pipeline("image-classification", model=str(tmp_path), device="cpu")(Image.new("L", (10, 10), 200))
    assert {each["label"] for each in told} == {"dark", "light"}


def test_fine_tuning_leaves_the_decoder_and_joint_training_does_not(pictures, vae, tmp_path):
    before = load_file(f"{vae}/model.safetensors")
    for joint in ("false", "true"):
        options = ["--dataset", pictures, *TINY, "--vae", vae, "--joint", joint, "--labels_per_class", "3", "--monitor", "last"]
        assert run("classification", [*options, "--output_dir", str(tmp_path / joint)])["exit"] == 0
        after = load_file(tmp_path / joint / "model.safetensors")
        same = {part: torch.equal(before[part], after[f"image_vae.{part}"]) for part in ("to_moments.weight", "from_latent.weight")}
        assert same == {"to_moments.weight": False, "from_latent.weight": joint == "false"}
        steps = [line["step"] for line in map(json.loads, (tmp_path / joint / "checkpoints" / "history.jsonl").read_text().splitlines())]
        assert max(steps) == (8 if joint == "true" else 2), "jointly every row counts, otherwise the six with a label"
    assert {"accuracy", "neg_elbo_nats", "kl_nats"} < figures_of(tmp_path / "true").keys()


@pytest.fixture(scope="module")
def two_languages(tmp_path_factory) -> str:
    def row(i):
        words = random.Random(i).choices(WORDS[label := ("cold", "warm")[i % 2]], k=3)
        row = {"en": " ".join(words), "de": " ".join(word.upper() for word in words), "kind": label}
        return row | ({"en": None} if i % 4 == 2 else {}) | ({"de": None} if i % 5 == 3 else {}) | ({"kind": None} if i == 8 else {})

    return write(tmp_path_factory.mktemp("languages"), row)


def test_modalities_and_labels_that_rows_lack(two_languages, tmp_path, capsys):
    shape = {"text": {"embedding_size": 8, "hidden_size": 8, "latent_dim": 4}}
    options = [*TINY, "--label", "kind", "--joint", "true", "--dataset", two_languages, "--output_dir", str(tmp_path)]
    options += ["--modalities", "en:text,de:text", "--vaes", json.dumps(shape), "--mmvae", '{"aggregation": "poe"}']
    assert run("classification", options)["exit"] == 0
    model = MMVAEForClassification.from_pretrained(tmp_path)
    assert model.modalities == ("en", "de") and model.config.id2label == {0: "cold", 1: "warm"} and model.config.classifier_alpha == 100
    assert {"accuracy", "reconstruction_nats_de"} < figures_of(tmp_path).keys()
    assert "from mmvae import MMVAEForClassification" in (tmp_path / "README.md").read_text()
    probe = ["--model", str(tmp_path), "--dataset", two_languages, "--split", "validation", "--label", "kind", "--importance_samples", "0"]
    run("evaluate", [*probe, "--num_generated", "0", "--conditional_samples", "0"])
    assert "tells classes itself, how well says its metrics.json: probe/ is of a new linear classifier" in capsys.readouterr().out
    again = [*TINY, "--label", "kind", "--joint", "true", "--dataset", two_languages, "--vae", str(tmp_path), "--modalities"]
    assert run("classification", [*again, "en:text,de:text", "--num_epochs", "1", "--output_dir", str(tmp_path / "again")])["exit"] == 0


def test_evaluate_probes_the_latent_of_one_modality(pictures, vae, tmp_path):
    options = ["--dataset", pictures, "--split", "validation", "--label", "label", "--importance_samples", "0"]
    run("evaluate", ["--model", vae, *options, "--output", tmp_path / "probe.json"])
    figures = json.loads((tmp_path / "probe.json").read_text())["metrics"]
    assert figures["probe/image"] == 1.0, "how light a picture is, any encoder tells"
    assert figures["probe/majority"] == 0.5 and "neg_elbo_nats" in figures


# ---- bad input


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", "b", None], [], r"row 2, field 'label': got None, expected a number in 0...1 or one of a, b"),
        (["a", "b", 3.5], [], "line 3, field 'label': got number, expected str as in line 1"),
        ([0.5, 1.0, 2.0], ["--joint", "true"], "row 0, field 'label': received 0.5, expected names alone or whole numbers alone"),
        ([0, -1, 1], ["--joint", "true"], "row 1, field 'label': received -1, expected the number of a class, 0 or more"),
        ([0, 1, 2**40], [], "row 2, field 'label': received 1099511627776, expected the number of a class, 0 or more and below 65536"),
        (["a", "a", "a"], [], "field 'label': got the class 'a' alone, expected at least 2 classes"),
        ([4, 4, 4], [], "field 'label': got the class '4' alone, expected at least 2 classes"),
        (["a", "b", "b"], ["--labels_per_class", "2"], "labels_per_class: received 2, expected 1 to 1: the training rows of class 'a'"),
        (["a", "b", "b"], ["--head_only", "true"], "head_only: received True with joint=False, vae=None, expected a trained VAE"),
        (["a", "b", "b"], ["--streaming", "true"], "streaming: received True, expected False"),
    ],
)
def test_bad_labels_are_named_before_the_first_step(labels, options, message, tmp_path):
    for split in ("train", "validation"):
        rows = [{"text": "ice", "label": label} for label in labels]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        run("classification", ["--dataset", str(tmp_path), *TEXT, *options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["ice", None, "sun", "sun", None, None], ["--labels_per_class", "3"], "expected a good one among the rows that tell their"),
        (["ice sun", None], [], r"row 1, .*got an empty cell.*, expected a good row of class 'y', of which none is left"),
        (["ice sun", None], ["--joint", "true"], "expected a good row of class 'y', of which none is left"),
    ],
)
def test_rows_without_text_do_not_tell_a_class(rows, options, message, tmp_path):
    labels = "xxxyyy" if len(rows) > 2 else "xy"
    for split, texts in (("train", rows), ("validation", ["ice"] * len(rows))):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(texts, labels, strict=True))
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match=message):
        run("classification", ["--dataset", str(tmp_path), *TEXT, *options, "--output_dir", str(tmp_path / "out")])


def test_a_class_that_training_does_not_know_is_named(tmp_path):
    for split, labels in (("train", "ab"), ("validation", "ac")):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": "ice", "label": label}) + "\n" for label in labels))
    with pytest.raises(BadRow, match="row 1, field 'label': got 'c', expected a number in 0...1 or one of a, b"):
        run("classification", ["--dataset", str(tmp_path), *TEXT, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vaes", '{"image": {"latent_dim": 5}}'], "its weights do not fit: latent_dim: has 3, asked for 5$"),
        (["--vaes", '{"text": {"latent_dim": 5}}'], r"vaes: received 'text', expected one of \['image'\]"),
        (["--modalities", "image:image,text:text"], r"modalities: received \['image', 'text'\], expected the model's, \['image'\]"),
        (["--modalities", "text:text"], "modalities: received"),
        (["--modalities", "image:image:picture"], "no column 'picture', expected one of: image"),
        (["--mmvae", '{"aggregation": "poe"}'], "mmvae: received .* for a image_vae, expected none"),
        (["--features", "median"], "classifier_features: received 'median', expected one of 'mean', 'moments', 'sample'"),
    ],
)
def test_a_vae_that_does_not_fit_says_which_field_differs(options, message, pictures, vae, tmp_path):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        run("classification", ["--dataset", pictures, *TINY, "--vae", vae, *options, "--output_dir", str(tmp_path)])


def test_a_classifier_of_other_classes_is_refused(texts, tmp_path):
    config = TextVAEConfig(vocab_size=20, hidden_size=8, embedding_size=8, id2label={0: "warm", 1: "cold"})
    TextVAEForSequenceClassification(config).save_pretrained(tmp_path)
    train_tokenizer(["ice snow"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"id2label: has \['warm', 'cold'\], expected those of the data, \['cold', 'warm'\]"):
        run("classification", ["--dataset", texts, *TINY, "--vae", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_a_model_that_has_no_head_for_classes_is_named(pictures, vae, tmp_path):
    StackedVAE.over(ImageVAE.from_pretrained(vae), num_classes=2, latent_dim=2).save_pretrained(tmp_path)
    ImageVAEImageProcessor.from_pretrained(vae).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="received a model of type stacked_vae, expected one of image_vae, mmvae, text_vae, topic_vae"):
        run("classification", ["--dataset", pictures, *TINY, "--vae", str(tmp_path), "--output_dir", str(tmp_path / "out")])


# ---- labels and figures


def test_few_labels_are_among_more_labels():
    labels = torch.tensor([0, 1, -100, 2] * 50)
    few, more, other = (shown_labels(labels, count, ("a", "b", "c"), seed) for count, seed in ((3, 0), (10, 0), (10, 1)))
    assert labels[few].bincount().tolist() == [3, 3, 3] and labels[more].bincount().tolist() == [10, 10, 10]
    assert not (few & ~more).any() and not torch.equal(more, other) and (labels[other] >= 0).all()


def test_labels_are_read_with_those_that_rows_lack(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"kind": kind}) + "\n" for kind in ("b", None, "a", "b")))
    rows = load_rows(str(tmp_path))
    assert find_classes(rows, "kind") == ("a", "b")
    assert read_labels(rows, LabelColumn("kind", ("a", "b"), missing=True)).tolist() == [1, -100, 0, 1]
    with pytest.raises(ValueError, match="set: field 'kind': got no label in 1 rows, expected at least one"):
        read_labels(rows.select([1]), LabelColumn("kind", ("a", "b"), missing=True), "set", every_class=False)


@pytest.mark.parametrize("option", ["alpha 5", "objective iwae", "num_samples 2", "kl_schedule constant"])
def test_options_of_the_bound_without_one_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option.split()[0]}: received .* without joint, where there is no ELBO, expected "):
        run("classification", [f"--{option}".replace(" ", "="), f"--output_dir={tmp_path}"])


def test_options_of_other_modalities_are_refused(tmp_path):
    rows = [{"text": word, "label": label} for word, label in (("ice", "cold"), ("sun", "warm"))]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for option, value in (("augmentation", {"shift": 2}), ("mmvae", {"latent_dim": 3})):
        with pytest.raises(ValueError, match=f"{option}: received {re.escape(str(value))} .*, expected none"):
            run("classification", [f"--dataset={tmp_path}", f"--{option}={json.dumps(value)}", f"--output_dir={tmp_path / 'out'}"])


def test_figures_of_a_classifier():
    labels = torch.tensor([0, 1, 2, -100, 1])
    sure = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [9, 0, 0], [0, 9, 0]])
    figures = classification(sure, labels)
    p = sure.softmax(1)[0, 0].item()
    assert figures["accuracy"] == 0.75 and figures["error"] == 0.25
    assert figures["macro_f1"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert figures["calibration_error"] == pytest.approx(p - 0.75, abs=1e-6)
    assert figures["cross_entropy_nats"] == pytest.approx(torch.tensor([0.0, 0, 9, 0]).mean().item() - np.log(p), abs=1e-6)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert classification(sure[order], labels[order]) == pytest.approx(figures)
    with pytest.raises(ValueError, match="expected at least one row with a label"):
        classification(sure, torch.full((5,), -100))


def test_a_calibrated_classifier_has_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    assert classification(logits, labels)["calibration_error"] < 0.012 < 0.1 < classification(3 * logits, labels)["calibration_error"]


def test_figures_of_every_class_are_those_of_scikit_learn(tmp_path):
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, told = torch.randint(0, 3, (50,)), torch.randint(0, 4, (50,))
    counts = confusion(told, torch.cat([labels[:-1], torch.tensor([-100])]), 4)
    assert counts.tolist() == confusion_matrix(labels[:-1], told[:-1], labels=range(4)).tolist()
    expected = precision_recall_fscore_support(labels[:-1], told[:-1], labels=range(4), zero_division=0)
    found = per_class(counts)
    for name, values in zip(("precision", "recall", "f1", "rows"), expected, strict=True):
        assert found[name] == pytest.approx(values.tolist())
    path = confusions(counts, ["a", "b", "c" * 60, "d"], tmp_path / "made" / "counts.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 200
    with pytest.raises(ValueError, match="names: got 3"):
        confusions(counts, ["a", "b", "c"], path)


def test_what_a_value_does_not_depend_on_takes_no_gradient():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "not": torch.nn.Linear(2, 1)})
    freeze_unreached(model, model["used"](torch.ones(3, 2)).sum())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "used.weight": True, "used.bias": True, "not.weight": False, "not.bias": False,
    }  # fmt: skip
    assert all(p.grad is None for p in model.parameters())
