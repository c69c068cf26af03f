"""What a person reads beside a policy on the hub: README.md with the figures of its card, and their curve."""

from __future__ import annotations

import io
import re
from typing import Any

from huggingface_hub import ModelCardData

from tokengame.policies.card import keeps

PICTURE = "calibration.svg"
TAGS = ["tokengame", "token-pruning", "vision-transformer"]
COLUMNS = {
    "dial": ("dial", "{:.3g}"),
    "gmacs_ratio": ("compute, pruned / native", "{:.2f}"),
    "keep": ("tokens kept", "{:.0%}"),
    "agreement": ("same prediction as native", "{:.1%}"),
    "kl": ("KL(native ‖ pruned), nats", "{:.4f}"),
    "drop_pp": ("points of top-1 lost", "{:+.2f}"),
    "drop_pp_ci95": ("its 95 % interval", "{0[0]:+.2f} to {0[1]:+.2f}"),
    "drop_pp_bound95": ("lost at most, at 95 % confidence", "{:.2f}"),
    "distance": ("mean 1 - cosine", "{:.5f}"),
    "distance_bound95": ("at most, at 95 % confidence", "{:.5f}"),
}
"""of a calibration: heading and form of a figure"""
TASKS = {"logits": "image-classification"}
TEXT = """# {title}

A policy of [tokengame](https://github.com/tokengame/tokengame): it says which tokens of a trained Vision Transformer
are removed in each image, so that the model runs faster. It holds no weights of the model, which stays as it is.

- Model: `{model}`, {shape}; the policy was made for the weights with fingerprint `{fingerprint}`
- It keeps: {keeps}
- Tokens are {transition} before blocks {stages}
- Recommended dial: {dial:.3g}
- Licence: {licence}

## Use it

```python
import tokengame

fast = tokengame.prune(model, "hf:{repo}")  # the model above, of timm, transformers, open_clip or torchvision
logits = fast(images)  # same call, same output
```

## Calibration

{calibration}
"""


def model_card(card: dict[str, Any], repo: str, picture: bool) -> str:
    """README.md of a repository: metadata in YAML, then text.

    Args:
        card: of the policy.
        repo: "user/name", by which it is loaded.
        picture: whether `PICTURE` lies beside it.
    """
    about, game = card["backbone"], card["game"]
    licence = str(card.get("licence", "not stated"))
    known = licence.lower() if re.fullmatch(r"[A-Za-z0-9.+-]+", licence) else None
    data = ModelCardData(
        license=known,
        library_name="tokengame",
        tags=TAGS,
        pipeline_tag=TASKS.get(keeps(card), "image-feature-extraction"),
    )
    text = TEXT.format(
        title=repo.rpartition("/")[2], model=about["name"], shape=_shape(about["shape"]), repo=repo,
        fingerprint=about["fingerprint"], keeps={"logits": "class predictions"}.get(keeps(card), f"the {keeps(card)}"),
        transition={"merge": "merged into similar ones"}.get(game["transition"], "dropped"),
        stages=", ".join(map(str, game["stages"])), dial=card["dial"], licence=licence,
        calibration=_calibration(card, picture),
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _shape(shape: dict[str, Any]) -> str:
    (height, width), patch = shape["input_size"], shape["patch"][0]
    return f"{shape['depth']} blocks of width {shape['dim']}, {height} x {width} pixels in patches of {patch}"


def _calibration(card: dict[str, Any], picture: bool) -> str:
    """The table of the card's rows, of those figures that it has."""
    rows = card["calibration"]
    if not rows:
        return "None yet: `tokengame calibrate` makes one."
    columns = {name: column for name, column in COLUMNS.items() if rows[0].get(name) is not None}
    lines = [[heading for heading, _ in columns.values()], ["---"] * len(columns)]
    lines += [[form.format(row[name]) for name, (_, form) in columns.items()] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    images = (
        f"Measured on {rows[0]['images']:,} images that the policy did not learn from.\n\n"
        if "images" in rows[0]
        else ""
    )
    return f"{images}{f'![what is kept over compute]({PICTURE})' * picture}\n\n{table}".strip()


def calibration_picture(card: dict[str, Any]) -> bytes | None:
    """SVG: what is kept over compute; None without a calibration, or without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = sorted(card["calibration"], key=lambda row: row["gmacs_ratio"])
    if not rows:
        return None
    name = "agreement" if keeps(card) == "logits" else "distance"
    figure, content = Figure(figsize=(5.2, 3.2), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    axes.plot([row["gmacs_ratio"] for row in rows], [row[name] for row in rows], "o-", ms=4)
    axes.set(xlabel="compute, pruned / native (policy included)", ylabel=COLUMNS[name][0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokengame"}):  # text as text; the same bytes every time
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return content.getvalue()
