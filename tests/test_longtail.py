"""Long-tailed subsets: the published sizes, the published selection, and what goes wrong."""

from fractions import Fraction

import numpy as np
import pytest

from tailcal import longtail
from tailcal.errors import UserError


def selected_naively(labels, counts, seed):
    """The published code's selection, in its own shape: the global generator, a list a class."""
    state = np.random.get_state()
    np.random.seed(seed)
    chosen = []
    for cls in np.unique(labels):
        index = np.where(labels == cls)[0]
        np.random.shuffle(index)
        chosen.extend(index[: counts[cls]].tolist())
    np.random.set_state(state)
    return chosen


@pytest.fixture
def labels():
    return np.random.default_rng(3).permutation(np.repeat(np.arange(6), [40, 60, 50, 45, 80, 41]))


@pytest.mark.parametrize(
    ("n_max", "classes", "totals"),
    [
        (5000, 10, {1: 50000, 10: 20431, 50: 13996, 100: 12406, 200: 11203}),
        (500, 100, {1: 50000, 10: 19573, 50: 12608, 100: 10847, 200: 9502}),
    ],
)
def test_published_totals(n_max, classes, totals):
    for factor, total in totals.items():
        counts = longtail.class_counts(n_max, classes, factor, "exponential")
        assert counts.dtype == np.int64
        assert counts.sum() == total
        assert (counts[0], counts[-1]) == (n_max, n_max // factor)


def test_published_counts_of_cifar10():
    counts = longtail.class_counts(5000, 10, 100, "exponential")
    assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_smallest_class_is_the_exact_quotient():
    for n_max in range(200, 2000, 7):
        for factor in (1, 2, 3, 7, 10, 25, 49, 100, 200):
            for classes in (2, 3, 8, 10, 100):
                counts = longtail.class_counts(n_max, classes, factor, "exponential")
                assert counts[-1] == int(Fraction(n_max, factor))
                assert (np.diff(counts) <= 0).all()


def test_powers_that_are_whole_numbers_are_not_floored_below():
    assert longtail.class_counts(1000, 4, 1000, "exponential").tolist() == [1000, 100, 10, 1]
    assert longtail.class_counts(729, 7, 729, "exponential").tolist() == [729, 243, 81, 27, 9, 3, 1]


def test_step_profile():
    assert longtail.class_counts(50, 4, 10, "step").tolist() == [50, 50, 5, 5]
    assert longtail.class_counts(55, 5, 10, "step").tolist() == [55, 55, 5, 5, 5]


@pytest.mark.parametrize("profile", ["exponential", "step"])
def test_largest_factor_is_named_and_works(profile):
    assert longtail.class_counts(40, 3, 40, profile)[-1] == 1
    names = ["cat", "dog", "eel"]
    with pytest.raises(UserError, match=r"keeps no image.*largest factor that works is 40$") as caught:
        longtail.class_counts(40, 3, 41, profile, names)
    assert ("class 2 (eel)" if profile == "exponential" else "class 1 (dog)") in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, 5, 0.5, "exponential"), "factor is 0.5: must be at least 1"),
        ((50, 5, float("nan"), "step"), "must be at least 1"),
        ((50, 1, 10, "exponential"), "at least 2 classes, got 1"),
        ((0, 5, 10, "exponential"), "class 0 keeps no image"),
        ((50, 5, 10, "natural"), "'natural' has no counts"),
    ],
)
def test_bad_profiles(arguments, message):
    with pytest.raises(UserError, match=message):
        longtail.class_counts(*arguments)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("factor", [1, 4, 40])
def test_selection_is_the_published_one(labels, seed, factor):
    counts = longtail.class_counts(40, 6, factor, "exponential")
    train, holdout = longtail.subset_indices(labels, counts, seed)
    assert train.tolist() == selected_naively(labels, counts, seed)
    assert train.dtype == np.int64
    assert len(holdout) == 0
    assert np.bincount(labels[train]).tolist() == counts.tolist()


def test_selection_leaves_the_global_generator_alone(labels):
    before = np.random.get_state()[1].copy()
    longtail.subset_indices(labels, np.full(6, 5))
    assert (np.random.get_state()[1] == before).all()


def test_subsets_nest_and_share_the_holdout(labels):
    previous, held = None, None
    for factor in (1, 2, 5, 30):
        counts = longtail.class_counts(30, 6, factor, "exponential")
        train, holdout = longtail.subset_indices(labels, counts, 0, 10)
        assert not set(train) & set(holdout)
        assert np.bincount(labels[holdout]).tolist() == [10] * 6
        if previous is not None:
            assert set(train) < set(previous)
            assert holdout.tolist() == held
        previous, held = train, holdout.tolist()


def test_holdout_does_not_move_the_training_images(labels):
    counts = longtail.class_counts(30, 6, 5, "exponential")
    with_holdout, _ = longtail.subset_indices(labels, counts, 0, 10)
    without, _ = longtail.subset_indices(labels, counts, 0)
    assert with_holdout.tolist() == without.tolist()


def test_too_few_images_name_the_class(labels):
    with pytest.raises(UserError, match=r"^class 0 \(ant\) has 40 images, too few for 31 \+ 10 held out$"):
        longtail.subset_indices(labels, np.full(6, 31), 0, 10, ["ant", "bee", "cat", "dog", "eel", "fox"])
    with pytest.raises(UserError, match=r"^class 6 has 0 images, too few for 1$"):
        longtail.subset_indices(labels, np.array([1] * 7))


@pytest.mark.parametrize("wrong", [-1, 6])
def test_labels_out_of_range(labels, wrong):
    labels[7] = wrong
    with pytest.raises(UserError, match=r"must lie in 0\.\.5"):
        longtail.subset_indices(labels, np.full(6, 5))


def test_balanced_split(labels):
    rest, aside = longtail.balanced_split(labels, 6, 15, seed=4)
    assert np.bincount(labels[aside]).tolist() == [15] * 6
    assert sorted([*rest, *aside]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(aside) > 0).all()
    assert aside.tolist() == longtail.balanced_split(labels, 6, 15, seed=4)[1].tolist()
    assert aside.tolist() != longtail.balanced_split(labels, 6, 15, seed=5)[1].tolist()
    with pytest.raises(UserError, match="class 0 has 40 images, too few for 41"):
        longtail.balanced_split(labels, 6, 41)


def test_shot_groups_at_their_bounds():
    groups = longtail.shot_groups(np.array([101, 100, 20, 19, 0]))
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, False, False, False, False],
        "medium": [False, True, True, False, False],
        "few": [False, False, False, True, True],
    }
    groups = longtail.shot_groups(longtail.class_counts(500, 100, 100, "exponential"))
    assert [int(mask.sum()) for mask in groups.values()] == [35, 35, 30]


def test_no_images_at_all_name_the_first_class():
    with pytest.raises(UserError, match=r"^class 0 has 0 images, too few for 2$"):
        longtail.subset_indices(np.zeros(0, np.int64), np.array([2, 1]))


def test_the_published_seed_is_the_default(labels):
    counts = np.full(6, 5)
    assert longtail.subset_indices(labels, counts)[0].tolist() == selected_naively(labels, counts, 0)
