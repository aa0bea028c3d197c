"""The models as citizens of transformers: configurations, Trainer, Auto classes."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import PreTrainedConfig, Trainer, TrainingArguments

import mmvae
from mmvae import MMVAE, ImageVAEForSemanticSegmentation, MMVAEConfig, TextVAEForSequenceClassification
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.noise import fold

HOSTILE = [0, -1, 10**6, 10**12, 2**63, math.nan, math.inf, -math.inf, None, "4", 4.5, [], {}, True, "x" * 10_000, "../x", [None], [10**12]]
INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def own_fields(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class) if field.name not in INHERITED]


@pytest.mark.parametrize(("config_class", "name"), [(c, name) for c in (ImageVAEConfig, TextVAEConfig) for name in own_fields(c)])
def test_hostile_values_are_named_or_legitimate(config_class, name):
    refused = 0
    for value in HOSTILE:
        try:
            config = config_class(**{name: value})
        except (ValueError, StrictDataclassError) as error:
            refused += 1
            named = name in str(error)
        else:
            named = True
            low, high = config_class.ranges.get(name, (None, None))
            kept = getattr(config, name)
            assert kept == value
            if name.endswith("_token_id"):
                assert 0 <= kept < config.vocab_size
            elif low is not None and kept is not None:
                assert low <= kept <= high
            else:
                assert isinstance(value, bool) or (value, name) in [
                    *((None, field) for field in ("hidden_channels", "num_blocks", "patch_size", "hidden_size")),
                    (None, "classifier_alpha"),
                    ({}, "densities"),
                ]
        assert named, f"{value!r:.50}"
    assert refused >= len(HOSTILE) - 5


@pytest.mark.parametrize("config_class", [ImageVAEConfig, TextVAEConfig])
def test_assignment_is_checked_too(config_class, tmp_path):
    config = config_class()
    with pytest.raises((ValueError, StrictDataclassError), match="latent_dim"):
        config.latent_dim = "4"
    config.latent_dim = -1  # its range is checked when it is saved
    with pytest.raises((ValueError, StrictDataclassError), match="latent_dim"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config_class", "name", "nearest"),
    [
        (ImageVAEConfig, "latnet_dim", "latent_dim"),
        (ImageVAEConfig, "image_sizes", "image_size"),
        (ImageVAEConfig, "hidden_chanels", "hidden_channels"),
        (TextVAEConfig, "vocabsize", "vocab_size"),
        (TextVAEConfig, "encoder_layer", "encoder_layers"),
        (TextVAEConfig, "word_drop_out", "word_dropout"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(config_class, name, nearest, tmp_path):
    with pytest.raises(ValueError, match=f"unknown field '{name}' = 3; the nearest one is '{nearest}'"):
        config_class(**{name: 3})
    config_class().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 3}))
    with pytest.raises(ValueError, match=f"unknown field '{name}'"):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(("config_class", "name"), [(ImageVAEConfig, "image_config"), (TextVAEConfig, "text_config")])
def test_a_configuration_inside_a_file_does_not_win_over_the_rest_of_it(config_class, name, tmp_path):
    config_class().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: {"latent_dim": 5}}))
    with pytest.raises(ValueError, match=f"unknown field '{name}'"):
        config_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["temperature", "max_length", "top_k", "do_sample", "", "x" * 10_000, "../x"])
def test_names_of_generation_are_not_dropped_silently(name):
    with pytest.raises(ValueError, match="unknown field"):
        TextVAEConfig(**{name: 3})


def test_no_module_is_built_from_a_hostile_file(tmp_path):
    ImageVAE(ImageVAEConfig(image_size=16)).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_dim": 10**12}))
    with pytest.raises(StrictDataclassError, match="latent_dim"):
        ImageVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [ImageVAEConfig(image_size=[28, 30], dropout=0.1), TextVAEConfig(dropout=0, eos_token_id=7)])
def test_a_configuration_survives_its_file(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == config.model_type


class Rows(torch.utils.data.Dataset):
    def __init__(self, **columns: torch.Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def image_rows() -> Rows:
    return Rows(pixel_values=torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8), noise_key=fold(0, torch.arange(32)))


def text_rows() -> Rows:
    ids = torch.randint(4, 20, (32, 6))
    ids[:, 0], ids[:, -1] = 1, 2
    columns = {"labels": torch.zeros(32, dtype=torch.long), "noise_key": fold(0, torch.arange(32))}
    return Rows(input_ids=ids, attention_mask=torch.ones_like(ids), **columns)


def small_image(**options) -> ImageVAE:
    return ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, **options))


def small_text(**options) -> TextVAE:
    return TextVAE(TextVAEConfig(vocab_size=20, hidden_size=8, embedding_size=8, latent_dim=2, **options))


def train(model, rows: Rows, accumulation: int, folder) -> tuple[list[float], dict[str, torch.Tensor], Trainer]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=6,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, trainer


@pytest.mark.parametrize(("build", "rows"), [(small_image, image_rows), (small_text, text_rows)], ids=["image", "text"])
def test_trainer_gives_equal_losses_at_every_accumulation(build, rows, tmp_path):
    torch.manual_seed(0)
    data, first = rows(), build().state_dict()
    results = []
    for accumulation in (1, 4):
        model = build()
        model.load_state_dict(first)
        results.append(train(model, data, accumulation, tmp_path))
    (losses, weights, trainer), (other, other_weights, _) = results
    assert len(losses) == 6
    assert losses == pytest.approx(other, rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], rtol=1e-3, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
    figures = trainer.evaluate(data)
    model = trainer.model.eval()
    inputs = {name: column for name, column in data.columns.items() if name in model.input_names}
    assert figures["eval_loss"] == pytest.approx(model(**inputs).loss.item(), rel=1e-3)


def test_trainer_lowers_the_loss_with_sampling(tmp_path):
    losses, _, trainer = train(small_text(), text_rows(), 1, tmp_path)
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(TextVAE.from_pretrained(tmp_path / "saved").lm_head.weight, trainer.model.lm_head.weight)


def joint(**options) -> MMVAE:
    return MMVAE(MMVAEConfig(modalities={"image": small_image().config, "text": small_text().config}, latent_dim=2, **options))


@pytest.mark.parametrize(
    "build",
    [
        lambda: small_image(prior="vamp", output_hidden_states=True),
        lambda: small_text(output_hidden_states=True),
        joint,
        lambda: TextVAEForSequenceClassification(small_text(num_labels=2).config),
        lambda: ImageVAEForSemanticSegmentation(small_image().config),
    ],
    ids=["image", "text", "joint", "classifier", "segmenter"],
)
def test_the_replicas_of_data_parallel_compute_what_the_model_does(build, monkeypatch):
    """``Trainer`` makes them where it sees several GPUs; all but the copies of weights, which lie on the CPU here, is torch's own."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [[x * 1 for x in tensors] for _ in devices]
    )
    model, data = build().train(), image_rows().columns | text_rows().columns
    if isinstance(model, ImageVAEForSemanticSegmentation):
        data["labels"] = torch.zeros(32, 8, 8, dtype=torch.long)
    inputs = {name: column for name, column in data.items() if name in (*model.input_names, "noise_key")}
    halves = [{name: column[rows] for name, column in inputs.items()} for rows in (slice(16), slice(16, 32))]
    expected = [model(**half) for half in halves]
    gradients = torch.autograd.grad(sum(out.loss for out in expected), list(model.parameters()), allow_unused=True)
    with ThreadPoolExecutor(2) as threads:
        received = list(threads.map(lambda replica, half: replica(**half), module.replicate(model, [0, 1]), halves))
    for out, other in zip(received, expected, strict=True):
        assert out.keys() == other.keys()
        torch.testing.assert_close(tuple(out.values()), tuple(other.values()))
    again = torch.autograd.grad(sum(out.loss for out in received), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close([x for x in again if x is not None], [x for x in gradients if x is not None])


@pytest.mark.parametrize(("build", "rows"), [(small_image, image_rows), (small_text, text_rows)], ids=["image", "text"])
def test_a_misspelt_argument_of_forward_names_the_nearest(build, rows):
    model, inputs = build().eval(), {name: column[:2] for name, column in rows().columns.items() if name != "labels"}
    name = f"{type(model).__name__}.forward"
    for wrong, nearest in (("num_sampels", "num_samples"), ("betta", "beta"), ("sample_posteriour", "sample_posterior")):
        with pytest.raises(TypeError, match=f"{name}: unknown argument '{wrong}'; the nearest one is '{nearest}'"):
            model(**inputs, **{wrong: 5})


@pytest.mark.parametrize(("build", "rows"), [(small_image, image_rows), (small_text, text_rows)], ids=["image", "text"])
def test_forward_takes_what_transformers_passes(build, rows):
    model, inputs = build().eval(), {name: column[:2] for name, column in rows().columns.items() if name != "labels"}
    expected = model(**inputs)
    foreign = {"labels": torch.zeros(2), "token_type_ids": torch.zeros(2, 6), "num_items_in_batch": 2, "logits_to_keep": 1}
    switches = dict.fromkeys(["output_attentions", "output_hidden_states", "use_cache"], False)
    assert torch.equal(model(**inputs, **foreign, **switches, return_dict=True).loss, expected.loss)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_hidden_states_of_an_image_are_the_features_that_its_latent_is_made_of(blocks):
    config = ImageVAEConfig(image_size=16, hidden_channels=[4, 6], num_blocks=blocks, latent_dim=2, prior="vamp", prior_components=7)
    model, pixels = ImageVAE(config), torch.rand(3, 3, 16, 16)
    output = model(pixels, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states[-2:]] == [(3, 4, 8, 8), (3, 6, 4, 4)]
    assert len(output.hidden_states) == (3 if blocks else 2)
    features = F.silu(model.encoder.norm(output.hidden_states[-1])).flatten(1)
    torch.testing.assert_close(model.to_moments(features).chunk(2, 1)[0], output.latent_mean)
    for gradient in torch.autograd.grad(output.loss, output.hidden_states):  # they are part of what the loss is made of
        assert gradient.any()
    assert model(pixels).hidden_states is None


@pytest.mark.parametrize("bidirectional", [False, True])
def test_hidden_states_of_a_sentence_are_those_that_its_latent_is_made_of(bidirectional):
    model = small_text(encoder_layers=3, bidirectional=bidirectional, prior="vamp", prior_components=7, output_hidden_states=True)
    ids = torch.tensor([[0, 0, 1, 5, 6, 2], [1, 7, 8, 9, 5, 2]])
    output = model(ids)
    width = 16 if bidirectional else 8
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 6, 8)] + [(2, 6, width)] * 3
    assert torch.equal(output.hidden_states[0][0, :4], model.encoder_embedding(ids[0, 2:]))
    last, ends = output.hidden_states[-1], torch.tensor([3, 5])
    summary = torch.cat([last[[0, 1], ends, :8], last[:, 0, 8:]], -1)
    torch.testing.assert_close(model.to_moments(summary).chunk(2, 1)[0], output.latent_mean)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_hidden_states_of_generation_are_those_that_the_tokens_are_chosen_by():
    model = small_text().eval()
    output = model.generate(latents=torch.randn(3, 2), max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True)
    assert len(output.hidden_states) == output.sequences.shape[1] - 1
    chosen = model.lm_head(output.hidden_states[0][0][:, -1]).argmax(-1)
    assert torch.equal(chosen, output.sequences[:, 1])


def test_only_densities_that_exist_stay_in_float32(tmp_path):
    assert small_text()._keep_in_fp32_modules_strict == set()
    small_text(densities={"latent": {"kind": "mixture"}}).save_pretrained(tmp_path)
    model = TextVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {name.startswith("densities.") for name, p in model.state_dict().items() if p.dtype == torch.float32} == {True}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_scale_of_zero_is_the_smallest_one():
    config = ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4])
    config.scale = 0  # as transformers' common tests do to any configuration with a field of this name
    assert ImageVAE(config).eval()(torch.zeros(2, 1, 8, 8)).loss.isfinite()


def test_the_output_layer_is_found_and_replaced():
    model, layer = small_text(), torch.nn.Linear(8, 30)
    assert model.get_output_embeddings() is model.lm_head
    model.set_output_embeddings(layer)
    assert model.lm_head is layer


def test_importing_mmvae_registers_its_models(tmp_path):
    small_text().save_pretrained(tmp_path)
    code = """
import sys
from transformers import AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print("does not recognize" in str(error))
import mmvae
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "TextVAE"], done.stderr


def test_public_names():
    assert {"ImageVAE", "ImageVAEConfig", "TextVAE", "TextVAEConfig"} <= set(mmvae.__all__)
    for name in mmvae.__all__:
        assert getattr(mmvae, name).__name__ == name
