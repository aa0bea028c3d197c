"""Checkpoints: what is saved comes back exactly, damage is always seen and named, and no crash or rotation loses a complete one."""

import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile

import pytest
import torch
from endurance import retention
from safetensors.torch import load_file

from mmvae import checkpoint
from mmvae.checkpoint import CheckpointError


def small_state():
    return {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "progress": {"step": 3}}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_everything_that_a_state_may_hold_comes_back(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "model": {
            "a.weight": base,
            "view": base[:, 1:3],
            "transposed": base.T,
            "tied": base,
            "flat": base.view(-1),
            "a/b": torch.ones(1),
            "a": {"b": torch.zeros(1)},
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2).bfloat16()}, 10: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "fused": None, "amsgrad": False, "params": [0, 10]}],
        },
        "odd": {
            "bool": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "long": torch.tensor(2**62),
            "none": None,
            "text": "ö\n",
        },
        "numbers": {
            "nan": float("nan"),
            "inf": -float("inf"),
            "big": 2**80,
            "tiny": 5e-324,
            "third": 1 / 3,
            "true": True,
        },
        "keys": {"$tensor": 1, "$": {"0": torch.ones(2), 0: torch.zeros(2)}},
        "nothing": {},
        "list": [[], {}, (), [torch.ones(()), None]],
    }
    folder = checkpoint.save(tmp_path, 12, state, info={"seed": 1})
    loaded, manifest = checkpoint.load(folder)
    assert folder.name == "step-00000012"
    assert same(state, loaded)
    assert (manifest["step"], manifest["info"], manifest["world_size"]) == (12, {"seed": 1}, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert torch.equal(load_file(folder / "model.safetensors")["a.weight"], base)


def test_a_real_optimizer_goes_on_exactly(tmp_path):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.1}], fused=True)

    def train(layer, optimizer):
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    train(layer, optimizer)
    folder = checkpoint.save(tmp_path, 1, {"model": layer.state_dict(), "optimizer": optimizer.state_dict()})
    other, other_optimizer = make()
    state, _ = checkpoint.load(folder)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    for pair in ((layer, optimizer), (other, other_optimizer)):
        train(*pair)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    assert same(optimizer.state_dict(), other_optimizer.state_dict())


@pytest.mark.parametrize("value", [object(), {1.5: 0}, {None: 0}, {1, 2}, b"x", torch.float32])
def test_what_cannot_be_saved_is_named(tmp_path, value):
    checkpoint.save(tmp_path, 1, small_state())
    with pytest.raises(CheckpointError, match=r"state extra\['x'\]"):
        checkpoint.save(tmp_path, 2, small_state() | {"extra": {"x": value}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_names_and_limits_are_checked(tmp_path):
    with pytest.raises(CheckpointError, match="'../x'"):
        checkpoint.save(tmp_path, 1, {"../x": {}})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 1, small_state(), keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        checkpoint.save(tmp_path, -1, small_state())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = checkpoint.save(tmp_path / "new", 1, small_state())
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def damage(path, how):
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "flip":
        for_bit = random.Random(0).randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[for_bit // 8] ^= 1 << for_bit % 8
        path.write_bytes(flipped)
    else:
        path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "longer": data + b" ", "other": b"\xff\xfe{}"}[how])


@pytest.mark.parametrize("how", ["delete", "half", "empty", "flip", "longer", "other"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_named_and_passed_over(tmp_path, name, how):
    good = checkpoint.save(tmp_path, 1, small_state())
    bad = checkpoint.save(tmp_path, 2, small_state())
    damage(bad / name, how)
    with pytest.raises(CheckpointError, match=f"step-00000002/{name}: "):
        checkpoint.load(bad)
    newest, passed_over = checkpoint.newest(tmp_path)
    assert newest == good
    assert [path for path, _ in passed_over] == [bad] and name in passed_over[0][1]


def test_every_single_bit_of_a_manifest_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, small_state(), info={"a": 1.5}) / "manifest.json"
    data = path.read_bytes()
    for bit in random.Random(1).sample(range(8 * len(data)), 200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="manifest.json"):
            checkpoint.verify(path.parent)


def test_a_folder_under_the_name_of_another_step_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, small_state())
    with pytest.raises(CheckpointError, match="of step 1, expected 7"):
        checkpoint.verify(folder.rename(tmp_path / "step-00000007"))
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_a_damaged_folder_is_never_written_over(tmp_path):
    bad = checkpoint.save(tmp_path, 2, small_state())
    damage(bad / "state.json", "flip")
    again = checkpoint.save(tmp_path, 2, small_state())
    assert again.name == "step-00000002.1"
    assert checkpoint.newest(tmp_path)[0] == checkpoint.find(tmp_path, 2) == again


def test_other_threads_or_torch_give_one_warning(tmp_path):
    folder = checkpoint.save(tmp_path, 1, small_state())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"{threads} threads and torch .* {threads + 1} threads") as caught:
            checkpoint.load(folder)
    finally:
        torch.set_num_threads(threads)
    assert len(caught) == 1


def test_compare_names_every_field():
    old = {"config": {"latent_dim": 32, "same": [1, 2]}, "seed": 0, "gone": 1}
    new = {"config": {"latent_dim": 16, "same": [1, 2]}, "seed": 0, "fresh": None}
    assert checkpoint.compare(old, new) == [
        "config.latent_dim: 32 -> 16",
        "gone: 1 -> (absent)",
        "fresh: (absent) -> None",
    ]
    assert checkpoint.compare(old, old) == []


def test_old_checkpoints_go_exactly_as_the_rule_says(tmp_path):
    outcome = retention(tmp_path, sequences=30)  # 500 by a command
    assert outcome["saves"] > 150 and outcome["deleted"] > 30 and outcome["damaged"] > 10
    assert not outcome["fault"], outcome


def test_a_damaged_later_checkpoint_pushes_out_no_good_one(tmp_path):
    for step in (200, 300):
        checkpoint.save(tmp_path, step, small_state())
    damage(tmp_path / "step-00000300" / "model.safetensors", "flip")
    source, passed_over = checkpoint.newest(tmp_path)
    assert source.name == "step-00000200"
    for step in (250, 260, 300, 400):
        checkpoint.save(tmp_path, step, small_state(), damaged=[path for path, _ in passed_over])
        good = [path.name for path in tmp_path.iterdir() if path.name != "step-00000300" and checkpoint.verify(path)]
        assert len(good) == 2
    assert sorted(good) == ["step-00000300.1", "step-00000400"]


def test_remains_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    dead, alive = tmp_path / f".tmp-1-{child.pid}", tmp_path / f".tmp-1-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    checkpoint.save(tmp_path, 2, small_state())
    assert alive.exists() and not dead.exists()


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, small_state())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"\.tmp-2-\d+: cannot write the checkpoint of step 2 \(about 24 bytes .*No space left"):
        checkpoint.save(tmp_path, 2, small_state())
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    checkpoint.verify(first)


def test_a_disk_that_refuses_a_file_at_any_byte_loses_nothing(tmp_path):
    """50 limits on the size of a file, which the system holds this process to; ``endurance.py disk`` fills a real one."""
    state = small_state() | {"ema": {"w": torch.zeros(100)}}
    first = checkpoint.save(tmp_path, 1, state)
    largest = max(path.stat().st_size for path in first.iterdir())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    message = r"cannot write the checkpoint of step 2 \(about 424 bytes .*(File too large|os error 27)"
    for limit in random.Random(0).sample(range(largest), 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=message):
                checkpoint.save(tmp_path, 2, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert list(tmp_path.iterdir()) == [first]
    checkpoint.verify(first)


def test_the_folder_of_temporary_files_is_not_needed(tmp_path, monkeypatch):
    """A rename from there could become a copy."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    checkpoint.verify(checkpoint.save(tmp_path / "run", 1, small_state()))
    assert not (tmp_path / "none").exists()


CRASHES = """
import json, os, pathlib, shutil, signal, sys
import torch
from mmvae import checkpoint
root, at, armed = pathlib.Path(sys.argv[1]), [0], [False]
state = {"model": {"w": torch.ones(3)}, "progress": {"step": 1}}

def counted(function):
    def call(*args, **kwargs):
        at[0] += 1
        if armed[0] and at[0] == crash:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for module, name in [(os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "chmod")]:
    setattr(module, name, counted(getattr(module, name)))
checkpoint.save_file = counted(checkpoint.save_file)
for step in range(1, 4):
    checkpoint.save(root / "base", step, state)
results = []
for crash in range(1, 100):
    folder = root / str(crash)
    shutil.copytree(root / "base", folder)
    pid = os.fork()
    if not pid:
        at[0], armed[0] = 0, True
        checkpoint.save(folder, 4, state)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    newest, passed_over = checkpoint.newest(folder)
    results.append((os.WIFSIGNALED(status), newest.name, len(passed_over), len(list(folder.glob("step-*")))))
    checkpoint.save(folder, 5, state)
    results[-1] += (sorted(path.name for path in folder.iterdir()),)
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(results))
"""


def test_a_kill_before_any_operation_of_a_save_loses_nothing(tmp_path):
    """SIGKILL before the n-th write, flush, rename or deletion of the fourth save, for every n."""
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=100, check=True
    ).stdout
    results = json.loads(output)
    killed, finished = results[:-1], results[-1]
    assert not finished[0] and all(entry[0] for entry in killed)
    assert len(killed) >= 12, "the sweep did not land inside the save"
    newest = [entry[1] for entry in killed]
    assert newest == sorted(newest) and {*newest} == {"step-00000003", "step-00000004"}
    assert all(entry[2] == 0 and entry[3] >= 2 for entry in killed)
    # one more save leaves no rubbish of the killed process
    assert all(set(entry[4]) == {newest, "step-00000005"} for newest, entry in zip((entry[1] for entry in results), results, strict=True))


def test_the_order_on_disk_is_files_manifest_folder_rename_parent(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(source, target, **kwargs):
        events.append("rename")
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    checkpoint.save(tmp_path, 1, small_state())
    assert events == [
        "model.safetensors",
        "state.json",
        "manifest.json",
        f".tmp-1-{os.getpid()}",
        "rename",
        tmp_path.name,
    ]


def test_no_pickle_is_ever_opened(tmp_path):
    folder = checkpoint.save(tmp_path, 1, small_state())
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n(S'touch sentinel'\ntR.")
    shutil.copy(folder / "model.pkl", folder / "pytorch_model.bin")
    seen, watching = [], True

    def hook(event, arguments):  # audit hooks stay for good, hence the switch
        if watching and event in ("open", "pickle.find_class"):
            seen.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    checkpoint.load(folder)
    watching = False
    assert any(name.endswith("state.json") for _, name in seen)
    assert not [name for event, name in seen if event == "pickle.find_class" or name.endswith((".pkl", ".bin"))]
