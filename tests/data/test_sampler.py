import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.data.sampler import bucket_for_pass, sample_order


@settings(deadline=None)
@given(count=st.integers(1, 9), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_the_order_holds_each_sample_once_in_every_round(count, sizes, seed):
    ends = list(itertools.accumulate(sizes))
    stream = [
        sample for size, end in zip(sizes, ends, strict=True) for sample in sample_order(count, end - size, size, seed)
    ]
    assert stream == sample_order(count, 0, len(stream), seed)
    for first in range(0, len(stream) - count + 1, count):
        assert sorted(stream[first : first + count]) == list(range(count))


def test_rounds_are_shuffled_differently():
    rounds = {tuple(sample_order(8, 8 * number, 8, seed)) for number in range(4) for seed in range(2)}
    assert len(rounds) == 8


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_every_bucket_takes_the_turns_that_its_samples_are_due(counts, seed):
    turns = [bucket_for_pass(number, counts, seed) for number in range(3 * sum(counts))]
    for bucket, count in enumerate(counts):
        assert [turn for of, turn in turns if of == bucket] == list(range(3 * count))
        for first in range(0, len(turns), sum(counts)):
            assert sum(of == bucket for of, _ in turns[first : first + sum(counts)]) == count


def test_one_bucket_takes_every_turn_and_several_are_mixed():
    assert [bucket_for_pass(number, [5], 0) for number in range(12)] == [(0, number) for number in range(12)]
    rounds = {tuple(bucket_for_pass(number, [4, 4], seed)[0] for number in range(8)) for seed in range(4)}
    assert len(rounds) == 4
