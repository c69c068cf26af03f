"""Risk control: an upper bound of the points of top-1 lost, from a sample of images, exact for any sample size.

An image is lost (native right, pruned wrong), gained, or neither. With p the probabilities of these, a guarantee of at
most `bound` fails where p(lost) - p(gained) > bound. `p_value` tests that hypothesis by exact binomial tails: as a test
of paired proportions, maximised over the unknown probability that an image changes at all, which is first confined to
an interval of its own (Berger & Boos 1994). `policies.policy.certified` then walks from the gentlest dial to harder
ones and stops at the first that cannot be certified, so that choosing among many dials costs nothing: fixed-sequence
testing, as in Learn then Test (Angelopoulos, Bates, Candes, Jordan & Lei 2021, section 2.3). A target chosen after
seeing the bounds is not covered.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, binom

LEVEL = 0.05
"""probability that a guarantee fails"""
CONFINED = 0.001
"""part of it that is spent on confining the probability that an image changes"""


def p_value(lost: int, gained: int, images: int, bound: float) -> float:
    """Of the hypothesis that, over all images, more than a share `bound` is lost net of gains.

    Args:
        lost, gained: images native alone, and the pruned model alone, got right.
        images: how many were measured.
        bound: in [0, 1]; 0.005 is half a point of top-1.
    """
    changed = lost + gained
    low = float(beta.ppf(CONFINED / 2, changed, images - changed + 1)) if changed else 0.0  # Clopper & Pearson 1934
    high = float(beta.ppf(1 - CONFINED / 2, changed + 1, images - changed)) if changed < images else 1.0
    if bound > high:
        return CONFINED  # not even all changes together would exceed the bound
    chance = np.linspace(max(low, bound, 1e-12), high, 65)[:, None]  # that an image changes
    number = np.arange(images + 1)[None] if images < 200 else _plausible(images, float(chance[0, 0]), high)
    among_changed = np.minimum((chance + bound) / (2 * chance), 1.0)  # that a change is a loss, at the boundary
    at_most = np.floor((number + lost - gained) / 2)  # losses among `number` changes, for no more net loss than seen
    tail = (binom.pmf(number, images, chance) * binom.cdf(at_most, number, among_changed)).sum(1)
    return min(1.0, float(tail.max()) + CONFINED)


def _plausible(images: int, low: float, high: float) -> np.ndarray:
    """Numbers of changed images that are not all but impossible (together under 1e-9)."""
    first, last = binom.ppf(5e-10, images, low), binom.ppf(1 - 5e-10, images, high)
    return np.arange(int(max(first, 0)), int(last) + 1)[None]


def upper_bound(lost: int, gained: int, images: int) -> float:
    """The smallest net loss, as a share of images, that is not exceeded at 95 % confidence."""
    low, high = 0.0, 1.0
    if p_value(lost, gained, images, low) <= LEVEL:
        return 0.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(lost, gained, images, middle) <= LEVEL else (middle, high)
    return high
