"""Every figure of a trained VAE on any data set, as a table and as JSON.

    accelerate launch recipes/evaluate.py --model outputs/text_vae_ptb --dataset path/to/ptb --split test --importance_samples 500
    accelerate launch recipes/evaluate.py --model user/name --dataset sprites:3

Results are independent of batch size and number of processes; the noise of a row is keyed by (seed, row).
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoModel, AutoProcessor

import mmvae  # noqa: F401  registers the classes
from mmvae.data import ImageColumn, Loader, Rows, TextColumn, find_column, load_rows, splits
from mmvae.evaluation import binarization, evaluate_vae
from mmvae.experiment import parse, precision
from mmvae.pictures import table
from mmvae.record import public


@dataclass
class EvaluationArguments:
    """Options of an evaluation."""

    model: str = field(default="outputs/text_vae", metadata={"help": "model folder or Hub id"})
    dataset: str = field(default="sprites:5", metadata={"help": "Hub id, local folder or file, or sprites:LEVEL (built in)"})
    split: str = "test"
    column: str | None = field(default=None, metadata={"help": "column of the text or pictures; guessed when there is only one"})
    max_rows: int | None = field(default=None, metadata={"help": "evaluate the first rows only; the result says so"})
    max_length: int = 512
    truncate: bool = False
    batch_size: int = 100
    importance_samples: int = field(default=100, metadata={"help": "per row, for the log-likelihood; 0 leaves it out"})
    mixed_precision: str = "no"
    seed: int = 0
    output: str | None = field(default=None, metadata={"help": "JSON file; evaluation-SPLIT.json in a local model folder by default"})


def main() -> None:
    """Load, evaluate, print and write."""
    (args,) = parse(EvaluationArguments)
    accelerator = Accelerator(mixed_precision=precision(args.mixed_precision))
    model = AutoModel.from_pretrained(args.model, dtype="float32").to(accelerator.device)
    processor = AutoProcessor.from_pretrained(args.model)
    # a set without a validation split gives one up from its training rows, and the recipes evaluate that one
    rows = splits(args.dataset)["validation"] if args.split == "validation" else load_rows(args.dataset, args.split)
    rows = rows if args.max_rows is None else rows.select(range(min(args.max_rows, len(rows))))
    kind = model.input_modalities[0]
    name, transform = find_column(rows, kind, args.column), None
    if kind == "image":
        pixels = {"background": tuple(processor.background), "resize": processor.resize_mode}
        column = ImageColumn(name, model.config.height_width, model.config.num_channels, **pixels)
        transform = binarization(model.config.binarize)
    else:
        column = TextColumn(name, processor, args.max_length, args.truncate)
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = Loader(Rows(rows, column, name=args.dataset), args.batch_size, shuffle=False, **place)
    began = time.perf_counter()
    options = {"num_samples": args.importance_samples, "seed": args.seed, "transform": transform}
    figures = evaluate_vae(accelerator, accelerator.prepare(model), loader, **options)
    names = {
        name: Path(value).resolve().name if Path(value).exists() else value
        for name, value in (("model", args.model), ("dataset", args.dataset))
    }
    record = names | {"split": args.split, "rows": loader.num_rows, "seed": args.seed}
    record |= {"seconds": round(time.perf_counter() - began, 1), "metrics": figures}
    if accelerator.is_main_process:
        print(table({"figure": list(figures), "value": list(figures.values())}))
        default = Path(args.model) / f"evaluation-{args.split}.json" if Path(args.model).is_dir() else Path("evaluation.json")
        output = Path(args.output) if args.output else default
        output.write_text(json.dumps(public(record), indent=2) + "\n", encoding="utf-8")
        print(f"{loader.num_rows} rows, {record['seconds']} s; written to {output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
