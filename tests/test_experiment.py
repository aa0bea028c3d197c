"""Options, and what the recipes share beside the loop."""

import json
import logging
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from recipe_runs import recipe

from mmvae import ImageVAE, ImageVAEConfig, TextVAE, TextVAEConfig, checkpoint
from mmvae.checkpoint import CheckpointError
from mmvae.data import ImageColumn, Loader, Rows, TextColumn
from mmvae.experiment import RunArguments, parse, precision, start, train, vae_step
from mmvae.options import suited_pose
from mmvae.processing import train_tokenizer
from mmvae.study import StudyRun


@dataclass
class Options:
    latent_dim: int = 4
    channels: list[int] | None = None


# ---- options


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("latent_dim: 8\nnum_epochs: 3\nlearning_rate: 2e-3\nkl_options: {steps: 7}\nmax_grad_norm: null\nchannels: [8, 16]\n")
    run, model = parse(RunArguments, Options, argv=["--config", str(path), "--latent_dim", "2", "--objective_options", '{"free_bits": 1}'])
    assert (model.latent_dim, model.channels) == (2, [8, 16])
    assert (run.num_epochs, run.learning_rate, run.kl_options, run.objective_options) == (3, 2e-3, {"steps": 7}, {"free_bits": 1})
    assert (run.max_grad_norm, run.batch_size) == (None, RunArguments(num_epochs=1).batch_size)


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    (tmp_path / "a.yaml").write_text("num_epochs: 3\nlatent_dim: 8\nkl_options: {steps: 7}\n")
    (tmp_path / "b.yaml").write_text("latent_dim: 16\n")
    files = [str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    run, model = parse(RunArguments, Options, argv=["--config", *files, "--num_epochs", "2"])
    assert (model.latent_dim, run.num_epochs, run.kl_options) == (16, 2, {"steps": 7})


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("latnt_dim: 8", [], r"run.yaml: unknown option 'latnt_dim'; the nearest one is 'latent_dim'"),
        ("3: 8", [], r"run.yaml: unknown option 3; the nearest one is"),
        ("- latent_dim", [], "run.yaml: received list, expected a mapping"),
        ("", ["--latnt_dim=8"], "unknown option '--latnt_dim'; the nearest one is '--latent_dim'"),
        ("", ["stray"], "unknown option 'stray'"),
        ("objective: elb", [], r"objective: received 'elb', expected one of \['capacity', 'dreg', 'elbo', 'iwae', "),
        ("lr_schedule: reduce_lr_on_plateau", [], "lr_schedule: received 'reduce_lr_on_plateau', expected one of"),
        ("num_epochs: null", [], "num_epochs and max_steps: received neither"),
        ("push_to_hub: true\nhub_model_id: a/b/c", [], "repo_id: got 'a/b/c'"),
        ("", ["--max_steps", "0"], "max_steps: received 0, expected at least 1"),
        ("num_epochs: 0", [], "num_epochs: received 0, expected at least 1"),
        ("patience: 0", [], "patience: received 0, expected at least 1"),
        ("max_grad_norm: .inf", [], "max_grad_norm: received inf, expected a finite number"),
        ("max_grad_norm: 0", [], r"max_grad_norm: received 0, expected above 0, or null \(None\) to clip nothing"),
        ("", ["--max_grad_norm", "-1"], r"max_grad_norm: received -1.0, expected above 0"),
        ("warmup_steps: 0.05", [], "warmup_steps: received 0.05, expected at least 0 and whole"),
        *(
            (f"{name}: 0", [], f"{name}: received 0, expected at least 1")
            for name in ("batch_size", "accumulation", "log_every", "save_every", "keep", "num_samples", "eval_every")
        ),
        ("importance_samples: -1", [], "importance_samples: received -1, expected at least 0"),
        ("", ["--kl_options", "steps=3"], "kl_options: received 'steps=3', expected a mapping, for example"),
        ("kl_options: [3]", [], r"kl_options: received \[3\], expected a mapping"),
        ("", ["--kl_options", '{"stepz": 3}'], r"kl_options: received {'stepz': 3}, expected parameters of linear, \['steps', 'start', "),
        ("kl_options: {steps: -3}", [], "steps: received -3, expected a finite number above 0"),
        ("kl_options: {steps: 100, start: 1e-2}", [], "kl_options: received the text '1e-2' as start, expected a number"),
        ("lr_schedule: cosine\nlr_options: {num_cycles: 1e0}", [], "lr_options: received the text '1e0' as num_cycles, expected"),
        ("objective_options: {free_bits: -1}", [], "objective_options: free_bits: received -1, expected a finite number of at least 0"),
        (
            "objective: capacity\nobjective_options: {strength: -1}",
            [],
            "objective_options: strength: received -1, expected a finite number of at least 0",
        ),
        ("lr_options: {num_decay_steps: 0.6}", [], "lr_options: received .*0.6} with lr_schedule 'constant_with_warmup', which has none"),
        ("lr_schedule: constant\nlr_options: {a: 1}", [], "lr_options: received {'a': 1} with lr_schedule 'constant', which has none"),
        ("lr_schedule: constant\nwarmup_steps: 7", [], "warmup_steps: received 7 with lr_schedule 'constant', expected 0, or"),
        ("kl_schedule: cyclical", [], r"kl_options: received {}, expected parameters of cyclical, \['period', .*missing .*'period'"),
        (
            "objective_options: {free_bit: 3}",
            [],
            r"expected parameters of elbo, \['free_bits', 'free_bits_per'.*got an unexpected .*'free_bit'",
        ),
        (
            "objective: iwae\nobjective_options: {free_bits: 3}",
            [],
            r"objective_options: received {'free_bits': 3}, expected parameters of iwae",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path, text, argv, message):
    (tmp_path / "run.yaml").write_text(f"num_epochs: 1\n{text}" if ":" in text or not text else text)
    with pytest.raises(ValueError, match=message):
        parse(RunArguments, Options, argv=["--config", str(tmp_path / "run.yaml"), *argv])


@dataclass
class FreeBits(RunArguments):
    num_epochs: int | None = 1
    objective_options: str = '{"free_bits": 0.25}'


def test_default_options_of_one_function_are_not_handed_to_another():
    assert FreeBits(kl_schedule="constant").kl_options == {}
    assert FreeBits(kl_schedule="constant", kl_options={"weight": 0.5}).kl_options == {"weight": 0.5}
    assert FreeBits(kl_schedule="cyclical", kl_options='{"period": 9}').kl_options == {"period": 9}
    assert FreeBits(objective="iwae").objective_options == FreeBits(objective="dreg").objective_options == {}
    assert FreeBits().objective_options == {"free_bits": 0.25}


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_free_bits_suit_the_prior(prior):
    args = FreeBits()
    args.suit_prior("standard_normal", 8)
    args.suit_prior("learned_normal", 8)
    assert args.objective_options == {"free_bits": 0.25}
    args.suit_prior(prior, 8)
    assert args.objective_options == {"free_bits": 2.0, "free_bits_per": "row"}
    per_row = {"free_bits": 3.0, "free_bits_per": "row"}
    for options in (per_row, {"free_bits": {"row": 3.0}}):
        asked = FreeBits(objective_options=options)
        asked.suit_prior(prior, 8)
        assert asked.objective_options == options
    for options in ({"free_bits": 0.1}, {"free_bits": {"unit": 0.1, "row": 3.0}}):
        with pytest.raises(ValueError, match=f"objective_options: received .* with prior '{prior}', expected free_bits_per"):
            FreeBits(objective_options=options).suit_prior(prior, 8)


def test_components_are_those_of_a_prior_that_has_some():
    FreeBits(objective="iwae").suit_prior("vamp", 8, 7)
    with pytest.raises(ValueError, match="prior_components: received 7 with prior 'learned_normal', expected a mixture or vamp prior"):
        FreeBits().suit_prior("learned_normal", 8, 7)


@pytest.mark.parametrize("given", [{"streaming": True}, {"on_bad_row": "skip"}, {"push_to_hub": True}])
def test_what_a_recipe_cannot_serve_is_refused_by_name(given):
    StudyRun()
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"{name}: received {value!r}, expected ('error' or 'skip_empty'|False): a study"):
        StudyRun(**given)


def test_topics_have_no_longest_text():
    with pytest.raises(ValueError, match="max_length: received 9, expected 512: words are counted of all"):
        recipe("topic_vae").TopicRun(max_length=9)


@pytest.mark.parametrize(("dataset", "pose"), [("sprites:5", "rotation+shift"), ("sprites", "rotation+shift"), ("sprites_of_mine", "none")])
def test_a_pose_suits_the_data(dataset, pose):
    assert suited_pose("auto", dataset) == pose
    assert suited_pose("rotation", dataset) == "rotation"


def test_precision(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert precision("fp16") == "fp16"
    assert precision("auto") in ("no", "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert (precision("auto"), precision("no")) == ("fp16", "no")


# ---- training


def loader(rows=20, batch_size=8, **options):
    pixels = torch.randint(0, 256, (rows, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Dataset.from_dict({"image": [x.tolist() for x in pixels]})
    return Loader(Rows(data, ImageColumn("image", 8, 1)), batch_size, **options)


def make(folder, **options):
    """Arguments of ``train`` for a tiny image VAE."""
    options = {"num_epochs": 2, "warmup_steps": 0, "mixed_precision": "no", "log_every": 1, "kl_options": {"steps": 4}} | options
    args = RunArguments(output_dir=str(folder), **options)
    torch.manual_seed(0)
    model = ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, likelihood="bernoulli"))
    return start(args), args, model, {"train": loader(), "validation": loader(6, shuffle=False)}


def test_what_is_shown_are_the_weights_that_are_kept(tmp_path):
    seen = []

    def show(model, step):
        assert not model.training
        seen.append((step, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return {}

    result = train(*make(tmp_path, ema_decay=0.5), show=show)
    assert [step for step, _ in seen] == [3, 6]
    state, _ = checkpoint.load(tmp_path / "checkpoints" / "step-00000006")
    averages, weights = state["ema"]["weights"], state["model"]
    assert all(torch.equal(x, averages[name]) for name, x in seen[-1][1].items())
    assert any(not torch.equal(x, weights[name]) for name, x in seen[-1][1].items())
    assert result.best_step in (3, 6)


def test_a_tied_weight_is_published_as_averaged(tmp_path):
    """It has two names in the state, and one in the average."""
    _, args, _, _ = make(tmp_path, ema_decay=0.5, importance_samples=0, batch_size=4, learning_rate=0.1)
    texts = [f"w{i % 3} w{i % 5}" for i in range(12)]
    tokenizer = train_tokenizer(texts)
    rows = Rows(Dataset.from_dict({"text": texts}), TextColumn("text", tokenizer))
    model = TextVAE(TextVAEConfig(vocab_size=len(tokenizer), hidden_size=8, embedding_size=8, latent_dim=2, tie_word_embeddings=True))
    result = train(start(args), args, model, {"train": Loader(rows, 4), "validation": Loader(rows, 4, shuffle=False)})
    state, _ = checkpoint.load(result.checkpoint)
    average = state["ema"]["weights"]["decoder.embed_tokens.weight"]
    assert not torch.equal(average, state["model"]["lm_head.weight"])
    assert torch.equal(model.lm_head.weight, average) and model.lm_head.weight is model.decoder.embed_tokens.weight


def test_the_monitored_figure_decides_what_is_kept(tmp_path):
    kept, figures = {}, {}
    for monitor in ("kl_nats", "reconstruction_nats", "last"):
        result = train(*make(tmp_path / monitor, num_epochs=4, learning_rate=0.05, monitor=monitor))
        lines = [line for line in result.history if f"eval/{monitor}" in line or "eval/kl_nats" in line]
        kept[monitor], figures[monitor] = result.checkpoint.name, {line["step"]: line for line in lines}
    for monitor in ("kl_nats", "reconstruction_nats"):
        best = min(figures[monitor], key=lambda step: figures[monitor][step][f"eval/{monitor}"])
        assert kept[monitor] == f"step-{best:08}"
    assert kept["last"] == "step-00000012" != kept["kl_nats"]


@pytest.mark.parametrize(
    ("options", "message"), [({"monitor": "loss"}, "monitor: received 'loss'"), ({"monitor": "last", "patience": 2}, "patience")]
)
def test_what_cannot_be_monitored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunArguments(num_epochs=1, **options)


def test_how_a_run_goes_may_change_and_what_it_computes_may_not(tmp_path):
    train(*make(tmp_path, num_epochs=1))
    with pytest.raises(CheckpointError, match=r"options.learning_rate: 0.001 -> 0.1"):
        train(*make(tmp_path, num_epochs=1, learning_rate=0.1))
    assert train(*make(tmp_path, num_epochs=1, accumulation=2, save_every=7, tracker=None)).step == 3


def test_one_modality_alone_is_not_drawn_to_itself(tmp_path):
    with pytest.raises(ValueError, match="objective: received 'mmvm' with prior_weight 0 for one modality"):
        train(*make(tmp_path, objective="mmvm"))


def test_walks_along_a_spatial_latent_change_the_picture():
    config = ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, spatial_latent=True)
    model = ImageVAE(config).to(memory_format=torch.channels_last).eval()
    z = torch.randn(4, 2, 4, 4).to(memory_format=torch.channels_last)
    pictures, _ = recipe("image_vae").walks(model, z, units=3, steps=5)
    assert all(not torch.equal(row[0], row[-1]) for row in pictures.detach())


def test_a_share_of_bad_rows_stops_only_runs_that_skip_them():
    assert "most_bad" in RunArguments(num_epochs=1, on_bad_row="skip").rows
    assert "most_bad" not in RunArguments(num_epochs=1).rows


def test_other_validation_rows_are_another_run(tmp_path):
    train(*make(tmp_path, num_epochs=1))
    accelerator, args, model, loaders = make(tmp_path, num_epochs=1)
    with pytest.raises(CheckpointError, match="validation: "):
        train(accelerator, args, model, loaders | {"validation": loader(7, shuffle=False)})


@pytest.mark.parametrize("options", [{"free_bits": 0.1, "free_bits_per": "rows"}, {"divergence": "of nothing"}])
def test_an_objective_of_a_later_phase_is_tried_first(tmp_path, options):
    phases = [{"steps": 2}, {"objective_options": options}]
    with pytest.raises(ValueError, match="free_bits_per|divergence"):
        train(*make(tmp_path, phases=phases))
    assert not list(tmp_path.rglob("step-*"))


def test_a_change_that_is_allowed_by_name_is_resumed(tmp_path):
    train(*make(tmp_path, num_epochs=1))
    with pytest.raises(CheckpointError, match=r"allow_changes(.|\n)*config.dropout: 0.0 -> 0.1"):
        train(*changed(tmp_path))
    assert train(*changed(tmp_path, allow_changes=["config.dropout"])).step == 3


def changed(folder, **options):
    accelerator, args, model, loaders = make(folder, num_epochs=1, **options)
    model.config.dropout = 0.1
    return accelerator, args, model, loaders


def test_the_weight_is_a_function_of_the_step_alone(tmp_path):
    beta = {}
    for accumulation in (1, 3):
        accelerator, args, model, loaders = make(tmp_path, accumulation=accumulation)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step = vae_step(accelerator, model, args, None, optimizer=optimizer)
        batch = next(loaders["train"].batches(0))
        beta[accumulation] = [step(batch, n)["beta"] for n in (0, 1, 2, 9)]
    assert beta[1] == beta[3] == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("collapsed", [True, False])
def test_posterior_collapse_is_named(tmp_path, caplog, collapsed):
    accelerator, args, model, loaders = make(tmp_path, num_epochs=1)
    with torch.no_grad():
        model.to_moments.weight.mul_(0 if collapsed else 5)
        model.to_moments.weight.requires_grad_(not collapsed)
    with caplog.at_level(logging.WARNING):
        train(accelerator, args, model, loaders)
    assert ("posterior collapse at step 3: no latent unit is active (KL" in caplog.text) == collapsed


def test_posterior_collapse_is_not_told_while_the_weight_still_rises(tmp_path, caplog):
    accelerator, args, model, loaders = make(tmp_path, num_epochs=3, kl_options={"steps": 5})
    with torch.no_grad():
        model.to_moments.weight.mul_(0)
        model.to_moments.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        train(accelerator, args, model, loaders)
    told = [record.getMessage() for record in caplog.records if "posterior collapse" in record.getMessage()]
    assert ["at step 6" in message or "at step 9" in message for message in told] == [True, True]


def test_a_stream_needs_a_number_of_steps(tmp_path):
    accelerator, args, model, loaders = make(tmp_path)
    stream = Dataset.from_dict({"image": [[[0] * 8] * 8] * 9}).to_iterable_dataset()
    loaders["train"] = Loader(Rows(stream, ImageColumn("image", 8, 1)), 8)
    with pytest.raises(ValueError, match="max_steps: received None with streaming, expected a number"):
        train(accelerator, args, model, loaders)


def test_paths_of_this_machine_stay_out_of_the_record():
    from mmvae.experiment import _told

    run = RunArguments(num_epochs=1, dataset="/data/jane/ptb", output_dir="/data/jane/run", resume="/data/jane/old/step-00000003")
    assert "jane" not in json.dumps(_told(run)) and _told(run)["num_epochs"] == 1
