"""Images that are there twice: which, and how many of each split, against loops over all pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailcal import duplicates


def images(codes):
    """Images [N, 2, 2, 3] that are equal where their codes are, and else differ in one byte."""
    made = np.zeros((len(codes), 2, 2, 3), np.uint8)
    made[:, 1, 0, 2] = codes
    return made


codes = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@given(codes)
def test_digests_are_equal_where_the_pixels_are(found):
    digests = duplicates.digests(images(found))
    assert digests.dtype == np.uint64
    for i, one in enumerate(found):
        assert [digest == digests[i] for digest in digests] == [other == one for other in found]


def test_digests_have_64_bits():
    assert np.bitwise_or.reduce(duplicates.digests(images(range(64)))) == 2**64 - 1


@given(codes)
def test_first_of_each(found):
    first = duplicates.first_of_each(duplicates.digests(images(found)))
    assert first.tolist() == [found.index(code) for code in found]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=12), codes, codes)
def test_count_against_all_pairs(train, holdout, test):
    pixels = [code for code, _ in train]
    expected = {
        "test": sum(code in pixels for code in test),
        "test_holdout": sum(code in holdout for code in test),
        "holdout": sum(code in pixels for code in holdout),
        "train": sum(any(code == other and k != j for other, j in train) for code, k in train),
    }
    digests = (duplicates.digests(images(split)) for split in (pixels, holdout, test))
    train_digests, holdout_digests, test_digests = digests
    labels = np.array([k for _, k in train])
    assert duplicates.count(train_digests, labels, holdout_digests, test_digests) == expected


@pytest.mark.parametrize("holdout", [[], [1]])
def test_without_a_holdout_and_without_duplicates(holdout):
    digests = [duplicates.digests(images(split)) for split in ([0, 2], holdout, [3, 4])]
    found = duplicates.count(digests[0], np.array([0, 1]), digests[1], digests[2])
    assert found == dict.fromkeys(duplicates.TWICE, 0)


def test_a_memory_map_is_read_as_an_array(tmp_path):
    np.save(tmp_path / "images.npy", images([3, 1, 3]))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert duplicates.digests(mapped).tolist() == duplicates.digests(images([3, 1, 3])).tolist()
