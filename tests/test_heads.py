"""Classifiers on the latent: what their loss is made of, what stays as it is, what loads from what, that pipelines take their folders."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from mmvae import (
    MMVAE,
    ImageVAE,
    ImageVAEConfig,
    ImageVAEForImageClassification,
    ImageVAEImageProcessor,
    MMVAEConfig,
    MMVAEForClassification,
    TextVAE,
    TextVAEConfig,
    TextVAEForSequenceClassification,
)
from mmvae.noise import fold
from mmvae.processing import train_tokenizer

KEYS = fold(0, torch.arange(6))
LABELS = torch.tensor([0, 2, -100, 1, -100, 2])


def image_config(**options) -> ImageVAEConfig:
    return ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=3, **options)


def text_config(**options) -> TextVAEConfig:
    return TextVAEConfig(vocab_size=20, hidden_size=8, embedding_size=8, latent_dim=3, **options)


def joint_config(**options) -> MMVAEConfig:
    both = {"image": image_config(), "text": text_config()}
    return MMVAEConfig(modalities=both, aggregation="mopoe", **options)


def inputs_of(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 1, 2
    pixels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]]).bool()
    every = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "present": present}
    return {name: value for name, value in every.items() if name in model.input_names}


KINDS = {
    "image": (ImageVAEForImageClassification, image_config, ImageVAE),
    "text": (TextVAEForSequenceClassification, text_config, TextVAE),
    "joint": (MMVAEForClassification, joint_config, MMVAE),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


# ---- the loss


@pytest.mark.parametrize("features", ["mean", "moments", "sample"])
def test_the_joint_loss_is_minus_the_elbo_plus_alpha_times_the_cross_entropy(kind, features):
    build, config, _ = kind
    model = build(config(num_labels=3, classifier_features=features, classifier_hidden_size=5)).train()
    inputs = inputs_of(model)
    out = model(**inputs, labels=LABELS, alpha=7.0, beta=0.5, noise_key=KEYS)
    vae = model.base_model(**inputs, beta=0.5, noise_key=KEYS)
    known = LABELS != -100
    cross_entropy = torch.zeros(6).masked_scatter(known, F.cross_entropy(out.logits[known], LABELS[known], reduction="none"))
    torch.testing.assert_close(out.loss_rows, vae.loss_rows + 7 * cross_entropy)
    torch.testing.assert_close(out.loss, vae.loss + 7 * cross_entropy.mean())
    torch.testing.assert_close((out.elbo, out.kl, out.cross_entropy), (vae.elbo, vae.kl, cross_entropy))


def test_without_alpha_the_loss_is_the_cross_entropy_and_nothing_is_decoded(kind, monkeypatch):
    build, config, vae = kind
    model = build(config(num_labels=3))
    monkeypatch.setattr(vae, "log_px", lambda *_, **__: pytest.fail("decoded"))
    out = model(**inputs_of(model), labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, LABELS, reduction="sum") / 6)
    assert out.elbo is None
    bare = build(config(num_labels=3, classifier_alpha=1.0))(**inputs_of(model))
    assert bare.loss is None and bare.elbo is None and bare.logits.shape == (6, 3)


def test_rows_without_a_label_teach_the_vae_alone(kind):
    build, config, _ = kind
    model = build(config(num_labels=3, classifier_alpha=2.0))
    model(**inputs_of(model), labels=torch.full((6,), -100), noise_key=KEYS).loss.backward()
    assert not any(p.grad.any() for p in model.head.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.base_model.parameters())


def test_what_the_head_reads():
    inputs = inputs_of(ImageVAEForImageClassification(image_config()))
    for features, hidden in (("mean", 0), ("moments", 0), ("sample", 0), ("mean", 7)):
        model = ImageVAEForImageClassification(image_config(num_labels=3, classifier_features=features, classifier_hidden_size=hidden))
        q = model.base_model.encode(**inputs)
        read = torch.cat([q.mean, q.logvar], 1) if features == "moments" else q.mean
        torch.testing.assert_close(model.eval()(**inputs).logits, model.head.eval()(read))  # never a sample in evaluation
        first, again, other = (model.train()(**inputs, noise_key=key).logits for key in (KEYS, KEYS, KEYS + 1))
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (features != "sample")
        assert [layer.out_features for layer in model.head if isinstance(layer, torch.nn.Linear)] == ([7, 3] if hidden else [3])


def test_a_sample_of_a_mixture_comes_from_a_component_that_is_there():
    model = MMVAEForClassification(joint_config(num_labels=3, classifier_features="sample")).train()
    inputs, keys = inputs_of(model), fold(0, torch.arange(6 * 200))
    many = {name: value.repeat(200, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    q = model.base_model.posterior(**many)
    z = model._features(q, q.mixture.mean, q.mixture.variance.log(), keys, True).unflatten(0, (200, 6))
    torch.testing.assert_close(z.mean(0), q.mixture.mean[:6], atol=0.35, rtol=0)
    torch.testing.assert_close(z.var(0), q.mixture.variance[:6], atol=0.6, rtol=0.3)


def test_logits_do_not_depend_on_the_other_rows_or_their_order(kind):
    build, config, _ = kind
    model = build(config(num_labels=3)).eval()
    inputs, order = inputs_of(model), torch.tensor([4, 2, 0, 5, 1, 3])
    logits = model(**inputs).logits
    assert not torch.allclose(logits[0], logits[3])
    torch.testing.assert_close(model(**{name: value[order] for name, value in inputs.items()}).logits, logits[order])
    torch.testing.assert_close(model(**{name: value[:2] for name, value in inputs.items()}).logits, logits[:2])


def test_a_joint_model_classifies_from_what_is_visible():
    model = MMVAEForClassification(joint_config(num_labels=3)).eval()
    inputs = inputs_of(model) | {"present": torch.ones(6, 2, dtype=torch.bool)}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    hidden = model(**inputs, visible=torch.tensor([[False, True]]).expand(6, -1)).logits
    torch.testing.assert_close(hidden, model(**text).logits)
    assert not torch.allclose(hidden, model(**inputs).logits)
    nothing = model(**inputs, visible=torch.zeros(6, 2, dtype=torch.bool)).logits
    torch.testing.assert_close(nothing, model.head(torch.zeros(6, 3)), msg="the prior's mean")


def test_modality_dropout_hides_in_training_only():
    model = MMVAEForClassification(joint_config(num_labels=3, modality_dropout={"image": 1.0})).train()
    inputs = inputs_of(model) | {"present": torch.ones(6, 2, dtype=torch.bool)}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).logits, model(**text).logits)
    assert not torch.allclose(model.eval()(**inputs).logits, model(**text).logits)


# ---- ways to train


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_frozen_vae_does_not_change_bit_for_bit(norm):
    model = ImageVAEForImageClassification(image_config(num_labels=3, norm=norm, dropout=0.3, input_noise=0.5)).freeze().train()
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    head = model.head[1].weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(**inputs_of(model), labels=LABELS).loss.backward()
        optimizer.step()
    assert model.frozen and model.training and not model.base_model.training
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert not torch.equal(model.head[1].weight, head)
    assert not model.freeze(False).frozen and model.base_model.training


def test_training_learns_the_classes(kind):
    build, config, _ = kind
    torch.manual_seed(0)
    model = build(config(num_labels=3)).train()
    labels, inputs = torch.tensor([0, 1, 2, 0, 1, 2]), inputs_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    assert torch.equal(model.eval()(**inputs).logits.argmax(1), labels)


def test_trainer_trains_and_predicts_the_logits_alone(kind, tmp_path):
    build, config, _ = kind
    model = build(config(num_labels=3, classifier_alpha=1.0))
    rows = [{name: value[i] for name, value in (inputs_of(model) | {"labels": LABELS}).items()} for i in range(6)]
    options = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, compute_metrics=lambda p: {"right": p.predictions.argmax(-1) == p.label_ids}
    )
    trainer.train()
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape == (6, 3) and predicted.metrics["test_right"].shape == (6,)
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()


# ---- folders


def test_a_head_loads_from_a_vae_and_a_vae_from_a_head(kind, tmp_path):
    build, config, vae_class = kind
    torch.manual_seed(0)
    vae = vae_class(config(densities={"shared" if build is MMVAEForClassification else "latent": {"kind": "mixture"}})).eval()
    vae.save_pretrained(tmp_path / "vae")
    model = build.from_pretrained(tmp_path / "vae", num_labels=4).eval()
    inputs = inputs_of(model)
    expected = vae.posterior(**inputs).mixture.mean
    assert torch.equal(model(**inputs).latent_mean, expected)
    assert model(**inputs).logits.shape == (6, 4) and model(**inputs).logits.any()
    model.save_pretrained(tmp_path / "head")
    for read in (vae_class, AutoModel):
        again = read.from_pretrained(tmp_path / "head").eval()
        assert type(again) is vae_class
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())
    assert torch.equal(build.from_pretrained(tmp_path / "head").eval()(**inputs).logits, model(**inputs).logits)


def test_training_the_vae_drops_the_densities_of_its_old_latents_and_a_frozen_one_keeps_them(kind, tmp_path, caplog):
    build, config, vae_class = kind
    name = "shared" if build is MMVAEForClassification else "latent"
    vae_class(config(densities={name: {"kind": "mixture"}})).save_pretrained(tmp_path / "vae")
    for frozen in (True, False):
        model = build.from_pretrained(tmp_path / "vae", num_labels=3).freeze(frozen)
        assert list(model.base_model.densities) == [name] and "dropping" not in caplog.text
        model.train().eval().save_pretrained(tmp_path / "head")
        again = vae_class.from_pretrained(tmp_path / "head")
        assert list(again.densities) == list(again.config.densities) == [name] * frozen
    assert caplog.text.count(f"dropping the fitted densities ['{name}']") == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_labels": 7}, "num_labels: has 3, asked for 7"),
        ({"latent_dim": 8}, "latent_dim: has 3, asked for 8"),
        ({"config": image_config(num_labels=3, num_blocks=2)}, "fit: num_blocks: has 1, asked for 2$"),
        ({"config": image_config(num_labels=3, classifier_hidden_size=4)}, "fit: classifier_hidden_size: has 0, asked for 4$"),
    ],
)
def test_a_folder_that_does_not_fit_says_which_field_differs(asked, message, tmp_path):
    ImageVAEForImageClassification(image_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageVAEForImageClassification.from_pretrained(tmp_path, **asked)


def test_folders_of_other_models_are_refused_by_name(tmp_path):
    joint = MMVAEForClassification(joint_config(num_labels=3))
    joint.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type: received 'mmvae', expected 'text_vae' for TextVAEForSequenceClassification"):
        TextVAEForSequenceClassification.from_pretrained(tmp_path)
    wider = MMVAEConfig(modalities={"image": image_config(), "text": text_config(encoder_layers=2)}, aggregation="mopoe", num_labels=3)
    with pytest.raises(ValueError, match=r"fit: modalities\.text\.encoder_layers: has 1, asked for 2$"):
        MMVAEForClassification.from_pretrained(tmp_path, config=wider)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_classification_pipeline(channels, tmp_path):
    config = ImageVAEConfig(image_size=16, num_channels=channels, latent_dim=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    model = ImageVAEForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = ImageVAEImageProcessor(size={"height": 16, "width": 16}, num_channels=channels)
    processor.save_pretrained(tmp_path)
    image = Image.effect_mandelbrot((20, 24), (-2, -1.5, 1, 1.5), 20)
    told = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)
    with torch.no_grad():
        expected = model(**processor(image.convert("RGB"), return_tensors="pt")).logits.softmax(1)[0]
    assert {each["label"]: each["score"] for each in told} == pytest.approx(
        dict(zip(["cat", "dog", "owl"], expected.tolist(), strict=True))
    )
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is ImageVAEForImageClassification


def test_text_classification_pipeline(tmp_path):
    tokenizer = train_tokenizer(["who is it ?", "where is it ?"])
    config = TextVAEConfig(vocab_size=len(tokenizer), hidden_size=8, embedding_size=8, latent_dim=3, id2label={0: "HUM", 1: "LOC"})
    model = TextVAEForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = pipeline("text-classification", model=str(tmp_path), device="cpu")(["who is it ?", "where ?"], top_k=None)
    for text, scores in zip(["who is it ?", "where ?"], told, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0].tolist()
        assert {each["label"]: each["score"] for each in scores} == pytest.approx(
            dict(zip(["HUM", "LOC"], expected, strict=True)), rel=1e-4
        )
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is TextVAEForSequenceClassification
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "HUM", "1": "LOC"}


# ---- what is refused


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 0]), "received 3 in row 3, expected 0 to 2, or -100"),
        (torch.tensor([0, -1, 2, 1, 0, 0]), "received -1 in row 1"),
        (torch.zeros(6), "received torch.float32, expected whole numbers"),
        (torch.zeros(5, dtype=torch.long), r"received shape \(5,\), expected \(6,\)"),
    ],
)
def test_labels_that_are_none_are_named(kind, labels, message):
    build, config, _ = kind
    model = build(config(num_labels=3))
    with pytest.raises(ValueError, match=f"labels: {message}"):
        model(**inputs_of(model), labels=labels)


def test_names_of_classes_are_told_once(tmp_path):
    names = {0: "cat", 1: "dog", 2: "owl"}
    ImageVAE(image_config()).save_pretrained(tmp_path)
    for config in (image_config(id2label=names), ImageVAEForImageClassification.from_pretrained(tmp_path, id2label=names).config):
        assert config.id2label == names and config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    config.save_pretrained(tmp_path)
    assert ImageVAEConfig.from_pretrained(tmp_path).label2id == {"cat": 0, "dog": 1, "owl": 2}


def test_one_class_and_misspelt_arguments_are_refused():
    with pytest.raises(ValueError, match=r"num_labels: received 1, expected at least 2 classes"):
        ImageVAEForImageClassification(image_config(num_labels=1))
    model = ImageVAEForImageClassification(image_config(num_labels=3))
    with pytest.raises(TypeError, match="unknown argument 'lables'; the nearest one is 'labels'"):
        model(**inputs_of(model), lables=LABELS)
    with pytest.raises(TypeError, match="ImageVAEForImageClassification.forward: unknown argument 'inputs'"):
        model(**inputs_of(model), inputs=2)
    joint = MMVAEForClassification(joint_config(num_labels=3))
    with pytest.raises(TypeError, match="unknown input 'lables'; the nearest one is 'labels'"):
        joint(**inputs_of(joint), lables=LABELS)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"share_embeddings": True}, {"bow_weight": 1.0}], ids=str)
def test_a_classifier_s_vocabulary_is_resized_as_its_vae_s(options, tmp_path):
    model = TextVAEForSequenceClassification(text_config(num_labels=3, **options))
    before = model.eval()(**inputs_of(model)).logits
    model.resize_token_embeddings(25)
    torch.testing.assert_close(model(**inputs_of(model)).logits, before)
    new = {"input_ids": torch.tensor([[1, 24, 2]]), "labels": torch.tensor([1])}
    assert model.train()(**new, alpha=1.0).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    again = TextVAEForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.vocab_size == 25 and torch.equal(again(**new).loss, model(**new).loss)
