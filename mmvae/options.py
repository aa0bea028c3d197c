"""Options of the recipes: checked when they are made, before any data is read; from a YAML file and the command line."""

import contextlib
import copy
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from transformers import HfArgumentParser, SchedulerType

from mmvae.data.rows import ON_BAD_ROW
from mmvae.hub import check_repo_id
from mmvae.models.configuration import VAEConfig
from mmvae.models.inherited import nearest
from mmvae.objectives import OBJECTIVES
from mmvae.phases import build_phases
from mmvae.schedules import SCHEDULES, in_steps

LR_SCHEDULES = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}  # these step on a metric, not on a step


@dataclass
class RunArguments:
    """Options of every recipe. Options that take options are JSON on the command line and mappings in a config file."""

    dataset: str = field(default="sprites:5", metadata={"help": "Hub id, local folder or file, or sprites:LEVEL[:ROWS[:SHAPE]] (built in)"})
    output_dir: str = field(default="outputs/run", metadata={"help": "the model folder; checkpoints/ lies inside"})
    streaming: bool = field(default=False, metadata={"help": "read rows as they are needed: sets larger than memory or disk"})
    max_length: int = field(default=512, metadata={"help": "most tokens in a row, BOS and EOS included"})
    truncate: bool = field(default=False, metadata={"help": "cut longer rows instead of refusing them"})
    on_bad_row: str = field(default="skip_empty", metadata={"help": "error, skip_empty: leave out rows without any modality, or skip"})
    most_bad_rows: float = field(default=0.01, metadata={"help": "share of bad rows, more than one, beyond which --on_bad_row skip stops"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode pictures, once where they fit in memory"})
    seed: int = 0
    batch_size: int = field(default=128, metadata={"help": "rows of one optimizer step over all processes and accumulation steps"})
    accumulation: int = field(default=1, metadata={"help": "micro-batches that a step is split into, to save memory"})
    num_epochs: int | None = None
    max_steps: int | None = field(default=None, metadata={"help": "optimizer steps; wins over num_epochs"})
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    lr_schedule: str = field(default="constant_with_warmup", metadata={"help": "a name that transformers.get_scheduler knows"})
    lr_options: str = field(default="{}", metadata={"help": "its scheduler_specific_kwargs; steps may be a share, 0.2 of the run's"})
    warmup_steps: int = 100
    max_grad_norm: float | None = field(default=100.0, metadata={"help": "clip the gradient to this norm; null in a config file: never"})
    ema_decay: float = field(default=0.0, metadata={"help": "average the weights; the average is evaluated and saved; 0 is off"})
    mixed_precision: str = field(default="auto", metadata={"help": "no, bf16, fp16, or auto: bf16 where the hardware has it"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model's trunks"})
    kl_schedule: str = field(default="linear", metadata={"help": "constant, linear, sigmoid or cyclical, in optimizer steps"})
    kl_options: str = field(default='{"steps": 500}', metadata={"help": "its arguments; steps may be a share, 0.2 of the run's"})
    objective: str = field(default="elbo", metadata={"help": "elbo, capacity, iwae, dreg; of joint models also mvae, jmvae, mvtcae, mmvm"})
    objective_options: str = field(default="{}", metadata={"help": 'for example {"free_bits": 0.1}'})
    num_samples: int = field(default=1, metadata={"help": "posterior samples per row in training"})
    phases: str = field(default="[]", metadata={"help": "parts of the run that differ in these four, or train or reset a part: phases.py"})
    eval_every: int | None = field(default=None, metadata={"help": "steps between validations; by default an epoch"})
    monitor: str = field(default="neg_elbo_nats", metadata={"help": "validation figure whose least value decides what is kept; or last"})
    patience: int | None = field(default=None, metadata={"help": "validations without improvement after which training stops"})
    importance_samples: int = field(default=100, metadata={"help": "per row, for the final log-likelihood; 0 leaves it out"})
    log_every: int = 50
    save_every: int = 500
    keep: int = field(default=2, metadata={"help": "checkpoints kept besides the best"})
    resume: str = field(default="auto", metadata={"help": "auto, the path of a checkpoint, or never: the folder must have none"})
    allow_changes: list[str] = field(default_factory=list, metadata={"help": "what a resumed run may have otherwise: names of its refusal"})
    tracker: str | None = field(default=None, metadata={"help": "tensorboard, trackio or wandb"})
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    hub_token: str | None = field(default=None, metadata={"help": "by default that of `hf auth login` or HF_TOKEN"})

    monitors: ClassVar[tuple[str, ...]] = ("neg_elbo_nats", "reconstruction_nats", "kl_nats", "last")
    refused: ClassVar[Mapping[str, str]] = {}
    """Options that keep their default because a recipe cannot serve them, and why; of "on_bad_row" it is "skip" that is refused."""

    def __post_init__(self) -> None:
        for name, table in (("kl_schedule", SCHEDULES), ("objective", OBJECTIVES), ("lr_schedule", LR_SCHEDULES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: received {getattr(self, name)!r}, expected one of {sorted(table)}")
        default = {f.name: f.default for f in fields(self)}
        for of, name in (("lr_schedule", "lr_options"), ("kl_schedule", "kl_options"), ("objective", "objective_options")):
            given = mapping(name, getattr(self, name))
            meant_for_another = getattr(self, of) != default[of] and given == mapping(name, default[name])
            setattr(self, name, {} if meant_for_another else given)
        self._check_schedule(default["warmup_steps"])
        self.phases = sequence("phases", self.phases)
        build_phases(vars(self), self.phases)  # checks the values
        if self.num_epochs is None and self.max_steps is None:
            raise ValueError("num_epochs and max_steps: received neither, expected one of them")
        if self.monitor not in self.monitors:
            raise ValueError(f"monitor: received {self.monitor!r}, expected one of {', '.join(self.monitors)}")
        if self.monitor == "last" and self.patience is not None:
            raise ValueError(f"patience: received {self.patience} with monitor 'last', expected a figure to watch, or None")
        for name in _COUNTS:
            value, least = getattr(self, name), 0 if name in ("importance_samples", "warmup_steps") else 1
            whole = "" if isinstance(value, int) else " and whole"
            if value is not None and (whole or value < least):
                raise ValueError(f"{name}: received {value}, expected at least {least}{whole}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: received {value}, expected a finite number")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm: received {self.max_grad_norm}, expected above 0, or null (None) to clip nothing")
        for name, why in self.refused.items():
            value, expected = getattr(self, name), default[name]
            wrong = value != expected
            if name == "on_bad_row":
                wrong, expected = value == "skip", "'error' or 'skip_empty'"
            if wrong:
                raise ValueError(f"{name}: received {value!r}, expected {expected}: {why}")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row: received {self.on_bad_row!r}, expected one of {', '.join(ON_BAD_ROW)}")
        if not 0 <= self.most_bad_rows <= 1:
            raise ValueError(f"most_bad_rows: received {self.most_bad_rows}, expected a share in [0, 1]")
        if self.push_to_hub and self.hub_model_id is None:
            self.hub_model_id = Path(self.output_dir).name
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id)

    def _check_schedule(self, default_warmup: int) -> None:
        """Refuse what `transformers.get_scheduler` would leave out without a word."""
        if self.lr_schedule in ("constant", "constant_with_warmup") and self.lr_options:
            raise ValueError(f"lr_options: received {self.lr_options} with lr_schedule {self.lr_schedule!r}, which has none, expected {{}}")
        if self.lr_schedule == "constant" and self.warmup_steps not in (0, default_warmup):
            expected = "expected 0, or lr_schedule 'constant_with_warmup'"
            raise ValueError(f"warmup_steps: received {self.warmup_steps} with lr_schedule 'constant', {expected}")

    @property
    def rows(self) -> dict[str, Any]:
        """What they say of how rows are read: options of `mmvae.data.Rows`."""
        most = {"most_bad": self.most_bad_rows} if self.on_bad_row == "skip" else {}
        return {"name": self.dataset, "on_bad_row": self.on_bad_row, "num_workers": self.num_workers} | most

    def in_steps(self, steps: int) -> Self:
        """These options with every share of a run of ``steps`` as a number of steps; see :func:`mmvae.schedules.in_steps`."""
        told = copy.copy(self)
        told.lr_options, told.kl_options = in_steps(self.lr_options, steps), in_steps(self.kl_options, steps)
        told.phases = [
            {k: in_steps(v, steps) if k == "kl_options" else v for k, v in in_steps(phase, steps).items()} for phase in self.phases
        ]
        return told

    def suit_prior(self, prior: str, latent_dim: int, components: int = VAEConfig.prior_components) -> None:
        """Default free bits per dimension become as many per row where the prior is no normal: a mixture's KL has no dimensions.

        Raises:
            ValueError: for free bits per dimension or unit that were asked for, and for components of a prior that has none.
        """
        if components != VAEConfig.prior_components and prior not in ("mixture", "vamp"):
            raise ValueError(f"prior_components: received {components} with prior {prior!r}, expected a mixture or vamp prior")
        options = self.objective_options
        floor = options.get("free_bits", 0.0)
        floors = floor if isinstance(floor, Mapping) else {options.get("free_bits_per", "dimension"): floor}
        if prior in ("standard_normal", "learned_normal") or {group for group, nats in floors.items() if nats} <= {"row", "batch"}:
            return
        if options != mapping("objective_options", type(self).objective_options):
            raise ValueError(f"objective_options: received {options} with prior {prior!r}, expected free_bits_per 'row' or 'batch'")
        self.objective_options = {"free_bits": latent_dim * options["free_bits"], "free_bits_per": "row"}


def suited_pose(pose: str, dataset: str) -> str:
    """A picture's pose as it was asked for; "auto" is that of the built-in sprites, one object on a plain background, and else "none"."""
    return pose if pose != "auto" else "rotation+shift" if dataset.split(":")[0] == "sprites" else "none"


def suited_label(label: str | None, dataset: str) -> str | None:
    """The column of the classes as it was asked for; of the built-in sprites, which have several, else their shape."""
    return label or ("shape" if dataset.split(":")[0] == "sprites" else None)


def mapping(name: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    """An option that takes options, from JSON or as it is.

    Raises:
        ValueError: naming the option, when it is no mapping, or has a number that is a text.
    """
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"""{name}: received {value!r}, expected a mapping, for example '{{"steps": 500}}'""")
    for key, item in value.items():
        if isinstance(item, str) and _is_number(item):
            raise ValueError(f"{name}: received the text {item!r} as {key}, expected a number (YAML reads 1e-2 as text, 1.0e-2 as one)")
    return dict(value)


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def sequence(name: str, value: str | Sequence[Any]) -> list[Any]:
    """An option that is a list, from JSON or as it is; raises ValueError, naming the option, when it is none."""
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name}: received {value!r}, expected a list")
    return list(value)


def parse_modalities(text: str, kinds: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Modalities from ``name:kind[:column]``, separated by commas.

    Arguments:
        text: the option.
        kinds: that there are.

    Returns:
        Kind, and column where it is given, by name, in their order.

    Raises:
        ValueError: naming what is of another form, an unknown kind, or a name given twice.

    Example:
        >>> parse_modalities("photo:image,en:text:english", ["image", "text"])
        {'photo': ('image', None), 'en': ('text', 'english')}
    """
    found: dict[str, tuple[str, str | None]] = {}
    for item in text.split(","):
        name, *rest = item.strip().split(":")
        if not 1 <= len(rest) <= 2 or rest[0] not in kinds or name in found:
            raise ValueError(f"modalities: received {item!r}, expected different name:kind or name:kind:column, kind one of {list(kinds)}")
        found[name] = rest[0], rest[1] if len(rest) == 2 else None
    return found


def with_columns(kinds: Mapping[str, tuple[str, str | None]], columns: Mapping[str, str | None]) -> dict[str, tuple[str, str | None]]:
    """Modalities of :func:`parse_modalities`, with a column for the only one of a kind.

    Arguments:
        kinds: kind and column, by name.
        columns: by kind, each that of the option ``<kind>_column``; None where it is not given.

    Raises:
        ValueError: for a column of a kind of which there are several modalities or none, or of one that has a column.

    Example:
        >>> with_columns({"photo": ("image", None), "en": ("text", "english")}, {"image": "picture", "text": None})
        {'photo': ('image', 'picture'), 'en': ('text', 'english')}
    """
    found = dict(kinds)
    for kind, column in ((kind, column) for kind, column in columns.items() if column is not None):
        fitting = [f"{name}:{of}" + (f":{given}" if given else "") for name, (of, given) in kinds.items() if of == kind]
        if len(fitting) != 1 or fitting[0].count(":") > 1:
            expected = f"expected one {kind} modality without a column; or name columns in modalities, as name:{kind}:column"
            raise ValueError(f"{kind}_column: received {column!r} with the {kind} modalities {fitting}, {expected}")
        found[fitting[0].partition(":")[0]] = kind, column
    return found


def by_name(option: str, value: str | Mapping[str, Any], kinds: Mapping[str, str], known: Iterable[str]) -> dict[str, Any]:
    """An option that is given by modality, or for all modalities of a kind.

    Arguments:
        option: its name, for the error.
        value: JSON or a mapping; a modality's name wins over its kind.
        kinds: of the modalities.
        known: the kinds that there are.

    Returns:
        Values by modality; those without one are left out.

    Raises:
        ValueError: for a key that is neither a modality nor a kind.

    Example:
        >>> by_name("weights", {"text": 10, "de": 5}, {"en": "text", "de": "text"}, ["image", "text"])
        {'en': 10, 'de': 5}
    """
    given = mapping(option, value)
    for key in given.keys() - kinds.keys() - set(known):
        raise ValueError(f"{option}: received {key!r}, expected a modality, {list(kinds)}, or a kind, {list(known)}")
    return {name: given[name if name in given else kind] for name, kind in kinds.items() if name in given or kind in given}


_COUNTS = (
    "max_steps", "num_epochs", "batch_size", "accumulation", "log_every", "save_every", "keep", "num_samples", "eval_every",
    "importance_samples", "warmup_steps", "patience",
)  # fmt: skip


def parse(*types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Options from ``--config file.yaml``, of several of which later ones win, and the command line, which wins over all.

    Arguments:
        types: dataclasses.
        argv: the command line; that of the process when None.

    Returns:
        One instance of each type.

    Raises:
        ValueError: an option that no type has, naming the nearest one.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), HfArgumentParser(types)
    parser.add_argument("--config", action="append", default=[], help="YAML file of options; later ones win, the command line over all")
    known = [f.name for kind in types for f in fields(kind)]
    for path in parser.parse_known_args(argv)[0].config:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(options, dict):
            raise ValueError(f"{path}: received {type(options).__name__}, expected a mapping of options to values")
        for name in options:
            if name not in known:
                raise ValueError(f"{path}: unknown option {name!r}; the nearest one is {nearest(str(name), known)!r}")
        parser.set_defaults(**options)
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        name = rest[0].partition("=")[0]
        raise ValueError(f"unknown option {name!r}; the nearest one is {'--' + nearest(name.lstrip('-'), known)!r}")
    return tuple(parsed[: len(types)])
