"""Every row once, none split, none over the length; and nearly as few rows as there can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data import IGNORE_INDEX, Batches, Example, pack
from qlora.data.packing import best_fit, dealt_out, micro_batches_of

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_document_is_in_one_row_and_no_row_is_over_the_length(lengths):
    pack_of = best_fit(lengths, CAPACITY)
    filled = np.bincount(pack_of, weights=lengths)
    assert len(pack_of) == len(lengths)
    assert ((filled > 0) & (filled <= CAPACITY)).all()
    examples = [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]
    packs = pack(examples, CAPACITY)
    assert sorted(token for row in packs for token in row.input_ids) == sorted(t for e in examples for t in e.input_ids)
    assert packs.efficiency == sum(lengths) / (len(packs) * CAPACITY)
    assert packs.longest == max(len(row.input_ids) for row in packs)


@given(LENGTHS)
def test_rows_are_at_most_the_proven_bound(lengths):
    fewest = -(-sum(lengths) // CAPACITY)  # a lower bound on the optimum
    optimum_at_least = max(fewest, sum(length > CAPACITY / 2 for length in lengths))
    # first/best fit decreasing use at most 11/9 OPT + 1; OPT is at most twice the volume bound
    assert best_fit(lengths, CAPACITY).max() + 1 <= 11 / 9 * 2 * optimum_at_least + 1
    assert (best_fit(lengths, CAPACITY) == best_fit(lengths, CAPACITY)).all()


def test_a_case_worked_by_hand():
    assert best_fit([10, 50, 14, 30, 34], 64).tolist() == [2, 0, 0, 1, 1]


def test_the_first_token_of_a_document_is_not_predicted_from_another():
    examples = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [IGNORE_INDEX, 9])]
    (row,) = pack(examples, 8)
    assert row.input_ids == [5, 6, 7, 8, 9]
    assert row.labels == [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]
    assert row.segments == [3, 2]


@given(LENGTHS, st.integers(CAPACITY, 4 * CAPACITY), st.integers(0, 3))
def test_micro_batches_hold_every_row_once_and_no_more_than_their_tokens(lengths, tokens, seed):
    examples = [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]
    batches = Batches(examples, lengths, tokens, seed)
    assert sorted(example.input_ids[0] for batch in batches for example in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(len(example.input_ids) for example in batch) <= tokens for batch in batches)
    again = Batches(examples, lengths, tokens, seed)
    assert [batches[index] for index in range(len(batches))] == [again[index] for index in range(len(again))]


def test_micro_batches_hold_rows_of_like_length():
    lengths = [2, 60] * 500
    examples = [Example([n] * length, [n] * length) for n, length in enumerate(lengths)]
    batches = Batches(examples, lengths, 128, seed=0)
    padded = sum(len(batch) * max(len(example.input_ids) for example in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_a_step_is_dealt_out_to_processes_in_equal_numbers_of_even_micro_batches():
    rng = np.random.default_rng(0)
    for count in (2, 3, 4):
        for most in (500, 1500, 10**6):
            lengths = rng.integers(20, 400, 64)
            part_of = micro_batches_of(lengths, most, count)
            tokens = np.bincount(part_of, weights=lengths)
            assert len(tokens) % count == 0
            assert tokens.max() <= most
            assert len(tokens) <= best_fit(lengths, most).max() + 1 + count
            assert tokens.max() - tokens.min() <= lengths.max()
    # of a step that just fits into one for each
    lengths = rng.integers(20, 400, 64)
    part_of = dealt_out(lengths, 2)
    most = int(np.bincount(part_of, weights=lengths).max())
    assert (micro_batches_of(lengths, most, 2) == part_of).all()
    assert micro_batches_of([7], 5, 2).tolist() == [0]
    assert micro_batches_of([7, 7, 7], 5, 2).tolist() == [0, 1, 2]
    assert micro_batches_of([5, 5, 4], 11).tolist() == best_fit([5, 5, 4], 11).tolist()
