"""Figures by rows: what they mean, and that they depend on nothing but rows, model and seed."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from mmvae import (
    MMVAE,
    ImageVAE,
    ImageVAEConfig,
    ImageVAEForImageClassification,
    MMVAEConfig,
    TextVAE,
    TextVAEConfig,
    TopicVAE,
    TopicVAEConfig,
    TopicVAEVectorizer,
)  # fmt: skip
from mmvae.data import ImageColumn, LabelColumn, Loader, Rows, TextColumn, WordCountColumn, as_modalities
from mmvae.evaluation import binarization, evaluate_elbo, evaluate_vae, model_inputs, predict
from mmvae.noise import fold
from mmvae.processing import train_tokenizer

SENTENCES = ["red heart", "small blue square on dark", "a", "", "big big heart at top left", "blue", "a b c d e f g"] * 3


def rows_of(kind, count=None):
    if kind == "text":
        sentences = SENTENCES[:count]
        return Rows(Dataset.from_dict({"text": sentences}), TextColumn("text", train_tokenizer(SENTENCES)))
    pixels = torch.randint(0, 256, (count or 21, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Rows(Dataset.from_dict({"image": [x.tolist() for x in pixels]}), ImageColumn("image", 16, 1))


def model_of(kind, **options):
    torch.manual_seed(0)
    if kind == "text":
        model = TextVAE(TextVAEConfig(vocab_size=60, hidden_size=16, embedding_size=8, latent_dim=3, dropout=0.5, word_dropout=0.5))
    else:
        model = ImageVAE(ImageVAEConfig(image_size=16, num_channels=1, hidden_channels=[8, 8], latent_dim=3, dropout=0.5, **options))
    with torch.no_grad():
        model.to_moments.weight.mul_(4)  # latents that differ from row to row
    return model


@pytest.mark.parametrize(
    ("kind", "options", "mode"), [("text", {}, "none"), ("image", {"likelihood": "bernoulli"}, "dynamic"), ("image", {}, "none")]
)
def test_figures_do_not_depend_on_batches_mode_or_generator(kind, options, mode):
    model, rows, accelerator = model_of(kind, **options), rows_of(kind), Accelerator(cpu=True)
    found = []
    for batch_size, shuffle, training in ((21, False, False), (4, True, True)):
        model.train(training)
        torch.manual_seed(batch_size)
        before = torch.get_rng_state()
        loader = Loader(rows, batch_size, shuffle=shuffle)
        found.append(evaluate_vae(accelerator, model, loader, num_samples=5, seed=3, transform=binarization(mode)))
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == training
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)
    other = evaluate_vae(accelerator, model, Loader(rows, 21, shuffle=False), num_samples=5, seed=4, transform=binarization(mode))
    assert all(other[name] != found[0][name] for name in ("neg_elbo_nats", "nll_nats", "mutual_information_nats"))


def test_parts_add_up_and_the_bound_holds():
    model, rows, accelerator = model_of("text"), rows_of("text"), Accelerator(cpu=True)
    with torch.no_grad():
        model.to_moments.bias[:3] += 1.0  # away from the prior, so that the bound is loose
    seeds = [evaluate_vae(accelerator, model, Loader(rows, 21), num_samples=1, seed=seed) for seed in range(25)]
    for figures in seeds:
        assert figures["neg_elbo_nats"] == pytest.approx(figures["reconstruction_nats"] + figures["kl_nats"], rel=1e-6)
    # with one sample the importance-sampled likelihood is an estimate of the same bound: equal in expectation
    difference = torch.tensor([figures["nll_nats"] - figures["neg_elbo_nats"] for figures in seeds])
    assert difference.std() > 0.01
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(seeds))
    few, many = (evaluate_vae(accelerator, model, Loader(rows, 21), num_samples=n)["nll_nats"] for n in (8, 400))
    assert sum(figures["neg_elbo_nats"] for figures in seeds) / len(seeds) - 0.3 > few > many


def test_perplexity_is_per_word_with_the_end():
    rows = rows_of("text")
    figures = evaluate_vae(Accelerator(cpu=True), model_of("text"), Loader(rows, 8), num_samples=5)
    words = sum(len(sentence.split()) + 1 for sentence in SENTENCES)
    assert figures["tokens"] == pytest.approx(words / len(SENTENCES))
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll_nats"] * len(SENTENCES) / words))
    assert figures["perplexity_elbo"] == pytest.approx(math.exp(figures["neg_elbo_nats"] * len(SENTENCES) / words))
    assert "bits_per_dim" not in figures
    without = evaluate_vae(Accelerator(cpu=True), model_of("text"), Loader(rows, 8), num_samples=0)
    assert not {"nll_nats", "perplexity", "importance_samples"} & set(without)
    assert without["perplexity_elbo"] == pytest.approx(figures["perplexity_elbo"])


def test_pictures_too_small_for_ssim_have_none():
    rows = Rows(Dataset.from_dict({"image": [[[0] * 4] * 4] * 3}), ImageColumn("image", 4, 1))
    model = ImageVAE(ImageVAEConfig(image_size=4, num_channels=1, hidden_channels=[4], latent_dim=2))
    figures = evaluate_vae(Accelerator(cpu=True), model, Loader(rows, 3), num_samples=0)
    assert "psnr_db" in figures and "ssim" not in figures


def test_bits_per_dim_are_told_of_a_discretized_likelihood_only():
    for likelihood, told in (("discretized_logistic", True), ("gaussian", False), ("bernoulli", False)):
        figures = evaluate_vae(Accelerator(cpu=True), model_of("image", likelihood=likelihood), Loader(rows_of("image"), 8), num_samples=2)
        assert ("bits_per_dim" in figures) == told
        assert {"psnr_db", "ssim"} <= set(figures) and "tokens" not in figures
        if told:
            assert figures["bits_per_dim"] == pytest.approx(figures["nll_nats"] / (16 * 16 * math.log(2)))
            without = evaluate_vae(
                Accelerator(cpu=True), model_of("image", likelihood=likelihood), Loader(rows_of("image"), 8), num_samples=0
            )
            assert without["bits_per_dim_elbo"] == pytest.approx(without["neg_elbo_nats"] / (16 * 16 * math.log(2)))
            assert "bits_per_dim" not in without, "a bound is no likelihood"


def test_bits_per_dim_are_not_told_of_binarised_pixels():
    model, loader = model_of("image", likelihood="discretized_logistic"), Loader(rows_of("image"), 8)
    assert "bits_per_dim" not in evaluate_vae(Accelerator(cpu=True), model, loader, num_samples=2, transform=binarization("dynamic"))


def test_inputs_are_those_that_are_encoded_and_those_that_are_conditioned_on():
    class Conditional(TextVAE):
        input_names = ("input_ids", "present")
        condition_names = ("labels",)

    model = Conditional(TextVAEConfig(vocab_size=9, hidden_size=4, embedding_size=4, latent_dim=2))
    batch = {name: torch.zeros(2) for name in ("row", "row_weight", "input_ids", "present", "labels", "num_rows")}
    assert set(model_inputs(model, batch)) == {"input_ids", "present", "labels"}
    assert set(model_inputs(model_of("text"), batch)) == {"input_ids"}


def test_what_no_row_tells_is_no_figure():
    alone = Loader(Rows(Dataset.from_dict({"text": ["w1 w2"]}), TextColumn("text", train_tokenizer(["w1 w2"]))), 8)
    model = TextVAE(TextVAEConfig(vocab_size=6, hidden_size=4, embedding_size=4, latent_dim=2)).eval()
    assert "active_units" not in evaluate_elbo(Accelerator(cpu=True), model, alone)
    vectorizer = TopicVAEVectorizer(["goal", "vote"])
    unknown = Loader(Rows(Dataset.from_dict({"text": ["nothing", "known"]}), WordCountColumn("text", vectorizer)), 8)
    topics = TopicVAE(TopicVAEConfig(vocabulary=vectorizer.vocabulary, latent_dim=2)).eval()
    figures = evaluate_vae(Accelerator(cpu=True), topics, unknown, num_samples=2)
    assert figures["tokens"] == 0 and not figures.keys() & {"perplexity", "perplexity_elbo"}


@pytest.mark.parametrize(("kind", "scale", "active"), [("text", 0, 0), ("image", 0, 0), ("image", 50, 3)])
def test_active_units(kind, scale, active):
    model = model_of(kind)
    with torch.no_grad():
        model.to_moments.weight.mul_(scale)
    figures = evaluate_elbo(Accelerator(cpu=True), model, Loader(rows_of(kind), 8), detailed=True)
    assert figures["active_units"] == active
    assert (abs(figures["mutual_information_nats"]) < 1e-4) == (active == 0)
    assert figures["mutual_information_nats"] <= math.log(21) + 1e-6


def test_one_row_can_be_evaluated():
    figures = evaluate_vae(Accelerator(cpu=True), model_of("text"), Loader(rows_of("text", 1), 8), num_samples=2)
    assert math.isfinite(figures["neg_elbo_nats"]) and figures["mutual_information_nats"] == pytest.approx(0, abs=1e-5)


def test_a_joint_model_of_one_modality_is_evaluated_as_one_of_many():
    tokenizer = train_tokenizer(SENTENCES)
    child = TextVAEConfig(vocab_size=60, hidden_size=16, embedding_size=8, latent_dim=3)
    model = MMVAE(MMVAEConfig(modalities={"words": child}, latent_dim=3))
    rows = Rows(Dataset.from_dict({"text": SENTENCES}), as_modalities({"words": TextColumn("text", tokenizer)}))
    figures = evaluate_vae(Accelerator(cpu=True), model, Loader(rows, 8), num_samples=2)
    assert figures["reconstruction_nats_words"] == figures["reconstruction_nats"]
    assert figures["neg_elbo_nats"] == pytest.approx(figures["reconstruction_nats"] + figures["kl_nats"], rel=1e-6)


# ---- binarisation


def test_binarization_is_keyed_and_has_the_pixels_as_its_mean():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2000, 1, 16, 16)
    keys = fold(0, torch.arange(2000))
    drawn = binarization("dynamic")({"pixel_values": grey, "row": keys}, keys)["pixel_values"]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert (drawn.mean(0) - grey[0] / 255).abs().max() < 5 * 0.5 / math.sqrt(2000)
    assert not drawn[..., 0, 0].any() and drawn[..., -1, -1].all()  # black stays black, white stays white
    part = binarization("dynamic")({"pixel_values": grey[:3].float() / 255}, keys[[5, 0, 9]])["pixel_values"]
    assert torch.equal(part, drawn[[5, 0, 9]])


def test_a_classifier_is_asked_about_what_it_was_trained_on():
    config = ImageVAEConfig(image_size=16, num_channels=1, hidden_channels=[4], latent_dim=2, num_labels=2, likelihood="bernoulli")
    torch.manual_seed(0)
    model, threshold = ImageVAEForImageClassification(config).eval(), binarization("threshold")
    data = Dataset.from_dict({"image": [x.tolist() for x in torch.randint(256, (5, 16, 16), dtype=torch.uint8)], "label": [0, 1, 1, 0, 1]})
    loader = Loader(Rows(data, [ImageColumn("image", 16, 1), LabelColumn("label", ["a", "b"])]), 8, shuffle=False)
    logits, labels = predict(Accelerator(cpu=True), model, loader, transform=threshold)
    pixels = threshold(next(loader.batches(0)), torch.zeros(5, dtype=torch.int64))["pixel_values"]
    torch.testing.assert_close(logits, model(pixel_values=pixels).logits.detach())
    assert not torch.equal(logits, predict(Accelerator(cpu=True), model, loader)[0]) and labels.tolist() == [0, 1, 1, 0, 1]


def test_threshold_none_and_unknown():
    grey = torch.tensor([127, 128], dtype=torch.uint8).view(1, 1, 1, 2)
    assert binarization("threshold")({"pixel_values": grey}, torch.zeros(1, dtype=torch.int64))["pixel_values"].tolist() == [[[[0.0, 1.0]]]]
    assert binarization("none") is None
    with pytest.raises(ValueError, match=r"binarize: received 'always', expected one of \['none', 'threshold', 'dynamic'\]"):
        binarization("always")
