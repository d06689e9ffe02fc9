"""Post-hoc rules: known answers, naive loops, identities, and that no rule can see a test label."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import check_grad

from tailcal.errors import UserError
from tailcal.metrics.calibration import ece, nll
from tailcal.metrics.scores import log_softmax, softmax
from tailcal.posthoc import (
    MAX_TAU,
    REACH,
    RULES,
    Fitted,
    Holdout,
    NoSettings,
    Tau,
    configure,
    fit_rule,
    prediction_normalization,
    vector_scaling_nll,
)

COUNTS = np.array([500, 200, 80, 30, 9])
K = len(COUNTS)
NOTHING = (np.zeros((0, K), np.float32), np.zeros(0, np.int64))
WITH_TAU = [name for name, rule in RULES.items() if rule.Config is Tau]
NEEDING_HOLDOUT = {"temperature", "vector_scaling", "class_temperature", "pn_inductive"}


def drawn(N: int = 20_000, K: int = K, seed: int = 0, scale: float = 2) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated by construction: each label is drawn from its own softmax."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(N, K)) * scale
    labels = (softmax(logits).cumsum(axis=1) < generator.random((N, 1))).sum(axis=1)
    return logits, labels.clip(max=K - 1)


def biased(N: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that favour frequent classes by twice the log count ratios, labels that do not."""
    logits, labels = drawn(N, seed=seed)
    return logits + 2 * np.log(COUNTS / COUNTS.sum()), labels


def any_config(name: str, tau: float | str = "tuned") -> NoSettings | Tau:
    """A valid Config of the rule."""
    return Tau(tau=tau) if RULES[name].Config is Tau else NoSettings()


def fit(name: str, logits: np.ndarray, labels: np.ndarray, counts=COUNTS, tau: float | str = "tuned") -> Fitted:
    return fit_rule(name, any_config(name, tau), Holdout(counts, logits, labels))


def temperature_of(logits: np.ndarray, labels: np.ndarray) -> float:
    return fit("temperature", logits, labels).numbers["temperature"]


@pytest.mark.parametrize("T", [0.3, 1.0, 2.5])
def test_temperature_recovers_a_known_one(T):
    logits, labels = drawn()
    assert temperature_of(logits * T, labels) == pytest.approx(T, rel=0.03)


def test_twice_the_logits_take_twice_the_temperature():
    logits, labels = drawn(N=500)
    assert temperature_of(logits * 2, labels) == pytest.approx(2 * temperature_of(logits, labels), rel=1e-5)


def test_temperature_is_the_minimum_of_the_holdout_nll_and_keeps_every_prediction():
    logits, labels = drawn(N=500)
    logits = (logits * 3).astype(np.float32)
    fitted = fit("temperature", logits, labels)
    T = fitted.numbers["temperature"]
    best = nll(fitted(logits), labels)
    assert all(best <= nll(logits / other, labels) for other in (0.5, 1, T * 0.99, T * 1.01, 10))
    np.testing.assert_array_equal(fitted(logits).argmax(1), logits.argmax(1))


def test_temperature_stays_in_its_bounds_where_every_prediction_is_wrong():
    labels = np.arange(30) % K
    assert temperature_of(np.eye(K)[(labels + 1) % K] * 9, labels) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("scale", [0.5, 9, 30])
@pytest.mark.parametrize("name", ["temperature", "vector_scaling", "class_temperature"])
def test_a_holdout_without_a_mistake_vouches_for_no_more_than_the_rule_of_succession(name, scale):
    labels = np.arange(30) % K
    logits = np.eye(K)[labels] * scale * np.linspace(1, 2, 30)[:, None]
    fitted = fit(name, logits, labels)
    assert softmax(fitted(logits)).max(axis=1).mean() == pytest.approx(31 / 32, abs=1e-6)


def test_a_holdout_without_a_mistake_does_not_ruin_what_is_calibrated():
    """By the NLL alone, the temperature would be near 0 and every confidence 1."""
    logits, labels = drawn(scale=20)
    holdouts = [slice(start, start + 60) for start in range(0, len(labels), 60)]
    spared = next(h for h in holdouts if (logits[h].argmax(axis=1) == labels[h]).all())
    after = fit("temperature", logits[spared], labels[spared])(logits)
    assert (logits.argmax(axis=1) == labels).mean() < 0.97
    assert ece(softmax(after), labels) < 0.02 < ece(softmax(after / 0.04), labels)


@pytest.mark.parametrize("scale", [0.1, 1, 3])
def test_vector_scaling_has_the_gradient_it_says(scale):
    logits, labels = drawn(N=50)
    parameters = np.random.default_rng(1).normal(size=2 * K) * scale
    value, gradient = vector_scaling_nll(parameters, logits, labels)
    assert value == pytest.approx(nll(logits * parameters[:K] + parameters[K:], labels))
    error = check_grad(
        lambda x: vector_scaling_nll(x, logits, labels)[0],
        lambda x: vector_scaling_nll(x, logits, labels)[1],
        parameters,
    )
    assert error < 1e-5 * max(1, np.abs(gradient).max())


def test_vector_scaling_recovers_known_weights_and_biases():
    logits, labels = drawn()
    w, b = np.array([0.5, 1.0, 2.0, 3.0, 1.5]), np.array([0.0, 1.0, -2.0, 3.0, 0.5])
    fitted = fit("vector_scaling", (logits - b) / w, labels)
    fresh, _ = drawn(N=200, seed=1)
    assert np.abs(softmax(fitted((fresh - b) / w)) - softmax(fresh)).mean() < 0.005
    assert fitted.numbers == {}


@pytest.mark.parametrize("N", [10, 15, 20])
def test_vector_scaling_goes_no_further_than_its_bound_where_few_samples_would_let_it(N):
    logits, labels = biased(N)
    fitted = fit("vector_scaling", logits, labels)
    mean, std = logits.mean(axis=0), logits.std(axis=0)
    T = temperature_of(logits, labels)
    moved = np.concatenate([(fitted([mean + std]) - fitted([mean]))[0] - std / T, fitted([mean])[0] - mean / T])
    assert np.abs(moved).max() == pytest.approx(REACH)


def test_vector_scaling_is_the_minimum_whatever_the_units():
    logits, labels = biased(N=500)
    logits[:, 2] = 7 * logits[:, 2] + 40
    fitted = fit("vector_scaling", logits, labels)
    best = nll(fitted(logits), labels)
    generator = np.random.default_rng(0)
    for _ in range(20):
        assert best <= nll(fitted(logits) * (1 + 0.02 * generator.normal(size=K)), labels)
        assert best <= nll(fitted(logits) + 0.02 * generator.normal(size=K), labels)
    twice = fit("vector_scaling", 2 * logits, labels)
    np.testing.assert_allclose(softmax(twice(2 * logits)), softmax(fitted(logits)), atol=1e-4)


def test_class_temperature_recovers_known_temperatures():
    logits, labels = drawn()
    u = 2 * np.log(COUNTS / COUNTS[-1]) / np.log(COUNTS[0] / COUNTS[-1]) - 1
    T = np.exp(0.3 + 0.5 * u)
    fitted = fit("class_temperature", logits * T, labels)
    assert fitted.numbers["temperature_head"] == pytest.approx(np.exp(0.8), rel=0.05)
    assert fitted.numbers["temperature_tail"] == pytest.approx(np.exp(-0.2), rel=0.05)
    # The rank is that of the count, not that of the label.
    backward = fit("class_temperature", (logits * T)[:, ::-1], K - 1 - labels, COUNTS[::-1])
    assert backward.numbers == pytest.approx(fitted.numbers, rel=1e-3)


def test_class_temperatures_are_at_most_a_hundred_times_each_others():
    logits, labels = drawn(N=4000)
    u = 2 * np.log(COUNTS / COUNTS[-1]) / np.log(COUNTS[0] / COUNTS[-1]) - 1
    numbers = fit("class_temperature", logits * np.exp(2.6 * u), labels).numbers
    assert numbers["temperature_head"] / numbers["temperature_tail"] == pytest.approx(100, rel=1e-6)


def test_class_temperature_of_equal_counts_is_temperature_scaling():
    logits, labels = biased()
    plain = fit("temperature", logits, labels)
    fitted = fit("class_temperature", logits, labels, np.full(K, 7))
    assert fitted.numbers["temperature_head"] == fitted.numbers["temperature_tail"]
    assert fitted.numbers["temperature_head"] == pytest.approx(plain.numbers["temperature"], rel=1e-4)
    np.testing.assert_allclose(fitted(logits), plain(logits), rtol=1e-4)


def test_class_temperature_of_calibrated_logits_needs_no_slope():
    logits, labels = drawn()
    numbers = fit("class_temperature", 2 * logits, labels).numbers
    assert list(numbers.values()) == pytest.approx([2, 2], rel=0.03)


@pytest.mark.parametrize("name", ["vector_scaling", "class_temperature"])
def test_more_parameters_never_fit_the_holdout_worse_than_one_temperature(name):
    for logits, labels in (biased(N=100), drawn(N=30), (np.eye(K)[np.arange(30) % K] * 9, np.arange(30) % K)):
        plain = fit("temperature", logits, labels)
        assert nll(fit(name, logits, labels)(logits), labels) <= nll(plain(logits), labels) + 1e-12


def test_logit_adjustment_by_hand():
    fitted = fit("logit_adjustment", np.zeros((0, 3)), np.zeros(0, np.int64), np.array([6, 3, 1]), tau=2.0)
    np.testing.assert_allclose(fitted(np.zeros((1, 3))), -2 * np.log([[0.6, 0.3, 0.1]]))


def test_logit_adjustment_takes_the_prior_away():
    # p proportional to prior times likelihood: with tau = 1 the likelihood alone remains.
    likelihood = np.array([[0.1, 0.2, 0.3, 0.3, 0.1]])
    fitted = fit("logit_adjustment", *NOTHING, tau=1.0)
    np.testing.assert_allclose(softmax(fitted(np.log(likelihood * COUNTS))), likelihood)


def test_logit_adjustment_recovers_the_strength_of_a_bias():
    fitted = fit("logit_adjustment", *biased(20_000))
    assert fitted.numbers == {"tau": pytest.approx(2, rel=0.03)}


def naive_normalization(p: np.ndarray, tau: float, sums: np.ndarray) -> np.ndarray:
    """p_ik / s_k^tau, each row divided by its sum, entry by entry."""
    result = np.zeros_like(p)
    for i in range(p.shape[0]):
        total = sum(p[i, k] / sums[k] ** tau for k in range(p.shape[1]))
        for k in range(p.shape[1]):
            result[i, k] = p[i, k] / sums[k] ** tau / total
    return result


def normalized(p: np.ndarray, tau: float, sums: np.ndarray | None = None) -> np.ndarray:
    """The probabilities that `prediction_normalization` gives, of probabilities and sums."""
    with np.errstate(divide="ignore", invalid="ignore"):  # of 0, and of what is no probability
        return softmax(prediction_normalization(np.log(p), tau, None if sums is None else np.log(sums)))


@pytest.mark.parametrize("tau", [0, 0.5, 1, 1.7])
def test_prediction_normalization_is_its_equation(tau):
    p, other = softmax(biased(N=40)[0]), softmax(biased(N=30, seed=1)[0])
    own = [sum(p[i, k] for i in range(40)) for k in range(K)]
    np.testing.assert_allclose(normalized(p, tau), naive_normalization(p, tau, own))
    given = other.sum(axis=0)
    np.testing.assert_allclose(normalized(p, tau, given), naive_normalization(p, tau, given))
    np.testing.assert_allclose(normalized(p, tau, given / 30), naive_normalization(p, tau, given))


def test_prediction_normalization_by_hand():
    p = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])  # sums 2.4 and 1.6
    np.testing.assert_allclose(normalized(p, 1.0)[1], [0.4, 0.6])
    np.testing.assert_allclose(normalized(p, 1.0, np.array([3, 1]))[0], [0.5, 0.5])


def test_prediction_normalization_of_certain_and_of_one_class():
    p = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(normalized(p, 1.5), p)
    np.testing.assert_array_equal(normalized(np.ones((3, 1)), 1.5), np.ones((3, 1)))


@pytest.mark.parametrize(
    ("p", "tau", "sums", "message"),
    [
        (np.zeros((0, 2)), 1.0, None, r"must have shape \[samples, classes\], got \[0, 2\]"),
        (np.array([0.5, 0.5]), 1.0, None, r"must have shape \[samples, classes\], got \[2\]"),
        (np.array([[1.5, -0.5]]), 1.0, None, "each row must sum to 1"),
        (np.array([[2.0, 3.0]]), 1.0, None, "each row must sum to 1"),
        (np.array([[0.0, 0.0]]), 1.0, None, "each row must sum to 1"),
        (np.array([[np.nan, 1.0]]), 1.0, None, "each row must sum to 1"),
        (np.array([[0.5, 0.5]]), -1.0, None, "tau must be a number, 0 or more, got -1"),
        (np.array([[0.5, 0.5]]), np.nan, None, "tau must be a number, 0 or more, got nan"),
        (np.array([[0.5, 0.5]]), np.inf, None, "tau must be a number, 0 or more, got inf"),
        (np.array([[0.5, 0.5]]), 1.0, np.ones(3), r"sums must have shape \[2\] like the classes, got \[3\]"),
        (np.array([[0.5, 0.5]]), 1.0, np.array([1.0, 0.0]), "must be a positive number, that of class 1 is 0"),
        (np.array([[0.5, 0.5]]), 1.0, np.array([np.inf, 1.0]), "must be a positive number, that of class 0 is inf"),
        (np.array([[1.0, 0.0]]), 1.0, None, "must be a positive number, that of class 1 is 0"),
    ],
)
def test_prediction_normalization_refuses(p, tau, sums, message):
    with pytest.raises(ValueError, match=message):
        normalized(p, tau, sums)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_the_pn_rules_are_prediction_normalization_by_their_own_sums(tau):
    holdout, test = biased(N=300), biased(N=200, seed=1)[0].astype(np.float32)
    transductive = fit("pn_transductive", *NOTHING, tau=tau)
    np.testing.assert_allclose(
        softmax(transductive(test)), naive_normalization(softmax(test), tau, softmax(test).sum(axis=0)), atol=1e-12
    )
    inductive = fit("pn_inductive", *holdout, tau=tau)
    sums = softmax(holdout[0]).sum(axis=0)
    np.testing.assert_allclose(softmax(inductive(test)), naive_normalization(softmax(test), tau, sums), atol=1e-12)


@pytest.mark.parametrize("name", ["pn_inductive", "pn_transductive"])
def test_pn_keeps_probabilities_that_no_float_can_hold(name):
    logits = np.array([[0.0, -2000.0], [0.0, -2001.0]])
    result = fit(name, logits, np.array([0, 0]), counts=np.array([2, 1]), tau=1.0)(logits)
    # Relative to its sum over samples, the second class is as likely as any.
    e = np.exp(-1)
    np.testing.assert_allclose(result[:, 1] - result[:, 0], np.log([2 / (1 + e), 2 * e / (1 + e)]))


def test_transductive_pn_is_tuned_with_the_sums_of_the_holdout_and_used_with_those_of_the_test_split():
    logits, labels = biased(N=400)
    test = biased(N=100, seed=1)[0] + np.arange(K)
    fitted = fit("pn_transductive", logits, labels)
    assert fitted.numbers == fit("pn_inductive", logits, labels).numbers
    np.testing.assert_allclose(softmax(fitted(test)), normalized(softmax(test), fitted.numbers["tau"]))


@pytest.mark.parametrize("name", WITH_TAU)
def test_a_tuned_tau_is_the_best_of_a_grid_on_the_holdout(name):
    logits, labels = biased(N=400)
    fitted = fit(name, logits, labels)
    assert 0 < fitted.numbers["tau"] < MAX_TAU
    grid = np.arange(0, MAX_TAU, 0.05)
    values = [nll(fit(name, logits, labels, tau=float(tau))(logits), labels) for tau in grid]
    assert nll(fitted(logits), labels) <= min(values)
    assert fitted.numbers["tau"] == pytest.approx(grid[np.argmin(values)], abs=0.05)
    slopes = np.diff(values)
    assert all(left <= right + 1e-12 for left, right in pairwise(slopes)), "convex, so one valley"


@pytest.mark.parametrize("name", WITH_TAU)
def test_a_fixed_tau_is_no_number_that_was_fitted(name):
    assert fit(name, *biased(N=50), tau=1.0).numbers == {}


@pytest.mark.parametrize("name", WITH_TAU)
def test_tau_0_changes_nothing(name):
    logits, labels = biased(N=50)
    np.testing.assert_allclose(log_softmax(fit(name, logits, labels, tau=0.0)(logits)), log_softmax(logits), atol=1e-12)


@pytest.mark.parametrize("tau", [0.7, 3.0])
def test_equal_counts_and_equal_sums_change_nothing(tau):
    logits, labels = drawn(N=50)
    np.testing.assert_allclose(
        softmax(fit("logit_adjustment", *NOTHING, np.full(K, 7), tau)(logits)), softmax(logits), atol=1e-12
    )
    # Every cyclic shift of every row: all classes are predicted equally often.
    logits = np.concatenate([np.roll(logits, shift, axis=1) for shift in range(K)])
    for name in ("pn_inductive", "pn_transductive"):
        np.testing.assert_allclose(
            softmax(fit(name, logits, np.tile(labels, K), tau=tau)(logits)), softmax(logits), atol=1e-12
        )


@pytest.mark.parametrize("name", RULES)
def test_no_rule_is_handed_the_test_split_to_fit_on(name):
    names = [parameter.lstrip("_") for parameter in inspect.signature(RULES[name].fit).parameters]
    assert names == ["holdout", *RULES[name].Config.model_fields]
    assert Holdout._fields == ("counts", "logits", "labels")
    assert list(inspect.signature(Fitted.__call__).parameters) == ["self", "logits_NK"]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_transductive_just_when_other_samples_change_a_prediction(name):
    fitted = fit(name, *biased(N=200))
    test = biased(N=60, seed=1)[0]
    alone = np.concatenate([softmax(fitted(half)) for half in (test[:20], test[20:])])
    assert RULES[name].transductive == (not np.allclose(alone, softmax(fitted(test)), atol=1e-9))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_needs_a_holdout_just_when_it_fails_without(name):
    for tau in (1.0, "tuned"):
        needed = RULES[name].needs_holdout(any_config(name, tau))
        assert needed == (name in NEEDING_HOLDOUT or tau == "tuned")
        if needed:
            with pytest.raises(ValueError, match="no samples"):
                fit(name, *NOTHING, tau=tau)
        else:
            assert np.isfinite(fit(name, *NOTHING, tau=tau)(biased(N=20)[0])).all()


@pytest.mark.parametrize("name", RULES)
def test_one_sample_without_its_axis_is_refused(name):
    logits, labels = biased(N=50)
    with pytest.raises(ValueError, match=r"logits must have shape \[samples, 5\], got \[5\]"):
        fit(name, logits, labels)(logits[0])


@pytest.mark.parametrize("name", RULES)
def test_another_number_of_classes_is_refused(name):
    logits, labels = biased(N=50)
    with pytest.raises(ValueError, match=r"logits must have shape \[samples, 5\], got \[50, 4\]"):
        fit(name, logits, labels)(logits[:, :4])
    with pytest.raises(ValueError, match=r"logits must have shape \[samples, 5\], got \[0, 5\]"):
        fit(name, logits, labels)(logits[:0])
    with pytest.raises(ValueError, match="held-out logits of 5 classes, counts of 6"):
        fit(name, logits, labels, counts=np.append(COUNTS, 1))


@pytest.mark.parametrize("name", ["logit_adjustment", "class_temperature"])
def test_a_class_without_images_is_refused(name):
    with pytest.raises(ValueError, match="class 1 has none"):
        fit(name, *biased(N=50), counts=np.array([5, 0, 2, 2, 2]))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (biased(N=40)[0], np.zeros(40, np.int64)),  # one class alone
        (biased(N=40)[0], np.full(40, K - 1)),
        (np.eye(K)[np.arange(40) % K] * 30, np.arange(40) % K),  # separable
        (np.eye(K)[np.arange(40) % K] * 30, (np.arange(40) + 1) % K),  # always wrong
        (np.zeros((40, K)), np.arange(40) % K),  # without information
        (biased(N=1)[0], np.array([3])),
        (1e4 * biased(N=40)[0].astype(np.float32), np.arange(40) % K),
    ],
    ids=["head", "tail", "separable", "wrong", "constant", "single", "huge"],
)
def test_a_holdout_that_decides_little_still_gives_finite_logits(name, logits, labels):
    fitted = fit(name, logits, labels)
    assert np.isfinite(fitted(biased(N=30, seed=1)[0])).all()
    assert np.isfinite(list(fitted.numbers.values())).all()
    if not (logits.argmax(axis=1) == labels).all():
        assert nll(fitted(logits), labels) <= nll(logits, labels) + 1e-6


@pytest.mark.parametrize("name", RULES)
def test_two_fits_give_the_same_bits(name):
    logits, labels = biased(N=100)
    np.testing.assert_array_equal(fit(name, logits, labels)(logits), fit(name, logits, labels)(logits))


def test_configure_accepts_what_params_yaml_may_hold():
    blocks = {"temperature": {}, "logit_adjustment": {"tau": 1}, "pn_transductive": {"tau": "tuned"}}
    assert configure(blocks) == {
        "temperature": NoSettings(),
        "logit_adjustment": Tau(tau=1.0),
        "pn_transductive": Tau(tau="tuned"),
    }
    assert configure({}) == {}


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].Config is Tau])
def test_the_largest_tau_leaves_numbers(name):
    configure({name: {"tau": 100}})
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(40, 3)) * 50, generator.integers(0, 3, 40)
    changed = fit(name, logits, labels, np.array([10**6, 10, 1]), tau=100.0)(logits)
    assert np.isfinite(changed).all()
    assert np.isfinite(nll(changed, labels))


RIGHT_TAU = "must be a number from 0 to 100, or the word tuned"


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"platt": {}},
            "platt: unknown rule: there are class_temperature, logit_adjustment, pn_inductive, pn_transductive, "
            "temperature, vector_scaling",
        ),
        ({"temperature": {"T": 1.0}}, "temperature.T: unknown key: there are none"),
        ({"vector_scaling": {"tau": 1.0}}, "vector_scaling.tau: unknown key: there are none"),
        ({"logit_adjustment": {}}, "logit_adjustment.tau: this key is missing"),
        ({"logit_adjustment": {"tau": -1.0}}, f"logit_adjustment.tau: {RIGHT_TAU}, got -1.0"),
        ({"pn_inductive": {"tau": "best"}}, f"pn_inductive.tau: {RIGHT_TAU}, got 'best'"),
        ({"pn_inductive": {"tau": True}}, f"pn_inductive.tau: {RIGHT_TAU}, got True"),
        ({"pn_inductive": {"tau": None}}, f"pn_inductive.tau: {RIGHT_TAU}, got None"),
        ({"pn_transductive": {"tau": float("nan")}}, f"pn_transductive.tau: {RIGHT_TAU}, got nan"),
        ({"pn_transductive": {"tau": 10**400}}, f"pn_transductive.tau: {RIGHT_TAU}, got 1{'0' * 400}"),
        ({"pn_transductive": {"tau": float("inf")}}, f"pn_transductive.tau: {RIGHT_TAU}, got inf"),
        ({"logit_adjustment": {"tau": 101}}, f"logit_adjustment.tau: {RIGHT_TAU}, got 101"),
    ],
)
def test_configure_refuses_in_one_line(blocks, message):
    with pytest.raises(UserError) as error:
        configure(blocks)
    assert str(error.value) == f"params.yaml: evaluate.posthoc.{message}"
