"""A finished model folder and the Hub: the model card, and one commit.

write_metrics(folder, metrics, ...)  ->  metrics.json  ->  write_card(folder, ...)  ->  README.md  ->  push(folder, "user/name")
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from mmvae.pictures import table
from mmvae.record import public, replace_text, write_metrics

__all__ = ["check_repo_id", "model_card", "push", "write_card", "write_metrics"]

# Names of a model, of its processor or tokenizer, and of what tells of it. Whatever else lies there stays at home.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_FIGURE = re.compile(r"figures/[^/]+\.png")
_PUBLISHED = re.compile(
    r"README\.md|chat_template\.jinja|(added_tokens|config|generation_config|manifest|metrics|preprocessor_config|processor_config"
    r"|special_tokens_map|tokenizer|tokenizer_config|vocab)\.json|(merges|vocab)\.txt|\w[\w.-]*\.model|" + _WEIGHTS.pattern
)
# No pipeline of transformers does what the other models do: that for features would give the loss.
_PIPELINE_TAGS = {"image_vae": "unconditional-image-generation", "text_vae": "text-generation"}
# Of models with a head: the class that reads their folder, and their pipeline, by the end of their class's name.
_HEADS = {
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "image-segmentation"),
}

_USAGE = {
    "image_vae": """\
pixels = model.sample(8)  # (8, C, H, W) in [0, 1], new ones
inputs = processor(image, return_tensors="pt")  # a PIL image, an array, or a list of them
latents = model.encode(**inputs).mean
again = model.reconstruct(**inputs)
""",
    "text_vae": """\
from mmvae.processing import decode_text

print(decode_text(processor, model.sample(4)))  # new sentences
inputs = processor(["a sentence of the kind it was trained on"], return_tensors="pt")
latents = model.encode(**inputs).mean
print(decode_text(processor, model.reconstruct(**inputs, max_new_tokens=40, num_beams=4)))
""",
}

_USAGE["topic_vae"] = """\
print(model.topics(top_k=10))  # the words that tell every topic
inputs = processor(["a document of the kind it was trained on"], return_tensors="pt")
shares = model.document_topics(**inputs)  # of the topics in each document, (1, K)
"""

_BY_CLASS = """\
made = model.generate(class_labels=[0, 0, 1])  # by the numbers of model.config.id2label
names = [model.config.id2label[i] for i in model.classify(**inputs).argmax(1).tolist()]
"""

_USAGE["mmvae"] = """\
made = model.sample(4)  # one of each of {modalities} that belong together, new ones, by name
inputs = processor({first}=[...], return_tensors="pt")  # any of the modalities, by name
made = model.generate("{last}", **inputs)  # what is missing, from whatever is given
latents = model.posterior(**inputs).mixture.mean  # (B, D), of whatever is given
nearest = model.retrieve(inputs, processor({last}=[...], return_tensors="pt"))  # and back
"""

_USAGE["image-classification"] = """\
logits = model(**processor(image, return_tensors="pt")).logits  # a PIL image, an array, or a list of them
names = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
"""
_USAGE["image-segmentation"] = """\
logits = model(**processor(image, return_tensors="pt")).logits  # of the class of every pixel: (B, N, H, W)
"""
_USAGE["text-classification"] = """\
logits = model(**processor(["a sentence of the kind it was trained on"], return_tensors="pt")).logits
names = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
"""
_USAGE["MMVAEForClassification"] = """\
inputs = processor({first}=[...], return_tensors="pt")  # any of {modalities}, by name
names = [model.config.id2label[i] for i in model(**inputs).logits.argmax(1).tolist()]
"""

_CARD = """\
---
{card_data}
---

# {title}

{summary}

## Use

Install the package and import it **first**: `import mmvae` registers its classes, and without it `AutoModel` does not know this
architecture and `AutoProcessor` does not find all of the processor.

```bash
pip install mmvae
```

```python
import mmvae  # first: it registers the classes with AutoModel and AutoProcessor
{imports}

model = {reader}.from_pretrained("{repo_id}", dtype="float32")
processor = AutoProcessor.from_pretrained("{repo_id}")
{usage}```

{sections}"""


def _json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, expected a model folder with config.json and metrics.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _results(record: Mapping[str, Any], task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=record["dataset"],
            dataset_name=record["dataset"],
            dataset_split=record["split"],
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in record["metrics"].items()
        if isinstance(value, int | float)
    ]


def _sections(folder: Path, record: Mapping[str, Any], sentences: Mapping[str, str]) -> str:
    """The body of a card: figures, sentences, metrics, and how they came about."""
    text = [f"## Metrics\n\nOn the {record['split']} split of {record['dataset']}:\n"]
    text.append(table({"metric": list(record["metrics"]), "value": list(record["metrics"].values())}))
    for title, block in sentences.items():
        text.append(f"## {title}\n\n{public(block)}")
    for figure in sorted((folder / "figures").glob("*.png")):
        title = figure.stem.replace("_", " ").capitalize()
        text.append(f"## {title}\n\n![{title}](figures/{figure.name})\n")
    commit = f"`{record['commit']}`{' with changes' if record['commit_has_changes'] else ''}" if record.get("commit") else "not recorded"
    text.append(f"## Training\n\n```bash\n{record['command']}\n```\n")
    text.append(f"{record['seconds']:.0f} seconds on {_listed(record['hardware'])}; commit {commit}; {_listed(record['versions'])}.\n")
    if record["hyperparameters"]:
        options = record["hyperparameters"]
        text.append("### Hyper-parameters\n\n" + table({"name": list(options), "value": list(options.values())}))
    return "\n".join(text)


def _listed(items: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())


def _usage(config: Mapping[str, Any], architecture: str) -> dict[str, str]:
    """The parts of the snippet: which class reads the folder, and what to do with the model."""
    names, kind = list(config.get("modalities", {})), config.get("below", config).get("model_type", "")
    reader, task = next((head for end, head in _HEADS.items() if architecture.endswith(end)), ("AutoModel", kind))
    if architecture == "MMVAEForClassification":
        reader = task = architecture  # transformers has no class for it
    imported = f"from transformers import {reader}, AutoProcessor"
    if reader == architecture:
        imported = f"from mmvae import {reader}\nfrom transformers import AutoProcessor"
    text = "".join(_USAGE["text_vae"].splitlines(keepends=True)[:3]) if config.get("latent_dim") == 0 else _USAGE.get(task, "")
    text += _BY_CLASS if config.get("num_classes") and task == kind else ""
    usage = text.format(modalities=" and ".join(names), first=names[0], last=names[-1]) if names else text
    return {"imports": imported, "reader": reader, "usage": usage}


def model_card(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    summary: str = "",
    license: str = "apache-2.0",
    sentences: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
) -> ModelCard:
    """The model card of a folder, from its ``config.json``, ``metrics.json`` and ``figures/*.png``.

    Arguments:
        folder: a model folder with a ``metrics.json``.
        repo_id: where it will be published, shown in the snippet; by default the folder's name.
        summary: a sentence or two about the model.
        license: identifier of the licence of the weights.
        sentences: Markdown by title, for example ``{"Reconstructions": table(...)}``.
        tags: further tags.
        language: ISO 639-1 codes of the text, for example "en".

    Returns:
        The card, with the metrics also in its ``model-index``.

    Raises:
        FileNotFoundError: no ``config.json`` or ``metrics.json``.
    """
    folder = Path(folder)
    config, record = _json(folder, "config.json"), _json(folder, "metrics.json")
    kind, name = config.get("model_type", "vae"), repo_id or folder.resolve().name
    seen = config.get("below", config).get("model_type")  # of stacked models what is below
    architecture, task = (config.get("architectures") or [kind])[0], _PIPELINE_TAGS.get(seen)
    task = next((task for end, (_, task) in _HEADS.items() if architecture.endswith(end)), task)
    data = ModelCardData(
        license=license,
        library_name="mmvae",
        pipeline_tag=task,
        tags=["mmvae", "vae", kind, *tags],
        language=language,
        model_name=name.split("/")[-1],
        eval_results=_results(record, task or "other"),
    )
    return ModelCard(
        _CARD.format(
            card_data=data.to_yaml(),
            title=name.split("/")[-1],
            summary=public(summary) or f"This {architecture} was trained with mmvae on {record['dataset']}.",
            repo_id=name,
            **_usage(config, architecture),
            sections=_sections(folder, record, sentences or {}),
        )
    )


def write_card(folder: str | Path, **options: Any) -> Path:
    """Write ``model_card(folder, **options)`` as the folder's ``README.md`` and return its path."""
    return replace_text(Path(folder) / "README.md", str(model_card(folder, **options)))


def check_repo_id(repo_id: str) -> str:
    """Return ``repo_id`` if the Hub can have a repository of that name; recipes ask before they train.

    Raises:
        ValueError: not of the form "name" or "user/name".

    Example:
        >>> check_repo_id("alice/sprites-vae")
        'alice/sprites-vae'
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id: got {repo_id!r}, expected 'user/name' ({error})") from None
    return repo_id


def _published(folder: Path) -> dict[str, Path]:
    """Path in the repository to file: what belongs to a model folder, and nothing else that lies there (checkpoints, logs, drafts)."""
    weights = "model.safetensors"
    present = [(folder / name).is_file() for name in (weights, f"{weights}.index.json")]
    missing = [name for name, found in (("config.json", (folder / "config.json").is_file()), (weights, any(present))) if not found]
    if missing:
        raise FileNotFoundError(f"{folder}: no {' and no '.join(missing)}, expected a model folder as save_pretrained writes it")
    files = [path for part in (folder, *_parts(folder)) for path in part.iterdir() if path.is_file() and _PUBLISHED.fullmatch(path.name)]
    files += (folder / "figures").glob("*.png")
    return {path.relative_to(folder).as_posix(): path for path in sorted(files)}


def _parts(folder: Path) -> list[Path]:
    """The folders of a joint model's processor, one for each modality."""
    config = folder / "processor_config.json"
    parts = json.loads(config.read_text(encoding="utf-8")).get("parts", []) if config.is_file() else []
    return [folder / name for name, _ in parts if name.isidentifier() and (folder / name).is_dir()]


def push(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None) -> str:
    """Publish a model folder in one commit: the repository shows the old state or the new one, never a mixture.

    Only the files of a model folder are published: model, processor, tokenizer, ``metrics.json``, ``README.md`` and ``figures/*.png``.
    Weights in the repository's root and ``figures/*.png`` that the folder no longer has are deleted there; nothing else is.

    Arguments:
        folder: model folder with ``config.json`` and ``model.safetensors``.
        repo_id: "user/name", or "name" for one's own; made if it does not exist.
        private: whether the repository must be private.
        token: access token; by default the one of ``hf auth login`` or ``HF_TOKEN``. It is written nowhere.
        revision: branch, made if it does not exist; by default "main".

    Returns:
        The address of the repository.

    Raises:
        ValueError: a malformed ``repo_id``, or a public repository where a private one was asked for.
        FileNotFoundError: a folder without a model, naming what is missing.
    """
    check_repo_id(repo_id)
    files = _published(Path(folder))
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"private: {repo_id} exists and is public, expected a private repository; nothing was uploaded")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in there if (_WEIGHTS.fullmatch(name) or _FIGURE.fullmatch(name)) and name not in files]
    # Not upload_folder: it splits what it uploads into several commits where it sees fit.
    operations = [CommitOperationAdd(name, path) for name, path in files.items()] + [CommitOperationDelete(name) for name in stale]
    message = f"Upload {_json(Path(folder), 'config.json').get('model_type', 'model')} with mmvae"
    api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(url)
