"""One step is the same however its rows are split; what is not finite is never taken; evaluation does not depend on the batch size."""

import contextlib
import json
import math

import pytest
import torch
from accelerate import Accelerator, DistributedType
from distributed_toy import ToyLoader, ToyModel, make, run

from mmvae import ImageVAE, ImageVAEConfig, checkpoint
from mmvae.data import BadRow
from mmvae.experiment import build_accelerator
from mmvae.training import EMA, evaluate, fit, load_weights, micro_batches, unwrap, update


def one_update(accelerator, accumulation=1, rows=11, optimizer=torch.optim.AdamW, steps=3, wreck=None, **options):
    torch.manual_seed(0)
    model = ToyModel(dropout=0.0)
    arguments = {"fused": True} if optimizer is torch.optim.AdamW else {}
    optimizer = accelerator.prepare(optimizer(model.parameters(), lr=0.05, **arguments))
    batch = next(ToyLoader(rows, rows).batches(0))
    outcomes = []
    for n in range(steps):

        def losses(part, n=n):
            loss = model(part["x"], torch.zeros(()))
            return loss if wreck is None else wreck(loss, n)

        outcomes.append(update(accelerator, model, optimizer, losses, batch, accumulation=accumulation, **options))
    return model, optimizer, outcomes


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("accumulation", [2, 3, 11, 40])
def test_accumulation_changes_nothing(accelerator, accumulation):
    whole, _, expected = one_update(accelerator)
    parts, _, outcomes = one_update(accelerator, accumulation)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-6)
    for outcome, reference in zip(outcomes, expected, strict=True):
        torch.testing.assert_close(outcome["loss"], reference["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(outcome["grad_norm"], reference["grad_norm"], rtol=1e-5, atol=0)


def test_loss_is_the_mean_over_rows_and_filler_rows_count_nothing(accelerator):
    model, batch = ToyModel(0.0), next(ToyLoader(5, 5).batches(0))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    expected = model(batch["x"], torch.zeros(())).mean()
    filled = {**batch, "x": torch.cat([batch["x"], torch.ones(1, 4)]), "row_weight": torch.tensor([1.0] * 5 + [0.0])}
    for given in (batch, filled):
        got = update(accelerator, model, optimizer, lambda part: model(part["x"], torch.zeros(())), given)
        torch.testing.assert_close(got["loss"], expected.detach())


def test_micro_batches_are_the_rows_in_order():
    batch = {"row_weight": torch.ones(7), "x": torch.arange(14).reshape(7, 2), "num_rows": torch.tensor(7)}
    parts = list(micro_batches(batch, 3))
    assert [len(part["x"]) for part in parts] == [2, 2, 3]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert all(part["num_rows"] == 7 for part in parts)


def test_clipping_is_to_the_global_norm(accelerator):
    _, _, (outcome,) = one_update(accelerator, steps=1)
    free, _, _ = one_update(accelerator, steps=1, optimizer=torch.optim.SGD)
    clipped, _, _ = one_update(accelerator, steps=1, optimizer=torch.optim.SGD, max_grad_norm=0.5)
    start = flat(one_update(accelerator, steps=0)[0])
    torch.testing.assert_close((start - flat(free)).norm() / 0.05, outcome["grad_norm"])
    torch.testing.assert_close((start - flat(clipped)).norm() / 0.05, torch.tensor(0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_is_not_finite_is_not_taken(accelerator, optimizer, bad):
    wreck = lambda loss, n: torch.where(torch.arange(len(loss)) == 1, loss * bad, loss) if n == 1 else loss  # noqa: E731
    expected, reference, _ = one_update(accelerator, steps=2, optimizer=optimizer)
    model, inner, outcomes = one_update(accelerator, accumulation=1, steps=3, optimizer=optimizer, wreck=wreck)
    assert [outcome["skipped"].item() for outcome in outcomes] == [0, 1, 0]
    assert torch.equal(flat(model), flat(expected))
    if optimizer is torch.optim.AdamW:
        mine, theirs = inner.state_dict()["state"], reference.state_dict()["state"]
        assert all(torch.equal(mine[i][key], theirs[i][key]) for i in theirs for key in theirs[i])
        assert mine[0]["step"] == 2


@pytest.mark.parametrize("wreck", [lambda loss, n: loss + math.inf, lambda loss, n: loss.detach().requires_grad_() * math.nan])
def test_a_loss_that_is_not_finite_with_gradients_that_are_is_not_taken(accelerator, wreck):
    model, _, outcomes = one_update(accelerator, steps=1, wreck=wreck)
    assert outcomes[0]["skipped"] == 1
    assert torch.equal(flat(model), flat(one_update(accelerator, steps=0)[0]))


def test_what_a_forward_remembers_of_a_step_that_is_not_taken_is_forgotten(accelerator):
    """Else one such batch would spoil the running scale of a likelihood, and with it every later loss and checkpoint."""
    options = {"likelihood": "gaussian", "scale_mode": "optimal", "norm": "batch"}
    model = ImageVAE(ImageVAEConfig(image_size=8, num_channels=1, hidden_channels=[4], latent_dim=2, **options)).train()
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), fused=True))
    batch = {"x": torch.rand(4, 1, 8, 8), "row_weight": torch.ones(4), "num_rows": torch.tensor(4)}
    factors = []
    model.encoder.stem.register_forward_hook(lambda module, inputs, out: out * factors[-1])
    for factor, skipped in ((1.0, 0), (math.nan, 1), (1.0, 0)):
        factors.append(factor)
        before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        outcome = update(accelerator, model, optimizer, lambda part: model(pixel_values=part["x"]).loss_rows, batch, accumulation=2)
        assert outcome["skipped"] == skipped
        changed = {name for name, buffer in model.named_buffers() if name in before and not torch.equal(buffer, before[name])}
        assert changed == (set() if skipped else set(before))


def test_a_step_of_a_fused_optimizer_waits_for_nothing(accelerator, monkeypatch):
    """On a GPU each of these would be a synchronisation."""

    def wait(self, *_):
        raise AssertionError("the host waited for the device")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    one_update(accelerator, accumulation=3, max_grad_norm=1.0)
    with pytest.raises(AssertionError, match="waited"):
        one_update(accelerator, optimizer=torch.optim.SGD)


def test_wrong_arguments_of_update_are_named(accelerator):
    with pytest.raises(ValueError, match="accumulation=0"):
        one_update(accelerator, accumulation=0)
    for norm in (0, -1.0):
        with pytest.raises(ValueError, match=f"max_grad_norm={norm}: expected above 0, or None to clip nothing"):
            one_update(accelerator, max_grad_norm=norm)
    with pytest.raises(ValueError, match=r"shape \(\), expected one loss per row: \(11,\)"):
        one_update(accelerator, wreck=lambda loss, n: loss.mean())


def test_the_average_of_the_weights_follows_its_equation():
    model = ToyModel()
    ema, expected = EMA(model, 0.5), flat(model).clone()
    for n in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * flat(model)
    own = flat(model)
    torch.testing.assert_close(torch.cat([w.flatten() for w in ema.weights.values()]), expected)
    with ema.applied():
        torch.testing.assert_close(flat(model), expected)
    assert torch.equal(flat(model), own)
    with pytest.raises(ValueError, match="decay=1"):
        EMA(model, 1)
    with pytest.raises(ValueError, match=r"'inner.0.bias': shape \(8,\), expected \(4,\)"):
        EMA(torch.nn.ModuleDict({"inner": torch.nn.Sequential(torch.nn.Linear(8, 4))})).load_state_dict(ema.state_dict())


def test_compiled_models_have_clean_keys():
    model = ToyModel()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    assert list(EMA(compiled).weights) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_evaluation_does_not_depend_on_the_batch_size(accelerator, batch_size):
    model = ToyModel(0.5)
    model.inner[0].eval()
    loader = ToyLoader(23, batch_size)
    got = evaluate(
        accelerator,
        lambda batch: {"nll": model(batch["x"], torch.zeros(())), "one": torch.ones(len(batch["x"]))},
        loader,
        models=[model],
    )
    with torch.no_grad():
        expected = model.eval()(loader.x, torch.zeros(())).double().mean().item()
    assert got == {"nll": pytest.approx(expected, rel=1e-6), "one": 1.0}


def test_evaluation_restores_each_modules_mode_and_needs_no_gradients(accelerator):
    model = ToyModel()
    model.inner[0].eval()
    before = [module.training for module in model.modules()]

    def measure(batch):
        assert not any(module.training for module in model.modules()) and torch.is_inference_mode_enabled()
        raise KeyError

    with pytest.raises(KeyError):
        evaluate(accelerator, measure, ToyLoader(), models=[model])
    assert [module.training for module in model.modules()] == before and True in before and False in before


def test_evaluation_refuses_what_is_not_one_value_per_row(accelerator):
    with pytest.raises(ValueError, match=r"'nll' of shape \(\), expected one value per row: \(4,\)"):
        evaluate(accelerator, lambda batch: {"nll": torch.zeros(())}, ToyLoader(), models=[])
    with pytest.raises(ValueError, match="no rows"):
        evaluate(accelerator, lambda batch: {}, ToyLoader(0), models=[])
    filler = ToyLoader(1, 4, rank=0, world_size=2)  # this rank has only a filler row
    batch = next(filler.batches(0))
    assert batch["row_weight"].tolist() == [0.0]


# ---- fit


def test_history_is_the_mean_over_each_window(tmp_path):
    seen = []
    accelerator, step, loader, arguments = make()
    logged = []

    def spy(batch, n):
        values = step(batch, n)
        seen.append(values["loss"].item())
        return values

    result = fit(accelerator, spy, loader, folder=tmp_path, **arguments | {"log_every": 4, "on_log": logged.append})
    losses = [(line["step"], line["train/loss"]) for line in result.history if "train/loss" in line]
    assert losses == [(4, pytest.approx(sum(seen[:4]) / 4)), (6, pytest.approx(sum(seen[4:]) / 2))]
    assert [line["step"] for line in result.history if "eval/nll" in line] == [3, 6]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == logged == result.history


def test_a_disk_that_refuses_the_history_is_told_once_and_ends_no_run(tmp_path):
    def fill(n):
        if n == 1:
            (tmp_path / "history.jsonl").unlink()
            (tmp_path / "history.jsonl").symlink_to("/dev/full")
        if n in (1, 2):
            (tmp_path / ".history.jsonl").symlink_to("/dev/full")
        if n == 3:
            (tmp_path / ".history.jsonl").mkdir()  # cannot be removed either, as nothing can where a disk is only read
        if n == 4:
            (tmp_path / ".history.jsonl").rmdir()

    with pytest.warns(UserWarning, match=r"history.jsonl: cannot be written: \[Errno 28\] No space left on device") as told:
        result, _ = run(tmp_path, hook=fill, log_every=1)
    assert len(told) == 1
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert result.step == 6 and lines == result.history


def test_fit_sees_every_row_once_per_epoch_in_the_order_of_the_loader(tmp_path):
    accelerator, step, loader, arguments = make(num_epochs=3)
    ledger = []
    fit(
        accelerator,
        lambda batch, n: ledger.append((n, batch["row"].tolist())) or step(batch, n),
        loader,
        folder=tmp_path,
        **arguments,
    )
    expected = [batch["row"].tolist() for epoch in range(3) for batch in loader.batches(epoch)]
    assert ledger == list(enumerate(expected))
    assert sorted(row for rows in expected[:3] for row in rows) == list(range(11))


@pytest.mark.parametrize(
    ("figures", "best", "end"), [([3.0, 2.0, math.nan, 4.0, 2.5], 4, 10), ([-3.0, -2.0, math.nan, -4.0, -2.5, -math.inf, -1.0], 8, 14)]
)
def test_patience_and_the_best_checkpoint(tmp_path, figures, best, end):
    given = iter(figures)
    options = {"monitor": "score", "eval_every": 2, "patience": 3, "save_every": 1000, "keep": 1}
    result, _ = run(tmp_path, evaluate=lambda: {"score": next(given)}, max_steps=50, num_epochs=None, **options)
    assert (result.best_step, result.best_value, result.step) == (best, figures[best // 2 - 1], end)
    assert result.checkpoint.name == f"step-{best:08d}"
    checkpoint.verify(result.checkpoint)
    again, _ = run(tmp_path, evaluate=dict, max_steps=50, num_epochs=None, **options)
    assert again.step == end, "early stopping holds after a resume"


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_last_weights_are_not_told_as_the_best_ones(tmp_path, caplog, how):
    given = iter([1.0, 2.0])
    result, _ = run(tmp_path, evaluate=lambda: {"nll": next(given)})
    assert (result.best_step, result.best_value, result.checkpoint.name, caplog.text) == (3, 1.0, "step-00000003", "")
    weights = result.checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink() if how == "gone" else weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again, _ = run(tmp_path, evaluate=dict)
    assert (again.best_step, again.best_value, again.checkpoint.name) == (None, None, "step-00000006")
    assert "the best weights, those of step 3, are lost" in caplog.text and "step-00000003/model.safetensors: " in caplog.text


def test_patience_begins_with_the_last_phase(tmp_path):
    options = {"monitor": "score", "eval_every": 2, "patience": 2, "patience_from": 9}
    given = iter(range(50))
    result, _ = run(tmp_path, evaluate=lambda: {"score": next(given)}, max_steps=50, num_epochs=None, **options)
    assert (result.best_step, result.step) == (2, 12), "validations after steps 10 and 12 count"


def test_the_best_weights_are_the_averaged_ones_of_the_best_step(tmp_path):
    accelerator, step, loader, arguments = make()
    weights = {}

    def validate():
        average = arguments["state"]["ema"].weights
        weights[len(weights)] = {name: w.clone() for name, w in average.items()}
        return {"nll": [1.0, 2.0][len(weights) - 1]}

    result = fit(accelerator, step, loader, folder=tmp_path, **arguments | {"evaluate": validate})
    model = ToyModel()
    load_weights(model, result.checkpoint)
    assert result.best_step == 3 and result.step == 6
    assert all(torch.equal(p, weights[0][name]) for name, p in model.named_parameters())
    before = flat(model)
    with pytest.raises(checkpoint.CheckpointError, match="'net'.*'ema', 'model'"):
        load_weights(model, result.checkpoint, entry="net")
    with pytest.raises(checkpoint.CheckpointError, match=r"inner.0.weight"):
        load_weights(torch.nn.Linear(2, 2), result.checkpoint)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("fused", [True, False])
def test_training_stops_after_too_many_steps_that_are_not_finite(tmp_path, fused, capsys):
    halves = next(ToyLoader().batches(2))["row"].split(2)  # step 7 is the first of the third epoch; a row of each micro-batch is bad
    rows = ", ".join(str(half.max().item()) for half in halves)
    message = f"step 7: not taken, the loss was not finite: rows {rows} on rank 0; these are 3 steps in a row; .* {tmp_path}/step-00000006"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, nan_from=4, max_skipped=3, num_epochs=9, evaluate=None, fused=fused, save_every=3)
    told = [line for line in capsys.readouterr().out.splitlines() if "not taken" in line]
    assert [line[:7] for line in told] == ["step 5:", "step 6:", "step 7:"]
    folder, _ = checkpoint.newest(tmp_path)
    state, _ = checkpoint.load(folder)
    assert all(torch.isfinite(w).all() for w in state["model"].values())
    assert state["optimizer"]["state"][0]["step"] == 4


def test_a_gradient_that_is_not_finite_is_told_apart_from_a_loss(tmp_path, capsys):
    accelerator, step, loader, arguments = make(max_steps=3, num_epochs=None)
    weight = arguments["state"]["model"].inner[0].weight
    weight.register_hook(lambda gradient: gradient * math.nan if arguments["state"]["scheduler"].last_epoch == 1 else gradient)
    result = fit(accelerator, step, loader, folder=tmp_path, **arguments)
    rows = ", ".join(map(str, list(loader.batches(0))[1]["row"].tolist()))
    assert f"step 2: not taken, no loss, but a gradient was not finite: rows {rows} on rank 0\n" in capsys.readouterr().out
    assert result.history[0]["train/skipped"] == 0.5 and math.isfinite(result.history[0]["train/loss"])


def test_a_gradient_scaler_that_collapses_stops_the_run(tmp_path):
    """Every other step overflows, so there are never many in a row, and the scale shrinks until all gradients vanish."""
    world = Accelerator(cpu=True)
    world.scaler = torch.amp.GradScaler("cpu", init_scale=2**-12)  # accelerate makes one on GPUs alone
    accelerator, step, loader, arguments = make(world=world, max_steps=100, num_epochs=None, log_every=1, evaluate=None)
    arguments["state"]["model"].inner[0].weight.register_hook(lambda gradient: gradient * math.inf ** (next(count) % 4 // 2))
    count = iter(range(1000))
    with pytest.raises(FloatingPointError, match=r"step 6: the scale of float16 gradients has shrunk to 3.05e-05, .* bf16 .*step-00000005"):
        fit(accelerator, step, loader, folder=tmp_path, **arguments)


def test_a_gradient_scaler_finds_the_scale_of_a_loss_in_nats(tmp_path):
    """From 65,536 it comes to 1/2 by 17 steps that are not taken, as of a VAE of pictures, and goes on from there."""
    world = Accelerator(cpu=True)
    world.scaler = torch.amp.GradScaler("cpu")
    accelerator, step, loader, arguments = make(world=world, max_steps=20, num_epochs=None, log_every=1, evaluate=None)
    arguments["state"]["model"].inner[0].weight.register_hook(lambda x: x if world.scaler.get_scale() < 1 else x * math.inf)
    result = fit(accelerator, step, loader, folder=tmp_path, **arguments, max_skipped=3)
    assert [line["train/skipped"] for line in result.history] == [1.0] * 17 + [0.0] * 3


def test_a_non_finite_first_step_gives_no_warning(tmp_path):
    result, _ = run(tmp_path, nan_from=0, max_steps=2, num_epochs=None, fused=False, evaluate=None)
    assert math.isnan(result.history[0]["train/loss"]) and result.history[0]["train/skipped"] == 1.0


def test_weights_that_ranks_share_out_are_refused_before_any_work(monkeypatch, tmp_path):
    accelerator, step, loader, arguments = make()
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)  # which accelerate itself gives on GPUs alone
    for begin in (lambda: build_accelerator("no"), lambda: fit(accelerator, step, loader, folder=tmp_path, **arguments)):
        with pytest.raises(ValueError, match="distributed_type: received FSDP, expected a copy of the model on every rank"):
            begin()


def test_the_learning_rate_depends_on_the_step_alone(tmp_path):
    _, state = run(tmp_path / "a", accumulation=1)
    _, other = run(tmp_path / "b", accumulation=4)
    assert state["scheduler"].last_epoch == other["scheduler"].last_epoch == 6
    assert state["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05 / 1.6)


class Spoilt(ToyLoader):
    """Batch 2 cannot be read."""

    def batches(self, epoch, start=0):
        for number, batch in enumerate(super().batches(epoch, start), start):
            if number == 2:
                raise BadRow("rows: row 9, field 'image': cut short")
            yield batch


def test_a_row_after_the_last_step_ends_no_run_and_one_before_costs_no_step(tmp_path):
    for max_steps in (2, 3):
        accelerator, step, _, arguments = make(num_epochs=None, max_steps=max_steps, save_every=2)
        with pytest.raises(BadRow, match="row 9") if max_steps == 3 else contextlib.nullcontext():
            fit(accelerator, step, Spoilt(), folder=tmp_path / str(max_steps), **arguments)
        state, _ = checkpoint.load(checkpoint.newest(tmp_path / str(max_steps))[0])
        assert [state["progress"][name] for name in ("step", "epoch", "batch")] == [2, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": None}, "max_steps=None and num_epochs=None"),
        ({"log_every": 0}, "log_every=0"),
        ({"keep": 0}, "keep=0"),
        ({"save_every": -1}, "save_every=-1"),
        ({"evaluate": None, "patience": 2}, "patience=2 needs evaluate"),
        ({"monitor": "elbo"}, r"monitor='elbo': evaluate\(\) gave \['nll'\]"),
        ({"state": {"progress": None}}, "'progress'"),
        ({"num_rows": 0}, "epoch 0 has no batch number 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
