"""Run every timm VisionTransformer through the game once, at its own width, and write docs/models.md: minutes.

With every token kept the output must be the native model's. Two blocks of each, random weights, one image; images of
more than 30 patches a side are made smaller. `python runs/timm_models.py`
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import timm
import torch
from rich.progress import track

from tokengame.backbones import wrap
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PROSE = """# Models

This page answers one question: does tokengame run my model?

It runs plain timm Vision Transformers (`VisionTransformer` and the distilled DeiT): ViT, DeiT, DeiT III, DINOv2,
SigLIP, CLIP, AIMv2 and BEiT v3, with registers, any pooling, any input size and any patch size. A model that cannot be
run exactly is refused with the reason. That includes Swin, hybrids, rotary positions and parallel blocks.
"""


def refusal(name: str) -> str | None:
    """The sentence with which a model is refused."""
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    try:
        wrap(model)
    except TokenGameError as error:
        return str(error)
    return None


@torch.inference_mode()
def error(name: str) -> float:
    """Relative distance of the output with every token kept from the native one."""
    full = timm.get_pretrained_cfg(name).input_size[1]
    with torch.device("meta"):
        side = wrap(timm.create_model(name, depth=1)).patch_size[0]
    size = {"img_size": 16 * side} if full > 30 * side else {}
    model = timm.create_model(name, depth=2, **size).eval()
    for key, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.add_(0.1 * noise + 0.5 * key.endswith("gamma")) if parameter.ndim == 1 else parameter.copy_(
            0.03 * noise
        )
    images = torch.randn(1, *model.patch_embed.proj.weight.shape[1:2], *model.patch_embed.img_size)
    game, native = TokenGame(wrap(model), GameConfig(stages=(1,))), model(images)
    found = game.predict(game.play(images, lambda obs: torch.ones(len(obs.token))))
    return float((found - native).norm() / native.norm())


def main() -> None:
    """Measure all and write the page."""
    torch.manual_seed(0)
    names = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")
    works, refused = {}, defaultdict(list)
    for name in track(names, "models"):
        reason = refusal(name)
        if reason is None:
            works[name] = error(name)
        else:
            refused[reason].append(name)
    worst = max(works, key=works.__getitem__)
    lines = [
        PROSE,
        f"The lists below are written by `python runs/timm_models.py` (timm {timm.__version__}, torch "
        f"{torch.__version__.split('+')[0]}): every variant of timm's",
        "`vision_transformer` and `deit` at its own width, with two blocks and random weights.",
        "",
        f"**{len(works)} work.** With every token kept the output differs from the native model's by at most "
        f"{works[worst]:.1e} of its norm (`{worst}`):",
        "",
        ", ".join(f"`{name}`" for name in works),
        "",
        f"**{sum(map(len, refused.values()))} are refused**, with these sentences:",
        "",
        *(f"- {reason}: {', '.join(f'`{n}`' for n in some)}" for reason, some in refused.items()),
    ]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
