"""What a run was: its figures, its command, the code and the machine, as ``metrics.json``.

Nothing written here holds a token or the path of a home directory: secrets are removed from commands and options, and paths are shortened.
"""

import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token

_PACKAGES = ("mmvae", "torch", "transformers", "accelerate", "datasets", "tokenizers", "huggingface_hub", "safetensors")
_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|password|secret|api[_-]?key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9_]{8,}")


def public(value: Any) -> Any:
    """What may be shown of a value: options whose name says that they are secret are dropped, tokens blanked, paths shortened.

    Arguments:
        value: anything that JSON can hold, paths, and mappings and lists of them.

    Example:
        >>> public({"hub_token": "x", "seed": 1, "note": "with hf_abcdefgh"})
        {'seed': 1, 'note': 'with ***'}
    """
    if isinstance(value, Mapping):
        return {str(name): public(item) for name, item in value.items() if not _SECRET_NAME.search(str(name))}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no word for it
    if not isinstance(value, str):
        return value
    known = [token for token in (get_token(), os.environ.get("HF_TOKEN")) if token]
    for token in known:
        value = value.replace(token, "***")
    value = _SECRET_VALUE.sub("***", value)
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        if len(folder.parts) > 1:
            value = re.sub(rf"(?<![\w.-]){re.escape(str(folder))}(?![\w.-])", short, value)
    return value


def command(argv: Sequence[str] | None = None) -> str:
    """The command that is running, to be shown: without secrets such as ``--hub_token``, home directories and the places of other paths.

    Arguments:
        argv: script and options; by default ``sys.argv``.

    Example:
        >>> command(["recipes/text_vae.py", "--latent_dim", "32", "--hub_token", "hf_abc", "--seed=1"]).removeprefix("accelerate launch ")
        'python recipes/text_vae.py --latent_dim 32 --seed=1'
    """
    words, shown = list(sys.argv if argv is None else argv), []
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if name.startswith("-") and _SECRET_NAME.search(name):
            if not equals and words and not words[0].startswith("-"):
                words.pop(0)
            continue
        shown.append(public(_without_far_place(word)))
    launcher = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python"
    return f"{launcher} {shlex.join(shown)}"


def _without_far_place(word: str) -> str:
    """A word of a command line; of an absolute path outside the working and the home directory, only the last part."""
    option, equals, value = word.rpartition("=")
    path = Path(value.rpartition(":")[2])
    near = any(path.is_relative_to(folder) for folder in (Path.cwd(), Path.home()))
    return word if not path.is_absolute() or near else option + equals + without_place(value)


def _commit() -> dict[str, Any]:
    """The commit of the checkout that mmvae runs from, if it runs from one."""
    root, git = Path(__file__).parent.parent, shutil.which("git")
    if git is None or not (root / ".git").exists():
        return {"commit": None}
    try:
        asked = [("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")]
        head, changes = (
            subprocess.run([git, "-C", root, *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for words in asked
        )
    except (subprocess.SubprocessError, OSError):  # for example a repository without a commit, or of another user
        return {"commit": None}
    return {"commit": head, "commit_has_changes": bool(changes)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run had: device, CPU threads, number of processes."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    return {"device": device, "threads": torch.get_num_threads(), "processes": int(os.environ.get("WORLD_SIZE", 1))}


def replace_text(path: Path, text: str) -> Path:
    """Replace a text file in one step, so that a reader sees the old one or the new one; returns its path."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def write_metrics(
    folder: str | Path,
    metrics: Mapping[str, float],
    *,
    seconds: float,
    dataset: str,
    split: str = "test",
    hyperparameters: Mapping[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> Path:
    """Write ``metrics.json``: the figures, and all that is needed to get them again.

    Arguments:
        folder: the model folder; it is made.
        metrics: figure by name, with its unit as suffix (``neg_elbo_nats``); infinite and undefined ones are kept as text.
        seconds: duration of the run.
        dataset: id or path of the data; of a path outside the Hub only the last part is kept.
        split: the part of the data that the metrics are of.
        hyperparameters: options of the run.
        argv: script and options; by default ``sys.argv``.

    Returns:
        The path of ``metrics.json``.
    """
    record = {
        "dataset": without_place(dataset),
        "split": split,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "seconds": round(float(seconds), 1),
        "command": command(argv),
        **_commit(),
        "hardware": hardware(),
        "versions": _versions(),
        "hyperparameters": dict(hyperparameters or {}),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return replace_text(folder / "metrics.json", json.dumps(public(record), indent=2, allow_nan=False, default=str) + "\n")


def without_place(name: str) -> str:
    """A name as it may be told: of a path of this machine only the last part, also of one after "kind:"; an id as it is.

    Example:
        >>> without_place("/home/me/data/mnist"), without_place("words:/home/me/data/mnist"), without_place("user/name")
        ('mnist', 'words:mnist', 'user/name')
    """
    kind, colon, path = name.rpartition(":")
    local = Path(path).is_absolute() or path.startswith((".", "~")) or Path(path).exists()
    return kind + colon + Path(path).expanduser().resolve().name if local and path else name
