"""What the compiled kernels refuse in a debug build, and processes that were forked."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_kernels, normal

from tokengame import kernels
from tokengame.kernels import library
from tokengame.kernels.structs import (
    BlockStruct,
    CachedKeysValuesStruct,
    FusedGameStruct,
    LinearStruct,
    MlpStruct,
    NormStruct,
    ObservationRequestStruct,
    RotaryStruct,
)

pytestmark = needs_kernels
both_levels = pytest.mark.usefixtures("level")
DEBUG = kernels.available() and bool(library.loaded().library.checks_bounds())
"""whether the library checks its arguments: only scripts/sanitize builds it so"""
NORM, LINEAR, GAME = NormStruct(), LinearStruct(), FusedGameStruct()
BLOCK, NARROW = (BlockStruct(dim=64, heads=2, width=32, mlp=MlpStruct(hidden=hidden)) for hidden in (64, 40))
REQUEST, CACHED, ROTARY = ObservationRequestStruct(), CachedKeysValuesStruct(), RotaryStruct()


def half_blocks(first, last, rows, cu_seqlens, images, block=BLOCK):
    structs = ctypes.addressof(CACHED), ctypes.addressof(REQUEST), ctypes.addressof(ROTARY)
    return ctypes.addressof(block), first, last, None, rows, cu_seqlens, images, None, *structs, 1, *[None] * 5, 1


def class_attention(cu_seqlens, heads=2, width=32):
    return None, 64, 32, heads, width, None, 1.0, cu_seqlens, len(cu_seqlens) - 1, None, None, 1


def linear(rows, inputs, outputs, threads=1):
    return None, rows, inputs, ctypes.addressof(NORM), ctypes.addressof(LINEAR), outputs, None, threads


def keeping(keep, kept_cu_seqlens):
    """Two images of a prefix token and two agents."""
    return (None, 64, 32, 2, 32, normal(6, 64), 64, None, torch.zeros(6).long(), torch.tensor(keep).bool(),
            torch.tensor([0, 3, 6]), torch.tensor(kept_cu_seqlens), 2, 1, normal(6, 64), torch.zeros(6),
            torch.zeros(6).long(), None, 1)  # fmt: skip


BROKEN = {
    "rows below 0": ("normed_linear", linear(-1, 64, 64)),
    "no threads": ("normed_linear", linear(0, 64, 64, threads=0)),
    "a width of 33": ("normed_linear", linear(1, 33, 64)),
    "outputs of 48": ("normed_linear", linear(1, 64, 48)),
    "images below 0": ("attention", (*[None, 64, 32] * 3, None, None, -1, 2, 32, None, 1.0, None, 1)),
    "heads of 16": ("class_attention", class_attention(torch.tensor([0, 3]), width=16)),
    "cu_seqlens that descend": ("class_attention", class_attention(torch.tensor([0, 3, 1]))),
    "an image without rows": ("class_attention", class_attention(torch.tensor([0, 3, 3]))),
    "cu_seqlens beyond the rows": ("run_half_blocks", half_blocks(0, 0, 4, torch.tensor([0, 3, 5]), 2)),
    "last before first": ("run_half_blocks", half_blocks(2, 1, 5, torch.tensor([0, 3, 5]), 2)),
    "an MLP of 40": ("run_half_blocks", half_blocks(0, 1, 3, torch.tensor([0, 3]), 1, NARROW)),
    "more prefix tokens than rows": (
        "last_block", (ctypes.addressof(BLOCK), None, None, 3, torch.tensor([0, 1, 3]), 2, 2, None, None, None, 1)
    ),
    "no agent kept": ("absorb", keeping([1, 1, 0, 0], [0, 3, 4])),
    "other counts than kept": ("absorb", keeping([1, 1, 1, 0], [0, 2, 4])),
    "a game without agents": ("fused_forward", (ctypes.addressof(GAME), None, 1, None, None, 1)),
}  # fmt: skip


@both_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", BROKEN if DEBUG else [])
def test_a_debug_build_refuses_what_the_kernels_cannot_run(key, dtype):
    name, arguments = BROKEN[key]
    with pytest.raises(AssertionError, match=name):
        library.call(name, dtype, *arguments)


FORKS = """
import os, sys, torch
from conftest import half_vit, layout_of, normal
from test_kernels import functions, game_of, predicted

torch.set_num_threads(2)
game, images, layout = game_of(half_vit(), "merge"), normal(6, 3, 32, 32), layout_of([40, 60])
q, k, v = normal(100, 3, 2, 32).float().unbind(1)
with torch.no_grad():
    predicted(game, images)
    child = os.fork()
    game.backend_for(images)  # compares the weights
    functions.attention(q, k, v, layout, layout)  # in the number format that the parent did not use
os._exit(0 if not child or not os.waitpid(child, 0)[1] else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_runs_without_threads():
    """Those of its parent do not exist in it, and to wait for them would be for ever."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=120, cwd=Path(__file__).parent)
