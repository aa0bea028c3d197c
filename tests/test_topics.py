"""Coherence and diversity by hand, LDA beside it, and the recipe of topics as a user runs it."""

import itertools
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from recipe_runs import run
from scipy.sparse import csr_matrix
from transformers import AutoModel, AutoProcessor

from mmvae.data import BadRow
from mmvae.metrics import npmi, relevant_words, topic_diversity
from mmvae.topics import coherence, lda_quality, topic_quality

SUBJECTS = {"sport": ["goal", "match", "coach", "cup"], "money": ["bank", "share", "profit", "price"]}
TINY = ["--batch_size", "8", "--num_epochs", "2", "--log_every", "1", "--save_every", "2", "--importance_samples", "3", "--latent_dim", "3"]
TINY += ["--hidden_size", "8", "--vectorizer", '{"stop_words": "english"}', "--mixed_precision", "no", "--warmup_steps", "2"]


@pytest.fixture(scope="module")
def news(tmp_path_factory) -> str:
    """Two sections; the fourth training text has no word."""
    folder, rng = tmp_path_factory.mktemp("news"), random.Random(0)
    for split, count in (("train", 33), ("validation", 8), ("test", 6)):
        labels = [("sport", "money")[i % 2] for i in range(count)]
        rows = [{"text": " ".join(rng.choices(SUBJECTS[label], k=9)) + " of the", "label": label} for label in labels]
        rows[3]["text"] = "of the"
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_npmi_by_hand():
    documents = np.array([[1, 1, 0, 3], [2, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
    p = (documents > 0).mean(0)
    values = []
    for i, j in itertools.combinations([0, 1, 3], 2):
        both = ((documents[:, i] > 0) & (documents[:, j] > 0)).mean()
        values.append(math.log(both / (p[i] * p[j])) / -math.log(both))
    received = coherence(torch.tensor([[3, 0, 1], [0, 0, 2]]), csr_matrix(documents))
    assert received[0].item() == pytest.approx(np.mean(values))
    assert coherence(torch.tensor([[0, 2]]), csr_matrix(documents)).tolist() == [-1]  # never together


def test_npmi_at_its_limits():
    def of(single: int, other: int, both: int) -> float:
        return npmi(torch.tensor([[single, both], [both, other]]), 100).item()

    assert of(20, 20, 20) == pytest.approx(1) and of(100, 100, 100) == 1
    assert of(20, 50, 10) == pytest.approx(0, abs=1e-12)
    assert of(20, 20, 0) == of(0, 20, 0) == -1


def test_relevance_goes_from_frequent_words_to_those_of_one_topic():
    log_probs = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.05, 0.15]]).log()
    background = torch.tensor([0.7, 0.18, 0.12]).log()
    assert relevant_words(log_probs, background, 2, 1.0).tolist() == [[0, 1], [0, 2]]
    assert relevant_words(log_probs, background, 1, 0.0).tolist() == [[1], [2]]
    assert topic_diversity(torch.tensor([[0, 1, 2], [2, 1, 5]])) == pytest.approx(4 / 6)


def test_lda_finds_the_subjects():
    rng = np.random.default_rng(0)
    p = np.repeat(np.eye(2), 12, 1) + 0.02
    counts = csr_matrix(np.stack([rng.multinomial(30, p[i % 2] / p[i % 2].sum()) for i in range(60)]))
    figures = lda_quality(counts, 2)
    true = topic_quality(torch.from_numpy(p).log(), torch.zeros(24), counts)
    assert figures["lda_likeliest_topic_diversity_10"] == true["likeliest_topic_diversity_10"] == 1
    assert figures["lda_topic_diversity"] == 0.5  # of all 24 words
    assert figures["lda_npmi"] > 0.1 and true["npmi"] > 0.1


def test_a_run_gives_topics_and_their_figures_beside_those_of_lda(news, tmp_path, caplog):
    run("topic_vae", ["--dataset", news, "--output_dir", str(tmp_path), "--compare_lda", "true", *TINY])
    assert f"{news}: 1 of 33 rows have no word of the vocabulary in field 'text', and stay: rows 3" in caplog.text
    figures = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    for name in ("npmi", "topic_diversity", "likeliest_npmi", "lda_npmi", "lda_likeliest_topic_diversity_10"):
        assert -1 <= figures[name] <= 1
    assert figures["tokens"] == pytest.approx(5 * 9 / 6)  # words per document of the test rows, of which one has none
    assert figures["perplexity"] < 20
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert sorted(word for words in model.topics(top_k=8) for word in words) == sorted(3 * [*SUBJECTS["sport"], *SUBJECTS["money"]])
    assert model.document_topics(**processor("goal and cup")).shape == (1, 3)
    card = (tmp_path / "README.md").read_text()
    assert "figures/topics.png" in card and "## Topics" in card and "model.topics(top_k=10)" in card
    assert (tmp_path / "figures" / "topics.png").stat().st_size > 1000
    argv = ["--vae", str(tmp_path), "--head_only", "true", "--dataset", news, "--output_dir", str(tmp_path / "head")]
    run("classification", [*argv, "--batch_size", "8", "--num_epochs", "2", "--warmup_steps", "2", "--mixed_precision", "no"])
    assert 0 <= json.loads((tmp_path / "head" / "metrics.json").read_text())["metrics"]["accuracy"] <= 1
    run(
        "evaluate",
        ["--model", tmp_path, "--dataset", news, "--label", "label", "--importance_samples", "3", "--output", tmp_path / "e.json"],
    )
    again = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert again["nll_nats"] == pytest.approx(figures["nll_nats"], rel=1e-5) and 0 <= again["probe/topic"] <= 1


def test_a_row_that_is_no_text_is_named_or_skipped(news, tmp_path):
    shutil.copytree(news, tmp_path / "data")
    for split in ("train", "validation"):
        lines = (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines()
        lines[5] = json.dumps({"text": None, "label": "sport"})
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), *TINY]
    with pytest.raises(BadRow, match=r"data: row 5, field 'text': got an empty cell, expected text"):
        run("topic_vae", [*options, "--on_bad_row", "error"])
    run("topic_vae", options)
    assert "npmi" in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--streaming", "true"], "streaming: received True, expected False"),
        (["--vectorizer", '{"min_df": 40}'], "texts: no vocabulary with the options {'min_df': 40}"),
        (["--vectorizer", "english"], "vectorizer: received 'english', expected a mapping"),
        (["--text_column", "words"], "no column 'words'"),
    ],
)
def test_wrong_options_are_named(news, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run("topic_vae", ["--dataset", news, "--output_dir", str(tmp_path), *TINY, *options])
