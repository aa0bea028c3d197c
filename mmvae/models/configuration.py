"""Strictness about names and values: the configuration that all VAEs share, and that of a joint model."""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mmvae.aggregation import AGGREGATIONS, Posterior
from mmvae.folder import read_json
from mmvae.models.inherited import check_inherited, nearest, refuse_from_files
from mmvae.objectives import OBJECTIVES, Objective, check_options
from mmvae.priors import PRIORS

_MOST_MODALITIES = 64
_OF_OTHERS = ("mmvae", "stacked_vae")  # models whose configurations hold those of others

# Names that transformers itself hands to a config beside its fields.
_FOREIGN = {
    "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal", "_name_or_path", "attn_implementation",
    "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config",
    "quantization_config", "tie_word_embeddings", "torch_dtype", "use_cache",
}  # fmt: skip


def prefixes(input_names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """What each modality of a joint model puts before the names of its inputs: its own name where another one has an input so called.

    Arguments:
        input_names: of each modality.

    Returns:
        A modality's name, or "" where its inputs keep their bare names.

    Example:
        >>> prefixes({"en": ["input_ids"], "de": ["input_ids"], "image": ["pixel_values"]})
        {'en': 'en', 'de': 'de', 'image': ''}
    """
    counts = Counter(name for names in input_names.values() for name in set(names))
    return {modality: modality if any(counts[name] > 1 for name in names) else "" for modality, names in input_names.items()}


def input_name(prefix: str, name: str) -> str:
    """What an input is called in a batch: ``prefix_name``, or its bare name without a prefix."""
    return f"{prefix}_{name}" if prefix else name


@strict
class VAEConfig(PreTrainedConfig):
    """What the configurations of all VAEs share. A name that is not a field is an error that names the nearest field.

    What is assigned later to such a name, as ``Trainer`` does with a tokenizer's ``eos_token_id``, is not written to files.

    Arguments:
        latent_dim: size of the latent vector, or its channels when it is spatial; 1 to 65,536.
        prior: a key of ``mmvae.priors.PRIORS``.
        prior_components: K of a mixture or Vamp prior; 1 to 10,000.
        densities: options of what :func:`mmvae.density_fitting.fit_densities` fits after training, by name: "latent", p(z), from which
            samples are then drawn. See ``mmvae.densities.build_density``.
        classifier_features: what a classifier of ``mmvae.models.heads`` reads of the posterior: its "mean"; its "moments", mean and
            log-variance; or a "sample", which is the mean in evaluation.
        classifier_hidden_size: width of the classifier's hidden layer; 0: there is none.
        classifier_dropout: on what the classifier reads and on its hidden layer, [0, 1).
        classifier_alpha: weight of the cross-entropy beside -ELBO, in a classifier's loss; None: the cross-entropy is the loss.
    """

    latent_dim: int = 64
    prior: str = "standard_normal"
    prior_components: int = 50
    densities: dict[str, dict[str, Any]] = field(default_factory=dict)
    classifier_features: str = "mean"
    classifier_hidden_size: int = 0
    classifier_dropout: float | int = 0.0
    classifier_alpha: float | int | None = None

    states_size: ClassVar[int] = 0  # width of the states that another modality's decoder may attend to
    latent_density: ClassVar[str] = "latent"  # what the density of p(z) is called
    least_private_dim: ClassVar[int] = 0  # how many of the latent's last dimensions a joint model must leave to this modality
    # Allowed closed ranges and sets of values, by field; subclasses add theirs.
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "latent_dim": (1, 65_536),
        "prior_components": (1, 10_000),
        "classifier_hidden_size": (0, 65_536),
        "classifier_dropout": (0, 0.99),
        "classifier_alpha": (0, 1e6),
    }
    choices: ClassVar[dict[str, Sequence[Any]]] = {"prior": tuple(PRIORS), "classifier_features": ("mean", "moments", "sample")}

    def __post_init__(self, **kwargs: Any) -> None:
        known = {f.name for f in fields(self)}
        for name in kwargs.keys() - _FOREIGN:
            raise ValueError(
                f"{type(self).__name__}: unknown field {name!r} = {kwargs[name]!r}; the nearest one is {nearest(name, known)!r}"
            )
        check_inherited(type(self).__name__, {"dtype": self.dtype, "id2label": self.id2label} | kwargs)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; ``label2id`` is always what ``id2label`` says, however that came to be."""
        super().__setattr__(name, value)
        labels = self.__dict__.get("id2label")
        if name in ("id2label", "label2id") and isinstance(labels, dict):
            super().__setattr__("label2id", {label: number for number, label in labels.items() if isinstance(label, str)})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from what a file holds; see ``PreTrainedConfig.from_dict``.

        Raises:
            ValueError: naming a field, unknown, out of its range, or one that would make transformers download or quantize something.
        """
        refuse_from_files(cls.__name__, config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of everything that a file may give back."""
        known = _FOREIGN.union(f.name for f in fields(self))
        return {name: value for name, value in super().to_dict().items() if name in known}

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return read_json(Path(json_file))

    def validate_architecture(self) -> None:
        """Check every field against ``ranges`` and ``choices`` before any module is built.

        Raises:
            ValueError: naming the field, its value and what was expected.
        """
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            for item in value if isinstance(value, list | tuple) else [value]:
                if item is not None and not low <= item <= high:  # false for NaN too
                    raise ValueError(f"{type(self).__name__}.{name}: received {value!r}, expected {low} to {high}")
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{type(self).__name__}.{name}: received {getattr(self, name)!r}, expected one of {expected}")
        for name in self.densities:
            self.density(name)

    def density(self, name: str) -> tuple[str, str | None]:
        """What a density is over, "latent", "given" or "private", and the modality that it is about.

        Raises:
            ValueError: for one that a model of this configuration cannot have.
        """
        known = self._densities()
        if name not in known:
            raise ValueError(f"{type(self).__name__}.densities: received {name!r}, expected one of {list(known)}")
        return known[name]

    def _densities(self) -> dict[str, tuple[str, str | None]]:
        return {self.latent_density: ("latent", None)}


@strict
class MMVAEConfig(VAEConfig):
    """Configuration of an :class:`mmvae.models.mmvae.MMVAE`: modalities x aggregation x objective x prior.

    Arguments:
        modalities: the configurations of the children by name, in the order of the columns of ``present``; names are identifiers. Their
            own priors are not used.
        latent_dim: D of the shared latent; None where all modalities have the same, which is it. A wider modality keeps its last
            dimensions to itself.
        aggregation: a key of ``mmvae.aggregation.AGGREGATIONS``.
        aggregation_options: its arguments.
        inference_aggregation: the aggregation in evaluation mode, with those of the options that it takes; None for the same. MVAE trains a
            mixture of subsets and infers with the product of all that is visible.
        objective: a key of ``mmvae.objectives.OBJECTIVES``: what ``forward`` minimises when it is told nothing else.
        objective_options: its arguments.
        likelihood_weights: weight of a modality's log-likelihood in the objective, by name; 1 where not named. Figures know no weights.
        modality_dropout: share of the training rows in which the encoders do not see a modality that is there and scored all the same, by
            name: so one modality learns to give what another one has. Never all of a row. (mvae and mmvm do not score what is hidden.)
        sources: of text modalities, the name of another one to whose encoder's states their decoder attends, p(x_m|z, x_source), in rows
            that show the source and not the modality itself: where it is made of others, or scored given others. Where everything is seen,
            as in figures of x, nothing is attended to, and p(x|z) is that of the latent.
        draw: which components of the posterior are decoded: "all", "one" drawn per row, or "auto": all up to 4.
        densities: fitted after training and used by what is generated, by name: "shared", p(z);
            "shared_given_<modality>", p(z|x_m); "private_<modality>", p(w_m|z).
    """

    model_type = "mmvae"

    latent_dim: int | None = None
    modalities: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "mopoe"
    aggregation_options: dict[str, Any] = field(default_factory=dict)
    inference_aggregation: str | None = None
    objective: str = "elbo"
    objective_options: dict[str, Any] = field(default_factory=dict)
    likelihood_weights: dict[str, float | int] = field(default_factory=dict)
    modality_dropout: dict[str, float | int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    draw: str = "auto"

    latent_density: ClassVar[str] = "shared"
    choices: ClassVar[dict[str, Sequence[Any]]] = VAEConfig.choices | {
        "aggregation": tuple(AGGREGATIONS),
        "inference_aggregation": (None, *AGGREGATIONS),
        "objective": tuple(OBJECTIVES),
        "draw": ("auto", "all", "one"),
    }

    def __post_init__(self, **kwargs: Any) -> None:
        if len(self.modalities) > _MOST_MODALITIES:
            raise ValueError(f"MMVAEConfig.modalities: received {len(self.modalities)}, expected at most {_MOST_MODALITIES}")
        self.modalities = {name: _child(name, child) for name, child in self.modalities.items()}
        if self.latent_dim is None and self.modalities:
            dims = {name: child.latent_dim for name, child in self.modalities.items()}
            if len(set(dims.values())) > 1:
                raise ValueError(f"MMVAEConfig.latent_dim: received None with modalities of latent_dim {dims}, expected the shared size")
            self.latent_dim = next(iter(dims.values()))
        super().__post_init__(**kwargs)

    @property
    def private_dims(self) -> dict[str, int]:
        """Size of w_m of every modality that has one."""
        dims = {name: child.latent_dim - self.latent_dim for name, child in self.modalities.items()}
        return {name: dim for name, dim in dims.items() if dim}

    @property
    def maximised(self) -> Objective:
        """The objective with its options."""
        return partial(OBJECTIVES[self.objective], **self.objective_options)

    def aggregate(self, training: bool) -> Callable[..., Posterior]:
        """The aggregation with its options, for training or for inference."""
        name = self.aggregation if training or self.inference_aggregation is None else self.inference_aggregation
        function, options = AGGREGATIONS[name], self.aggregation_options
        return partial(function, **{key: options[key] for key in options.keys() & inspect.signature(function).parameters.keys()})

    def validate_architecture(self) -> None:
        """Check the fields; see :meth:`VAEConfig.validate_architecture`."""
        super().validate_architecture()
        for name, child in self.modalities.items():
            if child.latent_dim < self.latent_dim + child.least_private_dim:
                expected = f"expected at least the shared {self.latent_dim}"
                expected += f" and {child.least_private_dim} that it keeps to itself" if child.least_private_dim else ""
                raise ValueError(f"MMVAEConfig.modalities[{name!r}].latent_dim: received {child.latent_dim}, {expected}")
            for field_, none in (("prior", "standard_normal"), ("densities", {}), ("num_classes", 0), ("bow_weight", 0)):
                if getattr(child, field_, none) != none:
                    expected = f"expected {none!r}: what is known of the latent is the joint model's"
                    raise ValueError(f"MMVAEConfig.modalities[{name!r}].{field_}: received {getattr(child, field_)!r}, {expected}")
        bind("MMVAEConfig.aggregation_options", AGGREGATIONS[self.aggregation], self.aggregation_options, ("experts", "visible", "prior"))
        bind("MMVAEConfig.objective_options", OBJECTIVES[self.objective], self.objective_options, ("terms", "beta"))
        check_options("MMVAEConfig.objective_options", self.objective_options)
        needed = {"mmvm": "moe", "jmvae": "poe", "mvtcae": "poe"}.get(self.objective)
        for option in ("aggregation", "inference_aggregation"):
            value = getattr(self, option)
            if needed and value not in (needed, None):
                raise ValueError(f"MMVAEConfig.{option}: received {value!r} with objective {self.objective!r}, expected {needed!r}")
        if self.sources and self.objective in ("mvae", "mmvm"):
            expected = f"expected none with objective {self.objective!r}, which scores nothing that is hidden from the encoders"
            raise ValueError(f"MMVAEConfig.sources: received {self.sources!r}, {expected}")
        for name, source in self.sources.items():
            if name == source or not {name, source} <= self.modalities.keys() or not self.modalities[source].states_size:
                raise ValueError(f"MMVAEConfig.sources: received {source!r} for {name!r}, expected another modality that is a text")
            size, expected = getattr(self.modalities[name], "source_size", None), self.modalities[source].states_size
            if size != expected:
                what = f"MMVAEConfig.modalities[{name!r}].source_size: received {size}"
                raise ValueError(f"{what}, expected {expected}, the size of the states of its source {source!r}")
        inferring = self.aggregate(training=False)
        bind("MMVAEConfig.inference_aggregation", inferring.func, inferring.keywords, ("experts", "visible", "prior"))
        for option, most in (("likelihood_weights", 1e30), ("modality_dropout", 1)):
            for name, value in getattr(self, option).items():
                if name not in self.modalities:
                    raise ValueError(f"MMVAEConfig.{option}: received {name!r}, expected one of {list(self.modalities)}")
                if not 0 <= value <= most:
                    raise ValueError(f"MMVAEConfig.{option}[{name!r}]: received {value!r}, expected 0 to {most}")

    def _densities(self) -> dict[str, tuple[str, str | None]]:
        given = {f"shared_given_{name}": ("given", name) for name in self.modalities}
        return super()._densities() | given | {f"private_{name}": ("private", name) for name in self.private_dims}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the children's too."""
        values = super().to_dict()
        return values | {"modalities": {name: plain(child) for name, child in self.modalities.items()}}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON in which the modalities keep their order, that of the columns of ``present``; transformers sorts all keys."""
        values = json.loads(super().to_json_string(use_diff))
        values["modalities"] = {name: values["modalities"][name] for name in self.modalities}
        return json.dumps(values, indent=2) + "\n"


def _child(name: str, child: Any) -> PreTrainedConfig:
    """A child's configuration by its name."""
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"MMVAEConfig.modalities: received the name {name!r}, expected letters, digits and underscores, and no name of torch's"
        )
    return inner(f"MMVAEConfig.modalities[{name!r}]", child)


def inner(where: str, child: Any) -> PreTrainedConfig:
    """A configuration inside of another, which ``where`` names, from one or from its fields with their ``model_type``; else ValueError."""
    kind = child.get("model_type") if isinstance(child, Mapping) else getattr(child, "model_type", None)
    if kind is None:
        raise ValueError(f"{where}: received {child!r:.80}, expected a configuration, or its fields with a model_type")
    try:
        if isinstance(child, Mapping) and kind not in _OF_OTHERS:
            refuse_from_files("its configuration", child)
            child = CONFIG_MAPPING[kind].from_dict(dict(child)) if kind in CONFIG_MAPPING else AutoConfig.for_model(**child)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(child, VAEConfig) or child.model_type in _OF_OTHERS:  # any other model may be of any size
        raise ValueError(f"{where}: received model_type {kind!r}, expected that of a VAE of one modality")
    return child


def plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Plain values of a configuration inside of another, without its dtype, which is the whole model's, and its place."""
    outer = {"transformers_version", "dtype", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in outer}


def bind(name: str, function: Callable, options: Mapping[str, Any], given: Sequence[str] = ()) -> None:
    """Refuse options that a function does not take, and the lack of ones that it needs.

    Arguments:
        name: of the options, for the error.
        function: that they are meant for.
        options: by name.
        given: arguments that it will have anyway.

    Raises:
        ValueError: naming the options and the function's parameters.
    """
    try:
        inspect.signature(function).bind(**dict.fromkeys(given), **options)
    except TypeError as error:
        names = [parameter for parameter in inspect.signature(function).parameters if parameter not in given]
        raise ValueError(f"{name}: received {dict(options)}, expected parameters of {function.__name__}, {names} ({error})") from None
