"""Batches: the order is a pure function of (seed, epoch), for any number of ranks, workers and restarts."""

import os
import resource
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from test_columns import tokenizer

from mmvae import TopicVAEVectorizer
from mmvae.data import (
    Augmentation,
    BadRow,
    ImageColumn,
    LabelColumn,
    Loader,
    Rows,
    TextColumn,
    WordCountColumn,
    load_rows,
    splits,
    sprites,
    texts_of,
)
from mmvae.data.selection import select

REAL = os.environ.get("MMVAE_TEST_DATA")
WORDS = [f"w{i}" for i in range(50)]


def sentences(n=501, seed=0):
    """Texts with the lengths of a treebank: about 21 words, skewed."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.gamma(4, 5.3, n).astype(int), 1, 80)
    return datasets.Dataset.from_dict({"text": [" ".join(random.choice(WORDS, length)) for length in lengths]})


def text_rows(n=501, **options):
    return Rows(sentences(n), TextColumn("text", tokenizer(" ".join(WORDS)), 100), **options)


def image_rows(tmp_path, n=23, memory_limit=2**30, streaming=False, **options):
    for i in range(n):
        (tmp_path / "train").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / f"{i:03d}.png")
    column = ImageColumn("image", 8, 3, augmentation=Augmentation(0.5, 0, 1, 0.7, 10, 0.2))
    return Rows(load_rows(str(tmp_path), streaming=streaming), column, name=str(tmp_path), memory_limit=memory_limit, **options)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=["text", "stream of text", "images", "images decoded later", "stream of images"])
def rows(request, tmp_path):
    match request.param:
        case "text":
            return text_rows(101)
        case "stream of text":
            return Rows(sentences(101).to_iterable_dataset(num_shards=3), TextColumn("text", tokenizer(" ".join(WORDS)), 100))
        case "images":
            return image_rows(tmp_path)
        case "images decoded later":
            return image_rows(tmp_path, memory_limit=0)
    return image_rows(tmp_path, streaming=True)


def test_order_is_pure_in_seed_and_epoch(rows):
    loader = Loader(rows, 6, seed=3, pool=2)
    first = list(loader.batches(1))
    assert same(first, Loader(rows, 6, seed=3, pool=2).batches(1))
    assert not same(first, loader.batches(2)) and not same(first, Loader(rows, 6, seed=4, pool=2).batches(1))


def test_every_row_comes_once_and_sizes_are_told(rows):
    n = rows.num_rows or len(list(rows.stream()))
    for shuffle in (True, False):
        batches = list(Loader(rows, 6, shuffle=shuffle, pool=2).batches(0))
        assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == list(range(n))
        assert all(len(batch["row"]) == batch["num_rows"] and batch["num_rows"].shape == () for batch in batches)
        assert sorted(int(batch["num_rows"]) for batch in batches) == sorted([n % 6] * (n % 6 > 0) + [6] * (n // 6))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_batches_of_one_process(rows, world_size):
    alone = list(Loader(rows, 6, pool=2).batches(0))
    ranks = [list(Loader(rows, 6, pool=2, rank=rank, world_size=world_size).batches(0)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}, "every rank has the same number of batches"
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert all(part["num_rows"] == whole["num_rows"] and len(part["row"]) >= 1 for part in parts)
        kept = torch.cat([part["row"][part["row_weight"] == 1] for part in parts])
        assert torch.equal(kept, whole["row"]) and sum(part["row_weight"].sum() for part in parts) == whole["num_rows"]
        for name in ("pixel_values", "input_ids"):
            for part in (part for part in parts if name in whole):
                place = (whole["row"] == part["row"][0]).nonzero().item()
                width = part[name].shape[-1]
                assert torch.equal(part[name][0], whole[name][place][..., :width])


@pytest.mark.parametrize("start", [1, 2, 3, 4, 99])
def test_start_leaves_batches_out(rows, start):
    loader = Loader(rows, 6, pool=2)
    assert same(list(loader.batches(5))[start:], loader.batches(5, start=start))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where the machine lends one core
def test_workers_change_nothing(tmp_path):
    for options in ({"memory_limit": 0}, {"streaming": True}, {}):
        rows, other = (image_rows(tmp_path, num_workers=number, **options) for number in (0, 2))
        torch.manual_seed(0)
        state = torch.get_rng_state()
        assert rows.fingerprint == other.fingerprint
        assert same(Loader(rows, 6, pool=2).batches(1), Loader(other, 6, pool=2).batches(1))
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_memory_changes_nothing(tmp_path):
    assert same(Loader(image_rows(tmp_path), 6).batches(2), Loader(image_rows(tmp_path, memory_limit=0), 6).batches(2))


def test_augmentation_follows_the_epoch_and_labels_the_row():
    data = sprites(3, num_rows=40, image_size=16)
    columns = [
        ImageColumn("image", 16, augmentation=Augmentation(shift=2)),
        LabelColumn("shape", data.features["shape"].names),
    ]
    loader = Loader(Rows(data, columns), 40, shuffle=False)
    (first,), (second,) = loader.batches(0), loader.batches(1)
    assert not torch.equal(first["pixel_values"], second["pixel_values"]) and torch.equal(first["labels"], second["labels"])
    assert first["labels"].tolist() == data["shape"] and first["row"].tolist() == list(range(40))


def test_pictures_arrive_as_they_are():
    data = sprites(3, num_rows=10, image_size=16)
    (batch,) = Loader(Rows(data, ImageColumn("image", 16)), 16).batches(0)
    assert batch["pixel_values"].dtype == torch.uint8
    assert np.array_equal(batch["pixel_values"].permute(0, 2, 3, 1), data["image"][batch["row"].numpy()])


def test_text_arrives_as_the_tokenizer_gave_it():
    rows, tokens = text_rows(30), tokenizer(" ".join(WORDS))
    texts = sentences(30)["text"]
    for batch in Loader(rows, 7).batches(0):
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1], "no column is all padding"
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask == 1].tolist() == [1, *tokens(texts[int(row)])["input_ids"], 2] and not ids[mask == 0].any()


def padding(batches):
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_length_buckets_leave_little_padding():
    rows = text_rows(4000)
    bucketed, plain = padding(Loader(rows, 32).batches(0)), padding(Loader(rows, 32, pool=0).batches(0))
    assert bucketed < 0.05 < 0.3 < plain
    lengths = [batch["input_ids"].shape[1] for batch in Loader(rows, 32).batches(0)]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.3, "batches do not come sorted"
    stream = Rows(sentences(4000).to_iterable_dataset(), rows.columns)
    assert padding(Loader(stream, 32).batches(0)) < 0.06


def test_several_columns_have_prefixes():
    data = datasets.Dataset.from_dict({"en": ["w1 w2", "w3"], "de": ["w4", ""]})
    tokens = tokenizer(" ".join(WORDS))
    (batch,) = Loader(Rows(data, [TextColumn("en", tokens, prefix="en"), TextColumn("de", tokens, prefix="de")]), 2, shuffle=False).batches(
        0
    )
    assert set(batch) == {
        "row",
        "row_weight",
        "num_rows",
        "en_input_ids",
        "en_attention_mask",
        "de_input_ids",
        "de_attention_mask",
    }
    assert batch["row"].tolist() == [1, 0] and batch["en_attention_mask"].sum(1).tolist() == [3, 4], "shorter rows first"
    with pytest.raises(ValueError, match="two columns give input_ids"):
        list(Loader(Rows(data, [TextColumn("en", tokens), TextColumn("de", tokens)]), 2).batches(0))


def test_length_of_a_loader(tmp_path):
    assert len(Loader(text_rows(13), 6)) == 3 and Loader(text_rows(13), 6).num_rows == 13
    with pytest.raises(TypeError, match="stream"):
        len(Loader(image_rows(tmp_path, streaming=True), 6))


@pytest.mark.parametrize("name", ["text", "images", "images decoded later", "stream"])
def test_fingerprint_changes_with_the_data_and_the_order_only(name, tmp_path):
    def make():
        if name == "text":
            return text_rows(20)
        return image_rows(tmp_path, 5, memory_limit=0 if "later" in name else 2**30, streaming=name == "stream")

    rows = make()
    loader = Loader(rows, 4)
    assert loader.fingerprint == Loader(make(), 4, rank=1, world_size=2).fingerprint
    assert (
        len(
            {
                loader.fingerprint,
                Loader(rows, 5).fingerprint,
                Loader(rows, 4, seed=1).fingerprint,
                Loader(rows, 4, pool=3).fingerprint,
            }
        )
        == 4
    )
    if name == "text":
        changed = Rows(sentences(20, seed=1), rows.columns)
    else:
        Image.new("RGB", (12, 10)).save(tmp_path / "train" / "003.png")
        limit = 0 if "later" in name else 2**30
        changed = Rows(load_rows(str(tmp_path), streaming=rows.streamed), rows.columns, name=str(tmp_path), memory_limit=limit)
    assert Loader(changed, 4).fingerprint != loader.fingerprint


def test_bad_rows_are_named(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["w1", "w2", None, "w3"]})
    column = TextColumn("text", tokenizer(" ".join(WORDS)), 5)
    with pytest.raises(BadRow, match=r"^some/set: row 2, field 'text': got an empty cell, expected a value \(or set .*\)$"):
        Rows(data, column, name="some/set")
    with pytest.raises(BadRow, match=r"row 1, field 'text': got 6 tokens, expected at most 5 .* in 'w1 w1 w1 w1'"):
        Rows(datasets.Dataset.from_dict({"text": ["w1", "w1 w1 w1 w1"]}), column)
    many = ["w1", "w1 w1 w1 w1", None, "w1 w1", *["w1 w1 w1 w1 w1"] * 2_000]
    with pytest.raises(BadRow, match=r"row 1, field 'text': got 6 tokens, .* in 'w1 w1 w1 w1'; 2001 of 2004 rows are too long"):
        Rows(datasets.Dataset.from_dict({"text": many}), column, on_bad_row="skip_empty")
    with pytest.raises(BadRow, match="data: row 2 of the stream, field 'text'"):
        list(Loader(Rows(data.to_iterable_dataset(), column), 2).batches(0))
    with pytest.raises(BadRow, match="row 3, field 'text'"):
        Rows(datasets.Dataset.from_dict({"text": ["w1", "w2", "w1", None]}).select([0, 1, 3]), column)


def test_a_stream_is_bucketed_by_the_columns_that_an_indexed_set_is():
    data = datasets.Dataset.from_dict({"text": ["w1 w2", "w3"], "document": ["w1", "w1 w2 w3 w4"]})
    columns = [TextColumn("text", tokenizer("w1 w2 w3")), WordCountColumn("document", TopicVAEVectorizer(["w1", "w2"]))]
    assert Rows(data, columns).lengths.tolist() == [4, 3]
    assert [characters for *_, characters in Rows(data.to_iterable_dataset(), columns).stream()] == [5, 2]


def test_texts_before_there_is_a_tokenizer():
    data = datasets.Dataset.from_dict({"text": ["w1", "w2", None, "w3"], "n": [1, 2, 3, 4]})
    assert list(texts_of(data.select([0, 1, 3]), "text", "some/set")) == ["w1", "w2", "w3"]
    assert list(texts_of(sprites(3, num_rows=2), "caption", "sprites")) == sprites(3, num_rows=2)["caption"]
    for rows in (data, data.to_iterable_dataset(), data.select([0, 2])):
        with pytest.raises(BadRow, match=r"^some/set: row 2( of the stream)?, field 'text': got an empty cell, expected text$"):
            list(texts_of(rows, "text", "some/set"))
    with pytest.raises(BadRow, match=r"some/set: row 0, field 'n': got int, expected text"):
        list(texts_of(data, "n", "some/set"))


@pytest.mark.parametrize("streaming", [False, True])
def test_cut_rows_are_told_once(caplog, streaming):
    data = datasets.Dataset.from_dict({"text": ["w1", "w1 w1 w1 w1", "w1", "w1 w1 w1 w1 w1"]})
    column = TextColumn("text", tokenizer("w1"), 5, truncate=True)
    rows = Rows(data.to_iterable_dataset() if streaming else data, column, name="some/set")
    list(Loader(rows, 1).batches(0)), list(Loader(rows, 1).batches(1))
    (record,) = caplog.records
    many = "1 of 1" if streaming else "2 of 4"
    assert record.levelname == "WARNING" and f"some/set: {many} rows" in record.getMessage() and "max_length=5" in record.getMessage()
    caplog.clear()
    Rows(data.select([0, 2]), column, name="short/set")
    assert not caplog.records, "another set's rows are not counted"


def test_streams_without_declared_features():
    def generate():
        for i in range(5):
            yield {"picture": Image.new("L", (4, 4), i), "note": "w1" if i < 4 else 7}

    stream = datasets.IterableDataset.from_generator(generate)
    (batch,) = Loader(Rows(stream, ImageColumn("picture", 4, 1)), 8, pool=0).batches(0)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(BadRow, match="row 4 of the stream, field 'note': got int, expected text"):
        list(Loader(Rows(stream, TextColumn("note", tokenizer("w1"))), 2).batches(0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where the machine lends one core
@pytest.mark.parametrize("memory_limit", [0, 2**30])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_pictures_are_named_with_their_file(tmp_path, num_workers, memory_limit):
    image_rows(tmp_path, 9)
    file = tmp_path / "train" / "005.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(BadRow, match=rf"row 5, field 'image': got {file} that cannot be decoded .*expected one of JPEG, PNG, WEBP"):
        list(Loader(image_rows(tmp_path, 0, memory_limit, num_workers=num_workers), 3).batches(0))


def test_workers_leave_to_the_main_process_what_is_told_of_bad_pictures(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("mmvae.data.preparation.CHUNK", 4)
    image_rows(tmp_path, 11)
    for row in (5, 10):
        (tmp_path / "train" / f"{row:03d}.png").write_bytes(b"no picture")
    rows = [image_rows(tmp_path, 0, num_workers=number, on_bad_row="skip") for number in (0, 2)]
    assert rows[0].bad == rows[1].bad and sorted(rows[1].bad) == [5, 10] and rows[0].fingerprint == rows[1].fingerprint
    assert [record.getMessage().count("skipping 2 of 11 rows") for record in caplog.records] == [1, 1]
    assert same(Loader(rows[0], 3).batches(0), Loader(rows[1], 3).batches(0))


def test_workers_end_with_a_main_process_that_is_killed(tmp_path, monkeypatch):
    read, write = os.pipe()

    def slow(*_):
        os.write(write, str(os.getpid()).encode())
        time.sleep(100)

    monkeypatch.setattr("mmvae.data.preparation.prepare_good", slow)
    main = os.fork()
    if not main:
        try:
            image_rows(tmp_path, 1, num_workers=1)
        finally:
            os._exit(1)
    worker = psutil.Process(int(os.read(read, 20)))
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    worker.wait(timeout=20)
    assert not worker.is_running()


def test_another_choice_of_rows_has_another_fingerprint_though_no_picture_is_read(tmp_path):
    image_rows(tmp_path, 6)
    data = load_rows(str(tmp_path))
    parts = [Rows(select(data, rows), ImageColumn("image", 8), name=str(tmp_path), memory_limit=0) for rows in ([0, 2, 4], [1, 3, 5])]
    assert parts[0].fingerprint != parts[1].fingerprint
    assert Loader(parts[1], 2).file_rows([0, 2]) == [1, 5]


def test_data_that_cannot_work_is_refused():
    tokens = tokenizer()
    with pytest.raises(ValueError, match="empty has no rows"):
        Rows(datasets.Dataset.from_dict({"text": []}), TextColumn("text", tokens), name="empty")
    with pytest.raises(ValueError, match="no column 'txt', expected one of text"):
        Rows(sentences(3), TextColumn("txt", tokens))
    rows = text_rows(3)
    for arguments in ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"pool": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Loader(rows, **{"batch_size": 2, **arguments})
    with pytest.raises(ValueError, match="num_workers: got -1, expected at least 0"):
        text_rows(3, num_workers=-1)
    with pytest.raises(ValueError, match="start"):
        next(Loader(rows, 2).batches(0, start=-1))


def test_large_pictures_stream_in_flat_memory(tmp_path):
    (tmp_path / "train").mkdir()
    for i, image in enumerate(sprites(5, num_rows=200, image_size=224)["image"]):
        Image.fromarray(image).save(tmp_path / "train" / f"{i:03d}.jpg")
    for streaming in (False, True):
        rows = Rows(load_rows(str(tmp_path), streaming=streaming), ImageColumn("image", 224), name=str(tmp_path), memory_limit=0)
        loader = Loader(rows, 16, pool=2)
        list(loader.batches(0))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(len(batch["row"]) for epoch in (1, 2) for batch in loader.batches(epoch)) == 400
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < 15, f"{grown:.0f} MiB more; all pictures together are 29 MiB per epoch"


@pytest.mark.skipif(not REAL, reason="MMVAE_TEST_DATA is not set: no folder with real data")
def test_real_sentences_are_bucketed():
    data = splits(str(Path(REAL) / "ptb"))["validation"]
    words = sorted({word for text in data["text"] for word in text.split()} - {"<unk>"})
    rows = Rows(data, TextColumn("text", tokenizer(" ".join(words)), 200))
    loader = Loader(rows, 32)
    assert padding(loader.batches(0)) < 0.05
    assert torch.cat([batch["row"] for batch in loader.batches(0)]).unique().numel() == len(data)
