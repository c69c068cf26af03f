"""The page of `tokengame demo`: a photo, a dial, the tokens left after each stage, and both models' answers.

Gradio serves it. Nothing in it is loaded from elsewhere: no fonts, no scripts, no telemetry. Photos stay on the machine
that runs the command, and are deleted after an hour or when the command ends.
"""

# no postponed annotations: Gradio reads the type of a handler's argument

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor

from tokengame.data.decode import MAX_BYTES
from tokengame.errors import TokenGameError, first_line
from tokengame.report.figures import denormalise, png
from tokengame.report.html import page
from tokengame.report.side_by_side import Answer, Comparison, SideBySide

SIDE = 224
"""height of a panel in pixels"""
THUMBNAIL = 88
HOUR = 3600
FONTS = ("system-ui", "sans-serif")
STYLE = """
.gradio-container { max-width: 1400px !important }
#examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important }
#examples .grid-wrap { min-height: 0 !important; height: auto !important; max-height: 330px !important }
"""
START = (
    "Drop a photo or take an example, then move the dial, from 0 (all tokens stay) to 1 (most are pruned). "
    "Shown are the photo as the model sees it and what is left after each pruning block; faded patches are gone."
)


@dataclass(frozen=True)
class Photo:
    """What the page shows, of one visitor."""

    pixels: Tensor
    """[channels, height, width] as the model takes it"""
    example: int | None = None


class DemoPage:
    """What the page does, without the page: photos and dials in, a picture and a piece of HTML out."""

    def __init__(self, models: SideBySide):
        self.models = models
        preprocessing = models.fast.game.backbone.preprocessing()
        self.thumbnails = [Image.fromarray(pixels) for pixels in denormalise(models.examples, preprocessing)]

    def uploaded(self, path: str, dial: float) -> tuple[Photo | None, Image.Image | None, str]:
        """The photo in a file that was dropped; a sentence if it cannot be read."""
        try:
            photo = Photo(self.models.read(path))
        except TokenGameError as error:
            return None, None, page("demo.html", sentence=_sentence(error))
        return photo, *self.shown(photo, dial)

    def example(self, index: int, dial: float) -> tuple[Photo | None, Image.Image | None, str]:
        """One of the examples."""
        photo = Photo(self.models.examples[index], index)
        return photo, *self.shown(photo, dial)

    def shown(self, photo: Photo | None, dial: float) -> tuple[Image.Image | None, str]:
        """The tokens left of a photo, and both models' answers; a sentence where there is no photo."""
        if photo is None:
            return None, page("demo.html", sentence="Drop a photo or take an example.")
        try:
            found = self.models.compare(photo.pixels, dial, SIDE, photo.example)
        except TokenGameError as error:
            return None, page("demo.html", sentence=_sentence(error))
        return found.strip.picture, self._html(found)

    def _html(self, found: Comparison) -> str:
        counts = found.strip.counts
        sides = [
            self._side("native", "Native: all tokens", f"{counts[0]}", found.native),
            self._side("pruned", "Pruned", " → ".join(map(str, counts)), found.pruned),
        ]
        return page("demo.html", verdict=verdict(found, bool(self.models.classes)), sides=sides)

    def _side(self, name: str, title: str, tokens: str, answer: Answer) -> dict[str, Any]:
        """What the template shows of one model."""
        return {
            "name": name, "title": title, "tokens": tokens, "gmacs": f"{answer.gmacs:.3g}",
            "milliseconds": f"{answer.milliseconds:.1f}", "rows": [self._row(*one) for one in answer.best],
        }  # fmt: skip

    def _row(self, number: int, score: float) -> dict[str, Any]:
        if self.models.classes:
            return {"name": self.models.classes[number], "value": f"{score:.1%}", "percent": round(100 * score, 1)}
        small = self.thumbnails[number].copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        percent = round(100 * max(0.0, score), 1)
        picture = base64.b64encode(png(small)).decode()
        return {"name": f"example {number + 1}", "value": f"{score:.3f}", "percent": percent, "picture": picture}


def _sentence(error: TokenGameError) -> str:
    """An error as a sentence of its own."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def verdict(found: Comparison, classes: bool) -> str:
    """A comparison in one sentence, "slower" where slower."""
    what = "prediction" if classes else "nearest example"
    same = f"{'Same' if found.same else 'Another'} {what}"
    close = "" if classes else f", cosine {found.cosine:.4f} with the native embedding"
    speed = found.speedup
    pace = f"{speed:.2f} times as fast" if speed >= 1 else f"slower: {speed:.2f} times the native speed"
    part = f"{found.speedup_over_own_kernels:.2f} by pruning alone"
    return f"{same}{close}; {found.strip.compute:.0%} of the compute, {pace} ({part})"


@contextmanager
def served(models: SideBySide, about: str, host: str, port: int) -> Iterator[str]:
    """Serve the page in this context; gives its address. What was uploaded is deleted at the end.

    Args:
        models: that are compared.
        about: one line on them, shown below.
        host, port: where to serve.

    Raises:
        TokenGameError: it cannot be served there.
    """
    with TemporaryDirectory(prefix="tokengame-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio puts files, of which it leaves some otherwise
        blocks = build(models, about)
        try:
            yield _launch(blocks, host, port)
        finally:
            blocks.close(verbose=False)


def _launch(blocks: Any, host: str, port: int) -> str:
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=("ui-monospace", "monospace"))
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, pwa=False, mcp_server=False, run_history=False, footer_links=[], max_file_size=MAX_BYTES,
            theme=theme, css=STYLE,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise TokenGameError(f"cannot serve at {host}:{port} ({first_line(error)}); see --host and --port") from None
    return url


def build(models: SideBySide, about: str) -> Any:
    """The page as Gradio's Blocks; arguments as in `served`."""
    import gradio as gr

    page_of, events = DemoPage(models), {"api_visibility": "private", "concurrency_id": "model"}
    with gr.Blocks(title="tokengame demo", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.HTML(page("demo_head.html", start=START))
        photo: Any = gr.State(None, time_to_live=HOUR)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                dial = gr.Slider(0, 1, round(models.fast.dial, 3), step=0.001, label="dial", elem_id="dial")
                file = gr.File(label="photo", height=140, elem_id="photo")
                examples = gr.Gallery(
                    page_of.thumbnails, label="examples", show_label=False, columns=3, height="auto",
                    allow_preview=False, object_fit="cover", interactive=False, buttons=[], elem_id="examples",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=320):
                picture = gr.Image(
                    label="the photo, and the tokens left after each stage", show_label=False, format="png",
                    interactive=False, buttons=["download", "fullscreen"], elem_id="tokens",
                )  # fmt: skip
                answers = gr.HTML(elem_id="answers")
        gr.HTML(page("demo_head.html", about=about))

        def chosen(setting: float, event: gr.SelectData) -> Any:
            return page_of.example(event.index, setting)

        def dropped(path: str, setting: float) -> Any:
            return None, *page_of.uploaded(path, setting)  # the place is free for the next photo

        outputs = [photo, picture, answers]
        blocks.load(partial(page_of.example, 0), [dial], outputs, show_progress="hidden", **events)
        file.upload(dropped, [file, dial], [file, *outputs], show_progress="hidden", **events)
        examples.select(chosen, [dial], outputs, show_progress="hidden", **events)
        dial.change(
            page_of.shown, [photo, dial], [picture, answers], show_progress="hidden", trigger_mode="always_last",
            **events,
        )  # fmt: skip
    return blocks
