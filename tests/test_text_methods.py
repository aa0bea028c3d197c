"""Every recipes/configs/text_methods/*.yaml differs from the plain VAE in its method alone, and takes a step in each of its phases."""

from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from recipe_runs import recipe, run, sentences

from mmvae import TextVAE, TextVAEConfig
from mmvae.experiment import parse, vae_step
from mmvae.phases import build_phases

FOLDER = Path(__file__).parent.parent / "recipes" / "configs" / "text_methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "base")
OF_A_METHOD = {"kl_schedule", "kl_options", "objective", "objective_options", "phases"}
OF_A_MODEL = {"word_dropout", "mean_scale", "latent_skip", "bow_weight", "pooling", "prior"}
BATCH = {"input_ids": torch.tensor([[1, 4, 5, 6, 2], [1, 7, 8, 2, 0]]), "attention_mask": torch.tensor([[1] * 5, [1] * 4 + [0]])}


@cache
def options(*names: str) -> tuple:
    module = recipe("text_vae")
    argv = [word for name in names for word in ("--config", str(FOLDER / f"{name}.yaml"))]
    return parse(module.TextRun, module.TextArguments, argv=argv)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_differs_from_the_plain_one(name):
    (plain, plain_model), (run, model) = options("base"), options("base", name)
    assert {key for key, value in vars(run).items() if value != getattr(plain, key)} <= OF_A_METHOD
    differing = {key for key, value in vars(model).items() if value != getattr(plain_model, key)}
    assert differing <= OF_A_MODEL
    assert differing or vars(run) != vars(plain)


@pytest.mark.parametrize("name", ["base", *METHODS])
def test_every_phase_of_a_method_takes_a_step(name):
    run, text = options("base", name) if name != "base" else options("base")
    run = run.in_steps(10_000)
    small = {"vocab_size": 9, "embedding_size": 4, "hidden_size": 4, "latent_dim": 3}
    kept = {key: value for key, value in vars(text).items() if key not in recipe("text_vae").DATA and key in TextVAEConfig().to_dict()}
    torch.manual_seed(0)
    model = TextVAE(TextVAEConfig(**kept | small)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = vae_step(Accelerator(cpu=True, mixed_precision="no"), model, run, None, optimizer=optimizer)
    batch = BATCH | {"row": torch.arange(2), "row_weight": torch.ones(2), "num_rows": torch.tensor(2)}
    for phase in build_phases(vars(run), run.phases):
        for n in (phase.start, phase.start + 20, phase.start + 5000):
            values = step(batch, n)
            assert all(torch.as_tensor(value).isfinite().all() for value in values.values())
            assert not values["skipped"]


def ptb_phases(steps: int, *more: str):
    """The phases of a run of Penn Treebank by several files."""
    configs = [f"--config={FOLDER.parent / name}" for name in ("text_vae_ptb.yaml", *more)]
    args, _ = parse(recipe("text_vae").TextRun, recipe("text_vae").TextArguments, argv=configs)
    told = args.in_steps(steps)
    return build_phases(vars(told), told.phases)


def test_the_informative_run_on_ptb_has_its_three_phases():
    phases = ptb_phases(23_670, "text_vae_ptb_informative.yaml")
    assert [phase.start for phase in phases] == [0, 4024, 8521]  # the run was changed at 8,403, before the third
    assert [phase.objective.keywords["free_bits"] for phase in phases] == [0.2, 6.5, {"unit": 0.1, "row": 6.5}]
    assert [phase.beta(phase.start + 3000) for phase in phases] == [1, 1, 1] and phases[0].beta(1006) == 0.5


def test_the_tight_run_on_ptb_goes_on_from_the_informative_one():
    phases = ptb_phases(28_930, "text_vae_ptb_informative.yaml", "text_vae_ptb_tight.yaml")
    assert [phase.start for phase in phases] == [0, 4024, 8521, 23_670]
    assert phases[0].beta(1006) == 0.5 and phases[3].objective.keywords["free_bits"] == {"unit": 0.03, "row": 4.0}


def test_the_better_bound_on_ptb_goes_on_from_the_first_run(tmp_path, capsys):
    configs = [str(FOLDER.parent / name) for name in ("text_vae_ptb.yaml", "text_vae_ptb_bound.yaml")]
    small = ["--embedding_size=4", "--hidden_size=4", "--latent_dim=3", "--mixed_precision=no", f"--output_dir={tmp_path}"]
    small += ["--batch_size=8", "--dataset", str(sentences(tmp_path / "data"))]
    run("text_vae", ["--config", configs[0], *small, "--num_epochs", "2"], whole=False)
    capsys.readouterr()
    run("text_vae", ["--config", configs[0], "--config", configs[1], *small, "--num_epochs", "3"], whole=False)
    assert "resumed from" in capsys.readouterr().out
