"""Focal loss, class-balanced loss, logit adjustment and LDAM-DRW: loops over samples, hand-made numbers, limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tailcal.losses import effective_number_weights
from tailcal.method import Batch, Method, load
from tailcal.methods.balanced_softmax import balanced_softmax
from tailcal.methods.focal import focal
from tailcal.methods.ldam_drw import margins, subtract_margins
from tailcal.methods.logit_adjustment import log_priors
from tailcal.models import Network, build
from tailcal.models.heads import CosineClassifier

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(8, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3, 2])
IMAGES = torch.randn(8, 1, 8, 8, generator=GENERATOR)
COUNTS = torch.tensor([500, 16, 5, 100])
BATCH = Batch(IMAGES, LABELS, LABELS)
SETTINGS = {
    "focal": {"gamma": 1.0},
    "class_balanced": {"beta": 0.9999},
    "logit_adjustment": {"tau": 1.0},
    "ldam_drw": {"max_margin": 0.5, "scale": 30.0, "beta": 0.9999, "drw_start": 0.8},
}


def at(progress: float) -> torch.Tensor:
    """The share of the epochs that is over, as a training step gets it."""
    return torch.tensor(progress, dtype=torch.float64)


def config(name: str, **settings):
    return load(name).Config(augmentation="standard", **SETTINGS[name] | settings)


def prepared(name: str, counts: torch.Tensor = COUNTS, **settings) -> tuple[Network, Method]:
    """A network ready to train by a method, in evaluation mode: batch norm then leaves no trace between two calls."""
    torch.manual_seed(0)
    network = build("resnet8", "linear", 1, len(counts))
    method = load(name)(config(name, **settings), counts)
    method.setup(network)
    return network.eval(), method


def log_p(logits: list[float], k: int) -> float:
    return logits[k] - math.log(sum(math.exp(z) for z in logits))


def rows(logits: torch.Tensor):
    return zip(logits.tolist(), LABELS.tolist(), strict=True)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_naive(gamma):
    losses = [(1 - math.exp(log_p(z, y))) ** gamma * -log_p(z, y) for z, y in rows(LOGITS)]
    assert focal(LOGITS, LABELS, gamma).item() == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_focal_by_hand():
    # p_y = 3/4: (1/4)^2 log(4/3)
    logits = torch.tensor([[math.log(3.0), 0.0]])
    assert focal(logits, torch.tensor([0]), 2.0).item() == pytest.approx(math.log(4 / 3) / 16)


def test_focal_with_gamma_zero_is_cross_entropy():
    torch.testing.assert_close(focal(LOGITS, LABELS, 0.0), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_gradient_where_p_rounds_to_one(gamma):
    """(1 - p)^0.5 has an infinite slope at p = 1, which float32 reaches at a logit of 17 or so."""
    logits = torch.tensor([[90.0, 0.0, 0.0], [0.0, 90.0, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0, 0]), gamma).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().max() < 1e-6
    torch.testing.assert_close(logits.grad[1], torch.tensor([-0.5, 0.5, 0.0]))


def test_focal_gradient_is_that_of_the_plain_formula():
    stable, plain = LOGITS.double().requires_grad_(), LOGITS.double().requires_grad_()
    focal(stable, LABELS, 2.0).backward()
    p = plain.softmax(dim=1)[torch.arange(8), LABELS]
    ((1 - p) ** 2 * -p.log()).mean().backward()
    torch.testing.assert_close(stable.grad, plain.grad)


def test_focal_method():
    network, method = prepared("focal", gamma=2.0)
    loss, logits = method.loss(network, BATCH, at(0.0))
    assert torch.equal(logits, network(IMAGES))
    torch.testing.assert_close(loss, focal(logits, LABELS, 2.0))
    assert abs(loss - F.cross_entropy(logits, LABELS)) > 0.01


def test_class_balanced_naive():
    network, method = prepared("class_balanced", beta=0.99)
    loss, logits = method.loss(network, BATCH, at(0.0))
    weights = [(1 - 0.99) / (1 - 0.99**n) for n in COUNTS.tolist()]
    total = sum(weights[y] * -log_p(z, y) for z, y in rows(logits))
    assert loss.item() == pytest.approx(total / sum(weights[y] for y in LABELS.tolist()), rel=1e-5)


@pytest.mark.parametrize(
    ("counts", "beta"), [(COUNTS, 0.0), (torch.full((4,), 12), 0.9999)], ids=["beta zero", "equal counts"]
)
def test_class_balanced_limits_are_cross_entropy(counts, beta):
    network, method = prepared("class_balanced", counts, beta=beta)
    loss, logits = method.loss(network, BATCH, at(0.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS))


def test_log_priors_by_hand():
    assert log_priors(torch.tensor([6, 2])).tolist() == pytest.approx([math.log(0.75), math.log(0.25)])


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_naive(tau):
    network, method = prepared("logit_adjustment", tau=tau)
    loss, logits = method.loss(network, BATCH, at(0.0))
    assert torch.equal(logits, network(IMAGES)), "the test logits are not shifted"
    pi = [n / sum(COUNTS.tolist()) for n in COUNTS.tolist()]
    shifted = [[v + tau * math.log(p) for v, p in zip(z, pi, strict=True)] for z in logits.tolist()]
    expected = sum(-log_p(z, y) for z, y in zip(shifted, LABELS.tolist(), strict=True)) / 8
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_logit_adjustment_at_one_is_balanced_softmax_and_at_zero_cross_entropy():
    network, method = prepared("logit_adjustment", tau=1.0)
    loss, logits = method.loss(network, BATCH, at(0.0))
    torch.testing.assert_close(loss, balanced_softmax(logits, LABELS, COUNTS))
    network, method = prepared("logit_adjustment", tau=0.0)
    loss, logits = method.loss(network, BATCH, at(0.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS))
    network, method = prepared("logit_adjustment", torch.full((4,), 3), tau=1.0)
    loss, logits = method.loss(network, BATCH, at(0.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS))


def test_margins_by_hand():
    # fourth roots 3, 2, 1
    assert margins(torch.tensor([81, 16, 1]), 0.6).tolist() == pytest.approx([0.2, 0.3, 0.6])


def test_margins_go_by_the_counts_and_not_by_the_labels():
    raw = [n**-0.25 for n in COUNTS.tolist()]
    assert margins(COUNTS, 0.5).tolist() == pytest.approx([0.5 * m / max(raw) for m in raw])
    assert margins(COUNTS, 0.5).argmax() == 2
    assert margins(torch.full((3,), 40), 0.5).tolist() == [0.5, 0.5, 0.5]
    assert margins(COUNTS, 0.0).tolist() == [0, 0, 0, 0]


def test_a_margin_is_taken_off_the_label_alone():
    adjusted = subtract_margins(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(adjusted, torch.tensor([[1.0, 1.9], [2.5, 4.0]]))


def test_ldam_gives_the_network_a_scaled_cosine_head():
    network, _ = prepared("ldam_drw", scale=20.0)
    assert isinstance(network.head, CosineClassifier)
    assert network.head.scale.tolist() == [20.0] * 4
    features = network.backbone(IMAGES)
    expected = 20 * F.cosine_similarity(features[:, None], network.head.direction[None], dim=2)
    torch.testing.assert_close(network(IMAGES), expected)


def naive_ldam(network: Network, weights: list[float]) -> float:
    """As the authors wrote it: cosines, the margin off the label's, times the scale, weighted mean."""
    m = [0.5 * (n / 5) ** -0.25 for n in COUNTS.tolist()]
    total = 0.0
    for cosines, y in rows(network(IMAGES) / 30):
        z = [30 * (c - m[y] * (k == y)) for k, c in enumerate(cosines)]
        total += weights[y] * -log_p(z, y)
    return total / sum(weights[y] for y in LABELS.tolist())


def test_ldam_naive_and_drw_switches_at_its_start():
    network, method = prepared("ldam_drw")
    before = [naive_ldam(network, [1.0] * 4)] * 3
    after = [naive_ldam(network, [1e-4 / (1 - 0.9999**n) for n in COUNTS.tolist()])] * 3
    early, late = [0.0, 159 / 200, math.nextafter(0.8, 0)], [160 / 200, 161 / 200, 199 / 200]
    assert [method.loss(network, BATCH, at(p))[0].item() for p in early] == pytest.approx(before, rel=1e-4)
    assert [method.loss(network, BATCH, at(p))[0].item() for p in late] == pytest.approx(after, rel=1e-4)
    assert abs(before[0] - after[0]) > 0.01


def test_ldam_switches_after_four_fifths_of_the_epochs_whatever_their_number():
    network, method = prepared("ldam_drw")
    deferred = method.loss(network, BATCH, at(0.0))[0]
    for epochs in (5, 10, 60, 200):
        start = epochs * 4 // 5
        losses = [method.loss(network, BATCH, at(epoch / epochs))[0] for epoch in (start - 1, start, epochs - 1)]
        assert [bool(loss != deferred) for loss in losses] == [False, True, True]


def test_ldam_without_a_margin_is_cross_entropy_on_the_cosine_logits():
    network, method = prepared("ldam_drw", max_margin=0.0)
    loss, logits = method.loss(network, BATCH, at(0.0))
    assert torch.equal(logits, network(IMAGES))
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS))
    weights = effective_number_weights(COUNTS, 0.9999)
    torch.testing.assert_close(method.loss(network, BATCH, at(0.9))[0], F.cross_entropy(logits, LABELS, weight=weights))


def test_a_margin_makes_the_loss_larger_and_leaves_the_test_logits_alone():
    network, method = prepared("ldam_drw")
    loss, logits = method.loss(network, BATCH, at(0.0))
    assert torch.equal(logits, network(IMAGES))
    assert loss > F.cross_entropy(logits, LABELS) + 1


@pytest.mark.parametrize("public", [log_priors, lambda counts: margins(counts, 0.5)])
def test_an_empty_class_is_named(public):
    with pytest.raises(ValueError, match="class 1 has 0 training images"):
        public(torch.tensor([9, 0, 4]))
    with pytest.raises(ValueError, match="two classes or more"):
        public(torch.tensor([9]))


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="max_margin must be 0 or more"):
        margins(COUNTS, -0.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_goes_down_and_trains_the_whole_network(name):
    network, method = prepared(name)
    (group,) = method.setup(network)
    assert {id(p) for p in group.parameters} == {id(p) for p in network.parameters()}
    before, _ = method.loss(network, BATCH, at(0.0))
    gradients = torch.autograd.grad(before, group.parameters)
    with torch.no_grad():
        for parameter, gradient in zip(group.parameters, gradients, strict=True):
            assert gradient.abs().sum() > 0
            parameter -= 1e-4 * gradient
    assert method.loss(network, BATCH, at(0.0))[0] < before


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_of_one_image_has_a_finite_loss(name):
    network, method = prepared(name)
    loss, logits = method.loss(network, Batch(IMAGES[:1], LABELS[:1], LABELS[:1]), at(0.9))
    assert loss.isfinite()
    assert logits.shape == (1, 4)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_stays_on_its_device_and_waits_for_nothing(name):
    """The meta device has no values: it refuses an operand from elsewhere, and to be read."""
    network, method = prepared(name)
    network, method = network.to("meta"), method.to("meta")
    for progress in (0.0, 0.9):
        loss, _ = method.loss(network, Batch(IMAGES.to("meta"), LABELS.to("meta"), LABELS.to("meta")), at(progress))
        loss.backward()
        assert loss.device.type == "meta"


@pytest.mark.parametrize("name", SETTINGS)
def test_constants_are_no_part_of_a_checkpoint(name):
    assert not prepared(name)[1].state_dict()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("focal", "gamma", -1.0),
        ("class_balanced", "beta", 1.0),
        ("class_balanced", "beta", -0.1),
        ("logit_adjustment", "tau", -1.0),
        ("ldam_drw", "max_margin", -0.5),
        ("ldam_drw", "scale", 0.0),
        ("ldam_drw", "scale", 1e7),
        ("ldam_drw", "beta", 1.0),
        ("ldam_drw", "drw_start", 1.1),
    ],
)
def test_a_setting_out_of_range_is_refused(name, key, value):
    config(name)
    with pytest.raises(ValidationError, match=key):
        config(name, **{key: value})
