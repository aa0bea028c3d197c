"""From documents to counts of words: scikit-learn's ``CountVectorizer`` as a processor that a model folder keeps as JSON.

A document is split into words as the options say; those of the vocabulary, which was made of the training documents, are counted.
Shapes: ``B`` documents, ``V`` words of the vocabulary.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from mmvae.folder import naming
from mmvae.models.inherited import nearest

__all__ = ["TopicVAEVectorizer"]

# Of CountVectorizer; those that are left out are functions or change what is counted.
_OPTIONS = ("strip_accents", "lowercase", "stop_words", "token_pattern", "ngram_range", "max_df", "min_df", "max_features")


class TopicVAEVectorizer(FeatureExtractionMixin):
    """Documents to ``word_counts``. ``AutoProcessor`` reads it from a model's folder, where it is JSON: options and vocabulary.

    Arguments:
        vocabulary: the V words in the order of the counts.
        options: of scikit-learn's ``CountVectorizer``, by which documents are split: ``lowercase``, ``strip_accents``, ``token_pattern``,
            ``ngram_range``, ``stop_words``; those by which :meth:`fit` chose the vocabulary are kept for the record.

    Returns:
        When called with a document or a list of them: a ``BatchFeature`` with ``word_counts``, (B, V) float32.

    Raises:
        ValueError: for a vocabulary of fewer than two words or with a word twice, an unknown option, or one that cannot be.
        TypeError: for a document that is no text.

    Example:
        >>> vectorizer = TopicVAEVectorizer.fit(["The goal of the game", "a game, a vote"], stop_words="english")
        >>> vectorizer.vocabulary, vectorizer("Game after game")["word_counts"].tolist()
        (['game', 'goal', 'vote'], [[2.0, 0.0, 0.0]])
        >>> vectorizer.words(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
        ['vote game', '']
    """

    model_input_names = ["word_counts"]

    def __init__(self, vocabulary: Sequence[str], options: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vocabulary, self.options = list(vocabulary), dict(options or {})
        for name in self.options.keys() - set(_OPTIONS):
            raise ValueError(f"options: unknown option {name!r} = {self.options[name]!r}; the nearest one is {nearest(name, _OPTIONS)!r}")
        ngrams, pattern = self.options.get("ngram_range", (1, 1)), self.options.get("token_pattern", "")
        if not isinstance(ngrams, Sequence) or len(ngrams) != 2 or not all(isinstance(n, int) for n in ngrams):
            raise ValueError(f"options: ngram_range: received {ngrams!r}, expected two whole numbers, such as [1, 2]")
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"options: token_pattern: received {pattern!r}, expected a regular expression ({error})") from None
        if len(set(self.vocabulary)) < max(2, len(self.vocabulary)):
            received = f"{len(self.vocabulary)} words, {len(set(self.vocabulary))} of them different"
            raise ValueError(f"vocabulary: received {received}, expected at least 2, and each once")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A vectorizer from a folder or from the Hub; an error in its file names the file."""
        with naming(pretrained_model_name_or_path, kwargs.get("subfolder"), "preprocessor_config.json"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def fit(cls, texts: Iterable[str], **options: Any) -> "TopicVAEVectorizer":
        """A vectorizer whose vocabulary is the words of some documents, in alphabetical order.

        Arguments:
            texts: the training documents.
            options: of ``CountVectorizer``: also ``stop_words`` ("english" or a list), and the limits of the vocabulary ``min_df`` and
                ``max_df``, numbers of documents or shares of them, and ``max_features``, the most words, the most frequent ones.

        Raises:
            ValueError: for an option that there is not or a value that it cannot have, and where fewer than two words are left.
        """
        cls(("two", "words"), options)  # refuses unknown options
        vectorizer = _vectorizer(options)
        try:
            vocabulary = vectorizer.fit(texts).get_feature_names_out().tolist()
        except ValueError as error:
            from mmvae.data.lines import BadRow

            if isinstance(error, BadRow):
                raise
            raise ValueError(f"texts: no vocabulary with the options {options}: {error}") from None
        if len(vocabulary) < 2:
            raise ValueError(f"texts: {vocabulary} is left by the options {options}, expected at least 2 words")
        return cls(vocabulary, options)

    def counts(self, texts: Sequence[str]) -> Any:
        """The same as a sparse matrix: (B, V) int64, of ``scipy.sparse``, by rows, words in ascending order."""
        counted = _vectorizer(self.options, {word: number for number, word in enumerate(self.vocabulary)}).transform(texts)
        counted.sort_indices()
        return counted

    def words(self, counts: Tensor, top_k: int = 10) -> list[str]:
        """The most frequent words of each document, from counts or probabilities (B, V), as a line of text; none of what is 0."""
        values, numbers = counts.topk(min(top_k, len(self.vocabulary)))
        documents = zip(values.tolist(), numbers.tolist(), strict=True)
        return [" ".join(self.vocabulary[n] for value, n in zip(*document, strict=True) if value > 0) for document in documents]

    def __call__(self, text: str | Sequence[str], return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Counts of a document, or of each of a list; see the class."""
        texts = [text] if isinstance(text, str) else list(text)
        for row, value in enumerate(texts):
            if not isinstance(value, str):
                raise TypeError(f"text[{row}]: got {type(value).__name__}, expected str")
        if not texts:
            raise ValueError("text: got an empty list, expected at least one document")
        return BatchFeature({"word_counts": torch.from_numpy(self.counts(texts).toarray()).float()}, tensor_type=return_tensors)


def _vectorizer(options: Mapping[str, Any], vocabulary: Mapping[str, int] | None = None) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    pairs = {"ngram_range": tuple(options["ngram_range"])} if "ngram_range" in options else {}  # JSON knows lists alone
    return CountVectorizer(**{**options, **pairs}, vocabulary=vocabulary)
