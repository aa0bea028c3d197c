"""Every figure of a trained VAE on any data set, as a table and as JSON.

    accelerate launch recipes/evaluate.py --model outputs/text_vae_ptb --dataset path/to/ptb --split test --importance_samples 500
    accelerate launch recipes/evaluate.py --model user/name --dataset sprites:3 --judge outputs/sprites_judge
    accelerate launch recipes/evaluate.py --model outputs/digit_words --dataset words:path/to/mnist --label label
    accelerate launch recipes/evaluate.py --model outputs/text_vae_ptb --dataset path/to/ptb --reference_lm outputs/language_model_ptb
    accelerate launch recipes/evaluate.py --model outputs/seed0 outputs/seed1 outputs/seed2 --dataset path/to/multi30k

Of a text VAE also how it reconstructs, and how different its samples are (mmvae/sentences.py); with --reference_lm their perplexity too,
and --samples_file writes samples for a language model to be trained on. Latents of samples are of the density that was fitted after
training, where the folder has one: "latents" in the record is "density" or "prior". --suppress_unknown true keeps <unk> out of all that
it writes.
With --label a linear classifier tells what it reads in the latent (mmvae/baselines.py). A joint model is also asked to retrieve, translate
and describe (mmvae/coherence.py), beside what the nearest training text would say; with --label also what is of the right class.
Several models are columns of one table, beside means and deviations: --output is their JSON, and each folder gets its own.
Of a model with a head the figures are its VAE's; its recipe has measured the head.
Results are independent of batch size and number of processes; the noise of a row is keyed by (seed, row).
"""

import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from mmvae import MMVAE
from mmvae.baselines import check_label, evaluate_by_training_rows
from mmvae.coherence import evaluate_joint
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, load_rows, splits, texts_of
from mmvae.density_fitting import latents_from
from mmvae.evaluation import binarization, evaluate_conditional, evaluate_vae
from mmvae.experiment import build_accelerator, check_bad_rows, parse
from mmvae.judge import Judge
from mmvae.modalities import read_columns
from mmvae.pictures import table
from mmvae.processing import decode_text
from mmvae.record import public, without_place
from mmvae.sentences import check_language_model, evaluate_sentences, samples

logger = logging.getLogger("mmvae")


@dataclass
class EvaluationArguments:
    """Options of an evaluation."""

    model: list[str] = field(default_factory=lambda: ["outputs/text_vae"], metadata={"help": "model folder or Hub id, or several"})
    dataset: str = field(default="sprites:5", metadata={"help": "Hub id, local folder or file, or sprites:LEVEL[:ROWS] (built in)"})
    split: str = "test"
    column: str | None = field(default=None, metadata={"help": "column of a model of one modality; guessed when there is only one"})
    modalities: str | None = field(default=None, metadata={"help": "of a joint model, name:kind[:column], separated by commas; guessed"})
    max_rows: int | None = field(default=None, metadata={"help": "evaluate the first rows only; the result says so"})
    max_length: int = 512
    truncate: bool = False
    on_bad_row: str = field(default="skip_empty", metadata={"help": "error, skip_empty: leave out rows without any modality, or skip"})
    most_bad_rows: float = field(default=0.01, metadata={"help": "share of bad rows, more than one, beyond which --on_bad_row skip stops"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode pictures, once where they fit in memory"})
    batch_size: int = 100
    importance_samples: int = field(default=100, metadata={"help": "per row, for the log-likelihood; 0 leaves it out"})
    conditional_samples: int = field(default=0, metadata={"help": "the same of one modality given the others, of a joint model"})
    num_generated: int = field(default=1000, metadata={"help": "first rows that a joint or text VAE makes again, and its samples; 0: none"})
    reference_lm: str | None = field(default=None, metadata={"help": "folder of a text model of latent_dim 0 that scores the samples"})
    samples_file: str | None = field(default=None, metadata={"help": "jsonl file to write samples to, as a data set"})
    num_samples: int = field(default=40_000, metadata={"help": "of that file"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest sample of a text VAE; a longer sentence is cut there"})
    suppress_unknown: bool = field(default=False, metadata={"help": "a text VAE never writes the unknown token"})
    num_beams: int = field(default=1, metadata={"help": "of the texts that are generated"})
    judge: str | None = field(default=None, metadata={"help": "folder of a judge of sprites, of recipes/sprites_judge.py"})
    label: str | None = field(default=None, metadata={"help": "column of classes, for a linear probe and the coherence of a joint model"})
    mixed_precision: str = "no"
    seed: int = 0
    output: str | None = field(default=None, metadata={"help": "JSON file; evaluation-SPLIT.json in a local model folder by default"})

    def __post_init__(self) -> None:
        zero = dict.fromkeys(("importance_samples", "conditional_samples", "num_generated"), 0)
        for option, least in (zero | dict.fromkeys(("batch_size", "num_samples", "max_new_tokens", "num_beams"), 1)).items():
            if (value := getattr(self, option)) < least:
                raise ValueError(f"{option}: received {value}, expected at least {least}")
        if not 0 <= self.most_bad_rows <= 1:
            raise ValueError(f"most_bad_rows: received {self.most_bad_rows}, expected a share in [0, 1]")
        if self.judge and self.dataset.split(":")[0] != "sprites":
            raise ValueError(f"judge: received {self.judge!r} with dataset {self.dataset!r}, expected sprites:LEVEL")
        if self.reference_lm and not self.num_generated:
            raise ValueError(f"num_generated: received 0 with reference_lm {self.reference_lm!r}, expected at least 1 sample to score")
        if self.samples_file and (len(self.model) > 1 or not self.samples_file.endswith(".jsonl")):
            raise ValueError(f"samples_file: received {self.samples_file!r} of {len(self.model)} models, expected NAME.jsonl of one model")
        for option in ("samples_file", "output"):
            if (path := getattr(self, option)) and not Path(path).parent.is_dir():
                raise ValueError(f"{option}: received {path!r}, expected a file in a folder that exists")


def evaluate(accelerator: Accelerator, name: str, args: EvaluationArguments) -> dict[str, Any]:
    """The record of one model."""
    judge = Judge.from_pretrained(args.judge) if args.judge else None
    model = AutoModel.from_pretrained(name, dtype="float32").to(accelerator.device)
    processor = AutoProcessor.from_pretrained(name)
    # a set without a validation split gives one up from its training rows, and the recipes evaluate that one
    data = (
        splits(args.dataset, on_bad_row=args.on_bad_row)["validation"]
        if args.split == "validation"
        else load_rows(args.dataset, args.split, on_bad_row=args.on_bad_row)
    )
    data = data if args.max_rows is None else data.select(range(min(args.max_rows, len(data))))
    joint, transform = isinstance(model, MMVAE), None
    if args.label:  # before hours of work
        check_label(model, args.label, data, load_rows(args.dataset, on_bad_row=args.on_bad_row), name=args.dataset)
        if getattr(model.config, "num_classes", 0) or "Classification" in (model.config.architectures or [""])[0]:
            accelerator.print(f"{name} tells classes itself, how well says its metrics.json: probe/ is of a new linear classifier")
    reading = {"max_length": args.max_length, "truncate": args.truncate}
    columns = read_columns(model, processor, data, args.modalities, args.column, **reading)
    if isinstance(columns[0], ImageColumn) and not joint:
        transform = binarization(model.config.binarize)
    writes = isinstance(columns[0], TextColumn) and not joint
    refuse_unsuited(args, model, processor, writes, len(data))
    reference = language_model(args.reference_lm, accelerator) if args.reference_lm else None
    unwritten = [processor.unk_token_id] if args.suppress_unknown else None
    rows = Rows(data, columns, name=args.dataset, on_bad_row=args.on_bad_row, num_workers=args.num_workers)
    check_bad_rows(args, {args.split: rows})
    loader = Loader(rows, args.batch_size, shuffle=False, rank=accelerator.process_index, world_size=accelerator.num_processes)
    began = time.perf_counter()
    options = {"num_samples": args.importance_samples, "seed": args.seed, "transform": transform}
    figures = evaluate_vae(accelerator, accelerator.prepare(model), loader, **options)
    if joint:
        if args.conditional_samples:
            figures |= evaluate_conditional(accelerator, model, loader, num_samples=args.conditional_samples, seed=args.seed)
        truths = {column.modality: list(data[column.name]) for column in columns if isinstance(column, TextColumn)}
        options = {"num_generated": args.num_generated, "seed": args.seed}
        judging = {"judge": judge, "level": data.level} if judge else {}
        figures |= evaluate_joint(accelerator, model, processor, rows, truths, num_beams=args.num_beams, **judging, **options)
    if writes and min(args.num_generated, len(data)) > 1:
        options = {"num_generated": min(args.num_generated, len(data)), "num_beams": args.num_beams, "seed": args.seed}
        options |= {"max_new_tokens": args.max_new_tokens, "suppress_tokens": unwritten, "reference": reference}
        options |= known_sentences(args, processor, columns[0].name)
        figures |= evaluate_sentences(accelerator, model, processor, rows, data[columns[0].name][:], **options)
    if args.samples_file:
        write_samples(accelerator, args, model, processor, columns[0].name, unwritten)
    options = {"training_rows": lambda: splits(args.dataset, on_bad_row=args.on_bad_row)["train"], "label": args.label}
    options |= {"num_generated": args.num_generated, "seed": args.seed}
    figures |= evaluate_by_training_rows(accelerator, model, processor, rows, data, **options)
    accelerator.free_memory()
    names = {"model": without_place(name), "dataset": without_place(args.dataset), "split": args.split}
    told = {"rows": loader.num_rows, "seed": args.seed, "seconds": round(time.perf_counter() - began, 1)}
    told |= {"bad_rows": len(rows.bad)} if rows.bad else {}  # left out; recipes/check_data.py lists them
    told |= {"latents": latents_from(model)} if math.prod(model.latent_shape) else {}  # of what it makes when nothing is given
    told |= {"suppress_unknown": True} if args.suppress_unknown else {}
    return names | told | {"metrics": figures}


def refuse_unsuited(args: EvaluationArguments, model: PreTrainedModel, processor: Any, writes: bool, rows: int) -> None:
    """Refuse options that the model has no use for, or for which there are too few rows: ValueError. ``writes``: it is a text VAE."""
    kind = type(model).__name__
    for option in ("reference_lm", "samples_file"):
        if getattr(args, option) and not writes:
            raise ValueError(f"{option}: received {getattr(args, option)!r} for a {kind}, expected a text VAE")
    for option, expected in (("judge", None), ("conditional_samples", 0)):
        if getattr(args, option) and not isinstance(model, MMVAE):
            raise ValueError(f"{option}: received {getattr(args, option)!r} for a {kind}, expected {expected}, or an MMVAE")
    if args.reference_lm and min(args.num_generated, rows) < 2:
        raise ValueError(f"reference_lm: {min(args.num_generated, rows)} samples to score, expected at least 2 (num_generated, rows)")
    if writes and args.num_generated == 1:
        raise ValueError(f"num_generated: received 1 for a {kind}, expected 0, or at least 2 samples to compare")
    if writes and args.num_generated and rows < 2:
        logger.warning("no figures of what the model writes: received %d row, expected at least 2", rows)
    if args.suppress_unknown and not (writes and unknown_alone(processor)):
        token = f" whose unknown token is {processor.unk_token!r}" if writes else ""
        raise ValueError(f"suppress_unknown: received True for a {kind}{token}, expected a text VAE with one of its own")


def language_model(name: str, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
    """A text model of latent_dim 0, and its tokenizer."""
    model = AutoModel.from_pretrained(name, dtype="float32").to(accelerator.device)
    check_language_model(model)
    return model, AutoProcessor.from_pretrained(name)


def known_sentences(args: EvaluationArguments, processor: Any, column: str) -> dict[str, list[str]]:
    """The training rows as the model would write them, ``known`` of the sentences' figures; nothing where they cannot be read."""
    try:
        texts = list(texts_of(splits(args.dataset, on_bad_row=args.on_bad_row)["train"], column, missing=True, on_bad_row="skip"))
        return {"known": [decode_text(processor, processor(text, return_tensors="pt")["input_ids"])[0] for text in texts]}
    except ValueError as error:  # a data set without training rows, or with broken ones
        logger.warning("no share of samples that repeat a training row: %s", error)
        return {}


def write_samples(
    accelerator: Accelerator, args: EvaluationArguments, model: PreTrainedModel, tokenizer: Any, column: str, unwritten: list[int] | None
) -> None:
    """Sentences of a text VAE, as a data set."""
    drawn = samples(accelerator, model, tokenizer, args.num_samples, args.max_new_tokens, unwritten, seed=args.seed)
    if accelerator.is_main_process:
        lines = (json.dumps({column: text}) + "\n" for text in drawn)
        Path(args.samples_file).write_text("".join(lines), encoding="utf-8")


def unknown_alone(tokenizer: Any) -> bool:
    """Whether a tokenizer has an unknown token that is no other special token."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in others


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the models and sample deviations, of the figures that all of them have."""
    names = [name for name in records[0]["metrics"] if all(name in record["metrics"] for record in records)]
    values = {name: [record["metrics"][name] for record in records] for name in names}
    first = {key: records[0][key] for key in ("dataset", "split", "rows", "seed")}
    means = {"metrics": {name: statistics.fmean(each) for name, each in values.items()}}
    return {"models": records} | first | means | {"deviation": {name: statistics.stdev(each) for name, each in values.items()}}


def main() -> None:
    """Load, evaluate, print and write."""
    (args,) = parse(EvaluationArguments)
    accelerator = build_accelerator(args.mixed_precision)
    records = []
    for name in args.model:
        records.append(record := evaluate(accelerator, name, args))
        if accelerator.is_main_process:
            print(table({"figure": list(record["metrics"]), "value": list(record["metrics"].values())}))
            default = Path(name) / f"evaluation-{args.split}.json" if Path(name).is_dir() else Path("evaluation.json")
            write(record, default if args.output is None or len(args.model) > 1 else Path(args.output))
            print(f"{record['rows']} rows, {record['seconds']} s")
    if len(records) > 1 and accelerator.is_main_process:
        both = summary(records)
        names = [record["model"] for record in records]
        titles = names if len(set(names)) == len(names) else [f"{n}: {name}" for n, name in enumerate(names, 1)]
        values = {title: [record["metrics"][name] for name in both["metrics"]] for title, record in zip(titles, records, strict=True)}
        values |= {title: list(both[key].values()) for title, key in (("mean", "metrics"), ("deviation", "deviation"))}
        print(table({"figure": list(both["metrics"])} | values))
        write(both, Path(args.output or f"evaluation-{args.split}.json"))
    accelerator.end_training()


def write(record: dict[str, Any], path: Path) -> None:
    """A record as JSON."""
    path.write_text(json.dumps(public(record), indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
