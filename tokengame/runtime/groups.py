"""Images in groups, each on a thread of its own, where a game is played step by step on a CPU.

PyTorch spreads every operation over its threads, and these wait for each other after each, hundreds of times in a
forward pass. Where other processes are busy, every wait is for a thread that the system has put aside. Threads with
images of their own wait once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from os import getpid
from threading import Barrier

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tokengame.game import Decide, TokenGame
from tokengame.kernels.functions import FusedOutput
from tokengame.modules import global_hooks, hooks_of, in_int8
from tokengame.runtime.fused import is_usual

GROUPS_OF_A_THREAD = 2
"""so that a thread which was put aside leaves its later images to the others"""

Play = Callable[[Tensor, Decide], FusedOutput]
"""plays the games of images [b, channels, height, width] under a policy"""


def play(game: TokenGame, play_some: Play, images: Tensor, decide: Decide) -> FusedOutput:
    """The games of a batch, in groups where they can be.

    Args:
        game: what is played.
        play_some: plays a group.
        images: [B, channels, height, width].
        decide: the policy; `of_images(first, last)` is that of a group, where it has one.
    """
    threads = torch.get_num_threads()
    divide = getattr(decide, "of_images", None)
    if divide is None or len(images) < 2 * threads or not _can_part(game, images, decide):
        return play_some(images, decide)
    sizes = [len(part) for part in images.split(-(-len(images) // (GROUPS_OF_A_THREAD * threads)))]
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    policies = [divide(first, first + size) for first, size in zip(firsts, sizes, strict=True)]
    if None in policies:
        return play_some(images, decide)
    tasks = [partial(play_some, *both) for both in zip(images.split(sizes), policies, strict=True)]
    return _joined(_on_threads(tasks, threads))


def _can_part(game: TokenGame, images: Tensor, decide: Decide) -> bool:
    """Whether images can be computed on other threads with the same result.

    Modes of PyTorch hold for one thread only, hooks may not expect several, and gradients are left to PyTorch. A layer
    in int8 is many small operations, for which threads wait for Python's lock (docs/LOG.md).
    """
    if images.device.type != "cpu" or torch.get_num_threads() == 1 or not is_usual(game):
        return False
    modes = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    modes = modes or bool(_get_current_dispatch_mode_stack() or _get_current_function_mode_stack())
    watch = game.backbone.watch
    hooked = watch.hooked or global_hooks() or (isinstance(decide, nn.Module) and bool(hooks_of(decide)))
    return not (modes or watch.training or hooked or in_int8(game.backbone.model))


def _on_threads(tasks: Sequence[Callable[[], FusedOutput]], threads: int) -> list[FusedOutput]:
    """The results of `tasks`, in their order, each computed by one of `threads` threads alone."""
    inference = torch.is_inference_mode_enabled()

    def work(task: Callable[[], FusedOutput]) -> FusedOutput:
        with torch.inference_mode(inference), torch.no_grad():
            return task()

    pool = _pool(threads, getpid())
    futures = [pool.submit(copy_context().run, work, task) for task in tasks]
    return [future.result() for future in futures]


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads that compute without PyTorch's others, for as long as this process lives: starting them takes a while."""
    ready = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start from now on
        ready.wait()

    pool = ThreadPoolExecutor(threads, "tokengame", initializer=start)
    for _ in range(threads):
        pool.submit(int)  # a thread starts for each, since none is ready before the last
    ready.wait()
    torch.set_num_threads(threads)  # of those that start from now on
    return pool


def _joined(parts: list[FusedOutput]) -> FusedOutput:
    logits, kept, alive, before = zip(*parts, strict=True)
    return FusedOutput(
        torch.cat(logits),
        tuple(map(torch.cat, zip(*kept, strict=True))),
        torch.cat(alive),
        None if before[0] is None else torch.cat(before),
    )
