"""Any data set by name: what is found, what is guessed, what is refused."""

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mmvae.data import BadRow, LabelColumn, find_classes, find_column, load_rows, read_labels, splits
from mmvae.data.contents import content_fingerprint
from mmvae.data.loading import features_of
from mmvae.data.selection import file_row, select

REAL = os.environ.get("MMVAE_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="MMVAE_TEST_DATA is not set: no folder with real data")
LINES = [f"line number {i}" for i in range(40)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def refuse(*address):
        raise AssertionError(f"loading a local set asked the network for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def folder(path, suffix, split="train"):
    path.mkdir(exist_ok=True)
    file = path / f"{split}{suffix}"
    table = datasets.Dataset.from_dict({"text": LINES})
    if suffix == ".txt":
        file.write_text("\n".join(LINES) + "\n")
    elif suffix == ".parquet":
        table.to_parquet(file)
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return file


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves the csv files that it streams open
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_files_and_folders_of_every_kind(tmp_path, suffix, streaming):
    file = folder(tmp_path / "set", suffix)
    before = sorted(os.listdir(file.parent))
    for name in (file, file.parent):
        rows = load_rows(str(name), streaming=streaming)
        assert [row["text"] for row in rows] == LINES
        assert find_column(rows, "text") == "text"
    del rows
    gc.collect()  # the warning about an open file comes here, not in a later test
    assert sorted(os.listdir(file.parent)) == before, "nothing is written beside the data"


def test_a_changed_file_is_read_again(tmp_path):
    file = folder(tmp_path / "set", ".txt")
    first, fingerprint = load_rows(str(file))["text"][0], content_fingerprint(str(file))
    file.write_text("other\n" * 3)
    assert first == LINES[0] and list(load_rows(str(file))["text"]) == ["other"] * 3
    assert content_fingerprint(str(file)) != fingerprint


def test_hidden_files_are_no_part_of_the_fingerprint(tmp_path):
    file = folder(tmp_path / "set", ".txt")
    fingerprint = content_fingerprint(str(file.parent))
    for name in (".git/index", ".cache/huggingface/train.txt.metadata", ".DS_Store"):
        (file.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (file.parent / name).write_text("x")
        assert content_fingerprint(str(file.parent)) == fingerprint
    (file.parent / "more.txt").write_text("x")
    assert content_fingerprint(str(file.parent)) != fingerprint


@pytest.mark.parametrize(("size", "other"), [(2**15, 2**10), (2**28 + 1, 0), (2**15, 2**28)])
def test_a_change_in_the_middle_of_a_file_is_seen_and_a_copy_is_the_same(size, other, tmp_path):
    """Beyond 256 MiB of all files together the copy must keep the times, those of small files too."""
    folder, copy = tmp_path / "set", tmp_path / "copy"
    folder.mkdir()
    for name, length in (("train.txt", size), ("test.txt", other)):
        with (folder / name).open("wb") as stream:
            stream.truncate(length)
        os.utime(folder / name, ns=(0, 10**18))
    fingerprint = content_fingerprint(str(folder))
    shutil.copytree(folder, copy)
    assert content_fingerprint(str(copy)) == fingerprint
    os.utime(copy / "train.txt", ns=(0, 10**18 + 1))
    assert (content_fingerprint(str(copy)) == fingerprint) == (size + other <= 2**28)
    with (folder / "train.txt").open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"x")
    assert content_fingerprint(str(folder)) != fingerprint


def test_a_mark_of_the_byte_order_is_no_part_of_a_text(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_bytes("\ufeffthe cat\nthe dog\n".encode())
    for streaming in (False, True):
        assert [row["text"] for row in load_rows(str(tmp_path / "set"), streaming=streaming)] == ["the cat", "the dog"]


def test_picture_folder(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "set" / "train" / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "set" / "train" / kind / f"{i}.png")
    rows = load_rows(str(tmp_path / "set"))
    assert find_column(rows, "image") == "image" and len(rows) == 6
    assert find_classes(rows, find_column(rows, "label")) == ("cat", "dog")


def test_words_that_pandas_takes_for_missing_values_stay_words(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("text,number\nNone,1\nNA,2\nnull,3\n")
    assert load_rows(str(file))[:] == {"text": ["None", "NA", "null"], "number": [1, 2, 3]}


BESIDE = [".cache/huggingface/download/train.csv.metadata", ".git/hooks/commit.sample", "LICENSE.txt", "NOTICE", "stats.json", "README.md"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves the csv files that it streams open
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_other_files_beside_a_csv_change_nothing(tmp_path, suffix, streaming):
    data = tmp_path / "data"
    for name in BESIDE:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("")
    sep = "\t" if suffix == ".tsv" else ","
    (data / f"train{suffix}").write_text(f"en{sep}de\nNone{sep}a\nnull{sep}\nNA{sep}NA\n")
    rows = list(load_rows(str(data), streaming=streaming))
    assert rows == [{"en": "None", "de": "a"}, {"en": "null", "de": None}, {"en": "NA", "de": "NA"}]
    gc.collect()  # the warning about an open file comes here, not in a later test


def test_missing_values_of_a_data_set_card_and_of_the_caller_hold(tmp_path):
    (tmp_path / "a.csv").write_text("text\n-\nNone\n?\n")
    card = "---\nconfigs:\n- config_name: mine\n  data_files: a.csv\n  {}\n---\n"
    given = {"": ["-", "None", "?"], "na_values: ['-']": [None, None, "?"], "keep_default_na: false": ["-", "None", "?"]}
    for told, expected in given.items():
        (tmp_path / "README.md").write_text(card.format(told))
        assert load_rows(str(tmp_path))["text"][:] == expected
    for path in (tmp_path, tmp_path / "a.csv"):
        assert load_rows(str(path), keep_default_na=False, na_values=["?"])["text"][:] == ["-", "None", None]


@pytest.mark.parametrize("alone", [True, False])
def test_tabs_part_a_tsv(tmp_path, alone):
    file = tmp_path / "data" / "train.tsv"
    file.parent.mkdir()
    file.write_text("text\tlabel\na, b\t1\nNA\t2\n")
    assert load_rows(str(file if alone else file.parent))[:] == {"text": ["a, b", "NA"], "label": [1, 2]}


@pytest.mark.parametrize("name", ["text", "./json", "csv", "imagefolder"])
def test_a_folder_with_the_name_of_a_kind_of_file_is_read_and_not_the_working_directory(tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("train.txt").write_text("another\n")
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist, expected a file, a folder"):
        load_rows(name)
    folder(Path(name), ".jsonl")
    assert load_rows(name)["text"][:] == LINES


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    for name in ("a[1]", "a1"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(f"{name}\n")
    assert load_rows(str(tmp_path / "a[1].txt"))["text"][:] == ["a[1]"]
    with pytest.raises(ValueError, match=r"a\[1\] has one of \* \? \[ in its path, .* expected a folder without"):
        load_rows(str(tmp_path / "a[1]"))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing.jsonl"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist, expected a file, a folder"):
        load_rows(name)


def test_unknown_file_ending_and_missing_split(tmp_path):
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=r"ending '.xyz', expected one of .jsonl"):
        load_rows(str(tmp_path / "a.xyz"))
    file = folder(tmp_path / "set", ".txt", "test")
    with pytest.raises(ValueError, match="no split 'train', expected one of test"):
        load_rows(str(file.parent), "train")
    with pytest.raises(ValueError, match="no split 'train', expected one of test"):
        splits(str(file.parent))


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
def test_validation_by_its_usual_names(tmp_path, name):
    folder(tmp_path / "set", ".txt")
    (tmp_path / "set" / f"{name}.txt").write_text("held out\n")
    found = splits(str(tmp_path / "set"))
    assert list(found) == ["train", "validation"] and len(found["train"]) == 40
    assert list(found["validation"]["text"]) == ["held out"] == list(load_rows(str(tmp_path / "set"), "validation")["text"])


def test_a_missing_validation_split_is_held_out_for_good(tmp_path):
    file = folder(tmp_path / "set", ".txt")
    first, second = splits(str(file)), splits(str(file))
    assert 1 <= len(first["validation"]) <= 5
    assert sorted([*first["train"]["text"], *first["validation"]["text"]]) == sorted(LINES)
    assert list(first["validation"]["text"]) == list(second["validation"]["text"]) != LINES[: len(first["validation"])]
    file.write_text("\n".join(f"line number {i}" for i in range(80)) + "\n")
    held = set(first["validation"]["text"])
    assert {line for line in splits(str(file))["validation"]["text"] if line in LINES} == held, "more rows change nothing for these"


@pytest.mark.parametrize("num_rows", [5, 40])
def test_a_row_that_was_held_out_or_chosen_is_told_by_its_number_in_the_file(tmp_path, num_rows):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"label": f"{i}"}) + "\n" for i in range(num_rows)))
    for data in splits(str(file)).values():
        numbers = [int(label) for label in data["label"]]
        assert [file_row(data, row) for row in range(len(data))] == numbers
        for chosen in ([1, 2, 3], [3, 1], [2], [0, 1], []):
            some = select(data, [row for row in chosen if row < len(data)])
            assert [file_row(some, row) for row in range(len(some))] == [int(label) for label in some["label"]]


def test_errors_name_the_split_that_is_not_the_training_one(tmp_path):
    folder = tmp_path / "rows"  # beside the cache
    folder.mkdir()
    for split, last in (("train", "a"), ("test", "c")):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"label": label}) + "\n" for label in ("a", "b", last)))
    for on_bad_row in ("error", "skip"):
        data = splits(str(folder), on_bad_row=on_bad_row)
        with pytest.raises(BadRow, match=r"set, test: row 2, field 'label': got 'c'"):
            read_labels(data["test"], LabelColumn("label", ("a", "b")), "set")


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
@pytest.mark.parametrize("num_rows", [2, 26, 27, 40, 3000])
def test_a_stream_holds_out_the_same_rows(tmp_path, num_rows, suffix):
    file = tmp_path / f"a{suffix}"
    lines = [f"line number {i}" for i in range(num_rows)]
    if suffix == ".txt":
        file.write_text("\n".join(lines) + "\n")
    else:
        datasets.Dataset.from_dict({"text": lines}).to_parquet(file)
    indexed, streamed = splits(str(file)), splits(str(file), streaming=True)
    for split in ("train", "validation"):
        assert [row["text"] for row in streamed[split]] == list(indexed[split]["text"]) != []
    assert num_rows < 3000 or 0.04 < len(indexed["validation"]) / num_rows < 0.06


@pytest.mark.parametrize("streaming", [False, True])
def test_one_row_is_too_few_to_hold_one_out(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match="a.txt has 1 training rows and no validation split, expected at least 2 rows"):
        splits(str(tmp_path / "a.txt"), streaming=streaming)


def test_holding_out_of_a_stream_decodes_nothing_and_keeps_the_features(tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "set" / "train" / kind).mkdir(parents=True)
        for i in range(60):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "set" / "train" / kind / f"{i:02d}.png")
    indexed, streamed = splits(str(tmp_path / "set")), splits(str(tmp_path / "set"), streaming=True)
    assert features_of(streamed["train"]) == features_of(streamed["validation"]) == features_of(indexed["train"])
    for split in ("train", "validation"):
        assert [row["label"] for row in streamed[split]] == list(indexed[split]["label"])
        assert [row["image"].getpixel((0, 0)) for row in streamed[split]] == [image.getpixel((0, 0)) for image in indexed[split]["image"]]
    assert {row["label"] for row in streamed["validation"]} == {0, 1}, "of sorted classes every one is held out"
    (tmp_path / "set" / "train" / "cat" / "00.png").write_bytes(b"no picture")
    raw = splits(str(tmp_path / "set"), streaming=True)["train"].cast_column("image", datasets.Image(decode=False))
    assert next(iter(raw))["image"]["path"].endswith("00.png")


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_an_empty_file_is_named(tmp_path, suffix, streaming, content):
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / f"train{suffix}"
    file.write_text(content)
    for name in (file, file.parent):
        with pytest.raises(ValueError, match=f"{file} is empty, expected rows"):
            load_rows(str(name), streaming=streaming)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves the metadata open
@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd"])
def test_a_listed_picture_outside_the_folder_is_refused_by_name(tmp_path, name):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for place in ("data/train/a.png", "secret.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    (tmp_path / "data" / "train" / "metadata.csv").write_text(f"file_name,text\na.png,a\n{name},b\n")
    with pytest.raises(BadRow, match=f"{tmp_path}/data: .*'{name}': `file_name` must be a relative path"):
        load_rows(str(tmp_path / "data"))
    gc.collect()  # the warning about an open file comes here, not in a later test


@pytest.mark.parametrize("name", ["d/nope", "nope", "a/b/nope"])
def test_what_is_found_nowhere_is_said_to_be(name):
    with pytest.raises(FileNotFoundError, match=f"{name} is neither a local path nor reachable on the Hub"):
        load_rows(name)


def test_columns_are_guessed_or_listed():
    two = datasets.Dataset.from_dict({"en": ["a"], "de": ["b"], "n": [1]})
    with pytest.raises(ValueError, match=r"several text columns; name one of: en \(string\), de \(string\), n \(int64\)"):
        find_column(two, "text")
    with pytest.raises(ValueError, match=r"no image column; name one of: en"):
        find_column(two, "image")
    with pytest.raises(ValueError, match=r"no column 'fr', expected one of: en"):
        find_column(two, "text", "fr")
    with pytest.raises(ValueError, match="kind must be one of image, text, label"):
        find_column(two, "sound")
    nested = datasets.Dataset.from_dict({"captions": [["a", "b"]], "meta": [{"de": "c"}], "n": [1]})
    told = r"n \(int64\); flatten nested columns first: captions, meta$"
    for name, found in ((None, "found no text column; name one of: "), ("captions", "no plain column 'captions', expected one of: ")):
        with pytest.raises(ValueError, match=f"^{found}{told}"):
            find_column(nested, "text", name)
    with pytest.raises(ValueError, match=f"^no column 'meta.de', expected one of: {told}"):
        find_column(nested, "text", "meta.de")
    with pytest.raises(ValueError, match="name one of: none; flatten nested columns first: captions, meta$"):
        find_column(nested.remove_columns("n"), "text")
    assert find_column(nested, "image", "captions") == "captions", "pixels are lists, too"
    assert find_column(two, "text", "de") == "de" and find_column(two.select_columns(["de", "n"]), "text") == "de"
    assert find_column(datasets.Dataset.from_dict({"note": ["a"], "caption": ["b"]}), "text") == "caption"
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"title": "a", "pixels": Image.new("L", (2, 2))}]))
    assert find_column(stream, "text") == "title" and find_column(stream, "image") == "pixels"
    for kind, name in (("text", "caption"), ("label", "labels")):
        with pytest.raises(ValueError, match=rf"found no {kind} column; name one of: n \(int64\); flatten nested columns first: {name}$"):
            find_column(datasets.Dataset.from_dict({name: [["a", "b"]], "n": [1]}), kind)


def test_classes_of_a_label_column():
    table = datasets.Dataset.from_dict({"name": ["b", "a", "b"], "number": [0, 2, 2], "float": [0.5, 1.0, 2.0]})
    assert find_classes(table, "name") == ("a", "b") and find_classes(table, "number") == (0, 2)
    with pytest.raises(ValueError, match="^data: row 0, field 'float': received 0.5, expected names alone or whole numbers alone$"):
        find_classes(table, "float")
    with pytest.raises(ValueError, match="^data: field 'none': received no value, expected names or whole numbers$"):
        find_classes(datasets.Dataset.from_dict({"none": [None, None]}), "none")
    with pytest.raises(ValueError, match="declares no classes"):
        find_classes(table.to_iterable_dataset(), "name")


def test_whole_numbers_of_a_csv_file_with_empty_cells_are_classes(tmp_path):
    (tmp_path / "some.csv").write_text("text,label\n" + "".join(f"word,{'' if row % 4 == 3 else row % 3}\n" for row in range(40)))
    data = splits(str(tmp_path / "some.csv"))
    told = LabelColumn("label", find_classes(data["train"], "label"), missing=True)
    assert told.names == ("0", "1", "2")
    kept = [row for row in range(40) if row not in data["validation"]._indices.column(0).to_pylist()]
    assert read_labels(data["train"], told).tolist() == [-100 if row % 4 == 3 else row % 3 for row in kept]


def test_stars_and_truth_values_are_classes():
    stars = datasets.Dataset.from_dict({"label": [5, 1, 4, None, 1, 5]})
    told = LabelColumn("label", find_classes(stars, "label"), missing=True)
    assert told.classes == (1, 4, 5) and told.names == ("1", "4", "5")
    assert read_labels(stars, told).tolist() == [2, 0, 1, -100, 0, 2]
    with pytest.raises(BadRow, match="row 0.*got 0, expected one of 1, 4, 5$"):
        read_labels(datasets.Dataset.from_dict({"label": [0, 1]}), told, every_class=False)
    spam = datasets.Dataset.from_dict({"label": [True, False, True]})
    told = LabelColumn("label", find_classes(spam, "label"))
    assert told.names == ("False", "True") and read_labels(spam, told).tolist() == [1, 0, 1]
    with pytest.raises(BadRow, match="got 5, expected one of False, True$"):
        read_labels(stars, told, every_class=False)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (70000, "the number of a class, 0 or more and below 65536"),
        (-1, "the number of a class, 0 or more and below 65536"),
        (0.5, "names alone or whole numbers alone"),
    ],
)
def test_a_wrong_label_is_named_by_its_row_of_the_file(label, expected, tmp_path):
    (tmp_path / "some.csv").write_text("text,label\n" + "".join(f"word,{label if row == 90 else row % 3}\n" for row in range(100)))
    train = splits(str(tmp_path / "some.csv"))["train"]
    assert len(train) < 100, "rows before it are held out"
    with pytest.raises(ValueError, match=f"^some.csv: row 90, field 'label': received {label}, expected {expected}$"):
        find_classes(train, "label", "some.csv")


def configurations(folder):
    """A folder of two configurations."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.txt").write_text("".join(f"{name} {row}\n" for row in range(40)))
    card = "---\nconfigs:\n- config_name: a\n  data_files: a/rows.txt\n- config_name: b\n  data_files: b/rows.txt\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def test_one_of_several_configurations(tmp_path):
    folder = configurations(tmp_path / "data")
    for streaming in (False, True):
        rows = list(splits(f"{folder}:b", streaming=streaming)["train"])
        assert len(rows) > 30 and {row["text"][0] for row in rows} == {"b"}
        with pytest.raises(ValueError, match="data has the configurations 'a', 'b', expected one of them behind it, .*data:NAME$"):
            splits(str(folder), streaming=streaming)
    before = content_fingerprint(f"{folder}:b")
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert content_fingerprint(f"{copied}:b") == before != content_fingerprint(f"{copied}:a")
    (folder / "b" / "rows.txt").write_text("c\n" * 40)
    assert content_fingerprint(f"{folder}:b") != before
    with pytest.raises(ValueError, match=r"'c' not found. Available: \['a', 'b'\]"):
        splits(f"{folder}:c")
    with pytest.raises(FileNotFoundError, match="rows.txt:b"):
        splits(f"{folder / 'a' / 'rows.txt'}:b")


FROM_THE_HUB = """
import os, sys
from localhub import LocalHub
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_local_alice", "HF_HOME": sys.argv[1], "HF_HUB_OFFLINE": "0"}
with LocalHub() as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from huggingface_hub import HfApi
    from mmvae.data import splits
    HfApi().create_repo("alice/two", repo_type="dataset")
    HfApi().upload_folder(repo_id="alice/two", repo_type="dataset", folder_path=sys.argv[2])
    for streaming in (False, True):
        print(next(iter(splits("alice/two:b", streaming=streaming)["train"])))
    try:
        splits("alice/two")
    except ValueError as error:
        print(error)
"""


def test_one_of_several_configurations_of_the_hub(tmp_path):
    script = [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "home"), str(configurations(tmp_path / "data"))]
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    told = "alice/two has the configurations 'a', 'b', expected one of them behind it, alice/two:NAME"
    assert done.stdout.splitlines() == ["{'text': 'b 0'}", "{'text': 'b 0'}", told], done.stderr


def test_sprites_by_name():
    rows = load_rows("sprites:5", "validation", num_rows=4, image_size=32)
    assert len(rows) == 4 and rows["image"].shape == (4, 32, 32, 3) and " on " in rows["caption"][0]
    assert {split: len(part) for split, part in splits("sprites").items()} == {
        "train": 10_000,
        "validation": 1_000,
        "test": 1_000,
    }
    assert find_column(rows, "text") == "caption" and find_column(rows, "image") == "image"
    few = splits("sprites:5:30")
    assert {split: len(part) for split, part in few.items()} == {"train": 30, "validation": 1_000, "test": 1_000}
    assert few["train"][29]["caption"] == load_rows("sprites:5")[29]["caption"]  # the first rows are the same
    for bad in ("sprites:9", "sprites:x", "sprites:3:x", "sprites:3:0", "sprites:3:30:1"):
        with pytest.raises(ValueError, match="level|num_rows|expected a caption"):
            load_rows(bad)


@needs_real_data
@pytest.mark.parametrize(
    ("name", "sizes", "kinds"),
    [
        ("ptb", (42_068, 3_370, 3_761), {"text": "text"}),
        ("mnist", (56_987, 3_013, 10_000), {"image": "image", "label": "label"}),
        ("eurosat", (1_895, 105, 500), {"image": "image", "label": "label"}),
        ("emoji", (2_741, 316, 326), {"image": "image", "text": "text"}),
        ("trec", (5_178, 274, 500), {"text": "text", "label": "label"}),
        ("bbc_news", (1_556, 334, 335), {"text": "text", "label": "label"}),
    ],
)
def test_real_sets(name, sizes, kinds):
    found = splits(str(Path(REAL) / name))
    assert tuple(len(part) for part in found.values()) == sizes
    assert {kind: find_column(found["train"], kind) for kind in kinds} == kinds
