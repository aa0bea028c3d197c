"""How good topics are on documents, and those of scikit-learn's LDA to compare with.

Documents are counts of words as :meth:`mmvae.vectorizer.TopicVAEVectorizer.counts` gives them: a sparse matrix (N, V).
Shapes: ``N`` documents, ``V`` words of the vocabulary, ``K`` topics.
"""

from typing import Any

import torch
from torch import Tensor

from mmvae.metrics import npmi, relevant_words, topic_diversity


def coherence(topics: Tensor, documents: Any) -> Tensor:
    """NPMI of every topic, in which two words are together that are in one document, however far apart.

    Arguments:
        topics: (K, k), numbers of its words, k >= 2.
        documents: (N, V), the reference corpus: here always the training documents.

    Returns:
        (K,) float64.
    """
    words, place = topics.unique(return_inverse=True)
    held = (documents[:, words.numpy()] > 0).astype("int64")
    together = torch.from_numpy((held.T @ held).toarray())
    return npmi(together[place.unsqueeze(2), place.unsqueeze(1)], documents.shape[0])


def topic_quality(log_probs: Tensor, background: Tensor, documents: Any) -> dict[str, float]:
    """What is reported of topics: of their most relevant words, as :class:`mmvae.TopicVAE` tells them, and of their likeliest ones.

    Arguments:
        log_probs: (K, V), log p(v | k).
        background: (V,), log p(v) up to a constant.
        documents: (N, V), the training documents.

    Returns:
        ``npmi``, the mean of :func:`coherence` of 10 words a topic; ``topic_diversity`` of 25, or all of a smaller vocabulary, and
        ``topic_diversity_10``; ``likeliest_<figure>``, the same of the words of largest p(v | k).
    """
    figures = {}
    for prefix, relevance in (("", 0.6), ("likeliest_", 1.0)):
        topics = relevant_words(log_probs.cpu(), background.cpu(), min(25, log_probs.shape[1]), relevance)
        figures[f"{prefix}npmi"] = coherence(topics[:, :10], documents).mean().item()
        figures[f"{prefix}topic_diversity"] = topic_diversity(topics)
        figures[f"{prefix}topic_diversity_10"] = topic_diversity(topics[:, :10])
    return figures


def lda_quality(documents: Any, num_topics: int, seed: int = 0) -> dict[str, float]:
    """``lda_<figure>`` of :func:`topic_quality` of scikit-learn's latent Dirichlet allocation, with its own settings, of the documents.

    References:
        Hoffman et al. (2010), Online learning for latent Dirichlet allocation, https://papers.nips.cc/paper/3902
    """
    from sklearn.decomposition import LatentDirichletAllocation

    topics = torch.from_numpy(LatentDirichletAllocation(num_topics, random_state=seed % 2**32).fit(documents).components_)
    log_probs, background = (topics / topics.sum(1, keepdim=True)).log(), torch.from_numpy(documents.sum(0).A1 / documents.sum()).log()
    return {f"lda_{name}": value for name, value in topic_quality(log_probs, background, documents).items()}
