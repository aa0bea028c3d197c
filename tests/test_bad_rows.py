"""Bad rows: named with their true line, left out on request, exactly counted, the same for every way of reading."""

import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from bad_rows import make, read
from picture_mutations import run
from test_columns import tokenizer

from mmvae.data import BadRow, Loader, Rows, TextColumn, load_rows, texts_of
from mmvae.experiment import make_loaders


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
        ('{"text": null}', "got NoneType"),
        ('{"text": "w1 <eos>"}', "BOS or EOS"),
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


def test_too_many_bad_rows_stop_a_run_and_are_listed(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["w1", None, "w1", "w1"]})
    rows = {"train": Rows(data, TextColumn("text", tokenizer("w1")), name="mine", on_bad_row="skip")}
    accelerator = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
    args = {"on_bad_row": "skip", "output_dir": str(tmp_path), "dataset": "mine", "batch_size": 2, "seed": 0, "num_workers": 0}
    with pytest.raises(BadRow, match=r"mine, train: got 1 bad rows beside 3 good ones, expected at most 1.0% .* mine: row 1, field 'text'"):
        make_loaders(accelerator, SimpleNamespace(**args, most_bad_rows=0.01), rows)
    assert (tmp_path / "bad_rows.txt").read_text() == "train: mine: row 1, field 'text': got NoneType, expected text\n"
    loaders = make_loaders(accelerator, SimpleNamespace(**args, most_bad_rows=0.25), rows)
    assert isinstance(loaders["train"], Loader) and loaders["train"].num_rows == 3


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
