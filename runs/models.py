"""Which models run: every architecture once at its own width, two blocks, random weights, small images; minutes.

Of timm, Hugging Face transformers, torchvision and open_clip.

With every token kept the output must be the native model's, and a random game must give what the native model gives
with attention masks. Writes `results/models.json` as it goes on, and goes on from it; at the end docs/models.md.
`python runs/models.py` (delete results/models.json to measure anew; `--modules eva beit` for some of timm's)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import torchvision
from rich.progress import track

from tokengame.backbones import Backbone, wrap
from tokengame.backbones.hf_kinds import IMPOSSIBLE, KINDS
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.game.testing import masked_features, played_features

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "results" / "models.json"
TIMM = {
    "vision_transformer": "ViT, DINOv2, CLIP, SigLIP, AIMv2, BEiT v3, RADIO, parallel blocks",
    "deit": "DeiT, distilled too, DeiT III",
    "eva": "EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2",
    "beit": "BEiT, BEiT v2",
    "naflexvit": "NaFlexViT, called with images",
    "vision_transformer_hybrid": "ViT on ResNet or convolutional stems",
    "vision_transformer_relpos": "ViT with relative positions",
    "vitamin": "ViTamin",
    "vision_transformer_sam": "SAM's image encoder",
    "cait": "CaiT",
    "xcit": "XCiT",
    "gemma4_vit": "Gemma 4's image encoder",
    "qwen3_vit": "Qwen 3's image encoder",
    "deepseek_vit": "DeepSeek's image encoder",
}
"""modules of timm, and what they hold"""
FAMILIES = {
    "Hugging Face": "ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, ViTMAE, ViTMSN, I-JEPA, AIMv2, by class",
    "torchvision": "VisionTransformer",
    "open_clip": "its own image towers; those of timm are as in timm",
}
SIDE = 6
"""patches of an image, each way"""
PROSE = """# Models

This page answers one question: does tokengame run my model?

It runs plain Vision Transformers, with any pooling but none, any patch size and any input size that the model takes:
absolute, rotary and relative positions, registers, norms before or after, parallel blocks, convolutional stems. A model
that cannot be run exactly is refused with the reason: `tokengame doctor --backbone NAME` says it for one of timm's.
"""


class Found(NamedTuple):
    """What was found of an architecture that is exact."""

    difference: float
    """largest relative difference from the native model"""
    one_call: bool
    """whether the compiled kernels play whole games"""


class Row(NamedTuple):
    """One family of models, as the table shows it."""

    library: str
    family: str
    exact: dict[str, Found]
    """by architecture"""
    weights: int
    """pretrained weights of those architectures"""
    refused: dict[str, list[str]]
    """architectures, by the sentence with which they are refused"""


def small(name: str) -> torch.nn.Module:
    """Two blocks of an architecture for images of few patches, without weights."""
    depth: dict[str, Any] = {"depth": 2}
    if "sapiens2" in name:
        depth["num_kv_heads"] = 2  # timm has a number for each of its blocks
    with torch.device("meta"):
        model = timm.create_model(name, **depth)
        if hasattr(model, "patch_embed") and wrap(model):
            patch, stem = model.patch_embed.feat_ratio(as_scalar=False), model.patch_embed.patch_size
            size = tuple(SIDE * side for side in patch)
            own = {} if patch == stem else {"patch_size": stem}
            model = timm.create_model(name, **depth, img_size=size, **own)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random weights under which every part matters."""
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.03)
        if name.endswith(("gamma", "gamma_1", "gamma_2")) or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.add_(0.5)


@torch.no_grad()
def of_timm(name: str) -> torch.nn.Module:
    """An architecture of timm, two blocks, random weights.

    Raises:
        TokenGameError: the model is refused.
    """
    model = small(name).eval()
    wrap(model)
    fill(model)
    return model


@torch.no_grad()
def found_of(model: torch.nn.Module) -> Found:
    """The larger relative difference: all tokens kept and native, a random game and native attention with masks.

    Raises:
        TokenGameError: the model is refused.
    """
    backbone = wrap(model)
    size = [SIDE * side for side in backbone.patch_size]
    images = torch.randn(1, getattr(model, "in_chans", 3), *size)
    game = TokenGame(backbone, GameConfig(stages=(1,)))
    found = game.predict(game.play(images, lambda obs: torch.ones(len(obs.token))))
    wrong = max(distance(found, backbone.native(images)), masked_difference(backbone, images))
    return Found(wrong, game.backend_for(images).name == "compiled")


def masked_difference(backbone: Backbone, images: torch.Tensor) -> float:
    """Relative difference of the features of the tokens that a random game leaves."""
    game = TokenGame(backbone, GameConfig(stages=(1,), transition="drop"), keep_patches=True)
    table = torch.randn(1, len(images), SIDE**2)
    calls = len(getattr(backbone.blocks[0], "attns", [None]))  # attentions of a block
    found, there = played_features(game, images, table)
    return distance(found[there], masked_features(backbone, (1,), images, table, calls)[there])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure(modules: list[str]) -> dict[str, Any]:
    """Measure what `RESULTS` has not, and add it there: for each architecture `Found` or a sentence."""
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    names = [name for module in modules for name in timm.list_models(module=module) if name not in known]
    for name in track(names, "models"):
        torch.manual_seed(0)
        try:
            known[name] = found_of(of_timm(name))
        except TokenGameError as refused:
            known[name] = str(refused)
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return known


def others() -> Iterator[tuple[str, str, Callable[[], torch.nn.Module]]]:
    """Library, name and maker of the models of other libraries: two blocks, small images, random weights."""
    for name in (*KINDS, *IMPOSSIBLE):
        yield "Hugging Face", name, partial(of_transformers, name)
    for name in torchvision.models.list_models():
        if name.startswith("vit_"):
            yield "torchvision", name, partial(of_torchvision, name)
    for name in open_clip.list_models():
        if "timm_model_name" not in open_clip.get_model_config(name)["vision_cfg"]:
            yield "open_clip", name, partial(of_open_clip, name)


def of_transformers(name: str) -> torch.nn.Module:
    import transformers

    kind = getattr(transformers, name)
    config = kind.config_class()
    vision = getattr(config, "vision_config", config)
    vision.num_hidden_layers, vision.image_size = 2, SIDE * vision.patch_size
    if hasattr(vision, "mask_ratio"):
        vision.mask_ratio = 0.0
    named = {"add_pooling_layer": False} if name == "IJepaModel" else {}
    return randomised(kind(config, **named))


def of_torchvision(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        whole = torchvision.models.get_model(name)
    heads = whole.encoder.layers[0].self_attention.num_heads
    size = {"image_size": SIDE * whole.patch_size, "patch_size": whole.patch_size}
    width = {"hidden_dim": whole.hidden_dim, "mlp_dim": whole.mlp_dim, "num_heads": heads, "num_layers": 2}
    return randomised(torchvision.models.VisionTransformer(**size, **width))


def of_open_clip(name: str) -> torch.nn.Module:
    config = open_clip.get_model_config(name)
    vision = open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    if not isinstance(vision.layers, int):
        raise TokenGameError("ModifiedResNet has no tokens to prune")
    vision.layers, vision.image_size = 2, SIDE * vision.patch_size
    tower = open_clip.model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    return randomised(tower)


@torch.no_grad()
def randomised(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.1 if parameter.ndim < 2 else 0.03)
        if parameter.ndim < 2 and name.endswith(("weight", "lambda1", "gamma", "probe")):
            parameter.add_(0.5)
    return model.eval()


def other_rows(known: dict[str, Any]) -> list[Row]:
    """Measure the models of other libraries; a row for each library."""
    rows = {}
    for library, name, make in track(list(others()), "other libraries"):
        row = rows.setdefault(library, Row(library, FAMILIES[library], {}, 0, {}))
        key = f"{library}: {name}"
        if key not in known:
            torch.manual_seed(0)
            try:
                known[key] = found_of(make())
            except TokenGameError as refused:
                known[key] = str(refused)
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        found = known[key]
        if isinstance(found, str):
            row.refused.setdefault(found, []).append(name)
        else:
            row.exact[name] = Found(*found)
    return list(rows.values())


def timm_rows(known: dict[str, Any]) -> list[Row]:
    """A row for each module of timm."""
    rows = []
    for module, family in TIMM.items():
        found = {name: known[name] for name in timm.list_models(module=module) if name in known}
        exact = {name: Found(*value) for name, value in found.items() if not isinstance(value, str)}
        refused: dict[str, list[str]] = {}
        for name in found.keys() - exact.keys():
            refused.setdefault(found[name], []).append(name)
        tags = [tag.split(".")[0] for tag in timm.list_models(module=module, pretrained=True)]
        rows.append(Row("timm", f"{family} (`{module}`)", exact, sum(tag in exact for tag in tags), refused))
    return rows


def page(rows: list[Row]) -> str:
    """The page: a table of families, then names."""
    worst, name = max((value.difference, name) for row in rows for name, value in row.exact.items())
    of_timm = [row for row in rows if row.library == "timm"]
    exact, weights = sum(len(row.exact) for row in of_timm), sum(row.weights for row in of_timm)
    lines = [
        PROSE,
        f"**{exact} architectures and {weights} pretrained weights of timm are exact** (timm {timm.__version__}, torch "
        f"{torch.__version__.split('+')[0]}). `python",
        "runs/models.py` makes each at its own width, with two blocks and random weights. With every token kept",
        "the output is compared with the native model's, and the features of a random game with the native model's",
        f"under attention masks. The largest difference is {worst:.1e} of the norm (`{name}`).",
        "",
        "| library | family | architectures exact | of these in one call | pretrained weights | refused |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.library} | {row.family} | {len(row.exact)} | {sum(found.one_call for found in row.exact.values())} | "
        f"{row.weights or ''} | {sum(map(len, row.refused.values()))} |"
        for row in rows
    ]
    lines += [
        "",
        "In one call: the [compiled kernels](kernels.md) run whole games on CPUs. Others run a step at a time.",
    ]
    lines += ["", "## Refused", ""]
    for row in rows:
        lines += [f"- {why.split('; `tokengame')[0]}: {listed(names)}" for why, names in sorted(row.refused.items())]
    for row in rows:
        lines += ["", f"## {row.family}", "", listed(row.exact)] if row.exact else []
    return "\n".join(lines) + "\n"


def listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def main() -> None:
    """Measure all and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", default=list(TIMM), help="of timm")
    known = measure(parser.parse_args().modules)
    PAGE.write_text(page(timm_rows(known) + other_rows(known)))


if __name__ == "__main__":
    main()
