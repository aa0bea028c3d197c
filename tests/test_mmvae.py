"""The joint model: what is hidden was never there, rows are alone, the order of modalities means nothing, and bounds are bounds."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from linear_gaussian import WIDTH, LinearGaussian, LinearGaussianConfig
from test_models import IMAGE, TEXT, pictures, sentences
from transformers import AutoConfig, AutoModel

from mmvae import MMVAE, ImageVAE, ImageVAEConfig, MMVAEConfig, TextVAEConfig
from mmvae.distributions import DiagNormal
from mmvae.evaluation import evaluate_elbo
from mmvae.models import joint_generation
from mmvae.models.joint_generation import overlap
from mmvae.noise import fold
from mmvae.objectives import OBJECTIVES

AutoConfig.register("linear_gaussian", LinearGaussianConfig, exist_ok=True)
AutoModel.register(LinearGaussianConfig, LinearGaussian, exist_ok=True)

AGGREGATIONS = {
    "poe": {},
    "moe": {},
    "mopoe": {},
    "mixture": {"subsets": [["image"], ["image", "text"]]},
}


def joint(private: int = 0, image: dict | None = None, text: dict | None = None, **options) -> MMVAE:
    """A small model of a picture and a caption."""
    torch.manual_seed(0)
    dims = {"latent_dim": 3 + private}
    both = {"image": ImageVAEConfig(**IMAGE | dims | (image or {})), "text": TextVAEConfig(**TEXT | dims | (text or {}))}
    return MMVAE(MMVAEConfig(modalities=both, latent_dim=3, prior_components=4, **options)).eval()


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return pictures(rows) | sentences(rows)


PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 1]]).bool()
KEYS = fold(0, torch.arange(5))
CASES = {
    "poe": {"aggregation": "poe", "aggregation_options": {"prior_expert": True}},
    "moe, drawn": {"aggregation": "moe", "draw": "one"},
    "mopoe, private": {"private": 2, "aggregation": "mopoe"},
    "mopoe, private, drawn": {"private": 2, "aggregation": "mopoe", "draw": "one"},
    "mixture prior": {"aggregation": "mopoe", "prior": "mixture"},
    "vamp prior": {"aggregation": "poe", "prior": "vamp"},
}


@pytest.fixture(params=CASES)
def model(request) -> MMVAE:
    return joint(**CASES[request.param])


def perturb(model: MMVAE) -> MMVAE:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def test_output(model):
    out = model(**batch(), present=PRESENT)
    assert next(iter(out)) == "loss"
    torch.testing.assert_close(out.loss, out.loss_rows.mean())
    torch.testing.assert_close(out.elbo, out.log_px - out.kl)
    torch.testing.assert_close(out.log_px, out.log_px_by_modality.sum(1))
    assert ((out.log_px_by_modality == 0) == ~PRESENT).all()
    assert out.latents.shape == out.latent_mean.shape == (5, 3)
    assert isinstance(model(**batch(), return_dict=False), tuple)
    again = model(**batch(), present=PRESENT)
    assert all(torch.equal(out[name], again[name]) for name in out)


@pytest.mark.parametrize("training", [False, True])
def test_hiding_a_modality_equals_never_having_had_it(model, training):
    model.train(training)
    inputs, options = batch(), {"noise_key": KEYS, "sample_posterior": True, "num_samples": 2}
    for m, names in enumerate((("pixel_values",), ("input_ids", "attention_mask"))):
        mask = torch.zeros(5, 2, dtype=torch.bool)
        mask[:, m] = True
        hidden = model(**inputs, present=mask, **options)
        never = model(**{name: inputs[name] for name in names}, **options)
        for name in ("loss_rows", "elbo", "log_px", "latent_mean", "latent_logvar"):
            torch.testing.assert_close(hidden[name], never[name])


def test_what_is_missing_may_hold_anything_and_takes_no_gradient(model):
    inputs = batch()
    other = {name: value.clone() for name, value in inputs.items()}
    other["pixel_values"][~PRESENT[:, 0]] = 255
    other["input_ids"][~PRESENT[:, 1]] = 1
    model.train()
    losses, grads = [], []
    for given in (inputs, other):
        model.zero_grad()
        out = model(**given, present=PRESENT, noise_key=KEYS)
        out.loss.backward()
        losses.append(out.loss_rows.detach())
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses)
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_fillers_move_no_running_figure(norm):
    options = {"likelihood": "gaussian", "scale_mode": "optimal", "norm": norm}
    torch.manual_seed(0)
    model = MMVAE(MMVAEConfig(modalities={"image": ImageVAEConfig(**IMAGE | options), "text": TextVAEConfig(**TEXT)})).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    present = torch.ones(5, 2, dtype=torch.bool)
    for there in (False, True):
        present[1:, 0], present[0, 0] = there, False
        model(**batch(), present=present).loss.backward()
        changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
        assert bool(changed) == there and all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("missing", [0, 1])
def test_every_parameter_keeps_its_gradient_where_a_batch_lacks_a_modality(missing):
    """Else one of two ranks waits for a gradient that the other never has."""
    model = joint(private=2).train()
    present = torch.ones(5, 2, dtype=torch.bool)
    present[:, missing] = False
    model(**batch(), present=present).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    child = list(model.vaes.values())[missing]
    assert all((p.grad == 0).all() for n, p in child.named_parameters() if not n.startswith("latent_prior"))


@pytest.mark.parametrize("present", [PRESENT, None])
def test_only_components_that_a_row_has_are_decoded(present):
    """BatchNorm sees no noise of the others, and they take no time."""
    model, decoded = perturb(joint(aggregation="mopoe")).train(), []
    model.vaes["image"].decoder.register_forward_hook(lambda _, given, __: decoded.append(given[0].shape[0]))
    out = model(**batch(), present=present)
    subsets = torch.ones(5, 2).bool() if present is None else present
    components = 2 ** subsets.sum(1) - 1
    assert decoded == [int(components[subsets[:, 0]].sum())]
    assert out.loss.isfinite()


def test_figures_need_no_objective_of_the_training():
    options = {"aggregation": "poe", "inference_aggregation": "moe", "objective_options": {"free_bits": 0.1}}
    model = joint(**options)
    rows = [batch() | {"row": torch.arange(5), "row_weight": torch.ones(5), "num_rows": torch.tensor(5)}]
    loader = SimpleNamespace(batches=lambda epoch: iter(rows), rank=0, world_size=1, num_rows=5)
    assert evaluate_elbo(Accelerator(cpu=True), model, loader)["neg_elbo_nats"] > 0


def test_drawing_one_component_gives_the_value_of_all_on_average():
    means = []
    for draw in ("all", "one"):
        model = perturb(joint(aggregation="mopoe", draw=draw, objective_options={"divergence": "components"}))
        options = {"noise_key": KEYS, "sample_posterior": True, "num_samples": 200, **batch()}
        with torch.no_grad():
            means.append(model(**options, present=PRESENT).loss_rows)
    torch.testing.assert_close(*means, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    aggregation = {"mmvm": "moe", "jmvae": "poe", "mvtcae": "poe"}.get(name, "mopoe")
    model, inputs = perturb(joint(aggregation=aggregation, objective=name, private=1)), batch()
    options = {"noise_key": KEYS, "sample_posterior": True, "num_samples": 2}
    whole = model(**inputs, present=PRESENT, **options)
    order = torch.tensor([4, 0, 2])
    options["noise_key"] = KEYS[order]
    part = model(**{k: v[order] for k, v in inputs.items()}, present=PRESENT[order], **options)
    for key in ("loss_rows", "elbo", "latent_mean"):
        torch.testing.assert_close(part[key], whole[key][order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_order_of_modalities_means_nothing(aggregation):
    model = perturb(joint(aggregation=aggregation, aggregation_options=AGGREGATIONS[aggregation]))
    config = MMVAEConfig(**{**model.config.to_dict(), "modalities": dict(reversed(model.config.modalities.items()))})
    turned = MMVAE(config).eval()
    turned.load_state_dict(model.state_dict())
    for draw in ("all", "one"):
        model.config.draw = turned.config.draw = draw
        out, other = model(**batch(), present=PRESENT), turned(**batch(), present=PRESENT.flip(1))
        for name in ("loss_rows", "elbo", "latent_mean", "latent_logvar"):
            torch.testing.assert_close(out[name], other[name])
    made, other = model.reconstruct("image", **batch(), present=PRESENT), turned.reconstruct("image", **batch(), present=PRESENT.flip(1))
    torch.testing.assert_close(made, other)


def test_keyed_likelihoods_do_not_depend_on_the_chunks(model):
    options = {"num_samples": 6, "noise_key": KEYS, "present": PRESENT, **batch()}
    torch.testing.assert_close(
        model.log_marginal(chunk_size=1, **options), model.log_marginal(chunk_size=6, **options), rtol=1e-5, atol=1e-4
    )


def linear_joint(**options) -> tuple[MMVAE, dict[str, torch.Tensor], LinearGaussian]:
    """Two linear-Gaussian modalities; also the single model of both together: that is linear-Gaussian too."""
    children = {name: LinearGaussianConfig() for name in ("a", "b")}
    model = MMVAE(MMVAEConfig(modalities=children, **options)).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for vae in model.vaes.values():
            vae.bias.add_(torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    inputs = {f"{name}_values": torch.randn(6, WIDTH, generator=generator, dtype=torch.float64) for name in children}
    return model, inputs


def exact(model: MMVAE, inputs: dict[str, torch.Tensor], names: tuple[str, ...] = ("a", "b")) -> torch.Tensor:
    weight = torch.cat([model.vaes[name].weight for name in names]).detach()
    bias = torch.cat([model.vaes[name].bias for name in names]).detach()
    covariance = weight @ weight.T + 0.36 * torch.eye(len(weight), dtype=torch.float64)
    values = torch.cat([inputs[f"{name}_values"] for name in names], 1)
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(values)


def test_importance_sampling_finds_the_exact_likelihood_of_a_linear_gaussian_model():
    for options in ({"aggregation": "poe"}, {"aggregation": "mopoe"}, {"aggregation": "mopoe", "draw": "one"}):
        model, inputs = linear_joint(**options)
        found = model.log_marginal(num_samples=4000, noise_key=torch.arange(6), **inputs)
        torch.testing.assert_close(found.double(), exact(model, inputs), atol=0.1, rtol=0)
        single = model.log_marginal(num_samples=10, noise_key=torch.arange(6), a_values=inputs["a_values"])
        torch.testing.assert_close(single.double(), exact(model, inputs, ("a",)), atol=1e-3, rtol=0)  # its expert is exact
    conditional = model.log_conditional("b", num_samples=4000, noise_key=torch.arange(6), **inputs)
    torch.testing.assert_close(conditional.double(), exact(model, inputs) - exact(model, inputs, ("a",)), atol=0.1, rtol=0)
    with torch.no_grad():
        bounds = [model(**inputs, noise_key=fold(n, torch.arange(6)), sample_posterior=True).elbo for n in range(200)]
    assert (torch.stack(bounds).mean(0) < exact(model, inputs) + 0.05).all()


def test_private_latents_come_from_the_auxiliary_prior_where_z_came_from_elsewhere():
    model = perturb(joint(private=2, aggregation="moe")).train()
    inputs = batch()
    seen = {}
    for name, vae in model.vaes.items():
        decode = vae.decode
        vae.decode = lambda z, name=name, decode=decode: seen.__setitem__(name, z) or decode(z)
    with torch.no_grad():
        model.auxiliary["image"].loc.fill_(50.0)
        model(**inputs, noise_key=KEYS)
    z = seen["image"]  # components: from the image, from the text
    assert (z[:, 0, :, 3:].abs() < 20).all()
    assert (z[:, 1, :, 3:] > 40).all()
    model.eval()(**inputs, noise_key=KEYS, sample_posterior=True)
    assert (seen["image"][..., 3:].abs() < 20).all()  # figures are true bounds


def test_modality_dropout_hides_from_the_encoders_and_not_from_the_score():
    model, inputs, keys = joint(modality_dropout={"text": 1.0}, aggregation="poe").train(), batch(), KEYS
    out = model(**inputs, noise_key=keys)
    blind = model.eval()(**inputs, visible=torch.tensor([True, False]).expand(5, 2), noise_key=keys, sample_posterior=True)
    torch.testing.assert_close(out.loss_rows, blind.loss_rows)
    assert (out.log_px_by_modality != 0).all()
    seen = model.train()(**inputs, present=PRESENT, noise_key=keys).latent_mean  # a row with nothing but text keeps it
    torch.testing.assert_close(seen[2], model.posterior(**inputs, present=PRESENT).mixture.mean[2])
    half = joint(modality_dropout={"text": 0.5}).train()
    rows, many = fold(7, torch.arange(2000)), {name: value[:1].expand(2000, *value.shape[1:]) for name, value in inputs.items()}
    visible = half.hide_some(many, rows)["visible"]
    assert visible[:, 0].all()
    assert 900 < visible[:, 1].sum() < 1100
    assert torch.equal(visible[3:5], half.hide_some({name: value[3:5] for name, value in many.items()}, rows[3:5])["visible"])


def test_inference_may_aggregate_otherwise_than_training():
    options = {"aggregation": "mixture", "aggregation_options": {"subsets": [["image"], ["image", "text"]], "prior_expert": True}}
    model, inputs = joint(**options, inference_aggregation="poe"), batch()
    assert len(model.train().posterior(**inputs).members) == 2
    q = model.eval().posterior(**inputs)
    assert len(q.members) == 1
    precision = 1 + sum((-expert.logvar).exp() for expert in q.experts.values())
    torch.testing.assert_close(q.mixture.components.logvar[0], -precision.log())


def test_names_of_inputs():
    assert joint().input_names == ("pixel_values", "input_ids", "attention_mask", "present", "visible")
    two = MMVAE(MMVAEConfig(modalities={"en": TextVAEConfig(**TEXT), "de": TextVAEConfig(**TEXT)})).eval()
    assert two.input_names[:3] == ("en_input_ids", "en_attention_mask", "de_input_ids")
    words = sentences(4)
    named = {f"en_{name}": value for name, value in words.items()}
    assert two(**named).loss.isfinite()
    with pytest.raises(TypeError, match=r"unknown input 'input_ids'; the nearest one is '.._input_ids'"):
        two(**words)
    one, inputs = joint(), batch()
    prefixed = {
        "image_pixel_values": inputs["pixel_values"],
        "text_input_ids": inputs["input_ids"],
        "text_attention_mask": inputs["attention_mask"],
    }
    assert torch.equal(one(**inputs).loss, one(**prefixed).loss)


def test_generation_of_anything_from_anything(model):
    inputs = batch()
    for given, rows in (({}, 3), ({"pixel_values": inputs["pixel_values"]}, 15), ({"input_ids": inputs["input_ids"]}, 15), (inputs, 15)):
        made = model.generate(["image", "text"], num_samples=3, **given, max_new_tokens=4)
        assert made["image"].shape == (rows, 1, 16, 16)
        assert made["text"].shape[0] == rows
    first, again, other = (
        model.generate("image", 2, torch.Generator().manual_seed(seed), input_ids=inputs["input_ids"]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    fixed = [model.generate("image", sample=False, **inputs) for _ in range(2)]
    assert torch.equal(*fixed)
    assert torch.equal(fixed[0], model.reconstruct("image", **inputs))
    mixed = model.generate("text", **inputs, present=PRESENT, max_new_tokens=3)
    assert len(mixed) == 5
    assert len(model.interpolate(torch.zeros(2, 3), torch.ones(2, 3), 4, target="image")) == 8
    assert set(model.sample(2, max_new_tokens=3)) == {"image", "text"}


def test_what_a_tokenizer_gives_besides_is_passed_over_in_generation():
    model, inputs = joint(), batch()
    foreign = {"token_type_ids": torch.zeros_like(inputs["input_ids"]), "labels": torch.zeros(5)}
    for target in ("image", "text"):
        assert torch.equal(model.reconstruct(target, **inputs, **foreign), model.reconstruct(target, **inputs))


def test_what_is_found_overlaps_most(model):
    both, reference = batch(), {"pixel_values": batch(9)["pixel_values"]}
    queries, candidates = {"pixel_values": both.pop("pixel_values")[:3]}, both
    a, b, r = (model.posterior(**inputs).mixture for inputs in (queries, candidates, reference))

    def overlaps(first):
        spread = (first.variance.unsqueeze(1) + b.variance).sqrt()
        return torch.distributions.Normal(b.mean, spread).log_prob(first.mean.unsqueeze(1)).sum(-1)

    scores = overlaps(a)
    assert torch.equal(model.retrieve(queries, candidates, 2), scores.argsort(1, descending=True)[:, :2])
    scores = scores - (overlaps(r).exp().mean(0)).log()
    assert torch.equal(model.retrieve(queries, candidates, 9, reference=reference), scores.argsort(1, descending=True))


def test_much_is_encoded_and_compared_in_parts(monkeypatch):
    model, encoded, compared = perturb(joint()), [], []
    queries, candidates = pictures(40), sentences(600)
    a, b = (model.posterior(**inputs).mixture for inputs in (queries, candidates))
    scores = overlap(*(DiagNormal(q.mean, q.variance.log()) for q in (a, b)))
    expected = scores.topk(3, 1)
    monkeypatch.setattr(joint_generation, "_MOST_DIFFERENCES", 16 * 600 * 3)
    monkeypatch.setattr(joint_generation, "overlap", lambda a, b: compared.append(len(a.loc)) or overlap(a, b))
    encode = model.posterior
    monkeypatch.setattr(model, "posterior", lambda **inputs: encoded.append(len(next(iter(inputs.values())))) or encode(**inputs))
    found = model.retrieve(queries, candidates, 3)
    torch.testing.assert_close(scores.gather(1, found), expected.values)
    assert encoded == [40, 256, 256, 88] and compared == [16, 16, 8]


def test_save_and_load(model, tmp_path):
    perturb(model)
    expected = model(**batch())
    model.save_pretrained(tmp_path)
    again, info = MMVAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.to_json_string() == model.config.to_json_string()
    received = again(**batch())
    assert all(torch.equal(received[name], expected[name]) for name in expected)
    assert type(AutoModel.from_pretrained(tmp_path)) is MMVAE
    assert json.loads((tmp_path / "config.json").read_text())["modalities"]["text"]["vocab_size"] == 20


def test_tied_words_stay_tied(tmp_path):
    model = joint(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    again = MMVAE.from_pretrained(tmp_path)
    text = again.vaes["text"]
    assert text.lm_head.weight.data_ptr() == text.decoder.embed_tokens.weight.data_ptr()
    assert torch.equal(again(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": {}}, "modalities: received none"),
        ({"modalities": {"image": {"latent_dim": 3}}}, r"modalities\['image'\]: received .* model_type"),
        ({"modalities": {"a": {"model_type": "llama", "latent_dim": 3}}}, r"\['a'\]: received model_type 'llama', expected that of a VAE"),
        ({"modalities": {"a": {"model_type": "mmvae", "modalities": {}}}}, r"\['a'\]: received model_type 'mmvae', expected that of a VAE"),
        ({"modalities": {"keys": ImageVAEConfig(**IMAGE)}}, "modalities: received the name 'keys'"),
        ({"inference_aggregation": "mixture"}, "inference_aggregation: received .*parameters of mixture"),
        ({"objective": "jmvae"}, "aggregation: received 'mopoe' with objective 'jmvae', expected 'poe'"),
        ({"objective": "mvae", "sources": {"text": "text"}}, "sources: received .* with objective 'mvae', which scores nothing"),
        (
            {"objective": "mmvm", "aggregation": "moe", "inference_aggregation": "poe"},
            "inference_aggregation: received 'poe' with objective",
        ),
        ({"modalities": {"an image": ImageVAEConfig(**IMAGE)}}, "modalities: received the name 'an image'"),
        ({"modalities": {"image": ImageVAEConfig(**IMAGE | {"prior": "vamp"})}}, r"modalities\['image'\].prior: received 'vamp'"),
        ({"modalities": {"a": ImageVAEConfig(**IMAGE), "b": TextVAEConfig(**TEXT | {"latent_dim": 9})}}, "latent_dim: received None with"),
        ({"latent_dim": 4}, r"modalities\['image'\].latent_dim: received 3, expected at least the shared 4"),
        ({"aggregation": "mopo"}, "aggregation: received 'mopo', expected one of 'poe'"),
        ({"aggregation_options": {"subset": 1}}, "aggregation_options: received .*parameters of mopoe"),
        ({"objective_options": {"free": 1}}, "objective_options: received .*parameters of elbo"),
        ({"likelihood_weights": {"txt": 1.0}}, "likelihood_weights: received 'txt', expected one of"),
        ({"likelihood_weights": {"text": -1.0}}, r"likelihood_weights\['text'\]: received -1.0"),
        ({"modality_dropout": {"text": 2}}, r"modality_dropout\['text'\]: received 2, expected 0 to 1"),
        ({"densities": {"shard": {}}}, "densities: received 'shard', expected one of"),
        ({"agregation": "poe"}, "unknown field 'agregation'.*'aggregation'"),
        ({"modalities": {"image": {"model_type": "image_vae", "num_channel": 1}}}, r"modalities\['image'\].*num_channel"),
        (
            {"modalities": {"image": ImageVAEConfig(**IMAGE | {"spatial_latent": True})}},
            r"modalities\['image'\]: received a latent of shape",
        ),
    ],
)
def test_a_wrong_configuration_is_refused_before_any_work(change, message):
    both = {"image": ImageVAEConfig(**IMAGE), "text": TextVAEConfig(**TEXT)}
    with pytest.raises(Exception, match=message):
        MMVAE(MMVAEConfig(**{"modalities": both} | change))


def test_a_changed_child_is_named_when_it_is_loaded(tmp_path):
    joint().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modalities"]["text"]["hidden_size"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(Exception, match=r"modalities\['text'\].*hidden_size"):
        MMVAE.from_pretrained(tmp_path)


def test_wrong_inputs_are_named():
    model, inputs = joint(), batch()
    for call in (model, model.posterior, model.log_marginal):
        with pytest.raises(ValueError, match=r"expected some of \['pixel_values', 'input_ids', 'attention_mask'\]"):
            call()
        with pytest.raises(TypeError, match="unknown input 'pixel_value'; the nearest one is 'pixel_values'"):
            call(pixel_value=inputs["pixel_values"])
        with pytest.raises(ValueError, match=r"present: received shape \(5, 3\), expected \(rows, modalities\) = \(5, 2\)"):
            call(**inputs, present=torch.ones(5, 3))
        with pytest.raises(ValueError, match=r"present: received True for \['text'\]"):
            call(pixel_values=inputs["pixel_values"], present=torch.ones(5, 2))
        with pytest.raises(ValueError, match="different numbers of rows"):
            call(**inputs | {"pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"target: received 'audio', expected one of \['image', 'text'\]"):
        model.generate("audio", **inputs)
    for mask in ("present", "visible"):
        with pytest.raises(ValueError, match=f"{mask}: received without any input, expected the inputs that it is about"):
            model.generate("image", **{mask: PRESENT})
    with pytest.raises(TypeError, match="generate: received 'max_tokens'"):
        model.generate("image", **inputs, max_tokens=3)


def test_what_is_not_present_is_not_visible():
    model, inputs = joint(), batch()
    seen = model.posterior(**inputs, present=PRESENT, visible=torch.ones(5, 2, dtype=torch.bool))
    assert torch.equal(seen.visible, PRESENT)
    torch.testing.assert_close(seen.mixture.mean, model.posterior(**inputs, present=PRESENT).mixture.mean)


def test_a_row_with_nothing_gets_the_prior_that_there_is():
    model, inputs = joint(prior="mixture"), batch()
    with torch.no_grad():
        model.latent_prior.loc.fill_(40.0)
    seen = []
    model.vaes["image"].render = lambda z: seen.append(z) or z
    nothing = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 0], [0, 1]]).bool()
    model.generate("image", 2, **inputs, present=nothing)
    empty = (~nothing.any(1)).repeat_interleave(2)
    assert (seen[0][empty] > 30).all()
    assert (seen[0][~empty] < 30).all()
    alone = {"num_samples": 4, "noise_key": KEYS, "present": torch.tensor([False, True]).expand(5, 2), **inputs}
    torch.testing.assert_close(model.log_conditional("text", **alone), model.log_marginal(**alone))
    with pytest.raises(ValueError, match="target: received 'text' without its inputs"):
        model.log_conditional("text", pixel_values=inputs["pixel_values"])


def test_words_are_added_to_a_text_of_the_model(tmp_path):
    model = joint()
    for ask in (model.get_input_embeddings, lambda: model.resize_token_embeddings(40)):
        with pytest.raises(NotImplementedError, match=r"expected that of a text: model.vaes\[NAME\], NAME one of \['image', 'text'\]"):
            ask()
    size = len(model.vaes["text"].get_input_embeddings().weight) + 3
    model.vaes["text"].resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    assert MMVAE.from_pretrained(tmp_path).config.modalities["text"].vocab_size == size


def test_likelihood_weights_change_the_loss_and_no_figure():
    plain, heavy = joint(), joint(likelihood_weights={"text": 10.0})
    out, other = plain(**batch()), heavy(**batch())
    torch.testing.assert_close(out.elbo, other.elbo)
    torch.testing.assert_close(other.loss_rows - out.loss_rows, -9 * out.log_px_by_modality[:, 1], rtol=1e-4, atol=1e-3)


def test_a_child_loads_alone_from_its_part_of_the_joint_model(tmp_path):
    model = perturb(joint())
    model.vaes["image"].save_pretrained(tmp_path)
    image = ImageVAE.from_pretrained(tmp_path)
    pixels = batch()["pixel_values"]
    assert torch.equal(image.encode(pixels).mean, model.posterior(pixel_values=pixels).experts["image"].mean)


def test_modalities_keep_their_order_when_saved(tmp_path):
    """JSON with sorted keys would exchange the columns of ``present``, and the parts of a VampPrior's pseudo-inputs."""
    both = {"words": TextVAEConfig(**TEXT | {"latent_dim": 3}), "image": ImageVAEConfig(**IMAGE | {"latent_dim": 3})}
    torch.manual_seed(0)
    model = MMVAE(MMVAEConfig(modalities=both, latent_dim=3, prior="vamp", prior_components=4)).eval()
    model.save_pretrained(tmp_path)
    again = MMVAE.from_pretrained(tmp_path)
    assert again.modalities == model.modalities == ("words", "image")
    torch.testing.assert_close(again(**batch(), present=PRESENT).elbo, model(**batch(), present=PRESENT).elbo)


def test_a_place_may_be_shared_and_an_angle_not():
    child = ImageVAEConfig(image_size=16, latent_dim=6, pose="rotation+shift")
    with pytest.raises(StrictDataclassError, match=r"latent_dim: received 6, expected at least the shared 5 and 2 that it keeps to itself"):
        MMVAEConfig(modalities={"image": child}, latent_dim=5)
    model = MMVAE(MMVAEConfig(modalities={"image": child}, latent_dim=4)).eval()
    white = torch.zeros(2, 3, 16, 16)
    white[0, :, 3:5, 9:11], white[1, :, 11:13, 5:7] = 1.0, 1.0
    place = model.posterior(pixel_values=white).mixture.mean[:, 2:]  # 2 of content, 2 of place
    torch.testing.assert_close(torch.erf(place / 2**0.5), torch.tensor([[0.25, -0.5], [-0.25, 0.5]]), atol=1e-3, rtol=0)
