"""A weights file to a state dict: what it is, by its content, which of its models is meant, and whether that fits.

Nothing in a file is ever executed: PyTorch's files are read with `weights_only`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tokengame.errors import TokenGameError, first_line
from tokengame.files import Note, require_file, unsaid
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
SAVE = "save the state dict of the model with safetensors.torch.save_model or torch.save"
INDEX = ".index.json"
"""end of the name of the file that says which shard has which weight"""
IN_FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model.safetensors",
)  # fmt: skip
"""what Accelerate, Transformers and timm call the weights in a folder, the first that is there counts"""
SETTINGS = ("lightning", "lightning_fabric", "pytorch_lightning", "omegaconf", "pathlib", "argparse", "typing")
"""packages whose objects training programs save beside the weights; read as `_Setting`, never imported"""
LAYOUTS = {
    r"\blora_|_lora\b|\.adapter": "is an adapter (LoRA), without the weights that it adapts: merge it into its model "
    "(peft's merge_and_unload) and save that",
    r"(^|\.)encoder\.layer\.\d|embeddings\.patch_embeddings": "has the names of Hugging Face transformers: --backbone "
    "must be a model of theirs, the folder with its config.json or its name, e.g. google/vit-base-patch16-224",
    r"(^|\.)encoder\.layers\.encoder_layer_\d|^conv_proj\.": "has the names of torchvision: --backbone must be a model "
    "of theirs, e.g. torchvision:vit_b_16",
    r"(^|\.)transformer\.resblocks\.\d": "has the names of open_clip: --backbone must be a model of theirs, e.g. "
    "open_clip:ViT-B-32",
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|_packed_params\S*|zero_point)$": "is quantised: pass the weights "
    "that it was made of, in floating point",
}
"""names of weights that are not the model's, by pattern, and what to do"""
AVERAGES = ("state_dict_ema", "model_ema")
NESTED = (*AVERAGES, "state_dict", "model", "model_state_dict")
"""where training programs put a state dict, those with a moving average first, as timm takes them"""
KWARGS = "settings by which your model differs from timm's go into --model-kwargs"
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")
"""prefixes of torch.compile and DistributedDataParallel"""

PATCHES = "patch_embed.proj.weight"
"""a weight of nearly every Vision Transformer and of no text tower, whose prefix is that of the model in the file"""


class _Setting:
    """Stands for any object that a training program saved beside the weights: takes everything, and is an empty dict.

    PyTorch's reader fills dicts of this exact type, and calls nothing of theirs.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_state(weights: str, note: Note = unsaid) -> State:
    """The state dict in a file, in a folder, or in the shards of an index.

    A moving average comes first where a checkpoint has one beside the weights, as in timm, and `note` is told;
    prefixes of wrappers (`module.`, `_orig_mod.`) are removed.

    Raises:
        TokenGameError: there is no such file, it is damaged, or of another kind, which the sentence names.
    """
    content: dict[Any, Any] = {}
    for file in _files(weights):
        content |= _unnested(_content(file), file, note)
    require(bool(content), f"weights file {weights} holds no weights; {SAVE}")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    found = f"weights file {weights} holds {_some(strange)} beside or instead of a state dict of tensors; {SAVE}"
    require(not strange, found)
    state = {str(name): tensor for name, tensor in content.items()}
    for prefix in WRAPPERS:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        _require_dense(tensor, f"{name} in weights file {weights}")
    return state


def _files(weights: str) -> list[str]:
    """The files that hold the weights: one, or the shards that an index names."""
    if os.path.isdir(weights):
        there = [name for name in IN_FOLDER if os.path.isfile(os.path.join(weights, name))]
        merge = "; `accelerate merge-weights` makes one file of its shards" if _sharded_by_fsdp(weights) else ""
        names = f"{', '.join(IN_FOLDER[:2])} or the like"
        require(bool(there), f"{weights} is a folder, not a weights file, and holds no {names}{merge}")
        weights = os.path.join(weights, there[0])
    size = require_file(weights, "weights file")
    if not weights.endswith(INDEX):
        return [weights]
    try:
        require(size < 2**28, f"{weights} is too large for an index of shards")
        shards = sorted(set(json.loads(Path(weights).read_text())["weight_map"].values()))
        safe = all(os.path.basename(name) == name for name in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        shards, safe = [], False
    require(bool(shards) and safe, f"{weights} is a JSON file, and no index of shards that lie beside it")
    paths = [os.path.join(os.path.dirname(weights), name) for name in shards]
    for path in paths:
        require_file(path, f"shard, which {os.path.basename(weights)} names,")
    return paths


def _sharded_by_fsdp(folder: str) -> bool:
    return any(Path(folder).glob("pytorch_model_fsdp*/*.distcp"))


def _content(weights: str) -> Any:
    """What the file holds, read by its content and not by its name."""
    with open(weights, "rb") as file:
        start = file.read(32)
    named = [what for suffix, what in FOREIGN_NAMES.items() if weights.lower().endswith(suffix)]
    found = [what for magic, what in FOREIGN.items() if start.startswith(magic)] or _archive(weights) or named
    require(not found, f"weights file {weights} is {found and found[0]}, not PyTorch weights; {SAVE}")
    unsafe = _objects(weights)
    settings = [(_Setting, name) for name in unsafe if name.split(".")[0] in SETTINGS]
    try:
        if start[8:9] == b"{":
            return safetensors.torch.load_file(weights)
        with torch.serialization.safe_globals([Namespace, *settings]):  # of the arguments in timm's checkpoints
            return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the file is anything
        pickled = start.startswith(b"\x80") or zipfile.is_zipfile(weights)
        if pickled and ("weights_only" in str(error) or "Unsupported" in str(error)):
            others = sorted(set(unsafe) - {name for _, name in settings} - {"argparse.Namespace"})
            code = "holds Python objects, which could run code and are not opened"
            code += f" ({_some(others)})" if others else ""
            raise TokenGameError(f"weights file {weights} {code}; {SAVE}") from None
        raise TokenGameError(f"weights file {weights} is damaged or of no known format ({first_line(error)})") from None


def _objects(weights: str) -> list[str]:
    """Names of what else than tensors a file of PyTorch holds, found without opening it as one."""
    if not zipfile.is_zipfile(weights):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(weights))
    except Exception:  # of any kind: the file is anything
        return []


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


def _unnested(content: Any, weights: str, note: Note) -> dict[Any, Any]:
    """The state dict in a checkpoint of a training program."""
    for _ in range(4):
        require(isinstance(content, dict), f"weights file {weights} holds a {type(content).__name__}; {SAVE}")
        inner = [name for name in NESTED if isinstance(content.get(name), dict)]
        if not inner:
            break
        if len(inner) > 1 and inner[0] in AVERAGES:
            note(f"{weights}: the moving average {inner[0]} is taken, not {inner[1]}")
        content = content[inner[0]]
    optimizer = {"param_groups", "state"} <= content.keys() or {"optimizer"} <= content.keys()
    require(not optimizer, f"weights file {weights} is the state of an optimizer, without a model's weights; {SAVE}")
    return content


def renamed(state: State, wanted: Collection[str], weights: str, note: Note = unsaid) -> State:
    """The weights of the model whose names are `wanted`, without the prefix of what holds it (`model.`, `backbone.`).

    Raises:
        TokenGameError: the file holds several such models.
    """
    deepest = min(wanted, key=lambda name: (-name.count("."), name), default="")
    anchor = PATCHES if PATCHES in wanted else deepest
    prefixes = sorted(name.removesuffix(anchor) for name in state if name.endswith("." + anchor))
    if anchor in state or not prefixes:
        return state
    several = f"weights file {weights} holds {len(prefixes)} models ({_some(prefixes)}); save the one you mean alone"
    require(len(prefixes) == 1, several)
    inside = {n.removeprefix(prefixes[0]): tensor for n, tensor in state.items() if n.startswith(prefixes[0])}
    outside = [name for name in state if not name.startswith(prefixes[0])]
    rest = f", and {len(outside)} others left out ({_some(outside)})" if outside else ""
    note(f"{weights}: the model's weights are those that begin with {prefixes[0]!r}{rest}")
    return inside


def _require_dense(tensor: Tensor, what: str) -> None:
    require(not tensor.is_meta, f"{what} has no values (meta device); save the model after its weights are loaded")
    require(not tensor.is_quantized, f"{what} is quantised; pass weights in floating point")
    require(tensor.layout == torch.strided, f"{what} is sparse; save it dense (`to_dense`)")


def load_into(model: nn.Module, state: State, weights: str, note: Note = unsaid) -> nn.Module:
    """Load `state`, read from the file `weights`, strictly into `model`, in evaluation mode.

    Where it does not fit as it is, it is converted as timm does on loading: position embeddings of another size are
    resampled, names of the original release become timm's.

    Raises:
        TokenGameError: it is another model's, quantised, or not finite.
    """
    wanted = model.state_dict()
    state = renamed(state, wanted, weights, note)
    if not _fits(state, wanted):
        state = _converted(model, wanted, state, weights, note)
    _require_fitting(wanted, state, weights)
    for name, tensor in state.items():
        integer = wanted[name].is_floating_point() and not tensor.is_floating_point()
        require(not integer, f"{weights} is quantised: {name} is {tensor.dtype}; pass weights in floating point")
    single = {n: tensor.float() if tensor.is_floating_point() else tensor for n, tensor in state.items()}
    require_finite(single, weights)
    model.load_state_dict(single)
    return model.eval()


def require_finite(state: State, weights: str) -> None:
    """Raise TokenGameError where a weight is no finite number."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    found = f"{weights} holds values that are not finite in {_some(broken)} ({len(broken)} tensors)"
    require(not broken, found)


def _fits(state: State, wanted: State) -> bool:
    return state.keys() == wanted.keys() and all(state[name].shape == wanted[name].shape for name in wanted)


def _converted(model: nn.Module, wanted: State, state: State, weights: str, note: Note) -> State:
    """What timm's own loading of such a model makes of `state`; `state` itself where it makes nothing of it.

    Patches of another size are not resampled: that would be another model. Nor is a tensor that stands for more numbers
    than its file has, whose copy would not fit into memory.
    """
    module = type(model).__module__
    convert = getattr(sys.modules[module], "checkpoint_filter_fn", None) if module.startswith("timm.") else None
    patches = [weights_of[PATCHES].shape[2:] for weights_of in (state, wanted) if PATCHES in weights_of]
    stored = all(t.untyped_storage().nbytes() >= t.numel() * t.element_size() for t in state.values())
    if convert is None or len({tuple(size) for size in patches if len(size)}) > 1 or not stored:
        return state
    try:
        found = convert(dict(state), model)
    except Exception:  # of any kind: it expects its own files
        return state
    before, after = state.get("pos_embed"), found.get("pos_embed")
    if before is not None and after is not None and before.shape != after.shape:
        rows = f"{before.shape[1]} to {after.shape[1]} rows, for images of"
        size = " x ".join(map(str, getattr(model.patch_embed, "img_size", None) or ()))
        own = _input_size(model, before.shape[1])
        keep = f"; --model-kwargs img_size={own[0]} keeps them as they are" if own and own[0] == own[1] else ""
        note(f"{weights}: position embeddings are resampled from {rows} {size}{keep}")
    return found


def _require_fitting(wanted: State, state: State, weights: str) -> None:
    """Raise TokenGameError unless `state` has the names and sizes that are `wanted`."""
    missing, unknown = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    for pattern, what in LAYOUTS.items() if missing or unknown else ():
        require(not any(re.search(pattern, name) for name in unknown), f"weights file {weights} {what}")
    _require_same_size(wanted, state, weights)
    if missing and all(name.startswith("head") for name in missing):
        has = f"has no classifier ({_some(missing)}), and the model one of {_classes(wanted)} classes"
        raise TokenGameError(f"{weights} {has}; pass weights with the classifier that you use")
    kinds = ((missing, "of the model's weights are missing in it"), (unknown, "of its weights are not the model's"))
    counts = [f"{len(names)} {what} ({_some(names)})" for names, what in kinds if names]
    require(not counts, f"{weights} holds another architecture; {'; '.join(counts)}; {KWARGS}")


def _require_same_size(wanted: State, state: State, weights: str) -> None:
    sizes = {n: (list(state[n].shape), list(wanted[n].shape)) for n in wanted if n in state}
    differ = {name: both for name, both in sizes.items() if both[0] != both[1]}
    if not differ:
        return
    name, (found, own) = next(iter(differ.items()))
    differs = f"{name} is {found} in the file and {own} in the model"
    if set(differ) == {"pos_embed"} and len(found) == 3 and found[2] == own[2]:
        raise TokenGameError(f"{weights} is of another input size: {differs}; pass the --backbone of that size")
    if set(differ) == {PATCHES} and len(found) == 4 and found[2:] == own[2:]:
        channels = f"{weights} is of images with {found[1]} channels and the model of {own[1]}: {differs}"
        raise TokenGameError(f"{channels}; pass --model-kwargs in_chans={found[1]}")
    if all(name.startswith("head") for name in differ):
        raise TokenGameError(
            f"{weights} has {len(state[name])} classes and the model {_classes(wanted)}: {differs}; "
            "pass weights of the model's classes"
        )
    raise TokenGameError(f"{weights} holds another architecture: {differs} ({len(differ)} differ); {KWARGS}")


def _input_size(model: Any, rows: int) -> tuple[int, int] | None:
    """Height and width of the input that has `rows` rows of position embedding, where it is square."""
    patch = model.patch_embed.patch_size
    for prefix in {getattr(model, "num_prefix_tokens", 0), 0}:
        side = round((rows - prefix) ** 0.5) if rows > prefix else 0
        if side and side * side + prefix == rows:
            return side * patch[0], side * patch[1]
    return None


def _classes(state: State) -> int:
    """Rows of the last matrix of the head."""
    return next((len(tensor) for name, tensor in reversed(state.items()) if name.startswith("head")), 0)


def _some(names: list[str]) -> str:
    """The first three names."""
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in names[:3]]
    return ", ".join(shown).replace("\n", " ") + (", ..." if len(names) > 3 else "")
