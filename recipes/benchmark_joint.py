"""What joining costs: a training step over M modalities beside the same M encodes and M decodes run alone, for M = 2 to 8, on a CPU.

    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmark_joint.py
    OMP_NUM_THREADS=1 taskset -c 0 python recipes/benchmark_joint.py --aggregation mixture --modalities 4 8 16

The joint step is MoPoE with one component drawn per row, the ELBO, its gradient and AdamW. Alone, each modality is encoded, sampled
once, decoded, scored and differentiated, one after the other, and the same optimizer updates the same parameters: there is no joint
posterior and no divergence. Both alternate on the same model. Time is the thread's own (CPU seconds), so that other work on the machine
counts little; MiB are those kept for the backward pass, and state is weights, gradients and AdamW's moments.
The first command, seed 0, commit 7151008, one thread of a two-core AVX2 machine, 108 s: 1.05, 1.00, 0.97, 0.97, 1.13, 1.09, 1.15 times
its parts for M = 2 to 8; 197 ms for one more modality, at most 3 % off a line; 102 MiB at M = 2 (alone 102), 419 MiB at M = 8 (alone 407).
With the default network since 9cd25bc, on a very busy machine: 1.07 to 1.44 times, 124 ms for one more, 44 MiB at M = 2 (alone 44).
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from mmvae import MMVAE, ImageVAEConfig, MMVAEConfig, TextVAEConfig
from mmvae.experiment import parse
from mmvae.models.configuration import VAEConfig
from mmvae.pictures import table
from mmvae.record import hardware


@dataclass
class BenchmarkArguments:
    """Options of the benchmark."""

    modalities: list[int] = field(default_factory=lambda: list(range(2, 9)), metadata={"help": "values of M"})
    kinds: list[str] = field(default_factory=lambda: ["image"], metadata={"help": "image and text, taken in turn"})
    aggregation: str = field(default="mopoe", metadata={"help": "poe, moe, mopoe, or mixture: of every modality and all together"})
    draw: str = field(default="one", metadata={"help": "one component per row, or all"})
    missing: float = field(default=0.0, metadata={"help": "share of what the rows lack"})
    image_size: int = field(default=32, metadata={"help": "grey pixels per side"})
    num_tokens: int = field(default=16, metadata={"help": "of a row of text, of 1,000 words"})
    latent_dim: int = 16
    batch_size: int = 64
    repeats: int = 5
    seed: int = 0
    output: str | None = field(default=None, metadata={"help": "JSON file"})


Inputs = dict[str, dict[str, Tensor]]
Losses = Callable[[], Iterable[Tensor]]


def modality(kind: str, args: BenchmarkArguments) -> tuple[VAEConfig, dict[str, Tensor]]:
    """A modality's configuration and a batch of noise: what is in a row does not change its cost."""
    if kind == "text":
        ids = torch.randint(4, 1000, (args.batch_size, args.num_tokens))
        return TextVAEConfig(vocab_size=1000, latent_dim=args.latent_dim), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    size = {"image_size": args.image_size, "num_channels": 1, "latent_dim": args.latent_dim}
    return ImageVAEConfig(**size, scale_mode="fixed"), {"pixel_values": torch.rand(args.batch_size, 1, args.image_size, args.image_size)}


def build(args: BenchmarkArguments, size: int) -> tuple[MMVAE, Inputs, Tensor]:
    """A joint model of ``size`` modalities, a batch of each, and what is present of it."""
    torch.manual_seed(args.seed)
    parts = {f"m{i}": modality(kind, args) for i, kind in zip(range(size), cycle(args.kinds), strict=False)}
    subsets = {"subsets": [*([name] for name in parts), list(parts)]} if args.aggregation == "mixture" else {}
    options = {"latent_dim": args.latent_dim, "draw": args.draw, "aggregation": args.aggregation, "aggregation_options": subsets}
    model = MMVAE(MMVAEConfig(modalities={name: config for name, (config, _) in parts.items()}, **options)).train()
    present = torch.rand(args.batch_size, size) >= args.missing
    present[:, 0] |= ~present.any(1)
    return model, {name: inputs for name, (_, inputs) in parts.items()}, present


def joint(model: MMVAE, inputs: Inputs, present: Tensor) -> Iterator[Tensor]:
    """The loss of the whole model."""
    own = {f"{name}_{child}": value for name, values in inputs.items() for child, value in values.items()}
    yield model(**own, present=present).loss


def alone(model: MMVAE, inputs: Inputs) -> Iterator[Tensor]:
    """The reconstruction loss of one modality after the other."""
    for name, vae in model.vaes.items():
        z = vae.encode(**inputs[name]).rsample()
        yield -vae.decode(z).log_prob(vae.target(**inputs[name])).mean()


def seconds(losses: Losses, optimizer: torch.optim.Optimizer) -> float:
    """CPU seconds of one training step."""
    began = time.process_time()
    optimizer.zero_grad()
    for loss in losses():
        loss.backward()
    optimizer.step()
    return time.process_time() - began


def kept(losses: Losses, model: MMVAE) -> float:
    """MiB that a forward pass keeps for the backward pass, parameters left out."""
    parameters, storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = list(losses())  # while they live no address is taken twice
    del held
    return sum(size for address, size in storages.items() if address not in parameters) / 2**20


def bf16_error(losses: Losses, model: MMVAE, seed: int) -> float:
    """Relative deviation of the loss under bfloat16 autocast from that in float32, with the same noise; every gradient must be finite."""
    values = []
    for enabled in (False, True):
        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (loss,) = losses()
        loss.backward()
        values.append(loss.item())
    bad = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    if bad:
        raise FloatingPointError(f"bf16: received gradients that are missing or not finite for {bad}, expected finite ones")
    return abs(values[1] / values[0] - 1)


def measure(args: BenchmarkArguments, size: int) -> dict[str, float]:
    """Both steps in turn, then memory and bfloat16."""
    model, inputs, present = build(args, size)
    rows = {name: {child: x[present[:, m]] for child, x in values.items()} for m, (name, values) in enumerate(inputs.items())}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    each, whole = partial(alone, model, rows), partial(joint, model, inputs, present)
    pairs = [[seconds(losses, optimizer) for losses in (each, whole)] for _ in range(args.repeats + 1)][1:]  # without the warm-up
    (alone_s, joint_s), ratios = (statistics.median(column) for column in zip(*pairs, strict=True)), sorted(b / a for a, b in pairs)
    result = {"M": size, "alone ms": 1e3 * alone_s, "joint ms": 1e3 * joint_s, "joint ms / M": 1e3 * joint_s / size}
    result |= {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
    result |= {"alone MiB": kept(each, model), "joint MiB": kept(whole, model), "state MiB": 16 * model.num_parameters() / 2**20}
    few = {name: {child: x[:8] for child, x in values.items()} for name, values in inputs.items()}  # where bfloat16 is emulated it is slow
    result |= {"bf16 error": bf16_error(partial(joint, model, few, present[:8]), model, args.seed)}
    print(result, flush=True)
    return result


def main() -> None:
    """Measure, fit a line, print."""
    (args,) = parse(BenchmarkArguments)
    torch.set_num_threads(1)
    results = [measure(args, size) for size in args.modalities]
    slope, offset = statistics.linear_regression(args.modalities, [result["joint ms"] for result in results])
    residual = max(abs(offset + slope * result["M"] - result["joint ms"]) / result["joint ms"] for result in results)
    fit = {"ms of one more modality": slope, "offset ms": offset, "largest deviation": residual}
    print(table({key: [f"{result[key]:.4g}" for result in results] for key in results[0]}), fit, hardware(), sep="\n")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump({"results": results, "fit": fit, "hardware": hardware(), "arguments": vars(args)}, file, indent=2)


if __name__ == "__main__":
    main()
