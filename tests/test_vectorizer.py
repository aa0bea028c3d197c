"""Words to counts: what scikit-learn counts, kept as JSON, and the column that reads documents by it."""

import json
import logging
import re

import datasets
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from transformers import AutoProcessor

from mmvae import TopicVAEConfig, TopicVAEVectorizer
from mmvae.data import BadRow, Loader, Rows, WordCountColumn

TEXTS = ["The goal of the Game", "a game, a vote; game after game", "of the", "vote goal vote", "nothing that is known"]


def test_counts_are_those_of_scikit_learn():
    for options in ({}, {"stop_words": "english"}, {"ngram_range": (1, 2), "lowercase": False}, {"max_features": 3}, {"min_df": 2}):
        theirs = CountVectorizer(**options)
        expected = theirs.fit_transform(TEXTS).toarray()
        vectorizer = TopicVAEVectorizer.fit(iter(TEXTS), **options)
        assert vectorizer.vocabulary == theirs.get_feature_names_out().tolist()
        assert vectorizer(TEXTS)["word_counts"].tolist() == expected.tolist()


def test_a_folder_holds_it_as_json_and_auto_processor_reads_it(tmp_path):
    options = {"stop_words": ["the", "of"], "ngram_range": (1, 2), "max_df": 0.9}
    vectorizer = TopicVAEVectorizer.fit(TEXTS, **options)
    vectorizer.save_pretrained(tmp_path)
    TopicVAEConfig(vocabulary=vectorizer.vocabulary).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "preprocessor_config.json"]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["vocabulary"] == vectorizer.vocabulary
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is TopicVAEVectorizer
    assert torch.equal(again(TEXTS)["word_counts"], vectorizer(TEXTS)["word_counts"])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["the", "of"], {"stop_words": "english"}, "texts: no vocabulary with the options {'stop_words': 'english'}: empty vocabulary"),
        ([], {}, "texts: no vocabulary with the options {}"),
        (["goal goal"], {}, "texts: ['goal'] is left by the options {}, expected at least 2 words"),
        (TEXTS, {"min_df": 9}, "texts: no vocabulary with the options {'min_df': 9}"),
        (TEXTS, {"max_df": "many"}, "The 'max_df' parameter"),
        (TEXTS, {"stopwords": "english"}, "unknown option 'stopwords' = 'english'; the nearest one is 'stop_words'"),
        (TEXTS, {"tokenizer": str.split}, "unknown option 'tokenizer'"),
        (TEXTS, {"ngram_range": 2}, "options: ngram_range: received 2, expected two whole numbers, such as [1, 2]"),
        (TEXTS, {"ngram_range": ["1", "2"]}, "options: ngram_range: received ['1', '2'], expected two whole numbers"),
        (TEXTS, {"token_pattern": "(a"}, "options: token_pattern: received '(a', expected a regular expression (missing )"),
    ],
)
def test_vocabularies_that_cannot_be_are_named(texts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TopicVAEVectorizer.fit(texts, **options)


def test_what_is_no_document_is_named():
    vectorizer = TopicVAEVectorizer(["goal", "vote"])
    with pytest.raises(TypeError, match=r"text\[1\]: got NoneType, expected str"):
        vectorizer(["goal", None])
    with pytest.raises(ValueError, match="text: got an empty list"):
        vectorizer([])
    with pytest.raises(ValueError, match="vocabulary: received 1 words, 1 of them different, expected at least 2"):
        TopicVAEVectorizer(["goal"])


def test_rows_are_counted_and_empty_ones_stay_and_are_named(caplog):
    vectorizer = TopicVAEVectorizer(["game", "goal", "vote"])
    data = datasets.Dataset.from_dict({"text": TEXTS}).select([0, 4, 2, 1])  # named as in the file, before a selection
    with caplog.at_level(logging.WARNING):
        rows = Rows(data, WordCountColumn("text", vectorizer), name="news")
    assert "news: 2 of 4 rows have no word of the vocabulary in field 'text', and stay: rows 4, 2" in caplog.text
    assert rows.num_rows == 4
    batches = list(Loader(rows, 3, shuffle=False).batches(0))
    assert [batch["row"].tolist() for batch in batches] == [[0, 1, 2], [3]]  # not sorted by length
    assert torch.cat([batch["word_counts"] for batch in batches]).tolist() == vectorizer(data["text"][:])["word_counts"].tolist()


def test_a_row_that_is_no_text_is_named():
    data = datasets.Dataset.from_dict({"text": ["goal", None]})
    with pytest.raises(BadRow, match="row 1, field 'text': got an empty cell, expected a value"):
        Rows(data, WordCountColumn("text", TopicVAEVectorizer(["game", "goal"])), name="news")
