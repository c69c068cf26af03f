"""The faster model: the game played with a fixed policy, deterministic, tokens physically removed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokengame.runtime.cascade as cascade
from tokengame import kernels
from tokengame.backbones import unwrapped, wrap
from tokengame.backbones.base import Backbone
from tokengame.backbones.calls import Call, check_masks, not_traced
from tokengame.backbones.changes import check_memory
from tokengame.backends import CompiledBlocks
from tokengame.config import GameConfig, KeepWhat
from tokengame.data.given import some_of
from tokengame.errors import TokenGameError, warn
from tokengame.files import silent
from tokengame.game import Decide, TokenGame
from tokengame.packed.attention import fastest_attention
from tokengame.policies.policy import Policy, check_fits, check_keeps, dial_for, find_policy, threshold
from tokengame.progress import progress as shown
from tokengame.runtime.calls import check_call
from tokengame.runtime.cascade import PrunedOutput
from tokengame.runtime.features import Fill, grid_features
from tokengame.runtime.macs import fallback_macs, native_macs, pruned_macs
from tokengame.runtime.native import native_attribute, renamed_groups
from tokengame.runtime.rule import RULE, Rule, most_images
from tokengame.runtime.sharing import Sharing
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
        self.__dict__["_sharing"] = None
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

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the model is called: [B, channels, height, width] images -> the model's own output.

        Features in the output are on the full grid, see `forward_features`.

        Raises:
            TokenGameError: attention masks, tracing and vmap, which a pruned model cannot honour.
        """
        if not isinstance(arguments, tuple):  # torch.fx passes a symbol
            raise TokenGameError(not_traced(f"run on a {type(arguments).__name__}"))
        call = self.game.backbone.read_call(*arguments, **named)
        compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if call.features:
            play = self._with_features_eagerly if compiling else self._with_features
            return call.answer(*play(call.images, list(call.features)))
        if compiling:
            return call.answer(self._predict_compiled(call.images), [])
        return call.answer(self.predict(call.images).logits, [])

    def _with_features(self, images: Tensor, blocks: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The prediction, and features after `blocks` on the full grid, of one game where there is no cascade."""
        features, output = self._play_on_grid(images, blocks, None, norm=False)
        return self.predict(images).logits if self.game.config.cascade_margin else output, features

    _with_features_eagerly = torch.compiler.disable(_with_features)

    def predict(self, images: Tensor, gradients: bool | None = None) -> PrunedOutput:
        """The prediction and which tokens were kept.

        Args:
            images: [B, channels, height, width].
            gradients: whether they are recorded; by default only in training mode.

        Raises:
            TokenGameError: the model has changed and cannot be run exactly any more, or is traced.
        """
        self._check(images)
        with self._gradients(gradients):
            return cascade.predict(self.game, images, self.actor, self._threshold)

    def _check(self, images: Tensor) -> None:
        """Refuse calls that cannot work, and follow changes of the wrapped model."""
        check_call(images, next(self.model.parameters()))
        kernels.announce(self.game.backbone.dtype, images.device.type)
        sharing = self.__dict__["_sharing"]
        if sharing is None and self.model.training != self.training:
            self.train(self.training)  # the wrapped model has another mode now, which is its own
        elif sharing is not None and sharing.outdated:
            self._follow(sharing)

    def _follow(self, sharing: Sharing) -> None:
        """Take over what has changed in the wrapped model, or say once that it cannot be."""
        followed = sharing.follow() if sharing.copy is self.model else None
        if followed is not None:
            self._set_model(followed)
        else:
            warn(
                "the wrapped model has changed, but the pruned one was converted or changed too and keeps its own "
                "parts: prune the model again to take over the change"
            )

    @contextmanager
    def _gradients(self, wanted: bool | None = None) -> Iterator[None]:
        """Record gradients in this context only where they are wanted and the caller records them."""
        wanted = self.training if wanted is None else wanted
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            yield

    @torch.compiler.disable
    def _predict_compiled(self, images: Tensor) -> Tensor:
        """What `torch.compile(fast)` runs: the same game, compiled from decision to decision (see `torch_compile`).

        The compiled kernels leave nothing to compile. Models with rotary or relative positions run eagerly.
        """
        if not len(images):
            return self.predict(images).logits
        self._check(images)
        with self._gradients():
            backend = self.game.backend_for(images)
            if isinstance(backend, CompiledBlocks) or self.game.backbone.positional:
                return cascade.predict(self.game, images, self.actor, self._threshold, backend).logits
            if self._compiled is None:
                self._compiled = CompiledGame(self.game.backbone, self.game.config, self.game.features)
            return cascade.predict(self._compiled, images, self.actor, self._threshold).logits

    def forward_features(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, fill: Fill | None = None
    ) -> Tensor:
        """timm's `forward_features` on the full grid: [B, channels, height, width] -> [B, prefix + N, C], normed.

        No class is predicted, so no image falls back to all tokens.

        Args:
            images: the batch.
            attn_mask, is_causal: refused.
            fill: what stands where a token was pruned: "absorber", the features of the token it was merged into (the
                default where tokens are merged); "exit", its own last features before it was pruned; "zero".

        Raises:
            TokenGameError: "absorber" for a policy that drops tokens.
        """
        check_masks(images, attn_mask, is_causal)
        return self._grid(images, [self.game.backbone.depth - 1], fill, norm=True)[0]

    def forward_intermediates(self, *arguments: Any, fill: Fill | None = None, **named: Any) -> Any:
        """The model's own `forward_intermediates` on the full grid; timm's where it has none.

        Args:
            arguments, named: timm's (x, indices, return_prefix_tokens, norm, stop_early, output_fmt,
                intermediates_only, output_dict), or those of the model's library.
            fill: as in `forward_features`.

        Returns:
            What the model returns: in timm the final features [B, prefix + N, C], normed, and a list of the features
            after each block; in open_clip a dictionary.

        Raises:
            TokenGameError: "absorber" for a policy that drops tokens; unknown format; attention masks.
        """
        return self._answered(self.game.backbone.read_intermediates(*arguments, **named), fill)

    def get_intermediate_layers(
        self, x: Tensor, n: int | list[int] | tuple[int, ...] = 1, reshape: bool = False,
        return_prefix_tokens: bool = False, norm: bool = False, attn_mask: Tensor | None = None, *,
        fill: Fill | None = None,
    ) -> list[Any]:  # fmt: skip
        """timm's and DINO's `get_intermediate_layers` on the full grid; see `forward_intermediates`."""
        call = Backbone.read_intermediates(
            self.game.backbone, x, n if isinstance(n, int) else list(n), return_prefix_tokens, norm, False,
            "NCHW" if reshape else "NLC", True, False, attn_mask,
        )  # fmt: skip
        return self._answered(call, fill)

    def _answered(self, call: Call, fill: Fill | None) -> Any:
        features, output = self._play_on_grid(call.images, list(call.features), fill, norm=False)
        return call.answer(output, features)

    def _grid(self, images: Tensor, blocks: list[int], fill: Fill | None, norm: bool) -> list[Tensor]:
        return self._play_on_grid(images, blocks, fill, norm)[0]

    def _play_on_grid(
        self, images: Tensor, blocks: list[int], fill: Fill | None, norm: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Features after `blocks` on the full grid, and the prediction."""
        self._check(images)
        if self.game.backbone.drops_patches:
            raise TokenGameError(
                "features on the full grid are not defined under patch dropout: call fast.eval() first"
            )
        with self._gradients():
            fill = fill or ("absorber" if self.game.merge else "exit")
            return grid_features(self.game, self.actor, self._threshold, images, blocks, fill, norm)

    def __getattr__(self, name: str) -> Any:
        """What the wrapped model has and a pruned one means alike (see `native`)."""
        if name in ("_modules", "_parameters", "_buffers") or name in self._modules:
            return super().__getattr__(name)
        if "game" not in vars(self):
            raise AttributeError(name)  # while it is made or copied
        interface = self.game.backbone.interface
        if name in interface.changes and hasattr(self.model, name):
            return partial(self._change, name)
        return native_attribute(self.model, name, interface)

    def _change(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method that changes a model; the wrapped model stays as it is."""
        self._own_modules()
        return getattr(self.model, method)(*arguments, **named)

    def no_weight_decay(self) -> set[str]:
        """The model's names of parameters without weight decay, as this module names them; none where it has none."""
        named = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in named()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters for layer-wise step sizes, as this module names them."""
        model: Any = self.model
        return renamed_groups(model.group_matcher(coarse=coarse), "model.")

    def _replicate_for_data_parallel(self) -> Any:
        raise TokenGameError(
            "nn.DataParallel copies modules without their games: use torch.nn.parallel.DistributedDataParallel(fast)"
        )

    def __prepare_scriptable__(self) -> Any:
        raise TokenGameError(not_traced("made a TorchScript program"))

    @torch.inference_mode()
    def trace(self, images: Tensor) -> Tensor:
        """[T, B, N] bool: which tokens of [B, channels, height, width] images are left after each stage."""
        output = self.predict(images)
        if not len(images):
            return output.alive.expand(len(self.game.stages), *output.alive.shape)
        everything = torch.full((len(images),), self._threshold == -math.inf, device=self.game.backbone.device)
        everything[output.fallback] = True
        state, alive = self.game.reset(images), []
        for _ in self.game.stages:
            obs = self.game.observe(state)
            logits = self.actor(obs)
            keep = (logits > self._threshold) | everything.index_select(0, obs.image)
            state = self.game.step(state, keep, logits)
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
        """Stop sharing modules with the wrapped model; weights go on sharing memory.

        Raises:
            TokenGameError: they are sharded by `fully_shard(fast)`, which knows the modules.
        """
        if self.__dict__["_sharing"] is None and self.model is self.restore():
            if hasattr(self, "unshard"):
                raise TokenGameError("set the mode before sharding the pruned model: fully_shard(fast.train())")
            sharing = self.__dict__["_sharing"] = Sharing(self.model)
            self._set_model(sharing.copy)

    def _set_model(self, model: nn.Module) -> None:
        attention, self.model, self._compiled = self.game.attention, model, None
        self.game = self._new_game()
        self.game.attention = attention

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
        self._set_model(copy.deepcopy(self.model))
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> PrunedViT:
        self._own_modules()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold one model of their own, and compile anew."""
        return self.__dict__ | {"_compiled": None, "_wrapped": self.model, "_sharing": None}


def prune(
    model: nn.Module,
    policy: Policy | str | Path | None = None,
    dial: float | None = None,
    *,
    max_drop: float | None = None,
    max_distance: float | None = None,
    gmacs: float | None = None,
    gmacs_ratio: float | None = None,
    keep: float | None = None,
    images: Any = None,
    keep_what: KeepWhat | None = None,
    progress: bool = True,
) -> PrunedViT:
    """Make a trained Vision Transformer faster.

    Args:
        model: of a supported family (see `tokengame.backbones`); it is wrapped, never changed.
        policy: a policy, the path of a policy file, the name of a shipped one ("vit_tiny_patch16_224"), or that of one
            on the Hugging Face hub ("hf:user/name"). Without one, or with "rule", tokens are pruned by the starting
            rule, of which nothing is learned (see `runtime.rule`).
        dial: how hard to prune, between 0 and 1; default is the card's recommendation.
        max_drop, max_distance, gmacs, gmacs_ratio, keep: instead of a dial, a target that it meets by the card's
            calibration: points of top-1 that may be lost, or the mean 1 - cosine of embeddings or features (guaranteed
            at 95 % confidence), GMACs an image, these relative to native, share of the tokens left at the end. The rule
            meets the last three without calibration; default is a gmacs_ratio of 0.7.
        images: for the rule: some images without labels, on which thresholds are set, so that more tokens are kept in
            one image and fewer in another. A tensor [images, channels, height, width], a data set or loader of
            PyTorch, a list of PIL images, or a folder; 256 of them are used, at most.
        keep_what: for the rule: "features" where those of every place are wanted, whose compute is then what is met.
        progress: whether a progress bar is shown while thresholds are set.

    Returns:
        A module with the model's call and output. Warns where the policy was trained for other weights.

    Raises:
        TokenGameError: model not supported, policy damaged or of another architecture, dial out of range, more than
            one target, or one that calibration does not cover; images for a policy that is not the rule.
    """
    targets: dict[str, Any] = {
        "max_drop": max_drop,
        "max_distance": max_distance,
        "gmacs": gmacs,
        "gmacs_ratio": gmacs_ratio,
        "keep": keep,
    }
    aimed = any(target is not None for target in targets.values())
    policy = None if policy == RULE else policy
    if isinstance(policy, (str, Path)):
        policy = Policy.load(find_policy(policy))
    model = unwrapped(model)
    backbone = wrap(model)
    check_memory(model)
    if aimed and dial is not None:
        raise TokenGameError("give a dial or a target for it, not both")
    if policy is None:
        policy, aimed = _rule(model, images, keep_what, progress, targets), False
    elif images is not None or keep_what is not None:
        given = "images=" if images is not None else "keep_what="
        raise TokenGameError(f"{given} is for the starting rule, and a policy has its own: leave out one")
    warning = check_fits(policy, backbone)
    if warning:
        warn(warning)
    check_keeps(policy, backbone, max_drop)
    if aimed:
        dial = dial_for(policy.card, **targets)
    actor = copy.deepcopy(policy.actor).to(backbone.device).requires_grad_(False)
    return PrunedViT(model, Policy(actor, policy.card), policy.card["dial"] if dial is None else dial)


def _rule(model: nn.Module, images: Any, keep_what: KeepWhat | None, progress: bool, targets: dict[str, Any]) -> Policy:
    """The starting rule for `model`, with budgets, or with thresholds that are set on `images`."""
    rule = Rule(wrap(model), keep_what)
    policy = rule.with_budgets(rule.shares_for(**targets))
    if images is None:
        return policy
    in_evaluation_mode = PrunedViT(model, policy, dial=0.5)  # whatever mode the model is in
    rule = Rule(in_evaluation_mode.game.backbone, keep_what)
    batches, number = some_of(images, rule.backbone.preprocessing(), most_images(rule.backbone))
    tensors = (batch.images for batch in batches)
    return rule.with_thresholds(tensors, number, shown if progress else silent, **targets)


def prune_by(model: nn.Module, game: GameConfig, decide: Decide, features: bool = True) -> PrunedViT:
    """`model` whose tokens are pruned by a rule instead of a learned policy: baselines, benchmarks.

    Args:
        model: of a supported family.
        game: stages and transition.
        decide: observation -> [A] keep logits; above 0 a token is kept.
        features: whether the rule reads observed features; otherwise none are computed.
    """
    card: dict[str, Any] = {"game": asdict(game), "actor": {"observation": "context" if features else "token_id"}}
    return PrunedViT(unwrapped(model), Policy(decide, card), dial=0.5)  # type: ignore[arg-type]
