"""Phases: what each step trains and weighs is a function of the step, and a run with them may stop anywhere."""

import re

import pytest
import torch
from test_experiment import make

from mmvae import (
    MMVAE,
    ImageVAEConfig,
    MMVAEConfig,
    MMVAEForClassification,
    TextVAE,
    TextVAEConfig,
    TextVAEForSequenceClassification,
    TopicVAEConfig,
    checkpoint,
)
from mmvae.checkpoint import CheckpointError
from mmvae.experiment import RunArguments, train, vae_step
from mmvae.objectives import elbo
from mmvae.optimization import EMA
from mmvae.phases import begin, build_phases, check_objectives, check_reach, check_resets, part_of, phase_at
from mmvae.schedules import in_steps

RUN = {"kl_schedule": "linear", "kl_options": {"steps": 4}, "objective": "elbo", "objective_options": {"free_bits": 0.5}, "num_samples": 1}


def test_a_run_without_phases_is_one():
    (only,) = build_phases(RUN, [])
    assert [only.beta(n) for n in (0, 2, 4, 9)] == [0, 0.5, 1, 1]
    assert (only.objective.func, only.objective.keywords, only.part(7), only.reset) == (elbo, {"free_bits": 0.5}, "all", None)


def test_a_phase_says_what_is_different():
    first = {"steps": 3, "kl_schedule": "constant", "trained": {"inference": 2, "all": 1}}
    phases = build_phases(
        RUN, [first, {"steps": 1, "objective": "iwae", "num_samples": 5}, {"reset": "generation", "objective_options": {}}]
    )
    assert [phase.start for phase in phases] == [0, 3, 4]
    at = [phase_at(phases, n) for n in range(9)]
    assert [phases.index(phase) for phase in at] == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert [phase.beta(n) for n, phase in enumerate(at)] == [1, 1, 1, 0, 0, 0.25, 0.5, 0.75, 1]  # each schedule counts from its own start
    assert [phase.part(n) for n, phase in enumerate(at)] == ["inference", "inference", "all"] + 6 * ["all"]
    assert [phase.num_samples for phase in phases] == [1, 5, 1]
    assert [phase.objective.func.__name__ for phase in phases] == ["elbo", "iwae", "elbo"]
    assert [phase.objective.keywords for phase in phases] == [{"free_bits": 0.5}, {}, {}]


def test_steps_may_be_shares_of_the_run():
    phases = [{"steps": 0.25, "kl_options": {"steps": 0.1}}, {"steps": 5, "kl_schedule": "constant", "kl_options": {"weight": 0.5}}, {}]
    decay = {"lr_schedule": "warmup_stable_decay", "lr_options": {"num_decay_steps": 0.6, "min_lr_ratio": 0.02}}
    run = RunArguments(num_epochs=1, kl_options={"steps": 0.5, "start": 0.5}, phases=phases, **decay)
    told = run.in_steps(40)
    assert (told.kl_options, told.lr_options) == ({"steps": 20, "start": 0.5}, {"num_decay_steps": 24, "min_lr_ratio": 0.02})
    assert [phase.start for phase in build_phases(vars(told), told.phases)] == [0, 10, 15]
    assert [told.phases[0]["kl_options"], told.phases[1]["kl_options"]] == [{"steps": 4}, {"weight": 0.5}]
    assert (run.kl_options["steps"], run.phases[0]["steps"]) == (0.5, 0.25)
    assert told.in_steps(9).lr_options == told.lr_options
    assert in_steps({"steps": 1.0, "delay": 1, "start": 0.5}, 40) == {"steps": 40, "delay": 1, "start": 0.5}


def test_a_run_in_shares_is_the_run_in_steps(tmp_path):
    weights = []
    for name, options in (("shares", {"steps": 0.5}), ("steps", {"steps": 3})):
        accelerator, args, model, loaders = make(tmp_path / name, num_epochs=2, kl_options=options)
        train(accelerator, args, model, loaders)
        weights.append(model.state_dict())
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_a_longer_run_whose_shares_are_more_steps_is_another_run(tmp_path):
    options = {"phases": [{"steps": 0.5, "kl_schedule": "constant"}, {"kl_options": {"steps": 0.25}}], "kl_options": {"steps": 4}}
    train(*make(tmp_path, num_epochs=2, **options))
    assert train(*make(tmp_path, num_epochs=2, **options)).step == 6  # resumed at its end
    with pytest.raises(CheckpointError, match=r"(?s)options.num_epochs: 2 -> 4.*options.phases: .*3.* -> .*6"):
        train(*make(tmp_path, num_epochs=4, **options))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"steps": 3}, "phases: received {'steps': 3}, expected a list"),
        ([3], "phases[0]: received 3, expected a mapping"),
        ([{"beta": 3}], "phases[0]: received {'beta': 3}, expected a mapping with some of ['kl_options'"),
        ([{"steps": 5}], "phases[0].steps: received 5, expected none for the last phase"),
        ([{}, {}], "phases[0].steps: received None, expected a whole number from 1 on"),
        ([{"steps": 0}, {}], "phases[0].steps: received 0, expected a whole number from 1 on"),
        ([{"steps": 1.5}, {}], "phases[0].steps: received 1.5, expected a whole number from 1 on, or a share of the run below 1.0"),
        ([{"steps": 0.6}, {"steps": 0.6}, {}], "phases: received steps that are 1.2 of the run, expected less than 1"),
        ([{"kl_schedule": "steep"}], "phases[0].kl_schedule: received 'steep', expected one of"),
        ([{"kl_options": {"step": 5}}], "phases[0].kl_options: received {'step': 5}, expected parameters of linear"),
        ([{"kl_options": {"steps": "1e2"}}], "phases[0].kl_options: steps: received '1e2', expected a finite number above 0"),
        ([{"objective_options": {"free_bits": {"unit": 0.1, "row": "1e0"}}}], "phases[0].objective_options: free_bits: received {'unit"),
        ([{"objective_options": {"bits": 5}}], "phases[0].objective_options: received {'bits': 5}"),
        ([{"num_samples": 0}], "phases[0].num_samples: received 0, expected at least 1"),
        ([{"trained": "encoder"}], "phases[0].trained: received 'encoder', expected one of ('inference', 'generation', 'all')"),
        ([{"trained": {"all": 0}}], "phases[0].trained: received {'all': 0}"),
        ([{"reset": "decoder"}], "phases[0].reset: received 'decoder'"),
    ],
)
def test_what_is_no_phase_is_refused(phases, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RunArguments(num_epochs=1, phases=phases)


def test_parts_of_every_kind_of_model():
    plain = {"vocab_size": 9, "embedding_size": 3, "hidden_size": 4, "latent_dim": 2}
    text = TextVAEConfig(**plain, num_classes=3)
    joint = MMVAE(
        MMVAEConfig(
            modalities={"image": ImageVAEConfig(image_size=8, hidden_channels=[4], latent_dim=2), "text": TextVAEConfig(**plain)},
            latent_dim=2,
        )
    )
    for model in (TextVAE(text), TextVAEForSequenceClassification(text), joint):
        names = {name for name, _ in model.named_parameters()}
        inference, generation = part_of(model, "inference"), part_of(model, "generation")
        assert inference | generation == names == part_of(model, "all")
        assert not inference & generation
        assert {name for name in names if "decoder" in name or "lm_head" in name} <= generation
        words = {"encoder", "encoder_embedding", "to_moments", "classifier", "class_moments"}
        assert {name for name in names if words & set(name.split(".")) or name.startswith("head.")} == inference
    # what z is made of depends on inference alone, and what is made of z on generation alone
    model = TextVAE(text)
    rows = {"input_ids": torch.tensor([[1, 4, 5, 2]])}
    model.encode(**rows).mean.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= part_of(model, "inference")
    model.zero_grad()
    model.decode(torch.randn(1, 2), torch.tensor([0])).log_prob(model.target(**rows)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= part_of(model, "generation")


@pytest.mark.parametrize(("phases", "start"), [([{"steps": 4000}, {"reset": "generation"}], 4000), ([{"steps": 0.99}, {}], 6)])
def test_a_phase_that_would_never_begin_is_refused(tmp_path, phases, start):
    with pytest.raises(ValueError, match=f"phases: received a last one from step {start} on, expected one before the run's end at 6"):
        train(*make(tmp_path, phases=phases))


@pytest.mark.parametrize("option", [{"trained": {"inference": 10, "all": 1}}, {"reset": "inference"}])
def test_a_part_without_weights_is_refused(option):
    model = TextVAE(TextVAEConfig(vocab_size=9, embedding_size=3, hidden_size=4, latent_dim=0))
    with pytest.raises(ValueError, match=re.escape("phases[1]: received 'inference' to train or reset, expected a part in which")):
        check_reach(build_phases(RUN, [{"steps": 3}, option]), model, 9)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def test_a_step_moves_what_it_trains(tmp_path):
    phases = [{"steps": 3, "trained": {"inference": 1, "generation": 1, "all": 1}}, {}]
    accelerator, args, model, loaders = make(tmp_path, phases=phases, kl_options={"steps": 1, "start": 1})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    step, batch = vae_step(accelerator, model, args, None, optimizer=optimizer), next(loaders["train"].batches(0))
    for n, part in enumerate(("inference", "generation", "all", "all")):
        before = weights(model)
        step(batch, n)
        moved = changed(before, model)
        assert moved <= part_of(model, part)
        assert {name for name in part_of(model, part) if before[name].dim() > 1} <= moved


def test_a_reset_gives_one_part_new_weights_and_moments(tmp_path):
    phases = [{"steps": 2}, {"reset": "generation"}]
    accelerator, args, model, loaders = make(tmp_path, phases=phases, learning_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    step, batch = vae_step(accelerator, model, args, None, optimizer=optimizer), next(loaders["train"].batches(0))
    before = weights(model)
    step(batch, 0), step(batch, 1)
    assert not changed(before, model)  # the learning rate is 0
    step(batch, 2)
    new, fresh = changed(before, model), weights(model)
    assert new <= part_of(model, "generation")
    assert {name for name in part_of(model, "generation") if before[name].dim() > 1 and before[name].any()} <= new
    taken = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert {name for name, steps in taken.items() if steps == 1} == part_of(model, "generation")
    step(batch, 2)  # the same step again, as after a stop: the same weights
    assert not changed(fresh, model)
    assert all(fresh[name].std() < 3 * before[name].std() + 1e-6 for name in new)


def test_a_reset_is_as_a_new_model_and_its_average_begins_anew():
    """Every module starts as its own model has it, a tied table as the embedding does."""
    text = TextVAEConfig(vocab_size=500, embedding_size=16, hidden_size=16, latent_dim=2, tie_word_embeddings=True)
    topics = TopicVAEConfig(vocabulary=["a", "b"], latent_dim=2, prior="standard_normal")
    model = MMVAE(MMVAEConfig(modalities={"text": text, "topics": topics}, latent_dim=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(10)
    ema = EMA(model)
    phases = build_phases(RUN, [{"steps": 1}, {"reset": "generation"}])
    begin(phases[1], model, torch.optim.AdamW(model.parameters()), 0, ema)
    new = part_of(model, "generation")
    assert {name for name, p in model.named_parameters() if p.abs().max() < 5} == new
    assert all(torch.equal(ema.weights[name], p) for name, p in model.named_parameters())
    table = model.vaes["text"].decoder.embed_tokens.weight
    assert table is model.vaes["text"].lm_head.weight and 0.09 < table.std() < 0.11


def test_a_reset_forgets_running_statistics_and_scales():
    picture = ImageVAEConfig(image_size=8, hidden_channels=[4], latent_dim=2, norm="batch", scale_mode="optimal", scale=0.5)
    topics = TopicVAEConfig(vocabulary=["a", "b"], latent_dim=2, prior="standard_normal")
    model = MMVAE(MMVAEConfig(modalities={"picture": picture, "topics": topics}, latent_dim=2))
    first = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        for _, value in model.named_buffers():
            value.add_(7)
    begin(build_phases(RUN, [{"steps": 1}, {"reset": "generation"}])[1], model, torch.optim.AdamW(model.parameters()), 0)
    kept = {name for name, value in model.named_buffers() if not torch.equal(value, first[name])}
    inside = ("encoder.", "to_moments.", "moments_norm.", "to_mean", "to_logvar")
    assert kept == {name for name in first if name.split(".", 2)[2].startswith(inside)} and 0 < len(kept) < len(first)


def test_mmvm_is_refused_of_one_modality_and_not_of_two():
    both = {name: TextVAEConfig(vocab_size=9, latent_dim=2) for name in "ab"}
    phases = build_phases(RUN | {"objective": "mmvm", "objective_options": {}}, [])
    for kind in (MMVAE, MMVAEForClassification):
        check_objectives(phases, kind(MMVAEConfig(modalities=both, num_labels=2)))
    with pytest.raises(ValueError, match="received 'mmvm' with prior_weight 0 for one modality"):
        check_objectives(phases, TextVAE(both["a"]))


def test_a_new_decoder_leaves_the_encoder_its_embedding():
    phases = build_phases(RUN, [{"steps": 1}, {"reset": "generation"}])
    check_resets(phases, TextVAE(TextVAEConfig(vocab_size=9, latent_dim=2)))
    frozen = TextVAE(TextVAEConfig(vocab_size=9, latent_dim=2))
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="reset: received 'generation', of which lm_head.* is frozen, expected a part that is trained"):
        check_resets(phases, frozen)
    with pytest.raises(ValueError, match="reset: received 'generation' with share_embeddings, expected an encoder with an embedding of"):
        check_resets(phases, TextVAE(TextVAEConfig(vocab_size=9, latent_dim=2, share_embeddings=True)))


PHASES = [
    {"steps": 2, "kl_schedule": "constant", "kl_options": {"weight": 0}},
    {"reset": "generation", "trained": {"inference": 1, "all": 1}},
]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_with_phases_goes_on_with_the_same_bits(tmp_path, stop):
    whole = train(*make(tmp_path / "whole", phases=PHASES, ema_decay=0.9, save_every=1, keep=9))
    folder = tmp_path / "stopped" / "checkpoints"
    folder.mkdir(parents=True)
    name = f"step-{stop:08}"
    (tmp_path / "whole" / "checkpoints" / name).rename(folder / name)
    again = train(*make(tmp_path / "stopped", phases=PHASES, ema_decay=0.9, save_every=1, keep=9))
    assert again.step == whole.step == 6
    ends = [checkpoint.load(tmp_path / run / "checkpoints" / "step-00000006")[0]["model"] for run in ("whole", "stopped")]
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    with pytest.raises(checkpoint.CheckpointError, match="options.phases"):
        train(*make(tmp_path / "stopped", phases=[], ema_decay=0.9, save_every=1, keep=9))
