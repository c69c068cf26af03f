"""The pictures of docs/embeddings.md and docs/dense.md: DINOv2 ViT-S/14, native beside pruned without training.

    python runs/tutorial_pictures.py --images flickr_sample.tar --weights vit_small_patch14_dinov2.safetensors

The archive holds photos and their authors in ATTRIBUTION.csv (image, author, page, licence). The first photos are
shown, whatever comes out. Prints the authors of all that is shown, for docs/embeddings.md.
"""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

import tokengame
from tokengame.backbones import load_model, preprocessing_of
from tokengame.data.transforms import transform_for

SIDE, GAP = 104, 12


@dataclass
class Pictures:
    images: Path
    """archive of photos"""
    weights: Path
    backbone: str = "vit_small_patch14_dinov2"
    gmacs_ratio: float = 0.6
    photos: int = 200
    """in the index; the first are the queries"""
    shown: int = 4
    """queries, and photos whose features are drawn"""
    nearest: int = 4
    output: Path = Path("docs")


@dataclass
class Photo:
    name: str
    image: Image.Image
    author: str
    page: str

    def thumbnail(self) -> Image.Image:
        return self.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def read_photos(archive: Path, number: int) -> list[Photo]:
    """The first photos of the archive, each with its author."""
    with tarfile.open(archive) as tar:
        listed = tar.extractfile("ATTRIBUTION.csv")
        assert listed is not None
        rows = {row["image"]: row for row in csv.DictReader(io.TextIOWrapper(listed, "utf-8"))}
        found = []
        for member in tar:
            name = PurePosixPath(member.name).stem
            if name in rows and len(found) < number:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
                found.append(Photo(name, image, _unescaped(rows[name]["author"]), rows[name]["page"]))
    return found


def _unescaped(name: str) -> str:
    """Bytes beyond ASCII are written as octal numbers, \\303\\244."""
    return name.encode("latin-1").decode("unicode_escape").encode("latin-1").decode("utf-8")


def in_batches(call, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([call(part) for part in images.split(20)])


def embeddings(photos: list[Photo], native: Tensor, pruned: Tensor, args: Pictures) -> list[int]:
    """Draw queries, and the photos nearest to each by native and by pruned embeddings; returns what is shown."""
    height, width = args.shown * (SIDE + GAP) - GAP, (2 * args.nearest + 1) * SIDE + 2 * GAP
    canvas, shown = Image.new("RGB", (width, height), "white"), []
    for query in range(args.shown):
        places = [(query, 0)]
        for side, features in enumerate((native, pruned)):
            near = (features[query] @ features.T).index_fill(0, torch.tensor(query), -1).topk(args.nearest).indices
            left = SIDE + GAP + side * (args.nearest * SIDE + GAP)
            places += [(photo, left + place * SIDE) for place, photo in enumerate(near.tolist())]
        for photo, left in places:
            canvas.paste(photos[photo].thumbnail(), (left, query * (SIDE + GAP)))
            shown.append(photo)
    canvas.quantize(128).save(args.output / "embeddings.png", optimize=True)
    return shown


def dense(photos: list[Photo], native: Tensor, pruned: Tensor, args: Pictures) -> None:
    """Draw three principal components of native patch features [n, N, C], and the same map of pruned ones."""
    flat = native.flatten(0, 1)
    centre, axes = flat.mean(0), torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3]
    low, high = torch.quantile((flat - centre) @ axes.T, torch.tensor([0.02, 0.98]), dim=0)
    canvas = Image.new("RGB", (args.shown * (SIDE + GAP) - GAP, 3 * (SIDE + GAP) - GAP), "white")
    for number in range(args.shown):
        pictures = [photos[number].thumbnail()]
        for features in (native, pruned):
            colours = (((features[number] - centre) @ axes.T - low) / (high - low)).clamp(0, 1)
            side = round(len(colours) ** 0.5)
            pixels = (colours.view(side, side, 3) * 255).numpy().astype(np.uint8)
            pictures.append(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST))
        for row, picture in enumerate(pictures):
            canvas.paste(picture, (number * (SIDE + GAP), row * (SIDE + GAP)))
    canvas.quantize(256).save(args.output / "dense.png", optimize=True)


def load(args: Pictures) -> nn.Module:
    """The model at 224 pixels; its weights are of 518."""
    model = load_model(args.backbone, str(args.weights)).float()
    model.set_input_size(img_size=224)  # type: ignore[operator]
    return model.eval()


def main(args: Pictures) -> None:
    photos, model = read_photos(args.images, args.photos), load(args)
    prepare = transform_for(preprocessing_of(model) | {"crop_pct": 1.0}, train=False)
    images = torch.stack([prepare(photo.image) for photo in photos])
    fast = tokengame.prune(model, gmacs_ratio=args.gmacs_ratio)
    found = [normalize(in_batches(call, images)) for call in (model, fast)]
    shown = embeddings(photos, *found, args)
    first, prefix = images[: args.shown], fast.game.backbone.prefix
    restored = partial(fast.forward_features, fill="absorber")
    features = [in_batches(call, first) for call in (model.forward_features, restored)]
    dense(photos, *(part[:, prefix:] for part in features), args)
    for name, values in {"cosine": (found[0] * found[1]).sum(1), "dense cosine": cosines(features, prefix)}.items():
        print(f"{name} {values.mean():.4f}")
    for photo in sorted({photos[number].name: photos[number] for number in shown}.values(), key=lambda p: p.author):
        print(f"[{photo.author}]({photo.page})", end=", ")


def cosines(features: list[Tensor], prefix: int) -> Tensor:
    return torch.cosine_similarity(*(part[:, prefix:] for part in features), dim=2)


if __name__ == "__main__":
    main(tyro.cli(Pictures))
