"""Rows in which modalities are missing: what the data lacks, what is hidden on purpose, in every kind of set."""

import json
import logging
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_columns import tokenizer

from mmvae.data import (
    BadRow,
    ImageColumn,
    LabelColumn,
    Loader,
    Rows,
    TextColumn,
    WordCountColumn,
    as_modalities,
    load_rows,
    splits,
    sprites,
    texts_of,
)
from mmvae.data.missing import hide
from mmvae.vectorizer import TopicVAEVectorizer

REAL = os.environ.get("MMVAE_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="MMVAE_TEST_DATA is not set: no folder with real data")
WORDS = ["a", "heart", "red", "big", "square"]
N = 40


def columns(size=4):
    return as_modalities({"image": ImageColumn("image", size), "text": TextColumn("text", tokenizer(" ".join(WORDS)), 20)})


def caption(i):
    """Of row i: missing in every third row, empty in row 7."""
    return None if i % 3 == 1 else "" if i == 8 else " ".join(WORDS[: 1 + i % 5])


def picture(i):
    return Image.fromarray(np.full((5, 5, 3), i + 1, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """An image folder whose metadata lacks captions."""
    (tmp_path / "train").mkdir()
    for i in range(N):
        picture(i).save(tmp_path / "train" / f"{i:03d}.png")
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": caption(i)}) + "\n" for i in range(N)]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(lines))
    return tmp_path


def both(n=N, images=lambda i: True, texts=caption):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [picture(i) if images(i) else None for i in range(n)], "text": [texts(i) for i in range(n)]}
    return datasets.Dataset.from_dict(rows, features=features)


def epoch(rows, batch_size=8, **options):
    return list(Loader(rows, batch_size, **options).batches(0))


def table(batches, name="present"):
    """The rows of a column of the batches by row number."""
    return {int(row): value.tolist() for batch in batches for row, value in zip(batch["row"], batch[name], strict=True)}


def same(a, b):
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["prepared", "decoded later", "stream"])
def test_none_is_a_missing_modality(folder, kind):
    rows = Rows(
        load_rows(str(folder), streaming=kind == "stream"), columns(), name=str(folder), memory_limit=2**30 if kind == "prepared" else 0
    )
    batches = epoch(rows)
    assert table(batches) == {i: [True, caption(i) is not None] for i in range(N)}
    for batch in batches:
        for i, pixels, ids, mask in zip(
            batch["row"].tolist(), batch["pixel_values"], batch["input_ids"], batch["attention_mask"], strict=True
        ):
            assert (pixels == i + 1).all()
            words = (caption(i) or "").split()
            assert ids[: mask.sum()].tolist() == [1, *tokenizer(" ".join(WORDS))(" ".join(words), add_special_tokens=False)["input_ids"], 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where the machine lends one core
def test_streams_workers_and_prepared_sets_agree(folder, monkeypatch):
    drop = {"text": 0.5, "image": 0.3}
    loaded = load_rows(str(folder))
    options = {"shuffle": False, "pool": 0}
    plain = epoch(Rows(loaded, columns(), name=str(folder), drop=drop), **options)
    monkeypatch.setattr("mmvae.data.preparation.CHUNK", 7)
    stream = Rows(load_rows(str(folder), streaming=True), columns(), name=str(folder), drop=drop)
    for memory_limit in (0, 2**30):
        for num_workers in (0, 2):
            other = Rows(loaded, columns(), name=str(folder), drop=drop, memory_limit=memory_limit, num_workers=num_workers)
            assert same(plain, epoch(other, **options))
    assert same(plain, epoch(stream, **options))


def test_an_empty_cell_of_a_csv_is_missing_and_the_words_none_and_na_are_text(tmp_path):
    (tmp_path / "train.csv").write_text("en,de\na,a heart\n,red\nbig,\nNone,NA\n")
    text = tokenizer("a heart red big None NA")
    rows = Rows(load_rows(str(tmp_path)), as_modalities({"en": TextColumn("en", text), "de": TextColumn("de", text)}))
    (batch,) = epoch(rows)
    assert table([batch]) == {0: [True, True], 1: [False, True], 2: [True, False], 3: [True, True]}
    assert set(batch) == {f"{m}_{k}" for m in ("en", "de") for k in ("input_ids", "attention_mask")} | {
        "present",
        "row",
        "row_weight",
        "num_rows",
    }


@pytest.mark.parametrize("streamed", [False, True])
def test_every_batch_and_every_rank_holds_every_input(streamed):
    data = both(17, images=lambda i: i < 4, texts=lambda i: None if i < 4 else "a heart")  # each batch of 2 lacks one of them
    rows = Rows(data.to_iterable_dataset() if streamed else data, columns())
    shares = [epoch(rows, 4, shuffle=False, pool=0, rank=rank, world_size=2) for rank in range(2)]
    names = {"pixel_values", "input_ids", "attention_mask", "present", "row", "row_weight", "num_rows"}
    for batch in (batch for share in shares for batch in share):
        assert set(batch) == names
        assert batch["present"].dtype == torch.bool and batch["present"].shape == (len(batch["row"]), 2)
        assert batch["pixel_values"].shape[1:] == (3, 4, 4) and batch["pixel_values"].dtype == torch.uint8
        absent = ~batch["present"]
        assert not batch["pixel_values"][absent[:, 0]].any()
        assert (batch["attention_mask"][absent[:, 1]].sum(1) == 2).all(), "BOS EOS"
    assert len(shares[0]) == len(shares[1]) == 5
    whole = table(epoch(rows, 4, shuffle=False, pool=0))
    assert whole == {i: [i < 4, i >= 4] for i in range(17)}
    assert whole == {row: value for share in shares for row, value in table(share).items()}


@pytest.mark.parametrize("kind", ["prepared", "decoded later", "stream"])
@pytest.mark.parametrize(
    "column", [TextColumn("text", tokenizer("a")), ImageColumn("image", 4), WordCountColumn("text", TopicVAEVectorizer(["a", "b"]))]
)
def test_of_one_modality_a_row_whose_cell_is_empty_has_none(column, kind, caplog):
    data = both(30, images=lambda i: i not in (5, 10), texts=lambda i: None if i in (5, 10) else "a")
    data = data.add_column("label", ["b" if i in (5, 10) else "a" for i in range(30)])
    order = list(range(30)) if kind == "stream" else list(reversed(range(30)))
    data = data.to_iterable_dataset() if kind == "stream" else data.select(order)
    options = {"name": "mine", "memory_limit": 2**30 if kind == "prepared" else 0}
    told = rf"mine: row (5 of the stream|10), field '{column.name}': got an empty cell, expected a value"
    with pytest.raises(BadRow, match=rf"^{told} \(or set on_bad_row, --on_bad_row, to skip_empty\)$"):
        epoch(Rows(data, [column, LabelColumn("label", ("a", "b"))], **options))
    for on_bad_row in ("skip_empty", "skip"):
        rows = Rows(data, [column, LabelColumn("label", ("a",))], **options, on_bad_row=on_bad_row)
        batches = epoch(rows)
        assert sorted(order[row] for batch in batches for row in batch["row"]) == [i for i in range(30) if i not in (5, 10)]
        assert "present" not in batches[0] and len(rows.bad) == 2
    assert "skipping" in caplog.text


def test_a_row_of_one_modality_that_is_left_out_is_in_the_fingerprint():
    column = TextColumn("text", tokenizer("a"))
    texts = (["", None, "a"], [None, "", "a"])
    prints = {Rows(datasets.Dataset.from_dict({"text": each}), column, on_bad_row="skip_empty").fingerprint for each in texts}
    assert len(prints) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_with_nothing(streamed, caplog):
    data = both(30, images=lambda i: i not in (5, 9, 10), texts=lambda i: None if i in (5, 10) else "a heart")
    data = data.to_iterable_dataset() if streamed else data
    with pytest.raises(BadRow, match=r"mine: row 5( of the stream)?: got no modality, expected one of image, text"):
        epoch(Rows(data, columns(), name="mine"))
    with caplog.at_level(logging.WARNING):
        rows = Rows(data, columns(), on_bad_row="skip_empty")
        found = table(epoch(rows))
    assert len(rows.bad) == 2
    assert "skipping" in caplog.text
    assert found == {i: [i != 9, True] for i in range(30) if i not in (5, 10)}, "rows keep their numbers"
    if not streamed:
        assert rows.num_rows == 28
        held_out = data.select(range(20, 30)).select([3, 4])
        with pytest.raises(BadRow, match="row 5:"):
            Rows(data.select([7, 5, 3]), columns())
        assert Rows(held_out, columns()).num_rows == 2
        with pytest.raises(ValueError, match="none is kept"):
            Rows(data.select([5, 10]), columns(), on_bad_row="skip_empty")


def test_buckets_count_present_text_only():
    data = both(4, texts=lambda i: [None, "a", None, "a a a"][i])
    two = as_modalities({"image": ImageColumn("image", 4), "text": TextColumn("text", tokenizer("a"))})
    assert Rows(data, two).lengths.tolist() == [0, 3, 0, 5]
    assert [length for _, _, length in Rows(data.to_iterable_dataset(), two).stream()] == [0, 1, 0, 5]


def test_hiding_is_a_function_of_seed_modality_and_row():
    rows, names = torch.arange(4000), ["image", "text"]
    every = torch.ones(4000, 2, dtype=torch.bool)
    left = hide(every, rows, names, {"text": 0.5}, seed=3)
    assert left[:, 0].all()
    assert left[:, 1].float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    assert not torch.equal(left, hide(every, rows, names, {"text": 0.5}, seed=4))
    order = torch.randperm(4000)
    assert torch.equal(left[order], hide(every, rows[order], names, {"text": 0.5}, seed=3))
    three = hide(torch.ones(4000, 3, dtype=torch.bool), rows, ["text", "sound", "image"], {"text": 0.5}, seed=3)
    assert torch.equal(three[:, 0], left[:, 1]), "other modalities change nothing"
    fewer = hide(every, rows, names, {"text": 0.2}, seed=3)
    assert (fewer >= left).all(), "a larger probability hides more of the same"


@pytest.mark.parametrize("probability", [0.7, 1.0])
def test_the_last_modality_is_never_hidden(probability):
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool().repeat(300, 1)
    names = ["a", "b", "c"]
    left = hide(present, torch.arange(len(present)), names, dict.fromkeys(names, probability))
    assert torch.equal(left.any(1), present.any(1))
    assert (left <= present).all()
    assert torch.equal(left[1::4], present[1::4])
    assert (left[0::4].sum(0) > 60).all(), "it is not always the same that stays"


def test_hidden_rows_are_the_same_in_every_epoch_and_for_every_rank():
    rows = Rows(both(texts=lambda i: "a heart"), columns(), drop={"text": 0.5}, drop_seed=1)
    loader = Loader(rows, 8)
    first, second = table(loader.batches(0)), table(loader.batches(1))
    assert first == second
    assert 0 < sum(has_text for _, has_text in first.values()) < N
    ranks = [table(Loader(rows, 8, rank=rank, world_size=3).batches(0)) for rank in range(3)]
    assert {row: value for share in ranks for row, value in share.items()} == first


@pytest.mark.parametrize("streamed", [False, True])
def test_complete_rows_alone(streamed):
    data = both()
    data = data.to_iterable_dataset() if streamed else data
    options = {"drop": {"text": 0.5}, "drop_seed": 1}
    all_rows = table(epoch(Rows(data, columns(), **options)))
    kept = table(epoch(Rows(data, columns(), complete=True, **options)))
    assert kept == {row: value for row, value in all_rows.items() if all(value)}
    assert 5 < len(kept) < N


def test_what_is_hidden_is_in_the_fingerprint():
    data = both(texts=lambda i: "a heart")
    stream = data.to_iterable_dataset()
    for source in (data, stream):
        options = [{}, {"drop": {"text": 0.5}}, {"drop": {"text": 0.5}, "drop_seed": 1}, {"drop": {"text": 0.6}}, {"complete": True}]
        prints = [Rows(source, columns(), **option).fingerprint for option in options]
        assert len(set(prints)) == len(prints)
        assert Rows(source, columns(), drop={"text": 0.5}).fingerprint == prints[1]


def test_what_is_refused():
    data = both(3)
    with pytest.raises(ValueError, match=r"drop: got 'texts', expected one of image, text; the nearest is 'text'"):
        Rows(data, columns(), drop={"texts": 0.5})
    with pytest.raises(ValueError, match=r"drop\['text'\]: got 50, expected a probability"):
        Rows(data, columns(), drop={"text": 50})
    with pytest.raises(ValueError, match="no column is a modality"):
        Rows(data, ImageColumn("image", 4), drop={"image": 0.5})
    with pytest.raises(ValueError, match="complete: got True"):
        Rows(data, ImageColumn("image", 4), complete=True)
    with pytest.raises(ValueError, match="on_bad_row: got 'ignore'"):
        Rows(data, columns(), on_bad_row="ignore")
    with pytest.raises(ValueError, match="expected different names"):
        Rows(data, [*columns(), *columns()])


def test_texts_for_a_tokenizer_pass_over_what_is_missing():
    data = both(5)
    assert list(texts_of(data, "text", missing=True)) == [caption(i) for i in (0, 2, 3)]
    assert list(texts_of(data, "text", on_bad_row="skip_empty")) == [caption(i) for i in (0, 2, 3)]
    with pytest.raises(BadRow, match="row 1, field 'text': got an empty cell, expected text"):
        list(texts_of(data, "text"))


def test_sprites_lose_captions():
    data = sprites(3, "train", num_rows=20, image_size=16)
    text = TextColumn("caption", tokenizer("small big red yellow green blue pink square ellipse heart"))
    rows = Rows(data, as_modalities({"image": ImageColumn("image", 16), "text": text}), drop={"text": 0.5})
    present = np.array(list(table(epoch(rows)).values()))
    assert present[:, 0].all() and 0 < present[:, 1].sum() < 20


@needs_real_data
@pytest.mark.parametrize(
    ("name", "image", "texts", "sizes"),
    [("emoji", "image", ["text"], (2741, 316, 326)), ("multi30k", None, ["en", "de"], (29000, 1014, 1000))],
)
def test_real_pairs_load(name, image, texts, sizes):
    parts = splits(f"{REAL}/{name}")
    assert tuple(len(part) for part in parts.values()) == sizes
    few = parts["train"].select(range(6))
    text = tokenizer(" ".join({word for row in few for column in texts for word in row[column].split()}))
    chosen = {column: TextColumn(column, text) for column in texts}
    rows = Rows(few, as_modalities(({"image": ImageColumn(image, 32)} if image else {}) | chosen))
    (batch,) = epoch(rows)
    assert batch["present"].all()
    assert {"pixel_values", "input_ids"} <= set(batch) if image else {"en_input_ids", "de_input_ids"} <= set(batch)
