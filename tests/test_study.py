"""Studies as a user runs them, on tiny data: generated rows beside real ones, and classifiers beside each other."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import recipe, run
from safetensors.torch import load_file
from transformers import AutoConfig

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig
from mmvae.data import BadRow, ImageColumn, TextColumn
from mmvae.models.heads import classifier_of
from mmvae.processing import train_tokenizer
from mmvae.study import CLASSIFIERS, LabelledData

TINY = ["--batch_size", "8", "--max_steps", "3", "--warmup_steps", "1", "--mixed_precision", "no"]
WORDS = {"cold": ["ice", "snow", "winter", "frost"], "warm": ["sun", "sand", "summer", "fire"]}
TEXT = ["--vaes", '{"text": {"embedding_size": 4, "hidden_size": 6, "latent_dim": 2}}']
IMAGE = ["--vaes", '{"image": {"image_size": 8, "num_channels": 1, "hidden_channels": [4], "latent_dim": 2}}']


def texts(folder, word: str | None = None) -> str:
    """Sentences of two classes; ``word`` in those that show no label when one of each class does, by seed 0."""
    rng = random.Random(0)
    rows = [
        {"text": " ".join(rng.choices(WORDS[label], k=rng.randint(2, 4))), "label": label} for label in ("cold", "warm") for _ in range(6)
    ]
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if word:
        shown = LabelledData.read(str(folder), None).shown(1, 0)
        changed = [row if i in shown else row | {"text": f"{row['text']} {word}"} for i, row in enumerate(rows)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 3)):
        for number, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(110 * number, 110 * number + 100, (8, 8), dtype=np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{i}.png")
    return str(folder)


def figures_of(folder) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


# ---- generated rows


def augment(folder, *options) -> dict[str, float]:
    generator = ["--generator_run", '{"max_steps": 2, "lr_schedule": "constant", "kl_schedule": "constant"}']
    command = [*TINY, "--generated", "4", *generator, *options, f"--output_dir={folder}"]
    assert run("augmentation", command)["exit"] == 0
    return figures_of(folder)


def test_augmentation_of_pictures_goes_on_where_it_was(pictures, tmp_path):
    options = ["--dataset", pictures, *IMAGE, "--counts", "2", "--augmentation", '{"shift": 1}', "--kept", "0.5", "--trainings", "2"]
    one = augment(tmp_path, *options, "--draws", "1")
    seconds = [json.loads((tmp_path / "metrics.json").read_text())["seconds"]]
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    two = augment(tmp_path, *options, "--draws", "2")
    assert checkpoints.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}.items()
    assert len(checkpoints) == 5, "of a generator and two classifiers of each kind"
    seconds.append(json.loads((tmp_path / "metrics.json").read_text())["seconds"])
    assert 0 < seconds[0] < seconds[1], "those of the first draw count again"
    for arm in ("real", "augmented"):
        each = [two[f"2/{arm}/draw_{draw}"] for draw in range(2)]
        assert each[0] == one[f"2/{arm}/draw_0"] and two[f"2/{arm}/accuracy"] == pytest.approx(sum(each) / 2)
    assert two["2/gain"] == pytest.approx(two["2/augmented/accuracy"] - two["2/real/accuracy"])
    with Image.open(tmp_path / "runs" / "2_0" / "generated.png") as grid:
        assert grid.size == (2 + 2 * (64 + 2), 2 + 2 * (64 + 2)), "of four generated rows of each class two are kept"
    assert (tmp_path / "figures" / "accuracy.png").exists()


def test_the_generator_sees_rows_with_labels_alone_unless_told_otherwise(tmp_path):
    data = {name: texts(tmp_path / name, word) for name, word in (("as it was", None), ("changed", "warmer"))}
    words = []
    for name, unlabelled in (("as it was", "false"), ("changed", "false"), ("changed", "true")):
        folder = tmp_path / name / unlabelled
        augment(folder, "--dataset", data[name], *TEXT, "--counts", "1", "--draws", "1", "--unlabelled", unlabelled, "--latents", "prior")
        (weights,) = (folder / "runs" / "1_0" / "generator").rglob("model.safetensors")
        words.append(load_file(weights)["decoder.embed_tokens.weight"])
    assert torch.equal(words[0], words[1]) and len(words[2]) > len(words[1])
    assert "generated" in (folder / "runs" / "1_0" / "generated.md").read_text()
    more = ["--dataset", data[name], *TEXT, "--counts", "1", "--draws", "2", "--unlabelled", "true", "--latents", "prior"]
    assert augment(folder, *more)["1/augmented/draw_0"] >= 0, "the sentences are the same again, or the run would be another one"


def test_latents_around_rows_of_a_class(pictures):
    data, column, around = LabelledData.read(pictures, None), ImageColumn("image", 8, 1), recipe("augmentation").around
    torch.manual_seed(0)
    model = ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, num_classes=2)).eval()
    rows, labels = data.rows(data.train.select(data.shown(1, 0)), column), torch.tensor([0, 1, 1, 0, 1])
    batch = rows.batch(rows.numbers, rows.numbers)
    own = model.posterior(**batch).mixture.mean.detach()  # of one row of each class: there is no other to go to or away from
    torch.testing.assert_close(around(model, rows, labels, 0, 5, 0.7), own[batch["labels"].argsort()][labels])
    rows = data.rows(data.train, column)
    batch = rows.batch(rows.numbers, rows.numbers)
    means = model.posterior(**batch).mixture.mean.detach()
    for candidates in (1, 1000):
        sides = set()
        for point, label in zip(around(model, rows, labels.repeat(9), 0, candidates, 0.4), labels.repeat(9), strict=True):
            of_class = means[batch["labels"] == label]
            lines, away = of_class.unsqueeze(0) - of_class.unsqueeze(1), (point - of_class).unsqueeze(1)  # from every row to every other
            along = (away * lines).sum(-1) / lines.square().sum(-1).clamp(min=1e-12)
            off = (away - along.unsqueeze(-1) * lines).norm(dim=-1) + 9 * (along.abs() > 0.4) + 9 * torch.eye(len(of_class))
            if candidates == 1000:  # then only the nearest one is gone to
                lengths = lines.norm(dim=-1) + 9 * torch.eye(len(of_class))
                off = off + 9 * (lengths > lengths.min(1, keepdim=True).values + 1e-6)
            assert off.min() < 1e-4
            sides.add(bool(along.flatten()[off.argmin()] > 0))
        assert sides == {True, False}


@pytest.mark.parametrize("made", [0, 3, 50])
def test_real_rows_are_no_fewer_than_generated_ones(tmp_path, made):
    data = LabelledData.read(texts(tmp_path / "data"), None)
    sample = recipe("augmentation").Sample(data, TextColumn("text", train_tokenizer(["a b"])), data.shown(2, 0))
    rows = sample.with_generated(["new"] * made, torch.arange(made) % 2, 20)
    real = [text != "new" for text in rows["text"]]
    assert sum(real) >= max(made, 20 - made) and sum(real) % 4 == 0 and not any(real[len(real) - made :])
    assert rows["label"][len(real) - made :] == ["cold", "warm"] * (made // 2) + ["cold"] * (made % 2)


# ---- classifiers beside each other


def test_compare_texts_by_every_method(tmp_path):
    options = ["--dataset", texts(tmp_path / "data"), *TINY, *TEXT, "--labels_per_class", "3", "0", "--seeds", "1"]
    options += ["--vae_run", '{"max_steps": 2}', "--methods", "fine-tuned", "joint", "plain", "logistic"]
    assert run("compare", [*options, f"--output_dir={tmp_path / 'out'}"])["exit"] == 0
    figures, card = figures_of(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert figures["all/logistic/accuracy"] == 1, "no word is of both classes, and the test rows are the training rows"
    assert figures["all/logistic/parameters"] == 8 + 1 and "| all | plain |" in card and "(figures/accuracy.png)" in card
    embedding, encoder, features = 4 * (8 + 4), 3 * 6 * (4 + 6 + 2), 6
    assert figures["3/plain/parameters"] == embedding + encoder + 2 * (features + 1)
    assert figures["3/plain/parameters"] < figures["3/fine-tuned/parameters"] < figures["3/joint/parameters"]
    assert figures["vae/seconds"] > 0 and figures["all/joint/seconds"] > 0 and figures["all/plain/rows_per_second"] > 0


@pytest.mark.parametrize(("recipe_name", "counts"), [("compare", "--labels_per_class"), ("augmentation", "--counts")])
def test_a_study_refuses_what_it_cannot_use_before_it_trains(tmp_path, recipe_name, counts):
    data, out = texts(tmp_path / "data"), tmp_path / "out"
    options = ["--dataset", data, *TINY, *TEXT, f"--output_dir={out}", counts]
    with pytest.raises(ValueError, match="received 50, expected 1 to 6: the training rows of class 'cold'"):
        run(recipe_name, [*options, "1", "50"])
    test = tmp_path / "data" / "test.jsonl"
    test.write_text(test.read_text() + json.dumps({"text": "ice", "label": "hot"}) + "\n")
    with pytest.raises(BadRow, match="test: row 12, field 'label': got 'hot', expected"):
        run(recipe_name, [*options, "1"])
    with pytest.raises(ValueError, match="num_epochs: received 3, expected None: the runs of a study have as many steps each, max_steps"):
        run(recipe_name, [*options, "1", "--num_epochs", "3"])
    assert not list(out.rglob("checkpoints"))


def test_compare_takes_a_trained_vae_and_reads_no_method_of_another_name(pictures, tmp_path):
    again = ["--dataset", pictures, *TINY, *IMAGE, "--labels_per_class", "2", "--seeds", "1", "--methods"]
    assert run("compare", [*again, "fine-tuned", f"--output_dir={tmp_path / 'first'}"])["exit"] == 0
    folder = tmp_path / "first" / "vae"
    assert run("compare", [*again, "fine-tuned", "plain", f"--vae={folder}", f"--output_dir={tmp_path / 'second'}"])["exit"] == 0
    first, second = figures_of(tmp_path / "first"), figures_of(tmp_path / "second")
    assert first["2/fine-tuned/accuracy"] == second["2/fine-tuned/accuracy"] and "vae/seconds" not in second
    MMVAE(MMVAEConfig(modalities={"a": ImageVAEConfig(latent_dim=2), "b": ImageVAEConfig(latent_dim=2)})).save_pretrained(
        tmp_path / "joint"
    )
    with pytest.raises(ValueError, match="received a model of type mmvae, expected one of image_vae, text_vae$"):
        classifier_of(AutoConfig.from_pretrained(tmp_path / "joint"), CLASSIFIERS)
    with pytest.raises(ValueError, match="methods: received 'svm', expected some of"):
        run("compare", [*again, "svm"])
