"""BaGMar, GLMC and FSGL against loops over samples and classes, step by step as their authors wrote them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tailcal import params, settings
from tailcal.draws import Draws, derive
from tailcal.method import Batch, load
from tailcal.methods.bagmar import accumulate, adjust
from tailcal.methods.fsgl import consistency, feature_scale, scaling_factors
from tailcal.mixing import box, cutmix
from tailcal.models import build
from tailcal.samplers import Reweighted, instance
from tests.conftest import ROOT

COUNTS = torch.tensor([500, 5, 20, 100])
BAGMAR = {"augmentation": "standard", "lambda1": 1.0, "accumulation": "total"}
FSGL = {
    "augmentation": "standard",
    "gamma": 0.5,
    "label_weighting": 1.2,
    "sampling": 0.0,
    "hidden": 8,
    "consistency": 4.0,
}


def batches(steps: int, size: int = 6, classes: int = 4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(size, classes, generator=generator), torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize("accumulation", ["total", "gradient"])
def test_bagmar_against_the_papers_table(accumulation):
    """The K x K tables, filled sample by sample with autograd's gradient; the labels' negative gradients as well."""
    method = load("bagmar")(load("bagmar").Config(**BAGMAR | {"accumulation": accumulation}), COUNTS)
    table, total = np.zeros((4, 4)), np.zeros((4, 4))
    for logits, labels in batches(5):
        source = total if accumulation == "total" else table
        adjusted = logits.double().requires_grad_()
        with torch.no_grad():
            for j in range(4):
                adjusted[:, j] += math.log(source[j, j] + 1e-3)
        loss = F.cross_entropy(adjusted, labels)
        (gradient,) = torch.autograd.grad(loss, adjusted)
        torch.testing.assert_close(method.adjusted(logits).double(), adjusted.detach(), rtol=1e-5, atol=1e-5)
        method.observe(logits, Batch(logits, labels, labels))
        for i, y in enumerate(labels.tolist()):
            for j in range(4):
                table[j, y] += abs(gradient[i, j].item())
        total += table
        np.testing.assert_allclose(method.gradient.numpy(), np.diag(table), rtol=1e-4)
        np.testing.assert_allclose(method.total.numpy(), np.diag(total), rtol=1e-4)


def test_bagmar_leaves_out_a_term_that_softmax_does_not_see():
    (logits, labels), negative = next(batches(1)), torch.tensor([0.3, 2.0, 0.1, 5.0])
    whole = adjust(logits, torch.rand(4), 1.0)
    torch.testing.assert_close(
        F.cross_entropy(whole - 0.7 * torch.log(negative[labels] + 1e-3)[:, None], labels),
        F.cross_entropy(whole, labels),
    )


def test_bagmar_limits():
    logits, labels = next(batches(1))
    assert torch.equal(adjust(logits, torch.rand(4), 0.0), logits)
    equal = adjust(logits, torch.full((4,), 3.0), 1.2)
    torch.testing.assert_close(F.cross_entropy(equal, labels), F.cross_entropy(logits, labels))
    method = load("bagmar")(load("bagmar").Config(**BAGMAR), COUNTS)
    images = torch.randn(6, 1, 8, 8)
    network = build("resnet8", "linear", 1, 4)
    loss, plain = method.loss(network, Batch(images, labels, labels), 0.0)  # all gradients are still zero
    torch.testing.assert_close(loss, F.cross_entropy(plain, labels))


def test_bagmar_counts_a_class_that_is_absent_from_the_batch_as_nothing():
    gradient, total = torch.zeros(3), torch.zeros(3)
    accumulate(gradient, total, torch.zeros(2, 3), torch.tensor([1, 1]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2 / 3, 0.0]))
    accumulate(gradient, total, torch.zeros(1, 3), torch.tensor([2]))
    torch.testing.assert_close(total, torch.tensor([0.0, 4 / 3, 2 / 3]))


def test_scaling_factors_by_hand():
    # Ranks by count: class 0 is 0th, class 3 is 1st, class 2 is 2nd, class 1 is 3rd; 1.5 - 0.5 rank / 4, two decimals.
    assert scaling_factors(COUNTS, 0.5).tolist() == pytest.approx([1.5, 1.12, 1.25, 1.38])
    assert scaling_factors(COUNTS, 0.0).tolist() == [1.0] * 4
    assert scaling_factors(torch.tensor([7, 7, 0]), 1.0).tolist() == pytest.approx([2.0, 1.67, 1.33])


def test_feature_scale_against_a_loop():
    features, targets = torch.randn(5, 3), torch.rand(5, 4).softmax(1)
    factors = scaling_factors(COUNTS, 1.0)
    expected = features.clone()
    for i in range(5):
        expected[i] *= sum(targets[i, k] * factors[k] for k in range(4))
    torch.testing.assert_close(feature_scale(features, targets, factors), expected)


def test_consistency_lets_no_gradient_into_the_projection():
    p, z = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    value = consistency(p, z)
    naive = [(p[i] @ z[i] / p[i].norm() / z[i].norm()).item() for i in range(3)]
    assert value.item() == pytest.approx(-sum(naive) / 3, rel=1e-5)
    value.backward()
    assert z.grad is None


def test_cutmix_against_a_loop():
    images, others = torch.zeros(2, 1, 6, 8), torch.ones(2, 1, 6, 8)
    rng = np.random.default_rng(0)
    for _ in range(200):
        lam, (row, column) = rng.random(), (int(rng.integers(6)), int(rng.integers(8)))
        height, width = math.ceil(6 * math.sqrt(1 - lam)), math.ceil(8 * math.sqrt(1 - lam))
        expected = np.zeros((6, 8))
        for i in range(row - height // 2, row + height // 2):
            for j in range(column - width // 2, column + width // 2):
                if 0 <= i < 6 and 0 <= j < 8:
                    expected[i, j] = 1
        result = cutmix(images, others, box(lam, (row, column), 6, 8))
        assert all(np.array_equal(image[0].numpy(), expected) for image in result)


def pieces(**settings):
    torch.manual_seed(0)
    method = load("fsgl")(load("fsgl").Config(**FSGL | settings), COUNTS)
    network = build("resnet8", "linear", 1, 4).double()
    method.setup(network)
    network.double()
    images = [torch.randn(6, 1, 8, 8, dtype=torch.double) for _ in range(4)]
    one, other = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([0, 0, 1, 3, 2, 1])
    given = [Batch(image, y, y) for image, y in zip(images, (one, one, other, other), strict=True)]
    return method, network.eval(), given  # evaluation mode: batch norm would tie the samples to each other


@pytest.mark.parametrize(("gamma", "progress"), [(0.5, 0.25), (1.0, 0.9), (0.0, 0.0)])
def test_fsgl_against_a_loop_over_samples(gamma, progress):
    method, network, given = pieces(gamma=gamma)
    batch = method.mix(given, Draws(0, 5, torch.Generator()))
    loss, logits = method.loss(network, batch, progress)

    generator = np.random.default_rng(derive(0, "host", 5))
    lam, centre = generator.beta(1.0, 1.0), (int(generator.integers(8)), int(generator.integers(8)))
    top, bottom, left, right = box(lam, centre, 8, 8)
    heads, weights = network.head, COUNTS.double() ** -1.2
    weights /= weights.mean()
    ranks = {0: 0, 3: 1, 2: 2, 1: 3}
    a, losses, terms, first = 1 - progress**2, [], [], []
    for i in range(6):
        y, other = int(given[0].labels[i]), int(given[2].labels[i])
        mix = lam * given[0].images[i] + (1 - lam) * given[2].images[i]
        cut = given[1].images[i].clone()
        cut[:, top:bottom, left:right] = given[3].images[i][:, top:bottom, left:right]
        scale = sum(share * round(1 + gamma - gamma * ranks[k] / 4, 2) for k, share in ((y, lam), (other, 1 - lam)))
        value, projected = 0.0, []
        for view in (mix, cut):
            f = network.backbone(view[None]) * scale
            plain, rebalanced = heads.plain(f).log_softmax(1)[0], heads.rebalanced(f).log_softmax(1)[0]
            value += a * -(lam * plain[y] + (1 - lam) * plain[other])
            value += (1 - a) * -(lam * weights[y] * rebalanced[y] + (1 - lam) * weights[other] * rebalanced[other])
            projected.append((heads.projector(f)[0], heads.predictor(heads.projector(f))[0]))
            if view is mix:
                first.append(heads.rebalanced(f)[0])
        (z_mix, p_mix), (z_cut, p_cut) = projected
        losses.append(value)
        terms.append(-F.cosine_similarity(p_mix, z_cut, dim=0) - F.cosine_similarity(p_cut, z_mix, dim=0))
    torch.testing.assert_close(method.ascent_loss(network, batch, progress), sum(losses) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, (sum(losses) + 4 * sum(terms)) / 6, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, torch.stack(first))
    assert torch.equal(batch.labels, given[0].labels)
    torch.testing.assert_close(batch.targets.sum(1), torch.ones(6))


def test_glmc_is_fsgl_without_feature_scaling():
    p = params.load(ROOT / "params.yaml")
    glmc, fsgl = (settings.training(p, "digits_lt", name, "representations", ROOT) for name in ("glmc", "fsgl"))
    assert (glmc.method, glmc.settings.gamma, glmc.recipe.sam_rho) == ("fsgl", 0.0, 0.0)
    assert (fsgl.method, fsgl.settings.gamma > 0, fsgl.recipe.sam_rho > 0) == ("fsgl", True, True)
    for gamma in (0.0, 1.0):
        method, _, _ = pieces(gamma=gamma)
        assert torch.equal(method.factors, torch.ones(4)) == (gamma == 0)


def test_fsgl_is_used_with_its_rebalanced_classifier_unscaled():
    method, network, _ = pieces()
    images = torch.randn(3, 1, 8, 8, dtype=torch.double)
    expected = network.head.rebalanced(network.backbone(images))
    method.finish(network)
    assert torch.equal(network(images), expected)
    assert set(network.head.state_dict()) == {"weight", "bias"}


def test_fsgl_draws_the_first_batch_uniformly_and_the_second_reweighted():
    method = load("fsgl")(load("fsgl").Config(**FSGL | {"sampling": 0.7}), COUNTS)
    assert method.samplers() == (instance, Reweighted(0.7))
