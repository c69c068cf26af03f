"""Train the embedded backbone: a plain timm ViT (width 96, 8 blocks, patch 8) on fashion scenes, from scratch.

    python runs/fashion_backbone.py --photos /usr/share/datasets/fashion-mnist

Curriculum, cheapest tokens first: scenes on a 56 x 56 canvas (49 tokens), then 112 x 112 (196 tokens) with resampled
position embeddings and half of the patches dropped. 70 minutes on 2 cores beside other work; 84.05 % of 2,000 scenes.
Writes the float16 weights and the packaged subset of photos (a fixed seed picks them) into tokengame/assets/.
"""

import argparse
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropout
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, Dataset

from tokengame.data.scenes import FashionScenes, Photos, load_photos

ASSETS = Path(__file__).parents[1] / "tokengame" / "assets"
# (canvas, clutter, item's share of the canvas, patch dropout, images, peak learning rate)
PHASES = [
    (56, 0.3, (0.45, 0.95), 0.0, 450_000, 2e-3),
    (112, 1.0, (0.28, 0.94), 0.5, 180_000, 1.2e-3),
]


class Tensors(Dataset):
    def __init__(self, scenes: FashionScenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        scene = self.scenes[index]
        pixels = torch.from_numpy(np.asarray(scene.image, np.float32) / 127.5 - 1)
        return pixels.expand(3, -1, -1), scene.label


def build(size: int) -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, embed_dim=96, depth=8, num_heads=3, num_classes=10
    )


def run_phase(model, number: int, phase, photos: Photos, batch: int, optimizer_name: str, scale: float):
    size, clutter, share, dropout, images, lr = phase
    scenes = FashionScenes(
        "train", int(images * scale), seed=100 + number, size=size, item_share=share, clutter=clutter, photos=photos
    )
    model.patch_drop = PatchDropout(dropout, num_prefix_tokens=1) if dropout else torch.nn.Identity()
    optimizer = create_optimizer_v2(model, opt=optimizer_name, lr=lr, weight_decay=0.05)
    steps = len(scenes) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], steps, pct_start=0.1, div_factor=20
    )
    ema = ModelEmaV3(model, decay=0.998)
    loader = DataLoader(Tensors(scenes), batch, num_workers=1, drop_last=True)
    start, running = time.time(), 0.0
    for step, (pixels, labels) in enumerate(loader, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=size > 56):
            loss = F.cross_entropy(model.train()(pixels).float(), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update(model)
        running += 0.02 * (loss.item() - running) if step > 1 else loss.item()
        if step % 100 == 0 or step == steps:
            speed = step * batch / (time.time() - start)
            eta = (steps - step) * batch / speed / 60
            print(
                f"phase {number} step {step}/{steps} loss {running:.3f} {speed:.0f} images/s {eta:.0f} min left",
                flush=True,
            )
    return ema.module


@torch.inference_mode()
def accuracy(model, size: int, count: int, photos: Photos) -> float:
    model.eval()
    phase = PHASES[0] if size == 56 else PHASES[-1]
    scenes = FashionScenes("test", count, seed=7, size=size, item_share=phase[2], clutter=phase[1], photos=photos)
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(Tensors(scenes), 100, num_workers=1))
    return hits / count


def package_photos(folder: str, train: int = 5000, test: int = 2000):
    """A fixed random subset of each split, taken from that split alone."""
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        photos = load_photos(split, folder)
        chosen = np.sort(np.random.default_rng(0).choice(len(photos.labels), count, replace=False))
        arrays |= {f"{split}_images": photos.images[chosen], f"{split}_labels": photos.labels[chosen]}
    with zipfile.ZipFile(ASSETS / "fashion_photos.npz", "w") as file:  # as np.savez, which has no LZMA: 0.4 MB less
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_LZMA)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--optimizer", default="muon", help="any name timm knows")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to train on")
    parser.add_argument("--out", default=str(ASSETS / "fashion_vit.safetensors"))
    parser.add_argument(
        "--from-phase", type=int, default=0, help="go on from the weights in --out, phases before it done"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    package_photos(args.photos)
    train, test = load_photos("train", args.photos), load_photos("test", args.photos)
    state = load_file(args.out) if args.from_phase else None
    for number, phase in enumerate(PHASES):
        if number < args.from_phase:
            continue
        model = build(phase[0])
        if state is not None:
            # timm resamples the position embedding when the canvas grows
            state = {k: v.float() for k, v in state.items()}
            state = timm.models.vision_transformer.checkpoint_filter_fn(
                state, model, interpolation="bicubic", antialias=False
            )
            model.load_state_dict(state)
        model = run_phase(model, number, phase, train, 128, args.optimizer, args.scale)
        model.patch_drop = torch.nn.Identity()
        print(f"phase {number} test accuracy {accuracy(model, phase[0], 2000, test):.4f}", flush=True)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        save_file({k: v.half() for k, v in state.items()}, args.out)


if __name__ == "__main__":
    main()
