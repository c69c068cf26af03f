"""Whole games in one call of our own kernels: csrc/game.cpp.

What `TokenGame.play` does step by step, with the same kernels, for a merge game whose policy is a line. A thread plays
a few images to their end while they are in its cache: nobody waits for others at decisions, and nothing goes through
Python in between.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokengame.backbone import Backbone
from tokengame.game import TokenGame
from tokengame.kernels import call
from tokengame.networks import Lines
from tokengame.ops import ordered_dither
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
    backbone, stages = game.backbone, torch.tensor(game.stages, device="cpu")
    lines = _lines_of(decide) if _fits(game) else None
    own = backbone.renew(images) if lines else None
    start = backbone.start(images) if own else None
    if lines is None or own is None or own.patches is None or own.head is None or start is None:
        return None
    start, weights = start.contiguous(), lines.weights.contiguous()
    cuts = torch.full((len(stages), len(images)), threshold, device="cpu", dtype=torch.float32)
    if lines.cuts is not None:
        cuts += lines.cuts
    last, dither = backbone.blocks[-1].attn.qkv.weight, ordered_dither(*backbone.model.patch_embed.grid_size)
    images, (norm, head) = images.contiguous(), own.head
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
    call("play", ctypes.byref(played), images, len(images), ctypes.byref(found), torch.get_num_threads())
    return Whole(prediction[:, : head.outputs], kept.unbind(0), alive, tokens)


def _fits(game: TokenGame) -> bool:
    """Whether the game is one of csrc/game.cpp."""
    backbone, model = game.backbone, game.backbone.model
    return (
        type(game) is TokenGame
        and type(backbone) is Backbone
        and game.merge
        and game.features
        and bool(game.stages)
        and game.end == 2 * backbone.depth - 2
        and model.has_class_token
        and type(model.norm_pre) is nn.Identity
    )


def _lines_of(decide: Any) -> Lines | None:
    """Of a policy whose class says that it is that and no more; None where somebody watches, or it is elsewhere."""
    if "lines" not in vars(type(decide)) or decide._forward_hooks or decide._forward_pre_hooks:
        return None
    lines: Lines | None = decide.lines
    if lines is None or lines.weights.dtype != torch.float32 or lines.weights.device.type != "cpu":
        return None
    return lines
