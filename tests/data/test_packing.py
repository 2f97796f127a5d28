"""Every row once, none split, none over the length; and nearly as few rows as there can be."""

from hypothesis import given
from hypothesis import strategies as st

from qlora.data import IGNORE_INDEX, Example, pack
from qlora.data.packing import best_fit

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_document_is_in_one_row_and_no_row_is_over_the_length(lengths):
    rows = best_fit(lengths, CAPACITY)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= CAPACITY for row in rows)


@given(LENGTHS)
def test_rows_are_at_most_the_proven_bound(lengths):
    fewest = -(-sum(lengths) // CAPACITY)  # a lower bound on the optimum
    optimum_at_least = max(fewest, sum(length > CAPACITY / 2 for length in lengths))
    # first/best fit decreasing use at most 11/9 OPT + 1; OPT is at most twice the volume bound
    assert len(best_fit(lengths, CAPACITY)) <= 11 / 9 * 2 * optimum_at_least + 1
    assert best_fit(lengths, CAPACITY) == best_fit(lengths, CAPACITY)


def test_a_case_worked_by_hand():
    assert best_fit([10, 50, 14, 30, 34], 64) == [[1, 2], [4, 3], [0]]


def test_the_first_token_of_a_document_is_not_predicted_from_another():
    examples = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [IGNORE_INDEX, 9])]
    (row,) = pack(examples, 8)
    assert row.input_ids == [5, 6, 7, 8, 9]
    assert row.labels == [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]
    assert row.segments == [3, 2]
    assert row.num_trained == 3
