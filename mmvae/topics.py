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


def topic_quality(topics: Tensor, documents: Any) -> dict[str, float]:
    """What is reported of topics.

    Arguments:
        topics: (K, 25), numbers of the words that tell each, the most relevant first; fewer where the vocabulary is smaller.
        documents: (N, V), the training documents.

    Returns:
        ``npmi``, the mean of :func:`coherence` of the first 10 words; ``topic_diversity`` of all, ``topic_diversity_10`` of the first 10.
    """
    first = topics[:, :10]
    return {
        "npmi": coherence(first, documents).mean().item(),
        "topic_diversity": topic_diversity(topics),
        "topic_diversity_10": topic_diversity(first),
    }


def lda_topics(documents: Any, num_topics: int, seed: int = 0) -> Tensor:
    """log p(v | k) of scikit-learn's latent Dirichlet allocation with its own settings, (K, V) float64.

    References:
        Hoffman et al. (2010), Online learning for latent Dirichlet allocation, https://papers.nips.cc/paper/3902
    """
    from sklearn.decomposition import LatentDirichletAllocation

    topics = torch.from_numpy(LatentDirichletAllocation(num_topics, random_state=seed).fit(documents).components_)
    return (topics / topics.sum(1, keepdim=True)).log()


def lda_quality(documents: Any, num_topics: int, seed: int = 0) -> dict[str, float]:
    """:func:`topic_quality` of :func:`lda_topics`: ``lda_<figure>`` of its likeliest words, as scikit-learn gives them, and
    ``lda_relevant_<figure>`` of its most relevant ones, as :class:`mmvae.TopicVAE` tells its own.
    """
    log_probs, top_k = lda_topics(documents, num_topics, seed), min(25, documents.shape[1])
    background = torch.from_numpy(documents.sum(0).A1 / documents.sum()).log()
    figures = {}
    for name, relevance in (("lda", 1.0), ("lda_relevant", 0.6)):
        quality = topic_quality(relevant_words(log_probs, background, top_k, relevance), documents)
        figures |= {f"{name}_{figure}": value for figure, value in quality.items()}
    return figures
