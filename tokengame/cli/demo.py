"""`demo`: a page in the browser that shows what is pruned, native beside pruned."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from tokengame.cli.common import SHARE, OnImages, prune_by_name
from tokengame.errors import TokenGameError
from tokengame.ranges import Range
from tokengame.report.console import console, progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokengame.data.datasets import ImageSource
    from tokengame.data.hub import HuggingFaceStream
    from tokengame.report.side_by_side import SideBySide
    from tokengame.runtime import PrunedViT


@dataclass(kw_only=True)
class Demo(OnImages):
    """A page in the browser: drop a photo, move the dial, see which tokens are left and what both models say."""

    name: ClassVar[str] = "demo"
    first: ClassVar[tuple[str, ...]] = ("backbone", "weights", "policy", "images", "port")
    examples: ClassVar[str] = (
        "tokengame demo\ntokengame demo --backbone vit_tiny_patch16_224 --images photos/ --policy vit_tiny_patch16_224"
    )

    backbone: str = "fashion"
    """timm model name, e.g. vit_small_patch16_224; Hugging Face folder or ORG/NAME; open_clip:NAME/TAG;
    torchvision:NAME; or the embedded model"""
    images: str = "fashion"
    """example photos, as other commands take images: a folder, a .tar, a data set; or the embedded scenes. The starting
    rule sets its thresholds on them, and an embedding has its neighbours among them"""
    policy: str = "rule"
    """policy file, the name of a shipped one, or "rule": the starting rule, of which nothing is learned"""
    dial: Annotated[float | None, SHARE] = None
    """where the dial stands at first, between 0 and 1; default is the policy's recommendation"""
    class_map: str | None = None
    """text file, one class name a line in the model's order; ImageNet's are known"""
    count: Annotated[int, Range(1, 200, whole=True)] = 12
    """how many example photos, drawn by the seed"""
    host: str = "127.0.0.1"
    """address to serve at; 0.0.0.0 lets other machines open the page, which has no password"""
    port: Annotated[int, Range(1, 65_535, whole=True)] = 7860
    """to serve at"""
    workers: Annotated[int, tyro.conf.Suppress] = 0

    def run(self) -> dict[str, Any]:
        """Serve until Ctrl-C."""
        require_free(self.host, self.port)
        require_gradio()
        from tokengame.report.demo import served

        models = self._models(*self.load())
        about = f"{self.backbone}, policy {self.policy}. {_machine()}"
        with served(models, about, self.host, self.port) as url:
            console.print(f"open {url} in a browser; Ctrl-C ends it", markup=False, highlight=False, soft_wrap=True)
            with suppress(KeyboardInterrupt):  # the way to end it
                threading.Event().wait()
        return {"url": url}

    def require_output(self, model: nn.Module) -> None:
        """Raise TokenGameError where the model gives neither classes nor an embedding."""
        from tokengame.backbones import wrap
        from tokengame.backbones.classes import output_of

        output_of(wrap(model))

    def prepare(self, source: ImageSource | HuggingFaceStream, _model: nn.Module) -> None:
        """Refuse examples of which too many cannot be read; labels are not needed."""
        from tokengame.data.batches import require_readable

        require_readable(source)

    def _models(self, model: nn.Module, source: ImageSource) -> SideBySide:
        from tokengame.report.class_names import class_names
        from tokengame.report.side_by_side import SideBySide

        fast = self._pruned(model, source)
        backbone = fast.game.backbone
        names = class_names(backbone, self.class_map)
        if self.backbone == "fashion" and self.class_map is None:
            from tokengame.data.scenes import CLASSES

            names = list(CLASSES)
        return SideBySide(fast, names, self._examples(backbone.preprocessing(), source))

    def _pruned(self, model: nn.Module, source: ImageSource) -> PrunedViT:
        """By the policy; the rule's thresholds are set on the examples' set, so that the dial moves them."""
        import torch

        from tokengame.runtime.rule import RULE

        if self.policy != RULE:
            return prune_by_name(model, self.policy, self.dial)
        return prune_by_name(model, RULE, self.dial, images=torch.cat(self.for_thresholds(model, source)))

    def _examples(self, preprocessing: dict[str, Any], source: ImageSource) -> Tensor:
        """[n, channels, height, width]: those of the images drawn that can be read."""
        import torch

        from tokengame.data.given import some_of

        batches, number = some_of(source, preprocessing, self.count, self.seed)
        found = [batch.images for batch in progress(batches, "reading examples", number)]
        if not found:
            raise TokenGameError(f"none of the {self.count} example photos drawn can be read; try another --seed")
        return torch.cat(found)


def require_gradio() -> None:
    """Raise TokenGameError where Gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise TokenGameError("the page needs Gradio: pip install tokengame[demo]") from None


def require_free(host: str, port: int) -> None:
    """Raise TokenGameError where nothing can be served at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise TokenGameError(f"cannot serve at {host}:{port} ({reason}); see --host and --port") from None


def _machine() -> str:
    """What the milliseconds are of."""
    import torch

    from tokengame import kernels

    return f"Times are of one photo alone on {torch.get_num_threads()} threads; {kernels.status()}"
