"""A run that was stopped anywhere ends with the same bits as one that never stopped; nothing that does not fit is resumed from."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from distributed_toy import digest, make, run, train
from endurance import soak
from test_checkpoint import damage
from tqdm.auto import tqdm

from mmvae import checkpoint, training
from mmvae.checkpoint import CheckpointError
from mmvae.processes import stranger
from mmvae.snapshot import keep_layout
from mmvae.training import fit

TOY = Path(__file__).with_name("distributed_toy.py")
STEPS = 6  # two epochs of three batches, the last one incomplete


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that never stopped, with the checkpoint of every step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    run(folder, keep=STEPS)
    torch.set_num_threads(threads)
    return folder


def test_two_runs_are_equal(reference, tmp_path):
    run(tmp_path)
    assert digest(tmp_path) == digest(reference)
    run(tmp_path / "other", lr=0.051)
    assert digest(tmp_path / "other") != digest(reference)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resuming_from_every_step_gives_the_same_bits(reference, tmp_path, step):
    shutil.copytree(reference / f"step-{step:08d}", tmp_path / f"step-{step:08d}")
    steps = []
    run(tmp_path, hook=steps.append)
    assert steps == list(range(step, STEPS))
    assert digest(tmp_path) == digest(reference)


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_any_step_saves_and_resumes_with_the_same_bits(reference, tmp_path, step, number, capsys):
    handler = signal.getsignal(number)
    options = {"save_every": 100, "log_every": 2 if number == signal.SIGTERM else 4}

    def hook(n):
        if n == step:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "a", hook=hook, **options)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is handler
    assert checkpoint.newest(tmp_path / "a")[0].name == f"step-{step + 1:08d}"
    assert f"{number.name} at step {step + 1}" in capsys.readouterr().out
    run(tmp_path / "a", **options)
    run(tmp_path / "b", **options)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_finished_run_is_not_touched(reference, capsys):
    before = {path: path.stat().st_mtime_ns for path in reference.glob("step-*/*")}
    history = (reference / "history.jsonl").read_text()
    steps = []
    result, _ = run(reference, hook=steps.append, keep=STEPS)
    assert not steps and result.step == STEPS
    assert {path: path.stat().st_mtime_ns for path in reference.glob("step-*/*")} == before
    assert (reference / "history.jsonl").read_text() == history
    assert "resumed from" in capsys.readouterr().out


def test_history_has_no_lines_of_a_lost_future(reference, tmp_path):
    shutil.copytree(reference / "step-00000002", tmp_path / "step-00000002")
    (tmp_path / "history.jsonl").write_text('{"step": 99}\n{"half')
    run(tmp_path)
    assert (tmp_path / "history.jsonl").read_text() == (reference / "history.jsonl").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(reference, tmp_path, name, capsys):
    for step in (3, 4):
        shutil.copytree(reference / f"step-{step:08d}", tmp_path / f"step-{step:08d}")
    path = tmp_path / "step-00000004" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"step-00000004/{name}"):
        run(tmp_path, resume=tmp_path / "step-00000004")
    run(tmp_path)
    output = capsys.readouterr().out
    assert "passed over step-00000004" in output and name in output and "step-00000003" in output
    assert digest(tmp_path) == digest(reference)


def test_every_damage_of_every_file_is_named_and_passed_over(reference, tmp_path):
    found = []
    for file in sorted((reference / "step-00000004").iterdir()):
        for how in ("delete", "half", "empty", "flip"):
            root = tmp_path / f"{file.name} {how}"
            for step in (3, 4):
                shutil.copytree(reference / f"step-{step:08d}", root / f"step-{step:08d}")
            damage(root / "step-00000004" / file.name, how)
            newest, passed_over = checkpoint.newest(root)
            found.append(newest == root / "step-00000003" and file.name in passed_over[0][1])
    assert found == 20 * [True], "five files, four kinds of damage"


def test_an_explicit_checkpoint_and_never(reference, tmp_path):
    run(tmp_path, resume=reference / "step-00000002")
    assert digest(tmp_path) == digest(reference)
    with pytest.raises(CheckpointError, match="resume='never'"):
        run(tmp_path, resume="never")
    with pytest.raises(CheckpointError, match="nowhere/manifest.json: the file is missing"):
        run(tmp_path, resume=tmp_path / "nowhere")
    run(tmp_path / "fresh", resume="never")
    assert digest(tmp_path / "fresh") == digest(reference)


def test_a_run_that_began_with_a_checkpoint_of_another_folder_goes_on_in_its_own(reference, tmp_path):
    options, steps = {"resume": reference / "step-00000003", "num_epochs": 3}, []

    def hook(n):
        steps.append(n)
        if steps == [3, 4]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run(tmp_path, hook=hook, **options)
    damage(tmp_path / "step-00000005" / "model.safetensors", "flip")
    result, _ = run(tmp_path, hook=hook, **options)
    assert steps == [3, 4, 4, 5, 6, 7, 8]
    left = {f"step-{step:08d}" for step in (5, 8, 9)}  # the damaged one and two more
    assert {path.name for path in tmp_path.glob("step-*")} == left and result.step == 9
    run(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other: step-00000006 is of a run that did not begin with .*; expected an empty folder"):
        run(tmp_path / "other", **options)


def test_a_run_that_began_in_another_folder_keeps_a_best_of_its_own(reference, tmp_path):
    shutil.copytree(reference / "step-00000003", tmp_path / "a" / "step-00000003")
    state, manifest = checkpoint.load(tmp_path / "a" / "step-00000003")
    state["progress"] |= {"best_step": 3, "best_value": -1e9}
    given = checkpoint.save(tmp_path / "b", 3, state, info=manifest["info"])
    result, _ = run(tmp_path / "c", resume=given)
    assert (result.best_step, result.checkpoint) == (6, tmp_path / "c" / "step-00000006")


def test_an_older_checkpoint_of_the_same_folder_is_refused_until_the_newer_ones_are_gone(reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="step-00000006 is newer, and would be gone on from next time; expected"):
        run(tmp_path, resume=tmp_path / "step-00000002")
    for step in range(3, STEPS + 1):
        shutil.rmtree(tmp_path / f"step-{step:08d}")
    run(tmp_path, resume=tmp_path / "step-00000002")
    assert digest(tmp_path) == digest(reference)


def test_another_configuration_is_refused_field_by_field(tmp_path):
    run(tmp_path, info={"config": {"hidden": 8, "drop": 0.1}, "batch_size": 4}, max_steps=2)
    with pytest.raises(CheckpointError, match=r"(?s)changed.*config.hidden: 8 -> 9\n.*batch_size: 4 -> 8\n.*seed: 0 -> 3$"):
        run(tmp_path, info={"config": {"hidden": 9, "drop": 0.1}, "batch_size": 8}, seed=3)
    result, _ = run(
        tmp_path,
        info={"config": {"hidden": 9, "drop": 0.1}, "batch_size": 8},
        seed=3,
        allow_changes=["config.hidden", "batch_size", "seed"],
    )
    assert result.step == STEPS


def test_changed_hyperparameters_hold_after_resuming(reference, tmp_path):
    shutil.copytree(reference / "step-00000003", tmp_path / "step-00000003")
    seen, own = [], {"weight_decay": 0.5, "betas": (0.8, 0.9)}

    def hook(_):
        seen.append({name: optimizer.param_groups[0][name] for name in ("lr", *own)})

    accelerator, step, loader, arguments = make(lr=0.02, hook=hook)
    optimizer = arguments["state"]["optimizer"]
    optimizer.param_groups[0].update(own)
    fit(accelerator, step, loader, folder=tmp_path, **arguments)
    assert seen == [{"lr": 0.02 * (1 / (1 + 0.1 * n))} | own for n in (3, 4, 5)]


def test_what_does_not_fit_changes_nothing(reference, tmp_path):
    for options, message in [
        ({"state": {"model": torch.nn.Linear(1, 1)}}, r"has the entries \['ema', 'model'.*expected \['model'\]"),
        ({"state": "wider"}, r"step-00000006: entry 'model' does not fit .*inner.0.bias: .*\(8,\).*\(9,\)"),
        ({"state": "groups"}, "entry 'optimizer' does not fit .*group 0: 4 -> 2"),
    ]:
        model = None
        if isinstance(options["state"], str):
            state = make()[3]["state"]
            if options["state"] == "wider":
                state["model"].inner[0] = torch.nn.Linear(4, 9)
            else:
                parameters = list(state["model"].parameters())
                groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
                state["optimizer"] = torch.optim.AdamW(groups)
            model, options = state["model"], {"state": state}
        before = None if model is None else {name: w.clone() for name, w in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, resume=reference / "step-00000006", **options)
        assert model is None or all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


# ---- processes of their own


def environment():
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TOY.parent), str(TOY.parent.parent), *sys.path]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What came of runs that were killed at random times, forked from one process."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(TOY), "kill", json.dumps({"folder": str(folder), "kills": 8})]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(killed):
    _, outcome = killed
    assert set(outcome["digests"]) == {outcome["reference"]}
    assert outcome["kills"] == 8
    landed = [step for step in outcome["landed"] if step > 0]
    assert len(landed) >= 4, f"the kills did not land in the run: {outcome['landed']}"
    assert len(set(landed)) >= 3, f"the kills did not land in the run: {outcome['landed']}"


def test_a_second_signal_ends_the_process_at_once(killed):
    folder, outcome = killed
    assert outcome["second_signal"] == 143
    assert checkpoint.newest(folder / "twice") == (None, [])


def test_ten_resumes_with_a_hundred_saves_leave_no_files_open_and_no_memory(tmp_path):
    outcome = soak(tmp_path, first=10, more=20, save_every=2)  # 100,000 steps by a command
    assert (outcome["steps"], len(set(outcome["files"])), outcome["folders"]) == (210, 1, 2)
    assert outcome["drift"] < 0.05


def launch(options, said, world=3):
    """Toy runs on three gloo ranks, which, unlike two, add up in an order that decides the last bit; forked, as imports take long.

    Returns the ranks' exit statuses; what they write goes to the file ``said``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            signal.alarm(200)
            try:
                AcceleratorState._reset_state(reset_partial_state=True)
                tqdm.set_lock(threading.RLock())
                train(options)
            except BaseException:
                print(f"[rank{rank}]", traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Several runs on three gloo ranks, in one launch."""
    root = tmp_path_factory.mktemp("ranks")
    plain = {"dropout": 0.0, "accumulation": 2}
    runs = [
        plain | {"folder": str(root / "plain")},
        plain | {"folder": str(root / "single_rows"), "num_rows": 5, "batch_size": 4},
        {"folder": str(root / "dropout"), "num_epochs": 3},
        *({"folder": str(root / "stopped"), "num_epochs": 3, "save_every": 100, "stop_at": n} for n in (1, 4)),
        {"folder": str(root / "stopped"), "num_epochs": 3, "save_every": 100},
        {
            "folder": str(root / "nan"),
            "nan_from": 3,
            "nan_rank": 1,
            "max_skipped": 2,
            "num_epochs": 9,
            "evaluate": None,
        },
        {"folder": str(root / "dropout"), "num_epochs": 3, "seed": 5},
        {"folder": str(root / "raised"), "num_epochs": 3},
    ]
    (root / "raised.json").write_text(json.dumps(launch({"report": str(root), "runs": [runs[-1] | {"raise_at": 4}]}, root / "raised.txt")))
    statuses = launch({"report": str(root), "runs": runs}, root / "said.txt")
    reports = [root / f"rank{rank}.json" for rank in range(3)]
    assert statuses == [0, 0, 0] and all(report.exists() for report in reports), (root / "said.txt").read_text()[-3000:]
    return root, [json.loads(report.read_text()) for report in reports]


def test_three_ranks_are_one_rank(ranks, tmp_path):
    _, reports = ranks
    for index, options in enumerate([{}, {"num_rows": 5, "batch_size": 4}]):
        three = reports[0][index]
        one, state = run(tmp_path / str(index), dropout=0.0, accumulation=2, **options)
        assert three["world"] == 3
        for mine, theirs in zip(one.history, three["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        for mine, theirs in zip(state["model"].parameters(), three["weights"], strict=True):
            torch.testing.assert_close(mine.detach(), torch.tensor(theirs), rtol=0, atol=1e-5)


def test_a_row_that_one_rank_refuses_ends_the_job_with_its_name_and_the_next_goes_on(ranks):
    root, reports = ranks
    statuses, said = json.loads((root / "raised.json").read_text()), (root / "raised.txt").read_text()
    assert 0 not in statuses and "[rank2]" in said and "BadRow: rows: row 7, field 'image': cut short" in said
    assert [report[-1]["digest"] for report in reports] == [report[2]["digest"] for report in reports]


def test_ranks_never_drift_apart(ranks):
    _, (first, *others) = ranks
    for mine, *theirs in zip(first, *others, strict=True):
        for each in theirs:
            assert mine.get("weights") == each.get("weights") and mine.get("history") == each.get("history")
    assert "weights" in first[2]


def test_ranks_stop_together_and_go_on_with_the_same_bits(ranks):
    _, reports = ranks
    for report in reports:
        assert [outcome.get("exit") for outcome in report[3:5]] == [143, 143]
        assert report[5]["digest"] == report[2]["digest"] and report[5]["step"] == 9


def test_one_rank_that_is_not_finite_stops_all(ranks):
    root, reports = ranks
    for report in reports:
        assert re.match(
            r"step 5: not taken, the loss was not finite: rows [0-9, ]+ on rank 1; these are 2 steps in a row;", report[6]["error"]
        )
        assert report[6]["error"].endswith(f"the last good checkpoint is {root}/nan/step-00000004")
    folder, _ = checkpoint.newest(root / "nan")
    state, _ = checkpoint.load(folder)
    assert state["optimizer"]["state"][0]["step"] == 3
    assert all(torch.isfinite(w).all() for w in state["model"].values())


def test_all_ranks_refuse_together(ranks):
    _, reports = ranks
    assert all("seed: 0 -> 5" in report[7]["error"] for report in reports)


def test_a_folder_that_the_ranks_do_not_share_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "stranger", partial(stranger, patience=0.1))
    launch({"report": str(tmp_path), "runs": [{"folder": str(tmp_path / "run"), "apart": True}]}, tmp_path / "said.txt", world=2)
    for rank in range(2):
        (outcome,) = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert f"run/{rank}: rank 1 does not see what the main process wrote there, expected a folder" in outcome["error"]


def test_a_run_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    root, reports = ranks
    two = reports[0][0]
    for step in (5, 6):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(root / "plain" / f"step-{step:08d}", tmp_path / "x" / f"step-{step:08d}")
        one, state = run(tmp_path / "x", dropout=0.0, accumulation=2)
        assert one.step == STEPS
        for mine, theirs in zip(state["model"].parameters(), two["weights"], strict=True):
            torch.testing.assert_close(mine.detach(), torch.tensor(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_loaded_moments_lie_in_memory_as_their_weights_do(fused):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, 1)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    saved = optimizer.state_dict()
    saved = saved | {
        "state": {i: {k: x.clone(memory_format=torch.contiguous_format) for k, x in s.items()} for i, s in saved["state"].items()}
    }
    step(model, optimizer, 2)
    other, loaded = make()
    other.load_state_dict(weights)
    loaded.load_state_dict(saved)
    keep_layout(loaded)
    step(other, loaded, 2)
    assert torch.equal(model.weight, other.weight)
