"""Does the top of one query's ranking stand out from the bulk of the same query's scores?

Every ranking has a top, also one of pure noise. The null here is the method's own: the bulk of a query's scores, taken
as normal with the median as its centre and the scaled median absolute deviation as its spread, which a few high scores
do not move. The highest score stands out where its robust z is above what the highest of N such scores reaches in 95 %
of cases.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
MIN_IMAGES = 20
"""Fewer scores have no bulk to speak of."""
QUARTILE = float(stats.norm.ppf(0.75))
"""Median absolute deviation over standard deviation of a normal law, 1 / 1.4826."""
MAD_EFFICIENCY = 8 * (QUARTILE * float(stats.norm.pdf(QUARTILE))) ** 2
"""Variance of a normal sample's standard deviation, 1/(2N), over that of its scaled median absolute deviation,
1/(16 N q^2 phi(q)^2) with q the quartile, N large: 0.3675."""


@dataclass(frozen=True)
class StandingOut:
    """Whether the highest score of a query stands out.

    z: (highest score - median) / (1.4826 median absolute deviation); None where half of the scores or more are equal,
        so that they have no spread, or where there are fewer than ``MIN_IMAGES``.
    threshold: what z has to exceed; None with z.
    stands_out: z > threshold; False where there is no z: nothing is claimed then.
    """

    z: float | None
    threshold: float | None
    stands_out: bool


def standing_out(scores: ArrayLike) -> StandingOut:
    """Whether the highest of one query's scores stands out from their bulk.

    Of queries with normal scores one in twenty stands out by chance, fewer where N is small (2 % at N = 20); with
    uniform scores, 2 in a thousand at N = 20 and hardly any from N = 50 on. Over many queries of a method
    that knows nothing up to one in twenty has to be expected.

    It is necessary, not sufficient. A law with heavier tails than the normal passes without any image being a cause:
    Student's t with three degrees of freedom nearly always from a few hundred images on, and so do skewed scores. A top
    that stands out may be an image that is always at the top (``evaluation=overlap`` tells), and one that does not may
    hold causes all the same, as where many images share the influence. Whether an image is a cause, only a retraining
    without it says.

    Args:
        scores: of one query, higher is more influential; [N], finite.
    Raises:
        ValueError: not one row of finite numbers.
    """
    score = np.asarray(scores, dtype=np.float64)
    if score.ndim != 1 or not np.isfinite(score).all():
        raise ValueError(f"scores of shape {score.shape}; expected [N], all finite")
    if len(score) < MIN_IMAGES:
        return StandingOut(None, None, False)
    centre = np.median(score)
    spread = np.median(np.abs(score - centre)) / QUARTILE
    if not spread > 0:
        return StandingOut(None, None, False)
    z, threshold = float((score.max() - centre) / spread), largest_z(len(score))
    return StandingOut(z, threshold, z > threshold)


def largest_z(num_images: int, confidence: float = CONFIDENCE) -> float:
    """What the largest robust z of N normal scores stays below in ``confidence`` of cases, or a little more often.

    F^-1(confidence^(1/N)) sqrt(1 + pi/(2N)). For large N, F is the normal law, and this the quantile of the maximum of
    N independent standard normal values. For small N centre and spread are uncertain themselves, and a normal quantile
    would be passed by 15 % of normal samples of 20: hence Student's t with as many degrees of freedom as a standard
    deviation of the same precision has, 0.3675 (N - 1), and the variance of the median, pi/(2N).

    Args:
        num_images: N >= 2.
        confidence: in (0, 1).
    """
    each = confidence ** (1 / num_images)
    quantile = stats.t.ppf(each, MAD_EFFICIENCY * (num_images - 1))
    return float(quantile) * math.sqrt(1 + math.pi / (2 * num_images))
