"""This checkout beside another one (OTHER, a folder with compiled kernels of its own), call by call in turn:

    python runs/call_by_call.py --other ../before --images photos.tar --weights vit_tiny_patch16_224.safetensors

A process for each checkout; they take turns at single forward passes on the same photos, so that disturbances of the
machine affect both alike. Predictions must be the same to the bit. Times are medians.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

SETTINGS = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 8, 32)]


@dataclass
class CallByCall:
    other: Path
    """folder of the other checkout"""
    images: Path
    """folder or archive"""
    weights: str
    """of vit_tiny_patch16_224"""
    rounds: int = 40
    """calls of each checkout, for each setting"""
    threads: int = 2


class Worker:
    """A process that imports one checkout and predicts when it is told to."""

    def __init__(self, checkout: Path, args: CallByCall):
        command = [sys.executable, __file__, "--serve", str(args.images.resolve()), str(Path(args.weights).resolve())]
        own = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command, env=own, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def call(self, *request: Any) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def serve(images: str, weights: str) -> None:
    """Answer requests for predictions: seconds, and a digest of the logits."""
    from hashlib import sha256

    import torch

    import tokengame
    from tokengame.backbones import load_model, preprocessing_of
    from tokengame.data.batches import plain_views
    from tokengame.data.datasets import open_images
    from tokengame.measure.evaluate import keep_freed_memory, timed
    from tokengame.packed.attention import deterministic_attention

    keep_freed_memory()
    source = open_images(images)
    model = load_model("vit_tiny_patch16_224", weights)
    views = plain_views(source, preprocessing_of(model), range(0, len(source.names), max(1, len(source.names) // 32)))
    photos = torch.stack([views[i][1] for i in range(32)])
    ready = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        fast = tokengame.prune(load_model("vit_tiny_patch16_224", weights).to(dtype), "vit_tiny_patch16_224")
        fast.game.attention = deterministic_attention
        ready[name] = fast, photos.to(dtype)
    with torch.inference_mode():
        for line in sys.stdin:
            name, batch = json.loads(line)
            fast, pixels = ready[name]
            logits, seconds = timed(torch.device("cpu"), fast, pixels[:batch])
            digest = sha256(logits.float().numpy().tobytes()).hexdigest()
            print(json.dumps([seconds, digest]), flush=True)


def main(args: CallByCall) -> int:
    """Time both, print a table; 1 where a prediction differs."""
    here = Path(__file__).parents[1]
    workers, differ = {"before": Worker(args.other, args), "after": Worker(here, args)}, False
    print("format    batch   before ms   after ms   after / before   same bits")
    for dtype, batch in SETTINGS:
        times: dict[str, list[float]] = {name: [] for name in workers}
        digests = set()
        for number in range(args.rounds + 3):
            for name in sorted(workers, reverse=number % 2 == 0):
                time.sleep(0.02)  # threads of the other process wait actively for a while
                seconds, digest = workers[name].call(dtype, batch)
                digests.add(digest)
                if number >= 3:  # the first calls make kernels
                    times[name].append(seconds)
        before, after = (median(times[name]) * 1e3 for name in ("before", "after"))
        ratio = median(b / a for a, b in zip(times["before"], times["after"], strict=True))
        differ |= len(digests) > 1
        print(f"{dtype:9} {batch:5}   {before:9.2f}   {after:8.2f}   {ratio:14.3f}   {len(digests) == 1}", flush=True)
    return int(differ)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        sys.exit(main(tyro.cli(CallByCall)))
