"""Classes: the bounds are those of a loop over the classes, labels mean conditions, and what is asked for by class comes by class."""

import math
import shutil

import datasets
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from recipe_runs import IMAGE as IMAGE_RUN
from recipe_runs import TEXT as TEXT_RUN
from recipe_runs import end, pictures, run, sentences
from transformers import AutoModel

from mmvae import MMVAEConfig
from mmvae.data import BadRow, ImageColumn, LabelColumn, TextColumn, sprites
from mmvae.data.labels import spread_labels
from mmvae.data.partly_labelled import LabelArguments, PartlyLabelled, partly_labelled
from mmvae.models.image_vae import ImageVAE, ImageVAEConfig
from mmvae.models.text_vae import TextVAE, TextVAEConfig
from mmvae.noise import fold, keyed_normal
from mmvae.objectives import OBJECTIVES, dreg, iwae
from mmvae.processing import train_tokenizer

N, B = 3, 4
IMAGE = {"image_size": 8, "num_channels": 1, "hidden_channels": [4], "latent_dim": 2, "likelihood": "bernoulli", "num_classes": N}
TEXT = {"vocab_size": 12, "embedding_size": 4, "hidden_size": 5, "latent_dim": 2, "num_classes": N}
MIXED = torch.tensor([-100, 1, -100, 2])
KEY = torch.arange(B)


def make(kind: str, **options) -> tuple[ImageVAE | TextVAE, dict[str, torch.Tensor]]:
    """A model with classes that matter, in float64 and evaluation mode, and inputs of four rows."""
    if kind == "image":
        model, inputs = ImageVAE(ImageVAEConfig(**IMAGE | options)), {"pixel_values": torch.rand(B, 1, 8, 8).round().double()}
    else:
        model = TextVAE(TextVAEConfig(**TEXT | options))
        inputs = {"input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 2, 0, 0], [1, 8, 9, 2]])}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class" in name or "from_latent" in name or "gru" in name or "to_moments" in name:
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model.double().eval(), inputs


@pytest.fixture(params=["image", "text"])
def made(request):
    return make(request.param)


def direct(model, inputs, labels, alpha: float) -> torch.Tensor:
    """Minus the objective of every row by a loop over rows and classes: Kingma et al. (2014), eq. 6-9."""
    features, target, rows = model.features(**inputs), model.target(**inputs), []
    noise = keyed_normal(fold(0, KEY, torch.tensor(0)), (N, model.config.latent_dim)).double()
    log_qy = model.classifier(features).log_softmax(-1)
    for b, label in enumerate(labels.tolist()):
        bounds = []
        for y in range(N):
            loc, logvar = (model.to_moments(features[b : b + 1]) + model.class_moments.weight[y]).chunk(2, -1)
            z = loc + (0.5 * logvar).exp() * noise[b, y]
            divergence = 0.5 * (logvar.exp() + loc**2 - 1 - logvar).sum()
            log_px = model.decode(z, class_labels=torch.tensor([y])).log_prob(target[b : b + 1])[0]
            bounds.append(log_px - math.log(N) - divergence)
        bounds = torch.stack(bounds)
        if label == -100:
            rows.append((log_qy[b].exp() * (bounds - log_qy[b])).sum())
        else:
            rows.append(bounds[label] + alpha * log_qy[b, label])
    return -torch.stack(rows)


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("hidden", [0, 3])
def test_bound_and_gradient_are_those_of_a_loop_over_the_classes(kind, hidden):
    model, inputs = make(kind, classifier_alpha=2.5, classifier_hidden_size=hidden)
    out = model(**inputs, labels=MIXED, sample_posterior=True, noise_key=KEY)
    expected = direct(model, inputs, MIXED, 2.5)
    close = {"rtol": 1e-4, "atol": 1e-5} if kind == "text" else {}  # the words' losses are float32 in any model
    torch.testing.assert_close(out.loss_rows, expected, check_dtype=False, **close)
    torch.testing.assert_close(out.class_log_probs, model.classify(**inputs))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out.loss_rows.sum(), parameters.values(), allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), parameters.values(), allow_unused=True)
    for name, grad, want in zip(parameters, grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, msg=lambda text, name=name: f"{name}: {text}", **close)
    assert {"class_moments.weight", "classifier.1.weight"} <= {n for n, g in zip(parameters, grads, strict=True) if g.abs().sum() > 0}


def test_a_mixed_batch_is_its_rows_apart(made):
    model, inputs = made
    options = {"sample_posterior": True, "num_samples": 2}
    whole = model(**inputs, labels=MIXED, noise_key=KEY, **options)
    for row in range(B):
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        label = {} if MIXED[row] == -100 else {"labels": MIXED[row : row + 1]}
        out = model(**part, **label, noise_key=KEY[row : row + 1], **options)
        for name in ("loss_rows", "elbo", "log_px", "kl", "latent_mean", "latents", "class_log_probs"):
            torch.testing.assert_close(out[name][0], whole[name][row], rtol=1e-5, atol=1e-6)


def test_only_classes_that_have_a_weight_are_decoded(made, monkeypatch):
    model, inputs = made
    decoded, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z, class_labels: decoded.append(class_labels) or decode(z, class_labels))
    model(**inputs, labels=MIXED)
    model(**inputs, labels=torch.tensor([0, 1, 1, 2]))
    model(**inputs)
    assert [len(labels) for labels in decoded] == [2 * N + 2, B, N * B]
    assert sorted(decoded[1].tolist()) == [0, 1, 1, 2]


def test_hopeless_classes_are_left_out_in_training_alone():
    model, inputs = make("image", least_probability=0.01)
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor([0.0, 3.0, -4.0]))  # q(y|x) = .047, .952, .001
    options = {"sample_posterior": True, "noise_key": KEY}
    exact = model(**inputs, **options)
    out = model.train()(**inputs, **options)
    q, bounds = torch.tensor([0.0, 3.0]).double().log_softmax(0), []
    for y in (0, 1):
        told = model(**inputs, labels=torch.full((B,), y), **options)
        bounds.append(told.elbo)
    expected = (q.exp().unsqueeze(1) * (torch.stack(bounds) - q.unsqueeze(1))).sum(0)
    torch.testing.assert_close(out.elbo, expected, check_dtype=False)
    assert not torch.allclose(out.elbo, exact.elbo)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        model.classifier[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e-3]))
    model.config.least_probability = 1.0  # then the likeliest class alone is left
    torch.testing.assert_close(model(**inputs, **options).elbo, model(**inputs, labels=torch.full((B,), 2), **options).elbo)


def enumerable(kind: str) -> tuple:
    """A model whose p(x|y, z) is p(x|y) and whose q(z|x, y) is p(z): every sum can be done exactly. And log p(x|y), (N, B)."""
    model, inputs = make(kind)
    with torch.no_grad():
        for parameter in (*model.to_moments.parameters(), model.class_moments.weight):
            parameter.zero_()
        if kind == "image":
            model.from_latent.weight[:, :2] = 0
        else:
            model.decoder.to_state.weight[:, :2] = 0
            model.decoder.gru.weight_ih_l0[:, 4:6] = 0
    every = torch.arange(N).unsqueeze(1).expand(N, B)
    return model, inputs, model.decode(torch.zeros(N, B, 2).double(), class_labels=every).log_prob(model.target(**inputs)).detach()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_likelihood_of_an_enumerable_model_is_exact(kind):
    model, inputs, log_px_y = enumerable(kind)
    log_px = log_px_y.logsumexp(0) - math.log(N)
    expected = torch.where(MIXED == -100, log_px, log_px_y.gather(0, MIXED.clamp_min(0).unsqueeze(0))[0] - math.log(N))
    for options in ({"num_samples": 1}, {"num_samples": 5, "chunk_size": 2, "noise_key": KEY}):
        torch.testing.assert_close(model.log_marginal(**inputs, labels=MIXED, **options), expected, check_dtype=False, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.log_marginal(**inputs, num_samples=2), log_px, check_dtype=False, rtol=1e-5, atol=1e-4)
    for objective in (iwae, dreg):
        out = model(**inputs, labels=MIXED, objective=objective, num_samples=2)
        told = torch.where(MIXED == -100, 0.0, out.class_log_probs.gather(1, MIXED.clamp_min(0).unsqueeze(1))[:, 0])
        torch.testing.assert_close(-out.loss_rows - told, expected, check_dtype=False, rtol=1e-5, atol=1e-4)
    assert (model(**inputs).elbo < log_px - 1e-6).all()
    row = {name: value[:1] for name, value in inputs.items()}
    with torch.no_grad():  # the bound is tight where q(y|x) = p(y|x)
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(log_px_y[:, 0])
    torch.testing.assert_close(model(**row).elbo, log_px[:1], check_dtype=False, rtol=1e-5, atol=1e-4)


def test_the_encoder_tells_the_moments_of_the_mixture(made):
    model, inputs = made
    q, mixture = model.encode(**inputs), model.posterior(**inputs).mixture
    z = mixture.sample((20_000,))
    torch.testing.assert_close(q.mean, z.mean(0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(q.variance, z.var(0), rtol=0.1, atol=0.05)
    out = model(**inputs)
    torch.testing.assert_close(out.latent_mean, q.mean)
    torch.testing.assert_close(out.latent_logvar, q.logvar)


def test_a_few_labels_and_the_marginal_teach_the_classes():
    """Two kinds of pictures, each in many strengths; four labels among 64 rows."""
    torch.manual_seed(1)
    labels, strength = torch.arange(64) % 2, 0.3 + 0.7 * torch.rand(64, 1, 1, 1)
    left = (torch.arange(8) < 4).float().view(1, 1, 1, 8).expand(64, 1, 8, 8)
    pixels = strength * torch.where(labels.view(-1, 1, 1, 1) == 0, left, 1 - left)
    told = labels.where(torch.arange(64) < 4, -100)
    options = {"likelihood": "gaussian", "num_classes": 2, "hidden_channels": [8], "norm": "none"}
    model = ImageVAE(ImageVAEConfig(**IMAGE | options))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(pixels, labels=told).loss.backward()
        optimizer.step()
    model.eval()
    assert (model.classify(pixel_values=pixels).argmax(1) == labels).float().mean() > 0.95


# ---- by class


def test_what_is_generated_follows_the_classes_and_the_generator(made):
    model, _ = made
    options = {} if isinstance(model, ImageVAE) else {"max_new_tokens": 6}

    def draw(labels, seed=0):
        return model.generate(class_labels=labels, generator=torch.Generator().manual_seed(seed), **options)

    things = draw([2, 0, 2])
    assert torch.equal(things, draw(torch.tensor([2, 0, 2])))
    z = model.sample_prior(3, torch.Generator().manual_seed(0))
    assert torch.equal(things, model.render(z, class_labels=[2, 0, 2], **options))
    assert torch.equal(things, model.generate(latents=z, class_labels=[2, 0, 2], **options))
    if isinstance(model, ImageVAE):
        assert not torch.allclose(things, draw([0, 0, 2]))
        assert not torch.allclose(things, draw([2, 0, 2], seed=1))
        assert torch.equal(draw([0, 0, 2])[1:], things[1:])
    some = [model.sample(4, torch.Generator().manual_seed(5), **options) for _ in range(2)]
    assert torch.equal(*some)
    same = model.sample(4, torch.Generator().manual_seed(5), class_labels=[1, 1, 1, 1], **options)
    assert torch.equal(same, draw([1, 1, 1, 1], seed=5))


def test_words_follow_the_class():
    model, _ = make("text")
    z, every = torch.randn(N, 2).double(), torch.arange(N)
    bos = torch.ones(N, 1, dtype=torch.long)
    logits = model(input_ids=bos, latents=z, class_labels=every).logits[:, 0]
    ids = torch.arange(12).view(-1, 1, 1).expand(12, N, 1)  # every word alone
    scores = model.decode(z.expand(12, N, 2), class_labels=every).log_prob(ids)
    torch.testing.assert_close(logits.log_softmax(-1).T, scores, check_dtype=False)
    assert torch.equal(model.generate(latents=z, class_labels=every, max_new_tokens=1)[:, 1], logits.argmax(-1))
    beams = model.generate(latents=z, class_labels=every, max_new_tokens=5, num_beams=3)
    one = torch.cat([model.generate(latents=z[i : i + 1], class_labels=[i], max_new_tokens=5, min_new_tokens=5) for i in range(N)])
    assert len(beams) == N
    assert torch.equal(one, model.generate(latents=z, class_labels=every, max_new_tokens=5, min_new_tokens=5))


def test_reconstructions_and_walks_keep_their_class(made):
    model, inputs = made
    options = {} if isinstance(model, ImageVAE) else {"max_new_tokens": 6}
    q, likely = model.posterior(**inputs), model.classify(**inputs).argmax(1)
    mean = q.mixture.components.mean
    again = model.reconstruct(**inputs, **options)
    assert torch.equal(again, model.render(mean[likely, KEY], class_labels=likely, **options))
    told = torch.where(MIXED == -100, likely, MIXED)
    assert torch.equal(model.reconstruct(**inputs, labels=MIXED, **options), model.render(mean[told, KEY], class_labels=told, **options))
    other = model.reconstruct(**inputs, class_labels=[0] * B, **options)
    assert torch.equal(other, model.render(mean[likely, KEY], class_labels=[0] * B, **options))
    start, end_ = torch.zeros(2, 2).double(), torch.ones(2, 2).double()
    walk = model.interpolate(start, end_, 3, class_labels=[1, 2], **options)
    line = torch.tensor([0, 0.5, 1]).double().repeat(2).unsqueeze(1).expand(-1, 2)
    assert torch.equal(walk, model.render(line, class_labels=[1, 1, 1, 2, 2, 2], **options))


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_every_prior_and_a_density_stay_what_they_are(prior):
    model, inputs = make("image", prior=prior, prior_components=4)
    assert model.log_marginal(**inputs, labels=MIXED, num_samples=3).isfinite().all()
    model.train()(**inputs, labels=MIXED).loss.backward()
    assert model.eval().generate([0, 1]).shape == (2, 1, 8, 8)


def test_saved_and_loaded(made, tmp_path):
    model, inputs = made
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.float().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype="float32").eval()
    assert type(again) is type(model)
    assert again.config.num_classes == N
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    given = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    assert torch.equal(again(**given, labels=MIXED).loss_rows, model(**given, labels=MIXED).loss_rows)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_model_without_classes_knows_nothing_of_them(kind):
    model, inputs = make(kind, num_classes=0)
    assert not any("class" in name for name in model.state_dict())
    assert "labels" not in model.input_names
    assert torch.equal(model(**inputs).loss, model(**inputs, labels=MIXED).loss)
    assert "class_log_probs" not in model(**inputs)
    with pytest.raises(ValueError, match="class_labels: received .* for a (Image|Text)VAE without classes, expected None"):
        model.generate(class_labels=[0])
    with pytest.raises(ValueError, match="generate: received neither"):
        model.generate()


# ---- what is refused


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), "labels: received 3 in row 2, expected 0 to 2, or -100 where it is not known"),
        (torch.tensor([0, -1, 2, 0]), "labels: received -1 in row 1, expected 0 to 2"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), "labels: received torch.float32, expected whole numbers"),
        (torch.tensor([True, False, True, True]), "labels: received torch.bool, expected whole numbers"),
        (torch.tensor([0, 1]), r"labels: received shape \(2,\), expected \(4,\)"),
    ],
)
def test_wrong_labels_are_named(made, labels, message):
    model, inputs = made
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "class_labels: received 3 in row 2, expected 0 to 2$"),
        ([0, -100, 1], "class_labels: received -100 in row 1, expected 0 to 2$"),
        ([0.5, 1.0, 2.0], "class_labels: received torch.float32, expected whole numbers"),
        (["cat", "dog", "cat"], r"class_labels: received \['cat', 'dog', 'cat'\], expected whole numbers, 0 to 2"),
        ([0, None, 1], r"class_labels: received \[0, None, 1\], expected whole numbers, 0 to 2"),
    ],
)
def test_classes_that_there_are_not_are_named(made, labels, message):
    model, _ = made
    for call in (model.generate, lambda class_labels: model.sample(3, class_labels=class_labels)):
        with pytest.raises(ValueError, match=message):
            call(class_labels=labels)
    with pytest.raises(ValueError, match=r"class_labels: received 1, expected one class for every row, such as \[1\]"):
        model.generate(class_labels=1)
    with pytest.raises(ValueError, match="class_labels: received None for a .*VAE with 3 classes, expected the class of every row"):
        model.render(torch.zeros(2, 2).double())
    with pytest.raises(ValueError, match=r"class_labels: received shape \(3,\), expected \(2,\)"):
        model.render(torch.zeros(2, 2).double(), class_labels=[0, 1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "ImageVAEConfig.num_classes: received 1, expected at least 2, or 0"),
        ({"num_classes": -1}, "ImageVAEConfig.num_classes: received -1"),
        ({"num_classes": 3, "spatial_latent": True}, "ImageVAEConfig.num_classes: received 3 with spatial_latent, expected 0"),
        (
            {"num_classes": 3, "pose": "rotation", "latent_dim": 5},
            "ImageVAEConfig.num_classes: received 3 with pose 'rotation', expected 0",
        ),
        ({"least_probability": 1.5}, "ImageVAEConfig.least_probability: received 1.5, expected 0 to 1"),
    ],
)
def test_what_no_model_with_classes_can_be_is_refused(options, message):
    with pytest.raises(StrictDataclassError, match=message):
        ImageVAEConfig(**options)


@pytest.mark.parametrize("name", ["mvae", "mvtcae", "jmvae", "mmvm"])
def test_objectives_over_modalities_refuse_classes(made, name):
    model, inputs = made
    with pytest.raises(ValueError, match=f"{name}: received .*, expected"):
        model(**inputs, objective=OBJECTIVES[name])


def test_a_joint_model_refuses_a_child_with_classes():
    with pytest.raises(StrictDataclassError, match=r"MMVAEConfig.modalities\['image'\].num_classes: received 3, expected 0"):
        MMVAEConfig(modalities={"image": ImageVAEConfig(**IMAGE)})


# ---- rows and recipes


def test_few_rows_tell_their_class_and_come_more_often():
    rows = sprites(num_rows=40)
    labels = LabelColumn("position", tuple(rows.features["position"].names))
    known = torch.tensor(rows["position"])
    part = PartlyLabelled(rows, ImageColumn("image", 16), labels, per_class=2, seed=3, repeats=3)
    batch = part.batch(part.numbers, part.numbers)
    told = batch["labels"][batch["labels"] >= 0]
    assert part.num_told == 2 * 4 * 3
    assert part.num_rows == 40 - 8 + 24
    assert (batch["labels"] >= 0).sum() == 24
    assert told.bincount().tolist() == [6, 6, 6, 6]
    assert torch.equal(batch["pixel_values"][:8], batch["pixel_values"][8:16])
    every = PartlyLabelled(rows, ImageColumn("image", 16), labels)
    assert torch.equal(every.batch(every.numbers, every.numbers)["labels"], known)
    others = [PartlyLabelled(rows, ImageColumn("image", 16), labels, per_class=2, **o) for o in ({"seed": 3}, {"seed": 4})]
    assert len({part.fingerprint, every.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_labels_spread_along_the_data_and_not_across_a_gap():
    angle = torch.linspace(0, 2 * torch.pi, 61)[:-1]
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    features = torch.cat([circle, 2 * circle, 9 + circle])  # two circles, one within the other, and one that no label reaches
    truth = torch.arange(2).repeat_interleave(60)
    told = torch.full((180,), -100)
    told[[7, 90]] = torch.tensor([0, 1])
    found = spread_labels(features, told, neighbours=4)
    assert torch.equal(found[:120], truth) and (found[120:] == -100).all()
    both = spread_labels(features[:120], told[:120], neighbours=119, least=0.9)
    assert both[7] == 0 and both[90] == 1 and (both == -100).sum() > 20
    rows = sprites(num_rows=60)
    labels = LabelColumn("shape", tuple(rows.features["shape"].names))
    part = PartlyLabelled(rows, ImageColumn("image", 16), labels, per_class=1, spread=lambda told: told.where(told >= 0, 2))
    batch = part.batch(part.numbers, part.numbers)
    assert part.num_told == 3 and sorted(batch["labels"][:3].tolist()) == [0, 1, 2] and (batch["labels"][3:] == 2).all()
    with pytest.raises(ValueError, match="neighbours: received 60 for 60 rows, expected 1 to 59"):
        spread_labels(circle, told[:60], 60)
    for labels, least, received in ((torch.full((60,), -100), 0.5, "0.5 and 0 labels"), (told[:60], 50, "50 and 1 labels")):
        with pytest.raises(ValueError, match=f"least, labels: received {received}, expected a share"):
            spread_labels(circle, labels, least=least)


def test_rows_that_cannot_tell_their_class_are_named():
    rows, column = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["x", "y", "x"]}), TextColumn("text", tokenizer())
    labels = LabelColumn("label", ("x", "y"))
    with pytest.raises(ValueError, match="labels_per_class: received 2, expected 1 to 1: the training rows of class 'y'"):
        PartlyLabelled(rows, column, labels, per_class=2)
    with pytest.raises(ValueError, match="label_repeats: received 0, expected at least 1"):
        PartlyLabelled(rows, column, labels, repeats=0)
    with pytest.raises(ValueError, match="received a stream"):
        PartlyLabelled(rows.to_iterable_dataset(), column, labels)
    with pytest.raises(BadRow, match="row 1, field 'label'"):
        PartlyLabelled(rows, column, LabelColumn("label", ("x", "z")))
    for given in ({"labels_per_class": 1}, {"label_seed": 0}, {"classifier_alpha": 5.0, "least_probability": 0.01}):
        with pytest.raises(ValueError, match=f"label_column: received None with {', '.join(given)}, expected the column"):
            partly_labelled({"train": rows}, {"train": column}, LabelArguments(**given))


def tokenizer():
    return train_tokenizer(["a b c"], "whitespace", 20)


FEW = ["--label_column", "label", "--labels_per_class", "3", "--label_repeats", "2", "--classifier_alpha", "5", "--max_steps", "4"]


def test_a_run_with_classes_that_was_stopped_ends_with_the_same_bits(tmp_path):
    command = ["--dataset", str(sentences(tmp_path / "data")), *TEXT_RUN, *FEW, "--dropout", "0.2", "--output_dir"]
    whole = run("text_vae", [*command, str(tmp_path / "whole")])
    assert whole["exit"] == 0
    assert 0 <= whole["digest"][-1]["accuracy"] <= 1
    assert any("accuracy" in name for line in whole["history"] for name in line)
    assert "Sentences by class" in (tmp_path / "whole" / "README.md").read_text()
    part = [*command, str(tmp_path / "part")]
    assert run("text_vae", part, signal_at=1)["exit"] == 143
    assert run("text_vae", part)["exit"] == 0
    assert end(tmp_path / "part") == end(tmp_path / "whole")
    shutil.rmtree(tmp_path / "part" / "checkpoints")


def test_the_image_recipe_shows_pictures_by_class(tmp_path):
    for number, path in enumerate(sorted(pictures(tmp_path / "data").rglob("*.jpg"))):
        kind = path.parent / ("even", "odd")[number % 2]
        kind.mkdir(exist_ok=True)
        path.rename(kind / path.name)
    options = ["--dataset", str(tmp_path / "data"), "--label_column", "label", "--labels_per_class", "4", "--max_steps", "2"]
    own = {"classifier_hidden_size": 3, "classifier_dropout": 0.25, "classifier_alpha": 2.0, "least_probability": 0.125}
    options += [f"--{name}={value}" for name, value in own.items()]
    assert run("image_vae", [*IMAGE_RUN, *options, "--output_dir", str(tmp_path / "run")])["exit"] == 0
    config = AutoModel.from_pretrained(tmp_path / "run", dtype="float32").config
    assert config.id2label == {0: "even", 1: "odd"} and {name: getattr(config, name) for name in own} == own
    assert (tmp_path / "run" / "figures" / "classes.png").exists()
    assert "classes.png" in (tmp_path / "run" / "README.md").read_text()


def test_a_model_without_classes_tells_none():
    model = ImageVAE(ImageVAEConfig(image_size=8, hidden_channels=[4], latent_dim=2))
    with pytest.raises(ValueError, match="num_classes: received 0, expected a model that was made with classes"):
        model.classify(pixel_values=torch.zeros(1, 3, 8, 8))


def test_kl_is_of_the_class_too(made):
    """Of a row that tells its class: KL(q(z|x, y) || p(z)) - log p(y)."""
    model, inputs = made
    labels = torch.tensor([0, 1, 2, 0])
    q = model.posterior(**inputs).mixture.components
    divergence = q.kl_per_dimension(model.prior()).sum(-1)[labels, KEY]
    torch.testing.assert_close(model(**inputs, labels=labels).kl, divergence + math.log(N), check_dtype=False)
