"""Whole games in one call of our own kernels: csrc/game.cpp.

What `TokenGame.play` does step by step, with the same kernels, for a merge game whose policy is a line. A thread plays
a few images to their end while they are in its cache: nobody waits for others at decisions, and nothing goes through
Python in between.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbone import Backbone
from tokengame.game import TokenGame
from tokengame.networks import Lines
from tokengame.ops import ordered_dither
from tokengame.state import EXTRAS
from tokengame.structs import GameStruct, ResultsStruct


class Whole(NamedTuple):
    """B images whose games are over."""

    prediction: Tensor
    """[B, classes]"""
    kept: tuple[Tensor, ...]
    """[B] agents alive after each decision"""
    alive: Tensor
    """[B, N] bool: which of them at the end"""
    opening: Tensor | None
    """[B, prefix + N, C] tokens before the first decision, where they are wanted"""


def play(game: TokenGame, images: Tensor, decide: Any, threshold: float, opening: bool) -> Whole | None:
    """`TokenGame.play` and `logits` on [B, channels, height, width]; None where that has to be done step by step.

    Args:
        game: what is played.
        images: the batch.
        decide, threshold: the policy.
        opening: whether tokens before the first decision are wanted.
    """
    backbone = game.backbone
    lines = lines_of(decide) if kernels.take(images) and _fits(game) else None
    if lines is None or lines.weights.shape != (len(game.stages), backbone.heads + len(EXTRAS) + 1):
        return None
    own = backbone.renew(images)
    start = backbone.start(images, own)
    if own is None or own.patches is None or own.head is None or start is None:
        return None
    (norm, head), start, weights, images = own.head, start.contiguous(), lines.weights.contiguous(), images.contiguous()
    stages, last = torch.tensor(game.stages, device="cpu"), backbone.blocks[-1].attn.qkv.weight
    cuts = torch.full((len(stages), len(images)), threshold, device="cpu", dtype=torch.float32)
    if lines.cuts is not None:
        cuts += lines.cuts
    dither = ordered_dither(*backbone.model.patch_embed.grid_size)
    played = GameStruct(
        ctypes.addressof(own.blocks), backbone.depth, own.patches.struct, head.struct, norm, start.data_ptr(),
        last.data_ptr(), *images.shape[1:], backbone.patch_size[0], backbone.prefix, len(head.bias), stages.data_ptr(),
        len(stages), weights.data_ptr(), dither.data_ptr(), cuts.data_ptr(),
    )  # fmt: skip
    prediction = images.new_empty(len(images), len(head.bias))
    tokens = images.new_empty(len(images), *start.shape) if opening else None
    kept = torch.empty(len(stages), len(images), dtype=torch.long, device="cpu")
    alive = torch.zeros(len(images), len(start) - backbone.prefix, dtype=torch.bool, device="cpu")
    found = ResultsStruct(*(0 if t is None else t.data_ptr() for t in (prediction, tokens, kept, alive)))
    threads = torch.get_num_threads()
    size = kernels.call("workspace", ctypes.byref(played), len(images), threads)
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    kernels.call("play", ctypes.byref(played), images, len(images), ctypes.byref(found), memory, threads)
    return Whole(prediction[:, : head.outputs], kept.unbind(0), alive, tokens)


def lines_of(decide: Any) -> Lines | None:
    """Of a policy whose class says that it is that and no more; None where somebody watches, or it is elsewhere."""
    if not isinstance(decide, nn.Module) or "lines" not in vars(type(decide)) or _is_watched(decide):
        return None
    lines: Lines | None = decide.lines  # type: ignore[assignment]
    if lines is None or lines.weights.dtype != torch.float32 or lines.weights.device.type != "cpu":
        return None
    return lines


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or _is_changed(module)


def _is_changed(instance: object) -> bool:
    """Whether it has methods of its own in place of its class's."""
    return not vars(type(instance)).keys().isdisjoint(vars(instance))


def _fits(game: TokenGame) -> bool:
    """Whether the game is one of csrc/game.cpp."""
    backbone, model = game.backbone, game.backbone.model
    return (
        type(game) is TokenGame
        and type(backbone) is Backbone
        and not _is_changed(game)
        and not _is_changed(backbone)
        and game.merge
        and game.features
        and bool(game.stages)
        and game.end == 2 * backbone.depth - 2
        and model.has_class_token
        and type(model.norm_pre) is nn.Identity
        and type(model.patch_drop) in (nn.Identity, PatchDropout)
    )
