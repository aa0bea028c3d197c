"""What the recipes share: options, the VAE's training step, and what is left when a run is over.

``parse`` -> ``start`` -> the recipe builds data and model -> ``train`` -> ``finish``
"""

import contextlib
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedModel, SchedulerType, get_scheduler

from mmvae.evaluation import Transform, evaluate_elbo, evaluate_vae, model_inputs
from mmvae.hub import check_repo_id, push, write_card, write_metrics
from mmvae.noise import fold
from mmvae.objectives import OBJECTIVES
from mmvae.optimization import EMA, unwrap, update
from mmvae.pictures import curves
from mmvae.record import public
from mmvae.schedules import SCHEDULES
from mmvae.training import Result, fit, load_weights

logger = logging.getLogger(__name__)

LR_SCHEDULES = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}  # these step on a metric, not on a step


@dataclass
class RunArguments:
    """Options of every recipe. Options that take options are JSON on the command line and mappings in a config file."""

    dataset: str = field(default="sprites:5", metadata={"help": "Hub id, local folder or file, or sprites:LEVEL (built in)"})
    output_dir: str = field(default="outputs/run", metadata={"help": "the model folder; checkpoints/ lies inside"})
    streaming: bool = field(default=False, metadata={"help": "read rows as they are needed: sets larger than memory or disk"})
    max_length: int = field(default=512, metadata={"help": "most tokens in a row, BOS and EOS included"})
    truncate: bool = field(default=False, metadata={"help": "cut longer rows instead of refusing them"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode pictures which do not fit in memory"})
    seed: int = 0
    batch_size: int = field(default=128, metadata={"help": "rows of one optimizer step over all processes and accumulation steps"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches that a step is split into, to save memory"})
    num_epochs: int | None = None
    max_steps: int | None = field(default=None, metadata={"help": "optimizer steps; wins over num_epochs"})
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    lr_schedule: str = field(default="constant_with_warmup", metadata={"help": "a name that transformers.get_scheduler knows"})
    lr_options: str = field(default="{}", metadata={"help": "its scheduler_specific_kwargs"})
    warmup_steps: int = 100
    max_grad_norm: float | None = 100.0
    ema_decay: float = field(default=0.0, metadata={"help": "average the weights; the average is evaluated and saved; 0 is off"})
    mixed_precision: str = field(default="auto", metadata={"help": "no, bf16, fp16, or auto: bf16 where the hardware has it"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model's trunks"})
    kl_schedule: str = field(default="linear", metadata={"help": "constant, linear, sigmoid or cyclical, in optimizer steps"})
    kl_options: str = field(default='{"steps": 500}', metadata={"help": "its arguments"})
    objective: str = field(default="elbo", metadata={"help": "elbo, iwae or dreg"})
    objective_options: str = field(default="{}", metadata={"help": 'for example {"free_bits": 0.1}'})
    num_samples: int = field(default=1, metadata={"help": "posterior samples per row in training"})
    eval_every: int | None = field(default=None, metadata={"help": "steps between validations; by default an epoch"})
    patience: int | None = field(default=None, metadata={"help": "validations without improvement after which training stops"})
    importance_samples: int = field(default=100, metadata={"help": "per row, for the final log-likelihood; 0 leaves it out"})
    log_every: int = 50
    save_every: int = 500
    keep: int = field(default=2, metadata={"help": "checkpoints kept besides the best"})
    resume: str = field(default="auto", metadata={"help": "auto, never, or the path of a checkpoint"})
    tracker: str | None = field(default=None, metadata={"help": "tensorboard, trackio or wandb"})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    hub_token: str | None = field(default=None, metadata={"help": "by default that of `hf auth login` or HF_TOKEN"})

    def __post_init__(self) -> None:
        for name in ("lr_options", "kl_options", "objective_options"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else dict(value))
        for name, table in (("kl_schedule", SCHEDULES), ("objective", OBJECTIVES), ("lr_schedule", LR_SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: received {getattr(self, name)!r}, expected one of {sorted(table)}")
        if self.num_epochs is None and self.max_steps is None:
            raise ValueError("num_epochs and max_steps: received neither, expected one of them")
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = Path(self.output_dir).name
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id)


# Options that may differ when a run goes on: they change where and how it runs, not what it computes.
_FREE = {
    "accumulation", "compile", "eval_every", "hub_model_id", "hub_private", "hub_token", "importance_samples", "keep", "log_every",
    "num_workers", "output_dir", "push_to_hub", "resume", "save_every", "streaming", "tracker",
}  # fmt: skip


_PLACES = ("dataset", "output_dir")  # may be paths of this machine; the data set's name is told by itself


def parse(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Options from ``--config file.yaml`` and the command line, which wins.

    Arguments:
        types: dataclasses.
        argv: the command line; that of the process when None.

    Returns:
        One instance of each type.

    Raises:
        ValueError: an option that no type has, naming the nearest one.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), HfArgumentParser(types)
    parser.add_argument("--config", help="YAML file of options; the command line wins")
    known = [f.name for kind in types for f in fields(kind)]
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(options, dict):
            raise ValueError(f"{path}: received {type(options).__name__}, expected a mapping of options to values")
        for name in options:
            if name not in known:
                raise ValueError(f"{path}: unknown option {name!r}; the nearest one is {_nearest(name, known)!r}")
        parser.set_defaults(**options)
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        name = rest[0].partition("=")[0]
        raise ValueError(f"unknown option {name!r}; the nearest one is {'--' + _nearest(name.lstrip('-'), known)!r}")
    return tuple(parsed[: len(types)])


def _nearest(name: object, known: Sequence[str]) -> str:
    return difflib.get_close_matches(str(name), known, 1, 0.0)[0]


def precision(wanted: str) -> str:
    """The mixed precision to use: ``wanted``; for "auto" what ``accelerate launch`` asks for, else bf16 where the hardware has it.

    (Where it is emulated, it runs at 1 % of the speed.)
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted != "auto" or launched != "no":
        return launched if wanted == "auto" else wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no"


def start(args: RunArguments) -> Accelerator:
    """The accelerator of a run, with its tracker."""
    accelerator = Accelerator(mixed_precision=precision(args.mixed_precision), log_with=args.tracker, project_dir=args.output_dir)
    logging.basicConfig(format="%(message)s")  # others at WARNING: at INFO the Hub's client logs addresses, signatures included
    logging.getLogger("mmvae").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if args.tracker:
        flat = {name: value for name, value in asdict(args).items() if isinstance(value, int | float | str) and name not in _PLACES}
        accelerator.init_trackers("mmvae", config=public(flat))
    return accelerator


def track(accelerator: Accelerator, shown: Mapping[str, Tensor | str], step: int) -> None:
    """Hand what a person looks at to the trackers of a run.

    Arguments:
        accelerator: of :func:`start`.
        shown: by name, pictures (N, C, H, W) float in [0, 1], or Markdown.
        step: optimizer steps done.
    """
    accelerator.log({name: value for name, value in shown.items() if isinstance(value, str)}, step=step)
    pixels = {name: (255 * value).round().byte().movedim(1, -1).cpu().numpy() for name, value in shown.items() if isinstance(value, Tensor)}
    for tracker in accelerator.trackers:
        if pixels and tracker.name in ("tensorboard", "wandb"):
            tracker.log_images(pixels, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def vae_step(
    accelerator: Accelerator, model: torch.nn.Module, args: RunArguments, transform: Transform | None, **stepping: Any
) -> Callable:
    """The training step of a VAE: weigh, draw noise keyed by (seed, step, row), and update.

    Arguments:
        accelerator, model: prepared.
        args: schedule, objective, accumulation and clipping.
        transform: (batch, keys (B,)) -> batch, on the device.
        stepping: ``optimizer``, ``scheduler`` and ``ema`` of :func:`mmvae.training.update`.
    """
    beta = SCHEDULES[args.kl_schedule](**args.kl_options)
    objective = partial(OBJECTIVES[args.objective], **args.objective_options)

    def step(batch: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        share = accelerator.num_processes / batch["num_rows"]
        sums = dict.fromkeys(("neg_elbo_nats", "kl_nats", "reconstruction_nats"), 0.0)

        def losses(micro: dict[str, Tensor]) -> Tensor:
            key = fold(args.seed, n, micro["row"])
            micro = transform(micro, key) if transform else micro
            options = {"beta": beta(n), "num_samples": args.num_samples, "objective": objective, "noise_key": key}
            out = model(**model_inputs(model, micro), **options)
            for name, value in (("neg_elbo_nats", -out.elbo), ("kl_nats", out.kl), ("reconstruction_nats", -out.log_px)):
                sums[name] = sums[name] + (value.detach() * micro["row_weight"]).sum() * share
            return out.loss_rows

        options = {"accumulation": args.accumulation, "max_grad_norm": args.max_grad_norm}
        return update(accelerator, model, losses=losses, batch=batch, **options, **stepping) | sums | {"beta": beta(n)}

    return step


def train(
    accelerator: Accelerator,
    args: RunArguments,
    model: PreTrainedModel,
    loaders: Mapping[str, Any],
    *,
    transform: Transform | None = None,
    show: Callable[[PreTrainedModel, int], Mapping[str, Tensor | str]] | None = None,
) -> Result:
    """Train a VAE with fused AdamW; afterwards ``model`` holds the weights of the best validation -ELBO at weight 1.

    Arguments:
        accelerator: of :func:`start`.
        args: the options.
        model: not yet prepared.
        loaders: "train" and "validation".
        transform: (batch, keys (B,)) -> batch, on the device, in training and validation.
        show: called on the main process after every validation with the model, averaged weights included, and the step; what it
            returns goes to the trackers, see :func:`track`.
    """
    if args.compile:
        for trunk in (model.encoder, model.decoder):
            trunk.compile()  # in place: the keys of the state stay as they are
    if args.max_steps is None and loaders["train"].num_rows is None:
        raise ValueError("max_steps: received None with streaming, expected a number: how many steps an epoch of a stream has is not known")
    steps = args.max_steps or args.num_epochs * len(loaders["train"])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.adam_beta2), fused=True)
    options = {"num_warmup_steps": args.warmup_steps, "num_training_steps": steps, "scheduler_specific_kwargs": args.lr_options}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    scheduler = get_scheduler(args.lr_schedule, getattr(optimizer, "optimizer", optimizer), **options)
    ema = EMA(prepared, args.ema_decay) if args.ema_decay else None
    state = {"model": prepared, "optimizer": optimizer, "scheduler": scheduler} | ({"ema": ema} if ema else {})

    def validate() -> dict[str, float]:
        with ema.applied() if ema else contextlib.nullcontext():
            figures = evaluate_elbo(accelerator, prepared, loaders["validation"], seed=args.seed, transform=transform)
            if show is not None and accelerator.is_main_process:
                step = scheduler.last_epoch  # one per optimizer step, and right after a resume too
                unwrap(prepared).eval()
                track(accelerator, show(unwrap(prepared), step), step)
                unwrap(prepared).train()
        if figures["active_units"] == 0 and accelerator.is_main_process:
            logger.warning(
                "posterior collapse: no latent unit is active (KL %.3f nats); try free bits, a slower kl_schedule or more word dropout",
                figures["kl_nats"],
            )
        return figures

    step = vae_step(accelerator, prepared, args, transform, optimizer=optimizer, scheduler=scheduler, ema=ema)
    options = {name: value for name, value in asdict(args).items() if name not in _FREE} | {"mixed_precision": accelerator.mixed_precision}
    model.train()
    result = fit(
        accelerator, step, loaders["train"], state=state, folder=Path(args.output_dir) / "checkpoints", max_steps=steps,
        evaluate=validate, eval_every=args.eval_every, monitor="neg_elbo_nats", patience=args.patience, log_every=args.log_every,
        save_every=args.save_every, keep=args.keep, resume=args.resume, seed=args.seed,
        info={"config": json.loads(model.config.to_json_string()), "options": options},
    )  # fmt: skip
    load_weights(prepared, result.checkpoint)
    unwrap(prepared).eval()
    return result


def _without_place(word: str) -> str:
    """A word of a command line; of an absolute path outside the working and the home directory, only the last part."""
    name, equals, value = word.rpartition("=")
    path = Path(value)
    near = any(path.is_relative_to(folder) for folder in (Path.cwd(), Path.home()))
    return word if not path.is_absolute() or near else name + equals + path.name


def finish(
    accelerator: Accelerator,
    args: RunArguments,
    model: PreTrainedModel,
    processor: Any,
    result: Result,
    loaders: Mapping[str, Any],
    *,
    transform: Transform | None = None,
    draw: Callable[[PreTrainedModel, Path], Mapping[str, str]] | None = None,
) -> dict[str, float]:
    """Evaluate, and make the model folder: weights, processor, figures, ``metrics.json``, card; push it when asked.

    Arguments:
        accelerator, args, model, loaders, transform: as for :func:`train`; the "test" loader is evaluated where there is one.
        processor: saved with the model: an image processor or a tokenizer.
        result: of :func:`train`.
        draw: called with the model and the folder of figures; returns Markdown for the card by title.

    Returns:
        The figures.
    """
    split = "test" if "test" in loaders else "validation"
    model.eval()
    options = {"num_samples": args.importance_samples, "seed": args.seed, "transform": transform}
    figures = evaluate_vae(accelerator, model, loaders[split], **options)
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        curves([{k: v for k, v in line.items() if k != "epoch"} for line in result.history], folder / "figures" / "curves.png")
        sentences = draw(model, folder / "figures") if draw else {}
        told = {name: value for name, value in asdict(args).items() if not name.startswith("hub_") and name not in _PLACES}
        options = {"best_step": result.best_step, "parameters": model.num_parameters()} | told
        record = {"seconds": result.seconds, "dataset": args.dataset, "split": split, "hyperparameters": options}
        write_metrics(folder, figures, **record, argv=[_without_place(word) for word in sys.argv])
        write_card(folder, repo_id=args.hub_model_id, sentences=sentences)
        if args.push_to_hub:
            print("pushed to", push(folder, args.hub_model_id, private=args.hub_private, token=args.hub_token))
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
        print(f"model folder: {folder}   card: {folder / 'README.md'}   pictures: {folder / 'figures'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return figures
