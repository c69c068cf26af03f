"""How far a pruned prediction is from the native one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def fidelity_loss(native: Tensor, pruned: Tensor, temperature: float = 1.0) -> Tensor:
    """[B] KL(native || pruned) between the softmaxes of two [B, classes] logits, in nats.

    At another `temperature` than 1 the logits are divided by it and the result multiplied by its square, so that small
    differences weigh alike at any (Hinton et al. 2015, section 2).
    """
    log_native, log_pruned = (F.log_softmax(logits.float() / temperature, 1) for logits in (native, pruned))
    kl = F.kl_div(log_pruned, log_native, reduction="none", log_target=True).sum(1).clamp(min=0)
    return kl * temperature**2
