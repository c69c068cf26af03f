"""What one call of a model is to return, and which calls a pruned model cannot honour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tokengame.errors import TokenGameError


def _output_alone(output: Tensor, _features: list[Tensor]) -> Tensor:
    return output


class Call(NamedTuple):
    """One call of a model, as its family reads the arguments."""

    images: Tensor
    """[B, channels, height, width]"""
    features: tuple[int, ...] = ()
    """blocks whose output on the full grid is wanted, ascending, before the final norm; -1: the embedded tokens"""
    answer: Callable[[Tensor, list[Tensor]], Any] = _output_alone
    """from the head's output [B, ...] and these features [B, prefix + N, C] to what the model would return"""


class Intermediates(NamedTuple):
    """Features after several blocks in the shapes in which timm returns them."""

    features: list[Tensor]
    """[B, prefix + N, C]"""
    prefix: int
    grid: tuple[int, int]
    output_fmt: str
    return_prefix_tokens: bool

    @property
    def patches(self) -> list[Tensor]:
        """[B, C, rows, columns] or [B, N, C]"""
        if self.output_fmt not in ("NCHW", "NLC"):
            raise TokenGameError(f"output_fmt must be NCHW or NLC, not {self.output_fmt!r}")
        patches = [x[:, self.prefix :] for x in self.features]
        maps = self.output_fmt == "NCHW"
        return [x.transpose(1, 2).unflatten(2, self.grid).contiguous() for x in patches] if maps else patches

    @property
    def prefixes(self) -> list[Tensor] | None:
        """[B, prefix, C], where they are wanted and the model has any"""
        wanted = self.return_prefix_tokens and self.prefix
        return [x[:, : self.prefix] for x in self.features] if wanted else None

    def as_list(self, final: Tensor | None) -> Any:
        """Intermediate features, after `final` where there are some."""
        found: list[Any] = self.patches
        if self.prefixes is not None:
            found = list(zip(found, self.prefixes, strict=True))
        return found if final is None else (final, found)

    def as_dict(self, final: Tensor | None) -> dict[str, Any]:
        """The same under timm's names."""
        found: dict[str, Any] = {"image_intermediates": self.patches}
        if self.prefixes is not None:
            found["image_intermediates_prefix"] = self.prefixes
        return found if final is None else found | {"image_features": final}


class Interface(NamedTuple):
    """What a pruned model has of the model it wraps, by name, beside its call."""

    attributes: frozenset[str] = frozenset()
    """read from the wrapped model"""
    changes: frozenset[str] = frozenset()
    """methods that change a model: called on modules of the pruned model's own"""
    refused: Mapping[str, str] = {}
    """methods that a pruned model cannot have, and what to do instead"""


def not_traced(how: str) -> str:
    """Why a pruned model cannot be traced."""
    return (
        f"a pruned model cannot be {how}: how many tokens it computes depends on each image; torch.compile(fast) "
        "works, and fast.restore() gives the native model, which can be"
    )


def check_masks(images: Any, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Refuse attention masks.

    Raises:
        TokenGameError: one is given, or symbols are, by torch.fx.
    """
    if not isinstance(images, Tensor):
        raise TokenGameError(not_traced(f"run on a {type(images).__name__}"))
    if attn_mask is not None or is_causal:
        raise TokenGameError(
            "a pruned model takes no attention mask (attn_mask, is_causal): a mask counts on every token being there; "
            "pass it to fast.restore()"
        )
