"""docs/tokens_photos.png and docs/demo.png: what the policy of ViT-Ti/16 keeps of photos, and a screenshot of the page.

    python runs/photo_pictures.py --images flickr_sample.tar --weights vit_tiny_patch16_224.safetensors

The archive holds photos and their authors in ATTRIBUTION.csv (image, author, page, licence). A rule says which are
shown: of all photos, sorted by the compute that they take, the first, the last and others evenly spread between; on the
page the examples that the command draws. The authors of what is shown are written to results/photos/, as Markdown. The
screenshot needs chromium and selenium.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

import torch
import tyro
from PIL import Image, ImageDraw
from tutorial_pictures import Photo, read_photos

import tokengame
from tokengame.backbones import load_model, preprocessing_of, wrap
from tokengame.data.batches import Batch
from tokengame.data.datasets import open_images
from tokengame.data.given import some_of
from tokengame.data.transforms import transform_for
from tokengame.report.class_names import class_names
from tokengame.report.gallery import Drawing, draw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, chromium  # noqa: E402

GAP, LINE, TEXT = 28, 24, 15
LICENCE = "https://creativecommons.org/licenses/by/2.0/"


@dataclass
class Pictures:
    images: Path
    """archive of photos"""
    weights: Path
    backbone: str = "vit_tiny_patch16_224"
    policy: str = "vit_tiny_patch16_224"
    shown: int = 6
    """photos in docs/tokens_photos.png, in two columns"""
    side: int = 112
    """height of a panel in pixels"""
    examples: int = 9
    """photos on the page"""
    port: int = 7861
    output: Path = Path("docs")
    authors: Path = Path("results/photos")


def main(args: Pictures) -> None:
    args.authors.mkdir(parents=True, exist_ok=True)
    photos, model = read_photos(args.images, 10**6), load_model(args.backbone, str(args.weights))
    prepare = transform_for(preprocessing_of(model), train=False)
    images = torch.stack([prepare(photo.image) for photo in photos])
    fast = tokengame.prune(model, args.policy)
    chosen = spread(fast, images, args.shown)
    drawings = draw(fast, Batch(images[chosen], None, torch.tensor(chosen)), args.side)
    names = class_names(wrap(model))
    picture = in_columns([titled(drawing, names) for drawing in drawings], 2)
    picture.quantize(256).save(args.output / "tokens_photos.png", optimize=True)
    write_authors(args.authors / "tokens_photos.md", [photos[number] for number in chosen])
    screenshot(args)
    write_authors(args.authors / "demo.md", on_the_page(args, model, photos))


def spread(fast: tokengame.PrunedViT, images: torch.Tensor, number: int) -> list[int]:
    """So many images, from the one that takes the least compute to the one that takes the most, at even ranks."""
    with torch.inference_mode():
        macs = torch.cat([fast.macs(fast.predict(part))[1] for part in images.split(50)])
    order = macs.argsort().tolist()
    return [order[round(rank * (len(order) - 1) / (number - 1))] for rank in range(number)]


def titled(drawing: Drawing, names: list[str]) -> Image.Image:
    """A strip below the prediction with all tokens and that with those kept."""
    picture = drawing.picture
    canvas = Image.new("RGB", (picture.width, picture.height + LINE), "white")
    canvas.paste(picture, (0, LINE))
    before, after = (f"{names[number]} {share:.0%}" for number, share in (drawing.native, drawing.pruned))
    ImageDraw.Draw(canvas).text((2, 2), f"all tokens: {before}; pruned: {after}", fill="black", font_size=TEXT)
    return canvas


def in_columns(parts: list[Image.Image], columns: int) -> Image.Image:
    """Parts of one size, row by row."""
    width, height = parts[0].width + GAP, parts[0].height + GAP // 2
    canvas = Image.new("RGB", (columns * width - GAP, -(-len(parts) // columns) * height - GAP // 2), "white")
    for number, part in enumerate(parts):
        canvas.paste(part, (number % columns * width, number // columns * height))
    return canvas


def screenshot(args: Pictures) -> None:
    """The page of `tokengame demo`, as it opens."""
    flags = {
        "backbone": args.backbone, "weights": args.weights, "images": args.images, "policy": args.policy,
        "count": args.examples, "port": args.port,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with TemporaryDirectory() as folder, subprocess.Popen([sys.executable, "-m", "tokengame", "demo", *words]) as page:
        try:
            url = f"http://127.0.0.1:{args.port}/"
            wait_for(url, page)
            file = Path(folder, "page.png")
            with chromium(Path(folder, "profile"), (1360, 960)) as browser:
                Page(browser, url)
                time.sleep(1)  # thumbnails and fonts appear
                browser.save_screenshot(str(file))
            trimmed(Image.open(file).convert("RGB")).quantize(256).save(args.output / "demo.png", optimize=True)
        finally:
            page.terminate()


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Until the page is served."""
    while process.poll() is None:
        try:
            urlopen(url).close()
            return
        except URLError:
            time.sleep(0.5)
    raise SystemExit("the page could not be served; see above")


def trimmed(picture: Image.Image, margin: int = 20) -> Image.Image:
    """Without white below."""
    box = picture.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
    assert box is not None
    return picture.crop((0, 0, picture.width, min(picture.height, box[3] + margin)))


def on_the_page(args: Pictures, model: torch.nn.Module, photos: list[Photo]) -> list[Photo]:
    """The examples that the command draws, in their order."""
    source, by_name = open_images(str(args.images)), {photo.name: photo for photo in photos}
    batches, _ = some_of(source, preprocessing_of(model), args.examples)
    return [by_name[PurePath(source.names[number]).stem] for batch in batches for number in batch.index.tolist()]


def write_authors(path: Path, photos: list[Photo]) -> None:
    """Authors with links, in the order in which their photos are shown, left to right and down."""
    linked = ",\n".join(f"[{photo.author}]({photo.page})" for photo in photos)
    path.write_text(f"Photos, left to right and down ([CC BY 2.0]({LICENCE}), cropped, patches faded):\n{linked}.\n")


if __name__ == "__main__":
    main(tyro.cli(Pictures))
