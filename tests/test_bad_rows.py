"""Bad rows: named with their true line, left out on request, exactly counted, the same for every way of reading."""

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from bad_rows import make, picture, read
from picture_mutations import run
from test_columns import tokenizer

from mmvae import ImageVAE, ImageVAEConfig, ImageVAEImageProcessor
from mmvae.data import (
    BadRow,
    ImageColumn,
    LabelColumn,
    Loader,
    MaskColumn,
    Rows,
    TextColumn,
    find_column,
    load_rows,
    places,
    read_labels,
    shown_labels,
    texts_of,
)
from mmvae.data.partly_labelled import PartlyLabelled
from mmvae.data.selection import select
from mmvae.data.turned import add_turns
from mmvae.experiment import make_loaders
from mmvae.modalities import new_modality


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # where the machine lends one core
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_bad_rows_are_left_out_exactly_however_they_are_read(tmp_path, kind):
    bad = make(tmp_path / "data", kind, 300, 30)
    found = [read(tmp_path / "data", kind, **options) for options in ({}, {"num_workers": 2}, {"streaming": True})]
    for rows, batches in found:
        assert sorted(rows.bad) == sorted(bad)
        assert sorted(torch.cat([batch["row"] for batch in batches]).tolist()) == sorted({*range(300)} - bad)
    (_, one), (_, other), _ = found
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


def broken(tmp_path, lines):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("line", [1, 2500, 3000])
def test_a_broken_line_is_named_by_its_true_number(tmp_path, line):
    lines = [json.dumps({"text": f"w{i} " * 40}) for i in range(3000)]
    lines[line - 1] = '{"text": "w1" oh}'
    path = broken(tmp_path, lines)
    with pytest.raises(BadRow, match=rf"^{path}: line {line}, column 15: Expecting ',' delimiter$"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "got list, expected an object"),
        ("", "got an empty line"),
        ('{"text": 5}', "field 'text': got number, expected str as in line 1"),
        ('{"text": "\\ud800"}', "column 11: got a lone surrogate"),
        ('{"text": null}', "got an empty cell"),
        ('{"text": "w1 <eos>"}', "BOS, EOS or PAD"),
        ('{"text": "w1 <pad>"}', "BOS, EOS or PAD"),
    ],
)
def test_lines_of_every_kind_are_left_out(tmp_path, caplog, line, told):
    path = broken(tmp_path, ['{"text": "w1"}', line, '{"text": "w1 w1"}'])
    with caplog.at_level(logging.WARNING):
        data = load_rows(str(path), on_bad_row="skip")
        rows = Rows(data, TextColumn("text", tokenizer("w1")), on_bad_row="skip")
    assert rows.numbers.tolist() == [0, 2] and list(rows.bad) == [1] and rows.lengths.tolist() == [3, 4]
    assert told in caplog.text or told in rows.bad[1]
    assert len(list(texts_of(data, "text", on_bad_row="skip"))) == 3 - ("BOS" not in told)


def test_reserved_words_are_told_by_row_before_there_is_a_tokenizer_and_are_left_out():
    data = select(datasets.Dataset.from_dict({"text": ["w1", None, "w2 w3", "w1 <pad>w2"]}), [1, 2, 3])
    options = {"options": {}, "reading": {}, "text": {"kind": "whitespace", "vocab_size": 9}, "name": "mine"}
    with pytest.raises(BadRow, match=r"^mine: row 3, field 'text': got text with the reserved word '<pad>', expected text without it$"):
        new_modality("text", data, "text", **options)
    made = new_modality("text", data, "text", **options, on_bad_row="skip")
    assert {*made.processor.get_vocab()} == {"<pad>", "<bos>", "<eos>", "<unk>", "w2", "w3"}
    assert Rows(data, made.column, on_bad_row="skip").numbers.tolist() == [1]


def test_too_many_bad_rows_stop_a_run_and_are_listed(tmp_path):
    column, few, texts = TextColumn("text", tokenizer("w1")), {"name": "mine", "on_bad_row": "skip"}, ["w1", None, None, "w1"]
    rows = {"train": Rows(datasets.Dataset.from_dict({"text": texts}), column, **few)}
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
    args = {"on_bad_row": "skip", "output_dir": str(tmp_path), "dataset": "mine", "batch_size": 2, "seed": 0, "num_workers": 0}
    with pytest.raises(BadRow, match=r"mine, train: got 2 bad rows beside 2 good ones, expected .* 1.0% \(--most_bad_rows\); .* row 1"):
        make_loaders(accelerator, SimpleNamespace(**args, most_bad_rows=0.01), rows)
    told = [f"train: mine: row {row}, field 'text': got an empty cell, expected a value\n" for row in (1, 2)]
    assert (tmp_path / "bad_rows.txt").read_text() == "".join(told)
    loaders = make_loaders(accelerator, SimpleNamespace(**args, most_bad_rows=0.5), rows)
    assert isinstance(loaders["train"], Loader) and loaders["train"].num_rows == 2
    rows = {"train": Rows(datasets.Dataset.from_dict({"text": texts[:2]}), column, **few)}
    assert make_loaders(accelerator, SimpleNamespace(**args, most_bad_rows=0.01), rows)["train"].num_rows == 1, "one is always allowed"


def test_rows_of_every_modality_are_told_before_training(tmp_path, caplog):
    data = datasets.Dataset.from_dict({"text": ["w1", None, "w1", None, "<pad>"], "more": ["w1", "w1", None, None, "w1"]})
    columns = [TextColumn(name, tokenizer("w1"), prefix=name, modality=name) for name in ("text", "more")]
    rows = {"train": Rows(data, columns, on_bad_row="skip")}
    args = {"on_bad_row": "skip", "output_dir": str(tmp_path), "dataset": "mine", "batch_size": 2, "seed": 0, "most_bad_rows": 0.5}
    with caplog.at_level(logging.INFO):
        make_loaders(SimpleNamespace(is_main_process=True, process_index=0, num_processes=1), SimpleNamespace(**args), rows)
    assert "train: 3 rows, text 2, more 2" in caplog.text


def in_two(folder, first, second, ending="jsonl"):
    """A training split of two files."""
    folder.mkdir()
    for n, lines in enumerate((first, second)):
        (folder / f"train-{n:05d}-of-00002.{ending}").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_bad_rows_are_told_with_their_file_their_line_and_what_is_wrong_with_it(tmp_path):
    second = ['{"text": "w1"}', '{"text": 7}', '{"text": "w1" oh}', '{"text": null}']
    name = in_two(tmp_path / "data", ['{"text": "w1"}', '{"text": oh}'], second)
    rows = Rows(load_rows(name, on_bad_row="skip"), TextColumn("text", tokenizer("w1")), name=name, on_bad_row="skip")
    one, two = (f"train-0000{n}-of-00002.jsonl" for n in (0, 1))
    told = [
        f"row 1 ({one}: line 2, column 10: Expecting value)",
        f"row 3 ({two}: line 2, field 'text': got number, expected str as in line 1 of {one})",
        f"row 4 ({two}: line 3, column 15: Expecting ',' delimiter)",
        f"row 5 ({two}: line 4)",
    ]
    assert list(rows.bad.values()) == [f"{name}: {place}, field 'text': got an empty cell, expected a value" for place in told]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_bad_row_of_several_tables_is_told_with_its_file(tmp_path, ending):
    name = in_two(tmp_path / "data", ["text,n", '"w1\nw1",1', "w1,2"], ["text,n", "w1,1", ",2"], "csv")
    if ending == "parquet":
        for n in (0, 1):
            file = tmp_path / "data" / f"train-0000{n}-of-00002.csv"
            load_rows(str(file)).to_parquet(file.with_suffix(".parquet"))
            file.unlink()
    data = load_rows(name)
    with pytest.raises(BadRow, match=rf"^{name}: row 3 \(train-00001-of-00002.{ending}: row 1\), field 'text': got an empty cell"):
        Rows(data, TextColumn("text", tokenizer("w1")), name=name)
    with pytest.raises(BadRow, match=r"^mine: row 3, field"):
        Rows(data, TextColumn("text", tokenizer("w1")), name="mine")


def test_files_are_read_once_for_the_places_of_rows_and_only_where_they_say_more(tmp_path):
    path = broken(tmp_path, ['{"text": "w1", "n": 1}', '{"text": null, "n": 2}'])
    name = in_two(tmp_path / "two", ['{"text": "w1", "n": 1}'], ['{"text": "w1", "n": 2}', '{"text": null, "n": 3}'])
    for source, told in ((str(path), "row 1"), (name, "row 2 (train-00001-of-00002.jsonl: line 2)")):
        data, misses = load_rows(source), places._files.cache_info().misses
        for columns in (["text"], ["text", "n"]):
            assert places.place(data.select_columns(columns), source, len(data) - 1) == f"{source}: {told}"
        assert places._files.cache_info().misses == misses + 1
    assert [file.name for file, *_ in places._files(name, "train", 3, False)] == [f"train-0000{n}-of-00002.jsonl" for n in (0, 1)]
    assert places._files(str(path), "train", 2, False) == []


@pytest.mark.parametrize("on_bad_row", ["error", "skip_empty"])
def test_a_value_of_another_kind_in_a_later_file_is_refused(tmp_path, on_bad_row):
    name = in_two(tmp_path / "data", ['{"text": "w1"}'], ['{"text": null}', '{"text": 7}'])
    with pytest.raises(BadRow, match="train-00001-of-00002.jsonl: line 2, field .text.: got number, expected str as in line 1 of train-0"):
        load_rows(name, on_bad_row=on_bad_row)


def test_data_that_changed_has_another_fingerprint():
    column = TextColumn("text", tokenizer("w1 w2"))
    texts = [["w1", None, "w2"], [None, "w1", "w2"], ["w1", "w1", "w2"]]
    rows = [Rows(datasets.Dataset.from_dict({"text": each}), column, on_bad_row="skip") for each in texts]
    assert len({each.fingerprint for each in rows}) == 3


def test_damaged_pictures_are_decoded_or_refused_by_name():
    counts, failed = run(300, seed=5)
    assert not failed
    assert counts["refused by name"] > 100


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_a_check_lists_every_problem_in_one_pass(tmp_path, kind, capsys, monkeypatch):
    bad = make(tmp_path / "data", kind, 60, 6)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    check_data = importlib.import_module("check_data")
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--dataset", str(tmp_path / "data")])
    with pytest.raises(SystemExit, match="True"):
        check_data.main()
    told = capsys.readouterr().out
    assert f"\n{len(bad)} problems" in told
    assert all((f"{row:06d}.png" if kind == "folder" else f"line {row + 1}, ") in told or f"row {row}, " in told for row in bad)


def captioned(folder, count=6):
    """Pictures with a metadata.jsonl of captions."""
    folder.mkdir(parents=True)
    for row in range(count):
        (folder / f"{row}.png").write_bytes(picture(row))
    lines = [json.dumps({"file_name": f"{row}.png", "text": f"w{row}"}) for row in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def checked(path, capsys, monkeypatch, *options):
    """What check_data.py prints of a data set."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    check_data = importlib.import_module("check_data")
    monkeypatch.setattr(sys, "argv", ["check_data.py", "--dataset", str(path), *options])
    with pytest.raises(SystemExit):
        check_data.main()
    return capsys.readouterr().out


def test_pictures_with_captions_keep_their_pictures_where_bad_rows_are_skipped(tmp_path, capsys, monkeypatch):
    captioned(tmp_path / "data" / "train")
    assert "nothing is wrong" in checked(tmp_path / "data", capsys, monkeypatch)
    (tmp_path / "data" / "train" / "4.png").write_bytes(picture(4)[:40])
    data = load_rows(str(tmp_path / "data"), on_bad_row="skip")
    rows = Rows(data, [ImageColumn("image", 4, 1), TextColumn("text", tokenizer("w0"), modality="text")], on_bad_row="skip")
    assert list(rows.bad) == [4] and rows.num_rows == 5
    told = checked(tmp_path / "data", capsys, monkeypatch)
    assert "4.png" in told and "\n1 problems" in told
    (tmp_path / "data" / "train" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "w0"}\n{"file_name" oh\n')
    assert "metadata.jsonl: line 2, column" in checked(tmp_path / "data", capsys, monkeypatch)


def test_lines_are_skipped_beside_files_that_are_no_data(tmp_path):
    (tmp_path / ".cache" / "hub").mkdir(parents=True)
    (tmp_path / ".cache" / "hub" / "train.jsonl.metadata").write_text("x")
    for name in ("LICENSE.txt", "README.md"):
        (tmp_path / name).write_text("Do as you like.")
    (tmp_path / "train.jsonl").write_text('{"text": "w1"}\n{"text" oh\n')
    assert load_rows(str(tmp_path), on_bad_row="skip")["text"][:] == ["w1", None]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_card_says_the_splits_where_bad_rows_are_skipped(tmp_path, capsys, monkeypatch, streaming):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "heldout", "old"):
        (data / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n" + json.dumps({"text": f"{name} again"}) + "\n")
    files = "  - split: train\n    path: a.jsonl\n  - split: test\n    path: heldout.jsonl\n"
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: mine\n  data_files:\n{files}---\n")
    whole = load_rows(str(data), "test")["text"][:]
    for split, expected in (("train", ["a", "a again"]), ("test", whole)):
        assert [row["text"] for row in load_rows(str(data), split, on_bad_row="skip", streaming=streaming)] == expected
    with (data / "heldout.jsonl").open("a") as file:
        file.write("oh\n")
    (data / "old.jsonl").write_text("oh\n")
    told = checked(data, capsys, monkeypatch)
    assert "heldout.jsonl: line 3" in told and "\n1 problems" in told and "old.jsonl" not in told


MIXED = {
    "values": [{"id": 1}, {"id": "x"}],
    "keys": [{"id": 1}, {"name": "x"}],
    "lists": [[1, "x"], [2]],
    "large": [1, 2**64],
    "exact": [1.5, 2**53 + 1],
}


@pytest.mark.parametrize("kind", MIXED)
def test_lines_of_mixed_values_are_the_same_where_bad_rows_are_skipped(tmp_path, capsys, monkeypatch, kind):
    lines = [json.dumps({"meta": value, "text": "w1"}) for value in MIXED[kind]]
    whole = load_rows(str(broken(tmp_path, lines)))
    skipped = load_rows(str(broken(tmp_path, lines)), on_bad_row="skip")
    assert skipped.features == whole.features and skipped[:] == whole[:]
    stream = load_rows(str(broken(tmp_path, lines)), on_bad_row="skip", streaming=True)
    assert find_column(stream, "text") == "text" and [row["text"] for row in stream] == ["w1", "w1"]
    assert "nothing is wrong" in checked(tmp_path / "train.jsonl", capsys, monkeypatch)


def test_a_damaged_table_hides_no_other(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, bad in (("train", ""), ("validation", "w1,1,2,3"), ("test", "w1,1,2")):
        (folder / f"{split}.csv").write_text("\n".join(["text,label", "w1,1", bad or ",2"]) + "\n")
    told = checked(folder, capsys, monkeypatch)
    assert "train.csv: row 1, field 'text': got an empty cell" in told and "\n3 problems" in told
    assert all(f"{split}.csv: Error tokenizing data" in told for split in ("validation", "test"))
    (folder / "test.csv").write_text("")
    told = checked(folder, capsys, monkeypatch)
    assert "train.csv: row 1, field 'text': got an empty cell" in told and "\n3 problems" in told
    assert "validation.csv: Error tokenizing data" in told and "test.csv is empty, expected rows" in told


@pytest.mark.parametrize("columns", [(), ("--columns", "text")])
def test_tables_of_other_columns_hide_no_row(tmp_path, capsys, monkeypatch, columns):
    folder = in_two(tmp_path / "data", ["text,m", "w1,1", ",2"], ["n", "1"], "csv")
    told = checked(folder, capsys, monkeypatch, *columns)
    assert "train-00000-of-00002.csv: row 1, field 'text': got an empty cell" in told and "\n3 problems" in told
    assert f"{folder}: Couldn't cast" in told
    assert f"train-00001-of-00002.csv {'has no column' if columns else 'has no column of pictures or texts'}" in told


def test_a_broken_line_is_told_once(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "w1"}\n{"text" oh\n{"text": null}\n')
    (folder / "test.json").write_text('[{"text": "w1"}]')
    told = checked(folder, capsys, monkeypatch)
    assert "train.jsonl: line 2, column 9" in told and "train.jsonl: row 2, field 'text': got an empty cell" in told
    assert "\n2 problems" in told
    (folder / "test.json").unlink()
    files = "".join(f"  - split: {split}\n    path: train.jsonl\n" for split in ("train", "validation", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: mine\n  data_files:\n{files}---\n")
    told = checked(folder, capsys, monkeypatch)
    assert told.count("train.jsonl: line 2, column 9") == 1 and "data, test: row 2, field 'text': got an empty cell" in told
    assert "\n4 problems" in told


def test_pictures_that_are_not_listed_and_dead_links_are_told(tmp_path, capsys, monkeypatch):
    captioned(tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / "more.png").write_bytes(picture(0))
    (tmp_path / "data" / "train" / "gone.png").symlink_to("/nowhere.png")
    told = checked(tmp_path / "data", capsys, monkeypatch)
    assert "more.png: is not listed in the metadata file" in told
    assert "gone.png: leads to /nowhere.png, which does not exist" in told and "\n2 problems" in told


def test_pictures_of_a_list_and_of_splits_that_are_not_read_are_not_told(tmp_path, capsys, monkeypatch):
    for split in ("train", "extra"):
        captioned(tmp_path / "data" / split)
    files = "".join(f"  - split: {split}\n    path: {split}/*\n" for split in ("train", "extra"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: mine\n  data_files:\n{files}---\n")
    assert "nothing is wrong" in checked(tmp_path / "data", capsys, monkeypatch)
    captioned(tmp_path / "lists" / "train")
    lines = [json.dumps({"images_file_names": [f"{row}.png", f"{row + 1}.png"], "text": f"w{row}"}) for row in (0, 2)]
    (tmp_path / "lists" / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    told = checked(tmp_path / "lists", capsys, monkeypatch)
    assert [f"{row}.png: is not listed" in told for row in range(6)] == [False] * 4 + [True] * 2 and "\n2 problems" in told


def test_an_evaluation_refuses_too_many_bad_rows_and_counts_them(tmp_path, monkeypatch):
    make(tmp_path / "data", "folder", 8, 2)
    ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2)).save_pretrained(tmp_path / "model")
    ImageVAEImageProcessor(size={"height": 8, "width": 8}, num_channels=1).save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "recipes")
    evaluate = importlib.import_module("evaluate")
    options = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "data"), "--split", "train", "--importance_samples", "0"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, "--on_bad_row", "skip"])
    with pytest.raises(BadRow, match=r"data, train: got 2 bad rows beside 6 good ones, expected at most 1.0% \(--most_bad_rows\)"):
        evaluate.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--most_bad_rows", "0.25"])
    evaluate.main()
    record = json.loads((tmp_path / "model" / "evaluation-train.json").read_text())
    assert (record["rows"], record["bad_rows"]) == (6, 2)


def test_the_built_in_data_is_checked(capsys, monkeypatch):
    assert "nothing is wrong" in checked("sprites:1:20", capsys, monkeypatch)


def test_a_broken_line_of_one_split_hides_no_row_of_another(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, bad in (("train", '{"text" oh'), ("test", '{"text": null}')):
        (folder / f"{split}.jsonl").write_text("\n".join(['{"text": "w1"}', bad, '{"text": "w1"}']) + "\n")
    told = checked(folder, capsys, monkeypatch)
    assert "train.jsonl: line 2, " in told and "test: row 1, field 'text': got an empty cell" in told and "\n2 problems" in told


def test_every_problem_is_listed_where_no_row_is_good(tmp_path, capsys, monkeypatch):
    make(tmp_path / "data", "folder", 3, 3)
    told = checked(tmp_path / "data", capsys, monkeypatch)
    assert all(f"{row:06d}.png" in told for row in range(3)) and "\n3 problems" in told
    assert "none is kept" not in told


def test_a_stream_with_too_many_bad_rows_stops():
    for texts, most_bad in ((["w1", None, None, "w1"], 0.01), (["w1", None, None, "w1"], 0.5), (["w1", None, "w1"], 0.01)):
        data = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
        rows = Rows(data, TextColumn("text", tokenizer("w1")), name="mine", on_bad_row="skip", most_bad=most_bad)
        if texts.count(None) == 1 or most_bad == 0.5:
            assert len(list(Loader(rows, 2).batches(0))) == 1
            continue
        with pytest.raises(
            BadRow, match=r"mine: got 2 bad rows of the first 4 of a stream, expected at most 1.0% .* row 1 of the stream, field"
        ):
            list(Loader(rows, 2).batches(0))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_that_is_lost_after_it_was_looked_at_is_no_black_one(tmp_path, streaming):
    paths = [tmp_path / f"{row}.png" for row in range(3)]
    for row, path in enumerate(paths):
        path.write_bytes(picture(row))
    data = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}, datasets.Features({"image": datasets.Image()}))
    data = data.to_iterable_dataset() if streaming else data
    rows = Rows(data, ImageColumn("image", 4, 1), name="mine", memory_limit=0, on_bad_row="skip")
    numbers, read, _ = zip(*rows.stream(), strict=True) if streaming else (range(3), None, None)
    values = {"image": [row["image"] for row in read]} if streaming else None
    paths[1].unlink()
    with pytest.raises(BadRow, match=r"^mine: row 1( of the stream)?, field 'image': got .*1\.png that cannot be decoded"):
        rows.batch(torch.tensor(numbers), torch.arange(3), values)


def test_paths_are_opened_only_where_the_data_set_declares_pictures(tmp_path):
    path, column = tmp_path / "0.png", ImageColumn("image", 4, 1)
    path.write_bytes(picture(0))
    table = {"image": [{"bytes": None, "path": str(path)}]}
    plain, declared = (datasets.Dataset.from_dict(table, features) for features in (None, datasets.Features({"image": datasets.Image()})))
    for data in (plain, plain.to_iterable_dataset()):
        with pytest.raises(BadRow, match=r"row 0.*, field 'image': got the path '.*0\.png', expected bytes: .* declares an Image feature$"):
            list(Loader(Rows(data, column), 1).batches(0))
    with pytest.raises(BadRow, match="declares an Image feature"):
        Rows(plain, MaskColumn("image", 4))
    with pytest.raises(ValueError, match="declares an Image feature"):
        add_turns(plain, "train")
    assert Rows(datasets.Dataset.from_dict({"image": [{"bytes": picture(0), "path": "0.png"}]}), column).num_rows == 1
    for data in (declared, declared.to_iterable_dataset(), add_turns(declared, "train")):
        assert len(list(Loader(Rows(data, column), 1).batches(0))) == 1
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadRow, match=r"0\.png that cannot be decoded \(not a regular file\)"):
        Rows(declared, column)


def test_labels_of_bad_rows_are_none_where_these_are_skipped():
    data, labels = datasets.Dataset.from_dict({"label": ["a", None, "c", "b"]}), LabelColumn("label", ("a", "b"))
    assert read_labels(data, labels, on_bad_row="skip").tolist() == [0, -100, -100, 1]
    with pytest.raises(BadRow, match="row 1"):
        read_labels(data, labels)


def test_a_damaged_picture_does_not_tell_a_class():
    pictures = [picture(row)[: 40 if row == 2 else None] for row in range(4)]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    table = {"image": [{"bytes": each, "path": None} for each in pictures], "label": ["a", "b", "b", "a"]}
    data, column = datasets.Dataset.from_dict(table, features=features), ImageColumn("image", 4, 1)
    options = {"on_bad_row": "skip", "memory_limit": 0}
    part = PartlyLabelled(data, column, LabelColumn("label", ("a", "b")), **options)
    assert part.num_told == 3 and part.num_rows == 3
    seed = next(seed for seed in range(20) if shown_labels(torch.tensor([0, 1, 1, 0]), 1, ("a", "b"), seed)[2])
    with pytest.raises(ValueError, match="row 2, .* expected a good one among the rows that tell their class"):
        PartlyLabelled(data, column, LabelColumn("label", ("a", "b")), per_class=1, seed=seed, **options)


def test_a_class_of_which_all_rows_are_left_out_is_named():
    data, labels = datasets.Dataset.from_dict({"text": ["w1", None], "label": ["a", "b"]}), LabelColumn("label", ("a", "b"))
    with pytest.raises(ValueError, match=r"^mine: row 1, .*empty cell.*, expected a good row of class 'b', of which none is left$"):
        PartlyLabelled(data, TextColumn("text", tokenizer("w1")), labels, name="mine", on_bad_row="skip_empty")


def test_the_label_of_a_row_without_any_modality_is_not_looked_at():
    data = datasets.Dataset.from_dict({"text": ["w1", None, "w1"], "label": ["a", None, "b"]})
    columns = [TextColumn("text", tokenizer("w1"), modality="text"), LabelColumn("label", ("a", "b"))]
    rows = Rows(data, columns, on_bad_row="skip_empty")
    assert rows.numbers.tolist() == [0, 2] and rows.batch(rows.numbers, rows.numbers)["labels"].tolist() == [0, 1]
