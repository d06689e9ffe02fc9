"""Class weights and the losses that take them, against loops, numbers worked out by hand, and their limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from tailcal.losses import effective_number_weights, generalized_reweight_weights, weighted_cross_entropy
from tailcal.method import load

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(7, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])
COUNTS = torch.tensor([500, 20, 5, 100])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25])


def log_p(logits: list[float], k: int) -> float:
    return logits[k] - math.log(sum(math.exp(z) for z in logits))


def test_weighted_cross_entropy_naive():
    total = weight = 0.0
    for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        total += WEIGHTS[y].item() * -log_p(z, y)
        weight += WEIGHTS[y].item()
    assert weighted_cross_entropy(LOGITS, LABELS, WEIGHTS).item() == pytest.approx(total / weight, rel=1e-5)


def test_weighted_cross_entropy_sees_only_the_ratios_of_the_weights():
    once = weighted_cross_entropy(LOGITS, LABELS, WEIGHTS)
    torch.testing.assert_close(weighted_cross_entropy(LOGITS, LABELS, 100 * WEIGHTS), once)
    torch.testing.assert_close(
        weighted_cross_entropy(LOGITS, LABELS, torch.full((4,), 7.0)), F.cross_entropy(LOGITS, LABELS)
    )
    assert abs(once - F.cross_entropy(LOGITS, LABELS)) > 0.01


def test_weighted_cross_entropy_of_one_image_is_its_cross_entropy():
    for z, y in zip(LOGITS, LABELS, strict=True):
        torch.testing.assert_close(weighted_cross_entropy(z[None], y[None], WEIGHTS), F.cross_entropy(z, y))


def test_weights_keep_their_bits_where_logits_have_few():
    weights = torch.tensor([1.001, 0.999, 1.003, 0.997])
    few = LOGITS.bfloat16()
    expected = weighted_cross_entropy(few.float(), LABELS, weights)
    assert torch.equal(weighted_cross_entropy(few, LABELS, weights), expected)


def test_weighted_cross_entropy_is_as_exact_as_its_logits():
    weights, logits = generalized_reweight_weights(COUNTS, 1.2), LOGITS.double()
    assert weighted_cross_entropy(logits, LABELS, weights).dtype == torch.float64


def test_effective_number_by_hand():
    # beta 1/2: 1 - beta^n = 1/2, 3/4, 7/8, so the weights are as 2 : 4/3 : 8/7 = 42 : 28 : 24, of sum 94
    weights = effective_number_weights(torch.tensor([1, 2, 3]), 0.5)
    assert weights.tolist() == pytest.approx([3 * 42 / 94, 3 * 28 / 94, 3 * 24 / 94])


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-12])
def test_effective_number_naive(beta):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()]
    expected = [4 * w / sum(raw) for w in raw]
    weights = effective_number_weights(COUNTS, beta)
    assert weights.tolist() == pytest.approx(expected)
    assert weights.sum().item() == pytest.approx(4)
    assert weights.dtype == torch.float32


def test_effective_number_limits():
    assert effective_number_weights(COUNTS, 0.0).tolist() == [1, 1, 1, 1]
    assert effective_number_weights(torch.full((3,), 9), 0.99).tolist() == pytest.approx([1, 1, 1])
    inverse = 1 / COUNTS.double()
    expected = (4 * inverse / inverse.sum()).tolist()
    assert effective_number_weights(COUNTS, 1 - 1e-9).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
def test_effective_number_needs_beta_below_one(beta):
    with pytest.raises(ValueError, match="beta must be at least 0 and below 1"):
        effective_number_weights(COUNTS, beta)


def test_generalised_reweighting_by_hand():
    # 1 / pi = 5/4, 5; to the power 1 as 1 : 4, to the power 1/2 as 1 : 2
    assert generalized_reweight_weights(torch.tensor([8, 2]), 1.0).tolist() == pytest.approx([2 / 5, 8 / 5])
    assert generalized_reweight_weights(torch.tensor([8, 2]), 0.5).tolist() == pytest.approx([2 / 3, 4 / 3])


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.2, 3.0])
def test_generalised_reweighting_naive(rho):
    total = COUNTS.sum().item()
    raw = [(1 / (n / total)) ** rho for n in COUNTS.tolist()]
    weights = generalized_reweight_weights(COUNTS, rho)
    assert weights.tolist() == pytest.approx([4 * w / sum(raw) for w in raw])
    assert weights.sum().item() == pytest.approx(4)
    losses = [weights[y].item() * -log_p(z, y) for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)]
    expected = sum(losses) / sum(weights[y].item() for y in LABELS.tolist())
    assert weighted_cross_entropy(LOGITS, LABELS, weights).item() == pytest.approx(expected, rel=1e-5)


def test_generalised_reweighting_limits():
    plain = F.cross_entropy(LOGITS, LABELS)
    assert generalized_reweight_weights(COUNTS, 0.0).tolist() == [1, 1, 1, 1]
    for alike in (generalized_reweight_weights(COUNTS, 0.0), generalized_reweight_weights(torch.full((4,), 3), 1.2)):
        torch.testing.assert_close(weighted_cross_entropy(LOGITS, LABELS, alike), plain)
    # a strength at which (N / n)^rho is beyond float64 leaves all the weight to the rarest class
    assert generalized_reweight_weights(COUNTS, 500.0).tolist() == [0, 0, 4, 0]


def test_a_batch_of_the_most_frequent_class_has_a_loss_at_the_strongest_reweighting():
    strongest = next(m.le for m in load("marc").Config.model_fields["rho"].metadata if hasattr(m, "le"))
    weights = generalized_reweight_weights(torch.tensor([10_000_000, 1]), strongest)
    assert (weights > 0).all()
    loss = weighted_cross_entropy(torch.tensor([[0.5, 1.5]]), torch.tensor([0]), weights)
    assert loss.item() == pytest.approx(math.log(1 + math.e))


def test_generalised_reweighting_needs_a_strength():
    with pytest.raises(ValueError, match="rho must be 0 or more, got -1"):
        generalized_reweight_weights(COUNTS, -1.0)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda counts: effective_number_weights(counts, 0.9999),
        lambda counts: generalized_reweight_weights(counts, 1.2),
    ],
)
def test_counts_without_a_finite_weight_are_named(weigh):
    with pytest.raises(ValueError, match="class 2 has 0 training images"):
        weigh(torch.tensor([9, 4, 0, 0]))
    with pytest.raises(ValueError, match="class 1 has 0 training images"):
        weigh(torch.tensor([9, 0, 1, -3]))
    for few in (torch.tensor([9]), torch.tensor([], dtype=torch.int64), torch.tensor(9), COUNTS[None]):
        with pytest.raises(ValueError, match="two classes or more"):
            weigh(few)
