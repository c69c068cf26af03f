"""How far what a pruned model gives is from what the native one gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 1024
"""queries that are compared with all embeddings at once"""


def fidelity_loss(native: Tensor, pruned: Tensor, temperature: float = 1.0) -> Tensor:
    """[B] KL(native || pruned) between the softmaxes of two [B, classes] logits, in nats.

    At another `temperature` than 1 the logits are divided by it and the result multiplied by its square, so that small
    differences weigh alike at any (Hinton et al. 2015, section 2).
    """
    log_native, log_pruned = (F.log_softmax(logits.float() / temperature, 1) for logits in (native, pruned))
    kl = F.kl_div(log_pruned, log_native, reduction="none", log_target=True).sum(1).clamp(min=0)
    return kl * temperature**2


def cosines(native: Tensor, pruned: Tensor) -> Tensor:
    """[...] cosine of two [..., D]."""
    return F.cosine_similarity(native.float(), pruned.float(), dim=-1).clamp(-1, 1)


def neighbour_ranks(native: Tensor, queries: Tensor, gallery: Tensor) -> Tensor:
    """[n] how many other images of the gallery come before the native model's nearest one; equals by their order.

    Args:
        native: [n, D] normed embeddings of the native model, which say which other image is the nearest.
        queries, gallery: [n, D] normed embeddings of the same images; an image is not its own neighbour.
    """
    found = []
    for rows in torch.arange(len(native), device=native.device).split(PIECE):
        wanted, similar = native[rows] @ native.T, queries[rows] @ gallery.T  # [piece, n]
        own = (torch.arange(len(rows), device=rows.device), rows)
        nearest = wanted.index_put(own, wanted.new_tensor(-torch.inf)).argmax(1, keepdim=True)
        similar = similar.index_put(own, similar.new_tensor(-torch.inf))
        bar, order = similar.gather(1, nearest), torch.arange(len(native), device=native.device)
        found.append(((similar > bar) | ((similar == bar) & (order < nearest))).sum(1))
    return torch.cat(found)
