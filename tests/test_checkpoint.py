"""Checkpoints and logs: what is damaged, cut or of another program is one sentence; two runs never share a folder."""

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokengame.errors import TokenGameError
from tokengame.learning.checkpoint import SEAL, RunFolder


@pytest.fixture
def folder(tmp_path):
    """A run of three updates, saved after two."""
    run = RunFolder(tmp_path / "log", "me")
    run.start({"seed": 0})
    record = run.recorder(0)
    for step in (1, 2, 3):
        record(step, {"losses/policy": 0.5 * step, "time/update": 1.0})
        if step == 2:
            run.save({"step": step, "learner": {"weight": torch.arange(50.0)}})
    return tmp_path / "log"


def again(path, identity="me"):
    return RunFolder(path, identity)


def test_a_run_goes_on_from_what_was_saved(folder):
    run = again(folder)
    state = run.load()
    assert state["learner"]["weight"].tolist() == list(range(50))
    run.go_on({"seed": 1}, state["logs"])
    assert [line["update"] for line in run.metrics()] == [1, 2] == [line["update"] for line in run.timings()]
    run.recorder(2)(3, {"losses/policy": 9.0, "time/update": 1.0})
    run.save({"step": 3})
    assert again(folder).load()["step"] == 3
    assert json.loads((folder / "config.json").read_text()) == {"seed": 1}


def test_no_flipped_bit_is_resumed_from(folder):
    path = folder / "checkpoint.pt"
    whole, draw = path.read_bytes(), random.Random(0)
    places = [draw.randrange(8 * len(whole)) for _ in range(200)]
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(TokenGameError, match=r"is damaged|is cut off"):
            again(folder).load()
    path.write_bytes(whole)
    assert again(folder).load()["step"] == 2


def test_no_cut_checkpoint_is_resumed_from(folder):
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    for length in {0, 1, 50, len(whole) // 2, len(whole) - 64, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(TokenGameError, match="is cut off, or no checkpoint"):
            again(folder).load()
    path.write_bytes(whole[:1000] + bytes(len(whole) - 1000))  # after a power cut
    with pytest.raises(TokenGameError, match="is cut off, or no checkpoint"):
        again(folder).load()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def foreign(kind, target, tmp_path):
    if kind == "of another program":
        torch.save({"state_dict": {"weight": torch.ones(3)}, "epoch": 3}, target)
    elif kind == "pickle":
        target.write_bytes(pickle.dumps(Code(tmp_path / "executed")))
    elif kind == "torch with code":
        torch.save(Code(tmp_path / "executed"), target)
    else:
        torch.save([1, 2, 3] if kind == "list" else {"run": "me", "logs": "none", "step": 2}, target)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", ["of another program", "pickle", "torch with code", "list", "incomplete"])
def test_a_foreign_checkpoint_is_one_sentence_and_runs_nothing(kind, sealed, folder, tmp_path):
    path = folder / "checkpoint.pt"
    foreign(kind, path, tmp_path)
    if sealed:
        data = path.read_bytes()
        path.write_bytes(data + SEAL + hashlib.sha256(data).hexdigest().encode())
    with pytest.raises(TokenGameError, match=r"is no checkpoint|no checkpoint of this version") as caught:
        again(folder).load()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_run_is_refused(folder):
    with pytest.raises(TokenGameError, match="of other settings, weights or images"):
        again(folder, "other").load()
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(TokenGameError, match="nothing to resume"):
        again(folder).load()


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "shorter": lambda path: path.write_bytes(lines(path)[0]),
    "cut inside a line": lambda path: path.write_bytes(path.read_bytes()[:-60]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not JSON": lambda path: path.write_bytes(b"{update}\n" * 9),
    "another figure": lambda path: path.write_bytes(path.read_bytes().replace(b"1.0", b"2.0").replace(b"0.5", b"0.4")),
}


@pytest.mark.parametrize("log", ["metrics", "timings"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_one_sentence(damage, log, folder):
    DAMAGE[damage](folder / f"{log}.jsonl")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TokenGameError, match=f"{log}.jsonl is missing or damaged"):
        again(folder).load()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, "nothing is lost"


def test_a_line_cut_after_the_checkpoint_does_not_matter(folder):
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    run = again(folder)
    run.go_on({}, run.load()["logs"])
    assert len(run.metrics()) == 2


def test_a_log_that_cannot_be_read_is_one_sentence(folder):
    (folder / "timings.jsonl").write_text('{"update": 1')
    with pytest.raises(TokenGameError, match=r"timings.jsonl cannot be read"):
        again(folder).timings()


def test_two_runs_in_one_folder_are_refused(folder):
    one, other = again(folder), again(folder)
    with one.lock(), one.lock(), pytest.raises(TokenGameError, match="another run is writing"), other.lock():
        pass
    with other.lock():
        pass


def test_a_run_that_was_overtaken_does_not_cut_what_the_other_wrote(folder):
    late, early = again(folder), again(folder)
    marks = late.load()["logs"]
    early.go_on({}, early.load()["logs"])
    early.recorder(2)(3, {"losses/policy": 7.0})
    early.save({"step": 3})
    with pytest.raises(TokenGameError, match="another run has gone on"):
        late.go_on({}, marks)
    assert len(again(folder).metrics()) == 3


HOLDER = """
import os, sys, time
from pathlib import Path
from tokengame.learning.checkpoint import RunFolder
with RunFolder(Path(sys.argv[1]), "me").lock():
    print("locked", flush=True)
    time.sleep(3600)
"""


def test_the_lock_of_a_killed_process_is_free(folder):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(TokenGameError, match="another run is writing"), again(folder).lock():
                pass
        finally:
            os.kill(process.pid, signal.SIGKILL)
    with again(folder).lock():
        pass


def test_tensorboard_reads_the_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = again(folder)
    run.go_on({}, run.load()["logs"])
    run.recorder(2)(3, {"losses/policy": 7.0})
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("losses/policy")] == [(1, 0.5), (2, 1.0), (3, 7.0)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "checkpoint.pt"])
def test_a_full_disk_while_training_is_a_sentence_and_the_checkpoint_stays(name, folder, monkeypatch):
    run = again(folder)
    run.go_on({}, run.load()["logs"])
    record = run.recorder(2)
    if name == "checkpoint.pt":
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(TokenGameError, match="No space left on device"):
            run.save({"step": 2})
    else:
        (folder / name).rename(folder / "kept")
        (folder / name).symlink_to("/dev/full")
        with pytest.raises(TokenGameError, match=f"cannot write .*{name} .*No space left"):
            record(3, {"losses/policy": 7.0, "time/update": 1.0})
        (folder / "kept").rename(folder / name)
    monkeypatch.undo()
    assert again(folder).load()["step"] == 2
    assert not list(folder.glob("*.part"))


def full(*_):
    raise OSError(28, os.strerror(28))
