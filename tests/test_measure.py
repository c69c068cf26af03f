"""Measurement, its conditions, and pictures, against hand tables."""

import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import tiny_vit
from PIL import Image

import tokengame
from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.cli.main import finite
from tokengame.cli.quickstart import item_recall
from tokengame.config import GameConfig
from tokengame.data.scenes import FashionScenes
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.measure.conditions import commit, conditions
from tokengame.measure.evaluate import faster_native
from tokengame.measure.neighbours import BUSY, neighbours
from tokengame.measure.risk import interval, upper_bound
from tokengame.measure.scores import Scores
from tokengame.measure.synthetic import SPREAD, SyntheticDecisions, synthetic_model
from tokengame.policies.policy import dial_for
from tokengame.report.figures import overlay, stack, strip
from tokengame.report.html import table, verdict


def scores(**changes):
    base = {
        "correct_native": [True, True, False, True],
        "correct_pruned": [True, False, True, True],
        "agree": [True, False, False, True],
        "kl": [0.0, 0.2, 0.4, 0.0],
        "macs": [50.0, 70.0, 60.0, 60.0],
        "confidence": [0.9, 0.2, 0.5, 0.6],
        "kept": [[8, 4], [6, 2], [8, 4], [6, 2]],
        "macs_native": 100.0,
        "tokens": 10,
        "seconds": [(3, 9.0, 9.0), (4, 2.0, 1.0), (4, 4.0, 2.0), (4, 40.0, 1.0)],
    }
    return Scores(**(base | changes))


def test_the_verdict_says_when_many_images_fall_back():
    few, many = (scores(fallback=fallback).summary() for fallback in ([0, 0], [1, 1]))
    assert (few["fallback_share"], many["fallback_share"]) == (0, 0.5)
    assert "fell back" not in verdict(few)
    assert "50% of the images fell back to all tokens" in verdict(many)
    assert ("images that fell back to all tokens", "50.0%") in table(many)
    assert "images that fell back to all tokens" not in dict(table(few)), "there is no cascade to report on"


def test_summary_by_hand():
    found = scores().summary()
    assert (found["top1_native"], found["top1_pruned"], found["drop_pp"]) == (0.75, 0.75, 0.0)
    assert found["drop_pp_ci95"] == [100 * end for end in interval(1, 1, 4)]
    assert (found["agreement"], found["gmacs_ratio"], found["tokens_kept"]) == (0.5, 0.6, [7.0, 3.0])
    assert found["gmacs_ratio_std"] == pytest.approx(0.0707, abs=1e-4)
    # ranks 1, 4, 2.5, 2.5 of compute and 1, 4, 3, 2 of uncertainty
    assert found["compute_vs_uncertainty"] == pytest.approx(0.9487, abs=1e-4)
    assert scores(macs=[60.0] * 4).summary()["compute_vs_uncertainty"] is None
    # medians over the batches of 4 alone: 4 seconds and 1
    assert (found["images_per_second_native"], found["images_per_second_pruned"]) == (1.0, 4.0)
    assert (found["batch_size"], found["speedup"]) == (4, 4.0)


def test_few_images_without_a_change_are_no_proof_that_none_is_lost():
    found = scores(correct_native=[True] * 20, correct_pruned=[True] * 20).summary()
    assert found["drop_pp"] == 0
    low, high = found["drop_pp_ci95"]
    assert -low == high > 20, "a fifth of all images may be lost"
    assert high >= 100 * upper_bound(0, 0, 20), "as the card has it"
    assert f"{low:+.2f} to {high:+.2f}" in dict(table(found))["95 % interval of the drop"]


def test_without_labels_the_drop_is_unknown_and_not_zero():
    found = scores(correct_native=[], correct_pruned=[]).summary()
    assert found["drop_pp"] is None
    assert found["top1_native"] is None
    assert "50.0% of the predictions unchanged" in verdict(found)
    assert table(found)


def test_slower_is_called_slower_and_a_gain_a_gain():
    slow = scores(seconds=[(4, 1.0, 2.0)]).summary()
    assert verdict(slow).startswith("slower (0.50 times")
    assert "points of top-1 gained" in verdict(scores(correct_native=[False] * 4).summary())


ROWS = [
    {"dial": 0.2, "gmacs_ratio": 0.9, "gmacs": 4.5, "keep": 0.8, "drop_pp_bound95": 0.3, "images": 900},
    {"dial": 0.4, "gmacs_ratio": 0.7, "gmacs": 3.5, "keep": 0.6, "drop_pp_bound95": 0.5, "images": 900},
    {"dial": 0.6, "gmacs_ratio": 0.5, "gmacs": 2.5, "keep": 0.2, "drop_pp_bound95": 2.0, "images": 900},
    {"dial": 0.8, "gmacs_ratio": 0.3, "gmacs": 1.5, "keep": 0.1, "drop_pp_bound95": 0.4, "images": 900},
]
CARD = {"calibration": ROWS}


def test_the_dial_that_meets_a_target():
    assert dial_for(CARD, gmacs_ratio=0.6) == pytest.approx(0.5)
    assert dial_for(CARD, gmacs=1.5) == pytest.approx(0.8)
    assert dial_for(CARD, keep=0.4) == pytest.approx(0.5)
    assert dial_for({"calibration": ROWS[::-1]}, max_drop=1.0) == 0.4, "a dial behind one that fails is not taken"
    with pytest.raises(TokenGameError, match=r"outside the calibrated 0.30 to 0.90"):
        dial_for(CARD, gmacs_ratio=0.95)
    with pytest.raises(TokenGameError, match="no calibration"):
        dial_for({"calibration": []}, gmacs_ratio=0.5)
    with pytest.raises(TokenGameError, match="without labels"):
        dial_for({"calibration": [{"dial": 0.5, "gmacs_ratio": 0.5, "drop_pp_bound95": None}]}, max_drop=1.0)
    with pytest.raises(TokenGameError, match="give one of"):
        dial_for(CARD, gmacs=2.0, max_drop=1.0)


def test_without_a_guarantee_all_tokens_are_kept_and_a_warning_says_so():
    with pytest.warns(UserWarning, match=r"900 calibration images can guarantee a drop of 0.30 points at best"):
        assert dial_for(CARD, max_drop=0.1) == 0


@torch.no_grad()
def test_synthetic_decisions_keep_the_wanted_shares_spread_over_images():
    fast = synthetic_model(tiny_vit(img_size=80), GameConfig(stages=(1, 2)), (0.6, 0.3))
    images = torch.randn(64, 3, 80, 80)
    fast.actor.fit(fast, images)
    first, second = (kept.float() for kept in fast.predict(images).kept)
    assert float(first.mean()) / 100 == pytest.approx(0.6, abs=0.005)
    assert float(second.mean()) / 100 == pytest.approx(0.3, abs=0.005)
    assert float(first.std()) / 60 == pytest.approx(SPREAD, rel=0.1)
    fewest = [kept.argsort(stable=True)[:5] for kept in (first, second)]
    assert torch.equal(*fewest), "an image that keeps few tokens keeps few at both stages"
    with pytest.raises(TokenGameError, match="do not grow"):
        SyntheticDecisions(fast.actor, (0.3, 0.6))
    with pytest.raises(TokenGameError, match="3 shares to keep for 2 stages"):
        synthetic_model(tiny_vit(), GameConfig(stages=(1, 2)), (0.6, 0.4, 0.3))
    with pytest.raises(TokenGameError, match="cannot be ranked before the first block"):
        synthetic_model(tiny_vit(), GameConfig(stages=(0, 2), transition="drop"), (0.6, 0.4))


@torch.no_grad()
def test_synthetic_decisions_that_keep_all_give_the_native_prediction():
    model = tiny_vit()
    fast, images = synthetic_model(model, GameConfig(stages=(1, 2)), (1.0, 1.0)), torch.randn(3, 3, 32, 32)
    fast.actor.fit(fast, images)
    torch.testing.assert_close(fast(images), model(images), atol=1e-5, rtol=1e-5)


def test_overlay_fades_exactly_the_pruned_patches():
    pixels = np.full((16, 24, 3), 10, np.uint8)
    alive = np.array([True, False, True, True, True, False])
    changed = (overlay(pixels, alive, (2, 3)) != pixels).any(2)
    assert changed[:8, 8:16].all()
    assert changed[8:, 16:].all()
    assert changed.sum() == 2 * 64


def test_as_many_strips_side_by_side_as_fit():
    row = strip(np.zeros((16, 16, 3), np.uint8), np.ones((2, 4), bool), (2, 2), ["a", "b", "c"], side=100)
    assert row.size == (3 * 106 - 6, 120)
    page = stack([row] * 4)
    assert page.width > 3 * row.width > 900
    assert page.height == 2 * 120 + 6
    assert stack([Image.new("RGB", (3000, 10))]).width == 3000


def test_item_recall_by_hand():
    """Exactly the tokens on the item kept: 1 and 0; exactly the others: 0 and 1."""
    scenes, centres = FashionScenes("test", 2, seed=1), (np.arange(14) + 0.5) * 8
    fast = type("Fast", (), {"game": TokenGame(wrap(tiny_vit(img_size=112)), GameConfig(stages=(1,)))})
    masks = []
    for scene in (scenes[0], scenes[1]):
        left, top, right, bottom = scene.box
        rows, columns = (centres > top) & (centres < bottom), (centres > left) & (centres < right)
        masks.append(np.outer(rows, columns).ravel())
    on_item = Scores(index=[0, 1], positions=[torch.from_numpy(np.flatnonzero(m)) for m in masks])
    beside = Scores(index=[0, 1], positions=[torch.from_numpy(np.flatnonzero(~m)) for m in masks])
    assert item_recall(on_item, scenes, fast)["item_tokens_kept"] == 1
    assert item_recall(on_item, scenes, fast)["background_tokens_kept"] == 0
    assert item_recall(beside, scenes, fast)["item_to_background"] == 0


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_conditions_say_under_what_something_was_measured(dtype, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tokengame", "eval", "--images", "my images"])
    found = conditions(dtype)
    assert set(found) == {"processor", "kernels", "threads", "torch", "timm", "tokengame", "commit", "command"}
    assert found["processor"].strip()
    assert name in found["kernels"], "which kernels ran depends on the number format"
    assert found["threads"] == torch.get_num_threads()
    assert (found["torch"], found["timm"]) == (torch.__version__, timm.__version__)
    assert found["tokengame"] == tokengame.__version__
    assert found["command"] == "tokengame eval --images 'my images'"


def test_conditions_name_kernels_that_are_switched_off():
    with kernels.disabled():
        assert "PyTorch's for bfloat16" in conditions(torch.bfloat16)["kernels"]


def commit_in(folder, monkeypatch):
    """The commit, as if the package lay in `folder`."""
    module = folder / "tokengame" / "measure" / "conditions.py"
    monkeypatch.setattr("tokengame.measure.conditions.__file__", str(module))
    return commit.__wrapped__()  # without its cache


def test_there_is_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    assert commit_in(tmp_path, monkeypatch) is None


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_checkout_is_marked_where_files_were_changed(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *author, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "file").write_text("one")
    git("init", "--quiet")
    assert commit_in(tmp_path, monkeypatch) is None, "no commit yet"
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    assert commit_in(tmp_path, monkeypatch) == git("rev-parse", "--short", "HEAD")
    (tmp_path / "file").write_text("two")
    assert commit_in(tmp_path, monkeypatch) == git("rev-parse", "--short", "HEAD") + "+"


def test_json_holds_no_nan():
    assert finite({"a": [1.0, float("nan")], "b": {"c": float("inf")}}) == {"a": [1.0, None], "b": {"c": None}}


@pytest.mark.parametrize(("fused", "unfused", "expected"), [(1.0, 2.0, "fused"), (2.0, 1.0, "unfused")])
def test_native_runs_with_the_faster_attention(fused, unfused, expected, model, monkeypatch):
    seconds, disturbances = {True: fused, False: unfused}, iter([3.0, 0.0, 0.0, 3.0] + [0.0] * 6)

    def timed(_, form, __):
        return None, seconds[form.blocks[0].attn.fused_attn] + next(disturbances)

    monkeypatch.setattr("tokengame.measure.evaluate.timed", timed)
    images = torch.randn(2, 3, 32, 32)
    found = faster_native(model, images)
    assert found.blocks[0].attn.fused_attn == (expected == "fused")
    torch.testing.assert_close(found(images), model(images), atol=1e-5, rtol=1e-4)
    assert model.blocks[0].attn.fused_attn, "the model itself was changed"
    assert next(found.parameters()).data_ptr() == next(model.parameters()).data_ptr(), "the weights were copied"


FAULTS = """
import resource, torch
from tokengame.measure.evaluate import keep_freed_memory

def faults():
    for _ in range(3):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
assert keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's allocator")
def test_an_allocator_that_keeps_freed_memory_takes_no_fresh_pages():
    """Ten times 64 MiB, freed each time, are 160,000 pages of 4 KiB, or none."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 100, "even if pages are huge"
    assert kept < fresh / 10


def children():
    """Processes that this one has started and that are running."""
    found = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    )
    return found.stdout.splitlines()


def test_neighbours_are_busy_within_their_context_alone():
    with neighbours(2):
        assert sum(BUSY in arguments for arguments in children()) == 2
    assert not any(BUSY in arguments for arguments in children())
