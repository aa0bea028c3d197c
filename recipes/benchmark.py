"""How fast mmvae is: each piece of work beside a plain reference on the same data, network size and batch, in the same run.

    OMP_NUM_THREADS=2 python recipes/benchmark.py
    OMP_NUM_THREADS=2 python recipes/benchmark.py --work text,sentences --text path/to/ptb --images path/to/mnist --num_sentences 10000
    OMP_NUM_THREADS=1 python recipes/benchmark.py --work joint --clock cpu --profile true        # a busy machine; where the time goes
    OMP_NUM_THREADS=2 python recipes/benchmark.py --work none --streamed_rows 1000000            # memory alone

Reference and mmvae alternate; the table gives medians over the repeats, the ratio's spread, and the GFLOP/s of our convolutions and matrix
products, to be held against what the machine reaches in large products, which is measured beside. Only the ratio means something on a
busy machine. Ours keeps the memory that it frees, as the recipes do (:func:`mmvae.processes.keep_memory`); the references do not. These
(``recipes/benchmark_references.py``) are what a first implementation does, in float32 and without gradients where none are needed:

- text: random batches padded to the longest row, a packed ``nn.GRU``, log-softmax over all padded positions, unfused Adam, ``loss.item()``.
- images: the same network with NCHW weights and features, per-item data with the default collate, unfused Adam, ``loss.item()``.
- decoder: from the latent by a linear layer and transposed 4x4 convolutions with BatchNorm and ReLU, as many parameters as ours. Which
  of the two is better in nats is what ``recipes/benchmark_decoder.py`` trains for.
- joint: the same encoders and decoders, one forward pass for each subset of modalities; ours draws a subset of every row before it
  encodes, by modality dropout with 0.5, which draws single modalities a little more often than MoPoE does.
- log p(x): one picture at a time, encoded and decoded once for each of its samples, in copies of 100.
- sentences: a greedy loop over ten rows at a time that asks every row for its end by ``.item()``.
- pictures: 64 at a time, NCHW. Loading: a parquet of PNG files as an ``Image()`` column, a transform to floats, default collate.
- saving: bare safetensors, neither hashed nor flushed nor atomic. Import: the names that mmvae takes from transformers.
- two ranks: one gloo rank of one thread, with as many rows a step as each of the two.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import benchmark_inference as inference
import benchmark_training as training
import torch
from benchmark_training import BenchmarkArguments, Step, Work
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mmvae.experiment import parse
from mmvae.pictures import table
from mmvae.processes import keep_memory
from mmvae.record import hardware

WORK: dict[str, Callable[[BenchmarkArguments], Work]] = {
    "text training 32": partial(training.text_training, 32),
    "text training 128": partial(training.text_training, 128),
    "image training 28x28x1": partial(training.image_training, 28, 1),
    "image training 64x64x3": partial(training.image_training, 64, 3),
    "decoder 28x28x1": partial(training.decoder, 28, 1),
    "decoder 64x64x3": partial(training.decoder, 64, 3),
    "joint training M=2": partial(training.joint_training, 2),
    "joint training M=5": partial(training.joint_training, 5),
    "log p(x)": inference.likelihood,
    "sentences": inference.sentences,
    "pictures": inference.pictures,
    "loading first epoch": partial(inference.loading, True),
    "loading later epochs": partial(inference.loading, False),
    "saving": inference.saving,
    "import": inference.importing,
    "two ranks": training.ranks,
}
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": lambda: time.process_time() + sum(os.times()[2:4])}


def rate(step: Step, seconds: float, clock: Clock) -> float:
    """Things per second over as many steps as fill ``seconds``, at least one."""
    began, done = clock(), 0.0
    while True:
        done += step()
        if (passed := clock() - began) >= seconds:
            return done / passed


def compare(work: Work, args: BenchmarkArguments) -> dict[str, float | str]:
    """Medians of both, and of the ratio its median, smallest and largest value; and the rate at which ours multiplies and adds."""
    (reference, ours, unit), clock = work, CLOCKS[args.clock]
    reference()
    with FlopCounterMode(display=False) as counted:
        done = ours()

    def measured(step: Step) -> float:
        keep_memory(step is ours)
        return rate(step, args.seconds, clock)

    pairs = [[measured(step) for step in (reference, ours)] for _ in range(args.repeats)]
    slow, fast = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    spread = {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
    return {"unit": unit, "reference": slow, "mmvae": fast, **spread, "GFLOP/s": fast * counted.get_total_flops() / done / 1e9}


def ceilings(clock: Clock) -> dict[str, float]:
    """What the machine can do: products of 1,024x1,024 matrices (512 in bfloat16, which may be emulated), and copies of 64 MiB."""
    a, b = torch.randn(2, 1024, 1024)
    c, d = torch.randn(2, 512, 512).bfloat16()
    source, target = torch.randn(2, 1 << 24)
    work = {
        "GFLOP/s float32": (lambda: a @ b, 2 * 1024**3 / 1e9),
        "GFLOP/s bfloat16": (lambda: c @ d, 2 * 512**3 / 1e9),
        "copy GB/s": (lambda: target.copy_(source), 2 * source.nbytes / 1e9),
    }

    def best(step: Callable[[], object], size: float) -> float:
        return max(rate(lambda: (step(), size)[1], 0.1, clock) for _ in range(4))

    return {name: best(*each) for name, each in work.items()}


def where(step: Step) -> str:
    """The operators that a step spends its time in."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    return seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40)


def machine() -> dict[str, object]:
    """Hardware and versions."""
    return hardware() | {"bits": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(), "torch": torch.__version__}


def main() -> None:
    """Alternate, measure, print."""
    (args,) = parse(BenchmarkArguments)
    if args.clock not in CLOCKS:
        raise ValueError(f"clock: received {args.clock!r}, expected one of {list(CLOCKS)}")
    torch.manual_seed(0)
    figures = {"ceilings": ceilings(CLOCKS[args.clock]), "memory MiB": inference.memory(args) if args.streamed_rows else {}, "results": {}}
    for name in WORK:
        if name.startswith(tuple(args.work.split(","))):
            work = WORK[name](args)
            figures["results"][name] = result = compare(work, args)
            print(name, {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.items()}, file=sys.stderr)
            if args.profile:
                print(where(work[1]))
    figures |= {"machine": machine(), "arguments": vars(args)}
    rows = [{"work": name} | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for name, r in figures["results"].items()]
    print(table({key: [row[key] for row in rows] for key in rows[0]}) if rows else "")
    print(figures["ceilings"], figures["memory MiB"], figures["machine"], sep="\n")
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
