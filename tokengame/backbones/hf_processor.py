"""How images become the input of a model of Hugging Face transformers: what its image processor does.

The form is what `tokengame.data.transforms.transform_for` reads: input_size (channels, height, width), interpolation,
mean and std (a number for each channel), crop_pct and crop_mode as in timm, and crop_rounding, which timm has not.
"""

from __future__ import annotations

import math
from typing import Any

from tokengame.backbones.from_hugging_face import require_transformers
from tokengame.backbones.hub import offline_at_once, reason
from tokengame.errors import TokenGameError
from tokengame.ranges import require

PLAIN = ("ViT", "DeiT", "CLIP", "Siglip", "Bit", "Beit", "DINOv3ViT")
"""processors that resize, crop, rescale and normalise, and do nothing else: names without ImageProcessor and ending"""
ENDINGS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
INTERPOLATION = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""names of Pillow's filters by their numbers"""


def processor_preprocessing(processor: Any) -> dict[str, Any]:
    """By an image processor of Hugging Face transformers.

    Args:
        processor: an image processor, or the folder or name of a model that has one (preprocessor_config.json).

    Raises:
        TokenGameError: there is none; or it does something that this form does not say, which the sentence names.
    """
    processor = _fetched(processor) if isinstance(processor, str) else processor
    kind = type(processor).__name__
    plain = any(kind == name + ending for name in PLAIN for ending in ENDINGS)
    require(plain, f"images of the image processor {kind} cannot be made here: it may do more than resize and crop")
    for does in ("do_resize", "do_rescale"):
        kept = f"{kind} has {does}=False, and images would keep their size or range; set it to true"
        require(bool(getattr(processor, does, True)), kept)
    require(not getattr(processor, "do_pad", None), f"{kind} with do_pad pads images, which is not done here")
    number = int(processor.resample)
    require(0 <= number < len(INTERPOLATION), f"{kind} resizes by resample={number}, which Pillow does not have")
    return {**_sizes(processor, kind), "interpolation": INTERPOLATION[number], **_normalisation(processor)}


def _fetched(name: str) -> Any:
    transformers = require_transformers(name)
    with offline_at_once():
        try:
            return transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of whatever fetches and reads
            raise TokenGameError(f"{name} has no image processor that can be read ({reason(error)})") from None


def _sizes(processor: Any, kind: str) -> dict[str, Any]:
    """input_size, crop_pct, crop_mode and crop_rounding: resized to `size`, then cropped to `crop_size` or not."""
    size, cropped = _of(processor.size), getattr(processor, "do_center_crop", None)
    edge = size.get("shortest_edge", 0)
    require(not edge or bool(cropped), f"{kind} resizes the shortest edge and crops nothing: images differ in size")
    sides = (edge, edge) if set(size) == {"shortest_edge"} else _sides(size, f"{kind} resizes")
    target = _sides(_of(processor.crop_size), f"{kind} crops") if cropped else sides
    square = f"{kind} resizes the shortest edge and crops {target[0]} x {target[1]}; only squares are known here"
    require(not edge or target[0] == target[1], square)
    shares = {_share(part, side, kind) for part, side in zip(target, sides, strict=True)}
    require(len(shares) == 1, f"{kind} crops other shares of height and width, {target} of {sides}")
    mode = "center" if edge else "squash"
    return {"input_size": [3, *target], "crop_pct": shares.pop(), "crop_mode": mode, "crop_rounding": "down"}


def _sides(size: dict[str, int], does: str) -> tuple[int, int]:
    require(set(size) == {"height", "width"}, f"{does} to {size}, and only height and width are known here")
    return size["height"], size["width"]


def _of(size: Any) -> dict[str, int]:
    """What a size of transformers sets."""
    return {key: int(value) for key, value in dict(size or {}).items() if value is not None}


def _share(target: int, side: int, kind: str) -> float:
    """The crop_pct of which timm makes `side` again, as floor(target / crop_pct)."""
    require(target <= side, f"{kind} crops {target} pixels of {side}, which is padding; it is not done here")
    exact = target / side
    return exact if math.floor(target / exact) == side else target / (side + 0.5)


def _normalisation(processor: Any) -> dict[str, Any]:
    """Mean and std of pixels from 0 to 1; a processor of another rescale_factor has them for its own range."""
    scale = 255 * float(processor.rescale_factor)
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = (_three(value) for value in (processor.image_mean, processor.image_std))
    scale = 1.0 if math.isclose(scale, 1.0) else scale
    return {"mean": [number / scale for number in mean], "std": [number / scale for number in std]}


def _three(value: Any) -> list[float]:
    return [float(value)] * 3 if isinstance(value, int | float) else [float(number) for number in value]
