"""What training rows tell beside the figures of a model: what the nearest text says, what a linear classifier reads in the latent.

    probe:     argmax softmax(W E[z|x] + b), fitted to the posterior means of the training rows
    retrieval: the other half of the training row whose text has the largest cosine of TF-IDF vectors

Figures are called ``probe/<modality>``, ``probe/all`` and ``<from>_to_<to>/tfidf_<score>``. Every rank fits the same to the same rows, so
they depend neither on batch size nor on the number of ranks.
Shapes: ``N`` rows, ``D`` shared latent.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmvae.classifiers import labelled_coherence
from mmvae.coherence import chunks
from mmvae.data import Rows, TextColumn, find_column
from mmvae.data.labels import whole
from mmvae.data.places import place
from mmvae.data.selection import select
from mmvae.metrics import text_scores
from mmvae.models.base import VAE
from mmvae.models.mmvae import MMVAE

logger = logging.getLogger(__name__)

_MOST_SCORES = 1 << 23  # cosines held at once


# ---- the latent


@torch.no_grad()
def posterior_means(accelerator: Accelerator, model: VAE, rows: Rows) -> dict[str, tuple[Tensor, Tensor]]:
    """E[z|x], of a joint model that of the shared latent, where all modalities that a row has are visible, and where one of them is.

    Arguments:
        accelerator: its ranks share the rows, and all get the means.
        model: in evaluation mode, not wrapped.
        rows: with the columns of all modalities.

    Returns:
        By modality, and of a joint model for "all", the numbers (N,) int64 of the rows that have it, ascending, and the means (N, D)
        float32.
    """
    parts = []
    for n, numbers, inputs in chunks(accelerator, model, rows):
        means = {}
        for name, seen in _views(model, inputs).items():
            mean = model.posterior(**seen).mixture.mean.flatten(1).float().cpu()
            keep = seen["visible"].any(1).cpu() if "visible" in seen else torch.ones(len(mean), dtype=torch.bool)
            means[name] = numbers[keep], mean[keep]
        parts.append((n, means))
    parts = [means for _, means in sorted(gather_object(parts), key=lambda part: part[0])]
    return {name: tuple(torch.cat(x) for x in zip(*(means[name] for means in parts), strict=True)) for name in parts[0]}


def _views(model: VAE, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What a model infers its latent from: what a row has, and of a joint model also each modality alone."""
    if not isinstance(model, MMVAE):
        return {model.input_modalities[0]: inputs}
    chosen = torch.eye(len(model.modalities), dtype=torch.bool, device=inputs["present"].device)
    visible = {name: inputs["present"] & subset for name, subset in zip(model.modalities, chosen, strict=True)}
    return {name: inputs | {"present": each, "visible": each} for name, each in ({"all": inputs["present"]} | visible).items()}


def linear_probe(
    accelerator: Accelerator, model: VAE, rows: Rows, labels: Sequence[Any], known: Rows, known_labels: Sequence[Any]
) -> dict[str, float]:
    """How often a linear classifier tells the class of a row from its posterior's mean.

    Arguments:
        accelerator, model, rows: as for :func:`posterior_means`.
        labels: the class of every row of the data set, by its number.
        known, known_labels: of the training rows.

    Returns:
        ``probe/<modality>``, and of a joint model ``probe/all``, accuracies in [0, 1] among the rows that have the modality, where training
        rows have it too; a class that no training row has is never told. ``probe/majority``: the share of the most frequent training class.

    Raises:
        ValueError: for a model without a latent.
    """
    _check_latent(model)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(known_labels))}
    truths, known_truths = (torch.tensor([numbers.get(label, -1) for label in each]) for each in (labels, known_labels))
    figures, learned = {}, posterior_means(accelerator, model, known)
    for name, (row, mean) in posterior_means(accelerator, model, rows).items():
        known_row, known_mean = learned[name]
        if len(row) and len(known_row):
            told = _fitted(known_mean, known_truths[known_row])(mean)
            figures[f"probe/{name}"] = (told == truths[row]).double().mean().item()
    most = known_truths[known.numbers].bincount().argmax()
    return figures | {"probe/majority": (truths[rows.numbers] == most).double().mean().item()}


def _fitted(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features; of one class there is nothing to learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if (y == y[0]).all():
        return lambda x: y[0].expand(len(x))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x.double().numpy(), y.numpy())
    return lambda x: torch.from_numpy(classifier.predict(x.double().numpy()))


# ---- texts


def nearest_texts(texts: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """For each text the number of the candidate with the largest cosine of TF-IDF vectors, the first of equal ones.

    The vectors are scikit-learn's, of words and signs in lower case, with logarithmic counts and weights learned from the candidates.

    Arguments:
        texts: N of them; one without a word of the candidates gets the first.
        candidates: at least one that is not blank.

    Returns:
        (N,) int64.

    Example:
        >>> nearest_texts(["A red house.", "two dogs"], ["a dog", "a house , red", "Two dogs run", "two dogs run"]).tolist()
        [1, 2]
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")  # the default leaves one-letter words out
    columns = vectorizer.fit_transform(candidates).T.tocsr()
    rows = vectorizer.transform(texts)
    size = max(1, _MOST_SCORES // len(candidates))
    return np.concatenate([(rows[n : n + size] @ columns).toarray().argmax(1) for n in range(0, len(texts), size)])


def text_retrieval(rows: Rows, data: Any, known: Any, *, num_rows: int | None = None) -> dict[str, float]:
    """Texts answered by the other half of the nearest training text, scored as :func:`mmvae.coherence.text_coherence` scores a model's.

    Arguments:
        rows: with the columns of all modalities.
        data: what ``rows`` are of.
        known: training rows, with the same columns.
        num_rows: only the first rows; all when None.

    Returns:
        For every two texts, both ways, ``<from>_to_<to>/tfidf_bleu``, ``/tfidf_chrf`` and ``/tfidf_exact_match`` of the rows with both.
    """
    figures, columns = {}, [column for column in rows.columns if isinstance(column, TextColumn)]
    chosen = data.select(rows.numbers[:num_rows].tolist())
    for source, target in permutations(columns, 2):
        (asked, truths), (sources, answers) = (_pairs(part, source.name, target.name) for part in (chosen, known))
        if asked and sources:
            found = [answers[i] for i in nearest_texts(asked, sources)]
            scores = text_scores(found, truths)
            figures |= {f"{source.modality}_to_{target.modality}/tfidf_{name}": value for name, value in scores.items()}
    return figures


def _pairs(data: Any, first: str, second: str) -> tuple[list[str], list[str]]:
    """Two columns of the rows that have both."""
    both = [(a, b) for a, b in zip(data[first][:], data[second][:], strict=True) if a is not None and b is not None]
    return [a for a, _ in both], [b for _, b in both]


# ---- all of them


def evaluate_by_training_rows(
    accelerator: Accelerator,
    model: VAE,
    processor: Any,
    rows: Rows,
    data: Any,
    training_rows: Callable[[], Any],
    label: str | None = None,
    *,
    num_generated: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """All figures for which training rows are read: of texts made from texts what retrieval gets, of labelled data the probe and coherence.
    A model of one modality has the probe alone.

    Arguments:
        accelerator, model, rows, num_generated, seed: as for :func:`mmvae.coherence.class_coherence`; with ``num_generated`` 0 there is the
            probe alone.
        processor: the model's; of a joint one it is used.
        data: what ``rows`` are of.
        training_rows: gives them, and is only called where they are needed.
        label: column of names or whole numbers, of both; rows that lack it are left out. None: there are no classes.

    Returns:
        Figures of :func:`text_retrieval`, :func:`linear_probe` and :func:`mmvae.classifiers.labelled_coherence`.

    Raises:
        ValueError: for a label of another kind, and what ``training_rows`` raises; without ``label`` that is a warning, and nothing is
            compared.
    """
    several_texts = num_generated and sum(isinstance(column, TextColumn) for column in rows.columns) > 1
    if not label and not several_texts:
        return {}
    try:
        known = training_rows()
    except ValueError as error:
        if label:
            raise
        logger.warning("no TF-IDF figures: %s", error)
        return {}
    figures = text_retrieval(rows, data, known, num_rows=num_generated) if several_texts else {}
    if not label:
        return figures
    known, labelled = (_with_label(part, label, rows.name) for part in (known, data))
    rows = rows if labelled is data else Rows(labelled, rows.columns, name=rows.name, on_bad_row=rows.on_bad_row)
    known_rows = Rows(known, rows.columns, name=f"{rows.name}, training rows", on_bad_row=rows.on_bad_row)
    figures |= linear_probe(accelerator, model, rows, labelled[label][:], known_rows, known[label][:])
    if num_generated and isinstance(model, MMVAE):
        options = {"num_generated": num_generated, "seed": seed}
        figures |= labelled_coherence(accelerator, model, processor, rows, labelled, known, label, **options)
    return figures


def check_label(model: VAE, label: str, *parts: Any, name: str = "data") -> None:
    """Refuse, before any work, what :func:`evaluate_by_training_rows` would.

    Arguments:
        model: to be probed.
        label: the column.
        parts: the rows that are read for it.
        name: what the data set is called in errors.

    Raises:
        ValueError: for a model without a latent, rows without that column, and labels that are no name, whole number or truth value.
    """
    _check_latent(model)
    for rows in parts:
        _with_label(rows, find_column(rows, "label", label), name)


def _check_latent(model: VAE) -> None:
    if not model.config.latent_dim:
        raise ValueError("label: received a model with latent_dim 0, a language model, expected one with a latent to read classes from")


def _with_label(data: Any, label: str, name: str) -> Any:
    """The rows that have a label: the same object where none lacks it."""
    values = [whole(value) for value in data[label][:]]
    for row, value in enumerate(values):
        if value is not None and type(value) not in (str, int, bool):
            received = f"{place(data, name, row)}, field {label!r}: received {value!r:.80}"
            raise ValueError(f"{received}, expected a name, a whole number or a truth value")
    return select(data, [i for i, value in enumerate(values) if value is not None]) if None in values else data
