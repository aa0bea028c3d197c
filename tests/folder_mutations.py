"""Damage model folders in a thousand ways and count what comes of loading them; `test_folder.py` does a few of them.

    python tests/folder_mutations.py --number 1000 --seed 0
    python tests/folder_mutations.py --fields

Allowed are an error that names a file of the folder or the damaged field, and a model whose every value is the one that was saved. Counted
as failures: code that ran, a socket that was opened, more than 5 s, an error without a name, a model with other values. A changed bit in a
folder without a manifest, whose value stays finite, is what nothing can notice: those are counted apart.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import logging
from transformers.utils.logging import disable_progress_bar

from mmvae import (
    MMVAE,
    ImageVAE,
    ImageVAEConfig,
    ImageVAEForImageClassification,
    MMVAEConfig,
    StackedVAE,
    StackedVAEConfig,
    TextVAE,
    TextVAEConfig,
    TopicVAE,
    TopicVAEConfig,
)
from mmvae.folder import seal
from mmvae.models.configuration import _FOREIGN

HOSTILE = [0, -1, 10**6, 10**12, 2**63, math.nan, math.inf, None, "4", 4.5, [], {}, True, "x" * 10_000, "../x", [None], {"a": [1]}]
IMAGE = {"image_size": 8, "num_channels": 1, "hidden_channels": [4], "latent_dim": 2}
TEXT = {"vocab_size": 20, "hidden_size": 8, "embedding_size": 8, "latent_dim": 2, "tie_word_embeddings": True}
TOPICS = {"vocabulary": ["goal", "game", "vote"], "hidden_size": 4, "latent_dim": 2}
LIMIT_S = 5.0

touched = Path(tempfile.gettempdir()) / f"touched-{os.getpid()}"  # by code that must not run
forbidden: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Audit hook: what loading a folder must never do."""
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "os.exec"):
        forbidden.append(f"{event} {arguments}"[:200])


def make_folders(root: Path) -> dict[Path, type]:
    """Small models of every kind, with the class that reads each: whole, in shards, with densities, with a head."""
    torch.manual_seed(0)
    both = {"image": ImageVAEConfig(**IMAGE), "text": TextVAEConfig(**TEXT)}
    mixture = {"shared": {"kind": "mixture", "num_components": 2}}
    models = {
        "image": ImageVAE(ImageVAEConfig(**IMAGE)),
        "text": TextVAE(TextVAEConfig(**TEXT)),
        "joint": MMVAE(MMVAEConfig(modalities=both, densities=mixture)),
        "shards": MMVAE(MMVAEConfig(modalities=both)),
        "topics": TopicVAE(TopicVAEConfig(**TOPICS)),
        "stacked": StackedVAE.over(ImageVAE(ImageVAEConfig(**IMAGE)), num_classes=3, latent_dim=2, hidden_size=4),
        "head": ImageVAEForImageClassification(ImageVAEConfig(**IMAGE, num_labels=3)),
    }
    for name, model in models.items():
        model.save_pretrained(root / name, **({"max_shard_size": 2000} if name == "shards" else {}))
    return {root / name: type(model) for name, model in models.items()}


# ---- mutations: each takes a folder and a generator, and returns the name of what it damaged


def weights_of(folder: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(folder.glob("model*.safetensors")))


def cut(folder, chance):
    path = weights_of(folder, chance)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return path.name


def flip_a_bit_of_the_header(folder, chance):
    path = weights_of(folder, chance)
    data = bytearray(path.read_bytes())
    data[chance.randrange(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path.name


def flip_a_bit(folder, chance):
    path = chance.choice([*folder.glob("model*.safetensors"), folder / "config.json"])
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path.name


def garbage(folder, chance):
    path = chance.choice(sorted(path for path in folder.iterdir()))
    path.write_bytes(chance.choice([b"", b"\0" * 50, b"<html>", chance.randbytes(300), b"[" * 100_000, struct.pack("<Q", 2**62) + b"{}"]))
    return path.name


def append(folder, chance):
    path = chance.choice(sorted(path for path in folder.iterdir()))
    path.write_bytes(path.read_bytes() + chance.randbytes(8))
    return path.name


def remove(folder, chance):
    path = chance.choice(sorted(path for path in folder.iterdir() if path.name != "generation_config.json"))
    path.unlink()
    return path.name


def no_file(folder, chance):
    path = chance.choice(sorted(path for path in folder.iterdir()))
    path.unlink()
    chance.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path)])()
    return path.name


def link_out(folder, chance):
    path = chance.choice(sorted(path for path in folder.iterdir()))
    outside = folder.parent / f"outside-{path.name}"
    path.replace(outside)
    path.symlink_to(outside if chance.random() < 0.5 else Path("..", outside.name))
    return path.name


def change_a_tensor(folder, chance):
    path = weights_of(folder, chance)
    tensors = load_file(path)
    name = chance.choice(sorted(name for name in tensors if tensors[name].is_floating_point() and tensors[name].numel()))
    tensor = tensors[name].clone()
    kind = chance.randrange(8)
    if kind < 3:
        tensor.view(-1)[chance.randrange(tensor.numel())] = (math.nan, math.inf, -math.inf)[kind]
        tensors[name] = tensor
    elif kind == 3:
        del tensors[name]
    elif kind == 4:
        tensors[name + "x"] = tensor
    elif kind == 5:
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
    elif kind == 6:
        tensors[name] = tensor.to(torch.int32)
    else:
        del tensors[name]
        tensors[name + "_"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name


def swap(folder, chance):
    path = weights_of(folder, chance)
    other = chance.choice(sorted(other for other in folder.parent.glob("*/model*.safetensors") if other.parent != folder))
    shutil.copy(other, path)
    return path.name


def pickle_instead(folder, chance):
    """A pickle that touches a file when it is opened, under every name that some loader opens."""
    payload = f"cos\nsystem\n(S'touch {touched}'\ntR.".encode()
    path = weights_of(folder, chance)
    path.unlink()
    for name in (path.name if chance.random() < 0.3 else "model.bin", "pytorch_model.bin", "model.pkl", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(payload)
    return path.name


def change_the_index(folder, chance):
    path = folder / "model.safetensors.index.json"
    names = sorted(weights.name for weights in folder.glob("model*.safetensors"))
    one = load_file(folder / names[0])
    index = {"metadata": {}, "weight_map": dict.fromkeys(one, names[0])}
    index = json.loads(path.read_text()) if path.exists() else index
    wrong = [
        "../outside.safetensors",
        "/etc/passwd",
        "model-00009-of-00009.safetensors",
        "pytorch_model.bin",
        5,
        None,
        "model.safetensors/../x",
    ]
    index["weight_map"][chance.choice(sorted(index["weight_map"]))] = chance.choice(wrong)
    path.write_text(json.dumps(index if chance.random() < 0.8 else {"weight_map": chance.choice(HOSTILE)}))
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").unlink()
    return path.name


def inner(config, chance):
    """The fields of a configuration, or of one inside it."""
    inside = [*config.get("modalities", {}).values(), *([config["below"]] if "below" in config else [])]
    return chance.choice(inside) if inside and chance.random() < 0.5 else config


def change_a_field(folder, chance):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    values = inner(config, chance)
    more = ["num_labels", "id2label", "torch_dtype", "use_cache", "output_attentions", "return_dict", "problem_type", "is_encoder_decoder"]
    name = chance.choice(sorted({*values, *more}))
    values[name] = chance.choice(HOSTILE)
    path.write_text(json.dumps(config))
    return name


def add_a_field(folder, chance):
    path, evil = folder / "config.json", folder / "evil.py"
    evil.write_text(f"import pathlib; pathlib.Path({str(touched)!r}).touch()")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
    name, value = chance.choice(
        [
            ("auto_map", auto),
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ("_attn_implementation_internal", "evil/kernels"),
            ("attn_implementation", "evil/kernels"),
            ("transformers_weights", "../outside.safetensors"),
            ("configuration_files", ["config.9.0.0.json"]),
            ("per_layer_config", {"0": {"latent_dim": 3}}),
            ("_" + chance.choice("abc"), chance.choice(HOSTILE)),
            ("fusion_config", {"patch_embeddings": True}),
            ("trust_remote_code", True),
        ]
    )
    config = json.loads(path.read_text())
    inner(config, chance)[name] = value
    path.write_text(json.dumps(config))
    return name


def break_the_json(folder, chance):
    path = chance.choice(sorted(folder.glob("*.json")))
    text = path.read_text()
    broken = ["[]", "null", "{", "\ufeff" + text, "{" + text[1:].replace("{", '{"architectures": 1, "architectures": 2,', 1)]
    broken += ['{"a":' * 100_000, '{"latent_dim": 1e999}', '{"latent_dim": NaN}', '{"latent_dim": ' + "9" * 5000 + "}", text + "\0"]
    path.write_text(chance.choice([*broken, text.replace('"', "'"), '{"latent_dim": 2, ' + text.lstrip()[1:]]))
    return path.name


def change_the_manifest(folder, chance):
    path = folder / "manifest.json"
    if not path.exists():
        return "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256")
    if chance.random() < 0.3:
        manifest["format"] = 2
    else:
        file = chance.choice(sorted(manifest["files"]))
        manifest["files"].pop(file) if chance.random() < 0.5 else manifest["files"][file].update(sha256="0" * 64)
    path.write_text(seal(manifest))
    return path.name


def add_a_file(folder, chance):
    name = chance.choice(["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
    (folder / name).write_text(json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"}))
    return name


MUTATIONS = [
    cut, flip_a_bit_of_the_header, flip_a_bit, garbage, append, remove, no_file, link_out, change_a_tensor, swap, pickle_instead,
    change_the_index, change_a_field, add_a_field, break_the_json, change_the_manifest, add_a_file,
]  # fmt: skip


# ---- what comes of it


def outcome(model_class: type, folder: Path, damaged: str, saved: dict, sealed: bool, bits: bool) -> tuple[str, str]:
    """The kind of what happened, and how it was told."""
    forbidden.clear()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    began = time.perf_counter()
    try:
        model = model_class.from_pretrained(folder)
    except TimeoutError:
        return "FAILED: over 5 s", ""
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        named = any(name in told for name in (damaged, ".json", ".safetensors", "VAEConfig"))
        kind = "refused by name" if named else "FAILED: error without a name"
    else:
        state = model.state_dict()
        finite = all(tensor.isfinite().all() for tensor in state.values())
        equal = finite and state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
        changed = "changed bit without a manifest" if bits and finite and not sealed else "FAILED: loaded with other values"
        kind, told = ("loaded, all values as saved" if equal else changed), f"{damaged} {type(model).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if forbidden or touched.exists():
        touched.unlink(missing_ok=True)
        return "FAILED: code ran", f"{forbidden} {told}"
    return kind, f"{time.perf_counter() - began:.2f} s {told}"


def run(number: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """How often what happened, and what failed, for so many damaged folders."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    if watch not in (hooked := globals().setdefault("_hooked", [])):
        sys.addaudithook(watch)
        hooked.append(watch)
    disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    counts, failed = Counter(), []
    with tempfile.TemporaryDirectory() as place:
        folders = make_folders(Path(place))
        states = {folder: {k: v.clone() for k, v in kind.from_pretrained(folder).state_dict().items()} for folder, kind in folders.items()}
        for n in range(number):
            chance = random.Random(f"{seed} {n}")
            source = chance.choice(list(folders))
            folder = Path(place) / "damaged"
            shutil.copytree(source, folder)
            sealed = chance.random() < 0.5
            if not sealed:
                (folder / "manifest.json").unlink()
            mutation = MUTATIONS[n % len(MUTATIONS)]
            damaged = mutation(folder, chance)
            still = sealed and (folder / "manifest.json").exists()
            kind, told = outcome(
                folders[source], folder, damaged, states[source], still, mutation in (flip_a_bit, flip_a_bit_of_the_header)
            )
            counts[kind] += 1
            if kind.startswith("FAILED"):
                failed.append(f"{kind}: seed {seed}, number {n}, {mutation.__name__} in {source.name} {sealed=}: {damaged}: {told[:300]}")
            shutil.rmtree(folder)
    return counts, failed


CONFIGS = {
    "image": ImageVAEConfig(**IMAGE),
    "text": TextVAEConfig(**TEXT),
    "joint": MMVAEConfig(modalities={"image": ImageVAEConfig(**IMAGE), "text": TextVAEConfig(**TEXT)}),
    "topics": TopicVAEConfig(**TOPICS),
    "stacked": StackedVAEConfig(below=ImageVAEConfig(**IMAGE), num_classes=3, latent_dim=2),
}


def every_field(name: str, hostile: list) -> tuple[Counter, list[str]]:
    """What is said of each hostile value in each field of a configuration, its own, those of transformers, and foreign ones."""
    config, counts, failed = CONFIGS[name], Counter(), []
    values = json.loads(config.to_json_string(use_diff=False))
    for field in sorted(values.keys() | _FOREIGN - {"_commit_hash", "name_or_path"}):
        for value in hostile:
            began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            told = refusal(type(config), values | {field: value})
            seconds, grown = time.process_time() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            counts["taken" if told is None else "refused by name"] += 1
            if (told and field not in told) or seconds > 1 or grown > 100:
                failed.append(f"{name}, {field} = {value!r:.40}: {seconds:.2f} s, {grown:.0f} MiB: {told}")
    return counts, failed


def refusal(config_class: type, values: dict) -> str | None:
    """What is said against the fields of a configuration."""
    try:
        config_class.from_dict(values)
    except Exception as error:
        return str(error)
    return None


def main() -> None:
    """Damage, load, count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fields", action="store_true", help="hostile values in every field of every configuration instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    counts, failed = run(args.number, args.seed) if not args.fields else (Counter(), [])
    for name in CONFIGS if args.fields else ():
        found, wrong = every_field(name, HOSTILE)
        counts, failed = counts + found, failed + wrong
    print("\n".join(failed))
    print(json.dumps(dict(counts), indent=1), f"{time.perf_counter() - began:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
