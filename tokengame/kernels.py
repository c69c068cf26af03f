"""Kernels of our own for packed rows in bfloat16, on x86 processors that compute in it (see csrc/).

What PyTorch does between its matrix products costs more than they do where a processor multiplies matrices in tiles
(AMX), and it makes a new kernel for every new number of rows, which packed batches have every time. Here a norm, the
product that follows, its bias, activation and residual are one pass over rows that stay in the cache, attention never
leaves it, and no length is special. Sums are float32; what PyTorch rounds in between is not rounded, so results are
nearer to float32's than its own (tests/test_kernels.py).

The library is compiled when the package is installed. Without a compiler, or on another processor, everything runs on
PyTorch's kernels as in other number formats.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from tokengame.ops import Layout, Look, Memory, Seen
from tokengame.structs import Linear, LookStruct, MemoryStruct, NormStruct

SIDE = 32
"""what widths must be multiples of"""
SOURCES = Path(__file__).parents[1] / "csrc"
"""what the kernels are compiled from, in a checkout of the repository"""
LEVELS = {"none": 0, "avx512": 1, "amx": 2}
"""instructions to use at most, by the environment variable TOKENGAME_KERNELS"""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, ready for use; None where they do not exist or cannot run."""
    found = importlib.util.find_spec("tokengame._kernels")
    if found is None or found.origin is None:
        return None
    try:  # threads are those of PyTorch: its OpenMP is in the process already
        kernels = ctypes.CDLL(found.origin)
    except OSError:
        return None
    if SOURCES.is_dir() and _checksum(kernels) != _checksum_of(SOURCES):
        warnings.warn(
            f"{found.origin} was not compiled from {SOURCES}, so PyTorch's slower kernels are used: "
            "install tokengame again (make, or pip install -e .)",
            stacklevel=2,
        )
        return None
    kernels.peek.restype, kernels.workspace.restype = ctypes.c_ulonglong, ctypes.c_long
    return kernels if kernels.set_up(LEVELS.get(os.environ.get("TOKENGAME_KERNELS", "amx"), 2)) else None


def _checksum(kernels: ctypes.CDLL) -> int | None:
    """Of the sources that a library was compiled from."""
    return kernels.sources() & 0xFFFFFFFF if hasattr(kernels, "sources") else None


def _checksum_of(folder: Path) -> int:
    """Of sources, as setup.py has it."""
    return crc32(b"".join(path.read_bytes() for kind in ("*.cpp", "*.h") for path in sorted(folder.glob(kind))))


_WANTED = ContextVar("wanted", default=True)


@contextmanager
def on_pytorch() -> Iterator[None]:
    """Within it everything runs on PyTorch's kernels: to compare."""
    token = _WANTED.set(False)
    try:
        yield
    finally:
        _WANTED.reset(token)


def take(rows: Tensor) -> bool:
    """Whether these kernels run on such rows: bfloat16 on a CPU that has it, and nobody wants gradients."""
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu" or torch.compiler.is_compiling() or not len(rows):
        return False
    wanted = rows.requires_grad or torch.is_grad_enabled()
    return not wanted and not torch.is_autocast_enabled("cpu") and library() is not None and _WANTED.get()


def normed_linear(x: Tensor, norm: NormStruct, linear: Linear) -> Tensor:
    """linear(norm(x)): [M, inputs] -> [M, outputs]"""
    width = len(linear.bias)
    out = x.new_empty(len(x), width)
    weight, bias = (ctypes.c_void_p(pointer) for pointer in (norm.weight, norm.bias))
    call("normed_linear", x.contiguous(), len(x), linear.inputs, weight, bias, float(norm.eps), linear.packed,
          linear.bias, width, out, torch.get_num_threads())  # fmt: skip
    return out[:, : linear.outputs]


class Stretch(NamedTuple):
    """What a stretch of half-blocks makes of rows."""

    x: Tensor
    """[M, C]"""
    qkv: Tensor | None
    """[M, 3, H, D] of the last attention among the rows themselves"""
    next: Tensor | None
    """[M, 2, H, D] keys and values of the attention that would come next"""
    query: Tensor | None
    """[B, H, D] and the queries of each image's first row"""
    seen: Seen | None = None
    """what agents observe of these"""


def stretch(
    blocks: Any, first: int, last: int, x: Tensor, layout: Layout, bias: Tensor | None,
    memory: Memory | None = None, look: Look | None = None, query: bool = False,
) -> Stretch:  # fmt: skip
    """Half-blocks `first` to `last` - 1 of `blocks`, an array of `BlockStruct`; see `Backbone.run`.

    Args:
        memory: what the first half, an attention, looks at in place of the rows.
        look: what is wanted of the next attention.
        query: whether each image's first row asks in it, without which nothing is observed here.
    """
    heads, width = blocks[0].heads, blocks[0].width
    x, rows = x.contiguous(), len(x)
    out = x.new_empty(x.shape) if first < last else x
    qkv, heard = x.new_empty(rows, 3, heads, width), x.new_empty(rows, max(heads * width, x.shape[1]))
    following = x.new_empty(rows, 2, heads, width) if look else None
    asking = x.new_empty(layout.images, heads, width) if query else None
    remembered = MemoryStruct()
    if memory is not None:
        keys, values, its_bias = _strided(memory.keys), _strided(memory.values), _floats(memory.bias)
        pointers = (keys[0], values[0], memory.layout.bounds, its_bias)
        where = [0 if tensor is None else tensor.data_ptr() for tensor in pointers]
        remembered = MemoryStruct(*where[:2], *keys[1:], *values[1:], *where[2:])
    looks, seen = LookStruct(), None
    if look is not None and query and look.observe:
        agents = rows - look.prefix * layout.images
        features = torch.empty(agents, heads + 6, dtype=torch.float32, device="cpu")
        index = torch.empty(3, agents, dtype=torch.long, device="cpu")
        at = [tensor.data_ptr() for tensor in (look.position, look.dither, features, index)]
        looks, seen = LookStruct(*at[:2], look.total, look.prefix, *at[2:], agents), Seen(features, *index)
    call("stretch", blocks, first, last, x, rows, layout.bounds, layout.images, _floats(bias), ctypes.byref(remembered),
         ctypes.byref(looks), qkv, heard, out, following, asking, torch.get_num_threads())  # fmt: skip
    attended = any(half % 2 == 0 for half in range(first + (memory is not None), last))
    return Stretch(out, qkv if attended else None, following, asking, seen)


def close(block: Any, qkv: Tensor, x: Tensor, layout: Layout, prefix: int, bias: Tensor | None) -> Tensor:
    """The last block, from its attention on, for the first `prefix` rows of each image: [M, C] -> [B * prefix, C].

    As `blocks.folded_attention`; `block` a `BlockStruct`, qkv [3 * H * D, C] the weight of its first layer.
    """
    normed, out = torch.empty_like(x), x.new_empty(layout.images * prefix, x.shape[1])
    call("close_block", ctypes.byref(block), qkv.detach().contiguous(), x.contiguous(), len(x), layout.bounds,
          layout.images, prefix, _floats(bias), normed, out, torch.get_num_threads())  # fmt: skip
    return out


def takes(heads: Tensor) -> bool:
    """Whether `tiled_attention` runs on [..., D] here."""
    return heads.shape[-1] % SIDE == 0 and take(heads)


def tiled_attention(qkv: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """A kernel for `attention`: nothing padded beyond 32 rows, no matrix of all pairs."""
    q, k, v = qkv.unbind(1)
    return attention(q, k, v, layout, layout, bias).flatten(1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, asking: Layout, layout: Layout, bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """As `attention.asked_attention`; D is a multiple of 32."""
    out = q.new_empty(q.shape)
    call("attention", *_strided(q), *_strided(k), *_strided(v), asking.bounds, layout.bounds, asking.images,
          q.shape[1], q.shape[2], _floats(bias), float(q.shape[2] ** -0.5 if scale is None else scale), out,
          torch.get_num_threads())  # fmt: skip
    return out


def embed(images: Tensor, linear: Linear, patch: int, start: Tensor, prefix: int) -> Tensor:
    """Patches through a convolution that is `linear`, added to what each token starts with.

    Args:
        images: [B, channels, height, width].
        linear: channels * patch^2 inputs.
        patch: side of a patch: 8, 16 or 32.
        start: [prefix + N, C] prefix tokens, positions of the patches.
        prefix: rows of `start` that are no patches.

    Returns:
        [B, prefix + N, C]
    """
    out = images.new_empty(len(images), *start.shape)
    call("embed", images.contiguous(), *images.shape, patch, linear.packed, linear.bias, linear.outputs,
          start.contiguous(), prefix, out, torch.get_num_threads())  # fmt: skip
    return out


def class_attention(keys: Tensor, query: Tensor, scale: float, layout: Layout, bias: Tensor | None) -> Tensor:
    """Log of the attention that queries [B, H, D] pay to each row [M, H, D] of their image: [M, H]."""
    out = keys.new_empty(keys.shape[:2], dtype=torch.float32)
    call("class_attention", *_strided(keys), *keys.shape[1:], query.contiguous(), float(scale), layout.bounds,
          layout.images, _floats(bias), out, torch.get_num_threads())  # fmt: skip
    return out


def observe(
    keys: Tensor, values: Tensor, query: Tensor, scale: float, layout: Layout, prefix: int, bias: Tensor | None,
    position: Tensor, dither: Tensor, total: int, compare: bool,
) -> Tensor:  # fmt: skip
    """[A, heads + 6] features of the agents, see `Observation.features`, D a multiple of 32.

    Args:
        keys, values: [M, H, D].
        query: [B, H, D] of the class token.
        scale: factor on q.k.
        layout: of the M rows, the first `prefix` of each image no agents.
        bias: [M] log sizes, or None.
        position: [M] place in the grid.
        dither: [N].
        total: agents of an image at the start.
        compare: whether values are compared.
    """
    heads, width = keys.shape[1:]
    features = keys.new_empty(layout.rows - prefix * layout.images, heads + 6, dtype=torch.float32)
    call("observe", *_strided(keys), *_strided(values), heads, width, query.contiguous(), float(scale), layout.bounds,
          layout.images, prefix, _floats(bias), position, dither.float(), total, int(compare), features, None, 0, 0,
          torch.get_num_threads())  # fmt: skip
    return features


def absorb(
    values: Tensor, x: Tensor, size: Tensor | None, position: Tensor, keep: Tensor, layout: Layout, left: Layout,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `decisions.absorb`; D and C are multiples of 32.

    Args:
        values: [M, H, D].
        x, size, position: [M, C], [M] or None, [M].
        keep: [A] bool, at least one of each image.
        layout: of the M rows, the first `prefix` of each image no agents.
        left: of the M' rows that stay.

    Returns:
        [M', C], sizes [M'], positions [M'], absorbers [A]
    """
    rest, sizes = x.new_empty(left.rows, x.shape[1]), x.new_empty(left.rows, dtype=torch.float32)
    positions = position.new_empty(left.rows)
    absorber = position.new_empty(len(keep))
    call("absorb", *_strided(values), *values.shape[1:], x.contiguous(), x.shape[1], _floats(size), position,
          keep.contiguous(), layout.bounds, left.bounds, layout.images, prefix, rest, sizes, positions, absorber,
          torch.get_num_threads())  # fmt: skip
    return rest, sizes, positions, absorber


def _strided(heads: Tensor) -> tuple[Tensor, int, int]:
    """[M, H, D] as where it begins and how far apart rows and heads are."""
    heads = heads if heads.stride(2) == 1 else heads.contiguous()
    return heads, heads.stride(0), heads.stride(1)


def _floats(numbers: Tensor | None) -> Tensor | None:
    return None if numbers is None else numbers.float().contiguous()


def call(name: str, *arguments: Any) -> int:
    """A kernel of the library: tensors as pointers, None as a null pointer, numbers as long or float."""
    kernels = library()
    assert kernels is not None
    return getattr(kernels, name)(*[_converted(argument) for argument in arguments])


def _converted(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_long(argument) if isinstance(argument, int) else argument
