"""Linear layers in int8, by the quantiser of each engine. Norms, attention and a policy's decisions stay in float32.

Products of a decision are left out by what they multiply: only layers have a constant matrix of weights.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from tokengame.measure.rivals import installed

PRODUCTS, EXTRAS = ("MatMul", "Gemm"), "engines,int8"


def torchao_int8(model: nn.Module, weights_only: bool = False) -> nn.Module:
    """A copy with linear layers in int8 by torchao: activations by row, weights by output.

    Args:
        model: in float32.
        weights_only: whether activations stay in float32.

    Raises:
        TokenGameError: torchao is not installed.
    """
    quantization = installed("torchao.quantization", EXTRAS)
    names = "Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, getattr(quantization, names[weights_only])())
    return quantised


def onnx_int8(source: Path, target: Path) -> None:
    """Write an ONNX file again with linear layers in int8: weights by output, activations as they come.

    Args:
        source, target: files, which may be the same.

    Raises:
        TokenGameError: onnx or onnxruntime is not installed.
    """
    onnx, quantization = installed("onnx", EXTRAS), installed("onnxruntime.quantization", EXTRAS)
    prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    with TemporaryDirectory(prefix="tokengame", ignore_cleanup_errors=True) as folder, _quiet():
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        prepare(str(source), str(prepared), skip_symbolic_shape=True)
        others = _without_weights(onnx.load(prepared).graph)
        quantization.quantize_dynamic(
            prepared, quantised, per_channel=True, op_types_to_quantize=list(PRODUCTS), nodes_to_exclude=others
        )
        model = onnx.load(quantised)
        del model.metadata_props[:]
        model.metadata_props.extend(onnx.load(source, load_external_data=False).metadata_props)
        onnx.save(model, target)


def _without_weights(graph: Any) -> list[str]:
    """Names of the products of an ONNX graph that have no constant matrix."""
    matrices = {array.name for array in graph.initializer if len(array.dims) == 2 and min(array.dims) > 1}
    return [node.name for node in graph.node if node.op_type in PRODUCTS and node.input[1] not in matrices]


def openvino_int8(model: Any, samples: Iterable[dict[str, np.ndarray]]) -> Any:
    """A model of OpenVINO with linear layers in int8, their ranges from samples (NNCF's post-training quantisation).

    Args:
        model: an `openvino.Model` in float32.
        samples: inputs by name, of as many images as the model takes.

    Raises:
        TokenGameError: nncf is not installed.
    """
    nncf, samples = installed("nncf", EXTRAS), list(samples)
    with _quiet():
        return nncf.quantize(
            model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=_decisions(model), validate=False),
        )  # fmt: skip


def openvino_int8_weights(model: Any) -> Any:
    """A model of OpenVINO with weights in int8, whose activations the engine quantises as they come.

    Raises:
        TokenGameError: nncf is not installed.
    """
    nncf = installed("nncf", EXTRAS)
    with _quiet():
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def _decisions(model: Any) -> list[str]:
    """Names of the products of a pruned graph that have no constant matrix; of a native one none, for all are layers
    and attention, which NNCF knows."""
    if len(model.inputs) == 1:
        return []
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return [node.get_friendly_name() for node in products if not _has_weights(node)]


def _has_weights(product: Any) -> bool:
    weights = product.input_value(1)
    sizes = [size.get_length() if size.is_static else 0 for size in weights.get_partial_shape()]
    return len(sizes) == 2 and min(sizes) > 1 and _constant(weights.get_node())


def _constant(node: Any) -> bool:
    """Whether a node of OpenVINO depends on no input of its graph."""
    if node.get_type_name() in ("Constant", "Parameter"):
        return node.get_type_name() == "Constant"
    return all(_constant(value.get_node()) for value in node.input_values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of quantisers and their progress bars, which go to stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
