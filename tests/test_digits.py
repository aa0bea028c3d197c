"""Digit words: the right word, at every place that it may have, the same for whoever reads them; and the commands that train on them."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from recipe_runs import RECIPES, TINY, recipe, run

from mmvae.data import load_rows, splits
from mmvae.data.digits import WORDS, add_words, digit_words
from mmvae.density_fitting import unfitted
from mmvae.experiment import parse

SMALL = {"image": {"image_size": 8, "num_channels": 1, "hidden_channels": [4, 4]}, "text": {"embedding_size": 8, "hidden_size": 8}}
JOINT = [*TINY, "--vaes", json.dumps(SMALL), "--private_dims", '{"image": 2}']
JOINT += ["--densities", '{"shared": {"kind": "mixture", "num_components": 2}}']


def digits(count: int = 40) -> datasets.Dataset:
    """Pictures of which a digit is the place of the bright square, 8 x 8 pixels, in a grid of 4 x 4."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])})
    rows = {"image": [], "label": [i % 10 for i in range(count)]}
    for label in rows["label"]:
        pixels = np.zeros((8, 8), np.uint8)
        pixels[label // 4 * 2 :, label % 4 * 2 :][:2, :2] = 255
        rows["image"].append(Image.fromarray(pixels))
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 60), ("test", 30)):
        digits(count).to_parquet(path / f"{split}.parquet")
    return path


def test_every_word_stands_at_every_place_that_it_may_have_and_is_spelled_right():
    labels = [i % 10 for i in range(4000)]
    found = {}
    for label, line in zip(labels, digit_words(labels), strict=True):
        letters = line.split(" ")
        assert len(letters) == 8 and letters[-1] == "_"
        text = "".join(letters)
        assert text.strip("_") == WORDS[label]
        found.setdefault(label, []).append(text.index(WORDS[label]))
    for label, places in found.items():
        count = 8 - len(WORDS[label])  # as randint(0, 7 - length), both ends included
        shares = np.bincount(places) / len(places)
        assert len(shares) == count and np.abs(shares - 1 / count).max() < 0.11  # five standard deviations


def test_a_line_is_a_function_of_seed_split_row_and_digit():
    labels = [3] * 200
    lines = digit_words(labels)
    assert digit_words(labels) == lines and digit_words(labels[:50]) == lines[:50]
    for other in (digit_words(labels, "test"), digit_words(labels, seed=1)):
        assert 0.1 < np.mean([a == b for a, b in zip(lines, other, strict=True)]) < 0.6  # a third, by chance


@pytest.mark.parametrize("label", [10, -1, None, "3"])
def test_what_is_no_digit_is_refused(label):
    with pytest.raises(ValueError, match=r"row 1: label: got .*, expected a digit in 0\.\.\.9"):
        digit_words([2, label])


def test_words_are_added_to_any_set_of_digits(folder):
    parts = splits(f"words:{folder}")
    test, plain = parts["test"], load_rows(str(folder), "test")
    assert test.column_names == ["image", "label", "word"]
    assert test["label"][:] == plain["label"][:] and test["word"][:] == digit_words(plain["label"][:], "test")
    train = load_rows(f"words:{folder}", "train")["word"][:]  # a held-out row keeps the word that it had
    assert sorted([*parts["train"]["word"], *parts["validation"]["word"]]) == sorted(train)
    with pytest.raises(ValueError, match="streaming: got True"):
        load_rows(f"words:{folder}", streaming=True)
    with pytest.raises(ValueError, match=r"columns: got \['image'\], expected 'label'"):
        add_words(plain.select_columns(["image"]), "test")
    with pytest.raises(FileNotFoundError):
        load_rows("words:./nowhere")


def test_a_joint_model_is_trained_on_them_and_asked_for_its_coherence(folder, tmp_path, capsys):
    data = ["--dataset", f"words:{folder}"]
    run("joint_vae", [*data, "--output_dir", str(tmp_path / "model"), *JOINT, "--max_steps", "3", "--importance_samples", "0"])
    options = ["--importance_samples", "0", "--num_generated", "20", "--label", "label"]
    run("evaluate", ["--model", str(tmp_path / "model"), *data, *options, "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())["metrics"]
    ways = ["text_to_image/coherence", "image_to_text/coherence", "joint/coherence"]
    names = ["image/classifier_accuracy", *ways, *(f"without_densities/{way}" for way in ways)]
    assert {name: 0 <= figures[name] <= 1 for name in names} == dict.fromkeys(names, True)
    assert "text\\_to\\_image/coherence" in capsys.readouterr().out


def test_the_config_is_one_that_the_recipe_takes(folder):
    module, path = recipe("joint_vae"), RECIPES / "configs" / "digit_words.yaml"
    args, joint = parse(module.JointRun, module.JointArguments, argv=["--config", str(path), "--dataset", f"words:{folder}"])
    model, processor, columns = module.build(args, joint, splits(args.dataset))
    assert [column.name for column in columns] == ["image", "word"]
    assert list(unfitted(model, joint.densities)) == ["shared", "shared_given_text"]  # a word's place needs none
    ids = processor(text=["_ t h r e e _ _"])["input_ids"][0].tolist()
    assert len(set(ids)) == 7 and processor.batch_decode([ids], "text") == ["_ t h r e e _ _"]  # BOS, EOS, and t h r e _
    assert joint.vaes["image"]["image_size"] == 28


def test_real_digits_have_their_words(real_data):
    test = load_rows(f"words:{real_data / 'mnist'}", "test")
    assert len(test) == 10_000
    assert all(WORDS[label] in word.replace(" ", "") for label, word in zip(test["label"], test["word"], strict=True))
