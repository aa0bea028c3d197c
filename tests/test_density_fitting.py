"""Densities fitted to the latents of a joint model: kept with it, and used by what it generates."""

import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from recipe_runs import TEXT, run, sentences
from test_mmvae import batch, joint

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig, density_fitting
from mmvae.data import LabelColumn, PartlyLabelled, Rows, TextColumn
from mmvae.density_fitting import fit_densities, latents_from, rows_to_fit, unfitted
from mmvae.processing import train_tokenizer

OPTIONS = {
    "shared": {"kind": "mixture", "num_components": 3},
    "shared_given_text": {"kind": "flow", "transforms": 1, "hidden_sizes": [8], "training": {"steps": 20}},
    "private_image": {"kind": "flow", "transforms": 1, "hidden_sizes": [8], "training": {"steps": 20}},
}


def batches() -> list[dict[str, torch.Tensor]]:
    present = torch.ones(40, 2, dtype=torch.bool)
    present[::5, 0] = False
    return [batch(40) | {"present": present, "row": torch.arange(40)} for _ in range(2)]


def test_densities_are_fitted_kept_and_used(tmp_path):
    model = joint(private=2, aggregation="poe")
    plain = [model.generate("image", 3, torch.Generator().manual_seed(1), **given) for given in ({}, {"input_ids": batch()["input_ids"]})]
    rows, state = batches(), torch.get_rng_state()
    assert latents_from(model) == "prior"
    figures = fit_densities(model, rows, OPTIONS)
    assert latents_from(model) == "density"
    assert torch.equal(state, torch.get_rng_state())
    assert {name.split("/")[1] for name in figures} == set(OPTIONS)
    assert all(isinstance(value, int | float) for value in figures.values())
    assert model.config.densities["private_image"] == {"kind": "flow", "transforms": 1, "hidden_sizes": [8]}
    model.save_pretrained(tmp_path)
    again = MMVAE.from_pretrained(tmp_path)
    assert MMVAE.from_pretrained(tmp_path, dtype="bfloat16").densities["shared"].means.dtype == torch.float32
    for before, given in zip(plain, ({}, {"input_ids": batch()["input_ids"]}), strict=True):
        made = model.generate("image", 3, torch.Generator().manual_seed(1), **given)
        assert torch.equal(made, again.generate("image", 3, torch.Generator().manual_seed(1), **given))
        assert not torch.equal(made, before)
    z = model.sample_prior(200, torch.Generator().manual_seed(1))
    assert torch.equal(z, model.densities["shared"].sample(200, torch.Generator().manual_seed(1)))


def test_what_has_too_few_rows_is_left_out_and_told(caplog):
    model = joint(private=2, aggregation="poe")
    apart = torch.arange(40) % 2 == 0
    rows = [batch(40) | {"present": torch.stack([apart, ~apart], 1), "row": torch.arange(40)}]
    figures = fit_densities(model, rows, OPTIONS)
    assert set(model.densities) == set(model.config.densities) == {"shared", "private_image"}
    assert not any("shared_given_text" in name for name in figures)
    assert "density shared_given_text is not fitted" in caplog.text and "received 0 rows, expected at least 20" in caplog.text


@pytest.mark.parametrize(("densities", "source"), [({"latent": {"kind": "mixture", "num_components": 2}}, "density"), ({}, "prior")])
def test_titles_and_records_tell_what_the_latents_of_samples_are_of(tmp_path, densities, source):
    data, model = str(sentences(tmp_path / "data", train=40)), str(tmp_path / "model")
    run("text_vae", ["--dataset", data, "--output_dir", model, *TEXT, "--max_steps", "2", "--densities", json.dumps(densities)])
    card = (tmp_path / "model" / "README.md").read_text()
    assert {word for word in ("density", "prior") if f"from the {word}" in card} == {source}
    run("evaluate", ["--model", model, "--dataset", data, "--importance_samples", "0", "--max_new_tokens", "5"])
    assert json.loads((tmp_path / "model" / "evaluation-test.json").read_text())["latents"] == source


def test_refusals_come_before_any_work():
    model = joint()
    with pytest.raises(ValueError, match="densities: received 'private_image', expected one of"):
        fit_densities(model, iter(()), {"private_image": {"kind": "flow"}})
    with pytest.raises(ValueError, match="nearest one is 'mixture'"):
        unfitted(model, {"shared": {"kind": "mixtures"}})
    for training, message in (
        ({"step": 3}, "unknown option 'step' = 3; the nearest one is 'steps'"),
        ({"steps": 1e3}, "steps: received 1000.0, expected an integer of at least 1"),
        ({"learning_rate": "1e-2"}, "learning_rate: received '1e-2', expected a number"),
        (3, "densities: shared: received .*3}, expected a mapping"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            unfitted(model, {"shared": {"kind": "flow", "training": training}})
    with pytest.raises(ValueError, match="densities: shared: received 'flow', expected a mapping"):
        unfitted(model, {"shared": "flow"})
    assert not model.config.densities


@pytest.mark.parametrize("spatial", [False, True])
def test_samples_of_one_modality_come_from_its_density(tmp_path, spatial):
    config = ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, spatial_latent=spatial)
    torch.manual_seed(0)
    model = ImageVAE(config).eval()
    rows = [{"pixel_values": torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8), "row": torch.arange(30)} for _ in range(2)]
    before = model.sample_prior(5, torch.Generator().manual_seed(1))
    figures = fit_densities(model, rows, {"latent": {"kind": "mixture", "num_components": 2}})
    assert figures["densities/latent/held_out_rows"] == 6
    z = model.sample_prior(5, torch.Generator().manual_seed(1))
    assert z.shape == before.shape and not torch.equal(z, before)
    model.save_pretrained(tmp_path)
    again = ImageVAE.from_pretrained(tmp_path)
    assert torch.equal(again.sample(5, torch.Generator().manual_seed(1)), model.sample(5, torch.Generator().manual_seed(1)))
    with pytest.raises(StrictDataclassError, match=r"ImageVAEConfig.densities: received 'shared', expected one of \['latent'\]"):
        ImageVAEConfig(densities={"shared": {"kind": "mixture"}})


def test_a_density_of_a_child_is_refused():
    with pytest.raises(StrictDataclassError, match=r"modalities\['image'\].densities: received .*expected \{\}"):
        MMVAEConfig(modalities={"image": ImageVAEConfig(densities={"latent": {"kind": "mixture"}})})


def test_densities_are_fitted_to_every_row_once_and_to_the_beginning_of_a_stream(monkeypatch):
    words = [f"{letter} {letter}" for letter in "abcdefghij"]
    data = Dataset.from_dict({"text": words, "label": ["x", "y"] * 5})
    column, labels = TextColumn("text", train_tokenizer(words)), LabelColumn("label", ("x", "y"))
    known = PartlyLabelled(data, column, labels, per_class=2, repeats=5)
    seen = [tuple(row) for batch in rows_to_fit(known, 3, 0) for row in batch["input_ids"].tolist()]
    assert known.num_rows == 26 and len(seen) == len(set(seen)) == 10
    monkeypatch.setattr(density_fitting, "_MOST_STREAMED", 4)
    stream = Rows(data.to_iterable_dataset(), column)
    assert [len(batch["row"]) for batch in rows_to_fit(stream, 3, 0)] == [3, 3]
