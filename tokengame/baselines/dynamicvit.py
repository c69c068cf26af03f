"""DynamicViT (Rao et al., NeurIPS 2021): predictors in front of three blocks, learned by masks and a straight-through
Gumbel-softmax; at run time the tokens they rank lowest are dropped, the same number in every image.

Its predictor and its losses, on a frozen backbone (the paper tunes both), so that it is compared with what else leaves
the backbone alone. One predictor serves all keep ratios: it ranks tokens, and the ratio says how many stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.backbones import Backbone, wrap
from tokengame.baselines.heuristics import keep_best
from tokengame.baselines.reducer import KEEP
from tokengame.config import GameConfig
from tokengame.data.batches import Batch
from tokengame.game import Observation
from tokengame.packed.attention import Kernel, deterministic_attention
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import segment_mean
from tokengame.runtime import PrunedViT, prune_by
from tokengame.runtime.method import Method

WEIGHT_KL, WEIGHT_TOKENS, WEIGHT_RATIO = 0.5, 0.5, 2.0
"""of the losses beside cross-entropy (section 3.3)"""


class Predictor(nn.Module):
    """Local features of a token and the mean over all alive -> log probabilities of keep and prune (section 3.2)."""

    def __init__(self, dim: int):
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.rest = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )

    def forward(self, tokens: Tensor, layout: RaggedLayout, alive: Tensor | None = None) -> Tensor:
        """Packed tokens [A, C] of `layout`, weighted by `alive` [A] in the mean -> [A, 2]."""
        own, others = self.local(tokens).chunk(2, 1)
        mean = segment_mean(others, layout, alive).index_select(0, layout.image)
        return self.rest(torch.cat([own, mean], 1)).log_softmax(1)


class DynamicViT(nn.Module):
    """The predictors as a policy of the `drop` game; `keep` may be set at any time.

    Args:
        dim: width of the backbone.
        stages: how many.
        keep: share of the tokens that each stage keeps: rho, rho^2, rho^3 of the first.
    """

    def __init__(self, dim: int, stages: int, keep: float = 0.7):
        super().__init__()
        self.predictors, self.keep = nn.ModuleList(Predictor(dim) for _ in range(stages)), keep

    def forward(self, obs: Observation) -> Tensor:
        """[A] +1 for kept tokens, -1 for the others."""
        layout, stage = obs.layout, int(obs.stage[0])
        assert layout is not None
        predictor = self.predictors[stage]
        keep, prune = predictor(obs.token, layout).unbind(1)
        number = max(1, int(obs.total * self.keep ** (stage + 1)))
        number_each = torch.minimum(torch.full_like(layout.count, number), layout.count)
        return keep_best(keep - prune, number_each, layout)

    def macs_per_agent(self) -> float:
        """Multiply-accumulates of one decision."""
        return sum(m.weight.numel() for m in self.predictors[0].modules() if isinstance(m, nn.Linear))


def pruned_by(model: nn.Module, dynamic: DynamicViT) -> PrunedViT:
    """`model` with the tokens really dropped that the predictors rank lowest, at evenly spread blocks."""
    backbone, game = wrap(model), GameConfig(stage_count=len(dynamic.predictors))
    return prune_by(model, game, dynamic.to(backbone.device, backbone.dtype), features=False)


def train_dynamicvit(
    model: nn.Module, batches: Iterable[Batch], updates: int, keep: float = 0.7, lr: float = 1e-3, seed: int = 0
) -> DynamicViT:
    """Learn the predictors on `batches` of images; the model [frozen, any format] is only read.

    Args:
        model: of a supported family.
        batches: of which the first `updates` are used; labels where there are any.
        updates: AdamW steps, on a half-cosine.
        keep: the ratio of the loss.
        lr: step size at the start.
        seed: of weights and Gumbel noise.
    """
    backbone = wrap(model)
    stages = GameConfig(stage_count=3).blocks(backbone.depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dynamic = DynamicViT(backbone.dim, len(stages), keep).to(backbone.device)
        optimizer = torch.optim.AdamW(dynamic.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for batch in islice(batches, updates):
            optimizer.zero_grad()
            loss = dynamic_loss(backbone, dynamic, stages, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
    return dynamic.eval()


def dynamic_loss(backbone: Backbone, dynamic: DynamicViT, stages: tuple[int, ...], batch: Batch) -> Tensor:
    """Cross-entropy + 0.5 KL(native || pruned) + 0.5 token distance + 2 ratio loss (section 3.3).

    The distance is that of normed tokens which are kept; the divergence points as in the authors' published code.
    """
    images = batch.images.to(backbone.device, backbone.dtype)
    with torch.no_grad():
        (native, layout), _ = _masked(backbone, images, stages, None)
        teacher = backbone.head(native, layout).float().log_softmax(1)
    (x, layout), alive = _masked(backbone, images, stages, dynamic)
    student = backbone.head(x, layout).float().log_softmax(1)
    kept = alive[-1].detach().flatten()[:, None]
    far = (backbone.final_norm(x) - backbone.final_norm(native)).float()
    far = far.view(layout.images, layout.longest, -1)[:, backbone.prefix :].flatten(0, 1)
    tokens = (kept * far**2).sum() / (kept.sum() * far.shape[1]).clamp(min=1)
    goals = [dynamic.keep ** (stage + 1) for stage in range(len(stages))]
    ratio = sum(((a.mean(1) - goal) ** 2).mean() for a, goal in zip(alive, goals, strict=True)) / len(stages)
    loss = WEIGHT_TOKENS * tokens + WEIGHT_RATIO * ratio
    loss = loss + WEIGHT_KL * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return loss if batch.labels is None else loss + F.nll_loss(student, batch.labels.to(student.device))


def _masked(
    backbone: Backbone, images: Tensor, stages: tuple[int, ...], dynamic: DynamicViT | None
) -> tuple[tuple[Tensor, RaggedLayout], list[Tensor]]:
    """All tokens through all blocks; dropped ones are masked as attention keys.

    Returns:
        rows [M, C] and their layout, and for each stage the tokens that are left: [B, N] zeros and ones, with gradient.
    """
    tokens, prefix = backbone.embed(images), backbone.prefix
    batch, rows, _ = tokens.shape
    layout = backbone.whole_layout(tokens, backbone.grid(*images.shape[2:]))
    agents = RaggedLayout([rows - prefix] * batch, tokens.device)
    x, alive = tokens.flatten(0, 1), torch.ones(batch, rows - prefix, device=tokens.device)
    history: list[Tensor] = []
    for block in range(backbone.depth):
        if dynamic is not None and block in stages:
            patches = x.view(batch, rows, -1)[:, prefix:].flatten(0, 1).float()
            log_probs = dynamic.predictors[len(history)](patches, agents, alive.flatten())
            chosen = F.gumbel_softmax(log_probs, hard=True)[:, 0].view(batch, -1)
            alive = alive * chosen
            history.append(alive)
        visible = F.pad(alive, (prefix, 0), value=1.0) if history else None
        qkv = backbone.project(block, backbone.norm_attention(block, x), layout)
        attended = _masked_attention(qkv, layout, visible, deterministic_attention)
        x = backbone.feed_forward(block, backbone.add_attention(block, x, attended, layout), layout)
    return (x, layout), history


def _masked_attention(qkv: Tensor, layout: RaggedLayout, visible: Tensor | None, attend: Kernel) -> Tensor:
    """Attention of every token to itself and to visible tokens (section 3.2): qkv [M, 3, H, D] -> [M, H * D]."""
    if visible is None:
        return attend(qkv, layout, None)
    q, k, v = layout.pad(qkv).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
    scores = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).float()
    itself = torch.eye(layout.longest, device=qkv.device)
    mask = visible[:, None, None, :] * (1 - itself) + itself
    weight = (scores - scores.amax(3, keepdim=True).detach()).exp() * mask
    weight = weight / weight.sum(3, keepdim=True)
    return (weight.to(v.dtype) @ v).transpose(1, 2).flatten(2).flatten(0, 1)


def settings(model: nn.Module, dynamic: DynamicViT) -> list[tuple[str, Method]]:
    """A trained DynamicViT over its keep ratios."""
    found: list[tuple[str, Method]] = []
    for keep in KEEP:
        other = copy.copy(dynamic)  # the same predictors
        other.keep = keep
        found.append((f"keep {keep:g}", pruned_by(model, other)))
    return found
