"""What training rows tell: a probe of latents that hold the class, or another one, or none; the nearest text; rows that lack something."""

import datasets
import pytest
import torch
from accelerate import Accelerator
from test_coherence import WORDS, translator

from mmvae import MMVAE, ImageVAEConfig, ImageVAEImageProcessor, MMVAEConfig, MMVAEProcessor, TextVAEConfig
from mmvae.baselines import check_label, evaluate_by_training_rows, linear_probe, nearest_texts, posterior_means, text_retrieval
from mmvae.coherence import text_coherence
from mmvae.data import ImageColumn, Rows, TextColumn, as_modalities, load_rows
from mmvae.data.selection import select
from mmvae.processing import train_tokenizer

QUARTERS = [("north", "east", "south", "west")[i // 10] for i in range(40)]  # of the circle that the codes lie on
DATA = datasets.Dataset.from_dict(WORDS | {"kind": QUARTERS})


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


# ---- the probe


def test_means_are_those_of_the_codes_in_the_order_of_the_rows(accelerator):
    model, _, rows, _ = translator({("de", 5), ("en", 7)})
    means = posterior_means(accelerator, model, rows)
    angle = torch.arange(40) * 2 * torch.pi / 40
    codes = torch.stack([angle.cos(), angle.sin()], 1)
    assert [*means] == ["all", "en", "de"]
    for name, missing in (("all", []), ("en", [7]), ("de", [5])):
        numbers, mean = means[name]
        assert numbers.tolist() == [i for i in range(40) if i not in missing]
        torch.testing.assert_close(mean, codes[numbers], rtol=0, atol=1e-3)


def test_a_class_that_the_latent_holds_is_read_and_no_other(accelerator):
    model, _, rows, _ = translator()
    every = ["probe/all", "probe/en", "probe/de"]
    probe = linear_probe(accelerator, model, rows, QUARTERS, rows, QUARTERS)
    assert probe == dict.fromkeys(every, 1.0) | {"probe/majority": 0.25}
    turned = QUARTERS[10:] + QUARTERS[:10]
    assert linear_probe(accelerator, model, rows, QUARTERS, rows, turned) == dict.fromkeys(every, 0.0) | {"probe/majority": 0.25}
    mixed = [QUARTERS[i] for i in torch.randperm(40).tolist()]
    assert linear_probe(accelerator, model, rows, QUARTERS, rows, mixed)["probe/all"] < 0.6
    one = linear_probe(accelerator, model, rows, QUARTERS, rows, ["south"] * 40)
    assert one == dict.fromkeys([*every, "probe/majority"], 0.25), "who knows one class names it always"


def test_rows_without_the_modality_are_left_out_and_unknown_classes_are_wrong(accelerator):
    model, _, rows, _ = translator({("de", 5)})
    labels = [*QUARTERS[:5], "unheard of", *QUARTERS[6:]]
    probe = linear_probe(accelerator, model, rows, labels, translator()[2], QUARTERS)
    assert probe == {"probe/all": 39 / 40, "probe/en": 39 / 40, "probe/de": 1, "probe/majority": 9 / 40}
    known = Rows(DATA.map(lambda row: {"de": None}, features=DATA.features, load_from_cache_file=False), rows.columns)
    assert "probe/de" not in linear_probe(accelerator, model, rows, QUARTERS, known, QUARTERS)


# ---- the nearest text


def test_training_rows_find_themselves_and_are_scored_as_a_model_that_knows_them(accelerator):
    model, processor, rows, texts = translator({("de", 5)})
    data = datasets.Dataset.from_dict(texts)
    figures = text_retrieval(rows, data, DATA)
    best = {"exact_match": 1, "bleu": 100, "chrf": 100}
    assert figures == pytest.approx({f"{way}/tfidf_{name}": x for way in ("en_to_de", "de_to_en") for name, x in best.items()})
    shifted = datasets.Dataset.from_dict(WORDS | {"de": WORDS["de"][:10] + WORDS["de"][11:] + WORDS["de"][10:11]})
    assert text_retrieval(rows, data, shifted, num_rows=10) == pytest.approx(figures)
    assert text_retrieval(rows, data, shifted)["en_to_de/tfidf_exact_match"] == 9 / 39
    made = text_coherence(accelerator, model, processor, rows, texts, num_rows=10)
    assert {name.replace("/", "/tfidf_"): value for name, value in made.items()} == pytest.approx(figures)
    assert text_retrieval(rows, data, DATA.select([0, 1]).map(lambda _: {"en": None}, features=DATA.features)) == {}


def test_the_first_of_equally_near_texts_is_taken_also_where_they_are_compared_in_parts(monkeypatch):
    candidates = ["the the the the", "the cat", "a cat sleeps"] * 3
    asked = ["The cat !", "a the", "sleeps", "dog"]
    assert nearest_texts(asked, candidates).tolist() == [1, 0, 2, 0]
    monkeypatch.setattr("mmvae.baselines._MOST_SCORES", 10)
    assert nearest_texts(asked, candidates).tolist() == [1, 0, 2, 0]


# ---- both


def test_training_rows_are_read_only_where_they_are_needed(accelerator, caplog):
    model, processor, rows, _ = translator()
    given = (accelerator, model, processor, rows, DATA)

    def missing():
        raise ValueError("no split 'train'")

    assert evaluate_by_training_rows(*given, missing, num_generated=0) == {}
    assert not caplog.text
    assert evaluate_by_training_rows(*given, missing) == {}
    assert "no TF-IDF figures: no split 'train'" in caplog.text
    with pytest.raises(ValueError, match="no split 'train'"):
        evaluate_by_training_rows(*given, missing, "kind")
    assert len(evaluate_by_training_rows(*given, lambda: DATA)) == 6
    lists = DATA.remove_columns("kind").add_column("kind", [["a"]] * 40)
    with pytest.raises(ValueError, match=r"row 0, field 'kind': received \['a'\], expected a name, a whole number or a truth value"):
        evaluate_by_training_rows(*given, lambda: lists, "kind", num_generated=0)


def test_labels_are_refused_before_any_work():
    model = translator()[0]
    shares = DATA.remove_columns("kind").add_column("kind", [None, 0.5] * 20)
    with pytest.raises(ValueError, match="^words: row 3, field 'kind': received 0.5, expected a name, a whole number or a truth value"):
        check_label(model, "kind", DATA, select(shares, range(2, 30)), name="words")
    with pytest.raises(ValueError, match="no column 'kinds'"):
        check_label(model, "kinds", DATA)
    check_label(model, "kind", DATA)
    check_label(model, "kind", DATA.remove_columns("kind").add_column("kind", [None, 1.0] * 20))  # a csv column with empty cells


def test_rows_without_a_label_are_left_out(accelerator):
    model, processor, rows, _ = translator()
    some = datasets.Dataset.from_dict(WORDS | {"kind": [None, "unheard of", *QUARTERS[2:]]})
    figures = evaluate_by_training_rows(accelerator, model, processor, rows, some, lambda: some.select(range(2, 40)), "kind")
    assert figures["probe/all"] <= figures["en_to_de/coherence"] == 38 / 39
    assert figures["probe/majority"] == 10 / 39
    known = datasets.Dataset.from_dict(WORDS | {"kind": [None, *QUARTERS[1:]]})
    alone = evaluate_by_training_rows(accelerator, model, processor, rows, DATA, lambda: known, "kind", num_generated=0)
    assert set(alone) == {"probe/all", "probe/en", "probe/de", "probe/majority"} and alone["probe/all"] >= 39 / 40


def test_the_groups_of_real_emoji_are_classes(accelerator, real_data):
    known, data = (load_rows(str(real_data / "emoji"), split).select(range(0, 300, 3)) for split in ("train", "test"))
    tokenizer = train_tokenizer(known["text"][:])
    sizes = {"image": ImageVAEConfig(image_size=16, hidden_channels=[4], norm="none", latent_dim=2)}
    sizes["text"] = TextVAEConfig(vocab_size=len(tokenizer), embedding_size=8, hidden_size=8, latent_dim=2)
    model = MMVAE(MMVAEConfig(modalities=sizes)).eval()
    processor = MMVAEProcessor({"image": ImageVAEImageProcessor(size={"height": 16, "width": 16}), "text": tokenizer})
    rows = Rows(data, as_modalities({"image": ImageColumn("image", 16), "text": TextColumn("text", tokenizer)}))
    figures = evaluate_by_training_rows(accelerator, model, processor, rows, data, lambda: known, "group", num_generated=5)
    names = {"probe/all", "probe/image", "probe/text", "probe/majority", "image/classifier_accuracy", "text_to_image/coherence"}
    assert names <= set(figures) and all(0 <= value <= 1 for value in figures.values())
