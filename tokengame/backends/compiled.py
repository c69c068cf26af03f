"""The backends that use the compiled kernels: for attention and decisions alone, or for whole stretches and games."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengame.backbones.base import Backbone
from tokengame.backends.base import FusedRequest, Kept, Stretch, Tokens, predict
from tokengame.backends.decisions import no_features
from tokengame.backends.pytorch import TorchBackend
from tokengame.kernels import functions, usable, usable_heads
from tokengame.kernels.functions import Entry, FusedOutput
from tokengame.kernels.library import TILE
from tokengame.kernels.weights import PackedWeights, packed_weights
from tokengame.packed.attention import Kernel, deterministic_attention, fastest_attention
from tokengame.packed.heads import CachedKeysValues, Heads, ObservationRequest, Observed
from tokengame.packed.layout import Places, RaggedLayout

OPEN_CHOICES = (fastest_attention, deterministic_attention)
"""attention arguments that leave the choice of kernel to the backend; any other is a wish for that very kernel"""


class CompiledDecisions(TorchBackend):
    """Compiled attention and decisions between a model's own layers, for blocks that the kernels do not know."""

    name = "compiled attention"

    @classmethod
    def ready(cls, backbone: Backbone, images: Tensor, attention: Kernel) -> TorchBackend | None:
        usual = attention in OPEN_CHOICES and backbone.head_dim % TILE == 0
        return cls(backbone, attention) if usual and usable(images) and images.dtype == backbone.dtype else None

    def attend(self, qkv: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        return functions.self_attention(qkv, layout, bias) if usable_heads(qkv) else super().attend(qkv, layout, bias)

    def cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, query_layout: RaggedLayout, layout: RaggedLayout,
        bias: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        kernel = functions.attention if usable_heads(q) else super().cross_attend
        return kernel(q, k, v, query_layout, layout, bias, scale)

    def log_attention(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        if not usable_heads(heads.keys):
            return super().log_attention(heads, layout, bias)
        rows = functions.class_attention(heads.keys, heads.query, heads.scale, layout, bias)
        return layout.pad(rows, float("-inf")).transpose(1, 2)

    @property
    def _decides(self) -> bool:
        """Whether rows are wide enough for the kernels of decisions."""
        return self.backbone.dim % TILE == 0

    def observe(self, heads: Heads, layout: RaggedLayout, bias: Tensor | None, request: ObservationRequest) -> Observed:
        if not self._decides or not usable_heads(heads.values):
            return super().observe(heads, layout, bias, request)
        agents, rows = request.agents, request.agents.behind(request.prefix)
        position = request.position.index_select(0, rows)
        if request.features:
            features = functions.observe(heads.keys, heads.values, heads.query, heads.scale, layout, bias, request)
        else:
            features = no_features(agents, heads.keys.shape[1])
        return Observed(features, position, agents.image, rows)

    def merge(self, tokens: Tokens, keep: Tensor, kept_layout: RaggedLayout) -> Kept:
        if tokens.observed is not None and tokens.observed.similarity is not None:
            return super().merge(tokens, keep, kept_layout)
        assert tokens.heads is not None
        x, size, position, absorber = functions.merge(
            tokens.heads.values, tokens.x, tokens.size, tokens.position, keep, tokens.layout, kept_layout, tokens.prefix
        )
        return Kept(x, position, size, absorber)


class CompiledBlocks(CompiledDecisions):
    """Whole stretches of blocks, and whole games, in one call of the compiled kernels.

    Args:
        backbone, attention: as in `TorchBackend`.
        weights: of the backbone, packed.
    """

    name = "compiled"

    def __init__(self, backbone: Backbone, attention: Kernel, weights: PackedWeights):
        super().__init__(backbone, attention)
        self.weights = weights

    @classmethod
    def ready(cls, backbone: Backbone, images: Tensor, attention: Kernel) -> TorchBackend | None:
        if attention not in OPEN_CHOICES or not usable(images) or images.dtype != backbone.dtype:
            return None
        weights = packed_weights(backbone.model, backbone.watch, backbone.plain_weights)
        return None if weights is None else cls(backbone, attention, weights)

    def embed(self, images: Tensor) -> Tensor:
        start = self._start(images) if self.weights.patches is not None else None
        if start is None or self.weights.patches is None:
            return super().embed(images)
        patch, prefix = self.backbone.patch_size[0], self.backbone.prefix
        return self.backbone.after_embedding(functions.embed(images, self.weights.patches, patch, start, prefix))

    def _start(self, images: Tensor) -> Tensor | None:
        """`Backbone.constant_tokens` of images of this shape, computed once for these weights."""
        known = self.weights.start.get(images.shape[1:])
        if known is None and (known := self.backbone.constant_tokens(images)) is not None:
            known = self.weights.start[images.shape[1:]] = known.contiguous()
        return known

    def run(
        self, first: int, last: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None,
        cached: CachedKeysValues | None = None, request: ObservationRequest | None = None,
    ) -> Stretch:  # fmt: skip
        angles, class_query = self._angles(layout.places), self.backbone.has_class_token
        ran = functions.run_half_blocks(
            self.weights.blocks, first, last, x, layout, bias, cached, request, class_query, angles
        )
        if request is None or ran.next_keys_values is None:
            return Stretch(ran.x, ran.qkv)
        assert ran.next_query is not None
        keys, values = ran.next_keys_values.unbind(1)
        heads = Heads(ran.next_query, keys, values, self.backbone.scale)
        observed = ran.observed if ran.observed is not None else self.observe(heads, layout, bias, request)
        return Stretch(ran.x, ran.qkv, heads, observed)

    def _angles(self, places: Places | None) -> Tensor | None:
        """`Backbone.rotary_table` for heads as wide as the kernels have them."""
        table = None if places is None else self.backbone.rotary_table(places)
        return None if table is None else self.weights.widened(table)

    def finish(self, half: int, x: Tensor, layout: RaggedLayout, bias: Tensor | None = None) -> Tensor:
        if half % 2 or self.backbone.positional:  # `last_block` needs keys that are linear in rows
            return super().finish(half, x, layout, bias)
        block = self.weights.blocks[self.backbone.depth - 1]
        return functions.last_block(block, self.weights.last_qkv, x, layout, self.backbone.prefix, bias)

    def head(self, x: Tensor, layout: RaggedLayout, size: Tensor | None = None) -> Tensor:
        if self.weights.head is None:
            return super().head(x, layout, size)
        return functions.normed_linear(layout.first(x), *self.weights.head)

    def fused(self, images: Tensor, request: FusedRequest) -> FusedOutput | None:
        backbone, end = self.backbone, 2 * self.backbone.depth - 2
        entry = self._entry(images)
        places = None
        if backbone.positional:
            grid = backbone.grid(*images.shape[2:])
            places = backbone.whole_layout(images.new_empty(1, len(entry.start), 0), grid).places
        angles = self._angles(places)
        classify = self.weights.head is not None and backbone.has_class_token and request.end == end and angles is None
        played = functions.fused_forward(self.weights, entry, classify, *request, angles=angles)
        logits = played.logits
        if logits is None:
            assert played.rows is not None
            counts = played.kept[-1] if played.kept else torch.full((len(images),), len(entry.start) - backbone.prefix)
            layout = RaggedLayout((counts + backbone.prefix).tolist(), images.device)
            if places is not None:
                layout = layout.at(places._replace(position=_positions(played.alive, backbone.prefix)))
            bias = None if played.sizes is None else played.sizes.log()
            logits = predict(self, request.end, played.rows, layout, bias, played.sizes)
        return FusedOutput(logits, played.kept, played.alive, played.tokens_before)

    def _entry(self, images: Tensor) -> Entry:
        """Pixels where the kernels embed them as the model does, else tokens."""
        backbone, weights = self.backbone, self.weights
        plain = weights.patches is not None and backbone.embeds_plainly
        start = self._start(images) if plain else None
        if start is not None:
            return Entry(images, start, backbone.patch_size[0], backbone.prefix, backbone.has_class_token)
        tokens = self.embed(images)
        return Entry(tokens, tokens[0], 0, backbone.prefix, backbone.has_class_token)


def _positions(alive: Tensor, prefix: int) -> Tensor:
    """[M] place in the grid of each row that is left, prefix tokens (-1) first; alive [B, N]."""
    rows = F.pad(alive, (prefix, 0), value=True).nonzero()[:, 1]
    return (rows - prefix).clamp(min=-1)
