"""Position strategies: which tokens of a document are fed, and which positions of the long context they are given.

A strategy is called as `strategy(num_tokens, context_length, target_length, rng, **options)` and returns
`(token_indices, position_ids)`, two int64 arrays of shape (min(num_tokens, context_length),), strictly increasing.
All lengths are in tokens. Under the equations: N window, L target, n document, h head, m middle, t tail, f = L / N.
"""

import inspect
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plugins import PluginError, add

Draw = tuple[NDArray[np.int64], NDArray[np.int64]]

GRID_POINTS = 1000
# The published sigma, 3, was tuned at a factor of 8; as a share of the factor the Gaussian keeps its shape.
SIGMA_PER_FACTOR = 3 / 8


def cream(
    num_tokens: int,
    context_length: int,
    target_length: int,
    rng: np.random.Generator,
    sigma: float | None = None,
) -> Draw:
    """Head at the start, tail at the end, middle drawn around the centre of the long context (arXiv 2406.07138).

    Args:
        num_tokens: tokens of the document; fewer than `context_length` shrink the three segments with it.
        context_length: tokens fed, the window.
        target_length: the length to reach; positions lie in 0..target_length - 1.
        rng: from `generator`.
        sigma: width of the distribution of the middle's place, in half windows (of the tokens fed; f is target_length /
            min(num_tokens, context_length)). None is 3 f / 8, truncated to what fits and renormalised: the same shape
            at any factor, but distances just above the window and just below the target become rare as f grows. A
            number is the authors', who found 3 best at f = 8: what the Gaussian puts outside goes to the two ends,
            where the middle touches head or tail. With 3 f / 8 these are 2 % of the draws at f = 8, half of them at
            f = 2. inf is a middle that ends anywhere alike: of the three it trains the rarest distances most, and the
            centre no more than the rest.

    Returns:
        Token indices and position ids. Positions begin at 0 and, with two tokens or more, end at target_length - 1.

    Raises:
        ValueError: a length below 1, target_length below context_length, or a sigma that is not above 0.
    """
    n, window, L = _checked_lengths(num_tokens, context_length, target_length)
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma={sigma} must be above 0 (half windows; inf is a uniform middle)")
    N = min(n, window)
    factor = L / N

    # "Relativity" makes three equal parts; "continuity" keeps the ends short, so that the middle is nearly the window.
    third = max(1, N // 3)
    h = third if rng.random() < 0.5 else min(4 * L // N, third)
    # Below three tokens there is no middle, and a single token is all head.
    t = min(h, N - h)
    m = N - h - t

    if sigma == math.inf:
        first_end, last_end = N - t - 1, L - t - 1
    else:
        alpha = _draw_half_windows(factor, sigma, rng)
        # alpha >= 2 makes the interval never empty, alpha <= 2 f keeps it before the tail.
        first_end, last_end = int(h + (m - 1) * alpha // 2), int(alpha * N // 2) - t - 1
    middle_end = int(rng.integers(first_end, last_end, endpoint=True))

    # A middle that would reach into the tail's tokens, or beyond the document, takes those just before the tail.
    last_middle_token = min(middle_end, n - t - 1)
    return _three_runs(N, h, t, last_middle_token, n), _three_runs(N, h, t, middle_end, L)


def pose(num_tokens: int, context_length: int, target_length: int, rng: np.random.Generator, chunks: int = 2) -> Draw:
    """PoSE: chunks with a random skip before each but the first (arXiv 2309.10400).

    With two, as published, the first r tokens keep positions 0..r-1, r at most half of what is fed; the rest is a
    chunk from further on in the document, its positions raised by a skip of 0..target_length - (tokens fed). Of more
    chunks each takes at most its share of the tokens that are left, the last one the rest, and each is raised by at
    least as much as the one before it.

    Raises:
        ValueError: a length below 1, target_length below context_length, or fewer than two chunks.
    """
    n, window, L = _checked_lengths(num_tokens, context_length, target_length)
    if chunks < 2:
        raise ValueError(f"chunks={chunks} must be at least 2: position_strategy=contiguous has one")
    N = min(n, window)
    chunks = min(chunks, N)
    lengths: list[int] = []
    for left in range(chunks, 1, -1):
        lengths.append(int(rng.integers(1, (N - sum(lengths) + left - 1) // left, endpoint=True)))
    lengths.append(N - sum(lengths))

    def raised(most: int) -> NDArray[np.int64]:
        shifts = [0]
        for _ in lengths[1:]:
            shifts.append(int(rng.integers(shifts[-1], most, endpoint=True)))
        return np.arange(N, dtype=np.int64) + np.repeat(shifts, lengths)

    position_ids = raised(L - N)
    return raised(min(n, L) - N), position_ids


def randpos(num_tokens: int, context_length: int, target_length: int, rng: np.random.Generator) -> Draw:
    """Randomised positions: a sorted sample of 0..target_length - 1 for the first tokens (arXiv 2305.16843).

    Raises:
        ValueError: a length below 1, or target_length below context_length.
    """
    n, window, L = _checked_lengths(num_tokens, context_length, target_length)
    N = min(n, window)
    sample = rng.choice(L, size=N, replace=False, shuffle=False)
    return np.arange(N, dtype=np.int64), np.sort(sample).astype(np.int64, copy=False)


def segments(
    num_tokens: int, context_length: int, target_length: int, rng: np.random.Generator, segment_length: int = 32
) -> Draw:
    """Short segments of the first tokens, the positions that are skipped shared out between them (arXiv 2409.00509).

    LongRecipe cuts at the ends of sentences. Here a cut follows each token with probability 1 / segment_length, which
    is the mean number of tokens between cuts; 1 is RandPos that begins at 0. The first segment begins at 0, and every
    way to share out the skipped positions, before each other segment and after the last, is as likely.

    Raises:
        ValueError: a length below 1, target_length below context_length, or a segment_length below 1.
    """
    n, window, L = _checked_lengths(num_tokens, context_length, target_length)
    if segment_length < 1:
        raise ValueError(f"segment_length={segment_length} must be at least 1 token")
    N = min(n, window)
    segment_of = np.concatenate([[0], np.cumsum(rng.random(N - 1) < 1 / segment_length)])
    cuts = int(segment_of[-1])
    # Sorted places of the cuts among themselves and the skipped positions: what precedes a cut has been skipped.
    places = np.sort(rng.choice(L - N + cuts, size=cuts, replace=False, shuffle=False))
    skipped = np.concatenate([[0], places - np.arange(cuts)])
    return np.arange(N, dtype=np.int64), np.arange(N, dtype=np.int64) + skipped[segment_of]


def contiguous(num_tokens: int, context_length: int, target_length: int, rng: np.random.Generator) -> Draw:
    """Plain fine-tuning: the first tokens at their own positions. With context_length = target_length, full length.

    Raises:
        ValueError: a length below 1, or target_length below context_length.
    """
    n, window, _ = _checked_lengths(num_tokens, context_length, target_length)
    N = min(n, window)
    return np.arange(N, dtype=np.int64), np.arange(N, dtype=np.int64)


POSITION_STRATEGIES: dict[str, Callable[..., Draw]] = {
    "cream": cream,
    "pose": pose,
    "randpos": randpos,
    "segments": segments,
    "contiguous": contiguous,
}
"""Name -> strategy; `register_strategy` adds to it."""

CHECKED_LENGTHS = ((1, 1, 1), (64, 64, 64), (3, 64, 640), (200, 64, 640), (2000, 64, 640))
"""num_tokens, context_length and target_length at which a strategy is tried when it is registered."""


def register_strategy(name: str, strategy: Callable[..., Draw]) -> None:
    """Make `position_strategy: name` draw with a function of your own.

    Its options are its arguments with a default; `position_strategy_kwargs` sets them.

    Raises:
        PluginError: a name that is taken, or draws that are not what the head of this module says.
    """
    add(POSITION_STRATEGIES, "position strategy", name, strategy, strategy)
    try:
        for row, lengths in enumerate(CHECKED_LENGTHS):
            draws = [strategy(*lengths, generator(0, 0, row)) for _ in range(2)]
            if wrong := _wrong_with(*draws, *lengths):
                raise PluginError(f"position strategy {name!r} called with {lengths}: {wrong}")
    except Exception:
        del POSITION_STRATEGIES[name]
        raise


def _wrong_with(draw: Draw, again: Draw, num_tokens: int, context_length: int, target_length: int) -> str | None:
    """What is wrong with two draws of one generator; None if nothing is."""
    size = min(num_tokens, context_length)
    for what, numbers, end in zip(("token indices", "position ids"), draw, (num_tokens, target_length), strict=True):
        found = np.asarray(numbers)
        if found.shape != (size,) or not np.issubdtype(found.dtype, np.integer):
            return f"{what} are {found.dtype} of shape {found.shape}, and must be integers of shape {(size,)}"
        if found[0] < 0 or found[-1] >= end or (np.diff(found) < 1).any():
            return f"{what} must rise strictly within 0..{end - 1}, and are {found[0]}..{found[-1]}"
    if not all(np.array_equal(one, other) for one, other in zip(draw, again, strict=True)):
        return "two draws of one generator differ: take all random numbers from rng"
    return None


def options_of(strategy: str) -> dict[str, Any]:
    """The options that a strategy takes beside lengths and random numbers, and their defaults."""
    parameters = inspect.signature(POSITION_STRATEGIES[strategy]).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The random numbers of one example in one epoch: a pure function of three non-negative integers.

    Nothing else enters, so workers, ranks and restarts draw alike.

    Raises:
        ValueError: a negative argument.
        TypeError: an argument that is not an integer.
    """
    return np.random.default_rng([operator.index(number) for number in (seed, epoch, row)])


def _checked_lengths(num_tokens: int, context_length: int, target_length: int) -> tuple[int, int, int]:
    # Python's integers, since a caller's int32 scalars would overflow in the products below.
    num_tokens, context_length, target_length = map(operator.index, (num_tokens, context_length, target_length))
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    if target_length < context_length:
        raise ValueError(f"target_length must be at least context_length ({context_length}), got {target_length}")
    return num_tokens, context_length, target_length


@lru_cache(maxsize=128)
def _gaussian(factor: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """CDF of N(factor + 1, sigma^2), and the half windows 2..2 factor it is taken at: the authors' grid."""
    half_windows, gaussian = np.linspace(2, 2 * factor, GRID_POINTS), NormalDist(factor + 1, sigma)
    return np.array([gaussian.cdf(x) for x in half_windows.tolist()]), half_windows


def _draw_half_windows(factor: float, sigma: float | None, rng: np.random.Generator) -> float:
    """alpha: without a sigma in [2, 2 factor], with one in 2..floor(2 factor), where what the Gaussian puts outside
    goes to the two ends, as published."""
    u = rng.random()
    if sigma is None:
        gaussian = NormalDist(factor + 1, SIGMA_PER_FACTOR * factor)
        low, high = gaussian.cdf(2), gaussian.cdf(2 * factor)
        return min(max(2.0, gaussian.inv_cdf(low + u * (high - low))), 2 * factor)
    return int(np.interp(u, *_gaussian(factor, sigma)))


def _three_runs(length: int, head: int, tail: int, middle_end: int, end: int) -> NDArray[np.int64]:
    """0..head-1, the middle ending at `middle_end` (included), then end-tail..end-1; of shape (length,)."""
    runs = np.arange(length, dtype=np.int64)
    runs[head : length - tail] += middle_end - (length - tail - 1)
    runs[length - tail :] += end - length
    return runs
