r"""Phases of a training run: each has an objective, a schedule that counts from its first step, parts that it trains, and an end.

A run without phases is one phase. With them each overrides what the run says:

    phases:
    - {steps: 0.3, kl_schedule: constant, kl_options: {weight: 0}}    # an autoencoder first, for a share of the run
    - {reset: generation, kl_options: {steps: 0.6}, objective_options: {free_bits: 0.25}}   # then a new decoder; 4000 is steps

Which phase a step belongs to, and which parts it trains, are functions of the step alone, so that a run may stop anywhere. Parts are
"inference", the modules that make q(z|x), "generation", all others, and "all". ``{"inference": 10, "all": 1}`` trains ten steps
of the one, one step of the other, and begins again: the fixed form of aggressive training.

References:
    He et al. (2019), Lagging inference networks and posterior collapse, https://arxiv.org/abs/1901.05534 (aggressive training)
    Li et al. (2019), A surprisingly effective fix for deep latent variable modeling of text, https://arxiv.org/abs/1909.00868
        (autoencoder first, then a new decoder and free bits)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mmvae.models.configuration import bind
from mmvae.noise import fold
from mmvae.objectives import OBJECTIVES, Objective, check_options, mmvm
from mmvae.optimization import EMA, inner_optimizer, unwrap
from mmvae.schedules import SCHEDULES, Schedule

PARTS = ("inference", "generation", "all")
_OPTIONS = {"steps", "kl_schedule", "kl_options", "objective", "objective_options", "num_samples", "trained", "reset"}
_RESET = 0x72657365  # keeps the new weights' random numbers apart from the noise of the step


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        start: its first step.
        schedule: steps since then -> weight of the divergence.
        objective: (terms, beta) -> (B,) nats.
        num_samples: posterior samples per row.
        trained: what one step after the other trains, again and again; each of ``PARTS``.
        reset: of ``PARTS``, what its first step gives new weights; None for nothing.
    """

    start: int
    schedule: Schedule
    objective: Objective
    num_samples: int = 1
    trained: tuple[str, ...] = ("all",)
    reset: str | None = None

    def beta(self, step: int) -> float:
        """Weight of the divergence at a step of the run."""
        return self.schedule(step - self.start)

    def part(self, step: int) -> str:
        """What a step of the run trains."""
        return self.trained[(step - self.start) % len(self.trained)]


def build_phases(run: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """Phases from what a configuration says.

    Arguments:
        run: ``kl_schedule``, ``kl_options``, ``objective``, ``objective_options`` and ``num_samples`` of phases that do not say.
        phases: options of each, those of ``run`` and ``steps``, ``trained`` and ``reset``; the last has no ``steps``. Empty: one phase.
            Shares of a run become steps by :func:`mmvae.schedules.in_steps` before.

    Raises:
        ValueError: naming the phase, the option, what it was and what was expected.
    """
    built, start, told = [], 0, phases or [{}]
    for number, given in enumerate(told):
        last, where = number == len(told) - 1, f"phases[{number}]." if phases else ""
        if not isinstance(given, Mapping) or given.keys() - _OPTIONS:
            raise ValueError(f"phases[{number}]: received {given!r}, expected a mapping with some of {sorted(_OPTIONS)}")
        steps = given.get("steps")
        if last and steps is not None:
            raise ValueError(f"{where}steps: received {steps!r}, expected none for the last phase, which goes on to the end")
        if not last and not _is_length(steps):
            raise ValueError(f"{where}steps: received {steps!r}, expected a whole number from 1 on, or a share of the run below 1.0")
        built.append(_phase(where, start, {**_inherited(run, given), **given}))
        start += steps or 0
    if (shares := sum(given["steps"] for given in told[:-1] if isinstance(given["steps"], float))) >= 1:
        raise ValueError(f"phases: received steps that are {shares:g} of the run, expected less than 1")
    return built


def _is_length(steps: object) -> bool:
    return steps >= 1 if isinstance(steps, int) else isinstance(steps, float) and 0 < steps < 1


def _inherited(run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a phase takes from the run: options of a schedule or objective only where it has the same one."""
    same = {of: given.get(of, run[of]) == run[of] for of in ("kl_schedule", "objective")}
    options = {"kl_options": "kl_schedule", "objective_options": "objective"}
    return {**run, **{name: run[name] if same[of] else {} for name, of in options.items()}}


def _phase(where: str, start: int, options: Mapping[str, Any]) -> Phase:
    for name, table in (("kl_schedule", SCHEDULES), ("objective", OBJECTIVES)):
        if options[name] not in table:
            raise ValueError(f"{where}{name}: received {options[name]!r}, expected one of {sorted(table)}")
    schedule, objective = SCHEDULES[options["kl_schedule"]], OBJECTIVES[options["objective"]]
    bind(f"{where}kl_options", schedule, options["kl_options"])
    bind(f"{where}objective_options", objective, options["objective_options"], given=("terms", "beta"))
    check_options(f"{where}objective_options", options["objective_options"])
    try:
        schedule = schedule(**options["kl_options"])
    except ValueError as error:
        raise ValueError(f"{where}kl_options: {error}") from None
    if not isinstance(options["num_samples"], int) or options["num_samples"] < 1:
        raise ValueError(f"{where}num_samples: received {options['num_samples']!r}, expected at least 1")
    trained, reset = options.get("trained", "all"), options.get("reset")
    counts = trained if isinstance(trained, Mapping) else {trained: 1}
    for part, count in counts.items():
        if part not in PARTS or not isinstance(count, int) or count < 1:
            raise ValueError(f"{where}trained: received {trained!r}, expected one of {PARTS}, or steps of each by name")
    if reset not in (None, *PARTS):
        raise ValueError(f"{where}reset: received {reset!r}, expected one of {PARTS}, or none")
    cycle = tuple(part for part, count in counts.items() for _ in range(count))
    bound = partial(objective, **options["objective_options"])
    return Phase(start, schedule, bound, options["num_samples"], cycle, reset)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase that a step belongs to."""
    return next((now for now, then in pairwise(phases) if step < then.start), phases[-1])


def part_of(model: nn.Module, part: str) -> set[str]:
    """Names of the parameters that belong to a part; to "inference" those of the ``inference_modules`` of every VAE inside."""
    return _of_part([name for name, _ in unwrap(model).named_parameters()], model, part)


def _of_part(names: Iterable[str], model: nn.Module, part: str) -> set[str]:
    holders = [(f"{name}." if name else "", getattr(module, "inference_modules", ())) for name, module in unwrap(model).named_modules()]
    inside = tuple(f"{prefix}{child}." for prefix, children in holders for child in children)
    inference = {name for name in names if f"{name}.".startswith(inside)}
    return {"inference": inference, "generation": {*names} - inference, "all": {*names}}[part]


def check_resets(phases: Sequence[Phase], model: nn.Module) -> None:
    """Refuse a new decoder whose embedding is the encoder's, too, which is to be kept, and new weights for what is frozen: ValueError."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for phase in phases:
        if phase.reset and (stuck := sorted(frozen & part_of(model, phase.reset))):
            raise ValueError(f"reset: received {phase.reset!r}, of which {stuck[0]} is frozen, expected a part that is trained afterwards")
    shared = any(getattr(getattr(module, "config", None), "share_embeddings", False) for module in model.modules())
    if shared and any(phase.reset == "generation" for phase in phases):
        raise ValueError("reset: received 'generation' with share_embeddings, expected an encoder with an embedding of its own")


def check_objectives(phases: Sequence[Phase], model: nn.Module) -> None:
    """Refuse mmvm of one modality without a divergence from the prior, which is none at all: ValueError."""
    alone = len(getattr(getattr(model, "base_model", model), "vaes", ("itself",))) < 2
    if alone and any(phase.objective.func is mmvm and not phase.objective.keywords.get("prior_weight") for phase in phases):
        raise ValueError(
            "objective: received 'mmvm' with prior_weight 0 for one modality, so no divergence at all, expected more of either"
        )


def check_reach(phases: Sequence[Phase], model: nn.Module, steps: int) -> None:
    """Refuse phases that begin when a run of so many steps is over, and those that train or reset nothing: ValueError."""
    if phases[-1].start >= steps:
        raise ValueError(f"phases: received a last one from step {phases[-1].start} on, expected one before the run's end at {steps}")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for number, phase in enumerate(phases):
        for part in {*phase.trained, phase.reset} - {None}:
            if trainable.isdisjoint(part_of(model, part)):
                raise ValueError(f"phases[{number}]: received {part!r} to train or reset, expected a part in which this model has weights")


@torch.no_grad()
def begin(phase: Phase, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, ema: EMA | None = None) -> None:
    """Give the part that a phase resets new weights, the same on every rank, and forget its moments and averages."""
    if phase.reset is None:
        return
    plain, inner = unwrap(model), inner_optimizer(optimizer)
    parameters = dict(plain.named_parameters())
    new = part_of(plain, phase.reset)
    torch.manual_seed(fold(seed, phase.start, _RESET))
    modules = dict(plain.named_modules())
    for name, module in reversed(modules.items()):  # so that of tied weights the first name's module has the last word, as in a new model
        if not new.isdisjoint(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)):
            while not hasattr(modules[name], "_init_weights"):  # the nearest model around it knows how it starts
                name = name.rpartition(".")[0]
            modules[name]._init_weights(module)
    for name in _of_part(modules, plain, phase.reset):  # running statistics and scales, which are no parameters
        module = modules[name]
        if next(module.parameters(recurse=False), None) is None and next(module.buffers(recurse=False), None) is not None:
            getattr(module, "reset_parameters", lambda: None)()
    for name in new:
        inner.state.pop(parameters[name], None)
        if ema is not None and name in ema.weights:
            ema.weights[name].copy_(parameters[name])
