"""How many tokens the reward `share` keeps, and how many it should: the paper's Figure 3.

Each of the n tokens kept at a stage earns alpha * [correct] / n and pays beta. While a token earns more than it pays,
one more can be kept; so in equilibrium n = alpha * p(correct) / beta (section 3 of the paper), at most all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokengame.measure.scores import Scores

EQUILIBRIUM = (0.9, 1.1)
"""earnings of a kept token, relative to its cost, at which no token gains by acting otherwise"""
COLLAPSED = 0.05
"""below this share of the tokens, and this share of the cost earned, is the other equilibrium: no token is kept"""


def equilibrium(alpha: float, beta: float, correct: float, tokens: int) -> float:
    """Tokens that the reward pays for where a share `correct` of the predictions is right."""
    return min(float(tokens), alpha * correct / beta)


def sweep_row(alpha: float, beta: float, scores: Scores, sampled: list[dict[str, float]]) -> dict[str, Any]:
    """One point of the sweep.

    Args:
        alpha, beta: of the reward.
        scores: of the learned policy on held-back images, deterministic.
        sampled: metrics of the last updates, actions drawn as the policy draws them.

    Returns:
        alpha_over_beta; keep and keep_sampled (share of the tokens left at the end), keep_predicted (equilibrium at the
        p(correct) of the sampled games), earned (earnings of a token kept at the last stage, relative to beta, mean
        over images), reading (a sentence), and the keys of `eval`.
    """
    summary = scores.summary()
    last = f"game/kept_{len(scores.kept[0]) - 1}"
    kept, correct = (float(np.mean([line[name] for line in sampled])) for name in (last, "game/top1"))
    left = np.asarray(scores.kept)[:, -1]
    earned = float(np.mean(alpha * np.asarray(scores.correct_pruned) / left)) / beta
    row = {
        "alpha_over_beta": alpha / beta,
        "keep": summary["tokens_kept"][-1] / scores.tokens,
        "keep_sampled": kept,
        "keep_predicted": equilibrium(alpha, beta, correct, scores.tokens) / scores.tokens,
        "earned": earned,
    }
    return row | {"reading": reading(row)} | summary


def reading(row: dict[str, Any]) -> str:
    """A sentence on why so many tokens were kept."""
    if row["keep_predicted"] == 1:
        return "the reward pays for all tokens" + (
            "" if row["keep"] > 0.9 else ", and the policy has not learned so yet"
        )
    if max(row["earned"], row["keep"]) < COLLAPSED:
        return "collapsed: with so few tokens hardly a prediction is right, so keeping a token earns nothing"
    if EQUILIBRIUM[0] <= row["earned"] <= EQUILIBRIUM[1]:
        return "in equilibrium: a kept token earns what it costs"
    if abs(row["keep"] - row["keep_predicted"]) < 0.02:
        return "as predicted on average; images differ, and a token cannot see whether its image will be right"
    earns = f"a kept token earns {row['earned']:.2f} times its cost"
    if row["earned"] > 1:
        return f"{earns}: more could be kept; pruning is final, and learning may not have ended"
    return f"{earns}: more should be pruned, so learning has not ended"
