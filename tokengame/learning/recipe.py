"""Whether timm knows what fine-tuning names: tried on a tiny layer, before a model or an image is loaded."""

from __future__ import annotations

import re
import warnings

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from tokengame.config import FinetuneConfig
from tokengame.data.transforms import transform_for
from tokengame.errors import TokenGameError, first_line
from tokengame.ranges import require


def check_recipe(config: FinetuneConfig) -> None:
    """Try the optimiser, the schedule and the augmentation that `config` names.

    Raises:
        TokenGameError: timm does not know one of them, or it does not work here.
    """
    with warnings.catch_warnings(action="ignore"):  # the run itself warns
        optimizer = _optimizer(config)
        _try_schedule(optimizer, config)
    if config.aa is not None:
        _try_augmentation(config.aa)


def _optimizer(config: FinetuneConfig) -> torch.optim.Optimizer:
    known = list_optimizers()
    require(config.opt.lower() in known, f"timm has no optimiser --opt {config.opt}; it has {', '.join(known)}")
    try:
        optimizer = create_optimizer_v2(
            nn.Sequential(nn.Linear(4, 4)), config.opt, config.step_size, config.weight_decay
        )
    except Exception as error:  # of whichever library implements it
        raise TokenGameError(f"--opt {config.opt} does not work here ({first_line(error)}); choose another") from None
    second_order = getattr(optimizer, "is_second_order", False)
    require(not second_order, f"--opt {config.opt} needs second derivatives, which fine-tuning does not record")
    return optimizer


def _try_schedule(optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> None:
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, config.sched, num_epochs=1, updates_per_epoch=config.updates, step_on_epochs=False,
            warmup_epochs=config.warmup, decay_epochs=1 / 3,
        )  # fmt: skip
    except Exception:  # of assertions and divisions inside timm
        scheduler = None
    known = scheduler is not None or config.sched == "none"
    require(known, f"no schedule --sched {config.sched}; try cosine, tanh, step, multistep, poly, constant or none")


def _try_augmentation(name: str) -> None:
    """timm ignores parts without a number, so they are checked here."""
    sentence = f"timm makes no augmentation --aa {name}"
    wrong = [part for part in name.split("-")[1:] if not re.fullmatch(r"[a-z]+\d[\d.]*|t\w+", part)]
    require(not wrong, f"{sentence}: {' '.join(wrong)!r} is not a word and a number, as in rand-m9-mstd0.5-inc1")
    known = f"{sentence}; try rand-m9-mstd0.5-inc1, augmix-m3 or original"
    require(bool(name), known)
    try:
        transform_for({"input_size": [3, 32, 32]}, train=True, augment={"auto_augment": name})
    except TokenGameError:
        raise TokenGameError(known) from None
