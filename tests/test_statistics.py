"""Ours against scipy's, and RULER's effective length."""

import pytest
from scipy.stats import binomtest, t

from cream_peft.evals.results import (
    Cell,
    compare_cells,
    effective_length,
    interval,
    paired_comparison,
    paired_means,
)


def test_an_interval_is_wilsons_over_all_samples_and_has_a_width_at_the_ends():
    def of(*rates):
        return interval([Cell("passkey", 256, 0.5, "accuracy", rate, 5) for rate in rates])

    assert of(0.0, 0.0)[0] == 0.0 and of(1.0, 1.0)[1] == 1.0
    assert of(0.0, 0.0) == pytest.approx((0, 0.2775), abs=1e-4)
    assert of(1.0, 1.0) == pytest.approx((0.7225, 1), abs=1e-4)
    assert of(1.0, 0.4) == pytest.approx((0.3968, 0.8922), abs=1e-4)  # 7 of 10


@pytest.mark.parametrize("only_first, only_second, both", [(1, 9, 30), (9, 1, 30), (5, 5, 0), (0, 6, 3), (400, 340, 9)])
def test_two_models_on_the_same_samples_are_compared_by_the_exact_binomial(only_first, only_second, both):
    first = [1] * only_first + [0] * only_second + [1] * both
    second = [0] * only_first + [1] * only_second + [1] * both
    found = paired_comparison(first, second)
    assert (found["only_first"], found["only_second"]) == (only_first, only_second)
    assert found["difference"] == pytest.approx((sum(second) - sum(first)) / len(first))
    assert found["p_value"] == pytest.approx(binomtest(only_first, only_first + only_second).pvalue)


def test_all_questions_that_both_have_count_however_many_stand_at_a_depth():
    def cell(depth, correct, **more):
        return Cell(task="recall", length=64, depth=depth, metric="accuracy", value=0.5, samples=len(correct),
                    correct=correct, **more)  # fmt: skip

    pairs = [(cell(0.1, "0000"), cell(0.1, "1111")), (cell(0.9, "00"), cell(0.9, "110"))]
    found = compare_cells(pairs)
    assert (found["questions"], found["only_second"], found["difference"]) == (6, 6, 1.0) and "answer_loss" not in found
    losses = [(cell(0.1, "00", answer_loss=[2.0, 3.5]), cell(0.1, "000", answer_loss=[1.0, 2.0, 9.0]))]
    assert compare_cells(losses)["answer_loss"]["difference"] == -1.25


def test_a_documents_loss_is_the_mean_over_the_cells_that_have_it():
    def cell(losses):
        return Cell("t", 1, 0.0, "accuracy", 0.0, len(losses), correct="0" * len(losses), answer_loss=losses)

    # Two seeds, one of which was asked in more documents; each pair on the documents that both have.
    pairs = [(cell([4.0, 2.0]), cell([1.0, 1.0, 9.0])), (cell([2.0, 2.0, 5.0]), cell([2.0, 1.0, 3.0]))]
    found = compare_cells(pairs)["answer_loss"]
    assert found["documents"] == 3 and found["difference"] == pytest.approx((-1.5 - 1 - 2) / 3)


def test_models_that_never_differ_give_no_evidence():
    assert paired_comparison([1, 0, 1], [1, 0, 1])["p_value"] == 1.0
    with pytest.raises(ValueError, match="not 2 and 3"):
        paired_comparison([1, 0], [1, 0, 1])


def test_the_effective_length_ends_before_the_first_length_that_fails():
    accuracy = {16384: 0.9, 4096: 0.99, 8192: 0.7, 2048: 1.0}  # good again at 16K, which does not count
    assert effective_length(accuracy, 0.856) == 4096
    assert effective_length(accuracy, 0.7) == 16384
    assert effective_length(accuracy, 1.0) == 2048
    assert effective_length({2048: 0.5}, 0.856) == 0


def test_losses_on_the_same_documents_are_compared_by_students_t():
    first, second = [2.0, 3.0, 4.0, 5.0], [1.5, 2.9, 3.1, 4.9]
    found = paired_means(first, second)
    assert found["difference"] == pytest.approx(-0.4) and found["documents"] == 4
    half = t.ppf(0.975, 3) * (sum((d + 0.4) ** 2 for d in (-0.5, -0.1, -0.9, -0.1)) / 3 / 4) ** 0.5
    assert found["interval"] == pytest.approx((-0.4 - half, -0.4 + half))
    assert found["p_value"] > 0.05 and paired_means(first, [x - 0.4 for x in (2.0, 3.01, 4.0, 5.0)])["p_value"] < 0.01


@pytest.mark.filterwarnings("error")
def test_differences_that_are_nearly_the_same_are_compared_without_a_warning():
    low, high = paired_means([1.0, 2.0], [0.5, 1.5 + 1e-15])["interval"]
    assert low == pytest.approx(-0.5) == high


def test_one_document_or_none_that_differs_has_no_interval():
    assert paired_means([2.0], [1.0]) == {"difference": -1.0, "documents": 1, "interval": None, "p_value": None}
    assert paired_means([2.0, 3.0], [2.0, 3.0])["interval"] is None
    with pytest.raises(ValueError, match="not 1 and 2"):
        paired_means([1.0], [1.0, 2.0])
