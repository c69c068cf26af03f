"""The HTML report of a run: one file, pictures inside."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokengame.files import write_whole

ROWS = [
    ("images", "fresh images", "{:,.0f}"),
    ("top1_native", "top-1, native", "{:.1%}"),
    ("top1_pruned", "top-1, pruned", "{:.1%}"),
    ("drop_pp", "drop, points", "{:+.2f}"),
    ("agreement", "same prediction as native", "{:.1%}"),
    ("kl", "KL(native || pruned), nats", "{:.4f}"),
    ("cosine", "cosine with the native embedding", "{:.5f}"),
    ("feature_cosine", "cosine with the native features, mean over places", "{:.5f}"),
    ("feature_cosine_q05", "its 5 % quantile over places", "{:.5f}"),
    ("distance", "mean 1 - cosine", "{:.5f}"),
    ("same_neighbour", "same nearest image as native", "{:.1%}"),
    ("same_neighbour_native_gallery", "the same, pruned queries among native embeddings", "{:.1%}"),
    ("recall_at_1", "native's nearest image is the pruned model's first", "{:.1%}"),
    ("recall_at_5", "among its first 5", "{:.1%}"),
    ("recall_at_10", "among its first 10", "{:.1%}"),
    ("zero_shot_agreement", "same nearest embedding of the bank", "{:.1%}"),
    ("decoded_distance", "relative distance of what the decoder makes of it", "{:.4f}"),
    ("gmacs_native", "GMACs an image, native", "{:.3f}"),
    ("gmacs_pruned", "GMACs an image, pruned, policy included", "{:.3f}"),
    ("gmacs_ratio", "compute, pruned / native", "{:.3f}"),
    ("gmacs_ratio_std", "its spread over images", "{:.3f}"),
    ("compute_vs_uncertainty", "rank correlation of compute with the native model's uncertainty", "{:+.2f}"),
    ("fallback_share", "images that fell back to all tokens", "{:.1%}"),
    ("images_per_second_native", "images per second, native", "{:.0f}"),
    ("images_per_second_pruned", "images per second, pruned", "{:.0f}"),
    ("speedup", "measured speed-up", "{:.2f}x"),
    ("speedup_over", "over the fastest native form of the same precision", "{}"),
    ("own_kernels_speedup", "all tokens on the pruned model's kernels, over that", "{:.2f}x"),
    ("speedup_over_own_kernels", "pruned, over all tokens on the same kernels", "{:.2f}x"),
    ("item_tokens_kept", "item tokens kept to the end", "{:.1%}"),
    ("background_tokens_kept", "background tokens kept to the end", "{:.1%}"),
]


OFTEN = 0.2
"""share of images that fall back, above which a policy without a cascade may do better"""


def table(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of each figure in `result`."""
    shown = {key: value for key, value in result.items() if value is not None and (key, value) != ("fallback_share", 0)}
    rows = [(label, form.format(shown[key])) for key, label, form in ROWS if key in shown]
    if result.get("drop_pp_ci95"):
        low, high = result["drop_pp_ci95"]
        place = next(i for i, (label, _) in enumerate(rows) if label.startswith("drop"))
        rows.insert(place + 1, ("95 % interval of the drop", f"{low:+.2f} to {high:+.2f}"))
    if result.get("tokens_kept"):
        shares = [f"{kept / result['tokens']:.0%}" for kept in result["tokens_kept"]]
        rows.append(("tokens kept after each stage", " → ".join(shares)))
    return rows


def verdict(result: dict[str, Any]) -> str:
    """The result in one sentence, "slower" when slower."""
    speed = result["speedup"]
    best = result.get("speedup_over")
    over, which = (f" as native ({best})", f", {best}") if best else ("", "")
    pace = f"{speed:.2f} times as fast{over}" if speed >= 1 else f"slower ({speed:.2f} times the native speed{which})"
    price = _price(result)
    found = f"{pace} with {result['gmacs_ratio']:.0%} of the compute, {price}"
    if result.get("fallback_share", 0) > OFTEN:
        found += (
            f"; {result['fallback_share']:.0%} of the images fell back to all tokens: where so many predictions are "
            "uncertain, no cascade may do better (`tokengame calibrate --cascade-margin 0`)"
        )
    return found


def _price(result: dict[str, Any]) -> str:
    """What is lost, in a few words."""
    if "feature_cosine" in result:
        return f"features at a cosine of {result['feature_cosine']:.4f} with the native ones"
    if "cosine" in result:
        price, same = f"embeddings at a cosine of {result['cosine']:.4f} with the native ones", result["same_neighbour"]
        return price if same is None else f"{price}, {same:.1%} of the nearest images unchanged"
    price, drop = f"{result['agreement']:.1%} of the predictions unchanged", result.get("drop_pp")
    if drop is None:
        return price
    return f"{abs(drop):.2f} points of top-1 {'lost' if drop >= 0 else 'gained'}, {price}"


PAPER_HEADINGS = ("Method", "Top-1 (%)", "Change", "GMACs", "Images/s", "Change (%)")


def paper_rows(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Results of `compare` in the layout of the paper's tables, native first; blank where nothing was measured."""
    labelled = [row for row in rows if row.get("top1_native") is not None]
    timed = [row for row in rows if "speedup" in row]
    top1 = f"{100 * labelled[0]['top1_native']:.2f}" if labelled else ""
    gmacs, speed = f"{rows[0]['gmacs_native']:.3f}", ""
    if timed:
        speeds = sorted(row["images_per_second_native"] for row in timed)
        speed = f"{speeds[len(speeds) // 2]:.1f}"
    found = [("native", top1, "", gmacs, speed, "")]
    for row in rows:
        name = ", ".join(part for part in (row["method"], row["setting"]) if part)
        top1 = change = speed = faster = ""
        if row.get("top1_pruned") is not None:
            top1, change = f"{100 * row['top1_pruned']:.2f}", f"{-row['drop_pp']:+.2f}"
        if "speedup" in row:
            speed, faster = f"{row['images_per_second_pruned']:.1f}", f"{100 * (row['speedup'] - 1):+.1f}"
        found.append((name, top1, change, f"{row['gmacs_pruned']:.3f}", speed, faster))
    return [dict(zip(PAPER_HEADINGS, values, strict=True)) for values in found]


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_report(path: Path, title: str, result: dict[str, Any], strips: bytes, figures: dict[str, bytes]) -> None:
    """Write the report of `quickstart`.

    Args:
        strips: PNG of overlays.
        figures: caption -> SVG.
    """
    text = page(
        "report.html",
        title=title,
        verdict=verdict(result),
        rows=table(result),
        strips=base64.b64encode(strips).decode(),
        figures={caption: base64.b64encode(svg).decode() for caption, svg in figures.items()},
    )
    write_whole(path, text)


def page(template: str, **values: Any) -> str:
    """The HTML of a template among the package's assets."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("tokengame", "assets"), autoescape=True)
    return environment.get_template(template).render(values)
