"""Formats of exported graphs: how each is written and run. A format is a class and a line in `FORMATS`."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from torch.export import ExportedProgram

from tokengame.deploy.graph import GraphOutput
from tokengame.deploy.int8 import onnx_int8, openvino_int8
from tokengame.deploy.parity import Run
from tokengame.errors import TokenGameError
from tokengame.measure.rivals import ONE_FILE, installed, openvino_core

OPSET = 20
"""of ONNX: the first with GELU as one operator"""
OUTPUTS = list(GraphOutput._fields)
ABOUT = "tokengame"
"""name of the metadata: a JSON document with policy card, preprocessing and versions"""


class Format(ABC):
    """One of `FORMATS`."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    """of its files"""

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
        """Write a graph with its metadata.

        Raises:
            TokenGameError: a package is not installed.
        """

    def quantise(self, path: Path, samples: Iterable[dict[str, np.ndarray]]) -> None:  # noqa: ARG002
        """Write the graph of a file again with linear layers in int8.

        Args:
            path: written by `write`.
            samples: inputs by name, of as many images as the graph takes, that choose ranges.

        Raises:
            TokenGameError: a package is not installed, or this format has no quantiser.
        """
        raise TokenGameError(
            f"{path.suffix} has no quantiser here: end the file in .onnx or .xml, or quantise the model with torchao, "
            "prune it, and export that without int8"
        )

    @abstractmethod
    def open(self, path: Path) -> Run:
        """The graph of a file, on as many threads as PyTorch has."""


class Onnx(Format):
    """ONNX of operators that every engine has, run by ONNX Runtime."""

    name, suffix = "onnx", ".onnx"

    def write(self, program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
        onnx = installed("onnx")
        installed("onnxscript")
        split = sum(weight.nbytes for weight in program.state_dict.values()) > ONE_FILE
        with _quiet():
            found = _onnx_program(program)
            found.model.metadata_props[ABOUT] = json.dumps(about)
            found.save(path, external_data=split)
        onnx.checker.check_model(str(path))

    def quantise(self, path: Path, samples: Iterable[dict[str, np.ndarray]]) -> None:  # noqa: ARG002
        onnx_int8(path, path)  # ranges are those of each call

    def open(self, path: Path) -> Run:
        engine = session_of_onnx(path)
        names = [entry.name for entry in engine.get_inputs()]
        return lambda *arrays: engine.run(OUTPUTS, dict(zip(names, arrays, strict=False)))


def session_of_onnx(path: Path) -> Any:
    """ONNX Runtime with a file, on as many threads as PyTorch has."""
    ort = installed("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    # or its threads go on waiting actively after a call, on cores that the next one needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def _onnx_program(program: ExportedProgram) -> Any:
    inputs = list(program.graph_signature.user_inputs)
    names: dict[str, Any] = {"input_names": inputs, "output_names": OUTPUTS}
    try:
        return torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, **names)
    except Exception as error:  # of many kinds
        reason = str(error).strip().splitlines()[-3:]
        raise TokenGameError(
            f"torch.onnx cannot write a part of this model ({' '.join(reason)}): export to .pt2"
        ) from error


class OpenVino(Format):
    """OpenVINO's IR in float32, an .xml with a .bin beside it."""

    name, suffix = "openvino", ".xml"

    def write(self, program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
        ov = installed("openvino")
        with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder:
            Onnx().write(program, Path(folder) / "graph.onnx", about)
            model = ov.convert_model(Path(folder) / "graph.onnx")
            model.set_rt_info(json.dumps(about), ABOUT)
            ov.save_model(model, path, compress_to_fp16=False)

    def quantise(self, path: Path, samples: Iterable[dict[str, np.ndarray]]) -> None:
        ov = installed("openvino")
        with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder:
            quantised = Path(folder) / path.name
            ov.save_model(openvino_int8(openvino_core().read_model(path), samples), quantised, compress_to_fp16=False)
            for suffix in (".xml", ".bin"):
                shutil.copyfile(quantised.with_suffix(suffix), path.with_suffix(suffix))

    def open(self, path: Path) -> Run:
        request = engine_of_openvino(openvino_core(), path)
        names = [entry.any_name for entry in request.model_inputs]

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            found = request.infer(dict(zip(names, arrays, strict=False)), share_inputs=True)
            return [found[name] for name in OUTPUTS]

        return run


def engine_of_openvino(core: Any, model: Any) -> Any:
    """A request of OpenVINO for a pruned model or its file, on as many threads as PyTorch has; int8 layers stay int8.

    Snippets, which join elementwise operations, are off: that pass follows a null pointer in some graphs in which sizes
    of tokens are added up, and ends the process (OpenVINO 2026.4, `TokenizeSnippets`).
    """
    settings = {
        "SNIPPETS_MODE": "DISABLE",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    return core.compile_model(model, "CPU", settings).create_infer_request()


class Torch(Format):
    """A program of `torch.export`, which any PyTorch loads without this library."""

    name, suffix = "torch", ".pt2"

    def write(self, program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(about)})

    def open(self, path: Path) -> Run:
        program = torch.export.load(path)
        return _in_torch(program.module(), len(program.graph_signature.user_inputs))


class AotInductor(Format):
    """A package that AOTInductor compiled for this processor, for `torch._inductor.aoti_load_package` and C++."""

    name, suffix = "aotinductor", ".pt2"

    def write(self, program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
        if len(program.graph_signature.user_inputs) > 1:
            raise TokenGameError("AOTInductor compiles only graphs whose sizes are known: export with fixed counts")
        settings = {"aot_inductor.metadata": {ABOUT: json.dumps(about)}}
        with _quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)

    def open(self, path: Path) -> Run:
        return _in_torch(torch._inductor.aoti_load_package(str(path)), 1)


def _in_torch(module: Any, inputs: int) -> Run:
    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in module(*map(torch.from_numpy, arrays[:inputs]))]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS: tuple[Format, ...] = (Onnx(), OpenVino(), Torch(), AotInductor())
