"""What every model has that is a VAE with a head: how its folder is read, and which part of it is trained.

A folder of the VAE alone gives the head new first values, and a VAE's ``from_pretrained`` takes the folder of a model with a head.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from transformers import PreTrainedModel

from mmvae.models.configuration import VAEConfig

_NOT_OF_THE_SHAPE = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")


class HeadedVAE(PreTrainedModel):
    """A VAE, ``base_model``, with a head; its author builds both, the head under the name ``head_name``, and writes ``forward``."""

    config: VAEConfig
    head_name: ClassVar[str]
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = False  # Trainer must divide by the accumulation steps itself
    model_tags: ClassVar[list[str]] = ["mmvae", "vae"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """A model from the folder of one, or of a VAE, to which it adds a new head; see ``PreTrainedModel.from_pretrained``.

        Raises:
            ValueError: naming the fields of the configuration in which the folder's differs from what was asked for, where its weights do
                not fit that; or a folder of another kind of model.
        """
        saved = cls.config_class.get_config_dict(pretrained_model_name_or_path)[0]
        if saved.get("model_type") != cls.config_class.model_type:
            expected = f"expected {cls.config_class.model_type!r} for {cls.__name__}"
            raise ValueError(f"{pretrained_model_name_or_path}: model_type: received {saved.get('model_type')!r}, {expected}")
        told, lost, cause = kwargs.pop("output_loading_info", False), [], None
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
            lost = [name for name in info["missing_keys"] if not name.startswith(f"{cls.head_name}.")]
        except RuntimeError as error:
            cause = error
        if lost or cause:
            asked = kwargs["config"].to_dict() if isinstance(kwargs.get("config"), VAEConfig) else dict(kwargs)
            asked |= {"num_labels": len(asked["id2label"])} if asked.get("id2label") else {}
            had = cls.config_class.from_dict(saved)
            differing = list(_differing(had.to_dict() | {"num_labels": had.num_labels}, asked))
            why = "; ".join(differing) or (str(cause) if cause else f"{lost[0]} is missing")
            raise ValueError(f"{pretrained_model_name_or_path}: its weights do not fit: {why}") from cause
        return (model, info) if told else model

    @property
    def input_names(self) -> tuple[str, ...]:
        """The VAE's inputs, and "labels"."""
        return (*self.base_model.input_names, "labels")

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What the VAE's p(x|z) may depend on besides z."""
        return self.base_model.condition_names

    @property
    def inference_modules(self) -> tuple[str, ...]:
        """The head, beside those of the VAE."""
        return (self.head_name,)

    def freeze(self, frozen: bool = True) -> Self:
        """Leave the VAE as it is, its statistics too, and train the head alone; or, with False, train everything again."""
        self.base_model.requires_grad_(not frozen)
        return self.train(self.training)

    @property
    def frozen(self) -> bool:
        """Whether only the head is trained."""
        return not any(parameter.requires_grad for parameter in self.base_model.parameters())

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which a frozen VAE stays in evaluation mode: no dropout, no input noise, no statistics."""
        super().train(mode)
        if self.frozen:
            self.base_model.eval()
        return self


def _differing(had: Mapping[str, Any], asked: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The fields, those of modalities too, in which a configuration is not what was asked for."""
    for name, value in asked.items():
        if name == "modalities" or at == "modalities.":
            yield from _differing(had.get(name, {}), value, f"{at}{name}.")
        elif name in had and had[name] != value and name not in _NOT_OF_THE_SHAPE:
            yield f"{at}{name}: has {had[name]!r}, asked for {value!r}"
