"""The joint recipe and the evaluation of what it leaves, as a user runs them: rows that lack languages, sprites, exact resume."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from recipe_runs import TINY, end, run
from transformers import AutoModel, AutoProcessor

from mmvae import MMVAE, MMVAEConfig, MMVAEProcessor, TopicVAEConfig, TopicVAEVectorizer
from mmvae.data import Rows, WordCountColumn, as_modalities
from mmvae.judge import Judge
from mmvae.modalities import weights_by_size

SMALL = {"image": {"image_size": 64, "hidden_channels": [2, 2, 4, 4], "norm": "none"}, "text": {"embedding_size": 8, "hidden_size": 8}}
WORDS_SMALL = {"text": {**SMALL["text"], "source_dropout": 0.3}}
DENSITIES = {"shared": {"kind": "mixture", "num_components": 2}}
JOINT = [*TINY, "--vaes", json.dumps(SMALL), "--densities", json.dumps(DENSITIES)]
WORDS = ["--modalities", "en:text,de:text", "--private_dims", '{"de": 2}', "--likelihood_weights", '{"en": 2}', "--ema_decay", "0.9"]
WORDS += ["--modality_dropout", '{"en": 0.3, "de": 0.3}', "--accumulation", "2"]
WORDS += ["--vaes", json.dumps(WORDS_SMALL), "--sources", '{"de": "en"}']
OWN = ["README.md", "config.json", "metrics.json", "model.safetensors", "processor_config.json", "figures/curves.png"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Two languages, each lacking in some rows, both in one; the last training batch of 8 is not full."""
    folder, rng = tmp_path_factory.mktemp("words"), random.Random(0)
    pairs = {"red": "rot", "blue": "blau", "big": "gross", "small": "klein", "heart": "herz", "square": "quadrat"}
    for split, count in (("train", 30), ("validation", 6), ("test", 9)):
        rows = []
        for i in range(count):
            words = rng.choices(list(pairs), k=rng.randint(1, 5))
            row = {"de": " ".join(pairs[word] for word in words), "en": " ".join(words)}
            rows.append(row | ({"en": None} if i % 4 == 2 else {}) | ({"de": None} if i % 5 == 3 or i == 2 else {}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "joint"
    assert run("joint_vae", ["--dataset", data, "--output_dir", str(folder), *JOINT, *WORDS])["exit"] == 0
    return folder


def figures_of(path):
    return json.loads(path.read_text())["metrics"]


def test_a_finished_folder_is_complete_and_loads(finished):
    assert [name for name in [*OWN, "en/tokenizer.json", "de/tokenizer.json"] if not (finished / name).is_file()] == []
    figures, card = figures_of(finished / "metrics.json"), (finished / "README.md").read_text()
    for name in ("neg_elbo_nats", "nll_nats", "reconstruction_nats_en", "reconstruction_nats_de"):
        assert figures[name] > 0
        assert name.replace("_", "\\_") in card
    assert "En to de" in card and "From the density" in card
    model, processor = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    assert (type(model), type(processor)) == (MMVAE, MMVAEProcessor)
    assert model.modalities == processor.modalities == ("en", "de")
    assert list(model.densities) == ["shared"]
    made = model.generate("de", max_new_tokens=4, **processor(en=["big red heart", "blue square"], return_tensors="pt"))
    assert [isinstance(text, str) for text in processor.batch_decode(made, "de")] == [True, True]


def test_a_run_that_was_stopped_ends_with_the_same_bits(finished, data, tmp_path):
    command = ["--dataset", data, "--output_dir", str(tmp_path), *JOINT, *WORDS]
    assert run("joint_vae", command, signal_at=2)["exit"] == 143
    assert not (tmp_path / "model.safetensors").exists()
    assert run("joint_vae", command)["exit"] == 0
    assert end(tmp_path) == end(finished)


def test_evaluate_gives_the_figures_of_the_run_and_those_of_a_joint_model(finished, data, tmp_path, capsys):
    options = ["--dataset", data, "--importance_samples", "3", "--batch_size", "4"]
    run("evaluate", ["--model", finished, *options, "--conditional_samples", "3", "--num_generated", "8"])
    record = json.loads((finished / "evaluation-test.json").read_text())
    again, before = record["metrics"], figures_of(finished / "metrics.json")
    shared = before.keys() & again.keys()
    assert {"neg_elbo_nats", "nll_nats", "reconstruction_nats_de", "mutual_information_nats"} <= shared
    assert {name: again[name] for name in shared} == pytest.approx({name: before[name] for name in shared}, rel=1e-5, abs=1e-5)
    assert record["rows"] == 8  # of nine, of which one has nothing
    assert {"conditional_nll_nats_en", "conditional_nll_nats_de_attending_to_en"} <= set(again)
    assert {"en_to_de/recall_at_10", "de_to_en/chance_at_1", "en_to_de/bleu", "de_to_en/exact_match"} <= set(again)
    assert again["en_to_de/candidates"] == 5
    # two seeds are two folders; here one is there twice
    swapped = [*options, "--modalities", "de:text:de,en:text", "--num_generated", "0", "--output", tmp_path / "both.json"]
    run("evaluate", ["--model", finished, finished, *swapped])
    both = json.loads((tmp_path / "both.json").read_text())
    assert f"| figure | 1: {finished.name} | 2: {finished.name} | mean | deviation |" in capsys.readouterr().out
    assert len(both["models"]) == 2 and set(both["deviation"].values()) == {0.0}
    assert both["metrics"] == pytest.approx({name: again[name] for name in both["metrics"]}, rel=1e-5, abs=1e-5)
    assert "en_to_de/bleu" not in both["metrics"] and "en_to_de/recall_at_1" in both["metrics"]


def test_topics_are_a_modality_beside_sentences(tmp_path):
    """The German of a row is a sentence, its English a bag of words."""
    data = tmp_path / "data"
    data.mkdir()
    pairs = [("rot", "red"), ("blau", "blue"), ("gross", "big"), ("klein", "small")]
    for split in ("train", "validation", "test"):
        rows = [{"de": pairs[i % 4][0] + " herz", "en": pairs[i % 4][1] + " heart", "kind": "ab"[i % 2]} for i in range(12)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, tmp_path = str(data), tmp_path / "model"
    options = ["--modalities", "de:text,words:topic:en", "--private_dims", "{}", "--likelihood_weights", "{}"]
    options += ["--vaes", json.dumps({"text": SMALL["text"]})]
    run("joint_vae", ["--dataset", data, "--output_dir", str(tmp_path), *TINY, "--densities", "{}", *options])
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    processor.check(model.config)
    assert processor.kinds == {"de": "tokenizer", "words": "vectorizer"}
    made = model.generate("words", **processor(text=["rot herz"]))
    assert set(processor.parts["words"].words(made, 3)[0].split()) < set(processor.parts["words"].vocabulary)
    card = (tmp_path / "README.md").read_text()
    assert "Words to de" in card and "De to words" in card
    read = ["--modalities", "de:text,words:topic:en", "--label", "kind"]
    run("evaluate", ["--model", tmp_path, "--dataset", data, *read, "--num_generated", "5"])
    figures = figures_of(tmp_path / "evaluation-test.json")
    assert "words_to_de/coherence" in figures and "de_to_words/coherence" not in figures  # nothing reads a class off words drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "en:text"], r"modalities: received \['en'\], expected the model's, \['en', 'de'\]"),
        (["--modalities", "en:text,de:sound"], "modalities: received 'de:sound'"),
        (["--modalities", "en:text,de:text:french"], "no column 'french', expected one of: de"),
        (["--label", "group"], "no column 'group', expected one of: de"),
        (["--column", "en"], "column: received 'en' for a joint model, expected none: name columns in modalities"),
        (["--num_beams", "0"], "num_beams: received 0, expected at least 1"),
        (["--max_new_tokens", "0"], "max_new_tokens: received 0, expected at least 1"),
        (["--importance_samples", "-1"], "importance_samples: received -1, expected at least 0"),
        (["--reference_lm", "x", "--num_generated", "0"], "num_generated: received 0 with reference_lm 'x', expected at least 1"),
        (["--reference_lm", "nowhere"], "reference_lm: received 'nowhere' for a MMVAE, expected a text VAE"),
        (["--judge", "nowhere"], "judge: received 'nowhere' with dataset .*, expected sprites:LEVEL"),
    ],
)
def test_evaluate_refuses_what_the_model_has_not(finished, data, options, message):
    with pytest.raises(ValueError, match=message):
        run("evaluate", ["--model", finished, "--dataset", data, *options])


def test_sprites_are_trained_on_and_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmvae.data.loading._SPRITE_ROWS", {"train": 40, "validation": 10, "test": 12})
    folder = tmp_path / "sprites"
    options = ["--output_dir", folder, *JOINT, "--max_steps", "3", "--importance_samples", "2", "--augmentation", '{"image": {"shift": 2}}']
    run("joint_vae", ["--dataset", "sprites:1", *map(str, options)])
    assert (folder / "figures" / "text_to_image.png").is_file() and (folder / "figures" / "image_to_text.png").is_file()
    torch.manual_seed(0)
    Judge(8).save_pretrained(tmp_path / "judge")  # knows nothing, but asks all the questions
    options = ["--model", folder, "--dataset", "sprites:1", "--judge", tmp_path / "judge", "--num_generated", "10"]
    run("evaluate", [*options, "--importance_samples", "0", "--output", tmp_path / "figures.json"])
    figures = figures_of(tmp_path / "figures.json")
    for way in ("text_to_image", "image_to_text", "joint", "without_densities/joint"):
        assert 0 <= figures[f"{way}/strict"] <= figures[f"{way}/shape"] <= 1
    assert 0 <= figures["joint/refused"] <= 1 and figures["text_to_image/malformed"] == 0
    assert "text\\_to\\_image/strict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"shift": 2}}, "augmentation: received {'shift': 2} for 'text', expected pictures' modalities only"),
        ({"image": {"rotation": -3}}, "rotation must be finite and at least 0, got -3"),
        ({"sound": {"shift": 2}}, "augmentation: received 'sound', expected a modality"),
    ],
)
def test_only_pictures_are_augmented(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run("joint_vae", ["--dataset", "sprites:1", "--output_dir", str(tmp_path / "out"), "--augmentation", json.dumps(changes)])
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_never_hidden_cannot_learn_to_attend(data, tmp_path):
    options = ["--modalities", "en:text,de:text", "--modality_dropout", '{"en": 0.3}', "--sources", '{"de": "en"}']
    with pytest.raises(ValueError, match="modality_dropout: received none of 'de', expected some"):
        run("joint_vae", ["--dataset", data, "--output_dir", str(tmp_path / "out"), *JOINT, *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text_column", "en"], r"text_column: received 'en' with the text modalities \['en:text', 'de:text'\], expected one"),
        (["--image_column", "x"], r"image_column: received 'x' with the image modalities \[\], expected one"),
        (["--modalities", "t:text:en", "--text_column", "de"], r"text_column: received 'de' with the text modalities \['t:text:en'\]"),
    ],
)
def test_a_column_is_named_for_the_only_modality_of_its_kind(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run("joint_vae", ["--dataset", data, "--output_dir", str(tmp_path / "out"), *JOINT, *WORDS, *options])
    one = ["--modalities", "a:text", "--text_column", "fr", "--private_dims", "{}", "--likelihood_weights", "{}"]
    with pytest.raises(ValueError, match="no column 'fr', expected one of: de"):
        run("joint_vae", ["--dataset", data, "--output_dir", str(tmp_path / "out"), *JOINT, *one])
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_automatic_weights_make_up_for_size_and_are_numbers_in_the_folder(data, tmp_path):
    options = ["--modalities", "en:text:de,words:topic:en", "--private_dims", "{}", "--likelihood_weights", "auto"]
    command = ["--dataset", data, "--output_dir", str(tmp_path), *TINY, "--densities", "{}", *options]
    command += ["--vaes", json.dumps({"text": SMALL["text"]})]
    assert run("joint_vae", command, signal_at=1)["exit"] == 143
    assert run("joint_vae", command)["exit"] == 0, "a resumed run of another configuration is refused"
    rows = [json.loads(line) for line in Path(data, "train.jsonl").read_text().splitlines()]
    words, tokens = ([len(row[name].split()) + eos for row in rows if row[name]] for name, eos in (("en", 0), ("de", 1)))
    means = {"en": sum(tokens) / len(tokens), "words": sum(words) / len(words)}
    expected = {name: float(f"{max(means.values()) / mean:.3g}") for name, mean in means.items()}
    assert json.loads((tmp_path / "config.json").read_text())["likelihood_weights"] == expected


def test_a_modality_that_scores_nothing_has_no_automatic_weight():
    texts = {"many": ["red red", "blue red"], "few": ["red", "green"], "none": ["green", "green"], "absent": [None, None]}
    vectorizer = TopicVAEVectorizer(["red", "blue"])
    topics = TopicVAEConfig(latent_dim=2, prior="standard_normal", vocabulary=vectorizer.vocabulary)
    columns = as_modalities({name: WordCountColumn(name, vectorizer) for name in texts})
    rows = Rows(datasets.Dataset.from_dict(texts), columns)
    assert weights_by_size(MMVAE(MMVAEConfig(modalities=dict.fromkeys(texts, topics))), rows) == {"many": 1, "few": 4}


def test_two_modalities_of_one_column_are_refused_before_any_work(data, tmp_path):
    options = ["--modalities", "a:text:en,b:text:en", "--likelihood_weights", "{}", "--private_dims", "{}"]
    with pytest.raises(ValueError, match="column 'en' is taken already, expected another one for 'b'"):
        run("joint_vae", ["--dataset", data, "--output_dir", str(tmp_path / "out"), *JOINT, *options])
    assert not (tmp_path / "out" / "checkpoints").exists()
