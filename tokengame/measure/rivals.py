"""What a user could run instead: the native model in every form and engine that is at hand.

A rival is a function from the native model to a call, and a line in `RIVALS`. Where it cannot run, it raises
`TokenGameError` with one sentence, which is reported in its place.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengame.backbones import unfused, wrap
from tokengame.errors import TokenGameError
from tokengame.measure.kinds import Kind

OPSET = 18
"""of ONNX: in later ones engines run as fast"""
ONE_FILE = 1_900_000_000
"""bytes of weights that fit into one ONNX file, with its graph"""
OPENVINO = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
"""what OpenVINO calls a number format, in its settings and among what a processor can do"""


class Forward(nn.Module):
    """A model whose call gives what is compared: [B, channels, height, width] -> [B, ...].

    Args:
        model: of a supported family.
        kind: what is compared.
    """

    def __init__(self, model: nn.Module, kind: Kind):
        super().__init__()
        self.model = model
        self._native = partial(kind.native, wrap(model))

    def forward(self, images: Tensor) -> Tensor:
        return self._native(images)


@dataclass(frozen=True)
class Ready:
    """A rival that can be called.

    Args:
        run: [B, channels, height, width] -> what is compared.
        takes: number format of the images.
        precision: of its products, as "float32" or "int8".
    """

    run: Callable[[Tensor], Tensor]
    takes: torch.dtype
    precision: str


class Native:
    """The native model, from which rivals are built for batches of one shape.

    Args:
        model: of a supported family.
        images: [B, channels, height, width], on its device and in its number format.
        kind: what is compared.
        folder: for files; it must be there while rivals are built.
    """

    def __init__(self, model: nn.Module, images: Tensor, kind: Kind, folder: Path):
        self.model, self.images, self.kind, self.folder = model, images, kind, folder
        self.dtype, self.device = images.dtype, images.device
        self.precision = str(images.dtype).removeprefix("torch.")

    @property
    def fused(self) -> Forward:
        """With attention in one call."""
        return Forward(self.model, self.kind)

    @property
    def unfused(self) -> Forward:
        """With attention as two products and a softmax."""
        return Forward(unfused(self.model), self.kind)

    def in_torch(self, run: Callable[[Tensor], Tensor]) -> Ready:
        """A rival that takes what the model takes."""
        return Ready(run, self.dtype, self.precision)

    def in_engine(self, run: Callable[[Any], Any], precision: str | None = None) -> Ready:
        """A rival from an array of float32 to an array."""

        def on_arrays(images: Tensor) -> Tensor:
            return torch.from_numpy(run(images.numpy()))

        return Ready(on_arrays, torch.float32, precision or self.precision)

    @cached_property
    def onnx(self) -> Path:
        """A file of the model in float32, for batches of this shape alone: engines are fastest with known shapes.

        Raises:
            TokenGameError: a package is missing, or the model is not on a CPU.
        """
        installed("onnx")
        installed("onnxscript")
        if self.device.type != "cpu":
            raise TokenGameError(f"it is timed on CPUs alone, and the model is on {self.device}")
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters
            module = Forward(unfused(copy.deepcopy(self.model).float()), self.kind).eval()
            return _export(module, self.images.float().clone(), self.folder / "native.onnx")


def _export(module: nn.Module, images: Tensor, path: Path) -> Path:
    """Write `module` for such images: by torch.export, or by TorchScript where that fails."""
    split = sum(parameter.nbytes for parameter in module.parameters()) > ONE_FILE
    try:
        torch.onnx.export(module, (images,), path, dynamo=True, opset_version=OPSET, external_data=split, verbose=False)
    except Exception:
        torch.onnx.export(module, (images,), path, dynamo=False, opset_version=OPSET)
    return path


def installed(package: str, extras: str = "engines") -> Any:
    """The package, which these extras of tokengame bring.

    Raises:
        TokenGameError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise TokenGameError(f"{package} is not installed: pip install 'tokengame[{extras}]'") from None


def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the process.

    Each one puts an alternate stack for signals under the thread and frees it with itself. Of two that go in the order
    in which they came a freed stack remains, and the next signal ends the process (OpenVINO 2026.4).

    Raises:
        TokenGameError: it is not installed.
    """
    return _only_core(installed("openvino"))


@cache
def _only_core(openvino: Any) -> Any:
    return openvino.Core()


# Rivals


def eager(native: Native) -> Ready:
    """The model as it is."""
    return native.in_torch(native.fused)


def eager_unfused(native: Native) -> Ready:
    """Attention as two products and a softmax: on some processors faster."""
    return native.in_torch(native.unfused)


def compiled(native: Native) -> Ready:
    """torch.compile with its defaults."""
    return native.in_torch(torch.compile(native.fused))


def compiled_unfused(native: Native) -> Ready:
    """The same of the unfused model."""
    return native.in_torch(torch.compile(native.unfused))


def max_autotune(native: Native) -> Ready:
    """torch.compile, which tries several kernels for each product; on CPUs with frozen weights."""
    on_cpu = native.device.type == "cpu"
    run = torch.compile(native.fused, mode="max-autotune-no-cudagraphs" if on_cpu else "max-autotune")
    with _inductor(freezing=on_cpu, autotune_num_choices_displayed=0, max_autotune_report_choices_stats=False):
        run(native.images)  # compiles
    return native.in_torch(run)


@contextmanager
def _inductor(**wanted: Any) -> Iterator[None]:
    """In this context torch.compile has these settings, of those that it knows in this version."""
    from torch._inductor import config

    with config.patch({name: value for name, value in wanted.items() if hasattr(config, name)}):
        yield


def onnx_runtime(native: Native) -> Ready:
    """ONNX Runtime."""
    ort = installed("onnxruntime")
    if native.precision != "float32":
        raise TokenGameError(f"it has no {native.precision} kernels for a Vision Transformer on CPUs")
    return native.in_engine(_session(ort, native.onnx))


def _session(ort: Any, path: Path) -> Callable[[Any], Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # or its threads go on waiting actively after a call, on cores that the next one needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    engine = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = engine.get_inputs()[0].name
    return lambda images: engine.run(None, {name: images})[0]


def openvino(native: Native) -> Ready:
    """OpenVINO, in the number format of the model."""
    core = openvino_core()
    return native.in_engine(_openvino(core, core.read_model(native.onnx), native.precision))


def _openvino(core: Any, model: Any, precision: str) -> Callable[[Any], Any]:
    hint, capability = OPENVINO[precision]
    if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise TokenGameError(f"it does not compute in {precision} on this processor")
    settings = {
        "INFERENCE_PRECISION_HINT": hint,  # without it bfloat16, wherever the processor has that
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


def onnx_runtime_int8(native: Native) -> Ready:
    """ONNX Runtime with weights in int8 and activations quantised as they come."""
    ort = installed("onnxruntime")
    quantization = import_module("onnxruntime.quantization")
    prepared, quantised = native.folder / "prepared.onnx", native.folder / "int8.onnx"
    prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    prepare(str(native.onnx), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_dynamic(str(prepared), str(quantised), op_types_to_quantize=["MatMul", "Gemm"])
    return native.in_engine(_session(ort, quantised), "int8")


def openvino_int8(native: Native) -> Ready:
    """OpenVINO with weights and activations in int8; ranges are those of the batch that it is built with."""
    nncf, core = installed("nncf"), openvino_core()
    data = nncf.Dataset([native.images.float().numpy()])
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(core.read_model(native.onnx), data, model_type=kind, subset_size=1)
    return native.in_engine(_openvino(core, model, native.precision), "int8")


@dataclass(frozen=True)
class Rival:
    """One of `RIVALS`.

    Args:
        name: in tables.
        build: raises TokenGameError, one sentence without a subject, where it cannot run.
        compiles: whether --no-compiled leaves it out.
    """

    name: str
    build: Callable[[Native], Ready]
    compiles: bool = False


RIVALS: tuple[Rival, ...] = (
    Rival("eager, fused", eager),
    Rival("eager, unfused", eager_unfused),
    Rival("compiled", compiled, compiles=True),
    Rival("compiled, unfused", compiled_unfused, compiles=True),
    Rival("compiled, max-autotune", max_autotune, compiles=True),
    Rival("ONNX Runtime", onnx_runtime),
    Rival("OpenVINO", openvino),
    Rival("ONNX Runtime int8", onnx_runtime_int8),
    *([Rival("OpenVINO int8", openvino_int8)] if find_spec("nncf") else []),
)
