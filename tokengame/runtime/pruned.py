"""The faster model: the game played with a fixed policy, deterministic, tokens physically removed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

import tokengame.runtime.cascade as cascade
from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.backends import CompiledBlocks
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import Decide, TokenGame
from tokengame.packed.attention import fastest_attention
from tokengame.policies.policy import Policy, check_fits, dial_for, find_policy, threshold
from tokengame.runtime.cascade import PrunedOutput
from tokengame.runtime.features import Fill, grid_features
from tokengame.runtime.macs import fallback_macs, native_macs, pruned_macs
from tokengame.runtime.torch_compile import CompiledGame


class PrunedViT(nn.Module):
    """A Vision Transformer that prunes tokens for every image; same call and same output as the model it wraps.

    `dial` may be set at any time: 0 keeps every token (the native prediction), 0.5 is the policy's own choice, higher
    prunes more. The wrapped model is never changed: where this module is converted (`.half()`, `.to(...)`) or changes
    mode, it first gets modules of its own, which share the weights' memory until they are converted. `restore` gives
    the wrapped model back.

    In evaluation mode no gradients are recorded; `fast.train()` records them.
    """

    def __init__(self, model: nn.Module, policy: Policy, dial: float):
        super().__init__()
        self.__dict__["_wrapped"] = model  # not a submodule: conversions must not reach it
        self.model, self.actor, self.card = model, policy.actor, policy.card
        self._config, self._features = policy.game, policy.card["actor"]["observation"] == "context"
        self._compiled: TokenGame | None = None
        self.game = self._new_game()
        self.dial = dial
        self.eval()

    def _new_game(self) -> TokenGame:
        return TokenGame(wrap(self.model), self._config, self._features, fastest_attention)

    @property
    def dial(self) -> float:
        """How hard to prune, between 0 (keep all tokens) and 1 (prune most)."""
        return self._dial

    @dial.setter
    def dial(self, value: float) -> None:
        self._threshold = threshold(value)
        self._dial = value

    @property
    def threshold(self) -> float:
        """Keep logit above which a token is kept at this dial."""
        return self._threshold

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> the model's own output [B, classes]."""
        if not len(images):
            return self.model(images)
        if torch.compiler.is_compiling():
            return self._predict_compiled(images)
        return self.predict(images).logits

    def predict(self, images: Tensor, gradients: bool | None = None) -> PrunedOutput:
        """The prediction and which tokens were kept.

        Args:
            images: [B, channels, height, width].
            gradients: whether they are recorded; by default only in training mode.
        """
        kernels.announce(self.game.backbone.dtype, images.device.type)
        with self._gradients(gradients):
            return cascade.predict(self.game, images, self.actor, self._threshold)

    @contextmanager
    def _gradients(self, wanted: bool | None = None) -> Iterator[None]:
        """Record gradients in this context only where they are wanted and the caller records them."""
        wanted = self.training if wanted is None else wanted
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            yield

    @torch.compiler.disable
    def _predict_compiled(self, images: Tensor) -> Tensor:
        """What `torch.compile(fast)` runs: the same game, compiled from decision to decision (see `torch_compile`).

        The compiled kernels leave nothing to compile.
        """
        with self._gradients():
            backend = self.game.backend_for(images)
            if isinstance(backend, CompiledBlocks):
                return cascade.predict(self.game, images, self.actor, self._threshold, backend).logits
            if self._compiled is None:
                self._compiled = CompiledGame(self.game.backbone, self.game.config, self.game.features)
            return cascade.predict(self._compiled, images, self.actor, self._threshold).logits

    def forward_features(self, images: Tensor, fill: Fill = "exit") -> Tensor:
        """timm's `forward_features` on the full grid: [B, channels, height, width] -> [B, prefix + N, C], normed.

        No class is predicted, so no image falls back to all tokens.

        Args:
            images: the batch.
            fill: what stands where a token was pruned: "exit", its last features before it was pruned; "absorber",
                those of the token it was merged into; "zero".

        Raises:
            TokenGameError: "absorber" for a policy that drops tokens.
        """
        return self._grid(images, [self.game.backbone.depth - 1], fill, norm=True)[0]

    def forward_intermediates(
        self, images: Tensor, indices: int | list[int] | None = None, fill: Fill = "exit", norm: bool = False
    ) -> list[Tensor]:
        """Features after some blocks as maps, like timm's `forward_intermediates(..., intermediates_only=True)`.

        Args:
            images: [B, channels, height, width].
            indices: blocks, or how many of the last ones; default is all.
            fill: as in `forward_features`.
            norm: whether to apply the final norm.

        Returns:
            For each block [B, C, rows, columns].

        Raises:
            TokenGameError: "absorber" for a policy that drops tokens.
        """
        backbone = self.game.backbone
        blocks, _ = feature_take_indices(backbone.depth, indices)
        rows, columns = backbone.grid(*images.shape[2:])
        found = self._grid(images, sorted(set(blocks)), fill, norm)
        return [x[:, backbone.prefix :].transpose(1, 2).unflatten(2, (rows, columns)) for x in found]

    def _grid(self, images: Tensor, blocks: list[int], fill: Fill, norm: bool) -> list[Tensor]:
        with self._gradients():
            return grid_features(self.game, self.actor, self._threshold, images, blocks, fill, norm)

    @torch.inference_mode()
    def trace(self, images: Tensor) -> Tensor:
        """[T, B, N] bool: which tokens of [B, channels, height, width] images are left after each stage."""
        thresholds = torch.full((len(images),), self._threshold, device=self.game.backbone.device)
        thresholds[self.predict(images).fallback] = -math.inf
        state, alive = self.game.reset(images), []
        for _ in self.game.stages:
            obs = self.game.observe(state)
            logits = self.actor(obs)
            state = self.game.step(state, logits > thresholds.index_select(0, obs.image), logits)
            alive.append(state.alive)
        return torch.stack(alive)

    def macs(self, output: PrunedOutput) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] of a prediction, policy included."""
        decided, fallback = torch.stack(output.decided).cpu(), output.fallback.cpu()
        macs = pruned_macs(self.game, self.actor, decided, output.total)
        macs[fallback] += fallback_macs(self.game, output.total)
        return native_macs(self.game.backbone, output.total), macs

    def restore(self) -> nn.Module:
        """The wrapped model, as it was."""
        return self.__dict__["_wrapped"]

    def _own_modules(self) -> None:
        """Stop sharing modules with the wrapped model; weights go on sharing memory."""
        if self.model is self.__dict__["_wrapped"]:
            self.model = sharing_copy(self.model)
            self.game, self._compiled = self._new_game(), None

    def train(self, mode: bool = True) -> PrunedViT:
        """Set training or evaluation mode; the wrapped model keeps its own."""
        if any(module.training != mode for module in self.model.modules()):
            self._own_modules()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> PrunedViT:
        """As `nn.Module.requires_grad_`; the wrapped model's parameters keep theirs."""
        self._own_modules()
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; the wrapped model keeps its weights."""
        self.model = copy.deepcopy(self.model)
        self.game, self._compiled = self._new_game(), None
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> PrunedViT:
        self._own_modules()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold one model of their own, and compile anew."""
        return self.__dict__ | {"_compiled": None, "_wrapped": self.model}


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are its own but share memory with the model's."""
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad) if plain else parameter
    return copy.deepcopy(model, memo)


def prune(
    model: nn.Module,
    policy: Policy | str | Path,
    dial: float | None = None,
    *,
    max_drop: float | None = None,
    gmacs: float | None = None,
    gmacs_ratio: float | None = None,
    keep: float | None = None,
) -> PrunedViT:
    """Make a trained Vision Transformer faster.

    Args:
        model: of a supported family (see `tokengame.backbones`); it is wrapped, never changed.
        policy: a policy, the path of a policy file, or the name of a shipped one ("vit_tiny_patch16_224").
        dial: how hard to prune, between 0 and 1; default is the card's recommendation.
        max_drop, gmacs, gmacs_ratio, keep: instead of a dial, a target that it meets by the card's calibration: points
            of top-1 that may be lost (guaranteed at 95 % confidence), GMACs an image, these relative to native, share
            of the tokens left at the end.

    Returns:
        A module with the model's call and output. Warns where the policy was trained for other weights.

    Raises:
        TokenGameError: model not supported, policy damaged or of another architecture, dial out of range, more than
            one target, or one that calibration does not cover.
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(find_policy(policy))
    backbone = wrap(model)
    warning = check_fits(policy, backbone)
    if warning:
        warnings.warn(warning, stacklevel=2)
    targets = {"max_drop": max_drop, "gmacs": gmacs, "gmacs_ratio": gmacs_ratio, "keep": keep}
    if any(target is not None for target in targets.values()):
        if dial is not None:
            raise TokenGameError("give a dial or a target for it, not both")
        dial = dial_for(policy.card, **targets)
    actor = copy.deepcopy(policy.actor).to(backbone.device).requires_grad_(False)
    return PrunedViT(model, Policy(actor, policy.card), policy.card["dial"] if dial is None else dial)


def prune_by(model: nn.Module, game: GameConfig, decide: Decide, features: bool = True) -> PrunedViT:
    """`model` whose tokens are pruned by a rule instead of a learned policy: baselines, benchmarks.

    Args:
        model: of a supported family.
        game: stages and transition.
        decide: observation -> [A] keep logits; above 0 a token is kept.
        features: whether the rule reads observed features; otherwise none are computed.
    """
    card: dict[str, Any] = {"game": asdict(game), "actor": {"observation": "context" if features else "token_id"}}
    return PrunedViT(model, Policy(decide, card), dial=0.5)  # type: ignore[arg-type]
