"""Logits or an embedding: told by the model, and embeddings are refused where predicted classes are compared."""

import pytest
import timm
import torch
from conftest import policy_for, tiny_vit
from torch import nn

from tokengame.backbones import wrap
from tokengame.backbones.classes import classes_of, embedding_widths, output_of, require_classes
from tokengame.config import FinetuneConfig, TrainConfig
from tokengame.errors import TokenGameError
from tokengame.learning.finetune import Tuner
from tokengame.learning.trainer import Trainer

CLIP = "vit_xsmall_patch16_clip_224"


def clip(name=CLIP, **settings):
    return timm.create_model(name, depth=2, **settings).eval()


def headless():
    model = tiny_vit()
    model.head = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny_vit(num_classes=0), "has no classifier: its output is an embedding"),
        (headless, "has no classifier"),
        (lambda: clip(CLIP + ".tinyclip_yfcc15m"), f"embeds in 512 dimensions, as {CLIP} does in CLIP"),
        (lambda: clip(num_classes=512), "embeds in 512 dimensions"),  # as from a local file
    ],
)
def test_embeddings_are_told_and_refused_where_classes_are_compared(make, says):
    model = make()
    assert (output_of(wrap(model)), classes_of(wrap(model))) == ("embedding", 0)
    with pytest.raises(TokenGameError, match=says):
        require_classes(wrap(model))
    with pytest.raises(TokenGameError, match=says):
        Tuner(model, policy_for(tiny_vit()), 0.5, FinetuneConfig())


def test_one_output_is_neither():
    model = tiny_vit(num_classes=1)
    assert classes_of(wrap(model)) == 0
    for refuse in (output_of, require_classes):
        with pytest.raises(TokenGameError, match="has one output"):
            refuse(wrap(model))
    with pytest.raises(TokenGameError, match="has one output"):
        Trainer(model, TrainConfig.from_preset("tokengame"))


def fine_tuned():
    """By a user with just as many classes as the embedding has dimensions: the bias has learned."""
    model = clip(num_classes=512)
    torch.manual_seed(0)
    model.head.bias.data.normal_()
    return model


@pytest.mark.parametrize("make", [tiny_vit, lambda: clip(num_classes=10), lambda: clip(num_classes=1000), fine_tuned])
def test_classifiers_are_not(make):
    backbone = wrap(make())
    require_classes(backbone)
    assert (output_of(backbone), classes_of(backbone)) == ("logits", backbone.classes)


def test_widths_are_those_that_timm_names():
    """All of its image towers of CLIP, but none that was fine-tuned for classes, and no other model."""
    for name in timm.list_models("*", module="vision_transformer", pretrained=True):
        found = timm.models.get_pretrained_cfg(name)
        tower = "clip" in name and "_ft_" not in name and found.num_classes > 0
        assert (found.num_classes in embedding_widths(name.split(".")[0])) == tower, name
