"""Wrong command lines: each ends with exit code 2 and a sentence that names what is wrong, and writes nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from attacks.outcome import Defect, Refused, require
from attacks.runs import require_sentence
from attacks.world import SMALL, Ended, World, command

HUGE = str(10**30)
SHARE = ("nan", "inf", "-0.1", "0", "1", "1.5", "abc", "")
POSITIVE = ("nan", "-1", "0", "abc")
COUNT = ("0", "-1", "1.5", "nan", "abc")
SEED = ("-1", "1.5", "abc", HUGE)
DIAL = ("nan", "-0.1", "1.1", "inf", "abc")
RATIO = ("nan", "inf", "-1", "0", "5")
FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "seed": SEED, "updates": COUNT, "batch-size": COUNT, "rollouts": COUNT, "checkpoint-every": COUNT,
        "workers": ("-1", "abc", "1.5"), "holdout": SHARE, "gmacs-ratio": RATIO, "target-drop": POSITIVE,
        "target-kl": (*POSITIVE, "inf"), "ppo.lr": (*POSITIVE, "inf", "1e30"), "ppo.critic-lr": ("nan", "0", "1e30"),
        "ppo.clip": ("nan", "-1"), "ppo.gamma": ("nan", "-1", "2"), "ppo.gae-lambda": ("nan", "-1", "2"),
        "ppo.epochs": ("0", "-1", "abc"), "ppo.minibatches": ("0", "-1"), "ppo.entropy": ("nan", "inf"),
        "ppo.value": ("nan", "inf", "-1"), "ppo.max-grad-norm": ("nan", "-1", "0"), "ppo.critic": ("both",),
        "ppo.sched": ("cosine",), "ppo.eps": ("nan", "0", "2"), "reward.native-every": ("0", "-1", "2"),
        "reward.temperature": ("nan", "0", "inf"), "reward.kl-weight": ("nan", "0", "inf"),
        "reward.kl-clamp": ("nan", "-1", "0"), "reward.kind": ("Share",), "actor.keep": ("nan", "0", "1", "2"),
        "actor.hidden": ("0", "-5", "abc"), "game.stages": ("99", "-1", "2 1", "1 1", "1.5"),
        "game.stage-count": ("0", "-1"), "game.cascade-margin": ("nan", "-1", "inf"), "game.transition": ("mErge",),
        "dtype": ("float8", "int8"), "device": ("nonsense", "cuda:99", "meta"), "preset": ("nope",),
        "images": ("no/such/folder", "@empty", "@text.txt", "@broken", "@broken.tar", "@no*.tar",
                   "@{0000..99999999}.tar"),
        "weights": ("no.safetensors", "@text.txt", "@nan.safetensors", "@headless.safetensors", "@images"),
        "class-map": ("no.txt", "@strange.txt", "@many.txt", "@binary.txt"),
        "backbone": ("no_such_model",),
        "output": ("@images", "@pipe", "@text.txt/policy.safetensors", "/proc/none/p.safetensors", ""),
    },
    "eval": {
        "dial": DIAL, "max-drop": ("nan", "-1", "abc"), "gmacs-ratio": RATIO, "batch-size": COUNT, "holdout": SHARE,
        "seed": SEED[:3], "workers": ("-1",), "dtype": ("float8",), "device": ("nonsense",),
        "policy": ("no.safetensors", "no_such_policy", "@text.txt", "@images", "@weights.safetensors",
                   "vit_tiny_patch16_224"),
    },
    "calibrate": {
        "cascade-margin": ("nan", "-1", "inf"), "batch-size": COUNT, "holdout": SHARE[:5], "seed": SEED[:3],
        "output": ("@images", "@pipe", "/proc/none/p.safetensors"), "policy": ("no.safetensors",),
    },
    "show": {
        "count": ("-1", "0", "abc"), "side": ("0", "-1", "100000", "abc"), "dial": DIAL, "pick": ("best",),
        "dynamicvit-updates": ("-1", "abc"), "output": ("tokens.jpg", "@images", "@pipe"), "seed": ("-1",),
    },
    "sweep": {"ratios": ("0", "-1", "nan", "inf", "abc"), "holdout": ("nan", "0", "2"), "seed": ("-1",),
              "updates": ("0",)},
    "finetune": {
        "opt": ("nope",), "sched": ("nope",), "aa": ("nope",), "lr": (*POSITIVE, "inf", "1e30"),
        "ema": ("nan", "-1", "1"), "warmup": ("nan", "-1", "2"), "crop": ("nan", "0", "2"),
        "augment.mixup": ("nan", "-1", "0.8"), "augment.cutmix": ("nan", "-1", "1"),
        "augment.smoothing": ("nan", "1"), "recipe": ("nope",),
        "augment.drop-path": ("nan", "-1", "1"), "augment.remode": ("black",),
        "reprob": ("nan", "-1", "2"), "distill": ("nan", "-1"), "labels": ("nan", "-1", "inf"),
        "weight-decay": ("nan", "-1", "inf"), "max-grad-norm": ("nan", "0", "-1"), "updates": COUNT,
        "batch-size": ("0", "-1"), "checkpoint-every": ("0", "-1"), "dial": ("nan", "-1", "2"), "seed": ("-1",),
        "gmacs-ratio": RATIO, "validate": ("no/such/folder",), "holdout": ("nan", "1"),
    },
    "bench": {
        "keep": ("nan", "0", "-1", "2"), "batch-sizes": ("0", "-1", "abc"), "seconds": ("nan", "-1", "inf"),
        "dtypes": ("float8",), "stages": ("99", "-1"), "backbone": ("no_such_model",), "seed": ("-1",),
    },
    "ablate": {"seeds": ("0", "-1", "abc"), "holdout": ("nan", "0", "1"), "seed": ("-1",), "updates": ("0",)},
    "compare": {
        "dials": ("nan", "-1", "2"), "policies": ("no.safetensors", "@text.txt"), "batch-size": ("0", "-1"),
        "dynamicvit-updates": ("-1", "5"), "holdout": ("nan", "0"), "seed": ("-1",), "dtype": ("float8",),
    },
    "quickstart": {"eval-images": ("0", "-1", "abc"), "gmacs-ratio": RATIO, "seed": ("-1",), "preset": ("nope",),
                   "updates": ("0",)},
}  # fmt: skip
"""flags by command, without their dashes, and values that are wrong; @ is a file in the folder of wrong things"""
WHOLE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("nope",), "nope"), (("train",), "--backbone"), (("eval", "--policy", "x"), "--backbone"), (("trian",), "trian"),
    (("+train", "--resume"), "--resume"), (("+train", "--updatess", "3"), "--updatess"),
    (("+train", "--seed"), "--seed"),
    (("+train", "stray"), "stray"), (("+eval", "--dail", "0.5"), "--dail"), (("+eval", "--max-drop"), "--max-drop"),
    (("+eval", "--dial", "0.5", "--gmacs-ratio", "0.8"), "--gmacs-ratio"), (("+eval", "--json", "x"), "x"),
    (("+finetune", "--dial", "0.5", "--gmacs-ratio", "0.8"), "--gmacs-ratio"), (("+finetune", "--resume"), "--resume"),
    (("+train", "--preset"), "--preset"), (("+train", "--target-drop", "1", "--reward.kind", "share"), "--target-drop"),
    (("+finetune", "--distill", "0", "--labels", "0"), "--distill"),
    (("+compare", "--policies", "@m", "@m"), "policies"),
    (("--version", "--nope"), "--nope"), (("+train", "--images", "stream:no/such/set"), "no/such/set"),
)  # fmt: skip
"""whole lines and a word that the sentence must have; + stands for a command with the flags that it needs"""
STARTED = ([], ["nope"], ["eval", "--dial", "nan"], ["train", "--help", "--nope"], ["train", "--images"])
"""lines that are run by an interpreter of their own"""


@dataclass(frozen=True)
class Line:
    """A wrong command line."""

    arguments: tuple[str, ...]
    names: tuple[str, ...]
    """of these the sentence must name one"""


@lru_cache
def lines(world: World) -> list[Line]:
    """All of them."""
    return [*_flag_lines(world), *_whole_lines(world)]


def _flag_lines(world: World) -> Iterator[Line]:
    for name, flags in FLAGS.items():
        for flag, values in flags.items():
            for value in values:
                found = [_placed(world, part) for part in (value.split(" ") if flag == "game.stages" else [value])]
                base, first = _without(_base(world, name), f"--{flag}"), found[0]
                glued = [f"--{flag}={first}"] if first.startswith("-") else [f"--{flag}", *found]
                yield Line((*base, *glued), (f"--{flag}", *_word(first)))


def _word(value: str) -> tuple[str, ...]:
    """The name by which a sentence may speak of a value instead of its flag: of a file, a model, a choice."""
    try:
        float(value)
    except ValueError:
        return (Path(value).name,) if value not in ("", "abc") else ()
    return ()


def _whole_lines(world: World) -> Iterator[Line]:
    for arguments, names in WHOLE:
        own = [_placed(world, part) for part in arguments]
        if own[0].startswith("+"):
            own = [*_base(world, own[0][1:]), *own[1:]]
        yield Line(tuple(own), (names,))


def _base(world: World, name: str) -> list[str]:
    """A command that would work."""
    policy = ["--policy", str(world.policy("merge"))]
    few = ["--updates", "1", *SMALL]
    tune = ["--updates", "1", "--batch-size", "4"]
    own = {
        "train": few, "eval": policy, "calibrate": [*policy, "--output", "out/p.safetensors"],
        "show": [*policy, "--output", "out/tokens.png"], "sweep": [*few, "--output", "out"],
        "finetune": [*policy, *tune, "--output", "out"], "ablate": [*few, "--seeds", "1", "--output", "out"],
        "compare": ["--no-timing", "--output", "out"],
    }  # fmt: skip
    if name == "quickstart":
        return [name, *few, "--eval-images", "1", "--output", "out"]
    if name == "bench":
        quick = ["--seconds", "0.01", "--batch-sizes", "1", "--dtypes", "float32", "--no-compiled", "--output", "out"]
        return [name, "--backbone", "vit_tiny_patch16_224", *quick]
    return [name, *world.flags, *own[name]]


def _without(arguments: list[str], flag: str) -> list[str]:
    """A command line without one of its flags, each of which has one value."""
    if flag not in arguments:
        return arguments
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2 :]


def _placed(world: World, value: str) -> str:
    if value == "@m":
        return str(world.policy("merge"))
    return str(wrong_things(world) / value[1:]) if value.startswith("@") else value


def wrong_things(world: World) -> Path:
    """A folder of files that are not what flags want, made once."""
    folder = world.root / "wrong"
    if folder.exists():
        return folder
    (folder / "empty").mkdir(parents=True)
    (folder / "text.txt").write_text("not what you think\n")
    (folder / "strange.txt").write_text("v\nw\nx\ny\nz\n")
    (folder / "many.txt").write_text("f\ng\nh\ni\nj\na\nb\nc\nd\ne\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    for name in ("images", "broken"):
        for label in "abcde":
            (folder / name / label).mkdir(parents=True)
            path = folder / name / label / f"{name}.png"
            Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
            if name == "broken":
                path.write_bytes(path.read_bytes()[:40])
    with tarfile.open(folder / "whole.tar", "w") as archive:
        archive.add(folder / "images", "images")
    (folder / "broken.tar").write_bytes((folder / "whole.tar").read_bytes()[:700])
    state = load_file(world.weights)
    save_file(state, folder / "weights.safetensors")
    save_file(state | {"norm.weight": state["norm.weight"] * torch.nan}, folder / "nan.safetensors")
    save_file({key: value for key, value in state.items() if "head" not in key}, folder / "headless.safetensors")
    os.mkfifo(folder / "pipe")
    return folder


def count(world: World) -> int:
    """Lines."""
    return len(lines(world)) + len(STARTED)


def case(world: World, _seed: int, number: int) -> str:
    """One line, in an empty folder."""
    with tempfile.TemporaryDirectory(dir=world.root) as folder:
        if number >= len(lines(world)):
            return _started(Path(folder), STARTED[number - len(lines(world))])
        line = lines(world)[number]
        what = " ".join((line.arguments[0], *line.arguments[-3:]))
        before = _files(wrong_things(world))
        ended = command(list(line.arguments), lambda: os.chdir(folder))
        try:
            _judge(world, Path(folder), line, ended, before)
        except Defect as error:
            shutil.rmtree(wrong_things(world))  # it is made anew
            raise Defect(f"{what}: {error}") from None
    raise Refused(f"{what}: {ended.sentence[-120:]}")


def _judge(world: World, folder: Path, line: Line, ended: Ended, before: dict[str, bytes]) -> None:
    require_sentence(ended, (2,))
    require(ended.mib < 1024, f"{ended.mib:.0f} MiB")
    require(not _files(folder), f"wrote {sorted(_files(folder))[:3]}")
    require(_files(wrong_things(world)) == before, "changed what it was pointed at")
    require(stat.S_ISFIFO((wrong_things(world) / "pipe").stat().st_mode), "replaced a named pipe by a file")
    found = ended.sentence.replace(" ", "")
    named = any(name.replace(" ", "") in found for name in line.names)
    require(named, f"names none of {line.names}: {ended.sentence[-200:]}")


def _files(folder: Path) -> dict[str, bytes]:
    """Contents of all regular files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _started(folder: Path, arguments: list[str]) -> str:
    """The same judgement on an interpreter of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "tokengame", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )  # fmt: skip
    codes = (0, 2) if not arguments or "--help" in arguments else (2,)
    require_sentence(Ended(ended.returncode, ended.stderr + ended.stdout, "", 0, 0), codes)
    require(not _files(folder), "wrote files")
    return f"python -m tokengame {' '.join(arguments)}"
