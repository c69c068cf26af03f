"""Risk control: bounds of what is lost over all images, from a sample of them, valid for any sample size.

`upper_bound` and `interval` are of the points of top-1 lost, `mean_bound` of the mean of any loss between 0 and 1.

An image is lost (native right, pruned wrong), gained, or neither. With p the probabilities of these, a guarantee of at
most `bound` fails where p(lost) - p(gained) > bound. `p_value` tests that hypothesis exactly: as a test of paired
proportions, maximised over the unknown probability that an image changes at all, which is first confined to an interval
of its own (Berger & Boos 1994). `policies.policy.certified` then walks from the gentlest dial to harder ones and stops
at the first that cannot be certified, so that choosing among many dials costs nothing: fixed-sequence testing, as in
Learn then Test (Angelopoulos, Bates, Candes, Jordan & Lei 2021, section 2.3). A target chosen after seeing the bounds
is not covered. `interval` inverts the same test on both sides.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta

MOST_AT_STAKE = 0.9
"""share of the capital that `mean_bound` stakes on one image at most"""
LEVEL = 0.05
"""probability that a guarantee fails, and that an interval misses"""
CONFINED = 0.001
"""part of it that is spent on confining the probability that an image changes"""


def p_value(lost: int, gained: int, images: int, bound: float) -> float:
    """Of the hypothesis that, over all images, more than a share `bound` is lost net of gains.

    Args:
        lost, gained: images native alone, and the pruned model alone, got right.
        images: how many were measured.
        bound: in [-1, 1]; 0.005 is half a point of top-1, below 0 is a gain.
    """
    changed = lost + gained
    low = float(beta.ppf(CONFINED / 2, changed, images - changed + 1)) if changed else 0.0  # Clopper & Pearson 1934
    high = float(beta.ppf(1 - CONFINED / 2, changed + 1, images - changed)) if changed < images else 1.0
    if bound > high:
        return CONFINED  # not even all changes together would exceed the bound
    chance = np.linspace(max(low, bound, 1e-12), high, 65)  # that an image changes
    net = np.maximum(bound, -chance)  # the boundary; where few images change, all of them may be gains
    return min(1.0, float(_at_most(lost - gained, images, chance, net).max()) + CONFINED)


def _at_most(number: int, images: int, chance: np.ndarray, net: np.ndarray) -> np.ndarray:
    """[k] probabilities that at most `number` more images are lost than gained.

    The difference is a sum over images of 1, 0 and -1, so its distribution is the Fourier transform of the power of
    their characteristic function, here summed over `size` values around its mean: over 8 deviations on either side.

    Args:
        number, images: as measured.
        chance: [k] that an image changes.
        net: [k] that it is lost, less that it is gained.
    """
    reach = int(min(8.5 * np.sqrt(images * chance.max()) + 40, 2 * images))  # twice: the mean may be at either end
    size, centre = 2 * reach + 1, np.round(images * net)
    terms = np.clip(number - centre + reach + 1, 0, size)  # [k] values around the mean that are at most `number`
    angle = 2 * np.pi * np.arange(1, reach + 1) / size
    real, imaginary = 1 - chance[:, None] * (1 - np.cos(angle)), net[:, None] * np.sin(angle)
    matter = images / 2 * np.log((real**2 + imaginary**2).max(0)) > -40  # of the others the power vanishes
    angle = angle[matter]
    power = (real[:, matter] + 1j * imaginary[:, matter]) ** images
    shift = np.exp(1j * angle * (reach - centre[:, None]))
    summed = (1 - np.exp(-1j * angle * terms[:, None])) / (1 - np.exp(-1j * angle))  # of a geometric series
    return (terms + 2 * (power * shift * summed).real.sum(1)) / size


def upper_bound(lost: int, gained: int, images: int) -> float:
    """The smallest net loss, as a share of images, that is not exceeded at 95 % confidence."""
    low, high = 0.0, 1.0
    if p_value(lost, gained, images, low) <= LEVEL:
        return 0.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(lost, gained, images, middle) <= LEVEL else (middle, high)
    return high


def interval(lost: int, gained: int, images: int) -> tuple[float, float]:
    """The net loss over all images, as a share of them: 95 % confidence, 2.5 % on either side, however few they are."""
    return -_limit(gained, lost, images), _limit(lost, gained, images)


def _limit(lost: int, gained: int, images: int) -> float:
    """The smallest net loss that is not exceeded at 97.5 % confidence; below 0 it is a gain."""

    def excess(bound: float) -> float:
        return p_value(lost, gained, images, bound) - LEVEL / 2

    measured = (lost - gained) / images
    far = measured + (4 * (lost + gained) ** 0.5 + 12) / images  # beyond the limit, by any approximation
    if far > 1 or excess(far) > 0:
        far = 1.0
    return brentq(excess, measured, far, xtol=1e-6) if excess(far) < 0 else 1.0


def mean_bound(losses: np.ndarray) -> float:
    """The mean loss over all images that is not exceeded at 95 % confidence, from independent losses between 0 and 1.

    A gambler who stakes, image after image, on the loss being less than a mean m can hardly multiply the capital by 20
    if the mean is m or more (Ville's inequality): the bound is the least m at which that happens. It is one side of the
    hedged capital process of Waudby-Smith & Ramdas (2024), with their predictable plug-in stakes, which depend on the
    losses before. The order is shuffled, since images may come sorted.
    """
    losses = np.random.default_rng(0).permutation(np.asarray(losses, np.float64))
    count = np.arange(1, len(losses) + 1)
    mean = (0.5 + losses.cumsum()) / (count + 1)
    variance = (0.25 + ((losses - mean) ** 2).cumsum()) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    stakes = np.sqrt(2 * np.log(1 / LEVEL) / (len(losses) * before))

    def excess(bound: float) -> float:
        """How far the logarithm of the capital comes above what refutes the mean `bound`."""
        most = MOST_AT_STAKE / max(1 - bound, 1e-12)
        return np.log1p(np.minimum(stakes, most) * (bound - losses)).cumsum().max() + np.log(LEVEL)

    return 1.0 if excess(1.0) < 0 else float(brentq(excess, 0.0, 1.0, xtol=1e-7))
