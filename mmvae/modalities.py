"""Models and columns that belong together: what a model's modalities read of a data set, and new modalities for a data set.

Of a model that is there already, its processors tell how a column is read; for a new one, the column's texts make the tokenizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from mmvae.data import Augmentation, Column, ImageColumn, Loader, Rows, TextColumn, WordCountColumn, as_modalities, find_column, texts_of
from mmvae.experiment import image_processor, make_tokenizer
from mmvae.joint_processing import MMVAEProcessor, check_facts, facts_of_words
from mmvae.models.configuration import MMVAEConfig, VAEConfig
from mmvae.models.image_vae import ImageVAEConfig
from mmvae.models.mmvae import MMVAE
from mmvae.models.text_vae import TextVAEConfig
from mmvae.models.topic_vae import TopicVAEConfig
from mmvae.options import by_name, parse_modalities
from mmvae.processing import RESERVED_WORDS
from mmvae.vectorizer import TopicVAEVectorizer

_COUNTED = 256  # rows whose size is taken
KINDS: dict[str, type[VAEConfig]] = {"image": ImageVAEConfig, "text": TextVAEConfig, "topic": TopicVAEConfig}


@dataclass(frozen=True)
class NewModality:
    """A modality for a column of a data set: its model's configuration, what reads for it, and the column."""

    config: VAEConfig
    processor: Any
    column: Column


def new_modality(
    kind: str,
    data: Any,
    column: str,
    options: Mapping[str, Any],
    *,
    reading: Mapping[str, Any],
    text: Mapping[str, Any],
    name: str = "data",
    on_bad_row: str = "error",
) -> NewModality:
    """A modality from scratch.

    Arguments:
        kind: a key of ``KINDS``.
        data: training rows; of a column of texts they train the tokenizer or give the vocabulary.
        column: of the data set.
        options: fields of the configuration.
        reading: of texts, ``max_length`` and ``truncate`` of :class:`mmvae.data.TextColumn`.
        text: ``kind`` and ``vocab_size`` of :func:`mmvae.experiment.make_tokenizer`; of topics ``vocab_size`` alone.
        name: what the data set is called in errors.
        on_bad_row: "skip" trains no tokenizer on bad rows.
    """
    if kind == "image":
        config = ImageVAEConfig(**options)
        pixels = ImageColumn(column, config.height_width, config.num_channels)
        return NewModality(config, image_processor(pixels), pixels)
    reserved = RESERVED_WORDS if kind == "text" else ()
    texts = texts_of(data, column, name, missing=True, on_bad_row=on_bad_row, reserved=reserved)
    if kind == "topic":
        vectorizer = TopicVAEVectorizer.fit(texts, stop_words="english", max_features=text["vocab_size"])
        config = TopicVAEConfig(**{**options, "vocabulary": vectorizer.vocabulary})
        return NewModality(config, vectorizer, WordCountColumn(column, vectorizer))
    tokenizer, ids = make_tokenizer(texts=texts, **text)
    config = TextVAEConfig(**{"tie_word_embeddings": True, **options, **ids})
    return NewModality(config, tokenizer, TextColumn(column, tokenizer, **reading))


def _found(data: Any, kind: str, name: str | None = None) -> str:
    """The column of a kind of modality: topics are those of texts."""
    return find_column(data, "text" if kind == "topic" else kind, name)


def new_modalities(
    data: Any, kinds: Mapping[str, tuple[str, str | None]], fields: Mapping[str, Any], **options: Any
) -> dict[str, NewModality]:
    """A modality from scratch for each name.

    Arguments:
        data: training rows.
        kinds: kind and column by name, of :func:`mmvae.options.parse_modalities`; the column is guessed where it is None.
        fields: of the configurations, by name.
        options: ``reading``, ``text``, ``name`` and ``on_bad_row`` of :func:`new_modality`.

    Raises:
        ValueError: a column that is not there, or that two modalities would have.
    """
    made: dict[str, NewModality] = {}
    shared = {"prior": "standard_normal"} if len(kinds) > 1 else {}  # that of the joint latent is the joint model's
    for name, (kind, column) in kinds.items():
        source = _found(data, kind, column or (name if name in (data.column_names or ()) else None))
        if source in {part.column.name for part in made.values()}:
            raise ValueError(f"modalities: column {source!r} is taken already, expected another one for {name!r}: {name}:{kind}:column")
        made[name] = new_modality(kind, data, source, {**shared, **fields.get(name, {})}, **options)
    return made


def joined(parts: Mapping[str, NewModality], **fields: Any) -> tuple[MMVAEConfig, MMVAEProcessor, list[Column]]:
    """Configuration of a joint model of these modalities, with fields of its own, its processor, and a column for each modality."""
    for name, source in fields.get("sources", {}).items():  # what is wrong with them the configuration tells
        if {name, source} <= parts.keys() and getattr(parts[name].config, "source_size", None) == 0:
            parts[name].config.source_size = parts[source].config.states_size
    config = MMVAEConfig(modalities={name: part.config for name, part in parts.items()}, **fields)
    processor = MMVAEProcessor({name: part.processor for name, part in parts.items()})
    return config, processor, as_modalities({name: part.column for name, part in parts.items()})


def weights_by_size(model: MMVAE, rows: Rows) -> dict[str, float]:
    """Likelihood weights that make up for size: of the most values that a modality scores in a row, on average, over its own number.

    Values are pixels times channels, tokens, or of topics words, in the first 256 rows that have the modality, in the order of the data,
    so they do not depend on the number of ranks, and on a seed only where the rows hide modalities (``drop``). A modality that no row has,
    or that scores nothing in them, gets none.

    Arguments:
        model: a joint one.
        rows: training rows with the columns of all its modalities.

    Returns:
        Weights of at least 1 by modality, of three digits.
    """
    sizes: dict[str, list[float]] = {name: [] for name in model.modalities}
    for batch in Loader(rows, 64, shuffle=False, pool=0).batches(0):
        inputs, _ = model.split(batch)
        for m, (name, vae) in enumerate(model.vaes.items()):
            if (here := batch["present"][:, m]).any():
                target = vae.target(**{key: value[here] for key, value in inputs[name].items()})
                values = target if isinstance(vae.config, TopicVAEConfig) else target != -100  # which texts are padded with
                sizes[name] += values.flatten(1).sum(1).tolist()
        if min(map(len, sizes.values())) >= _COUNTED:
            break
    means = {name: sum(found[:_COUNTED]) / len(found[:_COUNTED]) for name, found in sizes.items() if sum(found[:_COUNTED])}
    return {name: float(f"{max(means.values()) / mean:.3g}") for name, mean in means.items()}


def from_scratch(
    data: Any, modalities: str | None, vaes: str | Mapping[str, Any], mmvae: Mapping[str, Any], **options: Any
) -> tuple[VAEConfig, Any, list[Column]]:
    """What a new model of one modality or several is made of.

    Arguments:
        data: training rows.
        modalities: ``name:kind:column``, separated by commas; the column is guessed where it is left out, all of it when None.
        vaes: fields of the configuration of each modality, by its name or kind.
        mmvae: of several modalities, fields of :class:`mmvae.MMVAEConfig`.
        options: ``reading``, ``text``, ``name`` and ``on_bad_row`` of :func:`new_modality`.

    Returns:
        The configuration, what reads for the model, and a column for each modality.
    """
    kinds = parse_modalities(modalities or guess_modalities(data), KINDS)
    fields = by_name("vaes", vaes, {name: kind for name, (kind, _) in kinds.items()}, KINDS)
    parts = new_modalities(data, kinds, fields, **options)
    if len(parts) > 1:
        return joined(parts, **mmvae)
    if mmvae:
        raise ValueError(f"mmvae: received {dict(mmvae)} for {', '.join(parts)} alone, expected none: there is one modality")
    (part,) = parts.values()
    return part.config, part.processor, [part.column]


def overridden(config: VAEConfig, vaes: Mapping[str, Any], mmvae: Mapping[str, Any], **fields: Any) -> VAEConfig:
    """A folder's configuration with other values of some fields, checked.

    Arguments:
        config: the folder's.
        vaes: fields by modality; of a model of one modality by its kind.
        mmvae: a joint model's own fields.
        fields: further ones.

    Raises:
        ValueError: for a modality that the model has not, or fields of several where there is one.
    """
    values, joint = config.to_dict(), isinstance(config, MMVAEConfig)
    known = list(config.modalities) if joint else [config.model_type.removesuffix("_vae")]
    for name in vaes:
        if name not in known:
            raise ValueError(f"vaes: received {name!r}, expected one of {known}")
    if mmvae and not joint:
        raise ValueError(f"mmvae: received {dict(mmvae)} for a {config.model_type}, expected none: it has one modality")
    for name, given in vaes.items():
        (values["modalities"][name] if joint else values).update(given)
    return type(config).from_dict(values | dict(mmvae) | fields)


def augmented(columns: Sequence[Column], changes: Mapping[str, Any]) -> list[Column]:
    """Columns of training rows: their pictures are changed at random, see :class:`mmvae.data.Augmentation`.

    Raises:
        ValueError: there are changes and no pictures.
    """
    if changes and not any(isinstance(column, ImageColumn) for column in columns):
        raise ValueError(f"augmentation: received {dict(changes)} without a picture, expected none")
    made = Augmentation(**changes)
    return [replace(column, augmentation=made) if isinstance(column, ImageColumn) else column for column in columns]


def guess_modalities(data: Any) -> str:
    """``kind:kind`` of the first kind of which a data set has a column that can be told from others.

    Raises:
        ValueError: there is none, listing the columns.
    """
    for kind in KINDS:
        try:
            _found(data, kind)
        except ValueError as error:
            cause = error
        else:
            return f"{kind}:{kind}"
    raise cause


def read_column(config: VAEConfig, processor: Any, name: str, *, max_length: int = 512, truncate: bool = False) -> Column:
    """What a model of one modality takes from a column, read as its processor does."""
    config = getattr(config, "below", config)
    if isinstance(config, TextVAEConfig):
        return TextColumn(name, processor, max_length, truncate)
    if isinstance(config, TopicVAEConfig):
        return WordCountColumn(name, processor)
    pixels = {"background": tuple(processor.background), "resize": processor.resize_mode}
    return ImageColumn(name, config.height_width, config.num_channels, **pixels)


def _check(config: VAEConfig, processor: Any) -> None:
    """Refuse a processor that writes other words or ends of sentences than a model of one modality reads."""
    config = getattr(config, "below", config)
    if isinstance(config, TopicVAEConfig):
        check_facts("processor", {"vocabulary": (processor.vocabulary, config.vocabulary)})
    if isinstance(config, TextVAEConfig):
        facts = facts_of_words(processor, config)
        check_facts("tokenizer", {field: (own, getattr(config, field)) for field, own in facts.items()})


def read_columns(
    model: PreTrainedModel, processor: Any, data: Any, modalities: str | None = None, column: str | None = None, **reading: Any
) -> list[Column]:
    """A column for each modality of a model, in their order.

    Arguments:
        model: of one modality or a joint one, with a head or without.
        processor: the model's.
        data: what the columns are of.
        modalities: ``name:kind:column``, separated by commas; the column is guessed where it is left out, all of it when None.
        column: of the only modality; None of a joint model.
        reading: ``max_length`` and ``truncate`` of texts.

    Raises:
        ValueError: modalities that are not the model's, columns that are not there, one column for a joint model, or a processor whose
            words or special tokens are not the model's.
    """
    joint = isinstance(model.config, MMVAEConfig)
    if joint and column:
        raise ValueError(f"column: received {column!r} for a joint model, expected none: name columns in modalities, as name:kind:column")
    vaes = dict(model.base_model.vaes) if joint else {model.input_modalities[0]: model}
    own = {name: vae.input_modalities[0] for name, vae in vaes.items()}
    found = parse_modalities(modalities or ",".join(f"{name}:{kind}" for name, kind in own.items()), KINDS)
    if not joint and [kind for kind, _ in found.values()] == [*own.values()]:
        found = {name: (kind, source or column) for name, (kind, source) in zip(own, found.values(), strict=True)}
    if {name: kind for name, (kind, _) in found.items()} != own:
        raise ValueError(f"modalities: received {list(found)}, expected the model's, {list(own)}")
    if joint:
        processor.check(model.config)
    else:
        _check(model.config, processor)
    made = {}
    for name, vae in vaes.items():
        kind, source = found[name]
        source = _found(data, kind, source or (name if joint and name in (data.column_names or ()) else None))
        made[name] = read_column(vae.config, processor.parts[name] if joint else processor, source, **reading)
    return as_modalities(made) if joint else [*made.values()]
