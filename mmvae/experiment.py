"""What the recipes share: the VAE's training step, and what is left when a run is over.

``parse`` -> ``start`` -> the recipe builds data and model -> ``train`` -> ``finish``
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from mmvae.charts import curves
from mmvae.data import BadRow, ImageColumn, Loader, Rows
from mmvae.density_fitting import fit_densities, rows_to_fit
from mmvae.evaluation import Transform, evaluate_elbo, evaluate_vae, model_inputs
from mmvae.hub import push, write_card, write_metrics
from mmvae.nn import running_statistics
from mmvae.noise import fold
from mmvae.optimization import EMA, inner_optimizer, micro_batches, unwrap, update
from mmvae.options import RunArguments, parse
from mmvae.phases import begin, build_phases, check_objectives, check_reach, check_resets, part_of, phase_at
from mmvae.processes import keep_memory
from mmvae.processing import ImageVAEImageProcessor, load_tokenizer, train_tokenizer, vocabulary_size
from mmvae.record import public
from mmvae.snapshot import check_whole
from mmvae.training import Result, fit, load_weights

__all__ = [
    "RunArguments", "build_accelerator", "check_alone", "finish", "image_processor", "make_loaders", "make_tokenizer", "parse", "precision",
    "start", "track", "train", "vae_step",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Options that may differ when a run goes on: they change where and how it runs, not what it computes.
_FREE = {
    "accumulation", "allow_changes", "compile", "eval_every", "hub_model_id", "hub_private", "hub_token", "importance_samples", "keep",
    "log_every", "most_bad_rows", "num_workers", "output_dir", "push_to_hub", "resume", "save_every", "streaming", "tracker",
}  # fmt: skip
_PLACES = ("dataset", "output_dir", "resume", "vae")  # may be paths of this machine; the data set's name is told by itself


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


def build_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """An accelerator at the precision that :func:`precision` gives. On a CPU the process keeps the memory that it frees.

    Raises:
        ValueError: the launch configuration shares the weights out, as FSDP does, which the recipes do not support.
    """
    accelerator = Accelerator(mixed_precision=precision(mixed_precision), **options)
    check_whole(accelerator)
    if accelerator.device.type == "cpu":
        keep_memory()
    return accelerator


def check_alone(accelerator: Accelerator) -> None:
    """Refuse several processes, which a recipe has no use for: ValueError."""
    if accelerator.num_processes > 1:
        raise ValueError(f"num_processes: received {accelerator.num_processes}, expected 1")


def start(args: RunArguments) -> Accelerator:
    """The accelerator of a run, with its tracker."""
    accelerator = build_accelerator(args.mixed_precision, log_with=args.tracker, project_dir=args.output_dir)
    logging.basicConfig(format="%(message)s")  # others at WARNING: at INFO the Hub's client logs addresses, signatures included
    logging.getLogger("mmvae").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if args.tracker:
        flat = {name: value for name, value in _told(args).items() if isinstance(value, int | float | str)}
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


def make_loaders(accelerator: Accelerator, args: RunArguments, rows: Mapping[str, Rows]) -> dict[str, Loader]:
    """Batches of every split for this process; those of "train" in an order that the seed gives.

    Bad rows that were left out are listed in ``bad_rows.txt`` of the output folder, but for those that a stream meets later.

    Raises:
        BadRow: there are more of them in a split than ``most_bad_rows`` allows; one in a split is always allowed.
    """
    told = [f"{split}: {why}\n" for split, part in rows.items() for _, why in sorted(part.bad.items())]
    if told and args.on_bad_row == "skip" and accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "bad_rows.txt").write_text("".join(told), encoding="utf-8")
    check_bad_rows(args, rows)
    for split, part in rows.items():
        if counts := part.num_present():
            logger.info("%s: %d rows, %s", split, part.num_rows, ", ".join(f"{name} {count}" for name, count in counts.items()))
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return {split: Loader(part, args.batch_size, shuffle=split == "train", seed=args.seed, **place) for split, part in rows.items()}


def check_bad_rows(args: Any, rows: Mapping[str, Rows]) -> None:
    """Refuse splits of which more was left out than ``args.most_bad_rows`` allows: BadRow."""
    for split, part in rows.items() if args.on_bad_row == "skip" else ():
        if part.num_rows and len(part.bad) > max(1, args.most_bad_rows * (part.num_rows + len(part.bad))):
            expected = f"expected at most {args.most_bad_rows:.1%} (--most_bad_rows); the first: {next(iter(part.bad.values()))}"
            raise BadRow(f"{args.dataset}, {split}: got {len(part.bad)} bad rows beside {part.num_rows} good ones, {expected}")


def image_processor(column: ImageColumn) -> ImageVAEImageProcessor:
    """The processor that makes of a picture what the column makes of it."""
    size = dict(zip(("height", "width"), column.image_size, strict=True))
    return ImageVAEImageProcessor(size=size, num_channels=column.num_channels, background=column.background, resize_mode=column.resize)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> tuple[PreTrainedTokenizerBase, dict[str, int]]:
    """A tokenizer trained on texts ("whitespace", "bpe") or loaded by id or path, and what a TextVAEConfig wants to know of it."""
    made = train_tokenizer(texts, kind, vocab_size) if kind in ("whitespace", "bpe") else load_tokenizer(kind)
    ids = {name: getattr(made, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")}
    unknown = ids["pad_token_id"] if ids["unk_token_id"] is None else ids["unk_token_id"]
    return made, ids | {"unk_token_id": unknown, "vocab_size": vocabulary_size(made)}


def _figures(out: Any) -> dict[str, Tensor]:
    """What is logged of the output of a VAE, or of one with a head, (B,) each."""
    told = {} if out.get("cross_entropy") is None else {"cross_entropy_nats": out.cross_entropy}
    return told if out.elbo is None else {"neg_elbo_nats": -out.elbo, "kl_nats": out.kl, "reconstruction_nats": -out.log_px} | told


def try_phases(model: PreTrainedModel, args: RunArguments, batch: Mapping[str, Tensor], transform: Transform | None) -> None:
    """Try the objective of every later phase on a batch, so that one that does not fit the model is refused before any work is lost.

    Raises:
        ValueError: what the objective says.
    """
    keys = fold(args.seed, batch["row"])
    batch = transform(dict(batch), keys) if transform else batch
    with torch.no_grad(), torch.random.fork_rng(), running_statistics(model.train()):  # in training the aggregation may be another one
        for phase in build_phases(vars(args), args.phases)[1:]:
            model(**model_inputs(model, batch), num_samples=phase.num_samples, objective=phase.objective, noise_key=keys)


def vae_step(
    accelerator: Accelerator, model: torch.nn.Module, args: RunArguments, transform: Transform | None, **stepping: Any
) -> Callable:
    """The training step of a VAE, with a head or without: weigh as the phase says, draw noise keyed by (seed, step, row), and update.

    Arguments:
        accelerator, model: prepared.
        args: phases, accumulation and clipping; shares of a run are steps already (:meth:`RunArguments.in_steps`).
        transform: (batch, keys (B,)) -> batch, on the device.
        stepping: ``optimizer``, ``scheduler`` and ``ema`` of :func:`mmvae.training.update`.
    """
    phases = build_phases(vars(args), args.phases)

    def step(batch: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        phase = phase_at(phases, n)
        beta, part = phase.beta(n), phase.part(n)
        if n == phase.start:
            begin(phase, model, stepping["optimizer"], args.seed, stepping.get("ema"))
        share = accelerator.num_processes / batch["num_rows"]
        sums: dict[str, Tensor] = {}

        def losses(micro: dict[str, Tensor]) -> Tensor:
            key = fold(args.seed, n, micro["row"])
            micro = transform(micro, key) if transform else micro
            options = {"beta": beta, "num_samples": phase.num_samples, "objective": phase.objective, "noise_key": key}
            out = model(**model_inputs(model, micro), **options)
            for name, value in _figures(out).items():
                sums[name] = sums.get(name, 0.0) + (value.detach() * micro["row_weight"]).sum() * share
            return out.loss_rows

        options = {"accumulation": args.accumulation, "max_grad_norm": args.max_grad_norm}
        options |= {} if part == "all" else {"trained": part_of(model, part)}
        return update(accelerator, model, losses=losses, batch=batch, **options, **stepping) | sums | {"beta": beta}

    return step


def train(
    accelerator: Accelerator,
    args: RunArguments,
    model: PreTrainedModel,
    loaders: Mapping[str, Any],
    *,
    transform: Transform | None = None,
    show: Callable[[PreTrainedModel, int], Mapping[str, Tensor | str]] | None = None,
    measure: Callable[..., Mapping[str, float]] = evaluate_elbo,
) -> Result:
    """Train a VAE with fused AdamW; afterwards ``model`` holds the weights of the best validation.

    The best has the least ``args.monitor``: by default -ELBO at weight 1, whatever weights the objective trains with.

    Arguments:
        accelerator: of :func:`start`.
        args: the options.
        model: not yet prepared.
        loaders: "train" and "validation".
        transform: (batch, keys (B,)) -> batch, on the device, in training and validation.
        show: called on the main process after every validation with the model, averaged weights included, and the step; what it
            returns goes to the trackers, see :func:`track`.
        measure: gives the figures of a validation, called as :func:`mmvae.evaluation.evaluate_elbo` is; ``args.monitor`` is one of them.
    """
    if len(args.phases) > 1:
        batch = next(loaders["train"].batches(0))
        try_phases(model, args, next(micro_batches(batch, max(1, len(batch["row"]) // 2))), transform)  # on two rows
    if args.compile:
        for trunk in (model.base_model.encoder, model.base_model.decoder):
            trunk.compile()  # in place: the keys of the state stay as they are
    if args.max_steps is None and loaders["train"].num_rows is None:
        raise ValueError("max_steps: received None with streaming, expected a number: how many steps an epoch of a stream has is not known")
    steps = args.num_epochs * len(loaders["train"]) if args.max_steps is None else args.max_steps
    args = args.in_steps(steps)  # so a longer run whose shares are more steps is told as another one
    phases = build_phases(vars(args), args.phases)
    check_resets(phases, model), check_objectives(phases, model), check_reach(phases, model, steps)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.adam_beta2), fused=True)
    options = {"num_warmup_steps": args.warmup_steps, "num_training_steps": steps, "scheduler_specific_kwargs": args.lr_options}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    scheduler = get_scheduler(args.lr_schedule, inner_optimizer(optimizer), **options)
    ema = EMA(prepared, args.ema_decay) if args.ema_decay else None
    state = {"model": prepared, "optimizer": optimizer, "scheduler": scheduler} | ({"ema": ema} if ema else {})

    def validate() -> dict[str, float]:
        with ema.applied() if ema else contextlib.nullcontext():
            figures = measure(accelerator, prepared, loaders["validation"], seed=args.seed, transform=transform)
            if show is not None and accelerator.is_main_process:
                step = scheduler.last_epoch  # one per optimizer step, and right after a resume too
                unwrap(prepared).eval()
                track(accelerator, show(unwrap(prepared), step), step)
                unwrap(prepared).train()
        now, end = (phase_at(phases, n).beta(n) for n in (max(scheduler.last_epoch - 1, 0), steps - 1))
        annealed = now >= 0.99 * end  # before that, an unused latent may still come into use
        if figures.get("active_units") == 0 and annealed and accelerator.is_main_process:
            logger.warning(
                "posterior collapse at step %d: no latent unit is active (KL %.3f nats); try free bits, a slower kl_schedule or more "
                "word dropout",
                scheduler.last_epoch,
                figures["kl_nats"],
            )
        return figures

    step = vae_step(accelerator, prepared, args, transform, optimizer=optimizer, scheduler=scheduler, ema=ema)
    options = {name: value for name, value in asdict(args).items() if name not in _FREE} | {"mixed_precision": accelerator.mixed_precision}
    info = {"config": json.loads(model.config.to_json_string()), "options": options}
    if loaders["validation"] is not None:
        info["validation"] = loaders["validation"].fingerprint
    model.train()
    result = fit(
        accelerator, step, loaders["train"], state=state, folder=Path(args.output_dir) / "checkpoints", max_steps=steps,
        evaluate=validate, eval_every=args.eval_every, monitor=None if args.monitor == "last" else args.monitor,
        patience=args.patience, patience_from=phases[-1].start, log_every=args.log_every, save_every=args.save_every, keep=args.keep,
        resume=args.resume, seed=args.seed, allow_changes=args.allow_changes, info=info,
    )  # fmt: skip
    load_weights(prepared, result.checkpoint)
    unwrap(prepared).eval()
    return result


def _told(args: RunArguments) -> dict[str, Any]:
    """The options that metrics and trackers are told: not where things lie on this machine or go on the Hub."""
    return {name: value for name, value in asdict(args).items() if not name.startswith("hub_") and name not in _PLACES}


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
    densities: Mapping[str, Mapping[str, Any]] | None = None,
    measure: Callable[..., Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Evaluate, fit densities, and make the model folder: weights, processor, figures, ``metrics.json``, card; push it when asked.

    Arguments:
        accelerator, args, model, loaders, transform: as for :func:`train`; the "test" loader is evaluated where there is one.
        processor: saved with the model: an image processor or a tokenizer.
        result: of :func:`train`.
        draw: called with the model and the folder of figures; returns Markdown for the card by title.
        densities: options of :func:`mmvae.density_fitting.fit_densities`; None fits none.
        measure: gives the figures, called as :func:`mmvae.evaluation.evaluate_elbo` is; :func:`mmvae.evaluation.evaluate_vae` when None.

    Returns:
        The figures.
    """
    split = "test" if "test" in loaders else "validation"
    model.eval()
    measure = measure or partial(evaluate_vae, num_samples=args.importance_samples)
    figures = measure(accelerator, model, loaders[split], seed=args.seed, transform=transform)
    if densities:
        seen = rows_to_fit(loaders["train"].rows, args.batch_size, args.seed)  # the same on every rank
        seen = ((transform(batch, fold(args.seed, batch["row"])) if transform else batch) for batch in seen)
        fits = fit_densities(model, seen, densities, seed=args.seed)
        figures |= {name: value for name, value in fits.items() if "held_out_log" in name}
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        curves([{k: v for k, v in line.items() if k != "epoch"} for line in result.history], folder / "figures" / "curves.png")
        sentences = draw(model, folder / "figures") if draw else {}
        options = {"best_step": result.best_step or result.step, "parameters": model.num_parameters()} | _told(args)
        options |= {"mixed_precision": accelerator.mixed_precision}  # what "auto" became
        record = {"seconds": result.seconds, "dataset": args.dataset, "split": split, "hyperparameters": options}
        write_metrics(folder, figures, **record)
        write_card(folder, repo_id=args.hub_model_id, sentences=sentences)
        if args.push_to_hub:
            print("pushed to", push(folder, args.hub_model_id, private=args.hub_private, token=args.hub_token))
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
        print(f"model folder: {folder}   card: {folder / 'README.md'}   pictures: {folder / 'figures'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return figures
