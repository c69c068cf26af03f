"""A weights file to a state dict: what it is, by its content, which of its models is meant, and whether that fits.

Nothing in a file is ever executed: PyTorch's files are read with `weights_only`.
"""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tokengame.errors import TokenGameError, first_line
from tokengame.files import require_file
from tokengame.ranges import require

State = dict[str, Tensor]

FOREIGN = {
    b"GGUF": "a GGUF file, of quantised language models",
    b"\x89HDF": "an HDF5 file, of Keras",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}
"""files that begin so and hold no PyTorch weights"""
FOREIGN_NAMES = {
    ".onnx": "an ONNX model", ".h5": "a Keras file", ".hdf5": "an HDF5 file", ".keras": "a Keras file",
    ".npz": "a NumPy archive, of JAX models", ".npy": "a NumPy array", ".gguf": "a GGUF file",
    ".msgpack": "a Flax file", ".tflite": "a TensorFlow Lite model", ".pb": "a TensorFlow graph",
    ".engine": "a TensorRT engine", ".ckpt.index": "a TensorFlow checkpoint", ".json": "a JSON file",
}  # fmt: skip
SAVE = "save the state dict of the timm model with safetensors.torch.save_model or torch.save"
LAYOUTS = {
    r"\blora_|_lora\b|\.adapter": "is an adapter (LoRA), without the weights that it adapts: merge it into its model "
    "(peft's merge_and_unload) and save that",
    r"(^|\.)encoder\.layer\.\d|embeddings\.patch_embeddings": "has the names of Hugging Face transformers: load the "
    "same model from timm, e.g. --backbone hf-hub:timm/...",
    r"(^|\.)encoder\.layers\.encoder_layer_\d|^conv_proj\.": "has the names of torchvision: load the same model from "
    "timm",
    r"(^|\.)transformer\.resblocks\.\d": "has the names of open_clip: load the same tower from timm, e.g. "
    "vit_base_patch16_clip_224",
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|_packed_params\S*|zero_point)$": "is quantised: pass the weights "
    "that it was made of, in floating point",
}
"""names of weights that are not timm's, and what to do"""
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""where training programs put a state dict, those with a moving average first, as timm takes them"""
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
"""prefixes of torch.compile and DistributedDataParallel"""
ANCHOR = "patch_embed.proj.weight"
"""a weight of every Vision Transformer, whose prefix is that of the model in the file"""


def read_state(weights: str) -> State:
    """The state dict in a file, under the model's own names.

    Moving averages come first where a checkpoint has them; prefixes of wrappers (`module.`, `_orig_mod.`) and of
    modules that hold the model (`model.`, `backbone.`, ...) are removed.

    Raises:
        TokenGameError: there is no such file, it is damaged, or of another kind, which the sentence names.
    """
    require_file(weights, "weights file")
    content = _unnested(_content(weights), weights)
    require(bool(content), f"weights file {weights} holds no weights; {SAVE}")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    found = f"weights file {weights} holds {_some(strange)} beside or instead of a state dict of tensors; {SAVE}"
    require(not strange, found)
    state = _unwrapped(content, weights)
    for pattern, what in LAYOUTS.items():
        require(not any(re.search(pattern, name) for name in state), f"weights file {weights} {what}")
    for name, tensor in state.items():
        _require_dense(tensor, f"{name} in weights file {weights}")
    return state


def _content(weights: str) -> Any:
    """What the file holds, read by its content and not by its name."""
    with open(weights, "rb") as file:
        start = file.read(32)
    named = [what for suffix, what in FOREIGN_NAMES.items() if weights.lower().endswith(suffix)]
    found = [what for magic, what in FOREIGN.items() if start.startswith(magic)] or _archive(weights) or named
    require(not found, f"weights file {weights} is {found and found[0]}, not PyTorch weights; {SAVE}")
    try:
        if start[8:9] == b"{":
            return safetensors.torch.load_file(weights)
        with torch.serialization.safe_globals([Namespace]):  # of the arguments in timm's checkpoints
            return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the file is anything
        pickled = start.startswith(b"\x80") or zipfile.is_zipfile(weights)
        if pickled and ("weights_only" in str(error) or "Unsupported" in str(error)):
            code = "holds Python objects, which could run code and are not opened"
            raise TokenGameError(f"weights file {weights} {code}; {SAVE}") from None
        raise TokenGameError(f"weights file {weights} is damaged or of no known format ({first_line(error)})") from None


def _archive(weights: str) -> list[str]:
    """What a zip file is that PyTorch did not write as a state dict."""
    if not zipfile.is_zipfile(weights):
        return []
    with zipfile.ZipFile(weights) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names):
        return ["a TorchScript program"]
    if any(name.endswith(".npy") for name in names):
        return ["a NumPy archive, of JAX models"]
    return [] if any(name.endswith("data.pkl") for name in names) else ["a zip archive; unpack it first"]


def _unnested(content: Any, weights: str) -> dict[Any, Any]:
    """The state dict in a checkpoint of a training program."""
    for _ in range(4):
        require(isinstance(content, dict), f"weights file {weights} holds a {type(content).__name__}; {SAVE}")
        inner = next((content[name] for name in NESTED if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        content = inner
    optimizer = {"param_groups", "state"} <= content.keys() or {"optimizer"} <= content.keys()
    require(not optimizer, f"weights file {weights} is the state of an optimizer, without a model's weights; {SAVE}")
    return content


def _unwrapped(content: dict[Any, Tensor], weights: str) -> State:
    """The weights without the prefix of what wrapped or held the model."""
    state = {str(name): tensor for name, tensor in content.items()}
    for prefix in WRAPPERS:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    prefixes = sorted(name.removesuffix(ANCHOR) for name in state if name.endswith("." + ANCHOR))
    if ANCHOR in state or not prefixes:
        return state
    several = f"weights file {weights} holds {len(prefixes)} models ({_some(prefixes)}); save the one you mean alone"
    require(len(prefixes) == 1, several)
    return {n.removeprefix(prefixes[0]): tensor for n, tensor in state.items() if n.startswith(prefixes[0])}


def _require_dense(tensor: Tensor, what: str) -> None:
    require(not tensor.is_meta, f"{what} has no values (meta device); save the model after its weights are loaded")
    require(not tensor.is_quantized, f"{what} is quantised; pass weights in floating point")
    require(tensor.layout == torch.strided, f"{what} is sparse; save it dense (`to_dense`)")


def load_into(model: nn.Module, state: State, weights: str) -> nn.Module:
    """Load `state`, read from the file `weights`, strictly into `model`, in evaluation mode.

    Raises:
        TokenGameError: it is another model's, quantised, or not finite.
    """
    wanted = model.state_dict()
    missing, unknown = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    _require_same_size(model, wanted, state, weights)
    if missing and all(name.startswith("head") for name in missing):
        has = f"has no classifier ({_some(missing)}), and the model one of {_classes(wanted)} classes"
        raise TokenGameError(f"{weights} {has}; pass weights with the classifier that you use")
    kinds = ((missing, "of the model's weights are missing in it"), (unknown, "of its weights are not the model's"))
    counts = [f"{len(names)} {what} ({_some(names)})" for names, what in kinds if names]
    require(not counts, f"{weights} holds another architecture; {'; '.join(counts)}")
    for name, tensor in state.items():
        integer = wanted[name].is_floating_point() and not tensor.is_floating_point()
        require(not integer, f"{weights} is quantised: {name} is {tensor.dtype}; pass weights in floating point")
    single = {n: tensor.float() if tensor.is_floating_point() else tensor for n, tensor in state.items()}
    broken = [name for name, tensor in single.items() if not tensor.isfinite().all()]
    found = f"{weights} holds values that are not finite in {_some(broken)} ({len(broken)} tensors)"
    require(not broken, found)
    model.load_state_dict(single)
    return model.eval()


def _require_same_size(model: Any, wanted: State, state: State, weights: str) -> None:
    sizes = {n: (list(state[n].shape), list(wanted[n].shape)) for n in wanted if n in state}
    differ = {name: both for name, both in sizes.items() if both[0] != both[1]}
    if not differ:
        return
    name, (found, own) = next(iter(differ.items()))
    differs = f"{name} is {found} in the file and {own} in the model"
    if set(differ) == {"pos_embed"} and len(found) == 3 and found[2] == own[2]:
        size = _input_size(model, found[1])
        raise TokenGameError(f"{weights} is of another input size{size}: {differs}; pass the --backbone of that size")
    if all(name.startswith("head") for name in differ):
        raise TokenGameError(
            f"{weights} has {len(state[name])} classes and the model {_classes(wanted)}: {differs}; "
            "pass weights of the model's classes"
        )
    raise TokenGameError(f"{weights} holds another architecture: {differs} ({len(differ)} differ)")


def _input_size(model: Any, rows: int) -> str:
    """What input has `rows` rows of position embedding, where that can be told."""
    size, patch = getattr(model.patch_embed, "img_size", None), model.patch_embed.patch_size
    for prefix in {getattr(model, "num_prefix_tokens", 0), 0}:
        side = round((rows - prefix) ** 0.5) if rows > prefix else 0
        if side and side * side + prefix == rows and size:
            return f", {side * patch[0]} x {side * patch[1]} where the model's is {size[0]} x {size[1]}"
    return ""


def _classes(state: State) -> int:
    """Rows of the last matrix of the head."""
    return next((len(tensor) for name, tensor in reversed(state.items()) if name.startswith("head")), 0)


def _some(names: list[str]) -> str:
    """The first three names."""
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in names[:3]]
    return ", ".join(shown).replace("\n", " ") + (", ..." if len(names) > 3 else "")
