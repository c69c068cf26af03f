"""The faster model: the game played with a fixed policy, deterministic, tokens physically removed."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from tokengame import kernels, looks
from tokengame.attention import fastest_attention
from tokengame.backbone import Backbone
from tokengame.compiled import CompiledGame
from tokengame.config import GameConfig
from tokengame.errors import TokenGameError
from tokengame.game import TokenGame
from tokengame.grid import Fill, grid_features
from tokengame.looks import Played
from tokengame.macs import native_macs, pruned_macs, second_look_macs
from tokengame.policy import Policy, check_fits, dial_for, threshold
from tokengame.state import Decide
from tokengame.weights import weights_of


class PrunedViT(nn.Module):
    """A timm ViT that plays the token game on every image. Same call and same output as the model it wraps.

    `dial` may be set at any time: 0 keeps every token (the native prediction), 0.5 is the policy's own choice, higher
    prunes more. `restore` gives the model back; it was never changed.
    """

    def __init__(self, model: nn.Module, policy: Policy, dial: float):
        super().__init__()
        self.model, self.actor, self.card = model, policy.actor, policy.card
        backbone = Backbone(model, fastest_attention)
        self.game = TokenGame(backbone, policy.game, policy.card["actor"]["observation"] == "context")
        self._was_training = model.training
        self._compiled: TokenGame | None = None
        self.dial = dial
        self.eval()

    @property
    def dial(self) -> float:
        """Between 0 (keep all tokens) and 1 (prune most)."""
        return self._dial

    @dial.setter
    def dial(self, value: float) -> None:
        self._threshold = threshold(value)
        self._dial = value

    def play(self, images: Tensor) -> Played:
        """The whole game on [B, channels, height, width]: who stayed, and the prediction."""
        return looks.play(self.game, images, self.actor, self._threshold)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, height, width] -> the model's own output [B, classes]."""
        if not len(images):
            return self.model(images)
        if torch.compiler.is_compiling():
            return self._play_compiled(images)
        return self.play(images).prediction

    def logits(self, played: Played) -> Tensor:
        """[B, classes] the prediction at the end of a game."""
        return played.prediction

    @torch.compiler.disable
    def _play_compiled(self, images: Tensor) -> Tensor:
        """What `torch.compile(fast)` runs: the same game, compiled from decision to decision (see `compiled`).

        Our own kernels leave nothing to compile.
        """
        if kernels.take(images) and weights_of(self.model) is not None:
            return self.play(images).prediction
        if self._compiled is None:
            self._compiled = CompiledGame(self.game.backbone, self.game.config, self.game.features)
        return looks.play(self._compiled, images, self.actor, self._threshold).prediction

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile anew."""
        return self.__dict__ | {"_compiled": None}

    def forward_features(self, images: Tensor, fill: Fill = "exit") -> Tensor:
        """timm's `forward_features` on the full grid: [B, channels, height, width] -> [B, prefix + N, C], normed.

        Nobody predicts anything here: features, and all maps, are those of the first look.

        Args:
            images: the batch.
            fill: what stands where a token was pruned: "exit", its last features before it left; "absorber", those of
                the token it was merged into; "zero".

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
        rows, columns = backbone.model.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
        found = self._grid(images, sorted(set(blocks)), fill, norm)
        return [x[:, backbone.prefix :].transpose(1, 2).unflatten(2, (rows, columns)) for x in found]

    def _grid(self, images: Tensor, blocks: list[int], fill: Fill, norm: bool) -> list[Tensor]:
        return grid_features(self.model, self.game.config, self.actor, self._threshold, images, blocks, fill, norm)

    @torch.inference_mode()
    def trace(self, images: Tensor) -> Tensor:
        """[T, B, N] bool: which tokens of [B, channels, height, width] images are alive after each stage, at the last
        look."""
        thresholds = torch.full((len(images),), self._threshold, device=self.game.backbone.device)
        thresholds[self.play(images).again] = -math.inf
        state, alive = self.game.reset(images), []
        for _ in self.game.stages:
            obs = self.game.observe(state)
            logits = self.actor(obs)
            state = self.game.step(state, logits > thresholds.index_select(0, obs.scene), logits)
            alive.append(state.alive)
        return torch.stack(alive)

    def macs(self, played: Played) -> tuple[float, Tensor]:
        """Multiply-accumulates of an image natively, and of each image [B] as it was played, policy included."""
        first, again = torch.stack(played.first).cpu(), played.again.cpu()
        macs = pruned_macs(self.game, self.actor, first, played.total)
        macs[again] += second_look_macs(self.game, played.total)
        return native_macs(self.game.backbone, played.total), macs

    def restore(self) -> nn.Module:
        """The original model, untouched, in the mode (training or evaluation) it came in."""
        return self.model.train(self._was_training)


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
        model: a plain timm VisionTransformer (see `backbone.check_supported`); it is wrapped, never changed.
        policy: a policy, the path of a policy file, or the name of a shipped one ("vit_tiny_patch16_224").
        dial: how hard to prune, between 0 and 1; default is the card's recommendation.
        max_drop, gmacs, gmacs_ratio, keep: instead of a dial, what is wanted of it, by the card's calibration: points
            of top-1 that may be lost (a 95 % promise), GMACs an image, these relative to native, share of the tokens
            alive at the end.

    Returns:
        A module with the model's call and output. Warns where the policy was trained for other weights.

    Raises:
        TokenGameError: model not supported, policy damaged or of another architecture, dial out of range, more than
            one wish, or one that calibration does not cover.
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(find_policy(policy))
    backbone = Backbone(model)
    warning = check_fits(policy, backbone)
    if warning:
        warnings.warn(warning, stacklevel=2)
    wishes = {"max_drop": max_drop, "gmacs": gmacs, "gmacs_ratio": gmacs_ratio, "keep": keep}
    if any(wish is not None for wish in wishes.values()):
        if dial is not None:
            raise TokenGameError("give a dial or what is wanted of it, not both")
        dial = dial_for(policy.card, **wishes)
    policy.actor.to(backbone.device)
    return PrunedViT(model, policy, policy.card["dial"] if dial is None else dial)


def by_rule(model: nn.Module, game: GameConfig, rule: Decide, features: bool = True) -> PrunedViT:
    """`model` whose tokens decide by `rule` instead of by a learned policy: baselines, benchmarks.

    Without `features` nothing is computed of attention, similarity and the like, for rules that do not look at them.
    """
    card: dict[str, Any] = {"game": asdict(game), "actor": {"observation": "context" if features else "token_id"}}
    return PrunedViT(model, Policy(rule, card), dial=0.5)  # type: ignore[arg-type]


SHIPPED = Path(__file__).parent / "policies"


def find_policy(name: str | Path) -> Path:
    """Path of a policy file, or of the shipped policy called `name`."""
    shipped = SHIPPED / f"{name}.safetensors"
    if Path(name).is_file() or not shipped.is_file():
        if not Path(name).is_file() and "/" not in str(name) and not str(name).endswith(".safetensors"):
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
            raise TokenGameError(f"no policy file {name}, and none of that name is shipped (shipped: {names})")
        return Path(name)
    return shipped
