"""What the classes of a model are called."""

from __future__ import annotations

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from tokengame.backbones.base import Backbone
from tokengame.backbones.classes import classes_of
from tokengame.data.class_map import ClassMap


def class_names(backbone: Backbone, class_map: str | None = None) -> list[str]:
    """A name for each class of the model, in its order; none where it has no classes.

    Args:
        backbone: the model.
        class_map: text file of the names, one a line. Without one they are those of the model's configuration
            (transformers), those of ImageNet where the model has as many classes as one of its subsets, or numbers.

    Raises:
        TokenGameError: the file is missing, or names another number of classes.
    """
    count = classes_of(backbone)
    if class_map is not None:
        names = ClassMap(class_map)
        names.require_classes(count)
        return list(names.index)
    known = _of_configuration(backbone.model) or _of_imagenet(count)
    return known if len(known) == count else [f"class {number}" for number in range(count)]


def _of_configuration(model: Any) -> list[str]:
    """Those that a model of transformers brings; "LABEL_0" and so on stand for none."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(labels[number]) for number in sorted(labels)]
    return [] if not names or names[0] == "LABEL_0" else names


def _of_imagenet(count: int) -> list[str]:
    """The first of the words that WordNet has for each class."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(number).partition(",")[0] for number in range(count)]
