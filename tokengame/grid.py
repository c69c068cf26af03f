"""Features of a pruned model on the full grid of patches, for dense tasks: pruned positions are filled in again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokengame.attention import Kernel, fastest_attention
from tokengame.backbone import Backbone
from tokengame.blocks import Ran
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.ops import Layout, Look, Memory
from tokengame.state import Decide, State

Fill = Literal["exit", "absorber", "zero"]
"""What stands where a token was pruned: its own last features before it left; those of the token that absorbed it
(`merge` games); or zeros."""


class RecordingBackbone(Backbone):
    """A backbone that keeps what certain blocks put out."""

    def __init__(self, model: Any, blocks: list[int], attend: Kernel = fastest_attention):
        super().__init__(model, attend)
        self.edges = [2 * (block + 1) for block in blocks]
        self.seen: dict[int, Tensor] = {}
        """block -> [M, C], since last emptied"""

    def run(
        self, first: int, last: int, x: Tensor, layout: Layout, bias: Tensor | None = None,
        memory: Memory | None = None, look: Look | None = None,
    ) -> Ran:  # fmt: skip
        """As `Backbone.run`, in pieces."""
        ran = Ran(x, None)
        for edge in sorted({e for e in self.edges if first < e < last} | {last}):
            found = super().run(first, edge, ran.x, layout, bias, memory, look if edge == last else None)
            ran, first, memory = found._replace(qkv=ran.qkv if found.qkv is None else found.qkv), edge, None
            if edge in self.edges:
                self.seen[edge // 2 - 1] = ran.x
        return ran


class WholeGame(TokenGame):
    """A game in which all patches play to the end."""

    @property
    def end(self) -> int:
        return 2 * self.backbone.depth


class Grid:
    """The latest features of every token, living or gone, of B images with R = prefix + N rows each."""

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
        """Features x [M, C] of the living; returns all positions filled, [B, R, C]."""
        x, place = self.norm(x), self.place(state)
        if self.latest is None:
            self.latest = x.new_zeros(len(self.owner), x.shape[1])
        base = torch.zeros_like(self.latest) if self.fill == "zero" else self.latest
        self.latest = base.index_copy(0, place, x)
        filled = self.latest[self.owner.to(x.device)] if self.fill == "absorber" else self.latest
        return filled.view(*self.shape, -1)

    def absorb(self, state: State, absorber: Tensor) -> None:
        """Each agent of `state`, and all it stood for, is from now on stood for by the agent `absorber` [A]."""
        rows = self.place(state)[state.agent_rows].cpu()
        stands = torch.arange(len(self.owner))
        stands[rows] = rows[absorber.cpu()]
        self.owner = stands[self.owner]


def grid_features(
    model: Any, config: GameConfig, decide: Decide, threshold: float, images: Tensor, blocks: list[int], fill: Fill,
    norm: bool,
) -> list[Tensor]:  # fmt: skip
    """Play a game and restore what `blocks` put out onto the full grid.

    Args:
        model: supported timm model.
        config: of the game.
        decide, threshold: the policy, as in `TokenGame.play`.
        images: [B, channels, height, width].
        blocks: whose output is wanted, ascending.
        fill: what stands where a token was pruned.
        norm: whether the model's final norm is applied.

    Returns:
        For each of `blocks` [B, prefix + N, C].

    Raises:
        TokenGameError: "absorber" asked of a `drop` game, where nobody is absorbed, or unknown `fill`.
    """
    if fill not in get_args(Fill):
        raise TokenGameError(f"fill must be one of {', '.join(get_args(Fill))}, not {fill!r}")
    if fill == "absorber" and config.transition != "merge":
        raise TokenGameError('fill="absorber" needs a policy of a merge game; here pruned tokens leave: use "exit"')
    backbone = RecordingBackbone(model, blocks)
    game = WholeGame(backbone, config)
    state, found = game.reset(images), {}
    grid = Grid(len(images), backbone.prefix, state.total, fill, model.norm if norm else lambda x: x)
    for stage in range(len(game.stages) + 1):
        found.update({block: grid.write(state, x) for block, x in backbone.seen.items()})
        backbone.seen.clear()
        if stage < len(game.stages):
            grid.write(state, state.x)
            logits = decide(game.observe(state))
            before, state = state, game.step(state, logits > threshold, logits)
            if state.absorber is not None:
                grid.absorb(before, state.absorber)
    return [found[block] for block in blocks]
