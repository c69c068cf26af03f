"""Learning a policy: play several games on each image with packed execution, then update by multi-agent PPO."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tokengame import kernels
from tokengame.backbones import wrap
from tokengame.config import TYPICAL_LOSS, TrainConfig, check_without_classes
from tokengame.distributed import Processes
from tokengame.errors import TokenGameError
from tokengame.game import Observation, State, TokenGame
from tokengame.learning.learner import check_labels, fitting, load_optimizer
from tokengame.learning.ppo import Experience, gae, normalise, update
from tokengame.learning.rewards import Outcome, PriceController, fidelity, share, target
from tokengame.learning.rollout import Rollout, initialise_biases, sample_games
from tokengame.measure.kinds import kind_of
from tokengame.policies.networks import ContextActor, Critic, actor_shape, build_actor
from tokengame.runtime.features import grid_of
from tokengame.runtime.macs import native_macs, pruned_macs
from tokengame.runtime.rule import thresholds_for
from tokengame.timing import now


def training_dtype(choice: str, device: torch.device) -> torch.dtype:
    """Resolve "auto": bfloat16 where `accelerate launch --mixed_precision bf16` or the device says so, else float32."""
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "bf16"):
        raise TokenGameError(f"--mixed_precision {wanted} is not supported; use bf16, or leave it out")
    if wanted == "bf16":
        return torch.bfloat16
    fast = device.type in ("cpu", "cuda") and not kernels.why_slow(torch.bfloat16, device.type)
    return torch.bfloat16 if fast else torch.float32


class Trainer:
    """Everything that changes while a policy is learned.

    Args:
        model: of a supported family; games are played on a frozen copy.
        config: settings.
        seed: of weights, actions and minibatches.
        device: to play on.
        processes: those that train together; each takes its part of every batch.

    Raises:
        TokenGameError: unsupported model, one that does not give what is to be kept, settings that need classes of one
            without, or stages outside it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        seed: int = 0,
        device: str = "cpu",
        processes: Processes | None = None,
    ):
        self.config, self.device, self.processes = config, torch.device(device), processes or Processes()
        self.dtype = training_dtype(config.dtype, self.device)
        kernels.announce(self.dtype, self.device.type)
        frozen = copy.deepcopy(model).to(self.device, self.dtype).eval().requires_grad_(False)
        self.backbone = wrap(frozen)
        self.kind = kind_of(self.backbone, config.keep_what)
        if self.kind.scaled:
            check_without_classes(config, self.kind.name)
        self.scale = config.reward.scale if self.kind.scaled else 1.0
        """what a loss is divided by; None before the first update has measured it"""
        context = config.actor.observation == "context"
        self.game = TokenGame(self.backbone, config.game, features=context, keep_patches=self.kind.on_grid)
        self.shape = actor_shape(self.backbone, config.game)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = build_actor(config.actor, self.shape).to(self.device)
            sizes = {k: self.shape[k] for k in ("dim", "heads", "stages")}
            central, agents = config.ppo.critic == "central", self.shape["agents"] if config.ppo.critic_id else None
            self.critic = Critic(
                **sizes, hidden=config.actor.hidden, features=context, central=central, agents=agents
            ).to(self.device)
        steps = ((self.actor, config.ppo.lr), (self.critic, config.ppo.critic_lr or config.ppo.lr))
        groups = [{"params": list(network.parameters()), "initial_lr": lr} for network, lr in steps]
        self.optimizer = torch.optim.Adam(groups, eps=config.ppo.eps)
        self.controller = PriceController.of(config.reward)
        self.controller.weight *= self.kind.price
        self.generator = torch.Generator().manual_seed(seed)
        self.updates = self.images_seen = 0
        self.learned: Tensor | None = None
        """the biases before `calibrate_biases` moved them, from which learning goes on"""

    @property
    def calibrated(self) -> bool:
        """Whether all is learned, `calibrate_biases` included."""
        return self.config.actor.keep is None or self.learned is not None

    @property
    def _biases(self) -> Tensor:
        """[stages] those of a context actor, in place."""
        assert isinstance(self.actor, ContextActor)
        return self.actor.weight.data[:, -1]

    def update(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """One update on [B, channels, height, width] images: rollouts, rewards, PPO.

        Raises:
            TokenGameError: labels that are no classes of the model; the backbone or the reward is not finite, says
                where.
        """
        labels = None if self.kind.scaled else labels  # which only predicted classes are compared with
        check_labels(labels, len(images), self.backbone.classes)
        start, images = now(self.device), images.to(self.device, self.dtype)
        if self.learned is not None:
            self._biases.copy_(self.learned)
            self.learned = None
        if self.updates == 0 and self.config.actor.keep is not None:
            assert isinstance(self.actor, ContextActor)
            initialise_biases(self.game, self.actor, images, self.config.actor.keep, self.processes)
        rollout, outcome, metrics = self.rollout(images, labels)
        played = now(self.device)
        self._anneal()
        experience = self.experience(rollout, outcome)
        metrics |= update(
            self.actor, self.critic, self.optimizer, experience, self.config.ppo, self.generator, self.processes
        )
        metrics = self.processes.mean(metrics)
        if self.config.reward.kind == "fidelity":
            self.controller.update(self._steered(metrics))
        self.updates += 1
        self.images_seen += len(images) * self.processes.size
        end = now(self.device)
        speed = len(images) * self.processes.size * self.config.rollouts / (end - start)
        if "time/native_images_per_second" in metrics:
            metrics["time/throughput_vs_native"] = speed / metrics["time/native_images_per_second"]
        return metrics | {
            "charts/kl_weight": self.controller.weight,
            "charts/learning_rate": self.optimizer.param_groups[0]["lr"],
            "time/rollout": played - start,
            "time/update": end - played,
            "time/images_per_second": speed,
        }

    @torch.no_grad()
    def calibrate_biases(self, batches: Iterable[Tensor]) -> None:
        """Move the biases so that thresholds keep as many tokens at each stage as sampling kept in training.

        Sampling prunes some of the tokens whose probability to be kept is just below 1; a threshold prunes none.
        Without this far fewer tokens would be pruned early than was learned.

        Args:
            batches: [B, channels, height, width] this process's part of each.
        """
        assert isinstance(self.actor, ContextActor)
        found, noise = [], self.generator.get_state()
        for images in batches:
            images = images.to(self.device, self.dtype)
            state = self.game.reset(images)
            kept = torch.stack(sample_games(self.game, state, self.actor, self._noise(state)).final.kept)
            number = self.processes.mean({f"{t:03}": float(n.float().mean()) for t, n in enumerate(kept)})
            shares = [after / before for before, after in pairwise([state.total, *number.values()])]
            found.append(thresholds_for(self.game, self.actor, [self.game.reset(images)], shares, self.processes)[0])
        self.generator.set_state(noise)  # learning may go on as if this had not been
        self.learned = self._biases.clone()
        self._biases.sub_(torch.stack(found).mean(0))

    def _steered(self, metrics: dict[str, float]) -> float:
        """The metric that the controller steers."""
        if self.config.reward.target_drop is None:
            return metrics[f"game/{self.kind.figure}_clamped"]
        if "game/drop_pp" not in metrics:
            raise TokenGameError("reward.target_drop needs labelled images; without labels use reward.target_kl")
        return metrics["game/drop_pp"]

    @torch.no_grad()
    def rollout(self, images: Tensor, labels: Tensor | None) -> tuple[Rollout, Outcome, dict[str, float]]:
        """Play `rollouts` games on each image; the part before the first decision is computed once."""
        rollouts = self.config.rollouts
        native, timed = self._native(images)
        state = self.game.reset(images).repeat(rollouts)
        grid = grid_of(self.game, state) if self.kind.on_grid else None
        rollout = sample_games(self.game, state, self.actor, self._noise(state), grid)
        pruned = (self.game.predict(rollout.final) if grid is None else grid.filled(rollout.final)).float()
        charged, compared = self._compared(native, pruned)
        correct, lost = None, {}
        if labels is not None:
            wanted = labels.to(self.device)
            correct = pruned.argmax(1) == wanted.repeat_interleave(rollouts)
            lost["game/top1"] = float(correct.float().mean())
            if native is not None:
                native_top1 = float((native.argmax(1) == wanted).float().mean())
                lost["game/drop_pp"] = 100 * (native_top1 - lost["game/top1"])
        outcome = Outcome(rollout.alive[:-1], rollout.alive[1:], correct, charged, self._segments(rollout), rollouts)
        kept = torch.stack(rollout.final.kept).cpu()
        macs = pruned_macs(self.game, self.actor, kept, rollout.final.total)
        return (
            rollout,
            outcome,
            {
                **compared,
                "game/gmacs_ratio": float(macs.mean()) / native_macs(self.backbone, rollout.final.total),
                **{f"game/kept_{t}": float(n.float().mean()) / rollout.final.total for t, n in enumerate(kept)},
                **lost,
                **timed,
            },
        )

    def _native(self, images: Tensor) -> tuple[Tensor | None, dict[str, float]]:
        """The native prediction and its speed, in one of `native_every` updates."""
        if self.updates % self.config.reward.native_every:
            return None, {}
        start = now(self.device)
        native = self.kind.native(self.backbone, images).float()
        seconds = now(self.device) - start
        self._require_finite(native, "the native model's prediction")
        return native, {"time/native_images_per_second": len(images) * self.processes.size / seconds}

    def _compared(self, native: Tensor | None, pruned: Tensor) -> tuple[Tensor, dict[str, float]]:
        """[G] what agents pay for the loss of each game, and metrics; zeros where no native prediction was made."""
        if native is None:
            self._require_finite(pruned, "the pruned prediction")
            return torch.zeros(len(pruned), device=pruned.device), {}
        loss = self._loss(native, pruned)
        return self.kind.charge(native, pruned, loss, self.config.reward.temperature), {
            f"game/{self.kind.figure}": float(loss.mean()),
            f"game/{self.kind.figure}_clamped": float(loss.clamp(max=self.config.reward.kl_clamp).mean()),
            **self.kind.metrics(native, pruned),
        }

    def _loss(self, native: Tensor, pruned: Tensor) -> Tensor:
        """[G] losses of games by the kind, scaled; the first games set the scale where none is given."""
        loss = self.kind.loss(native, pruned)
        self._require_finite(loss, f"the loss ({self.kind.figure})")
        if self.scale is None:
            mean = self.processes.mean({"loss": float(loss.mean())})["loss"]
            self.scale = max(mean, 1e-9) / TYPICAL_LOSS
        return loss / self.scale

    def _noise(self, state: State) -> Tensor:
        """[T, B, N] this process's part of the noise for all games, the same whichever process plays one."""
        games = state.layout.images
        shape = (len(self.game.stages), games * self.processes.size, state.total)
        noise = torch.rand(shape, generator=self.generator)[:, games * self.processes.rank :][:, :games]
        return noise.to(self.device)

    def _segments(self, rollout: Rollout) -> Tensor:
        """[T] share of the native compute that one row causes from each decision to the next."""
        backbone, costs = self.backbone, self.backbone.costs(0)
        attention_macs = costs.query + costs.keys_values + costs.output
        attention, keys_values = (macs / (attention_macs + costs.mlp) for macs in (attention_macs, costs.keys_values))
        decisions = [stage + keys_values * self.game.merge for stage in self.game.stages]
        blocks, attended = divmod(self.game.end, 2)
        end, depth = blocks + attention * attended, backbone.depth
        if self.game.end == 2 * depth - 2 and backbone.key_value_weights(depth - 1) is None:
            end += keys_values
        edges = torch.tensor([*decisions, end], device=self.device)
        return edges.diff() / (depth * rollout.final.total)

    def rewards(self, outcome: Outcome) -> Tensor:
        """[T, B, N] by the configured reward."""
        config = self.config.reward
        if config.kind == "fidelity":
            return fidelity(outcome, config, self.controller.weight)
        return {"share": share, "target": target}[config.kind](outcome, config)

    def experience(self, rollout: Rollout, outcome: Outcome) -> Experience:
        """Rewards, values and advantages of all decisions taken, one row each."""
        rewards, rows, shape = self.rewards(outcome), rollout.rows, outcome.acting.shape[1:]
        self._require_finite(rewards, f"reward {self.config.reward.kind!r}")
        values = torch.zeros_like(rewards)
        with torch.no_grad():
            for t, obs in enumerate(rollout.observations):
                values[t] = values[t].view(-1).index_copy(0, rows[t], self.critic(obs)).view(shape)
        ppo = self.config.ppo
        advantages, returns = gae(rewards, values, outcome.acting, outcome.ends, ppo.gamma, ppo.gae_lambda)
        if ppo.normalise:
            advantages = normalise(advantages, outcome.acting, self.processes)

        def flat(dense: Tensor) -> Tensor:
            return torch.cat([dense[t].reshape(-1)[row] for t, row in enumerate(rows)])

        obs = Observation.concat(
            [replace(o, x=o.token.float(), row=None, class_tokens=o.cls.float()) for o in rollout.observations]
        )
        action, log_probs = torch.cat(rollout.action), torch.cat(rollout.log_prob)
        games, agents = shape
        first = [(t * self.processes.size + self.processes.rank) * games * agents for t in range(len(rows))]
        index = torch.cat([row + start for row, start in zip(rows, first, strict=True)])
        possible = len(rows) * self.processes.size * games * agents
        return Experience(obs, action, log_probs, flat(advantages), flat(returns), index, possible, agents)

    def _anneal(self) -> None:
        left = 1.0 if self.config.ppo.sched == "constant" else 1 - self.updates / self.config.updates
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * max(left, 0.0)

    def _require_finite(self, values: Tensor, what: str) -> None:
        if not values.isfinite().all():
            raise TokenGameError(f"{what} is not finite in update {self.updates}; check the weights and the images")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "controller": [self.controller.weight, self.controller.mean],
            "scale": self.scale,
            "updates": self.updates,
            "images_seen": self.images_seen,
            "learned": self.learned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            TokenGameError: it is of other networks, or incomplete.
        """
        with fitting("policy"):
            self.actor.load_state_dict(state["actor"])
            self.critic.load_state_dict(state["critic"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.generator.set_state(state["generator"])
            self.controller.weight, self.controller.mean = map(float, state["controller"])
            self.scale = None if state["scale"] is None else float(state["scale"])
            self.updates, self.images_seen = int(state["updates"]), int(state["images_seen"])
            learned = state["learned"]
            self.learned = None if learned is None else learned.to(self.device).view_as(self._biases)
