import json
import math
import time
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cream_peft.positions import POSITION_STRATEGIES, cream, generator, options_of

AUTHORS = json.loads((Path(__file__).parent / "data" / "authors_draws.json").read_text())["settings"]
SETTINGS = [pytest.param(s, id=f"window {s['window']} factor {s['factor']}") for s in AUTHORS]
STRATEGIES = sorted(POSITION_STRATEGIES)
WITH_OPTIONS = [(strategy, {}) for strategy in STRATEGIES] + [
    ("cream", {"sigma": 3.0}),
    ("cream", {"sigma": math.inf}),
    ("pose", {"chunks": 3}),
    ("pose", {"chunks": 40}),
    ("segments", {"segment_length": 1}),
    ("segments", {"segment_length": 7}),
]
# The statistical tests are seeded, so they cannot be flaky; a wrong law gives a p-value far below this.
SMALLEST_P = 1e-3
BRANCH_COIN = {"relativity": 0.25, "continuity": 0.75}


class ScriptedGenerator:
    """Hands `cream` a branch, a uniform number and a last position of the middle; keeps the interval it asked for."""

    def __init__(self, branch, uniform, middle_end=None):
        self.randoms = [BRANCH_COIN[branch], uniform]
        self.middle_end = middle_end
        self.interval = None

    def random(self):
        return self.randoms.pop(0)

    def integers(self, low, high, endpoint):
        assert endpoint
        self.interval = [low, high]
        if self.middle_end is None:
            return low
        assert low <= self.middle_end <= high
        return self.middle_end


def runs(numbers):
    """[[first, last + 1], ...] of the runs of consecutive numbers."""
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, starts[1:])]


def edge_and_middle_end(position_ids, target_length):
    """Length of head and tail, and last position of the middle, of a draw whose tail stands apart from the middle."""
    *_, middle, tail = runs(position_ids)
    return target_length - tail[0], middle[1] - 1


def cumulated_law(setting):
    """{alpha: (probability of less, probability of at most)}"""
    law = {int(alpha): p for alpha, p in setting["alpha"].items()}
    ends = np.cumsum(list(law.values()))
    return {alpha: (end - law[alpha], end) for alpha, end in zip(law, ends, strict=True)}


def assert_contract(draw, num_tokens, context_length, target_length):
    token_indices, position_ids = draw
    for numbers, end in ((token_indices, num_tokens), (position_ids, target_length)):
        assert isinstance(numbers, np.ndarray) and numbers.dtype == np.int64
        assert numbers.shape == (min(num_tokens, context_length),)
        assert (np.diff(numbers) > 0).all()
        assert numbers[0] >= 0 and numbers[-1] < end


@pytest.mark.parametrize(("strategy", "options"), WITH_OPTIONS)
def test_every_strategy_keeps_the_contract_over_windows_targets_and_documents(strategy, options):
    windows_and_targets = [
        (256, 2048),
        (255, 2048),
        (256, 1000),
        (257, 1025),
        (97, 98),
        (128, 128),
        (60, 61 * 64),
        (2, 9),
    ]
    for context_length, target_length in windows_and_targets:
        documents = {1, 2, 3, 4, 7, context_length - 1, context_length, context_length + 1, 2 * context_length + 17}
        documents |= {target_length - 1, target_length, target_length + 1, 3 * target_length}
        for num_tokens, row in product(sorted(documents), range(12)):
            rng = generator(7, 0, row)
            draw = POSITION_STRATEGIES[strategy](num_tokens, context_length, target_length, rng, **options)
            assert_contract(draw, num_tokens, context_length, target_length)
            assert strategy == "randpos" or draw[1][0] == 0


@pytest.mark.parametrize(("strategy", "options"), WITH_OPTIONS)
def test_the_smallest_windows_and_documents_keep_the_contract(strategy, options):
    for num_tokens, context_length, extra in product(range(1, 14), range(1, 10), (0, 1, 2, 5, 30)):
        target_length = context_length + extra
        for row in range(4):
            rng = generator(1, 2, row)
            draw = POSITION_STRATEGIES[strategy](num_tokens, context_length, target_length, rng, **options)
            assert_contract(draw, num_tokens, context_length, target_length)
            if strategy == "cream":
                fed_one = len(draw[1]) == 1
                assert draw[1][0] == 0 and draw[1][-1] == (0 if fed_one else target_length - 1)
                assert draw[0][0] == 0 and draw[0][-1] == (0 if fed_one else num_tokens - 1)


@pytest.mark.parametrize("sigma", [5e-324, 1e-9, 0.01, 3, 1e6, 1e300, math.inf])
def test_cream_keeps_the_contract_at_extreme_sigmas(sigma):
    for num_tokens, target_length, row in product((1, 3, 64, 65, 700), (64, 65, 100, 640), range(20)):
        draw = cream(num_tokens, 64, target_length, generator(3, 0, row), sigma=sigma)
        assert_contract(draw, num_tokens, 64, target_length)


def test_lengths_given_as_small_numpy_integers_do_not_overflow():
    lengths = (40_000, 4096, 2**30)
    for row in range(10):
        given = cream(*map(np.int32, lengths), generator(0, 0, row))
        assert np.array_equal(given, cream(*lengths, generator(0, 0, row)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((100, 64, 63), r"target_length must be at least context_length \(64\), got 63"),
        ((0, 64, 128), "num_tokens must be at least 1, got 0"),
        ((100, 0, 128), "context_length must be at least 1, got 0"),
    ],
)
def test_impossible_lengths_are_refused_with_what_was_got_and_what_is_allowed(strategy, lengths, message):
    with pytest.raises(ValueError, match=message):
        POSITION_STRATEGIES[strategy](*lengths, generator(0, 0, 0))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("cream", {"sigma": sigma}) for sigma in (0, -1.0, math.nan, -math.inf)]
    + [("pose", {"chunks": 1}), ("segments", {"segment_length": 0})],
)
def test_an_option_out_of_its_range_is_refused(strategy, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be (above 0|at least [12])"):
        POSITION_STRATEGIES[strategy](100, 64, 512, generator(0, 0, 0), **options)


def test_the_options_of_a_strategy_are_those_of_its_signature():
    assert options_of("cream") == {"sigma": None} and options_of("pose") == {"chunks": 2}
    assert options_of("segments") == {"segment_length": 32} and options_of("randpos") == {}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_takes_no_options_but_its_own(strategy):
    options = {"sigma": 3.0} if strategy != "cream" else {"simga": 3.0}
    with pytest.raises(TypeError, match="unexpected keyword"):
        POSITION_STRATEGIES[strategy](100, 64, 512, generator(0, 0, 0), **options)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("branch", ["relativity", "continuity"])
def test_segments_intervals_and_the_law_of_alpha_are_the_authors(setting, branch):
    window, target_length = setting["window"], setting["window"] * setting["factor"]
    expected = setting["branches"][branch]
    checked = 0
    for alpha, (below, upto) in cumulated_law(setting).items():
        # The recorded law is itself rounded to 5e-7, so rarer values than these cannot be placed.
        if upto - below < 4e-6:
            continue
        interval = expected["last_position_of_middle"][str(alpha)]
        for uniform in (below + 1e-6, (below + upto) / 2, upto - 1e-6):
            rng = ScriptedGenerator(branch, uniform)
            _, position_ids = cream(window, window, target_length, rng, sigma=setting["sigma"])
            assert rng.interval == interval
        end = interval[0] + 1
        segments = [
            [0, expected["head"]],
            [end - expected["middle"], end],
            [target_length - expected["tail"], target_length],
        ]
        assert np.array_equal(position_ids, np.concatenate([np.arange(*segment) for segment in segments]))
        checked += 1
    assert checked >= 7


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_middle_ends_where_the_authors_own_draws_end(setting):
    window, factor = setting["window"], setting["factor"]
    target_length, sigma = window * factor, setting["sigma"]

    def ends_by_branch(draws):
        head_of_relativity = setting["branches"]["relativity"]["head"]
        draws = np.array(draws)
        is_relativity = draws[:, 0] == head_of_relativity
        return draws[is_relativity, 1], draws[~is_relativity, 1]

    def drawn(sigma):
        positions = (cream(window, window, target_length, generator(11, 0, row), sigma)[1] for row in range(3000))
        return ends_by_branch([edge_and_middle_end(p, target_length) for p in positions])

    theirs, ours, control = ends_by_branch(setting["draws"]), drawn(sigma), drawn(4 * sigma)
    for branch in (0, 1):
        assert stats.ks_2samp(ours[branch], theirs[branch]).pvalue > SMALLEST_P
    # The middles of "relativity" overlap from one alpha to the next; those of "continuity" show a wrong Gaussian.
    assert stats.ks_2samp(control[1], theirs[1]).pvalue < SMALLEST_P


def test_the_middle_ends_by_the_exact_law_in_both_branches():
    setting = AUTHORS[0]
    draws = [edge_and_middle_end(cream(4096, 4096, 32768, generator(5, 0, row), 3.0)[1], 32768) for row in range(6000)]
    law = setting["alpha"]
    for branch in setting["branches"].values():
        intervals = branch["last_position_of_middle"]
        grid = np.arange(32769)
        cdf = sum(
            p * np.clip((grid - intervals[a][0] + 1) / (intervals[a][1] - intervals[a][0] + 1), 0, 1)
            for a, p in law.items()
        )
        ends = np.sort([end for edge, end in draws if edge == branch["tail"]])
        # Chi-square over 20 cells of about equal probability by the exact law.
        cuts = np.searchsorted(cdf, np.linspace(0, 1, 21)[1:-1])
        observed = np.bincount(np.searchsorted(cuts, ends), minlength=20)
        expected = np.diff(np.concatenate([[0], cdf[cuts], [1]])) * len(ends)
        filled = expected > 5
        assert filled.sum() >= 12
        assert observed[~filled].sum() <= 30
        scale = observed[filled].sum() / expected[filled].sum()
        assert stats.chisquare(observed[filled], expected[filled] * scale).pvalue > SMALLEST_P


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_tokens_picked_are_the_authors_wherever_theirs_do_not_overlap(setting):
    window, target_length = setting["window"], setting["window"] * setting["factor"]
    branch_of_edge = {branch["tail"]: name for name, branch in setting["branches"].items()}
    law, mended = cumulated_law(setting), 0
    for document, tokens_of_draws in setting["tokens"].items():
        num_tokens = int(document)
        for (edge, middle_end), flat_runs in zip(setting["draws"], tokens_of_draws, strict=True):
            branch = branch_of_edge[edge]
            intervals = setting["branches"][branch]["last_position_of_middle"]
            alpha = next(int(a) for a, (low, high) in intervals.items() if low <= middle_end <= high)
            rng = ScriptedGenerator(branch, sum(law[alpha]) / 2, middle_end)
            draw = cream(num_tokens, window, target_length, rng, sigma=setting["sigma"])
            assert_contract(draw, num_tokens, window, target_length)
            assert edge_and_middle_end(draw[1], target_length) == (edge, middle_end)
            theirs = [list(run) for run in zip(flat_runs[::2], flat_runs[1::2], strict=True)]
            if num_tokens - edge <= middle_end < num_tokens:
                # The control: here their middle runs into their tail, and the same tokens are fed twice.
                assert any(run[1] > following[0] for run, following in pairwise(theirs))
                before_tail = [[0, edge], [num_tokens - window + edge, num_tokens]]
                assert runs(draw[0]) == ([[0, window]] if num_tokens == window else before_tail)
                mended += 1
            else:
                assert runs(draw[0]) == theirs
    assert mended > 0 or setting["factor"] == 64


def test_the_branch_is_drawn_half_and_half_for_each_example():
    draws = (cream(256, 256, 2048, generator(0, 0, row))[1] for row in range(4000))
    edges = np.array([edge_and_middle_end(position_ids, 2048)[0] for position_ids in draws])
    assert set(edges) == {85, 32}
    assert stats.binomtest(int((edges == 85).sum()), len(edges)).pvalue > SMALLEST_P
    # A coin thrown once per map batch would be as fair, and would hardly ever turn between neighbours.
    turns = int((edges[1:] != edges[:-1]).sum())
    assert stats.binomtest(turns, len(edges) - 1).pvalue > SMALLEST_P


def test_segments_shrink_with_a_document_shorter_than_the_window():
    for num_tokens, row in product((1, 2, 3, 50, 301, 4095), range(30)):
        short = cream(num_tokens, 4096, 32768, generator(2, 0, row))
        window_of_its_size = cream(num_tokens, num_tokens, 32768, generator(2, 0, row))
        assert np.array_equal(short, window_of_its_size)
        assert np.array_equal(short[0], np.arange(num_tokens))


def test_a_factor_that_is_not_whole_is_used_as_it_is():
    # f = 3.90625: k = floor(4 f) = 15, so m = 226; the mean, f + 1, gives alpha 4, and the upper end, 2 f, gives 7.
    for uniform, alpha in ((0.0, 2), (0.5, 4), (1 - 1e-9, 7)):
        rng = ScriptedGenerator("continuity", uniform)
        assert edge_and_middle_end(cream(256, 256, 1000, rng, 3 * 3.90625 / 8)[1], 1000)[0] == 15
        assert rng.interval == [15 + 225 * alpha // 2, alpha * 256 // 2 - 15 - 1]


def test_at_a_factor_of_one_cream_is_contiguous_and_just_above_it_only_the_tail_moves():
    for row in range(20):
        assert np.array_equal(cream(100, 100, 100, generator(0, 0, row))[1], np.arange(100))
        tail = runs(cream(100, 100, 101, generator(0, 0, row))[1])[1]
        assert tail in ([97, 101], [68, 101])


@pytest.mark.parametrize(("window", "target_length"), [(4096, 8192), (4096, 32768), (256, 1000), (256, 64 * 256)])
def test_without_a_sigma_the_middles_place_is_a_truncated_gaussian(window, target_length):
    factor = target_length / window
    width = 3 * factor / 8
    law = stats.truncnorm((1 - factor) / width, (factor - 1) / width, factor + 1, width)
    ends = {"relativity": window // 3, "continuity": min(int(4 * factor), window // 3)}
    for (branch, end), uniform in product(ends.items(), np.linspace(0, 0.999, 200)):
        rng, alpha = ScriptedGenerator(branch, uniform), law.ppf(uniform)
        cream(window, window, target_length, rng)
        wanted = end + (window - 2 * end - 1) * alpha / 2, alpha * window / 2 - end - 1
        # Both bounds are rounded down.
        assert (np.subtract(wanted, rng.interval) > -1e-6).all() and (np.subtract(wanted, rng.interval) < 1).all()


def test_no_draws_pile_up_at_the_ends_unless_a_sigma_is_given():
    def touching(factor, sigma):
        """The share of draws whose middle touches head or tail."""
        drawn = [cream(9999, 1024, 1024 * factor, generator(4, 1, row), sigma)[1] for row in range(2000)]
        return np.mean([len(runs(position_ids)) < 3 for position_ids in drawn])

    assert touching(2, None) < 0.01 and touching(8, None) < 0.002
    assert touching(2, math.inf) < 0.01
    # The controls: the authors' law with as wide a Gaussian, and with a wider one that should be nearly uniform.
    assert touching(2, 0.75) > 0.45 and touching(8, 24.0) > 0.3


@pytest.mark.parametrize(("branch", "end"), [("relativity", 85), ("continuity", 16)])
def test_with_an_infinite_sigma_the_middle_ends_anywhere_alike(branch, end):
    rng = ScriptedGenerator(branch, None)
    cream(9999, 256, 1024, rng, math.inf)
    assert rng.interval == [256 - end - 1, 1024 - end - 1]


def distances_seen(strategy, window, target_length, rows, **options):
    """The share of draws that train each distance, by distance."""
    counts = np.zeros(target_length)
    for row in range(rows):
        rng = generator(0, 0, row)
        segments = runs(POSITION_STRATEGIES[strategy](target_length, window, target_length, rng, **options)[1])
        seen = np.zeros(target_length, dtype=bool)
        for i, (start, end) in enumerate(segments):
            for later_start, later_end in segments[i:]:
                seen[max(0, later_start - end + 1) : later_end - start] = True
        counts += seen
    return counts / rows


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_every_distance_up_to_the_target_is_trained(factor):
    for strategy, options in [("cream", {}), ("cream", {"sigma": math.inf}), ("segments", {})]:
        assert distances_seen(strategy, 1024, 1024 * factor, 400, **options).min() > 0
    # The control: plain positions.
    assert distances_seen("contiguous", 1024, 1024 * factor, 2)[1024:].max() == 0


def test_at_a_factor_of_64_only_the_papers_sigma_leaves_distances_out():
    def share(**options):
        return (distances_seen("cream", 4096, 64 * 4096, 400, **options) > 0).mean()

    assert share() > 0.92 and share(sigma=math.inf) == 1
    # The control: the paper's sigma leaves about a third of the distances untrained at this factor.
    assert 0.65 < share(sigma=3.0) < 0.75


def test_pose_makes_one_skip_in_positions_and_one_in_tokens_each_uniform():
    num_tokens, window, target_length = 20, 8, 40
    first_chunks, skips, ends = [], [], []
    for row in range(6000):
        token_indices, position_ids = POSITION_STRATEGIES["pose"](
            num_tokens, window, target_length, generator(0, 0, row)
        )
        skip, end = int(position_ids[-1]) - window + 1, int(token_indices[-1]) + 1
        skips.append(skip)
        ends.append(end)
        if skip == 0 and end == window:
            assert np.array_equal(token_indices, position_ids)
            continue
        first_chunk = runs(position_ids if skip else token_indices)[0][1]
        first_chunks.append(first_chunk)
        second_positions = range(first_chunk + skip, window + skip)
        assert position_ids.tolist() == [*range(first_chunk), *second_positions]
        assert token_indices.tolist() == [*range(first_chunk), *range(end - window + first_chunk, end)]
    # Lowest and highest value of each of the three uniform draws, from the definition.
    for values, low, high in ((first_chunks, 1, 4), (skips, 0, 32), (ends, 8, 20)):
        assert min(values) == low and max(values) == high
        assert stats.chisquare(np.bincount(values)[low:]).pvalue > SMALLEST_P


def test_pose_with_two_chunks_takes_the_same_random_numbers_as_its_definition():
    for num_tokens, row in product((20, 64, 5000), range(50)):
        rng, fed = generator(3, 0, row), min(num_tokens, 64)
        first, skip = rng.integers(1, (fed + 1) // 2, endpoint=True), rng.integers(0, 512 - fed, endpoint=True)
        end = rng.integers(fed, min(num_tokens, 512), endpoint=True)
        token_indices, position_ids = POSITION_STRATEGIES["pose"](num_tokens, 64, 512, generator(3, 0, row))
        assert position_ids.tolist() == [*range(first), *range(first + skip, fed + skip)]
        assert token_indices.tolist() == [*range(first), *range(end - fed + first, end)]


def test_each_chunk_of_pose_is_raised_by_at_least_as_much_as_the_one_before():
    shifts = []
    for row in range(3000):
        tokens, positions = POSITION_STRATEGIES["pose"](90, 9, 40, generator(0, 0, row), chunks=3)
        raised = positions - np.arange(9)
        assert (np.diff(raised) >= 0).all() and len(set(raised)) <= 3 and raised[0] == 0 and raised[-1] <= 31
        assert (np.diff(tokens - np.arange(9)) >= 0).all() and len(set(tokens - np.arange(9))) <= 3
        shifts.append(int(raised[-1]))
    # The last skip, from the first one, which is uniform: P(s) = sum over first <= s of 1 / 32 / (32 - first).
    law = [sum(1 / 32 / (32 - first) for first in range(last + 1)) for last in range(32)]
    observed, expected = np.bincount(shifts, minlength=32), np.array(law) * len(shifts)
    cells = [slice(0, 12), *(slice(i, i + 1) for i in range(12, 32))]
    pairs = np.array([(observed[cell].sum(), expected[cell].sum()) for cell in cells])
    assert stats.chisquare(*pairs.T).pvalue > SMALLEST_P


def test_segments_share_out_the_skipped_positions_in_every_way_alike():
    # With a cut after every token each set of three positions that holds 0 is as likely.
    counts = {}
    for row in range(4000):
        token_indices, position_ids = POSITION_STRATEGIES["segments"](9, 3, 7, generator(0, 0, row), segment_length=1)
        assert token_indices.tolist() == [0, 1, 2] and position_ids[0] == 0
        counts[tuple(position_ids.tolist())] = counts.get(tuple(position_ids.tolist()), 0) + 1
    assert len(counts) == 15 and stats.chisquare(list(counts.values())).pvalue > SMALLEST_P


def test_segments_are_cut_after_each_token_alike():
    # So long a target hardly ever skips nothing at a cut.
    cuts, rows = np.zeros(99), 3000
    for row in range(rows):
        position_ids = POSITION_STRATEGIES["segments"](999, 100, 10**6, generator(0, 0, row), segment_length=5)[1]
        cuts += np.diff(position_ids) > 1
    assert stats.binomtest(int(cuts.sum()), 99 * rows, 1 / 5).pvalue > SMALLEST_P
    assert stats.chisquare(cuts).pvalue > SMALLEST_P


@pytest.mark.parametrize(("strategy", "options"), WITH_OPTIONS)
def test_a_draw_of_4096_tokens_takes_less_than_a_millisecond(strategy, options):
    def seconds(row):
        rng, start = generator(0, 0, row), time.perf_counter()
        POSITION_STRATEGIES[strategy](32768, 4096, 32768, rng, **options)
        return time.perf_counter() - start

    assert min(map(seconds, range(50))) < 1e-3


def test_pose_never_takes_tokens_beyond_the_target_length():
    ends = [POSITION_STRATEGIES["pose"](500, 8, 40, generator(1, 0, row))[0][-1] + 1 for row in range(2000)]
    assert min(ends) == 8 and max(ends) == 40


def test_randpos_draws_every_set_of_positions_alike_for_the_first_tokens():
    counts = {}
    for row in range(4000):
        token_indices, position_ids = POSITION_STRATEGIES["randpos"](9, 3, 6, generator(0, 0, row))
        assert token_indices.tolist() == [0, 1, 2]
        counts[tuple(position_ids.tolist())] = counts.get(tuple(position_ids.tolist()), 0) + 1
    assert len(counts) == 20
    assert stats.chisquare(list(counts.values())).pvalue > SMALLEST_P


@pytest.mark.parametrize(("num_tokens", "fed"), [(5, 5), (64, 64), (1000, 64)])
def test_contiguous_feeds_the_first_tokens_at_their_own_positions(num_tokens, fed):
    for numbers in POSITION_STRATEGIES["contiguous"](num_tokens, 64, 512, generator(0, 0, 0)):
        assert np.array_equal(numbers, np.arange(fed))


def test_token_indices_and_position_ids_do_not_share_memory():
    for strategy in POSITION_STRATEGIES.values():
        assert not np.shares_memory(*strategy(100, 64, 64, generator(0, 0, 0)))


@pytest.mark.parametrize(("strategy", "options"), WITH_OPTIONS)
def test_a_draw_depends_on_seed_epoch_and_row_and_on_nothing_else(strategy, options):
    def draw(row):
        return POSITION_STRATEGIES[strategy](700, 64, 640, generator(42, 1, row), **options)

    state = np.random.get_state()[1].copy()
    forwards = {row: draw(row) for row in range(30)}
    np.random.default_rng(0).random(7)
    backwards = {row: draw(row) for row in reversed(range(30))}
    assert all(np.array_equal(forwards[row], backwards[row]) for row in forwards)
    assert np.array_equal(np.random.get_state()[1], state)


def test_generators_of_different_seeds_epochs_and_rows_differ():
    triples = [*product(range(5), range(5), range(40))]
    assert len({generator(*triple).integers(2**62) for triple in triples}) == len(triples)
    # The control: seeds that are added up meet again in the next row or epoch.
    assert len({np.random.default_rng(sum(triple)).integers(2**62) for triple in triples}) < len(triples)


@pytest.mark.parametrize(("triple", "error"), [((-1, 0, 0), ValueError), ((0, 0.5, 0), TypeError)])
def test_a_generator_refuses_what_is_not_a_non_negative_integer(triple, error):
    with pytest.raises(error):
        generator(*triple)
