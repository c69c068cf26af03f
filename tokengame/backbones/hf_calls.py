"""Calls of Hugging Face models: which arguments a pruned model honours, and the output object it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import Tensor

from tokengame.backbones.calls import Call, Interface, check_masks
from tokengame.backbones.hf_kinds import BOTH_HEADS, both_logits
from tokengame.errors import TokenGameError
from tokengame.ranges import require

_MASKED = "hides tokens, of which a pruned model computes a part"
REFUSED = {
    "output_attentions": "is not possible with pruned tokens, which have no attention weights",
    "bool_masked_pos": _MASKED,
    "attention_mask": _MASKED,
    "head_mask": "is not known to the attention of a pruned model",
    "noise": "shuffles patches, which a pruned model keeps in order",
    "is_causal": _MASKED,
}
"""arguments that a pruned model cannot honour, and why"""

INTERFACE = Interface(
    attributes=frozenset({
        "config", "dtype", "device", "name_or_path", "main_input_name", "input_modalities", "base_model_prefix",
        "num_labels", "get_input_embeddings", "is_activation_checkpointing", "is_gradient_checkpointing",
        "num_parameters", "embeddings",
    }),
    changes=frozenset({
        "activation_checkpointing_enable", "activation_checkpointing_disable", "gradient_checkpointing_enable",
        "gradient_checkpointing_disable", "set_attn_implementation",
    }),
    refused={
        "save_pretrained": "save the native model, fast.restore().save_pretrained(folder), and the policy beside it",
        "push_to_hub": "push the native model, fast.restore().push_to_hub(name), and the policy beside it",
        "from_pretrained": "load the model, then prune it",
        "generate": "prune the image tower of a model that generates, and put it back",
        "set_input_embeddings": "change the model, then prune it",
        "resize_token_embeddings": "change the model, then prune it",
        "add_adapter": "add the adapter to the model, then prune it",
        "load_adapter": "load the adapter into the model, then prune it",
        "init_weights": "initialise the model, then prune it",
    },
)  # fmt: skip
"""of the models of transformers"""


def read_call(backbone: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Call:
    """What a call of the model with these arguments is to return; see `Backbone.read_call`."""
    model, given = backbone.model, _by_name(backbone.model, arguments, named)
    images, config = given.pop("pixel_values", None), model.config
    require(images is not None, "pixel_values is missing: pass images [batch, channels, height, width]")
    check_masks(images, None, False)
    given.setdefault("output_attentions", config.output_attentions)
    for name, why in REFUSED.items():
        value = given.pop(name, None)
        require(value is None or value is False, f"{name} {why}; pass it to fast.restore()")
    _check_size(backbone, images, given.pop("interpolate_pos_encoding", None))
    wanted, return_dict = given.pop("output_hidden_states", None), given.pop("return_dict", None)
    wanted = config.output_hidden_states if wanted is None else wanted
    answer = Answer(backbone, _blocks(wanted, backbone.depth), given.pop("labels", None), given)
    plain = not (config.return_dict if return_dict is None else return_dict)
    return Call(
        images.to(backbone.embeds_in),
        answer.features,
        lambda output, features: answer(output, features).to_tuple() if plain else answer(output, features),
    )


def _by_name(model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    given = dict(inspect.signature(type(model).forward).bind(model, *arguments, **named).arguments)
    del given["self"]
    return given | given.pop("kwargs", {})


def _check_size(backbone: Any, images: Tensor, interpolate: bool | None) -> None:
    """Models that interpolate positions do so only where the caller says so."""
    size = tuple(images.shape[2:])
    if backbone.interpolates and size != backbone.input_size and not interpolate:
        height, width = backbone.input_size
        raise TokenGameError(
            f"pixel_values are of {' x '.join(map(str, size))} pixels and the model was made for {height} x {width}: "
            "resize them, or pass interpolate_pos_encoding=True"
        )


def _blocks(wanted: bool | int | Iterable[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks whose output is wanted (-1: embedded tokens), of `output_hidden_states`: a flag, an index or several.

    Hidden state i is the output of block i - 1.
    """
    if wanted is None or isinstance(wanted, bool):
        return tuple(range(-1, depth)) if wanted else ()
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    return tuple(sorted({i % (depth + 1) - 1 for i in indices if -depth - 1 <= i <= depth}))


class Answer:
    """The output object of one call.

    Args:
        backbone: of a model of transformers.
        hidden: blocks whose output the caller wants, as hidden states.
        labels: of which there is to be a loss.
        options: of the loss.
    """

    def __init__(self, backbone: Any, hidden: tuple[int, ...], labels: Tensor | None, options: dict[str, Any]):
        self.backbone, self.hidden, self.labels, self.options = backbone, hidden, labels, options
        self.kind = inspect.signature(type(backbone.model).forward).return_annotation
        self.names = {field.name for field in fields_of(self.kind)}
        last = "last_hidden_state" in self.names or backbone.kind.pool is BOTH_HEADS
        self.features = tuple(sorted({*hidden, *([backbone.depth - 1] if last else [])}))
        """blocks whose output on the full grid is needed"""

    def __call__(self, output: Tensor, features: list[Tensor]) -> Any:
        backbone, found = self.backbone, dict(zip(self.features, features, strict=True))
        with torch.set_grad_enabled(torch.is_grad_enabled() and backbone.model.training):
            parts: dict[Any, Any] = {backbone.kind.field: output} if backbone.predicts else {}
            if backbone.depth - 1 in found:
                parts |= self._of_last(found[backbone.depth - 1])
            if self.labels is not None:
                parts["loss"] = backbone.model.loss_function(self.labels, output, backbone.model.config, **self.options)
        if self.hidden:
            every = range(-1, backbone.depth)
            parts["hidden_states"] = tuple(found[block] if block in self.hidden else None for block in every)
        return self.kind(**parts)

    def _of_last(self, last: Tensor) -> dict[str, Tensor]:
        """What the output has of the last features [B, prefix + N, C] on the full grid."""
        backbone, parts = self.backbone, {}
        if "last_hidden_state" in self.names:
            parts["last_hidden_state"] = backbone.final_norm(last) if backbone.kind.parts.gives_normed else last
        if backbone.kind.pool is BOTH_HEADS:
            names = ("cls_logits", "distillation_logits")
            parts |= dict(zip(names, both_logits(backbone, backbone.final_norm(last[:, :2])), strict=True))
        if "ids_restore" in self.names:  # of an encoder that masks nothing
            patches = torch.arange(last.shape[1] - backbone.prefix, device=last.device).expand(len(last), -1)
            parts |= {"mask": torch.zeros_like(patches, dtype=torch.float32), "ids_restore": patches}
        return parts
