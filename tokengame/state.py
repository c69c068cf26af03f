"""What a token game is made of: the state of a batch of images, and what its agents observe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokengame.blocks import Heads
from tokengame.ops import Layout, Memory

EXTRAS = ("attention", "log size", "similarity", "alive", "leader", "dither")
"""the features that follow the attention of each head"""


@dataclass(frozen=True)
class Observation:
    """What A living agents of S scenes (an image at a stage) see. Rows of one scene lie together."""

    x: Tensor
    """[A, C] the agents' own rows; or [M, C] rows, of which those of the agents are `row`"""
    lead: Tensor | Callable[[], Tensor]
    """`cls`, or what finds it"""
    features: Tensor
    """[A, heads + 6] per head: log attention from the class token times the number of rows; then the mean over heads,
    centred in the image; log size; highest similarity of values to another agent; share of agents alive; highest
    similarity to one that more attention is paid to, so that of two alike tokens one knows that it is the lesser;
    `State.dither`, so that alike tokens can differ"""
    scene: Tensor
    """[A] index into S"""
    agent: Tensor
    """[A] agent id: position in the grid, row by row"""
    stage: Tensor
    """[S] stage index"""
    layout: Layout | None = None
    """of the A agents over the S scenes; None for an arbitrary selection of agents"""
    total: int = 0
    """agents of an image at the start"""
    row: Tensor | None = None
    """[A] index into x, where not all rows are agents'"""
    turn: int | None = None
    """the stage, where all scenes are at the same"""

    @property
    def cls(self) -> Tensor:
        """[S, C] class token of the scene; without one, the mean of its rows"""
        return self.lead if isinstance(self.lead, Tensor) else self.lead()

    @property
    def token(self) -> Tensor:
        """[A, C] the agent's own row; gathered when asked for, which few policies do"""
        return self.x if self.row is None else self.x.index_select(0, self.row)

    @property
    def attention(self) -> Tensor:
        """[A] log attention from the class token, mean over heads, centred in the image"""
        return self.features[:, EXTRAS.index("attention") - len(EXTRAS)]

    def take(self, rows: Tensor) -> Observation:
        """The same for some of the agents."""
        return replace(
            self,
            x=self.token[rows],
            row=None,
            features=self.features[rows],
            scene=self.scene[rows],
            agent=self.agent[rows],
            layout=None,
        )

    @staticmethod
    def concat(parts: list[Observation]) -> Observation:
        """All agents of several stages in one."""
        offsets = [0]
        for part in parts[:-1]:
            offsets.append(offsets[-1] + len(part.cls))
        return Observation(
            x=torch.cat([p.token for p in parts]),
            lead=torch.cat([p.cls for p in parts]),
            features=torch.cat([p.features for p in parts]),
            scene=torch.cat([p.scene + offset for p, offset in zip(parts, offsets, strict=True)]),
            agent=torch.cat([p.agent for p in parts]),
            stage=torch.cat([p.stage for p in parts]),
        )


@dataclass(frozen=True)
class State:
    """A batch of images somewhere in the network, about to decide or at the end."""

    x: Tensor
    """[M, C] packed rows, prefix tokens first in each image"""
    position: Tensor
    """[M] agent id of each row, -1 for prefix tokens"""
    layout: Layout
    """of the M rows"""
    agents: Layout
    """of the A living agents"""
    total: int
    """agents of each image at the start (N)"""
    dither: Tensor
    """[N] a number for each place of the grid, the same in all images, neighbours far apart (see `ordered_dither`)"""
    size: Tensor | None = None
    """[M] patches each row stands for, once something was merged"""
    heads: Heads | None = None
    """of the attention before (drop) or after (merge) the decision; None where there was none"""
    memory: Memory | None = None
    """in merge games after a decision: what the survivors have yet to look at"""
    similarity: Tensor | None = None
    """[B, L, L] cosine of the agents' values, in merge games; None where our own kernels compare them"""
    absorber: Tensor | None = None
    """[A] in merge games, for each agent before the latest decision the one that stands for it now"""
    kept: tuple[Tensor, ...] = ()
    """[B] agents alive after each decision so far"""

    @property
    def stage(self) -> int:
        """Decisions taken so far."""
        return len(self.kept)

    @property
    def bias(self) -> Tensor | None:
        """[M] added to the attention logits of each key"""
        return None if self.size is None else self.size.log()

    @property
    def prefix(self) -> int:
        return (self.layout.rows - self.agents.rows) // max(self.layout.images, 1)

    @property
    def agent_rows(self) -> Tensor:
        """[A] the agents' rows among all rows"""
        return self.agents.behind(self.prefix)

    @property
    def alive(self) -> Tensor:
        """[B, N] bool: which agents are left"""
        places = self.agents.image * self.total + self.of_agents(self.position)
        flat = torch.zeros(self.layout.images * self.total, dtype=torch.bool, device=places.device)
        return flat.index_fill_(0, places, True).view(-1, self.total)

    def of_agents(self, rows: Tensor) -> Tensor:
        """[M, ...] -> [A, ...], without the prefix tokens."""
        if self.layout.uniform:
            return self.layout.pad(rows)[:, self.prefix :].flatten(0, 1)
        return rows.index_select(0, self.agent_rows)

    def take(self, images: Tensor) -> State:
        """The same of some images [b], in any order, any of them several times, to be played differently."""
        rows, layout = self.layout.take(images)
        heads = self.heads and replace(
            self.heads,
            query=self.heads.query.index_select(0, images),
            keys=self.heads.keys.index_select(0, rows),
            values=self.heads.values.index_select(0, rows),
            seen=None,
        )
        return replace(
            self,
            x=self.x.index_select(0, rows),
            position=self.position.index_select(0, rows),
            layout=layout,
            agents=self.agents.take(images)[1],
            size=None if self.size is None else self.size.index_select(0, rows),
            heads=heads,
            similarity=None if self.similarity is None else self.similarity.index_select(0, images),
            absorber=None,
            kept=tuple(number.index_select(0, images) for number in self.kept),
        )

    def repeat(self, times: int) -> State:
        """The same with every image `times` times in a row."""
        images = torch.arange(self.layout.images, device=self.x.device)
        return self.take(images.repeat_interleave(times))


Decide = Callable[[Observation], Tensor]
"""A policy: observation -> [A] keep logits."""
