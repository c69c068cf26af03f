"""The compiled kernels step by step beside PyTorch's: what a block of a ViT computes, in turn.

`python runs/kernel_steps.py --dim 192 --threads 1` (half a minute); `--instructions avx2` for other instructions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import tyro
from torch.nn.functional import linear, scaled_dot_product_attention

from tokengame import kernels
from tokengame.kernels import functions
from tokengame.kernels.library import call
from tokengame.kernels.plain import LinearWeights
from tokengame.kernels.structs import MlpStruct, NormStruct
from tokengame.kernels.weights import pack
from tokengame.measure.conditions import conditions
from tokengame.measure.in_turn import interleave
from tokengame.packed.layout import RaggedLayout

ROWS, WIDTH = 197, 64
"""of an image; of a head"""


@dataclass
class KernelSteps:
    """Products with norm, activation and residual against products alone; attention against fused attention."""

    dim: int = 192
    """width of a row"""
    images: int = 4
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    instructions: str = "amx"
    """to use, or the best ones below"""
    seconds: float = 10.0

    @torch.inference_mode()
    def run(self) -> None:
        """Print GMACs a second, and what they were measured on."""
        torch.set_num_threads(self.threads)
        with kernels.limited(self.instructions):
            calls, macs = self.steps(getattr(torch, self.dtype))
            times = interleave(calls, torch.device("cpu"), self.seconds)
            for name, taken in times.items():
                print(f"{name}: {1000 * median(taken):.3f} ms, {macs[name] / median(taken) / 1e9:.1f} GMACs a second")
            print(conditions(getattr(torch, self.dtype), "cpu"))

    def steps(self, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
        """The calls, and the multiply-accumulates of each."""
        dim, rows = self.dim, ROWS * self.images
        x, hidden = torch.randn(rows, dim).to(dtype), torch.randn(rows, 4 * dim).to(dtype)
        weights = [torch.randn(outputs, inputs).to(dtype) * 0.05 for outputs, inputs in shapes(dim)]
        qkv, fc1, fc2 = (pack(LinearWeights(weight, None)) for weight in weights)
        ones, zeros = torch.ones(dim), torch.zeros(dim)
        norm = NormStruct(ones.data_ptr(), zeros.data_ptr(), 1e-6)
        mlp = MlpStruct(norm, NormStruct(), fc1.struct, fc2.struct, 4 * dim)
        layout = RaggedLayout([ROWS] * self.images, "cpu")
        heads = torch.randn(rows, 3, dim // WIDTH, WIDTH).to(dtype)
        q, k, v = (part.unflatten(0, (self.images, ROWS)).transpose(1, 2) for part in heads.unbind(1))

        out = torch.empty_like(x)

        def residual_mlp(_keep: Any = (ones, zeros, fc1, fc2)) -> None:
            call("residual_mlp", dtype, x, rows, dim, ctypes.addressof(mlp), out, self.threads)

        calls: dict[str, Callable[[], Any]] = {
            "norm, q, k, v": lambda: functions.normed_linear(x, norm, qkv),
            "F.linear to q, k, v": lambda: linear(x, weights[0]),
            "norm, MLP, residual": residual_mlp,
            "F.linear to the MLP's width": lambda: linear(x, weights[1]),
            "F.linear from the MLP's width": lambda: linear(hidden, weights[2]),
            "attention": lambda: functions.self_attention(heads, layout),
            "fused attention of PyTorch": lambda: scaled_dot_product_attention(q, k, v),
        }
        products, attended = rows * dim * dim, self.images * ROWS * ROWS * dim * 2
        numbers = (3 * products, 3 * products, 8 * products, 4 * products, 4 * products, attended, attended)
        return calls, dict(zip(calls, numbers, strict=True))


def shapes(dim: int) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of a block's products."""
    return (3 * dim, dim), (4 * dim, dim), (dim, 4 * dim)


if __name__ == "__main__":
    tyro.cli(KernelSteps).run()
