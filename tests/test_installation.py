"""What is installed and imported: the wheel's parts, and packages that wait until they are used."""

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_kernels

import tokengame
from tokengame.data.scenes import load_photos
from tokengame.distributed import join_processes
from tokengame.errors import TokenGameError
from tokengame.learning.checkpoint import RunFolder

PACKAGE = Path(tokengame.__file__).parent
HEAVY = (
    "accelerate", "tensorboard", "matplotlib", "scipy", "braceexpand", "transformers", "datasets", "open_clip", "onnx",
    "onnxruntime", "openvino", "gradio", "tokengame.cli", "tokengame.measure", "tokengame.learning", "tokengame.report",
)  # fmt: skip
LOADED = """
import sys
import {first}
before = set(sys.modules)
import tokengame
{then}
print(*sorted(set(sys.modules) - before))
"""


def loaded(first, then=""):
    """The modules that are imported after `first`."""
    code = LOADED.format(first=first, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else():
    assert loaded("typing") <= {"tokengame", "tokengame.errors", "warnings", "__future__"}


def test_pruning_imports_nothing_that_it_does_not_use():
    then = """
import torch
fast = tokengame.prune(timm.create_model("vit_tiny_patch16_224", depth=6), dial=0.5)
fast(torch.rand(1, 3, 224, 224))
"""
    names = loaded("torch, timm", then)
    assert "tokengame.runtime.pruned" in names
    assert not [name for name in names if name.startswith(HEAVY)]


def without(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_without_tensorboard_a_run_is_recorded_all_the_same(tmp_path, monkeypatch):
    without(monkeypatch, "tensorboard")
    run = RunFolder(tmp_path, "run")
    run.start({})
    run.recorder(0)(1, {"losses/policy": 0.5, "time/update": 2.0})
    assert run.metrics() == [{"update": 1, "losses/policy": 0.5}]
    assert run.timings() == [{"update": 1, "time/update": 2.0}]
    assert not list(tmp_path.glob("events.*"))


def test_several_processes_without_accelerate_are_one_sentence(monkeypatch):
    without(monkeypatch, "accelerate")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TokenGameError, match=r"pip install 'tokengame\[train\]'"):
        join_processes("cpu")


def test_the_packaged_photos_are_those_of_version_0_14():
    """However they are compressed: scenes, and so every figure on them, stay the same."""
    digest = hashlib.sha256()
    for split, number in (("train", 5000), ("test", 2000)):
        photos = load_photos(split)
        assert photos.images.shape == (number, 28, 28)
        assert photos.images.dtype == photos.labels.dtype == np.uint8
        digest.update(photos.images.tobytes() + photos.labels.tobytes())
    assert digest.hexdigest().startswith("e3595a3619b0b740")


@needs_kernels
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_and_pytorch_share_one_openmp():
    code = "import torch, tokengame; assert tokengame.kernels.status().active; print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    paths = {line.split()[-1] for line in done.stdout.splitlines() if "/lib" in line}
    assert "_kernels.so" in done.stdout
    assert len([path for path in paths if "gomp" in path or "omp5" in path or "iomp" in path]) == 1


def test_training_and_engines_are_extras():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"]
    assert not [line for line in needed if line.startswith(("tensorboard", "accelerate", "onnx", "transformers"))]
