"""How every model's folder is read and written: verified first, then read by transformers; and replaced whole.

What ``from_pretrained`` of transformers does not check is checked here: that files stay in the folder and are those of its manifest, that
every tensor is there, finite, of the right shape and kind, and none too many; all before memory is taken for what the configuration says.
"""

import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import is_offline_mode, snapshot_download
from transformers import PreTrainedModel
from transformers.utils import cached_file

from mmvae.folder import CONFIG, INDEX, MANIFEST, WEIGHTS, FolderError, Stored, read_json, replacing, verify
from mmvae.models.configuration import VAEConfig

_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_NOT_READ = ("gguf_file", "variant", "distributed_checkpoint")
_NOT_OF_THE_SHAPE = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")
_FLOATS, _KINDS = {"F64", "F32", "F16", "BF16"}, {torch.bool: "BOOL", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}


@dataclass(frozen=True)
class _Loading:
    """What a folder holds, while transformers makes a model of this class from it."""

    model_class: type
    tensors: Mapping[str, Stored]
    saved_by: list[str]  # names of classes


_LOADING: ContextVar[_Loading | None] = ContextVar("_LOADING", default=None)


class VerifiedModel(PreTrainedModel):
    """A model whose folder is verified before it is read; a VAE, or a VAE with a head."""

    config: VAEConfig
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False  # Trainer must divide by the accumulation steps itself
    model_tags: ClassVar[list[str]] = ["mmvae", "vae"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """A model from a folder or from the Hub; see ``PreTrainedModel.from_pretrained``, all of whose options but formats are there.

        The folder of a model with a head gives the VAE, and that of a VAE gives a model whose head is new. With
        ``ignore_mismatched_sizes=True`` tensors that do not fit are new too; transformers tells which.

        Raises:
            FolderError: naming the file or the field: not a model of this kind, not safe to read, damaged, incomplete,
                or of other shapes than was asked for. Nothing was made of it.
            OSError: there is no such folder or repository, or it cannot be fetched; nothing half is kept.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        _refuse_formats(kwargs)
        folder = _local(pretrained_model_name_or_path, kwargs)
        told, asked = kwargs.pop("output_loading_info", False), kwargs.get("config", kwargs)
        try:
            tensors, saved = verify(folder), read_json(folder / CONFIG)
        except FolderError as error:
            if os.path.isdir(pretrained_model_name_or_path):
                raise
            raise FolderError(f"{error}; force_download=True fetches {pretrained_model_name_or_path} from the Hub again") from error
        if saved.get("model_type") != cls.config_class.model_type:
            expected = f"expected {cls.config_class.model_type!r} for {cls.__name__}"
            raise FolderError(f"{folder / CONFIG}: model_type: received {saved.get('model_type')!r}, {expected}")
        saved_by, strict = saved.get("architectures") or [], not kwargs.get("ignore_mismatched_sizes")
        if not isinstance(saved_by, list):
            raise FolderError(f"{folder / CONFIG}: architectures: received {saved_by!r:.80}, expected names of classes")
        token = _LOADING.set(_Loading(cls, tensors, saved_by) if strict else None)
        try:
            model, info = super().from_pretrained(folder, *args, use_safetensors=True, output_loading_info=True, **kwargs)
        except _MisfitError as error:
            differing = "; ".join(cls._differing(saved, asked))
            raise FolderError(f"{folder}: its weights do not fit: {differing or error}") from error
        finally:
            _LOADING.reset(token)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if told else model

    @classmethod
    def _differing(cls, saved: Mapping[str, Any], asked: Any) -> list[str]:
        """The fields in which a folder's configuration is not what was asked for."""
        asked = asked.to_dict() if isinstance(asked, VAEConfig) else dict(asked) if isinstance(asked, Mapping) else {}
        asked |= {"num_labels": len(asked["id2label"])} if asked.get("id2label") else {}
        had = cls.config_class.from_dict(dict(saved))
        return list(_differing(had.to_dict() | {"num_labels": had.num_labels}, asked))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._some_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self._some_weight().dtype

    def _some_weight(self) -> torch.Tensor:
        if getattr(self, "_is_replica", False):  # one of nn.DataParallel's, whose weights are no parameters
            return next(weight for part in self.modules() for weight in part._former_parameters.values())
        return next(weight for weight in self.parameters() if weight.is_floating_point())

    def post_init(self) -> None:
        """What transformers does at the end of ``__init__``; then, where a folder is being read, whether its tensors fit."""
        super().post_init()
        loading = _LOADING.get()
        if loading is not None and type(self) is loading.model_class:
            self._check_fit(loading)

    def _check_fit(self, loading: _Loading) -> None:
        own, tensors, prefix = self.state_dict(), loading.tensors, f"{self.base_model_prefix}."
        has_head, same_head = self.base_model is not self, type(self).__name__ in loading.saved_by
        of_vae = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}  # none where the folder is a VAE's
        if has_head and not of_vae:
            tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        elif has_head and not same_head:
            tensors = of_vae
        elif of_vae and not has_head:
            tensors = {name.removeprefix(prefix): tensor for name, tensor in of_vae.items()}
        for name, tensor in tensors.items():
            _check_tensor(name, tensor, own.get(name), type(self).__name__)
        stored_as = self._tied()  # of two that are one, one is stored
        there = {stored_as.get(name, name) for name in tensors}
        for name, tensor in own.items():
            needed = not has_head or same_head or name.startswith(prefix)  # else it is of a head that is new
            if needed and stored_as.get(name, name) not in there:
                files = ", ".join(sorted({stored.path.name for stored in loading.tensors.values()})) or WEIGHTS
                raise _MisfitError(f"{files}: tensor {name!r} is missing, expected {tuple(tensor.shape)}")

    def _tied(self) -> dict[str, str]:
        """Of tensors that are another one: its name."""
        parts = ((f"{at}." if at else "", part) for at, part in self.named_modules() if isinstance(part, PreTrainedModel))
        return {at + name: at + source for at, part in parts for name, source in part.all_tied_weights_keys.items()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the model's files, and a manifest of them; see ``PreTrainedModel.save_pretrained``.

        An interrupted save over another model leaves the old one, the new one, or a folder that ``from_pretrained`` refuses.

        Raises:
            OSError: the files cannot be written; what was there is untouched.
            ValueError: the model has adapters and the folder a model: transformers would write them alone, over what they belong to.
        """
        _refuse_formats(kwargs)
        folder = Path(save_directory)
        if self._hf_peft_config_loaded and (folder / "config.json").exists():
            expected = "expected another folder, or a whole model"
            raise ValueError(f"{folder}: holds a model, received a {type(self).__name__} with adapters, {expected}")
        writing = {name: kwargs.pop(name) for name in ("state_dict", "max_shard_size", "save_original_format") if name in kwargs}
        with replacing(folder) as made:
            super().save_pretrained(made, is_main_process=is_main_process, **writing)
        if push_to_hub and is_main_process:
            self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)


class _MisfitError(FolderError):
    """The tensors of a folder are not those of the model."""


def _check_tensor(name: str, stored: Stored, own: torch.Tensor | None, kind: str) -> None:
    place = f"{stored.path.name}: tensor {name!r}"
    if own is None:
        raise _MisfitError(f"{place}: expected none of this name in a {kind}")
    if stored.shape != tuple(own.shape):
        raise _MisfitError(f"{place}: received shape {stored.shape}, expected {tuple(own.shape)}")
    expected = _FLOATS if own.is_floating_point() else {_KINDS.get(own.dtype, "")}
    if stored.dtype not in expected:
        raise _MisfitError(f"{place}: received {stored.dtype}, expected {' or '.join(sorted(expected))}")


def _refuse_formats(options: dict[str, Any]) -> None:
    for name in _NOT_READ:
        if options.pop(name, None):
            raise ValueError(f"{name}: expected none: a model folder holds one model, in safetensors")
    if options.pop("use_safetensors", None) is False:
        raise ValueError("use_safetensors: received False, expected True: pickles are never read")


def _local(name: Any, options: dict[str, Any]) -> Path:
    """The folder of a model: a local one, or the Hub's files in its cache."""
    hub = {key: options.pop(key) for key in _OF_THE_HUB if key in options}
    subfolder = options.pop("subfolder", None) or ""
    if os.path.isdir(name):
        return Path(name, subfolder)
    try:
        config = Path(cached_file(str(name), CONFIG, subfolder=subfolder, **hub))  # has good words for what is not there
        root = config.parents[len(Path(subfolder).parts)]
        hub |= {"revision": root.name, "local_files_only": hub.get("local_files_only", False) or is_offline_mode()}
        patterns = [str(Path(subfolder, file)) for file in (CONFIG, "generation_config.json", MANIFEST, "model*.safetensors", INDEX)]
        return Path(snapshot_download(str(name), allow_patterns=patterns, **hub), subfolder)
    except Exception as error:  # of the HTTP library too, and its errors name no file
        raise OSError(f"{name}: cannot be fetched from the Hub: {error}") from error


def _differing(had: Mapping[str, Any], asked: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The fields, those of modalities too, in which a configuration is not what was asked for."""
    for name, value in asked.items():
        if name == "modalities" or at == "modalities.":
            yield from _differing(had.get(name, {}), value, f"{at}{name}.")
        elif name in had and had[name] != value and name not in _NOT_OF_THE_SHAPE:
            yield f"{at}{name}: has {had[name]!r}, asked for {value!r}"
