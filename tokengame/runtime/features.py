"""Features of a pruned model on the full grid of patches, for dense tasks: pruned positions are filled in again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokengame.backends import Backend
from tokengame.backends.base import Stretch
from tokengame.errors import TokenGameError
from tokengame.game import Decide, State, TokenGame
from tokengame.packed.attention import fastest_attention
from tokengame.packed.heads import CachedKeysValues, ObservationRequest
from tokengame.packed.layout import RaggedLayout
from tokengame.runtime.cascade import PrunedOutput
from tokengame.runtime.macs import native_macs, pruned_macs

Fill = Literal["exit", "absorber", "zero"]
"""What stands where a token was pruned: its own last features before it was pruned; those of the token that absorbed it
(merge games); or zeros."""


class RecordingBackend:
    """A backend that records the output of some blocks and leaves everything else to another one.

    Args:
        backend: what computes.
        blocks: whose output is recorded.
    """

    def __init__(self, backend: Backend, blocks: list[int]):
        self.inner, self.edges = backend, [2 * (block + 1) for block in blocks]
        self.recorded: dict[int, Tensor] = {}
        """block -> [M, C], since last emptied"""

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def embed(self, images: Tensor) -> Tensor:
        """As `Backend.embed`."""
        tokens = self.inner.embed(images)
        if 0 in self.edges:
            self.recorded[-1] = tokens.flatten(0, 1)
        return tokens

    def run(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None,
        cached: CachedKeysValues | None = None, request: ObservationRequest | None = None,
    ) -> Stretch:  # fmt: skip
        """As `Backend.run`, in pieces."""
        ran = Stretch(x, None)
        for edge in sorted({e for e in self.edges if first < e < last} | {last}):
            found = self.inner.run(first, edge, ran.x, layout, bias, cached, request if edge == last else None)
            ran, first, cached = found._replace(qkv=ran.qkv if found.qkv is None else found.qkv), edge, None
            if edge in self.edges:
                self.recorded[edge // 2 - 1] = ran.x
        return ran


class Grid:
    """The latest features of every token, kept or pruned, of B images with R = prefix + N rows each."""

    def __init__(self, images: int, prefix: int, total: int, fill: Fill, norm: Callable[[Tensor], Tensor]):
        self.shape, self.prefix, self.fill, self.norm = (images, prefix + total), prefix, fill, norm
        self.latest: Tensor | None = None
        self.owner = torch.arange(images * (prefix + total))
        """[B * R] row that now stands for each row"""

    def place(self, state: State) -> Tensor:
        """[M] row of the full grid of each packed row."""
        layout, position = state.layout, state.position
        own = torch.arange(layout.rows, device=position.device) - layout.start[layout.image]
        return layout.image * self.shape[1] + torch.where(position < 0, own, self.prefix + position)

    def write(self, state: State, x: Tensor) -> Tensor:
        """Features x [M, C] of the tokens that are left; returns all positions filled, [B, R, C]."""
        x, place = self.norm(x), self.place(state)
        if self.latest is None:
            self.latest = x.new_zeros(len(self.owner), x.shape[1])
        base = torch.zeros_like(self.latest) if self.fill == "zero" else self.latest
        self.latest = base.index_copy(0, place, x)
        filled = self.latest[self.owner.to(x.device)] if self.fill == "absorber" else self.latest
        return filled.view(*self.shape, -1)

    def filled(self, final: State) -> Tensor:
        """All positions at the end of the games, [B, R, C]."""
        return self.write(final, final.x)

    def follow(self, before: State, after: State) -> None:
        """Take over a decision, between the state before it and the one after the blocks that came next."""
        if self.fill == "exit":
            self.write(before, before.x)
        if after.absorber is not None:
            self.absorb(before, after.absorber)

    def absorb(self, state: State, absorber: Tensor) -> None:
        """From now on agent `absorber` [A] stands for each agent of `state`, and for all it stood for."""
        rows = self.place(state)[state.agent_rows].cpu()
        stands = torch.arange(len(self.owner))
        stands[rows] = rows[absorber.cpu()]
        self.owner = stands[self.owner]


class GridMethod:
    """A pruned model as a `Method` that gives its features on the full grid instead of its prediction.

    Pruned positions have the features of their absorber, or in a drop game those that they had last.

    Args:
        fast: `PrunedViT`, whose dial is followed.
    """

    def __init__(self, fast: Any):
        self.fast = fast

    @property
    def game(self) -> TokenGame:
        """The game of `fast`, with patches computed to the last block."""
        game = self.fast.game
        return TokenGame(game.backbone, game.config, game.features, game.attention, keep_patches=True)

    def predict(self, images: Tensor) -> PrunedOutput:
        """Of [B, channels, height, width] images; `logits` are the features [B, prefix + N, C], normed."""
        game = self.game
        state = game.reset(images)
        grid = grid_of(game, state)
        while state.stage < len(game.stages):
            logits, keep = game.decisions(state, self.fast.actor, self.fast.threshold)
            before, state = state, game.step(state, keep, logits)
            grid.follow(before, state)
        fallback = torch.zeros(0, dtype=torch.long, device=images.device)
        return PrunedOutput(grid.filled(state), state.kept, state.alive, fallback)

    def macs(self, output: PrunedOutput) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] of an output, policy included."""
        game = self.game
        macs = pruned_macs(game, self.fast.actor, torch.stack(output.decided).cpu(), output.total)
        return native_macs(game.backbone, output.total), macs


def grid_of(game: TokenGame, state: State) -> Grid:
    """An empty grid for the games that begin with `state`, filled by absorbers where tokens are merged."""
    fill: Fill = "absorber" if game.merge else "exit"
    return Grid(state.layout.images, game.backbone.prefix, state.total, fill, game.backbone.final_norm)


def grid_features(
    game: TokenGame, decide: Decide, threshold: float, images: Tensor, blocks: list[int], fill: Fill, norm: bool
) -> tuple[list[Tensor], Tensor]:
    """Play a game and restore the outputs of `blocks` onto the full grid.

    Args:
        game: whose backbone and settings are used; all patches are computed to the last block.
        decide, threshold: the policy, as in `TokenGame.play`.
        images: [B, channels, height, width].
        blocks: whose output is wanted, ascending; -1: the embedded tokens.
        fill: what stands where a token was pruned.
        norm: whether the model's final norm is applied.

    Returns:
        For each of `blocks` [B, prefix + N, C]; and the prediction of that game.

    Raises:
        TokenGameError: "absorber" for a `drop` game, where no token is absorbed, or unknown `fill`.
    """
    if fill not in get_args(Fill):
        raise TokenGameError(f"fill must be one of {', '.join(get_args(Fill))}, not {fill!r}")
    if fill == "absorber" and not game.merge:
        raise TokenGameError('fill="absorber" needs a policy that merges; here pruned tokens are dropped: use "exit"')
    game = TokenGame(game.backbone, game.config, attention=fastest_attention, keep_patches=True)
    if not len(images):
        rows = game.backbone.prefix + math.prod(game.backbone.grid(*images.shape[2:]))
        return [images.new_zeros(0, rows, game.backbone.dim) for _ in blocks], game.backbone.native(images)
    backend = RecordingBackend(game.backend_for(images), blocks)
    state, found = game.reset(images, backend), {}
    grid = Grid(len(images), game.backbone.prefix, state.total, fill, game.backbone.final_norm if norm else lambda x: x)
    for stage in range(len(game.stages) + 1):
        found.update({block: grid.write(state, x) for block, x in backend.recorded.items()})
        backend.recorded.clear()
        if stage < len(game.stages):
            logits, keep = game.decisions(state, decide, threshold)
            before, state = state, game.step(state, keep, logits)
            grid.follow(before, state)
    return [found[block] for block in blocks], game.predict(state)
