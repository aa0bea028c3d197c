"""Train a sentence VAE on any text data set.

    accelerate launch recipes/text_vae.py                                              # built-in captions, about a minute
    accelerate launch recipes/text_vae.py --config recipes/configs/text_vae_ptb.yaml --dataset path/to/ptb
    accelerate launch recipes/text_vae.py --dataset path/to/trec --label_column label --labels_per_class 50    # with classes
    accelerate launch recipes/text_vae.py --config recipes/configs/language_model_ptb.yaml --dataset path/to/ptb    # without a latent

Start the same command again after a stop and it goes on where it was. Results so far: see the configs.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch

from mmvae import TextVAE, TextVAEConfig
from mmvae.data import Loader, TextColumn, find_column, splits, texts_of
from mmvae.data.partly_labelled import LabelArguments, partly_labelled
from mmvae.density_fitting import latents_from, unfitted
from mmvae.experiment import RunArguments, finish, make_loaders, make_tokenizer, parse, start, train
from mmvae.options import mapping
from mmvae.pictures import table
from mmvae.processing import RESERVED_WORDS, decode_text

DATA = ("text_column", "tokenizer", "densities", *(option.name for option in fields(LabelArguments)))


@dataclass
class TextArguments(LabelArguments):
    """Options of the model and its text."""

    text_column: str | None = field(default=None, metadata={"help": "column of the text; guessed when there is only one"})
    tokenizer: str = field(default="whitespace", metadata={"help": "whitespace, bpe, or the id or path of a pretrained one"})
    vocab_size: int = field(default=10_000, metadata={"help": "most tokens of a trained tokenizer, special ones included"})
    latent_dim: int = field(default=32, metadata={"help": "0: a language model"})
    embedding_size: int = 256
    hidden_size: int = 256
    encoder_layers: int = 1
    decoder_layers: int = 1
    bidirectional: bool = False
    pooling: str = field(default="last", metadata={"help": "what the posterior reads of the encoder's states: last, mean or max"})
    embedding_dropout: float = 0.0
    encoder_dropout: float = 0.0
    dropout: float = 0.0
    word_dropout: float = 0.0
    latent_skip: bool = field(default=False, metadata={"help": "add a linear map of z to every state of the decoder"})
    mean_scale: float = field(default=0.0, metadata={"help": "normalise the posterior's mean over the batch to this deviation: BN-VAE"})
    bow_weight: float = field(default=0.0, metadata={"help": "weight of an auxiliary bag of words"})
    tie_word_embeddings: bool = True
    share_embeddings: bool = False
    prior: str = "standard_normal"
    prior_components: int = 50
    densities: str = field(default="{}", metadata={"help": 'fitted after training: {"latent": {"kind": "mixture", "num_components": 10}}'})

    def __post_init__(self) -> None:
        self.densities = mapping("densities", self.densities)


@dataclass
class TextRun(RunArguments):
    """Defaults that train on the built-in captions in about a minute."""

    output_dir: str = "outputs/text_vae"
    num_epochs: int | None = 5
    learning_rate: float = 3e-3
    max_grad_norm: float | None = 5.0
    kl_options: str = '{"steps": 150, "start": 0.01, "delay": 150}'
    objective_options: str = '{"free_bits": 0.25}'

    refused: ClassVar[dict[str, str]] = {"compile": "a GRU is one kernel already, and every length would be compiled anew"}


def main() -> None:
    """Load, train, evaluate, write the model folder."""
    args, text = parse(TextRun, TextArguments)
    args.suit_prior(text.prior, text.latent_dim, text.prior_components)
    accelerator = start(args)
    data = splits(args.dataset, streaming=args.streaming, on_bad_row=args.on_bad_row)
    column = find_column(data["train"], "text", text.text_column)
    texts = texts_of(data["train"], column, args.dataset, on_bad_row=args.on_bad_row, reserved=RESERVED_WORDS)
    tokenizer, ids = make_tokenizer(text.tokenizer, texts, text.vocab_size)
    columns = TextColumn(column, tokenizer, args.max_length, args.truncate)
    rows, classes = partly_labelled(data, dict.fromkeys(data, columns), text, seed=args.seed, **args.rows)
    loaders = make_loaders(accelerator, args, rows)

    options = {name: value for name, value in vars(text).items() if name not in DATA} | classes
    torch.manual_seed(args.seed)
    model = TextVAE(TextVAEConfig(**options | ids))
    unfitted(model, text.densities)  # refuses what cannot be, before any work

    def show(model: TextVAE, step: int) -> dict[str, str]:
        options = {"do_sample": not text.latent_dim, "max_new_tokens": 30}  # a language model has but one likeliest sentence
        sentences = decode_text(tokenizer, model.sample(4, torch.Generator().manual_seed(args.seed), **options))
        print(f"step {step}, samples:", *sentences, sep="\n  ")
        return {"samples": table({"sample": sentences})}

    def draw(model: TextVAE, figures: Path) -> dict[str, str]:
        generator, source = torch.Generator().manual_seed(args.seed), f"from the {latents_from(model)}"
        samples = {}
        if text.latent_dim:
            samples[f"{source}, beam 4"] = decode_text(tokenizer, model.sample(8, generator, num_beams=4, max_new_tokens=40))
        samples[f"{source}, sampled words"] = decode_text(tokenizer, model.sample(8, generator, do_sample=True, top_k=0, max_new_tokens=40))
        tables = {"Samples": table(samples)} | (of_the_latent(model, generator) if text.latent_dim else {})
        figures.joinpath("sentences.md").write_text("\n".join(f"## {k}\n\n{v}" for k, v in tables.items()), encoding="utf-8")
        return tables

    def of_the_latent(model: TextVAE, generator: torch.Generator) -> dict[str, str]:
        batch = next(Loader(rows["validation"], 8, seed=args.seed, pool=0).batches(0))  # of any length, not the shortest ones
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        latents = model.encode(ids, mask).mean
        options = {"max_new_tokens": ids.shape[1] + 10}
        again = decode_text(tokenizer, model.reconstruct(input_ids=ids, attention_mask=mask, num_beams=4, **options))
        seen = decode_text(tokenizer, ids)
        likely = {"class_labels": model.classify(input_ids=ids[:1], attention_mask=mask[:1]).argmax(1)} if classes else {}
        walk = decode_text(tokenizer, model.interpolate(latents[:1], latents[-1:], 7, num_beams=4, **options, **likely))
        tables = {
            "Reconstructions": table({"original": seen, "reconstruction (beam 4)": again}),
            "Interpolation": table({"between two sentences": walk}),
        }
        if classes:
            every = [number for number in classes["id2label"] for _ in range(3)]
            drawn = decode_text(tokenizer, model.generate(class_labels=every, generator=generator, num_beams=4, max_new_tokens=40))
            names = [classes["id2label"][number] for number in every]
            tables["Sentences by class"] = table({"class": names, f"from the {latents_from(model)}, beam 4": drawn})
        return tables

    result = train(accelerator, args, model, loaders, show=show)
    finish(accelerator, args, model, tokenizer, result, loaders, draw=draw, densities=text.densities)


if __name__ == "__main__":
    main()
