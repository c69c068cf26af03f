"""One GPU in eight minutes: is the CUDA path exact, and how fast are pruned models beside the best native form?

`bash runs/gpu.sh`; random weights, bfloat16, no images. Needs torch, timm and safetensors with what these need. The
library's other dependencies serve its command line, and an empty stand-in is imported where one is missing.

1. Equality in float32 (TF32 off) and bfloat16: rows that pass or fail, with the largest difference.
2. Speed: native eager, captured in a CUDA graph, compiled, and both; pruned eager, captured (`runtime.cuda_graphs`),
   and captured with compiled MLPs. Decisions are synthetic: other counts in every image and every call, as learned
   policies have them, at `RATIO` of the native compute. Variants are called in turn, a few calls between two CUDA
   events; medians. The most important shapes come first.
3. Profiles of DeiT-B at batch 32.

Each result is a row, printed and written as it comes. What fails is a row with the sentence.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

START = time.perf_counter()
OPTIONAL = ("tyro", "rich", "rich.console", "rich.progress", "braceexpand")
"""what the library's command line needs, and a pruned model does not"""


@contextmanager
def stand_ins() -> Iterator[None]:
    """Modules of `OPTIONAL` that are missing are importable in this context, and empty."""
    missing = [name for name in OPTIONAL if not importable(name)]
    sys.modules.update({name: MagicMock() for name in missing})
    yield
    for name in missing:
        del sys.modules[name]


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


with stand_ins():
    import timm
    import torch
    from torch import Tensor, nn

    from tokengame.backbones import wrap
    from tokengame.backends import TorchBackend
    from tokengame.config import GameConfig
    from tokengame.errors import first_line
    from tokengame.game import TokenGame
    from tokengame.game.testing import Scripted
    from tokengame.measure.conditions import conditions
    from tokengame.measure.synthetic import SyntheticDecisions, synthetic_model
    from tokengame.packed.attention import Kernel, has_varlen, looped_attention, padded_attention, varlen_attention
    from tokengame.packed.layout import RaggedLayout
    from tokengame.policies import Policy
    from tokengame.runtime import PrunedViT, prune, prune_by
    from tokengame.runtime.cuda_graphs import CudaGraphs
    from tokengame.runtime.macs import native_macs, pruned_macs
    from tokengame.runtime.rule import Rule

RATIO = 0.62
"""pruned / native compute: 38 % fewer MACs"""
WANTED = {"deit_base_patch16_224": 1.2, "vit_large_patch16_224": 1.35}
"""speed over the compiled native model that is aimed at"""
DRAWS = 8
"""batches of different counts that follow one another"""
BLOCK = 0.05
"""seconds between two CUDA events, at least"""
RESERVE = 15.0
"""seconds at the end in which nothing is begun"""


@dataclass(frozen=True)
class Shape:
    """A model and a batch that are timed."""

    model: str
    batch: int
    transitions: tuple[str, ...] = ("merge",)
    settings: dict[str, Any] = field(default_factory=dict)


BOTH = ("merge", "drop")
BASE, LARGE, SMALL = "deit_base_patch16_224", "vit_large_patch16_224", "deit_small_patch16_224"
DINO = "vit_base_patch14_dinov2"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 5}
SHAPES = {
    "usual": (
        Shape(BASE, 32, BOTH), Shape(BASE, 256, BOTH), Shape(LARGE, 32), Shape(LARGE, 256, BOTH), Shape(BASE, 1),
        Shape(DINO, 32), Shape(LARGE, 1), Shape(SMALL, 256), Shape(SMALL, 32), Shape(DINO, 1), Shape(SMALL, 1),
        Shape(DINO, 256),
    ),
    "tiny": (Shape("vit_tiny_patch16_224", 2, BOTH, TINY), Shape("vit_tiny_patch16_224", 1, settings=TINY)),
}  # fmt: skip
"""in order of importance: the time may end before the last"""


# Rows


class Rows:
    """Results, printed and written as they come.

    Args:
        folder: of gpu.json and gpu.txt.
        about: what holds for all rows.
    """

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about, self.rows, self.lines = folder, about, list[dict[str, Any]](), list[str]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        """Add a row: its `kind`, and what was found."""
        self.rows.append(row)
        self.lines.append(as_line(row))
        print(self.lines[-1], flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.about | {"rows": self.rows}, indent=1))
        (self.folder / "gpu.txt").write_text("\n".join(self.lines) + "\n")

    def attempt(self, call: Callable[[], Any], seconds: float | None = None, **about: Any) -> Any:
        """The result of `call`; None, and a row that says why, where it fails or takes more than `seconds`.

        Calls with a limit hold no others with one: there is one timer.
        """
        if seconds is not None and seconds <= 0:
            self.add(**about, failed="not begun: the time was over")
            return None
        try:
            with nullcontext() if seconds is None else within(seconds):
                return call()
        except Exception as error:
            self.add(**about, failed=f"{type(error).__name__}: {first_line(error)}"[:300])
            return None


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this context after some seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def as_line(row: dict[str, Any]) -> str:
    """A row as text."""
    name = " ".join(str(row[key]) for key in ("kind", "model", "batch", "variant", "test") if key in row)
    shown = {key: value for key, value in row.items() if key not in ("kind", "model", "batch", "variant", "test")}
    texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())
    return f"{name:<78} {'  '.join(texts)}"


# Models


def random_model(name: str, settings: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A timm model of random weights under which attention differs from token to token."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = timm.create_model(name, **settings).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model.to(dtype)


def noise(model: Any, batch: int, seed: int = 1) -> Tensor:
    """[B, 3, height, width]"""
    backbone = wrap(model)
    images = torch.randn(batch, 3, *backbone.input_size, generator=torch.Generator().manual_seed(seed))
    return images.to(backbone.device, backbone.dtype)


class Drawn(SyntheticDecisions):
    """Synthetic decisions whose table stays in the same memory, so that it is read by captured launches."""

    def draw(self, number: int) -> None:
        """Play draw `number`, over and over from the first."""
        table = self.tables[number % len(self.tables)]
        if self.table.shape != table.shape:
            self.table = table.clone()
        self.table.copy_(table)


def pruned(model: Any, transition: str, images: Tensor) -> tuple[PrunedViT, float]:
    """A pruned model at `RATIO` of the compute, other counts in every image and draw; and the ratio it takes."""
    game = GameConfig(transition=transition)  # type: ignore[arg-type]
    shares = Rule(wrap(model), game=game).shares_for(whole=False, gmacs_ratio=RATIO)
    keep = tuple(itertools.accumulate(shares, lambda before, share: before * share))
    fast = synthetic_model(model, game, keep)
    decisions = Drawn(fast.actor.actor, keep)  # type: ignore[arg-type]
    fast.actor = decisions  # type: ignore[assignment]
    kept, total = decisions.fit(fast, images, DRAWS), wrap(model).patches
    return fast, float(pruned_macs(fast.game, decisions, kept, total).mean()) / native_macs(wrap(model), total)


# Equality


def distance(found: Tensor, exact: Tensor) -> float:
    """How far off, as a share."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return float((found - exact).norm() / exact.norm())


@dataclass
class Equality:
    """Tests on one small random model; each returns a difference, and the one up to which it passes."""

    device: torch.device
    transition: str

    def __post_init__(self) -> None:
        settings = TINY | {"img_size": 64, "embed_dim": 128, "depth": 6}
        self.model = random_model("vit_tiny_patch16_224", settings, torch.float32, self.device)
        self.images = noise(self.model, 6)
        self.config = GameConfig(stages=(1, 3, 4), transition=self.transition)  # type: ignore[arg-type]
        table = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(2)) + torch.linspace(-0.5, 2, 6)[:, None]
        self.table = table.to(self.device)

    def all_tokens(self) -> tuple[float, float]:
        """Every token kept: the native prediction."""
        return distance(self.rule(self.model, 0.0)(self.images), self.model(self.images)), 1e-4

    def rule(self, model: Any, dial: float = 0.5) -> PrunedViT:
        """The starting rule, with thresholds, so that counts differ from image to image."""
        policy = Rule(wrap(model), game=self.config).with_thresholds([noise(model, 32, 3)], gmacs_ratio=0.6)
        return prune(model, policy, dial)

    def scripted(self, model: Any, kernel: Kernel, images: Tensor, table: Tensor) -> Tensor:
        """[B, classes] of a game whose decisions are given."""
        game = TokenGame(wrap(model), self.config)
        return game.predict(game.play(images, Scripted(table), backend=TorchBackend(game.backbone, kernel)))

    def packed(self) -> tuple[float, float]:
        """Images of different counts together equal one at a time."""
        together = self.scripted(self.model, padded_attention, self.images, self.table)
        alone = [
            self.scripted(self.model, looped_attention, self.images[i : i + 1], self.table[:, i : i + 1])
            for i in range(len(self.images))
        ]
        return distance(together, torch.cat(alone)), 1e-4

    def as_on_cpu(self) -> tuple[float, float]:
        """The same decisions carried out by the CPU in float64."""
        found = self.scripted(self.model, padded_attention, self.images, self.table)
        other = copy.deepcopy(self.model).cpu().double()
        exact = self.scripted(other, looped_attention, self.images.cpu().double(), self.table.cpu())
        return distance(found, exact), 1e-4

    def decisions(self) -> tuple[float, float]:
        """Share of the tokens about which the rule decides otherwise than on the CPU in float64; ties may."""
        fast = self.rule(self.model)
        policy = Policy(copy.deepcopy(fast.actor).cpu(), fast.card)
        other = PrunedViT(copy.deepcopy(self.model).cpu().double(), policy, 0.5)
        found, exact = fast.predict(self.images).alive.cpu(), other.predict(self.images.cpu().double()).alive
        return float((found != exact).double().mean()), 2e-3

    def captured(self, dtype: torch.dtype = torch.float32, compiled: bool = False) -> tuple[float, float]:
        """Rows filled up to buckets, launched once and then replayed, equal the packed game; decisions are given."""
        model = copy.deepcopy(self.model).to(dtype)
        fast, worst = prune_by(model, self.config, Scripted(self.table)), 0.0
        graphs = CudaGraphs(fast, compiled=compiled)
        for seed in (4, 5, 6):
            images = noise(model, 6, seed)
            exact, found = fast.predict(images), graphs.predict(images)
            same = torch.equal(exact.alive, found.alive)
            worst = max(worst, distance(found.logits, exact.logits) if same else 1.0)
        return worst, 1e-4 if dtype == torch.float32 else 0.1

    def captured_rule(self) -> tuple[float, float]:
        """Share of the tokens about which the rule decides otherwise when captured; ties may."""
        fast = self.rule(self.model)
        graphs, off = CudaGraphs(fast), 0.0
        for seed in (4, 5, 4, 5):
            images = noise(self.model, 6, seed)
            off = max(off, float((fast.predict(images).alive != graphs.predict(images).alive).double().mean()))
        return off, 2e-3

    def varlen(self) -> tuple[float, float]:
        """Variable-length attention in bfloat16, with key biases: its error over that of padded attention."""
        generator = torch.Generator().manual_seed(5)
        layout = RaggedLayout([3, 197, 64, 110, 1], self.device)
        qkv = torch.randn(layout.rows, 3, 4, 64, generator=generator).to(self.device, torch.bfloat16)
        bias = torch.rand(layout.rows, generator=generator).to(self.device)
        exact = padded_attention(qkv.double(), layout, bias.double())
        errors = [distance(kernel(qkv, layout, bias), exact) for kernel in (varlen_attention, padded_attention)]
        return errors[0] / max(errors[1], 1e-4), 2.0

    def tests(self) -> dict[str, Callable[[], tuple[float, float]]]:
        """By name, those that this device runs."""
        found: dict[str, Callable[[], tuple[float, float]]] = {
            "all tokens kept equals native": self.all_tokens,
            "a batch equals single images": self.packed,
            "logits as on the CPU in float64": self.as_on_cpu,
            "decisions as on the CPU in float64": self.decisions,
            "captured equals launched, float32": self.captured,
            "captured equals launched, bfloat16": partial(self.captured, torch.bfloat16),
            "captured decisions equal launched": self.captured_rule,
        }
        if has_varlen(self.device, 64):
            found["variable-length attention equals padded"] = self.varlen
        if self.device.type == "cuda":
            found["captured and compiled equals launched"] = partial(self.captured, torch.float32, True)
        return found


def equality(rows: Rows, device: torch.device, deadline: float) -> None:
    """A row for each test and transition."""
    torch.backends.cudnn.allow_tf32 = False
    for transition in BOTH:
        cases = Equality(device, transition)
        for name, test in cases.tests().items():
            about = {"kind": "equality", "test": f"{transition}: {name}"}
            found = rows.attempt(test, min(40.0, deadline - time.perf_counter()), **about)
            if found is not None:
                rows.add(**about, passed=found[0] <= found[1], difference=found[0], limit=found[1])
    torch.backends.cudnn.allow_tf32 = True


# Speed


Variants = dict[str, Callable[[], Any]]
"""a call each, by name"""


def native_variants(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What prepares each native form, by name."""
    eager = partial(model, x)
    if x.device.type != "cuda":
        return {"native": lambda: eager}
    compiled = partial(torch.compile(model, dynamic=False), x)
    return {
        "native": lambda: eager,
        "native compiled": lambda: compiled,
        "native compiled captured": lambda: captured(compiled),
        "native captured": lambda: captured(eager),
    }


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call of fixed shapes in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def pruned_variants(fast: PrunedViT, transition: str, x: Tensor) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What prepares each pruned form, by name."""
    forms: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        "eager": lambda: fast,
        "captured": lambda: CudaGraphs(fast),
    }
    if x.device.type == "cuda":
        forms["compiled captured"] = lambda: CudaGraphs(fast, compiled=True)
        if len(x) == 1:  # batches are pruned eagerly under torch.compile
            forms["compiled"] = lambda: torch.compile(fast)
    return {f"pruned {transition} {name}": partial(drawing, fast, form, x) for name, form in forms.items()}


def drawing(fast: PrunedViT, form: Callable[[], Callable[[Tensor], Any]], x: Tensor) -> Callable[[], Any]:
    """Calls with other counts every time; each count is met once here, so that graphs are captured."""
    numbers, call = itertools.count(), form()

    def drawn() -> Any:
        fast.actor.draw(next(numbers))  # type: ignore[operator]
        return call(x)

    for _ in range(DRAWS):
        drawn()
    return drawn


def elapsed(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of one of some calls in a row, between two CUDA events."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / times / 1e3


def interleaved(calls: Variants, seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a call of each variant, round after round; each round begins with another one."""
    times, order = {name: list[float]() for name in calls}, list(calls)
    repeats = {name: max(1, round(BLOCK / elapsed(call, 2, device))) for name, call in calls.items()}
    stop = time.perf_counter() + seconds
    while len(times[order[-1]]) < 3 or time.perf_counter() < stop:
        for name in order:
            times[name].append(elapsed(calls[name], repeats[name], device))
        order = order[1:] + order[:1]
    return times


def prepared(rows: Rows, makers: dict[str, Callable[[], Callable[[], Any]]], device: torch.device, deadline: float,
             about: dict[str, Any]) -> tuple[Variants, dict[str, float]]:  # fmt: skip
    """The variants that run, and MiB that each takes at most; a row for each that does not."""
    calls, memory = {}, {}
    for name, make in makers.items():

        def ready(make: Callable[[], Callable[[], Any]] = make) -> Callable[[], Any]:
            call = make()
            for _ in range(3):
                call()
            return call

        before = reset_peak(device)
        call = rows.attempt(ready, deadline - time.perf_counter(), **about, variant=name)
        if call is not None:
            calls[name], memory[name] = call, peak_since(before, device)
    return calls, memory


def reset_peak(device: torch.device) -> int:
    """Bytes allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_since(before: int, device: torch.device) -> float:
    """MiB allocated at most beyond `before` bytes."""
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else 0.0


def speed(rows: Rows, shape: Shape, device: torch.device, deadline: float, seconds: float) -> None:
    """A row for each variant of a shape."""
    about = {"kind": "speed", "model": shape.model, "batch": shape.batch}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape.model, shape.settings, dtype, device)
    x = noise(model, shape.batch)
    makers, ratios = native_variants(model, x), {}
    for transition in shape.transitions:
        found = rows.attempt(lambda t=transition: pruned(model, t, x), 60.0, **about, variant=f"pruned {transition}")
        if found is not None:
            ratios[transition] = found[1]
            makers |= pruned_variants(found[0], transition, x)
    calls, memory = prepared(rows, makers, device, deadline, about)
    times = rows.attempt(
        lambda: interleaved(calls, seconds, device), max(deadline - time.perf_counter(), 3 * seconds), **about
    )
    if times:
        report(rows, {name: statistics.median(t) for name, t in times.items()}, about, ratios, memory)


def report(rows: Rows, median: dict[str, float], about: dict[str, Any], ratios: dict[str, float],
           memory: dict[str, float]) -> None:  # fmt: skip
    """A row for each variant, and one for the best pruned form against what is aimed at."""
    rivals = {"compiled": ["native compiled"], "captured": ["native captured", "native compiled captured"]}
    of = {key: min((median[n] for n in names if n in median), default=None) for key, names in rivals.items()}
    of["eager"] = median.get("native")
    for name, took in median.items():
        over = {f"over_{key}": rival / took for key, rival in of.items() if rival}
        ratio = next((r for t, r in ratios.items() if f"pruned {t} " in name), 1.0)
        rows.add(**about, variant=name, milliseconds=1e3 * took, images_per_second=about["batch"] / took,
                 gmacs_ratio=ratio, **over, peak_mib=memory[name])  # fmt: skip
    best = min((took for name, took in median.items() if name.startswith("pruned")), default=None)
    if best and of["compiled"] and about["model"] in WANTED:
        found, wanted = of["compiled"] / best, WANTED[about["model"]]
        rows.add(**about | {"kind": "aim"}, speedup_over_compiled=found, wanted=wanted, reached=found >= wanted)


# Profile


def profiles(rows: Rows, shape: Shape, device: torch.device) -> None:
    """The kernels that take longest, pruned eager and captured: a text file each."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(shape.model, shape.settings, dtype, device)
    x = noise(model, shape.batch)
    fast, _ = pruned(model, "merge", x)
    forms: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        "eager": lambda: fast,
        "captured": lambda: CudaGraphs(fast),
    }
    for name, form in forms.items():
        call = drawing(fast, form, x)
        path = rows.folder / f"profile_{shape.model}_batch{shape.batch}_{name}.txt"
        path.write_text(profile_of(call, device))
        rows.add(kind="profile", model=shape.model, batch=shape.batch, variant=name, file=path.name)


def profile_of(call: Callable[[], Any], device: torch.device, calls: int = DRAWS) -> str:
    """The 15 kernels that take longest in some calls, as a table."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return f"{calls} calls\n" + found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=90)


# All


def clean(device: torch.device) -> None:
    """Forget what was compiled and free what is not used."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Everything in order, until the time is over; 1 where an equality test fails."""
    device, deadline = torch.device(args.device), START + 60 * args.minutes - RESERVE
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU is found: nothing is measured", file=sys.stderr)
        return 2
    rows, shapes = Rows(args.output, conditions(torch.bfloat16, device)), SHAPES[args.models]
    rows.attempt(lambda: equality(rows, device, deadline), kind="equality", test="all")
    for number, shape in enumerate(shapes):
        about = {"model": shape.model, "batch": shape.batch}
        if time.perf_counter() > deadline:
            rows.add(kind="speed", **about, failed="not begun: the time was over")
            continue
        rows.attempt(lambda s=shape: speed(rows, s, device, deadline, args.seconds), kind="speed", **about)
        clean(device)
        if number == 0:
            left = min(40.0, deadline - time.perf_counter())
            rows.attempt(lambda s=shape: profiles(rows, s, device), left, kind="profile", **about)
            clean(device)
    print(f"{time.perf_counter() - START:.0f} seconds; written to {args.output}")
    return int(any(row["kind"] == "equality" and not row.get("passed") for row in rows.rows))


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing is begun")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each shape")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--models", choices=SHAPES, default="usual", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    try:
        return run(args)
    except KeyboardInterrupt:  # of `timeout` in runs/gpu.sh
        print(f"stopped; what was measured until then is in {args.output}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
