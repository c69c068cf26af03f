"""Several processes learn as one does; a run that was killed and resumed ends as one that never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tokengame.backbones import load_model
from tokengame.data.batches import Epochs, Share
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError
from tokengame.learning.ppo import normalise
from tokengame.policies import Policy

COMMAND = [sys.executable, "-m", "tokengame"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tokengame"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in "abcdefghij":
        (folder / name).mkdir()
        for i in range(3):
            pixels = np.random.default_rng((i, ord(name))).integers(0, 255, (60, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_every_item_of_a_batch_is_taken_by_one_process(size, own, batches, done):
    batch = size * own
    shares = [Share((done + batches) * batch, batch, done * batch, Processes(size, rank)) for rank in range(size)]
    assert {len(share) for share in shares} == {batches * own}
    for number in range(batches):
        together = [share[number * own + i] for share in shares for i in range(own)]
        assert together == list(range((done + number) * batch, (done + number + 1) * batch))


def test_epochs_show_every_image_once():
    order = Epochs(images=7, total=20, seed=3)
    items = [order[k] for k in range(20)]
    assert sorted(items[:7]) == sorted(items[7:14]) == list(range(7))
    assert items[:7] != items[7:14]
    assert items[:7] == np.random.default_rng((3, 0)).permutation(7).tolist()


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(TokenGameError, match="33 images a batch cannot be shared evenly by 2"):
        Processes(2, 0).local_batch(33)


def run(command, *flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def learned(images, tmp_path_factory):
    """The documents, by number of processes, of the same short training."""
    found = {}
    for name, command in {"one": COMMAND, "two": LAUNCH}.items():
        output = tmp_path_factory.mktemp(name) / "policy.safetensors"
        flags = ["--updates", "3", "--batch-size", "6", "--dtype", "float32", "--workers", "0"]
        files = ["--backbone", "fashion", "--images", str(images), "--output", str(output), "--device", "cpu"]
        found[name] = run(command, "train", *flags, *files, "--json")
    return found


def test_two_processes_make_the_update_of_one(learned):
    """Over gloo, with advantages normalised over both, the controller steered by both, and one that writes."""
    one, two = learned["one"], learned["two"]
    mine, ours = (Policy.load(document["policy"]).actor.state_dict() for document in (one, two))
    for name, weight in mine.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=1e-3)
    logs = [Path(document["policy"]).with_name("policy_log") / "metrics.jsonl" for document in (one, two)]
    logged, reduced = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    assert len(logged) == len(reduced) == 3, "one process writes"
    for line, other in zip(logged, reduced, strict=True):
        for name in ("game/kl", "game/gmacs_ratio", "game/agreement", "charts/kl_weight"):
            assert line[name] == pytest.approx(other[name], rel=1e-3), name
    assert two["images_seen"] == one["images_seen"] == 18
    assert two["images"] == one["images"] == 6, "held-back images are measured once"
    assert two["gmacs_ratio"] == pytest.approx(one["gmacs_ratio"], rel=1e-3)
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-2)


def test_two_processes_tune_as_one(learned, images, tmp_path):
    found = {}
    for name, command in {"one": COMMAND, "two": LAUNCH}.items():
        flags = ["--updates", "3", "--batch-size", "6", "--dtype", "float32", "--workers", "0", "--dial", "0.9",
                 "--opt", "sgd", "--lr", "0.01", "--warmup", "0"]  # fmt: skip
        files = ["--backbone", "fashion", "--images", str(images), "--policy", learned["one"]["policy"]]
        found[name] = run(command, "finetune", *flags, *files, "--output", str(tmp_path / name), "--json")
    native = load_model("fashion").state_dict()
    tuned = [load_file(found[name]["model"]) for name in ("one", "two")]
    one, two = (torch.cat([(weights[key] - native[key]).flatten() for key in native]) for weights in tuned)
    assert float(one.norm()) > 1e-3, "something was learned"
    assert float((one - two).norm()) < 0.01 * float(one.norm())
    for when in ("before", "after"):
        assert found["two"][when]["images"] == 6
        assert found["two"][when]["kl"] == pytest.approx(found["one"][when]["kl"], rel=1e-3)


class Slice:
    """Process `rank` of two, whose sums are looked up in what the whole batch gives."""

    size = 2

    def __init__(self, rank, others):
        self.rank, self.others = rank, others

    def sum(self, values):
        return values + self.others.pop(0)


def test_advantages_are_normalised_over_all_processes():
    advantages = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    acting = torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    whole = normalise(advantages, acting)
    other = advantages[:, 4:][acting[:, 4:]]
    mean = advantages[acting].mean()
    others = [torch.stack([other.sum(), torch.tensor(float(len(other)))]), ((other - mean) ** 2).sum()]
    half = normalise(advantages[:, :4], acting[:, :4], Slice(0, others))
    torch.testing.assert_close(half, whole[:, :4])


def train(images, output, *flags):
    files = ["--backbone", "fashion", "--images", str(images), "--output", str(output), "--device", "cpu"]
    config = ["--updates", "14", "--batch-size", "4", "--workers", "1", "--checkpoint-every", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "train", *files, *config, *flags]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for(lines, log, process):
    """Until so many updates are recorded, however long that takes."""
    metrics = log / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < lines:
        assert process.poll() is None, "it stopped by itself"
        time.sleep(0.01)


def test_a_run_that_was_killed_and_resumed_is_bitwise_one_that_was_not(images, tmp_path):
    """SIGKILL twice, between checkpoints; then SIGTERM, which saves. Policy and metrics.jsonl have the same bytes."""
    whole, cut = tmp_path / "whole" / "policy.safetensors", tmp_path / "cut" / "policy.safetensors"
    assert train(images, whole).wait() == 0
    log = tmp_path / "cut" / "policy_log"
    for number, (lines, how) in enumerate([(4, signal.SIGKILL), (8, signal.SIGKILL), (11, signal.SIGTERM)]):
        process = train(images, cut, *["--resume"] * bool(number))
        wait_for(lines, log, process)
        os.killpg(process.pid, how)  # the workers too, as launchers and batch systems do
        code = process.wait()
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 128 + signal.SIGTERM)
        saved = torch.load(log / "checkpoint.pt", weights_only=True)["step"]
        assert saved % 3 == 0 if how == signal.SIGKILL else saved >= lines, "SIGTERM saves the last whole update"
    assert train(images, cut, "--resume").wait() == 0
    assert cut.read_bytes() == whole.read_bytes()
    metrics = [(path.with_name("policy_log") / "metrics.jsonl").read_bytes() for path in (whole, cut)]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 14
