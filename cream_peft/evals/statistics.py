"""How far measured accuracies can be trusted, and up to which length a model is of use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def wilson_interval(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of an accuracy measured as `correct` of `samples` (Wilson 1927), sound near 0 and 1 and for few."""
    # Half a second, which no other command needs.
    from scipy.stats import binomtest

    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"{correct} correct of {samples} samples is no measurement")
    return tuple(map(float, binomtest(correct, samples).proportion_ci(confidence, method="wilson")))


def paired_comparison(first: Sequence[int] | str, second: Sequence[int] | str) -> dict[str, float]:
    """Two models on the same samples, each 0 or 1 (or a text of these): McNemar's exact test, two-sided.

    Returns:
        only_first and only_second, the samples that one model alone has right; difference, the second's accuracy less
        the first's; p_value, how often two equally good models would differ at least so much.
    """
    from scipy.stats import binomtest

    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same samples twice, not {len(first)} and {len(second)}")
    pairs = [(int(one), int(other)) for one, other in zip(first, second, strict=True)]
    only_first, only_second = pairs.count((1, 0)), pairs.count((0, 1))
    return {
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(pairs),
        "p_value": float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0,
    }


def paired_means(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Two models' losses on the same documents, a number a document: Student's paired t-test, two-sided.

    Returns:
        difference, the mean of the second's less the first's; interval, its bounds; p_value; documents, how many. One
        document has no interval and no p_value: None.
    """
    from scipy.stats import ttest_rel

    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same documents twice, not {len(first)} and {len(second)}")
    difference = sum(second) / len(second) - sum(first) / len(first)
    found = {"difference": difference, "documents": len(first), "interval": None, "p_value": None}
    if len(first) > 1 and list(first) != list(second):
        test = ttest_rel(second, first)
        bounds = tuple(map(float, test.confidence_interval(confidence)))
        found |= {"interval": bounds, "p_value": float(test.pvalue)}
    return found


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
