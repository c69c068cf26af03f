"""Files are written whole or not at all, wherever writing fails; what is no file is refused and stays as it is."""

import errno
import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import policy_for
from safetensors.torch import load_file, save_file

from tokengame.cli.main import main
from tokengame.errors import Interrupted, TokenGameError
from tokengame.files import append, require_writable, whole, write_csv, write_whole, writing
from tokengame.policies import Policy

resource = pytest.importorskip("resource", reason="limits of POSIX systems")
BIG = {"a": torch.zeros(100_000)}


def to_file(path):
    with path.open("wb") as file:
        torch.save(BIG, file)


WRITERS = {
    "safetensors": lambda path: save_file(BIG, path),
    "torch": lambda path: torch.save(BIG, path),
    "torch to a file": to_file,
    "bytes": lambda path: path.write_bytes(bytes(100_000)),
}


@contextmanager
def largest_file(size):
    """The system takes no more bytes in one file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [0, 40_000])
def test_where_the_disk_is_full_the_old_file_stays(writer, size, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    says = r"^cannot write .*file \(.*\); .*run the command again$"
    with largest_file(size), pytest.raises(TokenGameError, match=says), whole(path) as part:
        WRITERS[writer](part)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with whole(path) as part:
        WRITERS[writer](part)
    assert path.stat().st_size > 100_000 - 1
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_every_error_of_the_system_is_one_sentence(call, number, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    def write():
        with whole(path) as part:
            part.write_text("new")
            monkeypatch.setattr(os, call, fail)

    with pytest.raises(TokenGameError) as caught:
        write()
    monkeypatch.undo()
    assert os.strerror(number) in str(caught.value)
    assert ("free some space" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_other_errors_are_not_taken_for_those_of_the_disk(tmp_path):
    with pytest.raises(ValueError, match="a mistake"), whole(tmp_path / "file"):
        raise ValueError("a mistake")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "file"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_folder_deleted_meanwhile_is_a_sentence(tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old\n")
    path.unlink()
    path.parent.rmdir()
    for write in (lambda: write_whole(path, "new"), lambda: append(path, b"new"), lambda: write_csv([{"a": 1}], path)):
        with pytest.raises(TokenGameError, match="No such file or directory"):
            write()


def test_appending_to_a_full_disk_is_a_sentence(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(TokenGameError, match=r"No space left on device.*free some space"):
        append(tmp_path / "log", b"line\n")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_permissions_of_the_umask(mask, mode, model, tmp_path):
    before = os.umask(mask)
    try:
        policy_for(model).save(tmp_path / "policy.safetensors")
        with whole(tmp_path / "weights.safetensors") as part:
            save_file(BIG, part)
        write_csv([{"a": 1}], tmp_path / "table.csv")
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["policy.safetensors", "weights.safetensors", "table.csv"], mode)


def test_the_target_of_a_link_is_what_is_replaced(model, tmp_path):
    (tmp_path / "there").mkdir()
    target, link, dangling, loop = (tmp_path / name for name in ("there/file", "link", "dangling", "loop"))
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "there" / "new")
    loop.symlink_to(loop)
    require_writable(link, dangling)
    write_whole(link, "one")
    policy_for(model).save(dangling)
    assert target.read_text() == "one"
    assert Policy.load(tmp_path / "there" / "new").card["dial"] == 0.5
    assert link.is_symlink()
    assert dangling.is_symlink()
    for refuse in (require_writable, lambda path: write_whole(path, "")):
        with pytest.raises(TokenGameError, match="leads to itself"):
            refuse(loop)
    assert sorted(os.listdir(tmp_path / "there")) == ["file", "new"]


def test_a_part_file_of_a_killed_process_is_replaced(tmp_path):
    path, part = tmp_path / "file", tmp_path / "file.part"
    code = f"import os; from tokengame.files import whole\nwith whole({str(path)!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert part.exists()
    write_whole(path, "new")
    os.mkfifo(part)
    write_whole(path, "newer")
    assert path.read_text() == "newer"
    assert os.listdir(tmp_path) == ["file"]


def test_text_that_is_no_unicode_is_written_as_the_bytes_it_was(tmp_path):
    write_csv([{"name": os.fsdecode(b"\xff.png")}], tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == b"name\n\xff.png\n"


def special(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("target"))
        path.symlink_to(path.with_name("target"))
    else:
        path.mkdir()


ON_IMAGES = ["--backbone", "fashion", "--images", "fashion"]
COMMANDS = {
    "train": [*ON_IMAGES],
    "calibrate": [*ON_IMAGES, "--policy", "none"],
    "show": [*ON_IMAGES, "--policy", "none"],
    "finetune": [*ON_IMAGES, "--policy", "none"],
    "ablate": [*ON_IMAGES],
    "sweep": [*ON_IMAGES],
    "compare": [*ON_IMAGES],
    "quickstart": [],
    "bench": ["--backbone", "fashion"],
}
WITHIN = {
    "finetune": ["model.safetensors", "policy.safetensors"], "ablate": ["ablations.csv"],
    "sweep": ["sweep.csv", "sweep.png"], "compare": ["compare.csv", "table.md", "frontier.png", "speeds.csv"],
    "quickstart": ["policy.safetensors", "report.html"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "folder"])
def test_an_output_that_is_no_file_is_refused_at_once_and_stays(kind, tmp_path, capsys):
    (tmp_path / "it").mkdir()
    for command, flags in COMMANDS.items():
        places = [Path(name) for name in WITHIN.get(command, ["."])]
        for number, place in enumerate(places):
            output = tmp_path / command / str(number)
            path = output / place if place.name else output / "it.png"
            path.parent.mkdir(parents=True)
            if command == "bench":
                path = output
                output.rmdir()
                if kind == "folder":
                    continue
            special(kind, path)
            before = path.lstat()
            given = path if not place.name else output
            assert main([command, *flags, "--output", str(given)]) == 2, (command, place)
            shown = " ".join(capsys.readouterr().err.split())
            assert shown.count("error:") == 1
            assert "is a folder" in shown or "pipe or a socket" in shown or "is no folder" in shown, shown
            assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)


@pytest.mark.parametrize("command", sorted(WITHIN))
def test_a_file_where_a_folder_is_wanted_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([command, *COMMANDS[command], "--output", str(tmp_path / "file")]) == 2
    assert "file is no folder" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_written_whole_can_be_read(tmp_path):
    with whole(tmp_path / "weights.safetensors") as part:
        save_file(BIG, part)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["a"], BIG["a"])


@pytest.mark.parametrize("stop", [KeyboardInterrupt("now"), Interrupted("terminated", 15)])
def test_what_stops_a_write_is_not_taken_for_a_full_disk(stop, tmp_path):
    """PyTorch's writer raises an error of its own while the interruption passes through it."""
    path = tmp_path / "file"
    path.write_text("old")

    class Stops:
        def __reduce__(self):
            raise stop

    with pytest.raises(KeyboardInterrupt) as caught, whole(path) as part:
        torch.save({"tensor": torch.zeros(3), "stops": Stops()}, part)
    assert caught.value is stop
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_look_at_the_output_leaves_nothing(tmp_path, monkeypatch):
    touch = Path.touch

    def stopped(path, *args, **named):
        touch(path, *args, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", stopped)
    with pytest.raises(KeyboardInterrupt):
        require_writable(tmp_path / "policy.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_after_an_interruption_is_a_sentence():
    """What is saved because a run was stopped cannot be saved."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(TokenGameError, match="No space left on device"), writing(Path("file")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
