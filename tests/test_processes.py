"""One run in a folder, whatever became of the others; and what signals and a lost launcher do to a run."""

import json
import mmap
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from distributed_toy import run

from mmvae import processes, training
from mmvae.checkpoint import CheckpointError
from mmvae.processes import locked

FILE = "import os, pathlib, runpy, sys, time; parts = runpy.run_path(sys.argv[1]); folder = pathlib.Path(sys.argv[2])\n"
HOLDER = f"""{FILE}
with parts["locked"](folder) as refusal:
    print(refusal, flush=True)
    time.sleep(float(sys.argv[3]))
"""
LAUNCHER = f"""{FILE}
if os.fork():
    while not (folder / "ready").exists():
        time.sleep(0.01)
    os._exit(0)
with parts["Signals"]() as signals:
    assert not signals.received
    (folder / "ready").touch()
    until = time.monotonic() + 0.5
    while not signals.received and time.monotonic() < until:
        time.sleep(0.01)
    print(int(signals.received))
"""


@pytest.fixture
def start():
    """Starts a process that has ``mmvae/processes.py`` alone, which is quick."""
    started = []

    def begin(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", script, processes.__file__, str(folder), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_leaves_it_free(tmp_path, start, monkeypatch):
    holder = start(HOLDER, tmp_path, "60")
    assert holder.stdout.readline() == "None\n"
    monkeypatch.setattr(training, "locked", partial(locked, patience=0.2))
    steps = []
    with pytest.raises(CheckpointError, match=f"{tmp_path}: process {holder.pid} on {os.uname().nodename} is training into it"):
        run(tmp_path, hook=steps.append)
    assert not steps and [path.name for path in tmp_path.iterdir()] == [".lock"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert run(tmp_path)[0].step == 6
    assert run(tmp_path, num_epochs=3)[0].step == 9, "a run lets go of the folder when it ends"


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path, start):
    holder = start(HOLDER, tmp_path, "0.5")
    assert holder.stdout.readline() == "None\n"
    with locked(tmp_path) as refusal:
        assert refusal is None
        assert holder.wait() == 0


def test_a_folder_that_is_made_is_flushed_with_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    for expected in ({str(tmp_path), str(tmp_path / "a")}, set()):
        with locked(tmp_path / "a" / "b") as refusal:
            assert refusal is None and set(flushed) == expected
        flushed.clear()


@pytest.mark.parametrize("kind", ["file", "closed"])
def test_a_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o555)
    root, steps = os.geteuid() == 0, []
    if root:
        os.seteuid(65534)  # nothing is closed to root
    try:
        with pytest.raises(CheckpointError, match=f"{tmp_path / kind}: cannot be written: "):
            run(tmp_path / kind, hook=steps.append)
    finally:
        if root:
            os.seteuid(0)
    assert not steps


@pytest.mark.parametrize(("name", "number"), [("TORCHELASTIC_RUN_ID", 15), ("ACCELERATE_MIXED_PRECISION", 15), ("OTHER", 0)])
def test_a_lost_launcher_counts_as_a_signal_and_a_closed_shell_does_not(tmp_path, start, name, number):
    launcher = start(LAUNCHER, tmp_path, **{name: "1"})
    assert launcher.wait(timeout=20) == 0
    assert int(launcher.stdout.read()) == number


def test_kept_memory_is_not_cleared_anew(start, tmp_path):
    script = FILE + (
        "import resource\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = bytearray(48 << 20)\n"
        "    del block\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def after(*keep):\n"
        "    told = parts['keep_memory'](*keep)\n"
        "    return [told, faults(), faults()]\n"
        "print([faults(), *after(), *after(False)])"
    )
    process = start(script, tmp_path)
    before, told, first, again, untold, *handed_back = json.loads(process.stdout.readline().replace("True", "true"))
    assert told and untold
    pages = (48 << 20) // mmap.PAGESIZE
    assert min(before, first, *handed_back) > 0.9 * pages
    assert again < 0.1 * pages
