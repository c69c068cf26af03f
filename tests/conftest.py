import os
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("shared", deadline=None, derandomize=True)  # machines are shared, failures must repeat
settings.load_profile("shared")
REAL = Path(os.environ.get("TOKENGAME_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


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
