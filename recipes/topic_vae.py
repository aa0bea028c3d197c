"""Train a topic model on the texts of any data set, and see its topics beside those of scikit-learn's LDA.

    accelerate launch recipes/topic_vae.py                                              # built-in captions, about a minute
    accelerate launch recipes/topic_vae.py --config recipes/configs/topic_vae_bbc.yaml --dataset path/to/bbc_news --compare_lda true

Start the same command again after a stop and it goes on where it was. The vocabulary is that of the training texts, by the options of
scikit-learn's CountVectorizer; texts without a word of it are named and keep their row. NPMI is of the training texts, a text being one
window, and of the 10 words that tell a topic; diversity of 25 (mmvae/topics.py). recipes/classification.py --vae takes the folder.
Results: see the config.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmvae import TopicVAE, TopicVAEConfig, TopicVAEVectorizer
from mmvae.charts import bars
from mmvae.data import Rows, WordCountColumn, find_column, splits, texts_of
from mmvae.evaluation import evaluate_vae
from mmvae.experiment import RunArguments, finish, make_loaders, parse, start, train
from mmvae.options import mapping
from mmvae.pictures import table
from mmvae.topics import coherence, lda_quality, topic_quality

MODEL = ("latent_dim", "prior", "concentration", "mixing", "hidden_size", "encoder_layers", "dropout")


@dataclass
class TopicArguments:
    """Options of the model and its words."""

    text_column: str | None = field(default=None, metadata={"help": "column of the text; guessed when there is only one"})
    vectorizer: str = field(
        default='{"stop_words": "english", "max_features": 10000}',
        metadata={
            "help": "of CountVectorizer: stop_words, min_df, max_df, max_features, lowercase, strip_accents, token_pattern, ngram_range"
        },
    )
    compare_lda: bool = field(default=False, metadata={"help": "also measure scikit-learn's LDA, on the same counts with the same seed"})
    latent_dim: int = field(default=10, metadata={"help": "how many topics"})
    prior: str = "dirichlet"
    concentration: float = 1.0
    mixing: str = field(default="product", metadata={"help": "product (ProdLDA) or mixture (LDA)"})
    hidden_size: int = 100
    encoder_layers: int = 2
    dropout: float = 0.2

    def __post_init__(self) -> None:
        self.vectorizer = mapping("vectorizer", self.vectorizer)


@dataclass
class TopicRun(RunArguments):
    """Defaults that train on the built-in captions in about a minute."""

    output_dir: str = "outputs/topic_vae"
    batch_size: int = 64
    num_epochs: int | None = 4
    learning_rate: float = 5e-3
    kl_schedule: str = "constant"
    kl_options: str = "{}"

    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("streaming", "max_length", "truncate"), "words are counted of all of every training text"
    )


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, topic = parse(TopicRun, TopicArguments)
    if topic.prior != "dirichlet":  # whose KL has dimensions too
        args.suit_prior(topic.prior, topic.latent_dim)
    accelerator = start(args)
    data, bad = splits(args.dataset, on_bad_row=args.on_bad_row), {"on_bad_row": args.on_bad_row}
    column = find_column(data["train"], "text", topic.text_column)
    vectorizer = TopicVAEVectorizer.fit(texts_of(data["train"], column, args.dataset, **bad), **topic.vectorizer)
    rows = {split: Rows(part, WordCountColumn(column, vectorizer), name=args.dataset, **bad) for split, part in data.items()}
    loaders = make_loaders(accelerator, args, rows)
    documents = vectorizer.counts(texts_of(data["train"], column, args.dataset, **bad))

    torch.manual_seed(args.seed)
    model = TopicVAE(TopicVAEConfig(vocabulary=vectorizer.vocabulary, **{name: getattr(topic, name) for name in MODEL}))

    def measure(accelerator: Any, model: TopicVAE, loader: Any, **options: Any) -> dict[str, float]:
        figures = evaluate_vae(accelerator, model, loader, num_samples=args.importance_samples, **options)
        figures |= topic_quality(model.topic_words(), model.background, documents)
        return figures | (lda_quality(documents, topic.latent_dim, args.seed) if topic.compare_lda else {})

    def draw(model: TopicVAE, figures: Path) -> dict[str, str]:
        texts = list(itertools.islice(texts_of(data["validation"], column, args.dataset, **bad), 8))
        shares = model.document_topics(**vectorizer(texts).to(model.device)).cpu()
        top = model.top_words(min(10, len(vectorizer.vocabulary))).cpu()
        probabilities, told = model.topic_words().exp().cpu().gather(1, top), coherence(top, documents)
        words = [[vectorizer.vocabulary[word] for word in line] for line in top.tolist()]
        titles = [f"topic {number}, NPMI {value:.2f}" for number, value in enumerate(told.tolist())]
        panels = {title: dict(zip(*pair, strict=True)) for title, *pair in zip(titles, words, probabilities.tolist(), strict=True)}
        bars(panels, figures / "topics.png")
        most = [", ".join(f"{number} ({row[number]:.0%})" for number in row.topk(2).indices.tolist()) for row in shares]
        return {
            "Topics": table({"topic": range(len(words)), "NPMI": told.tolist(), "words": [" ".join(line) for line in words]}),
            "Documents": table({"document": [text[:120] for text in texts], "its topics": most}),
        }

    result = train(accelerator, args, model, loaders)
    finish(accelerator, args, model, vectorizer, result, loaders, draw=draw, measure=measure)


if __name__ == "__main__":
    main()
