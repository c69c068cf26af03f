"""Which tokens each image kept, as strips of pictures and as a page of them (the paper's Figure 5)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokengame.data.batches import Batch
from tokengame.files import write_whole
from tokengame.report.figures import denormalise, png, strip
from tokengame.report.html import page
from tokengame.runtime import PrunedViT
from tokengame.runtime.cascade import PrunedOutput


@dataclass(frozen=True)
class Strip:
    """What one image kept."""

    picture: Image.Image
    """the input, then what is left after each stage"""
    counts: list[int]
    """tokens at the start and after each stage"""
    compute: float
    """of the native model's"""


@dataclass(frozen=True)
class Drawing(Strip):
    """One image under one method."""

    index: int
    """of the image in its source"""
    native: tuple[int, float]
    """class predicted with all tokens, and its probability"""
    pruned: tuple[int, float]
    """likewise with the tokens that were kept"""


@torch.inference_mode()
def draw(fast: PrunedViT, batch: Batch, side: int) -> list[Drawing]:
    """A drawing of each image of `batch`, cropped as the model saw it; `side` is the height of a panel in pixels."""
    weight = next(fast.model.parameters())
    images = batch.images.to(weight.device, weight.dtype)
    output = fast.predict(images)
    before, after = (logits.float().softmax(1).max(1) for logits in (fast.model(images), output.logits))
    return [
        Drawing(
            **vars(drawn),
            index=int(batch.index[number]),
            native=(int(before.indices[number]), float(before.values[number])),
            pruned=(int(after.indices[number]), float(after.values[number])),
        )
        for number, drawn in enumerate(strips(fast, images, output, side))
    ]


@torch.inference_mode()
def strips(fast: PrunedViT, images: Tensor, output: PrunedOutput, side: int) -> list[Strip]:
    """What each of [B, channels, height, width] images kept, whatever the model's output is.

    Args:
        fast: the pruned model.
        images: as the model takes them.
        output: its prediction of them.
        side: height of a panel in pixels.
    """
    game = fast.game
    kept = fast.trace(images).cpu().numpy()  # [T, B, N]
    grid = game.backbone.grid(*images.shape[2:])
    native_macs, macs = fast.macs(output)
    drawn = []
    for number, pixels in enumerate(denormalise(images, game.backbone.preprocessing())):
        shares = kept[:, number].mean(1)
        compute = float(macs[number]) / native_macs
        left = [f"block {block}: {share:.0%}" for block, share in zip(game.stages, shares, strict=True)]
        drawn.append(
            Strip(
                picture=strip(pixels, kept[:, number], grid, [f"compute {compute:.0%}", *left], side),
                counts=[kept.shape[2], *(int(n) for n in kept[:, number].sum(1))],
                compute=compute,
            )
        )
    return drawn


def write_gallery(
    path: Path, title: str, names: Sequence[str], methods: dict[str, list[Drawing]], classes: Sequence[str]
) -> None:
    """One HTML file, pictures inside: for each image the methods' strips, one below the other.

    Args:
        path: of the file.
        title: of the page.
        names: of the images, by their index.
        methods: drawings of the same images by each method.
        classes: name of each class; may be empty.
    """

    def label(found: tuple[int, float]) -> str:
        name = classes[found[0]] if found[0] < len(classes) else f"class {found[0]}"
        return f"{name}, {found[1]:.0%} sure"

    rows = []
    for together in zip(*methods.values(), strict=True):
        shown = [
            {
                "method": method,
                "picture": base64.b64encode(png(drawing.picture)).decode(),
                "counts": " → ".join(map(str, drawing.counts)),
                "compute": f"{drawing.compute:.0%}",
                "pruned": label(drawing.pruned),
                "changed": drawing.pruned[0] != drawing.native[0],
            }
            for method, drawing in zip(methods, together, strict=True)
        ]
        rows.append({"name": names[together[0].index], "native": label(together[0].native), "strips": shown})
    write_whole(path, page("gallery.html", title=title, rows=rows))


def together(methods: dict[str, list[Drawing]]) -> list[Image.Image]:
    """For each image one picture, the methods' strips below each other."""
    pictures = []
    for drawings in zip(*methods.values(), strict=True):
        shown = [drawing.picture for drawing in drawings]
        canvas = Image.new("RGB", (max(p.width for p in shown), sum(p.height for p in shown)), "white")
        top = 0
        for picture in shown:
            canvas.paste(picture, (0, top))
            top += picture.height
        pictures.append(canvas)
    return pictures
