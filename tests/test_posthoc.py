"""Post-hoc rules: known answers, identities, and that no rule can see a test label."""

import inspect

import numpy as np
import pytest

from tailcal.errors import UserError
from tailcal.metrics.calibration import nll
from tailcal.metrics.scores import softmax
from tailcal.posthoc import RULES, LogitAdjustment, Temperature, configure, fit_logit_adjustment, fit_temperature

COUNTS = np.array([500, 80, 9])
NOTHING = (np.zeros((0, 3), np.float32), np.zeros(0, np.int64))


def drawn(N: int = 20_000, K: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are calibrated by construction: each label is drawn from its own softmax."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(N, K)) * 2
    labels = (softmax(logits).cumsum(axis=1) < generator.random((N, 1))).sum(axis=1)
    return logits, labels.clip(max=K - 1)


def temperature_of(logits: np.ndarray, labels: np.ndarray) -> float:
    return fit_temperature(Temperature(), COUNTS, logits, labels).numbers["temperature"]


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
    fitted = fit_temperature(Temperature(), COUNTS, logits, labels)
    T = fitted.numbers["temperature"]
    best = nll(fitted(logits), labels)
    assert all(best <= nll(logits / other, labels) for other in (0.5, 1, T * 0.99, T * 1.01, 10))
    np.testing.assert_array_equal(fitted(logits).argmax(1), logits.argmax(1))


def test_temperature_stays_in_its_bounds_when_the_holdout_decides_nothing():
    labels = np.arange(30) % 3
    T = temperature_of(np.eye(3)[labels] * 9, labels)
    assert 0.01 <= T < 1
    assert nll(np.eye(3)[labels] * 9 / T, labels) == 0
    assert temperature_of(np.eye(3)[(labels + 1) % 3] * 9, labels) == pytest.approx(100, rel=1e-3)


def test_temperature_refuses_an_empty_holdout():
    with pytest.raises(ValueError, match="no samples"):
        fit_temperature(Temperature(), COUNTS, *NOTHING)


def test_logit_adjustment_by_hand():
    fitted = fit_logit_adjustment(LogitAdjustment(tau=2.0), np.array([6, 3, 1]), *NOTHING)
    np.testing.assert_allclose(fitted(np.zeros((1, 3))), -2 * np.log([[0.6, 0.3, 0.1]]))
    assert fitted.numbers == {}


def test_logit_adjustment_takes_the_prior_away():
    # p proportional to prior times likelihood: with tau = 1 the likelihood alone remains.
    likelihood = np.array([[0.2, 0.3, 0.5]])
    fitted = fit_logit_adjustment(LogitAdjustment(tau=1.0), COUNTS, *NOTHING)
    np.testing.assert_allclose(softmax(fitted(np.log(likelihood * COUNTS))), likelihood)


def test_no_adjustment_and_equal_counts_change_nothing():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_array_equal(fit_logit_adjustment(LogitAdjustment(tau=0.0), COUNTS, *NOTHING)(logits), logits)
    equal = fit_logit_adjustment(LogitAdjustment(tau=3.0), np.array([7, 7, 7]), *NOTHING)
    np.testing.assert_allclose(softmax(equal(logits)), softmax(logits))


def test_logit_adjustment_refuses_a_class_without_images():
    with pytest.raises(ValueError, match="class 1 has none"):
        fit_logit_adjustment(LogitAdjustment(tau=1.0), np.array([5, 0, 2]), *NOTHING)


@pytest.mark.parametrize("name", RULES)
def test_no_rule_is_handed_the_test_split_to_fit_on(name):
    names = [parameter.lstrip("_") for parameter in inspect.signature(RULES[name].fit).parameters]
    assert names == ["config", "counts_K", "holdout_logits_NK", "holdout_labels_N"]


def test_configure_accepts_what_params_yaml_holds():
    assert configure({"temperature": {}, "logit_adjustment": {"tau": 1.0}}) == {
        "temperature": Temperature(),
        "logit_adjustment": LogitAdjustment(tau=1.0),
    }
    assert configure({}) == {}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"platt": {}}, "params.yaml: evaluate.posthoc.platt: unknown rule: there are logit_adjustment, temperature"),
        ({"temperature": {"T": 1.0}}, "params.yaml: evaluate.posthoc.temperature.T: unknown key"),
        ({"logit_adjustment": {}}, "params.yaml: evaluate.posthoc.logit_adjustment.tau: this key is missing"),
        (
            {"logit_adjustment": {"tau": -1.0}},
            "params.yaml: evaluate.posthoc.logit_adjustment.tau: input should be greater than or equal to 0, got -1.0",
        ),
    ],
)
def test_configure_refuses_in_one_line(blocks, message):
    with pytest.raises(UserError) as error:
        configure(blocks)
    assert str(error.value) == message
