"""What methods that remove rows between a block's attention and its MLP have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tokengame import backends
from tokengame.backbones import wrap
from tokengame.backends import Backend
from tokengame.backends.base import predict
from tokengame.packed.attention import Kernel, fastest_attention
from tokengame.packed.layout import RaggedLayout
from tokengame.runtime.macs import block_macs, native_macs
from tokengame.runtime.method import Method

KEEP = (0.95, 0.9, 0.8, 0.7, 0.6)
"""shares kept at each of three stages, for methods that have such a setting"""


@dataclass(frozen=True)
class Baseline:
    """A method as `compare` runs it."""

    name: str
    settings: Callable[[nn.Module], list[tuple[str, Method]]]
    """a model -> the method at each of its settings, with the setting's name"""
    published: bool = True
    """whether it is from a paper, so that the fastest of these is the one to compare with"""


@dataclass(frozen=True)
class ReducedRows:
    """A batch somewhere in a `Reducer`."""

    x: Tensor
    """[M, C] packed, prefix tokens first in each image"""
    layout: RaggedLayout
    size: Tensor | None = None
    """[M] patches each row stands for, in methods that weigh them"""
    stage: int = 0
    """reductions before this one"""
    owner: Tensor | None = None
    """[B, prefix + N] in methods that merge, the row of its image that each token is in now"""

    @property
    def bias(self) -> Tensor | None:
        """[M] added to the attention logits of each key: log size, or None."""
        return None if self.size is None else self.size.log()

    def layout_of(self, counts: list[int], row: Tensor) -> RaggedLayout:
        """Layout of other rows, `counts` in each image, of which each comes from where row `row` [M'] of these does."""
        layout = RaggedLayout(counts, self.x.device)
        if self.layout.places is None:
            return layout
        return layout.at(self.layout.places._replace(position=self.layout.places.position.index_select(0, row)))


@dataclass(frozen=True)
class ReducedOutput:
    """The prediction for B images."""

    logits: Tensor
    """[B, classes]"""
    counts: tuple[Tensor, ...]
    """[B] rows of each image at the start and after each reduction, prefix tokens included"""
    prefix: int

    @property
    def total(self) -> int:
        """Patches of an image at the start."""
        return int(self.counts[0][0]) - self.prefix

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """[B] patch tokens after each reduction"""
        return tuple(count - self.prefix for count in self.counts[1:])


class Reducer(nn.Module):
    """A frozen network that removes rows after the attention of some blocks and before their MLP.

    Like the game it runs on the best backend, and computes prefix tokens alone in the last block where the prediction
    reads no others.

    Args:
        model: of a supported family.
        blocks: where rows are removed, ascending.
        attend: attention inside each image.
    """

    def __init__(self, model: nn.Module, blocks: tuple[int, ...], attend: Kernel = fastest_attention):
        super().__init__()
        self.backbone, self.blocks, self.attend = wrap(model), blocks, attend
        self.end = self.backbone.last_half(2 * blocks[-1] + 1 if blocks else 0)

    def reduce(self, rows: ReducedRows, qkv: Tensor, backend: Backend) -> ReducedRows:
        """The rows that go on.

        Args:
            rows: after the attention of a block.
            qkv: [M, 3, H, D] of that attention.
            backend: what computes.
        """
        raise NotImplementedError

    def cost(self, rows: Tensor) -> Tensor:
        """MACs of reducing `rows` [B] rows."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> ReducedOutput:
        """Run [B, channels, height, width] images through all blocks."""
        backend = backends.choose(self.backbone, images, self.attend)
        tokens = backend.embed(images)
        layout = self.backbone.whole_layout(tokens, self.backbone.grid(*images.shape[2:]))
        rows = ReducedRows(tokens.flatten(0, 1), layout)
        half, counts = 0, [rows.layout.count]
        for stage, block in enumerate(self.blocks):
            ran = backend.run(half, 2 * block + 1, rows.x, rows.layout, rows.bias)
            assert ran.qkv is not None
            rows = self.reduce(replace(rows, x=ran.x, stage=stage), ran.qkv, backend)
            half = 2 * block + 1
            counts.append(rows.layout.count)
        x = backend.run(half, self.end, rows.x, rows.layout, rows.bias).x
        return ReducedOutput(self.finish(backend, x, rows), tuple(counts), self.backbone.prefix)

    def finish(self, backend: Backend, x: Tensor, rows: ReducedRows) -> Tensor:
        """The prediction [B, classes] from the rows x [M, C] at the end."""
        return predict(backend, self.end, x, rows.layout, rows.bias, rows.size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, classes]."""
        return self.predict(images).logits

    def macs(self, output: ReducedOutput) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] of an output."""
        return native_macs(self.backbone, output.total), self.macs_of([count.cpu() for count in output.counts])

    def macs_of(self, counts: list[Tensor]) -> Tensor:
        """[B] multiply-accumulates of images with `counts` [B] rows at the start and after each reduction."""
        backbone, rows, stage = self.backbone, counts[0].double(), 0
        total = (rows - backbone.prefix) * backbone.embed_macs()
        for block in range(backbone.depth):
            after = rows
            if block in self.blocks:
                total, stage = total + self.cost(rows), stage + 1
                after = counts[stage].double()
            total, rows = total + block_macs(backbone, block, self.end, rows, rows, after), after
        return total + backbone.head_macs(rows)


def class_attention(backend: Backend, qkv: Tensor, layout: RaggedLayout) -> Tensor:
    """[B, H, longest] attention of the class token to each row; qkv [M, 3, H, D]."""
    return backend.log_attention(backend.backbone.heads_of(qkv, layout), layout).exp()
