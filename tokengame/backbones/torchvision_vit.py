"""torchvision's VisionTransformer (vit_b_16, vit_h_14, SWAG weights, convolutional stems) on packed rows.

Its attention is PyTorch's MultiheadAttention, whose packed weights are used without calling it; everything else runs
through the model's own submodules.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer

from tokengame.backbones.base import Backbone, BlockCosts, KeyValueWeights
from tokengame.backbones.calls import Call, Interface, check_masks
from tokengame.backbones.changes import check_changes
from tokengame.backbones.parts import (
    activation_of,
    check_packed_attention,
    check_rowwise,
    is_plain_norm,
    linear_macs,
    norm_weights,
    packed_key_values,
    packed_projection,
    patch_weights,
)
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import BlockWeights, LinearWeights, ModelWeights, NormWeights
from tokengame.packed.layout import RaggedLayout
from tokengame.packed.rows import add_in_pieces

INTERFACE = Interface(
    attributes=frozenset({
        "image_size", "patch_size", "hidden_dim", "mlp_dim", "attention_dropout", "dropout", "num_classes",
        "representation_size", "seq_length", "conv_proj",
    }),
)  # fmt: skip
"""of torchvision's Vision Transformers"""


class TorchvisionViT(Backbone):
    """A torchvision VisionTransformer; images have the size that it was made for, as natively."""

    interface = INTERFACE

    def __init__(self, model: Any):
        _check_supported(model)
        check_changes(model, _bypassed(model), ["encoder.layers", "encoder.ln"])
        attn = model.encoder.layers[0].self_attention
        self.model = model
        self.depth, self.dim = len(model.encoder.layers), model.hidden_dim
        self.heads, self.head_dim = attn.num_heads, attn.head_dim
        self.scale = self.head_dim**-0.5
        self.prefix, self.has_class_token = 1, True
        self.patch_size, self.input_size = (model.patch_size,) * 2, (model.image_size,) * 2
        self.patches = (model.image_size // model.patch_size) ** 2
        self.classes = _classes(model.heads)

    @staticmethod
    def accepts(model: Any) -> bool:
        return type(model) is VisionTransformer

    @property
    def blocks(self) -> list[Any]:
        return list(self.model.encoder.layers)

    @property
    def reads_prefix_only(self) -> bool:
        return True

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size[0], width // self.patch_size[1]

    def read_call(self, x: Tensor) -> Call:  # type: ignore[override]  # torchvision's arguments
        check_masks(x, None, False)
        return Call(x)

    # Embedding

    def _with_class_token(self, patches: Tensor) -> Tensor:
        """[B, N, C] -> [B, 1 + N, C]"""
        return torch.cat([self.model.class_token.expand(len(patches), -1, -1), patches], 1)

    def embed(self, images: Tensor) -> Tensor:
        encoder = self.model.encoder
        return encoder.dropout(self._with_class_token(self.model._process_input(images)) + encoder.pos_embedding)

    def constant_tokens(self, images: Tensor) -> Tensor | None:
        if images.shape[1:] != (3, *self.input_size):
            return None
        nothing = images.new_zeros(1, self.patches, self.dim)
        return (self._with_class_token(nothing) + self.model.encoder.pos_embedding)[0]

    # Blocks

    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        return self.blocks[block].ln_1(x)

    def project(self, block: int, normed: Tensor, _layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        return packed_projection(self.blocks[block].self_attention, normed, first, last)

    def add_attention(self, block: int, x: Tensor, attended: Tensor, _layout: RaggedLayout) -> Tensor:
        module = self.blocks[block]
        out = module.self_attention.out_proj
        return x + module.dropout(F.linear(attended, out.weight, out.bias))  # hooks of out_proj never run natively

    def feed_forward(self, block: int, x: Tensor, _layout: RaggedLayout) -> Tensor:
        module = self.blocks[block]
        return add_in_pieces(lambda rows: module.mlp(module.ln_2(rows)), x)

    def attention_dropout(self, block: int) -> float:
        attn = self.blocks[block].self_attention
        return attn.dropout if attn.training else 0.0

    def key_value_weights(self, block: int) -> KeyValueWeights | None:
        return None if self.attention_dropout(block) else packed_key_values(self.blocks[block].self_attention)

    # Head

    def final_norm(self, x: Tensor) -> Tensor:
        return self.model.encoder.ln(x)

    def head(self, x: Tensor, layout: RaggedLayout, _size: Tensor | None = None) -> Tensor:
        return self.model.heads(self.final_norm(layout.first(x)))

    def native_features(self, images: Tensor) -> Tensor:
        return self.model.encoder(self._with_class_token(self.model._process_input(images)))

    # Costs

    def costs(self, block: int) -> BlockCosts:
        module = self.blocks[block]
        query = module.self_attention.in_proj_weight.numel() // 3
        return BlockCosts(query, 2 * query, linear_macs(module.self_attention), linear_macs(module.mlp))

    def embed_macs(self) -> int:
        macs, area = 0, self.patch_size[0] ** 2  # outputs of a layer for one patch
        for layer in self.model.conv_proj.modules():
            if isinstance(layer, nn.Conv2d):
                area //= layer.stride[0] * layer.stride[1]
                macs += area * layer.weight.numel()
        return macs

    def head_macs(self, rows: Tensor) -> Tensor:
        return rows * 0 + linear_macs(self.model.heads)

    # The model as a whole

    def preprocessing(self) -> dict[str, Any]:
        """As torchvision's own weights of that size were evaluated: 224 pixels cut from 256, others whole."""
        size = self.model.image_size
        cut = {"interpolation": "bilinear", "crop_pct": 224 / 256}
        whole = {"interpolation": "bicubic", "crop_pct": 1.0}
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        return {"input_size": [3, size, size], "mean": mean, "std": std, **(cut if size == 224 else whole)}

    def plain_weights(self) -> ModelWeights | None:
        if not all(_is_plain_block(block) for block in self.blocks):
            return None
        return ModelWeights(
            [_block_weights(block) for block in self.blocks], patch_weights(self.model.conv_proj), self._head_weights()
        )

    def _head_weights(self) -> tuple[NormWeights, LinearWeights] | None:
        heads, norm = self.model.heads, self.model.encoder.ln
        layer = heads[0] if type(heads) is nn.Sequential and len(heads) == 1 else heads
        if type(layer) is not nn.Linear or not is_plain_norm(norm):
            return None
        return norm_weights(norm), LinearWeights(layer.weight, layer.bias)


def _is_plain_block(block: Any) -> bool:
    """Whether a block is norm, attention and MLP as the kernels compute them, by exact type."""
    mlp = list(block.mlp)
    others = [nn.Linear, nn.Dropout, nn.Linear, nn.Dropout]
    usual = len(mlp) == 5 and [type(layer) for layer in (mlp[0], *mlp[2:])] == others
    usual = usual and activation_of(mlp[1]) is not None and type(block.dropout) is nn.Dropout
    return usual and is_plain_norm(block.ln_1) and is_plain_norm(block.ln_2)


def _block_weights(block: Any) -> BlockWeights:
    attn, mlp, activation = block.self_attention, block.mlp, activation_of(block.mlp[1])
    assert activation is not None
    return BlockWeights(
        norm1=norm_weights(block.ln_1),
        qkv=LinearWeights(attn.in_proj_weight, attn.in_proj_bias),
        proj=LinearWeights(attn.out_proj.weight, attn.out_proj.bias),
        norm2=norm_weights(block.ln_2),
        fc1=LinearWeights(mlp[0].weight, mlp[0].bias),
        fc2=LinearWeights(mlp[3].weight, mlp[3].bias),
        heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.head_dim**-0.5,
        activation=activation,
    )


def _classes(heads: Any) -> int:
    """Logits of the heads that the model has now, which users replace; 0 for embeddings."""
    while isinstance(heads, nn.Sequential) and len(heads):
        heads = heads[-1]
    return getattr(heads, "out_features", 0)


def _bypassed(model: Any) -> list[str]:
    """Parts that are never called, because packed rows take another way."""
    blocks = [f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children()]
    return ["", "encoder", "encoder.layers", *blocks, *(f"{name}.self_attention" for name in blocks)]


def _check_supported(model: Any) -> None:
    """Raise TokenGameError, naming the part, unless `model` can be run exactly on packed rows."""
    if not len(model.encoder.layers):
        raise TokenGameError("VisionTransformer has no layers, so there is nothing to prune in")
    for index, block in enumerate(model.encoder.layers):
        where = f"VisionTransformer layer {index}"
        if type(block) is not EncoderBlock or type(block.mlp) is not MLPBlock:
            kind = type(block).__name__ if type(block) is not EncoderBlock else type(block.mlp).__name__
            raise TokenGameError(f"{where} has a {kind}; only torchvision's own EncoderBlock is known to be exact")
        check_packed_attention(where, block.self_attention)
        check_rowwise(where, block, block.self_attention)
