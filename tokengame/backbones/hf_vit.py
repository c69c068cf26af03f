"""Vision Transformers of Hugging Face transformers on packed rows: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, ...

transformers is optional and never imported here: only who has imported it has such a model. What differs between its
architectures is in the table of `hf_kinds`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengame.backbones.base import Backbone, BlockCosts, KeyValueWeights
from tokengame.backbones.calls import Call
from tokengame.backbones.changes import check_changes
from tokengame.backbones.hf_calls import INTERFACE, read_call
from tokengame.backbones.hf_kinds import CLASS_TOKEN, IMPOSSIBLE, KINDS, MEAN, Pool
from tokengame.backbones.hf_processor import processor_preprocessing
from tokengame.backbones.hf_weights import block_weights, head_weights, is_plain_embedding, without_bias
from tokengame.backbones.parts import drop_paths, is_plain_linear, linear_macs, patch_weights
from tokengame.errors import TokenGameError
from tokengame.kernels.plain import ModelWeights
from tokengame.packed.layout import Places, RaggedLayout
from tokengame.packed.rows import add_in_pieces
from tokengame.ranges import require

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention", "kernels-community/flash-attn")
"""names, or their beginnings, of the library's ways to compute the same attention"""
PROCESSOR = "preprocessor_config.json"
PREFIX = ("cls_token", "class_embedding", "distillation_token")
"""tokens of an embedding that come before the registers"""


class Angles(NamedTuple):
    """Cosines and sines of rotary positions, as the last call needed them."""

    key: Any = None
    """grid, number format and device"""
    source: Tensor | None = None
    """the model's frequencies"""
    version: int | None = None
    """of the frequencies; None where PyTorch counts none"""
    tables: tuple[Tensor, ...] = ()
    """[1 + N, D] each"""

    def current(self, source: Tensor) -> bool:
        """Whether they are of these frequencies as they are now."""
        return self.source is source and self.version is not None and self.version == _version(source)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class HuggingFaceViT(Backbone):
    """A Vision Transformer of transformers, alone or with a classifier or a projection."""

    interface = INTERFACE

    def __init__(self, model: Any):
        name = type(model).__name__
        require(name in KINDS, f"{name} {IMPOSSIBLE.get(name)}")
        self.model, self.kind = model, KINDS[name]
        self.tower = getattr(model, self.kind.tower) if self.kind.tower else model
        check_supported(name, self.tower, self.kind.parts)
        check_changes(model, _bypassed(self), [_below(self, part) for part in (self.parts.blocks, self.parts.norm)])
        embedding = self.tower.embeddings
        self.depth, self.dim = len(self.blocks), self.tower.config.hidden_size
        attn = self._attention(0)
        self.heads, self.head_dim = _heads(attn), attn.head_dim
        self.scale = self.head_dim**-0.5
        self.has_class_token = any(hasattr(embedding, token) for token in PREFIX)
        registers = getattr(embedding, "register_tokens", torch.empty(1, 0))
        self.prefix = sum(hasattr(embedding, token) for token in PREFIX) + registers.shape[1]
        self.patch_size = _pair(self._convolution.kernel_size)
        self.input_size = _pair(self.tower.config.image_size)
        self.patches = math.prod(self.grid(*self.input_size))
        self.classes = self._classes()
        self.positional = hasattr(self.tower, "rope_embeddings")
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(type(embedding).forward).parameters
        self._tables = Angles()

    @staticmethod
    def accepts(model: Any) -> bool:
        kind = type(model)
        return kind.__module__.startswith("transformers.models.") and kind.__name__ in {**KINDS, **IMPOSSIBLE}

    @property
    def parts(self) -> Any:
        return self.kind.parts

    @property
    def blocks(self) -> list[Any]:
        return list(self.tower.get_submodule(self.parts.blocks))

    @property
    def reads_prefix_only(self) -> bool:
        return self._pool.prefix_only and self.prefix > 0

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size[0], width // self.patch_size[1]

    def _attention(self, block: int) -> Any:
        return getattr(self.blocks[block], self.parts.attention)

    @property
    def _convolution(self) -> nn.Conv2d:
        """Of the patches."""
        return next(part for part in self.tower.embeddings.modules() if isinstance(part, nn.Conv2d))

    # Embedding

    @property
    def embeds_in(self) -> torch.dtype:
        """The number format to which the model converts images."""
        return self._convolution.weight.dtype

    def embed(self, images: Tensor) -> Tensor:
        options = self._options(images)
        if self._masks:
            return self._unmasked(images, options)
        x = self.tower.embeddings(images, **options)
        return x if self.parts.start is None else getattr(self.tower, self.parts.start)(x)

    def _options(self, images: Tensor) -> dict[str, Any]:
        """Of the embedding of such images."""
        other = tuple(images.shape[2:]) != self.input_size
        return {"interpolate_pos_encoding": other} if self.interpolates else {}

    def constant_tokens(self, images: Tensor) -> Tensor | None:
        if not self._adds_positions:
            return None
        return without_bias(self.tower.embeddings, images[:1], self._options(images))[0]

    @property
    def _adds_positions(self) -> bool:
        """Whether embedding is a convolution and tokens that are added and put before, and nothing else."""
        return not self._masks and self.parts.start is None and is_plain_embedding(self.tower.embeddings)

    @property
    def _masks(self) -> bool:
        return hasattr(self.tower.config, "mask_ratio")

    def _unmasked(self, images: Tensor, options: dict[str, Any]) -> Tensor:
        """Tokens of a masked autoencoder that masks none; it sorts patches by noise, which is in order here."""
        check_unmasked(type(self.model).__name__, self.tower)
        return self.tower.embeddings(images, noise=self._order(images), **options)[0]

    def _order(self, images: Tensor) -> Tensor:
        patches = math.prod(self.grid(*images.shape[2:]))
        return torch.arange(patches, device=images.device).expand(images.shape[0], -1)

    # Blocks

    def norm_attention(self, block: int, x: Tensor) -> Tensor:
        return getattr(self.blocks[block], self.parts.norm1)(x)

    def project(self, block: int, normed: Tensor, layout: RaggedLayout, first: int = 0, last: int = 3) -> Tensor:
        attn = self._attention(block)
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]
        found = torch.stack([layer(normed) for layer in layers], 1).unflatten(2, (self.heads, self.head_dim))
        if not self.positional or first == 2:
            return found
        turned = self._rotated(found[:, : 2 - first], layout)
        return turned if last < 3 else torch.cat([turned, found[:, 2 - first :]], 1)

    def _rotated(self, heads: Tensor, layout: RaggedLayout) -> Tensor:
        """Queries or keys [M, parts, H, D] turned by the angles of their places; prefix tokens are not turned."""
        places = layout.places
        assert places is not None
        row = F.pad(places.position + 1, (0, len(heads) - layout.rows))
        cos, sin = (table.index_select(0, row)[:, None, None] for table in self._angles(places.grid, heads))
        left, right = heads.chunk(2, -1)
        return heads * cos + torch.cat([-right, left], -1) * sin

    def _angles(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, ...]:
        """[1 + N, D] cosine and sine of the angles of prefix tokens, which are 0, and of each place of the grid."""
        rope = self.tower.rope_embeddings
        _check_still(rope)
        known, key = self._tables, (grid, like.dtype, like.device)
        if known.key != key or not known.current(rope.inv_freq):
            height, width = (number * side for number, side in zip(grid, self.patch_size, strict=True))
            cos, sin = rope(like.new_empty(0, 0, height, width))
            found = F.pad(cos, (0, 0, 1, 0), value=1.0), F.pad(sin, (0, 0, 1, 0))
            known = self._tables = Angles(key, rope.inv_freq, _version(rope.inv_freq), found)
        return known.tables

    def rotary_table(self, places: Places) -> Tensor | None:
        if not self.positional:
            return None
        cos, sin = self._angles(places.grid, self._convolution.weight)
        return torch.stack([cos[1:], sin[1:]], 1).float()[None, :, None].contiguous()

    def add_attention(self, block: int, x: Tensor, attended: Tensor, layout: RaggedLayout) -> Tensor:
        return x + self._dropped(block, self._scaled(block, 0, self._output(block)(attended)), layout)

    def _output(self, block: int) -> Any:
        return getattr(self._attention(block), self.parts.output)

    def _scaled(self, block: int, half: int, update: Tensor) -> Tensor:
        scales = self.parts.scales
        return update if scales is None else getattr(self.blocks[block], scales[half])(update)

    def _dropped(self, block: int, update: Tensor, layout: RaggedLayout) -> Tensor:
        if self.parts.drop is None:
            return update
        drop = getattr(self.blocks[block], self.parts.drop)
        return drop(update) if isinstance(drop, nn.Dropout) else drop_paths(drop, update, layout)

    def feed_forward(self, block: int, x: Tensor, layout: RaggedLayout) -> Tensor:
        module = self.blocks[block]
        norm, mlp = getattr(module, self.parts.norm2), getattr(module, self.parts.mlp)

        def update(rows: Tensor) -> Tensor:
            return self._scaled(block, 1, mlp(norm(rows)))

        if module.training:
            return x + self._dropped(block, update(x), layout)
        return add_in_pieces(update, x)

    def attention_dropout(self, block: int) -> float:
        attn = self._attention(block)
        return (attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout) * attn.training

    @property
    def checkpoints(self) -> bool:
        block = self.blocks[0]
        return block.gradient_checkpointing and block.training

    def key_value_weights(self, block: int) -> KeyValueWeights | None:
        attn = self._attention(block)
        plain = is_plain_linear(attn.k_proj) and is_plain_linear(attn.v_proj) and not self.positional
        if not plain or attn.training:  # in training all parameters have gradients, as natively: the keys' bias, too
            return None
        shape, bias = (self.heads, self.head_dim), attn.v_proj.bias
        key, value = (layer.weight.unflatten(0, shape) for layer in (attn.k_proj, attn.v_proj))
        return KeyValueWeights(key, value, None if bias is None else bias.unflatten(0, shape))

    # Head

    def final_norm(self, x: Tensor) -> Tensor:
        return self.tower.get_submodule(self.parts.norm)(x)

    @property
    def _pool(self) -> Pool:
        """How the prediction is read; of towers without a pooling layer the class token or the mean is one."""
        if getattr(self.tower, "use_head", True) or self.kind.finish:
            return self.kind.pool
        return CLASS_TOKEN if self.has_class_token else MEAN

    @property
    def predicts(self) -> bool:
        """Whether the model's output has the prediction, too."""
        pools = getattr(self.tower, "use_head", True) and getattr(self.tower, "pooler", True) is not None
        return self.kind.field is not None and (pools or self.kind.field != "pooler_output")

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        pooled = self._pool.read(self, x, layout, size)
        return pooled if self.kind.finish is None else getattr(self.model, self.kind.finish)(pooled)

    def _classes(self) -> int:
        layers = ("classifier", "cls_classifier")
        return next((getattr(self.model, name).out_features for name in layers
                     if isinstance(getattr(self.model, name, None), nn.Linear)), 0)  # fmt: skip

    def plain_weights(self) -> ModelWeights | None:
        if self.positional and not self.has_class_token:
            return None
        blocks = []
        for block in self.blocks:
            weights = block_weights(self, block)
            if weights is None:
                return None
            blocks.append(weights)
        patches = patch_weights(self._convolution) if self._adds_positions else None
        layer = getattr(self.model, self.kind.finish) if self.kind.finish else None
        return ModelWeights(blocks, patches, head_weights(self._pool, self.tower.get_submodule(self.parts.norm), layer))

    # Costs

    def costs(self, block: int) -> BlockCosts:
        attn = self._attention(block)
        pairs = linear_macs(attn.k_proj) + linear_macs(attn.v_proj)
        mlp = getattr(self.blocks[block], self.parts.mlp)
        return BlockCosts(linear_macs(attn.q_proj), pairs, linear_macs(self._output(block)), linear_macs(mlp))

    def embed_macs(self) -> int:
        return self._convolution.weight.numel()

    def head_macs(self, rows: Tensor) -> Tensor:
        names = ("classifier", "visual_projection", "cls_classifier", "distillation_classifier")
        layers = [getattr(self.model, name, None) for name in names] + [getattr(self.tower, "pooler", None)]
        return self._pool.macs(self, rows) + sum(map(linear_macs, layers))

    # The model as a whole

    def read_call(self, *arguments: Any, **named: Any) -> Call:
        return read_call(self, arguments, named)

    def _native(self, module: Any, images: Tensor) -> Any:
        options: dict[str, Any] = {"return_dict": True, **self._options(images)}
        if self._masks:
            options["noise"] = self._order(images)
        return module(images, **options)

    def native(self, images: Tensor) -> Tensor:
        output = self._native(self.model, images)
        if self.predicts:
            return output[self.kind.field]
        last = output.last_hidden_state
        return last[:, 0] if self.has_class_token else last.mean(1)

    def native_features(self, images: Tensor) -> Tensor:
        last = self._native(self.tower, images).last_hidden_state
        return last if self.parts.gives_normed else self.final_norm(last)

    def fingerprint_parameters(self, block: int) -> Iterator[nn.Parameter]:
        module, attn = self.blocks[block], self._attention(block)
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        yield from getattr(module, self.parts.norm1).parameters()
        yield from (layer.weight for layer in projections)
        yield from (layer.bias for layer in projections if layer.bias is not None)
        scales = [getattr(module, name) for name in self.parts.scales or ()]
        rest = [self._output(block), *scales[:1], getattr(module, self.parts.norm2), getattr(module, self.parts.mlp)]
        for part in rest + scales[1:]:
            yield from part.parameters()

    def preprocessing(self) -> dict[str, Any]:
        """By the image processor in the model's folder, where that is known; else as such models are usually trained.

        Raises:
            TokenGameError: the processor makes images of a size that the model does not take.
        """
        usual: dict[str, Any] = {
            "input_size": [self._convolution.in_channels, *self.input_size], "interpolation": "bicubic",
            "mean": list(self.kind.images.mean), "std": list(self.kind.images.std), "crop_pct": 1.0,
            "crop_mode": "center",
        }  # fmt: skip
        folder = Path(self.model.name_or_path)
        if not self.model.name_or_path or not (folder / PROCESSOR).is_file():
            return usual
        found = usual | processor_preprocessing(str(folder))
        made, taken = (" x ".join(map(str, size[1:])) for size in (found["input_size"], usual["input_size"]))
        other = f"the image processor in {folder} makes images of {made} pixels and the model takes {taken}"
        require(made == taken or not self.interpolates, f"{other}: set the size in its {PROCESSOR} to the model's")
        return found

    def unfused(self) -> nn.Module:
        twin = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        twin.set_attn_implementation("eager")
        return twin


def _heads(attn: Any) -> int:
    return attn.num_attention_heads if hasattr(attn, "num_attention_heads") else attn.num_heads


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _below(backbone: HuggingFaceViT, name: str) -> str:
    """The name of a part of the tower, in the model."""
    return ".".join(filter(None, (backbone.kind.tower, name)))


def _bypassed(backbone: HuggingFaceViT) -> list[str]:
    """Parts that are never called, because packed rows take another way."""
    blocks, attention = backbone.parts.blocks, backbone.parts.attention
    inside = [f"{blocks}.{index}" for index in range(len(backbone.blocks))]
    names = ["", *{blocks.split(".")[0], blocks}, *inside, *(f"{name}.{attention}" for name in inside)]
    return ["", *{_below(backbone, name) for name in names} - {""}]


def check_supported(name: str, tower: Any, parts: Any) -> None:
    """Raise TokenGameError, naming the part, unless the model can be run exactly on packed rows."""
    check_unmasked(name, tower)
    attends = tower.config._attn_implementation or "eager"
    other = f"{name} attends by {attends!r}, which may compute something else: model.set_attn_implementation('sdpa')"
    require(attends.startswith(ATTENTION), other)
    blocks = tower.get_submodule(parts.blocks)
    require(len(blocks) > 0, f"{name} has no blocks, so there is nothing to prune in")
    if not any(hasattr(tower.embeddings, token) for token in PREFIX):
        first = f"{name} pools the first patch, which may be pruned: build it with add_pooling_layer=False"
        require(getattr(tower, "pooler", None) is None, first)
    for index, block in enumerate(blocks):
        _check_block(f"{name} block {index}", block, type(tower).__module__, parts)


def _check_block(where: str, block: Any, module: str, parts: Any) -> None:
    attn: Any = getattr(block, parts.attention, None)
    mlp = getattr(block, parts.mlp, None)
    for part, end in ((block, "Layer"), (attn, "Attention"), (mlp, "")):
        kind = type(part)
        own = kind.__module__ == module and kind.__name__.endswith(end)
        require(own, f"{where} has a {kind.__name__} where {module} has its own: only that can be split exactly")
    names = (parts.norm1, parts.norm2, *(parts.scales or ()), *filter(None, [parts.drop]))
    missing = [name for name in names if not hasattr(block, name)]
    missing += [name for name in ("q_proj", "k_proj", "v_proj", parts.output) if not hasattr(attn, name)]
    require(not missing, f"{where} has no {', '.join(missing)}: this version of transformers is not known")
    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale
    require(
        math.isclose(scale, attn.head_dim**-0.5), f"{where} scales its attention by {scale}, not by 1 / sqrt(head_dim)"
    )


def check_unmasked(name: str, tower: Any) -> None:
    """Raise TokenGameError where a masked autoencoder masks patches."""
    share = getattr(tower.config, "mask_ratio", 0)
    if share:
        raise TokenGameError(
            f"{name} masks {share:.0%} of the patches at random: set model.config.mask_ratio = 0.0 to read all of them"
        )


def _check_still(rope: Any) -> None:
    """Refuse positions that move at random in training, which each call would move in another way."""
    moving = [name for name in ("shift", "jitter", "rescale") if getattr(rope.config, f"pos_embed_{name}", None)]
    if rope.training and moving:
        raise TokenGameError(
            "positions change at random in training: set "
            + " and ".join(f"model.config.pos_embed_{name} = None" for name in moving)
        )
