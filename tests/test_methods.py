"""Every equation against a naive loop, a number worked out by hand, or its limiting case."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tailcal.draws import Draws
from tailcal.errors import UserError
from tailcal.method import Batch, configure, load
from tailcal.methods.balanced_softmax import balanced_softmax
from tailcal.methods.mislas import label_aware_smoothing, smoothing_factors
from tailcal.mixing import mixup
from tailcal.models import Network, build
from tailcal.models.heads import Linear
from tailcal.samplers import class_balanced

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
COUNTS = torch.tensor([500, 100, 20, 5])
STANDARD = {"augmentation": "standard"}


def test_mixup_is_the_weighted_sum_of_two_losses():
    images = torch.randn(6, 1, 2, 2, generator=GENERATOR)
    partner = torch.tensor([3, 0, 5, 1, 2, 4])
    mixed, targets = mixup(images, LABELS, partner, 0.3, 4)
    for i in range(6):
        torch.testing.assert_close(mixed[i], 0.3 * images[i] + 0.7 * images[partner[i]])
    two_losses = 0.3 * F.cross_entropy(LOGITS, LABELS) + 0.7 * F.cross_entropy(LOGITS, LABELS[partner])
    torch.testing.assert_close(F.cross_entropy(LOGITS, targets), two_losses)


def test_mixup_with_lambda_one_is_the_plain_batch():
    images = torch.randn(6, 1, 2, 2, generator=GENERATOR)
    mixed, targets = mixup(images, LABELS, torch.randperm(6), 1.0, 4)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(F.cross_entropy(LOGITS, targets), F.cross_entropy(LOGITS, LABELS))


def test_mixup_method_draws_one_lambda_a_batch_and_a_permutation():
    method = load("mixup")(configure("mixup", STANDARD | {"alpha": 1.0}, "representations"), COUNTS)
    images = torch.arange(6.0).reshape(6, 1, 1, 1)
    batch = method.mix([Batch(images, LABELS, LABELS)], Draws(0, 3, torch.Generator()))
    draws = Draws(0, 3, torch.Generator())
    lam, partner = draws.beta(1.0), draws.permutation(6)
    torch.testing.assert_close(batch.images.flatten(), lam * torch.arange(6.0) + (1 - lam) * partner.float())
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(6))
    assert torch.equal(batch.labels, LABELS)


def test_balanced_softmax_naive():
    losses = []
    for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        weighted = [n * math.exp(v) for n, v in zip(COUNTS.tolist(), z, strict=True)]
        losses.append(-math.log(weighted[y] / sum(weighted)))
    assert balanced_softmax(LOGITS, LABELS, COUNTS).item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_balanced_softmax_counts_exactly_where_logits_have_few_bits():
    counts = torch.tensor([5000, 1077, 645, 83])
    few = LOGITS.bfloat16()
    assert torch.equal(balanced_softmax(few, LABELS, counts), balanced_softmax(few.float(), LABELS, counts))


def test_balanced_softmax_with_equal_counts_is_cross_entropy():
    torch.testing.assert_close(balanced_softmax(LOGITS, LABELS, torch.full((4,), 37)), F.cross_entropy(LOGITS, LABELS))


def test_smoothing_factors_by_hand():
    counts = torch.tensor([100, 50, 0])  # u = 1, 1/2, 0
    expected = {
        ("concave", None): math.sin(math.pi / 4),
        ("linear", None): 0.5,
        ("convex", None): 1 - math.sin(math.pi / 4),
        ("exponential", 3.0): 0.125,
        ("exponential", 1.0): 0.5,
    }
    for (shape, power), middle in expected.items():
        factors = smoothing_factors(counts, 0.4, 0.1, shape, power).tolist()
        assert factors == pytest.approx([0.4, 0.1 + 0.3 * middle, 0.1])


@pytest.mark.parametrize("shape", ["concave", "linear", "convex"])
def test_smoothing_factors_as_the_formula_is_written(shape):
    """The paper's form of each shape, class by class; every one falls from head to tail."""
    n_max, n_min, head, tail = 500, 5, 0.4, 0.1
    counts = [500, 360, 40, 6, 5]
    formula = {
        "concave": lambda u: tail + (head - tail) * math.sin(math.pi / 2 * u),
        "linear": lambda u: tail + (head - tail) * u,
        "convex": lambda u: head + (head - tail) * math.sin(3 * math.pi / 2 + math.pi / 2 * u),
    }[shape]
    expected = [formula((n - n_min) / (n_max - n_min)) for n in counts]
    factors = smoothing_factors(torch.tensor(counts), head, tail, shape).tolist()
    assert factors == pytest.approx(expected)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(("shape", "power"), [("concave", 2.0), ("exponential", None), ("stairs", None)])
def test_smoothing_factors_refuse_what_has_no_meaning(shape, power):
    with pytest.raises(ValueError, match="smoothing"):
        smoothing_factors(COUNTS, 0.4, 0.1, shape, power)


def test_smoothing_factors_of_equal_counts_are_the_heads():
    assert smoothing_factors(torch.full((3,), 9), 0.4, 0.1).tolist() == pytest.approx([0.4] * 3)


def test_label_aware_smoothing_naive():
    factors = torch.tensor([0.3, 0.2, 0.1, 0.0])
    losses = []
    for z, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        total = sum(math.exp(v) for v in z)
        minus_log_p = [-math.log(math.exp(v) / total) for v in z]
        e = factors[y].item()
        losses.append((1 - e) * minus_log_p[y] + e * sum(minus_log_p) / 4)
    assert label_aware_smoothing(LOGITS, LABELS, factors).item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_label_aware_smoothing_limits():
    torch.testing.assert_close(label_aware_smoothing(LOGITS, LABELS, torch.zeros(4)), F.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(
        label_aware_smoothing(LOGITS, LABELS, torch.full((4,), 0.1)),
        F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1),
    )


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(1.0, [[0.6, 0.8], [0.0, 1.0]]), (2.0, [[0.12, 0.16], [0.0, 0.5]]), (0.0, [[3.0, 4.0], [0.0, 2.0]])],
)
def test_tau_norm_by_hand(tau, expected):
    network = Network(torch.nn.Identity(), Linear(2, 2))
    network.head.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # norms 5 and 2
    load("tau_norm")(configure("tau_norm", {"tau": tau}, "classifiers"), COUNTS[:2]).setup(network)
    torch.testing.assert_close(network.head.weight.data, torch.tensor(expected))
    assert not network.head.bias.any()


def calibrated(name: str, **settings) -> tuple[Network, Network, torch.nn.Module]:
    """A network before and after the set-up of a classifier method, and the method."""
    torch.manual_seed(0)
    before = build("resnet8", "linear", 1, 4)
    after = build("resnet8", "linear", 1, 4)
    after.load_state_dict(before.state_dict())
    method = load(name)(configure(name, settings, "classifiers"), COUNTS)
    method.setup(after)
    return before.eval(), after.eval(), method


def test_joint_keeps_the_logits():
    before, after, _ = calibrated("joint")
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(before(images), after(images))


def test_tau_zero_is_joint_without_its_bias_and_lws_starts_at_joint():
    images = torch.randn(3, 1, 8, 8)
    before, after, _ = calibrated("tau_norm", tau=0.0)
    torch.testing.assert_close(before(images) - before.head.bias, after(images))
    before, after, _ = calibrated("lws", **STANDARD)
    torch.testing.assert_close(before(images), after(images))


def test_crt_draws_a_fresh_classifier():
    before, after, _ = calibrated("crt", **STANDARD)
    assert after.head.weight.shape == before.head.weight.shape
    assert (after.head.weight - before.head.weight).abs().max() > 0.01


MISLAS = {**STANDARD, "smoothing": "concave", "smooth_head": 0.3, "smooth_tail": 0.0, "lr_factor": 0.2}


def test_shifted_bn_moves_the_running_statistics_and_nothing_else_of_the_backbone():
    images = torch.randn(8, 1, 8, 8) + 3
    for shifted in (False, True):
        before, after, method = calibrated("mislas", **MISLAS, shifted_bn=shifted)
        method.set_mode(after)
        batch = Batch(images, torch.arange(8) % 4, torch.arange(8) % 4)
        loss, _ = method.loss(after, batch, 0.0)
        loss.backward()
        assert all(p.grad is None for p in after.backbone.parameters())
        moved = (after.backbone.bn1.running_mean - before.backbone.bn1.running_mean).abs().max() > 0.01
        assert moved == shifted
        assert torch.equal(after.backbone.conv1.weight, before.backbone.conv1.weight)


@pytest.mark.parametrize("smoothing", ["concave", "linear", "convex"])
def test_mislas_without_smoothing_is_plain_cross_entropy(smoothing):
    settings = MISLAS | {"smoothing": smoothing, "smooth_head": 0.0, "smooth_tail": 0.0, "shifted_bn": False}
    _, network, method = calibrated("mislas", **settings)
    method.set_mode(network)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    gradients = []
    for loss in (
        method.loss(network, Batch(images, labels, labels), 0.0)[0],
        F.cross_entropy(network(images), labels),
    ):
        learning = [p for p in network.parameters() if p.requires_grad]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, learning)])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("said", "in_a_row"), [({}, 1), ({"in_a_row": 4}, 4)])
def test_mislas_draws_as_many_of_a_class_in_a_row_as_it_is_told(said, in_a_row):
    settings = configure("mislas", MISLAS | {"shifted_bn": True} | said, "classifiers")
    (sampler,) = load("mislas")(settings, COUNTS).samplers()
    labels = np.repeat(np.arange(3), [9, 5, 2])
    assert np.array_equal(sampler(labels, 0, 7, 60), class_balanced(labels, 0, 7, 60, in_a_row))


def test_mislas_learns_scales_at_the_full_rate_and_the_classifier_slower():
    torch.manual_seed(0)
    network = build("resnet8", "linear", 1, 4)
    method = load("mislas")(configure("mislas", MISLAS | {"shifted_bn": False}, "classifiers"), COUNTS)
    scales, classifier = method.setup(network)
    assert (scales.lr_factor, classifier.lr_factor) == (1.0, 0.2)
    assert [p.shape for p in scales.parameters] == [(4,)]
    assert [p.shape for p in classifier.parameters] == [(4, 64), (4,)]


@pytest.mark.parametrize(
    ("name", "block", "stage", "says"),
    [
        ("mixup", STANDARD, "representations", "representations.mixup.alpha: this key is missing"),
        ("mixup", {"alpha": 1.0}, "representations", "representations.mixup.augmentation: this key is missing"),
        (
            "ce",
            {"augmentation": "weak"},
            "representations",
            "augmentation: input should be 'standard' or 'strong', got",
        ),
        (
            "mixup",
            STANDARD | {"alpha": 0.0},
            "representations",
            "representations.mixup.alpha: input should be greater than 0, got 0.0",
        ),
        (
            "mixup",
            STANDARD | {"alpha": "1"},
            "representations",
            "representations.mixup.alpha: input should be a valid number, got '1'",
        ),
        ("ce", STANDARD | {"alpha": 1.0}, "representations", "representations.ce.alpha: unknown key"),
        (
            "joint",
            {},
            "representations",
            "params.yaml: representations.joint: joint belongs to classifiers: there are bagmar, balanced_softmax, ce",
        ),
        ("cee", STANDARD, "representations", "representations.cee: no such method: there are bagmar, balanced_softmax"),
        (
            "mine",
            STANDARD | {"method": "cee"},
            "representations",
            "params.yaml: representations.mine.method: no such method: there are bagmar, balanced_softmax, ce, cl",
        ),
        (
            "mine",
            {"method": ["ce"]},
            "representations",
            "representations.mine.method: no such method: there are bagmar",
        ),
        (
            "mine",
            {"method": "crt"},
            "representations",
            "representations.mine.method: crt belongs to classifiers: there are bagmar, balanced_softmax",
        ),
        (
            "mixup",
            STANDARD | {"method": "ce"},
            "representations",
            "representations.mixup: is another method's name: give",
        ),
        (
            "joint",
            STANDARD | {"method": "ce"},
            "representations",
            "representations.joint: is another method's name: give",
        ),
        (
            "mine",
            STANDARD | {"method": "ce", "alpha": 1.0},
            "representations",
            "representations.mine.alpha: unknown key",
        ),
        ("mislas", MISLAS | {"shifted_bn": False, "smooth_tail": 0.9}, "classifiers", "must not be below smooth_tail"),
        (
            "mislas",
            MISLAS | {"shifted_bn": False, "smoothing": "exponential"},
            "classifiers",
            "smoothing exponential needs a power",
        ),
        ("mislas", MISLAS | {"shifted_bn": False, "power": 2.0}, "classifiers", "smoothing concave takes no power"),
    ],
)
def test_a_wrong_block_is_one_line(name, block, stage, says):
    with pytest.raises(UserError) as error:
        configure(name, block, stage)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
