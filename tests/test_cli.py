"""The command line as users meet it: one sentence on bad input, JSON keys that do not change, help with examples."""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_vit
from PIL import Image
from safetensors.torch import save_file

from tokengame.backbones import preprocessing_of
from tokengame.cli.common import Common
from tokengame.cli.main import COMMANDS, main, parse
from tokengame.config import require
from tokengame.errors import TokenGameError
from tokengame.policies import Policy
from tokengame.runtime import prune

NAME = "vit_tiny_patch16_224"
CONDITIONS = {"processor", "kernels", "threads", "torch", "timm", "tokengame", "commit", "command"}
SCORES = {
    "images", "top1_native", "top1_pruned", "drop_pp", "drop_pp_ci95", "agreement", "kl", "gmacs_native",
    "gmacs_pruned", "gmacs_ratio", "gmacs_ratio_std", "tokens_kept", "images_per_second_native",
    "images_per_second_pruned", "speedup", "fallback_share",
}  # fmt: skip
EVAL_KEYS = SCORES | CONDITIONS
TRAIN_KEYS = SCORES | {"policy", "images_seen", "seconds", "images_per_second"}
BENCH_KEYS = CONDITIONS | {
    "backbone", "dtype", "batch_size", "keep", "images_per_second_native", "images_per_second_pruned", "speedup",
    "gmacs_speedup", "efficiency",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A real timm model with random weights in a local file, and images of five classes."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=5).state_dict(), root / "weights.safetensors")
    for name in "abcde":
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def flags(inputs):
    return ["--backbone", NAME, "--weights", str(inputs / "weights.safetensors"), "--images", str(inputs / "images"),
            "--workers", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(inputs, flags):
    policy = inputs / "policy.safetensors"
    run = ["train", *flags, "--output", str(policy), "--updates", "2", "--batch-size", "4", "--rollouts", "2", "--json"]
    return policy, [*run, "--overwrite"]


@pytest.fixture(scope="module")
def policy(trained):
    path, run = trained
    assert main(run) == 0
    return path


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_train_prints_its_document_alone_on_stdout(trained, capsys):
    assert main(trained[1]) == 0
    found = document(capsys)
    assert set(found) >= TRAIN_KEYS
    assert found["images_seen"] == 8
    assert found["images"] == 4


@pytest.mark.parametrize("name", ["drop", "kl"])
def test_a_target_goes_by_its_short_name(name, capsys):
    assert main(["train", "--backbone", "fashion", "--images", "fashion", f"--target-{name}", "-1"]) == 2
    assert f"--target-{name} must be a number above 0" in capsys.readouterr().err


def test_eval_at_each_operating_point(flags, policy, capsys):
    points = [[], ["--dial", "0.7"], ["--gmacs-ratio", "0.8"], ["--max-drop", "100"]]
    for point in points:
        assert main(["eval", *flags, "--policy", str(policy), "--json", "--batch-size", "5", *point]) == 0
        found = document(capsys)
        assert set(found) >= EVAL_KEYS
        assert found["images"] == 20
        assert len(found["tokens_kept"]) == 3
        assert 0 <= found["agreement"] <= 1
    assert main(["eval", *flags, "--policy", str(policy), "--dial", "0", "--json"]) == 0
    untouched = document(capsys)
    assert (untouched["agreement"], untouched["drop_pp"]) == (1, 0)
    assert untouched["tokens_kept"] == [196] * 3
    assert untouched["gmacs_native"] == pytest.approx(1.2535, abs=1e-3)


@pytest.mark.filterwarnings("default")
def test_calibrate_writes_what_is_guaranteed(flags, policy, tmp_path, capsys):
    """So few images guarantee nothing: a sentence, and all tokens kept. Where any drop is allowed, the hardest dial."""
    output, held = tmp_path / "calibrated.safetensors", ["--holdout", "0.4"]
    calibration = ["calibrate", *flags, *held, "--policy", str(policy), "--output", str(output)]
    assert main([*calibration, "--json"]) == 0
    rows = document(capsys)
    assert [row["images"] for row in rows] == [8] * len(rows)
    assert all(row["drop_pp_bound95"] >= row["drop_pp"] for row in rows)
    evaluation = ["eval", *flags, *held, "--policy", str(output), "--json", "--max-drop"]
    assert main([*evaluation, "0.5"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["dial"] == 0
    assert "8 calibration images can guarantee" in " ".join(captured.err.split())
    assert main([*evaluation, "100"]) == 0
    assert document(capsys)["dial"] == rows[-1]["dial"]
    assert Policy.load(output).game.cascade_margin == 0
    assert main([*calibration, "--cascade-margin", "0.5"]) == 0
    cascaded = Policy.load(output)
    assert cascaded.game.cascade_margin == 0.5
    pairs = zip(rows, cascaded.card["calibration"], strict=True)
    assert any(without["gmacs_ratio"] < row["gmacs_ratio"] for without, row in pairs), "images that fall back cost more"


def test_show_the_easiest_and_the_hardest(flags, policy, tmp_path, capsys):
    """Three pictures: of the two images that took the least compute, and of the one that took the most."""
    output = tmp_path / "tokens.png"
    arguments = ["show", *flags, "--policy", str(policy), "--output", str(output), "--side", "80", "--dial", "0.9"]
    assert main([*arguments, "--count", "3", "--pick", "extremes", "--json"]) == 0
    assert document(capsys)["files"] == [str(output)]
    show = parse([*arguments, "--count", "30", "--pick", "extremes"])
    model, source = show.load()
    fast = prune(model, show.policy, show.dial)
    scores = show.measure(fast, source, 20, preprocessing_of(model))
    show.measure = lambda *_: scores
    all_images = show._picked(fast, source, preprocessing_of(model))
    assert sorted(all_images) == list(range(20)), "no image twice"
    show.count = 3
    picked = show._picked(fast, source, preprocessing_of(model))
    macs = dict(zip(scores.index, scores.macs, strict=True))
    assert sorted(macs[i] for i in picked) == pytest.approx([*sorted(macs.values())[:2], max(macs.values())])


def test_show_writes_a_picture_one_strip_an_image(flags, policy, tmp_path, capsys):
    output = tmp_path / "tokens.png"
    assert main(["show", *flags, "--policy", str(policy), "--output", str(output), "--count", "3", "--json"]) == 0
    assert document(capsys)["files"] == [str(output)]
    with Image.open(output) as picture:
        assert picture.width > 4 * 160
        assert picture.height > 3 * 160


def test_bench_reports_and_writes_the_same_figures(tmp_path, capsys):
    run = ["bench", "--backbone", NAME, "--batch-sizes", "2", "--dtypes", "float32", "--seconds", "0.5", "--json"]
    assert main([*run, "--keep", "0.5", "0.25", "--no-compiled", "--tome", "--output", str(tmp_path)]) == 0
    (row,) = document(capsys)
    assert set(row) >= BENCH_KEYS
    assert row["keep"] == pytest.approx([0.5, 0.25], abs=0.02)
    assert row["efficiency"] == pytest.approx(row["speedup"] / row["gmacs_speedup"])
    assert row["images_per_second_native"] == pytest.approx(
        2e3 / min(row["milliseconds"][f"native {how}"] for how in ("fused", "unfused"))
    )
    assert row["tome_gmacs_speedup"] == pytest.approx(row["gmacs_speedup"], rel=0.02)
    assert sum(row["time_shares"].values()) == pytest.approx(1)
    assert 0 < row["peak_memory_mib_pruned"] < 1000
    (path,) = tmp_path.glob("*.csv")
    memory = "_keeps-memory" * (platform.libc_ver()[0] == "glibc")
    settings = "drop_stages4-8_keep0.5-0.25_batch2_float32_tome_eager" + memory
    assert path.name == f"bench_{NAME}_{settings}_cpu-{torch.get_num_threads()}threads.csv"
    (written,) = csv.DictReader(path.read_text().splitlines())
    assert float(written["speedup"]) == row["speedup"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_bench_compiles_both_sides(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tokengame.backbones.load_model", lambda *_: tiny_vit(img_size=64))  # compiles sooner
    run = ["bench", "--backbone", "fashion", "--batch-sizes", "1", "--dtypes", "float32", "--seconds", "0.2", "--json"]
    assert main([*run, "--output", str(tmp_path)]) == 0
    (row,) = document(capsys)
    assert set(row["milliseconds"]) == {
        "native fused", "native unfused", "native compiled", "native unfused compiled", "pruned eager",
        "pruned compiled", "unpruned tuned",
    }  # fmt: skip
    assert row["tokens_kept"][0]["least"] < row["tokens_kept"][0]["most"], "other counts every time"
    fastest = min(row["milliseconds"][f"native {how}"] for how in ("fused", "compiled"))
    efficiency = fastest / min(row["milliseconds"][f"pruned {how}"] for how in ("eager", "compiled"))
    assert row["efficiency_over_sdpa"] == pytest.approx(efficiency / row["gmacs_speedup"])
    assert row["efficiency"] <= row["efficiency_over_sdpa"]


def test_quickstart_small(tmp_path, capsys):
    run = [
        "quickstart",
        "--output",
        str(tmp_path / "out"),
        "--updates",
        "2",
        "--batch-size",
        "8",
        "--eval-images",
        "64",
    ]
    assert main([*run, "--json"]) == 0
    found = document(capsys)
    assert set(found) >= TRAIN_KEYS | CONDITIONS | {"report", "item_tokens_kept", "background_tokens_kept"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/") == 3
    assert found["top1_native"] >= 0.7, "the embedded backbone classifies"


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"tokengame {command}" in shown.split("xamples:")[1]


@dataclass(kw_only=True)
class Sides(Common):
    """How many patches fit into an image."""

    name: ClassVar[str] = "sides"
    examples: ClassVar[str] = "tokengame sides --image 224 --patch 16"

    image: int
    """side of the image in pixels"""
    patch: int = 16
    """side of a patch in pixels"""

    def run(self):
        """Divide."""
        require(self.patch >= 1, f"--patch must be at least 1, not {self.patch}")
        return {"patches": (self.image // self.patch) ** 2, "left_over": self.image % self.patch / self.patch}


def test_a_command_of_ones_own_is_a_class_and_a_line_in_the_registry(monkeypatch, capsys):
    """The class above would be a file of cli/; its flags, its help, its JSON and its errors follow from it."""
    monkeypatch.setattr("tokengame.cli.main.COMMANDS", (*COMMANDS, Sides))
    assert main(["sides", "--image", "225", "--json"]) == 0
    assert document(capsys) == {"patches": 196, "left_over": 1 / 16}
    assert main(["sides", "--image", "225"]) == 0
    assert capsys.readouterr().out == "", "stdout belongs to --json"
    assert "--patch must be at least 1, not 0" in one_sentence(capsys, ["sides", "--image", "225", "--patch", "0"])
    with pytest.raises(SystemExit):
        main(["sides", "--help"])
    shown = capsys.readouterr().out
    assert "tokengame sides --image 224 --patch 16" in shown.split("xamples:")[1]
    assert "side of a patch in pixels" in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "How many patches fit" in capsys.readouterr().out


def one_sentence(capsys, run) -> str:
    assert main(run) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_gets_one_sentence(inputs, flags, policy, tmp_path, capsys):
    weights = ["--weights", str(inputs / "weights.safetensors")]
    images = ["--images", str(inputs / "images")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.txt").write_text("a\nb\nc\nd\nx\n")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    state = timm.create_model(NAME, num_classes=5).state_dict()
    state["head.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    train = ["train", "--backbone", NAME, "--output", str(tmp_path / "p.safetensors"), "--updates", "1"]
    cases = {
        "no folder or tar": [*train, *weights, "--images", str(tmp_path / "nowhere")],
        "no image in": [*train, *weights, "--images", str(tmp_path / "empty")],
        "1 class folders are not in": [*train, *weights, *images, "--class-map", str(tmp_path / "map.txt")],
        "no weights file": [*train, *images, "--weights", "nowhere.safetensors"],
        "damaged": [*train, *images, "--weights", str(tmp_path / "broken.safetensors")],
        "not finite in head.weight": [*train, *images, "--weights", str(tmp_path / "nan.safetensors")],
        "timm knows no model": [*train, *weights, *images, "--backbone", "vit_colossal"],
        "another architecture": [*train, *weights, *images, "--backbone", "vit_small_patch16_224"],
        "is of no supported family": ["bench", "--backbone", "resnet18"],
        "from 0 to 11": [*train, *weights, *images, "--game.stages", "3", "12"],
        "above 0 and below 1, not 1.5": [*train, *weights, *images, "--actor.keep", "1.5"],
        "--actor.keep None": [*train, *weights, *images, "--actor.observation", "token_id"],
        "no preset": [*train, *weights, *images, "--preset", "magic"],
        "no policy file": ["eval", *flags, "--policy", "nowhere.safetensors"],
        "give one of": ["eval", *flags, "--policy", str(policy), "--dial", "0.5", "--max-drop", "1"],
        "outside the calibrated": ["eval", *flags, "--policy", str(policy), "--gmacs-ratio", "0.01"],
        "--dial must be a number from 0 to 1": ["eval", *flags, "--policy", str(policy), "--dial", "7"],
        "no device": ["eval", *flags, "--policy", str(policy), "--device", "cuda:7"],
        "cannot write ": ["bench", "--backbone", NAME, "--output", str(inputs / "weights.safetensors")],
        "shares between": ["bench", "--backbone", NAME, "--keep", "0.3", "0.5"],
        "cannot write": [*train, *weights, *images, "--output", str(inputs / "weights.safetensors" / "p.safetensors")],
        "does not fit": ["show", *flags, "--policy", str(policy), "--backbone", "fashion", "--output",
                         str(tmp_path / "t.png")],
    }  # fmt: skip
    cases["does not fit"].remove("--weights")
    cases["does not fit"].remove(str(inputs / "weights.safetensors"))
    for reason, run in cases.items():
        assert reason in one_sentence(capsys, run), run
    assert not (tmp_path / "p.safetensors").exists()


def test_a_full_disk_leaves_the_old_policy_whole(policy, monkeypatch):
    before, loaded = policy.read_bytes(), Policy.load(policy)

    def fail(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TokenGameError, match="cannot write"):
        loaded.save(policy)
    assert policy.read_bytes() == before


def test_a_reader_who_leaves_early_is_no_error():
    """As in `tokengame train --help | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tokengame", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
