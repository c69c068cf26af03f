"""Calls from eight threads on one pruned model while a ninth records gradients: bitwise what one thread computes."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from attacks.outcome import accepted, generator, require
from attacks.world import World, native_model, resident_mib
from tokengame import PrunedViT, prune

THREADS, CALLS, FIRST = 8, 400, 200
GROWTH_MIB = 96
"""memory that the calls of a case may add after the first ones; a thread that comes to a kernel late takes 9 once"""


def case(world: World, seed: int, number: int) -> str:
    """Some calls."""
    with accepted("the model"):
        return _called(world, seed, number)


def _called(world: World, seed: int, number: int) -> str:
    torch.set_num_threads(1)  # after a fork PyTorch makes its pool anew, which several threads at once cannot
    rng = generator("threads", seed, number)
    half, base = number % 2 == 1, world.policies[number // 2 % len(world.policies)]
    model, recording = native_model(world.weights), rng.random() < 0.5
    model.requires_grad_(recording)
    model = model.bfloat16() if half else model
    fast = prune(model, base, dial=rng.choice((0.0, 0.3, 0.5, 0.8, 1.0)))
    batches = [_batch(rng, half) for _ in range(12)]
    expected = [_answer(fast, images) for images in batches]
    stop = threading.Event()
    ninth = threading.Thread(target=_record, args=(fast, batches[0], stop))
    if recording:
        ninth.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            _compare(pool, fast, batches, expected, FIRST)
            before = resident_mib()
            _compare(pool, fast, batches, expected, CALLS - FIRST)
    finally:
        stop.set()
        if recording:
            ninth.join()
    grown = resident_mib() - before
    require(grown < GROWTH_MIB, f"memory grew by {grown:.0f} MiB")
    return f"{base.stem}, dial {fast.dial}, {'bfloat16' if half else 'float32'}{', gradients beside' * recording}"


def _batch(rng: random.Random, half: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    images = torch.randn(rng.randint(1, 5), 3, 32, 32, generator=generator)
    return images.bfloat16() if half else images


def _answer(fast: PrunedViT, images: torch.Tensor) -> list[torch.Tensor]:
    output = fast.predict(images)
    return [output.logits, *output.kept]


def _compare(pool: Any, fast: PrunedViT, batches: list, expected: list, calls: int) -> None:
    """Every thread's answers with those of one thread."""

    def call(number: int) -> bool:
        found, wanted = _answer(fast, batches[number % len(batches)]), expected[number % len(batches)]
        return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

    wrong = [number for number, right in enumerate(pool.map(call, range(calls))) if not right]
    require(not wrong, f"{len(wrong)} of {calls} calls differ from those of one thread")


def _record(fast: PrunedViT, images: torch.Tensor, stop: threading.Event) -> None:
    """Predictions whose gradients are recorded and used, until told to stop."""
    while not stop.is_set():
        own = images.clone().requires_grad_()
        fast.predict(own, gradients=True).logits.float().sum().backward()
