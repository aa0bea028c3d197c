r"""Figures of merit. Sums are in nats per row; conversions say so in their names.

Shapes: ``N`` rows or candidates, ``B`` queries, ``D`` latent.

References:
    Burda et al. (2016), active units, https://arxiv.org/abs/1509.00519
    Bouma (2009), normalized pointwise mutual information; Lau et al. (2014), of topics, https://aclanthology.org/E14-1056
    Sievert, Shirley (2014), relevance of words to topics, https://aclanthology.org/W14-3110
    Dieng et al. (2020), topic diversity, https://arxiv.org/abs/1907.04907
    Dieng et al. (2019) and Li et al. (2019), mutual information with the aggregated posterior, https://arxiv.org/abs/1909.00868
"""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmvae.distributions import DiagNormal


def active_units(mean: Tensor, threshold: float = 0.01) -> int:
    r"""Number of latent dimensions with :math:`\mathrm{Var}_x(\mathbb E_q[z_d]) \ge` ``threshold`` (the variance over N - 1).

    Arguments:
        mean: (N, *event) posterior means, N >= 2.
        threshold: in squared units of the latent.
    """
    return int((mean.flatten(1).double().var(0) >= threshold).sum())


def mutual_information(q: DiagNormal, z: Tensor | None = None, chunk_size: int | None = None) -> float:
    r"""I(x; z) under q in nats, by Li et al.'s estimator over all N rows given (at most ln N):

    .. math:: \frac1N \sum_i \Big[\log q(z_i|x_i) - \log \frac1N \sum_j q(z_i|x_j)\Big], \quad z_i \sim q(z|x_i)

    Arguments:
        q: batch (N,). Of a mixture there is no such estimate here: a normal of its mean and variance gives that normal's.
        z: (N, *event) one sample of each row; drawn when None.
        chunk_size: rows compared with all others at once; when None at most 256, and no more than 256 MiB hold.
    """
    q = DiagNormal(q.loc.flatten(1), q.logvar.flatten(1))
    chunk_size = max(1, min(256, (1 << 26) // q.loc.numel())) if chunk_size is None else chunk_size
    z = (q.rsample() if z is None else z.flatten(1)).detach()
    total = 0.0
    for part in z.split(chunk_size):
        total += q.log_prob(part.unsqueeze(1)).logsumexp(1).double().sum().item()
    return q.log_prob(z).double().mean().item() - total / len(z) + math.log(len(z))


def bits_per_dim(nll_nats: float, dims: int) -> float:
    """Negative log-likelihood per row in bits per pixel value; only true for a discretized likelihood of 8-bit images."""
    return nll_nats / (dims * math.log(2))


def perplexity(nll_nats: float, tokens: float) -> float:
    """``exp(nll / tokens)``: both are means per row, or both totals; EOS is a token, BOS and padding are not."""
    nats = nll_nats / tokens
    return math.inf if nats > 700 else math.exp(nats)  # math.exp raises on overflow


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB (torchmetrics). Both (B, C, H, W) in [0, 1]. Returns (B,)."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(pixels.float(), reference.float(), data_range=1.0, reduction="none", dim=(1, 2, 3))


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (torchmetrics). Both (B, C, H, W) in [0, 1]. Returns (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(pixels.float(), reference.float(), data_range=1.0, reduction="none")
    return torch.as_tensor(value).reshape(len(pixels))


def overlaps(predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    r"""How many pixels of a mask have a class in both, and in either: sums over rows give :math:`\mathrm{IoU}_c = \sum I_c / \sum U_c`.

    Arguments:
        predicted: (B, *) whole numbers below ``num_classes``.
        labels: (B, *) whole numbers; pixels of any other class than those below ``num_classes`` are left out.
        num_classes: N.

    Returns:
        Intersection and union, (B, N) float64 each.
    """
    predicted, labels = predicted.flatten(1).unsqueeze(-1), labels.flatten(1).unsqueeze(-1)
    classes = torch.arange(num_classes, device=labels.device)
    known = (labels >= 0) & (labels < num_classes)
    found, true = (predicted == classes) & known, labels == classes
    return (found & true).sum(1).double(), (found | true).sum(1).double()


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    r"""How good class probabilities are (torchmetrics).

    Arguments:
        logits: (B, N), N >= 2.
        labels: (B,) int64, numbers of classes; rows of -100 are left out.

    Returns:
        ``accuracy`` and ``error``, 1 - accuracy; ``macro_f1``, the mean over the classes that there are or that were told;
        ``calibration_error``, :math:`\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|` over 15 bins of confidence;
        ``cross_entropy_nats`` per row, -log p(y|x).

    Raises:
        ValueError: there is no row with a label.

    References:
        Guo et al. (2017), On calibration of modern neural networks, https://arxiv.org/abs/1706.04599
    """
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

    logits, labels = logits[labels != -100].float(), labels[labels != -100]
    if not len(labels):
        raise ValueError("labels: received none but -100, expected at least one row with a label")
    told, classes = logits.argmax(1), logits.shape[1]
    accuracy = (told == labels).double().mean().item()
    return {
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "macro_f1": multiclass_f1_score(told, labels, classes, average="macro").item(),
        "calibration_error": multiclass_calibration_error(logits.softmax(1), labels, classes, n_bins=15, norm="l1").item(),
        "cross_entropy_nats": torch.nn.functional.cross_entropy(logits.double(), labels).item(),
    }


def confusion(told: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many rows of each class were told to be of each: (N, N) int64, a row for every true class.

    Arguments:
        told, labels: (B,) int64; rows of label -100 are left out.
        num_classes: N.
    """
    known = labels != -100
    return (labels[known] * num_classes + told[known]).bincount(minlength=num_classes**2).view(num_classes, num_classes)


def per_class(counts: Tensor) -> dict[str, list[float]]:
    r"""Figures of every class from :func:`confusion`, 0 where there is nothing to divide by.

    Arguments:
        counts: (N, N).

    Returns:
        ``rows``, ``precision``, ``recall`` and ``f1`` :math:`= 2 n_{ii} / (\sum_j n_{ij} + \sum_j n_{ji})`, N each.

    Example:
        >>> per_class(torch.tensor([[3, 1], [0, 4]]))["precision"]
        [1.0, 0.8]
    """
    right, true, told = counts.diagonal().double(), counts.sum(1), counts.sum(0)
    shares = {"precision": right / told.clamp_min(1), "recall": right / true.clamp_min(1), "f1": 2 * right / (true + told).clamp_min(1)}
    return {"rows": true.tolist()} | {name: value.tolist() for name, value in shares.items()}


def recall_at(scores: Tensor, k: int, target: Tensor | None = None) -> Tensor:
    r"""Whether the candidate that belongs to a query is among the k best, where ties are broken at random:

    .. math:: \min(1, \max(0, (k - g) / t)), \quad g = \#\{j: s_j > s_{target}\},\ t = \#\{j: s_j = s_{target}\}

    So equal scores for all candidates, as a collapsed latent gives them, are chance, k / N.

    Arguments:
        scores: (B, N), the higher the better.
        k: at least 1.
        target: (B,) int64, the number of each query's candidate; the query's own number when None.

    Returns:
        (B,) float64 in [0, 1]; their mean is recall@k.

    Raises:
        ValueError: for a score that is not a number, or k below 1.
    """
    if k < 1 or scores.isnan().any():
        raise ValueError(f"recall_at: received k={k} and {int(scores.isnan().sum())} scores that are NaN, expected k >= 1 and none")
    target = torch.arange(len(scores), device=scores.device) if target is None else target
    own = scores.gather(1, target.unsqueeze(1))
    better, equal = (scores > own).sum(1).double(), (scores == own).sum(1)
    return ((k - better) / equal).clamp(0, 1)


def text_scores(texts: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """How near texts are to the true ones, one for one (sacrebleu).

    Arguments:
        texts: what a model made.
        truths: as many; not what a tokenizer made of them, or its unknown words would count as right. One that a truth has itself, as in
            Penn Treebank, is one word.

    Returns:
        ``exact_match`` in [0, 1], runs of blanks counting as one; ``bleu`` and ``chrf`` of the corpus in [0, 100], with sacrebleu's
        defaults, except that n-grams longer than every text are left out: of one-word captions BLEU is that of words.

    Raises:
        ValueError: for no texts, or not as many as truths.

    References:
        Post (2018), A call for clarity in reporting BLEU scores, https://arxiv.org/abs/1804.08771
        Popovic (2015), chrF, https://aclanthology.org/W15-3049
    """
    import sacrebleu

    if len(texts) != len(truths) or not texts:
        raise ValueError(f"text_scores: received {len(texts)} texts and {len(truths)} truths, expected as many, and at least one")
    exact = sum(made.split() == true.split() for made, true in zip(texts, truths, strict=True)) / len(texts)
    texts, truths = [_unknown_as_word(text) for text in texts], [_unknown_as_word(text) for text in truths]
    # force: no word to the user about tokenized text, which is what some data sets hold
    bleu = sacrebleu.corpus_bleu(texts, [truths], use_effective_order=True, force=True).score
    return {"exact_match": exact, "bleu": bleu, "chrf": sacrebleu.corpus_chrf(texts, [truths]).score}


def _unknown_as_word(text: str) -> str:
    """A text whose "<unk>" sacrebleu does not take for three words."""
    return re.sub(r"<unk>|\[UNK\]", "unk", text)


def diversity(texts: Sequence[str], known: Iterable[str] | None = None, max_self_bleu: int = 500) -> dict[str, float]:
    r"""How different texts are from each other, and from texts that are known.

    Arguments:
        texts: what a model made, at least two.
        known: of the training rows, for instance; None where they are not known.
        max_self_bleu: the first texts that self-BLEU looks at, each beside all the others: its cost is quadratic.

    Returns:
        ``distinct_1`` and ``distinct_2``, different words, or pairs of them, as a share of all; ``self_bleu`` in [0, 100], mean BLEU-4 of a
        text with the others as references, 100 where all are alike; ``repeated``, the share of texts that are known word for word, where
        some are known.

    Raises:
        ValueError: for fewer than two texts.

    References:
        Li et al. (2016), A diversity-promoting objective function, https://arxiv.org/abs/1510.03055 (distinct)
        Zhu et al. (2018), Texygen, https://arxiv.org/abs/1802.01886 (self-BLEU)
    """
    from sacrebleu.metrics import BLEU

    if len(texts) < 2:
        raise ValueError(f"diversity: received {len(texts)} texts, expected at least two")
    words, figures = [text.split() for text in texts], {}
    for n in (1, 2):
        grams = [gram for text in words for gram in zip(*(text[i:] for i in range(n)), strict=False)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    some, bleu = [_unknown_as_word(text) for text in texts[:max_self_bleu]], BLEU(effective_order=True, force=True)
    empty = sum(not text.split() for text in some) > 1  # such a one is like another, of which BLEU knows nothing
    scores = [
        100.0 if empty and not text.split() else bleu.sentence_score(text, some[:i] + some[i + 1 :]).score for i, text in enumerate(some)
    ]
    figures |= {"self_bleu": sum(scores) / len(scores)}
    if known is None:
        return figures
    told = {" ".join(text.split()) for text in known}
    return figures | {"repeated": sum(" ".join(text) in told for text in words) / len(words)}


def relevant_words(log_probs: Tensor, background: Tensor, top_k: int, relevance: float = 0.6) -> Tensor:
    r"""The words that tell every topic, by :math:`\log p(v | k) - (1 - \lambda) \log p(v)`, the most relevant first.

    Arguments:
        log_probs: (K, V), log p(v | k).
        background: (V,), log p(v), up to a constant.
        top_k: how many, 1 to V.
        relevance: lambda in [0, 1]: at 1 by p(v | k) alone, at 0 by how much more frequent than anywhere; readers did best with 0.6.

    Returns:
        (K, top_k) int64, numbers of words.

    Raises:
        ValueError: for a number outside its range.
    """
    if not 1 <= top_k <= log_probs.shape[1]:
        raise ValueError(f"top_k: received {top_k}, expected 1 to {log_probs.shape[1]}, the words of the vocabulary")
    if not 0 <= relevance <= 1:
        raise ValueError(f"relevance: received {relevance}, expected 0 to 1")
    return (log_probs - (1 - relevance) * background).topk(top_k).indices


def topic_diversity(topics: Tensor) -> float:
    """Share of different words among the top words of all topics.

    Arguments:
        topics: (K, k), numbers of the top words of each topic; k is 25 in Dieng et al.

    Example:
        >>> topic_diversity(torch.tensor([[0, 1], [1, 2]]))
        0.75
    """
    return len(topics.unique()) / topics.numel()


def npmi(together: Tensor, num_documents: int) -> Tensor:
    r"""Coherence of topics: the mean over every two top words of their normalised pointwise mutual information,

    .. math:: \log \frac{p_{ij}}{p_i p_j} \Big/ -\log p_{ij},

    from -1, never in one document, over 0, independent, to 1, always together. It depends on the documents and the number of words: only
    figures of the same can be compared.

    Arguments:
        together: (*, k, k), the number of documents that hold both words, on the diagonal those that hold the word; k >= 2.
        num_documents: of all documents, empty ones too.

    Returns:
        (*,) float64.
    """
    first, second = torch.triu_indices(together.shape[-1], together.shape[-1], 1)
    p = together.double() / num_documents
    single, joint = p.diagonal(dim1=-2, dim2=-1), p[..., first, second]
    information = (joint / (single[..., first] * single[..., second])).log() / -joint.log()
    limits = torch.where(joint == 0, -1.0, 1.0).double()  # never together; both in every document
    return torch.where((joint > 0) & (joint < 1), information, limits).mean(-1)
