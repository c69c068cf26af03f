import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file

from tokengame import kernels
from tokengame.cli.main import main
from tokengame.config import GAME_VERSION, TrainConfig, with_overrides
from tokengame.kernels.library import LEVELS, loaded
from tokengame.learning.trainer import Trainer
from tokengame.packed.layout import RaggedLayout
from tokengame.policies import Policy
from tokengame.policies.networks import build_actor
from tokengame.policies.policy import FORMAT, card_shape, fingerprint

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
# under `pytest -n` processes share the cores: threads that wait for each other on a busy core take many times as long
THREADS = max(1, min(2, CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of commands that tests start; workers inherit another number
settings.register_profile("shared", deadline=None, derandomize=True)  # machines are shared, failures must repeat
settings.load_profile("shared")
REAL = Path(os.environ.get("TOKENGAME_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def two_threads():
    """What must be the same bytes must be so when threads share the work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not (REAL / "imagenet_sample.tar").is_file():
        pytest.skip(f"no real weights and images at {REAL}; point TOKENGAME_REAL_DATA at them")
    return REAL


def tiny_vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **changes):
    """A timm ViT small enough for a test, with random weights that are not nearly zero."""
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    if "map" in str(changes.get("global_pool")):
        settings["depth"] = 3
    model = timm.create_model(name, **(settings | changes)).eval()
    randomise(model, seed, std=0.15)
    return model


def randomise(model, seed: int = 0, std: float = 0.03) -> None:
    """Random weights under which every part matters: timm's LayerScale starts at nearly nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.1 * noise) if parameter.ndim == 1 else parameter.data.copy_(std * noise)
        if name.endswith("gamma"):
            parameter.data.add_(0.5)


@pytest.fixture
def model():
    return tiny_vit()


def policy_for(model, transition="merge"):
    """An untrained policy that prunes about a third at each of two stages."""
    config = with_overrides(
        TrainConfig.from_preset("tokengame"), {"game": {"stages": (1, 2), "transition": transition}}
    )
    trainer = Trainer(model, replace(config, dtype="float32"))
    shape = trainer.backbone.shape()
    card = {
        "format": FORMAT, "game_version": GAME_VERSION,
        "backbone": {"name": "tiny", "shape": shape, "fingerprint": fingerprint(trainer.backbone)},
        "game": {"stages": [1, 2], "transition": transition},
        "actor": {"observation": "context", "hidden": [32]}, "agents": 16, "training": {},
        "calibration": [], "dial": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    return Policy(build_actor(config.actor, card_shape(card)).eval(), card)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Weights, labelled images and a policy for the small model that is timm's by name."""
    root = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), root / "weights.safetensors")
    for name in "abcde":
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng((i, ord(name))).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    flags = ["--backbone", "vit_tiny_patch16_224", "--weights", str(root / "weights.safetensors"),
             "--images", str(root / "images"), "--workers", "0"]  # fmt: skip
    small = ["--updates", "2", "--batch-size", "4"]
    assert main(["train", *flags, *small, "--output", str(root / "policy.safetensors"), "--rollouts", "2"]) == 0
    return root, flags, small


# Models and rows for the compiled kernels


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="tokengame was installed without a C++ compiler")


@pytest.fixture(scope="module", params=LEVELS[1 : loaded().highest + 2])
def level(request):
    """Instructions that the kernels are held to, of those that this processor has."""
    with kernels.limited(request.param):
        yield request.param


def half_vit(seed=0, **changes):
    return tiny_vit(seed, **({"embed_dim": 64, "num_heads": 2} | changes)).bfloat16()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layout_of(counts):
    return RaggedLayout(counts, torch.device("cpu"))


def off(found, exact):
    """How far off, as a share."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
