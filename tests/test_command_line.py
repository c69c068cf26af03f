"""The command line before any work: help without PyTorch, numbers in range, streams that are closed, signals."""

import errno
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest
import torch
import tyro

import tokengame
from tokengame import distributed, kernels
from tokengame.cli import main as program
from tokengame.cli.calibrate import Calibrate
from tokengame.cli.common import Common
from tokengame.cli.help import flags_of
from tokengame.cli.main import COMMANDS, main, parse
from tokengame.errors import Interrupted, TokenGameError
from tokengame.ranges import Range

LIGHT = [
    [], ["--help"], ["--version"], ["nosuch"], ["train", "--help"], ["train", "--help-all"],
    ["train", "--preset", "rl4evit", "--help"], ["train", "--sead", "4"], ["train", "--seed", "x"],
    ["bench", "--backbone", "x", "--seconds", "nan"], ["eval", "--backbone", "x", "--images", "y", "--policy", "z",
    "--dial", "0.1", "--max-drop", "1"],
]  # fmt: skip
REQUIRED = {"backbone": "x", "images": "y", "policy": "z", "output": "out"}


def run(*arguments, **changes):
    """`python -m tokengame` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tokengame", *arguments], capture_output=True, text=True, **changes)


def test_help_and_refusals_import_no_pytorch():
    """All in one process: main() of each, then what is in sys.modules."""
    lines = [
        "import sys, json",
        "from tokengame.cli.main import main",
        "codes = []",
        f"for arguments in {LIGHT!r}:",
        "    try: codes.append(main(arguments))",
        "    except SystemExit as stop: codes.append(stop.code)",
        "heavy = [name for name in ('torch', 'timm', 'numpy', 'PIL', 'matplotlib') if name in sys.modules]",
        "print(json.dumps([codes, heavy]))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    codes, heavy = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2, 0, 0, 2, 0, 0, 0, 2, 2, 2, 2]
    assert heavy == []


def test_the_package_is_imported_without_pytorch_and_has_its_names():
    lines = [
        "import sys, tokengame",
        "assert tokengame.__version__ and 'torch' not in sys.modules",
        "assert set(tokengame.__all__) <= set(dir(tokengame)) and 'torch' not in sys.modules",
        "from tokengame import prune, PrunedViT, PrunedOutput, Policy, kernels",
        "from tokengame.runtime import prune as same",
        "assert prune is same is tokengame.prune and kernels.status()",
    ]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tokengame.nothing


def shown(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code, capsys.readouterr().out


def test_version_and_no_command(capsys):
    assert shown(["--version"], capsys) == (0, f"tokengame {tokengame.__version__}\n")
    code, text = shown([], capsys)
    assert code == 2
    assert all(f"\n  {command.name} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_shows_exactly_the_flags_that_are_parsed(command, capsys, monkeypatch):
    """Compared with what tyro itself lists."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    listed = set(re.findall(r"^[│| ] (--[\w.-]+)", capsys.readouterr().out, re.M))
    short, everything = (shown([command.name, flag], capsys)[1] for flag in ("--help", "--help-all"))
    assert set(re.findall(r"^  (--[\w.-]+)", everything, re.M)) == listed
    assert set(re.findall(r"^  (--[\w.-]+)", short, re.M)) == {name for name in listed if "." not in name}
    assert len(short.splitlines()) <= 70
    for flag in flags_of(command):
        assert flag.text, f"{flag.name} says what it is"


def test_help_has_what_matters_first_and_the_defaults_of_the_preset(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(["train", "--help"], capsys)[1]
    names = re.findall(r"^  --([\w.-]+)", text, re.M)
    assert names[:11] == [
        "backbone", "images", "output", "weights", "class-map", "gmacs-ratio", "target-drop", "keep-what", "updates",
        "resume", "preset",
    ]  # fmt: skip
    assert re.search(r"^  --rollouts INT +[^-]+ \[4\]$", text, re.M)
    other = shown(["train", "--preset", "rl4evit", "--help-all"], capsys)[1]
    assert "--ppo.lr FLOAT          Adam step size at the start; see sched [0.0003]" in other


def sentence(arguments, capsys):
    """Of a command line that is refused."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("tokengame: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


MISTYPED = {
    "no command 'trian' (did you mean train?); see tokengame --help": ["trian"],
    "Unrecognized options: --sead, 4; Perhaps you meant: --seed INT; see": ["quickstart", "--sead", "4"],
    "--seed: 'x' is not a whole number; see tokengame quickstart --help": ["quickstart", "--seed", "x"],
    "--gmacs-ratio: 'half' is not a number": ["quickstart", "--gmacs-ratio", "half"],
    "--backbone STR --images STR; see tokengame train --help": ["train"],
    "Missing value for argument '--output'": ["quickstart", "--output"],
    "invalid choice 'float8'": ["bench", "--backbone", "x", "--dtypes", "float8"],
}


@pytest.mark.parametrize("reason", MISTYPED)
def test_a_mistyped_command_line_gets_one_sentence(reason, capsys):
    assert reason in sentence(MISTYPED[reason], capsys)


def ranges():
    """(command, flag, limits) of every flag with a range."""
    found = []
    for command in COMMANDS:
        hints = get_type_hints(command, include_extras=True)
        for flag in flags_of(command):
            extras = getattr(hints.get(flag.name), "__metadata__", ())
            limits = [extra for extra in extras if isinstance(extra, Range)]
            found += [pytest.param(command, flag, one, id=f"{command.name}-{flag.name}") for one in limits]
    return found


def test_every_number_of_a_command_has_a_range():
    """Training settings check themselves; all other numbers are annotated."""
    checked = {(command.name, flag.name) for command, flag, _ in (param.values for param in ranges())}
    for command in COMMANDS:
        own = {one.name for one in fields(command)}
        for flag in flags_of(command):
            numeric = flag.name in own and re.search(r"INT|FLOAT", flag.typed)
            assert not numeric or (command.name, flag.name) in checked, f"{command.name} --{flag.name}"


@pytest.mark.parametrize(("command", "flag", "limits"), ranges())
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(command, flag, limits, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", lambda _: pytest.fail("the command ran"))
    required = {one.name for one in fields(command) if one.default is one.default_factory is MISSING}
    rest = [word for name, value in REQUIRED.items() if name in required for word in (f"--{name}", value)]
    typed = "--" + flag.name.replace("_", "-")
    outside = [limits.low - (not limits.above), limits.high + (not limits.below)]
    outside += ["nan", "inf", "-inf"] if "FLOAT" in flag.typed else []
    for number in outside:
        assert re.match(
            f"error: (each of )?{typed} must be", sentence([command.name, *rest, typed, str(number)], capsys)
        )
    monkeypatch.setattr(command, "check", Common.check)  # of one number, whatever goes with it
    for bound, excluded in ((limits.low, limits.above), (limits.high, limits.below)):
        given = [command.name, *rest, typed, str(bound)]
        assert excluded or getattr(parse(given), flag.name) in (bound, (bound,))


def test_one_bad_number_of_several_is_refused(capsys):
    bench = ["bench", "--backbone", "x"]
    assert "each of --keep must be a number above 0 and at most 1, not -1.0" in sentence(
        [*bench, "--keep", "0.5", "-1"], capsys
    )
    assert "--batch-sizes takes at least one number" in sentence([*bench, "--batch-sizes"], capsys)


@pytest.mark.parametrize("device", ["tpu", "hpu", "cuda:99", "cuda:-1", "meta", "cpu;", "CPU"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_loaded(device, capsys, monkeypatch):
    monkeypatch.setattr("tokengame.backbones.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert "--device" in sentence(["quickstart", "--device", device], capsys)


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "-2"}, {"RANK": "1.5"}])
def test_what_a_launcher_sets_is_checked(changes, capsys, monkeypatch):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
        assert f"{name} in the environment must be a number, not '{value}'" in sentence(["quickstart"], capsys)


def test_processes_that_cannot_join_are_a_sentence(monkeypatch):
    """A launcher that sets only a part of what the others need."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def fail(**_):
        raise ValueError("environment variable RANK expected, but not set")

    monkeypatch.setattr("accelerate.Accelerator", fail)
    with pytest.raises(TokenGameError, match=r"cannot join \(environment variable RANK expected.*torchrun"):
        distributed.join_processes("cpu")


def test_what_is_read_is_not_written_over(tmp_path, capsys):
    """By any name of the same file; `calibrate` may replace its policy, as its help says."""
    for name in ("w.safetensors", "p.safetensors", "map.txt"):
        (tmp_path / name).write_text("something")
    (tmp_path / "link.safetensors").symlink_to("w.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "policy.safetensors").write_text("something")
    path = {name: str(tmp_path / name) for name in ("w.safetensors", "p.safetensors", "link.safetensors", "map.txt")}
    both = ["--backbone", "x", "--images", "y"]
    cases = [
        ("--weights", ["train", *both, "--weights", path["w.safetensors"], "--output", path["link.safetensors"]]),
        ("--class-map", ["calibrate", *both, "--policy", "z", "--class-map", path["map.txt"], "--output",
                         path["map.txt"]]),
        ("--images", ["train", "--backbone", "x", "--images", path["w.safetensors"], "--output",
                      path["w.safetensors"]]),
        ("--policy", ["finetune", *both, "--policy", str(tmp_path / "tuned" / "policy.safetensors"), "--output",
                      str(tmp_path / "tuned")]),
    ]  # fmt: skip
    for flag, arguments in cases:
        assert re.search(rf"--output would write over .*, which {flag} reads", sentence(arguments, capsys))
    same = parse(["calibrate", *both, "--policy", path["p.safetensors"], "--output", path["p.safetensors"]])
    assert isinstance(same, Calibrate)


def test_a_full_disk_behind_stdout_is_a_sentence():
    """/dev/full takes nothing; a pipe that a reader has closed is no error (tests/test_cli.py)."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokengame", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == f"error: cannot write to stdout ({os.strerror(errno.ENOSPC)})\n"


def closing(number, *arguments):
    """`tokengame` without one of its streams."""
    words = f'exec {sys.executable} -m tokengame "$@" {number}>&-'
    return subprocess.run(["sh", "-c", words, "sh", *arguments], capture_output=True, text=True)


def test_closed_streams():
    """A document that has nowhere to go is refused before the work; without stderr the exit code is what is left."""
    done = closing(1, "quickstart", "--json")
    assert (done.returncode, done.stderr) == (2, "error: --json prints on stdout, which is closed\n")
    assert closing(1, "--help").returncode == 0
    done = closing(2, "nosuch")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    assert closing(0, "--version").stdout == f"tokengame {tokengame.__version__}\n"


INTERRUPTED = """
import runpy, signal, sys
module, which, *arguments = sys.argv[1:]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            signal.raise_signal(getattr(signal, which))

signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that a shell starts in the background ignore it
sys.meta_path.insert(0, Finder())
sys.argv = ["tokengame", *arguments]
runpy.run_module("tokengame", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "which", "code", "text"),
    [("tyro", "SIGINT", 130, "interrupted"), ("torch", "SIGINT", 130, "interrupted"),
     ("torch", "SIGTERM", 143, "terminated")],
)  # fmt: skip
def test_signals_while_importing_end_without_a_traceback(module, which, code, text):
    """The signal comes when `module` is first imported: by the command line itself, or by the command."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, which, "bench", "--backbone", "x"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{text}\n")


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Interrupted("stopped, saved", 15), 143, "stopped, saved"),
     (Interrupted("stopped, saved", 2), 130, "stopped, saved")],
)  # fmt: skip
def test_an_interrupted_command_says_what_is_kept_and_nothing_else(raised, code, text, capsys, monkeypatch):
    def stop(_):
        raise raised

    monkeypatch.setattr(program.Quickstart, "run", stop)
    assert main(["quickstart"]) == code
    assert capsys.readouterr().err == f"{text}\n"


@pytest.fixture
def logged(monkeypatch, capsys):
    """What `announce` prints on a processor with the given abilities."""

    def announced(dtype, **able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
        monkeypatch.setattr(logging.Logger, "hasHandlers", lambda _: False)  # pytest's
        kernels.announce.cache_clear()
        for _ in range(2):
            kernels.announce(dtype, "cpu")
        return [line for line in capsys.readouterr().err.splitlines() if "slow" in line]

    yield announced
    kernels.announce.cache_clear()


def test_a_slow_number_format_is_said_once(logged):
    assert logged(torch.float32) == []
    assert logged(torch.bfloat16, avx512_bf16=True) == []
    assert logged(torch.float16, avx512_fp16=True) == []
    (line,) = logged(torch.bfloat16, avx512_f=True)
    assert line.startswith("tokengame: bfloat16 is slow here (the processor has no AVX-512 bfloat16 or AMX")
    (line,) = logged(torch.float16, avx512_bf16=True)
    assert "float32 is usually faster" in line


def test_a_gpu_that_emulates_bfloat16_is_slow(monkeypatch):
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        assert bool(kernels.why_slow(torch.bfloat16, "cuda")) is not able
    assert kernels.why_slow(torch.float16, "cuda") == ""


def test_doctor_says_what_is_here_and_what_is_supported(capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert main(["doctor", "--backbone", "vit_tiny_patch16_224", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["number_formats"]["float32"] == "fast"
    assert found["number_formats"]["bfloat16"].startswith("slow: the processor has no AVX-512 bfloat16")
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["tokengame"] == tokengame.__version__
    backbone = found["backbone"]
    assert (backbone["supported"], backbone["dim"], backbone["depth"], backbone["heads"]) == (True, 192, 12, 3)
    assert "vit_tiny_patch16_224" in backbone["shipped_policies"]
    assert "bfloat16" in captured.err


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_doctor_says_why_a_backbone_is_not_supported(name, capsys):
    assert main(["doctor", "--backbone", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["backbone"]
    assert not found["supported"]
    assert found["reason"]
    assert "timm knows no model" in sentence(["doctor", "--backbone", "vit_colossal"], capsys)


def test_doctor_knows_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("tokengame.cli.doctor.EXTRAS", {"hub": "a-package-that-is-not-there"})
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extras"] == {"hub": None}


def test_a_blank_model_takes_no_time_for_weights():
    """It is built without numbers, and is what `wrap` sees of the real one."""
    from tokengame.backbones import wrap
    from tokengame.backbones.load import blank, untrained

    name = "vit_tiny_patch16_224"
    assert wrap(blank(name)).shape() == wrap(untrained(name)).shape()
    assert wrap(blank("fashion")).shape()["depth"] == 8
    assert not any(p.is_meta for p in blank(name).parameters())
