"""How far measured accuracies can be trusted, and up to which length a model is of use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist


def wilson_interval(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of an accuracy measured as `correct` of `samples` (Wilson 1927), sound near 0 and 1 and for few."""
    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"{correct} correct of {samples} samples is no measurement")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / samples
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    # At the ends the bounds are exactly 0 and 1; rounding would leave 1e-17.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == samples else centre + half


def paired_comparison(first: Sequence[int] | str, second: Sequence[int] | str) -> dict[str, float]:
    """Two models on the same samples, each 0 or 1 (or a text of these): McNemar's exact test, two-sided.

    Returns:
        only_first and only_second, the samples that one model alone has right; difference, the second's accuracy less
        the first's; p_value, how often two equally good models would differ at least so much.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same samples twice, not {len(first)} and {len(second)}")
    first, second = [int(one) for one in first], [int(one) for one in second]
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return {
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(first),
        "p_value": min(1.0, 2 * tail / 2**differing),
    }


def effective_length(accuracy: Mapping[int, float], threshold: float) -> int:
    """The longest length (tokens) up to which no measured accuracy falls below `threshold`; 0 if the first one does.

    What a model claims and what it keeps are told apart so by RULER (arXiv 2404.06654), at 0.856.
    """
    effective = 0
    for length in sorted(accuracy):
        if accuracy[length] < threshold:
            break
        effective = length
    return effective
