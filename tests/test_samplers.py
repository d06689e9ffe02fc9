"""Index streams: what they must contain, and that any window of them is the same however it is cut."""

from functools import partial

import numpy as np
import pytest

from tailcal.samplers import Reweighted, class_balanced, instance

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [11, 5, 3, 1]))  # class 3 has no images


@pytest.mark.parametrize("sampler", [instance, class_balanced, partial(class_balanced, in_a_row=3), Reweighted(0.5)])
def test_a_stream_is_a_function_of_seed_and_position(sampler):
    whole = sampler(LABELS, 7, 0, 9000)
    assert whole.dtype == np.int64
    for start, stop in [(0, 1), (3, 50), (50, 51), (19, 21), (133, 400), (4095, 4097), (8191, 9000)]:
        assert np.array_equal(sampler(LABELS, 7, start, stop), whole[start:stop])
    assert not np.array_equal(sampler(LABELS, 8, 0, 9000), whole)


def test_instance_passes_are_permutations():
    n = len(LABELS)
    stream = instance(LABELS, 1, 0, 5 * n).reshape(5, n)
    assert all(sorted(row) == list(range(n)) for row in stream.tolist())
    assert not np.array_equal(stream[0], stream[1])


def test_class_balanced_cycles_through_the_classes_and_through_each_class():
    cycles = 60
    stream = class_balanced(LABELS, 1, 0, 4 * cycles)
    classes = LABELS[stream].reshape(cycles, 4)
    assert all(sorted(row) == [0, 1, 2, 4] for row in classes.tolist())
    assert len({tuple(row) for row in classes.tolist()}) > 5  # the order of the classes changes
    for k in (0, 1, 2, 4):
        members = np.flatnonzero(LABELS == k)
        drawn = stream[LABELS[stream] == k]
        passes = drawn[: cycles // len(members) * len(members)].reshape(-1, len(members))
        assert all(sorted(row) == sorted(members) for row in passes.tolist())
        if len(members) > 4:
            assert len({tuple(row) for row in passes.tolist()}) == len(passes)  # reshuffled each time


@pytest.mark.parametrize("in_a_row", [1, 2, 4])
def test_a_class_gives_the_same_images_however_many_in_a_row(in_a_row):
    cycles = 30
    stream = class_balanced(LABELS, 1, 0, 4 * in_a_row * cycles, in_a_row)
    classes = LABELS[stream].reshape(cycles, 4, in_a_row)
    assert (classes == classes[:, :, :1]).all()
    assert all(sorted(row) == [0, 1, 2, 4] for row in classes[:, :, 0].tolist())
    one_at_a_time = class_balanced(LABELS, 1, 0, 4 * in_a_row * cycles)
    for k in (0, 1, 2, 4):
        assert np.array_equal(stream[LABELS[stream] == k], one_at_a_time[LABELS[one_at_a_time] == k])


def test_within_class_order_is_uniform():
    labels = np.zeros(3, dtype=np.int64)
    firsts = class_balanced(labels, 5, 0, 3 * 6000).reshape(-1, 3)[:, 0]
    assert np.abs(np.bincount(firsts, minlength=3) / 6000 - 1 / 3).max() < 0.03


def test_every_order_of_the_classes_is_as_frequent():
    labels = np.array([0, 1, 2, 2])
    orders = labels[class_balanced(labels, 5, 0, 3 * 6000)].reshape(-1, 3) @ [9, 3, 1]
    assert np.abs(np.unique(orders, return_counts=True)[1] / 6000 - 1 / 6).max() < 0.02  # four standard deviations


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_reweighted_draws_an_image_in_proportion_to_a_power_of_its_class(exponent):
    counts = np.bincount(LABELS)[LABELS]
    expected = counts**-exponent / (counts**-exponent).sum()
    drawn = np.bincount(Reweighted(exponent)(LABELS, 3, 0, 40_000), minlength=len(LABELS)) / 40_000
    assert np.abs(drawn - expected).max() < 4 * np.sqrt(expected.max() / 40_000)  # four standard deviations
    if exponent == 1:
        by_class = np.bincount(LABELS, drawn)[[0, 1, 2, 4]]
        assert np.abs(by_class - 1 / 4).max() < 0.01


def test_the_streams_are_those_that_the_committed_results_were_trained_with():
    """By the code that trained them: another stream would be another seed of every result, unnoticed."""
    assert class_balanced(LABELS, 7, 0, 8).tolist() == [19, 5, 1, 6, 14, 16, 9, 1]
    assert Reweighted(0.5)(LABELS, 7, 4094, 4098).tolist() == [11, 11, 11, 15]
    assert instance(LABELS, 7, 0, 8).tolist() == [5, 16, 19, 13, 1, 14, 15, 3]
