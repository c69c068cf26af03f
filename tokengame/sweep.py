"""How many tokens the reward `share` lets live, and how many it should: the paper's Figure 3.

Each survivor of a stage earns alpha * [correct] / n and pays beta, n being how many survive. While a token earns more
than it pays, one more can live; so in equilibrium n = alpha * p(correct) / beta (section 3 of the paper), at most all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokengame.evaluate import Scores

SETTLED = (0.9, 1.1)
"""what staying earns, relative to what it costs, where nobody has reason to act otherwise"""
COLLAPSED = 0.05
"""below this share of the tokens, and this share of its cost earned, is the other equilibrium: nobody stays"""


def equilibrium(alpha: float, beta: float, correct: float, tokens: int) -> float:
    """Tokens that can live of the reward where a share `correct` of the predictions is right."""
    return min(float(tokens), alpha * correct / beta)


def sweep_row(alpha: float, beta: float, scores: Scores, sampled: list[dict[str, float]]) -> dict[str, Any]:
    """One point of the sweep.

    Args:
        alpha, beta: of the reward.
        scores: of the learned policy on held-back images, deterministic.
        sampled: metrics of the last updates, actions drawn as the policy draws them.

    Returns:
        alpha_over_beta; keep and keep_sampled (share of the tokens alive at the end), keep_predicted (equilibrium at
        the p(correct) of the sampled games), earned (what a survivor of the last stage earns, relative to beta,
        mean over images), reading (a sentence), and the keys of `eval`.
    """
    summary = scores.summary()
    last = f"game/kept_{len(scores.kept[0]) - 1}"
    kept, correct = (float(np.mean([line[name] for line in sampled])) for name in (last, "game/top1"))
    survivors = np.asarray(scores.kept)[:, -1]
    earned = float(np.mean(alpha * np.asarray(scores.correct_pruned) / survivors)) / beta
    row = {
        "alpha_over_beta": alpha / beta,
        "keep": summary["tokens_kept"][-1] / scores.tokens,
        "keep_sampled": kept,
        "keep_predicted": equilibrium(alpha, beta, correct, scores.tokens) / scores.tokens,
        "earned": earned,
    }
    return row | {"reading": reading(row)} | summary


def reading(row: dict[str, Any]) -> str:
    """Why as many tokens stayed as did."""
    if row["keep_predicted"] == 1:
        return "all tokens can live of the reward" + (
            "" if row["keep"] > 0.9 else ", and it has not taught them so yet"
        )
    if max(row["earned"], row["keep"]) < COLLAPSED:
        return "collapsed: of so few tokens hardly a prediction is right, so staying earns nothing and all leave"
    if SETTLED[0] <= row["earned"] <= SETTLED[1]:
        return "in equilibrium: staying earns what it costs"
    if abs(row["keep"] - row["keep_predicted"]) < 0.02:
        return "as predicted on average; images differ, and a token cannot see whether its image will be right"
    earns = f"staying earns {row['earned']:.2f} times its cost"
    if row["earned"] > 1:
        return f"{earns}: more could live; those who left cannot return, and learning may not have ended"
    return f"{earns}: some should leave, so learning has not ended"
