"""SGD against torch's own, SAM against its algorithm by hand, schedules against the numbers in the papers."""

import math

import pytest
import torch

from tailcal.budget import Budget
from tailcal.method import ParameterGroup
from tailcal.optim import SAM, SGD, learning_rate, optimiser
from tailcal.params import Recipe

RISE = {"warmup": 5, "warmup_lr": 0.02}


def recipe(**changes) -> Recipe:
    values = {
        "epochs": 200,
        "batch_size": 128,
        "last_batch": "fill",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "sam_rho": 0.0,
        "schedule": {"shape": "multistep", **RISE, "milestones": [160, 180], "gamma": 0.1},
    }
    return Recipe.model_validate({key: value for key, value in (values | changes).items() if value is not None})


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_sgd_is_torch_sgd():
    ours, theirs = parameters((3, 2), (4,)), parameters((3, 2), (4,))
    sgd = SGD([ParameterGroup([ours[0]]), ParameterGroup([ours[1]], lr_factor=0.2)], 0.9, 0.01)
    reference = torch.optim.SGD(
        [{"params": [theirs[0]], "lr": 0.1}, {"params": [theirs[1]], "lr": 0.02}], momentum=0.9, weight_decay=0.01
    )
    for step in range(5):
        loss, logits = sgd.step(0.1, lambda step=step: (sum(((p - step) ** 2).sum() for p in ours), ours[1]), None)
        assert not loss.requires_grad
        assert not logits.requires_grad
        reference.zero_grad()
        sum(((p - step) ** 2).sum() for p in theirs).backward()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_sam_is_algorithm_1():
    """Two losses, as in FSGL: the ascent leaves a part out, and one parameter with it."""
    ours, (w, v) = parameters((3,), (2,)), (p.detach().double() for p in parameters((3,), (2,)))
    sam = SAM([ParameterGroup(ours)], 0.9, 0.01, rho=0.3)
    momentum_w, momentum_v = torch.zeros(3).double(), torch.zeros(2).double()
    for _ in range(4):
        sam.step(
            0.1,
            lambda: ((ours[0] ** 4).sum() + (ours[1] ** 2).sum() * ours[0].sum(), ours[0]),
            lambda: (ours[0] ** 4).sum(),
        )
        g = 4 * w**3
        there = w + 0.3 * g / g.norm()
        gradient_w, gradient_v = 4 * there**3 + (v**2).sum(), 2 * v * there.sum()
        momentum_w = 0.9 * momentum_w + gradient_w + 0.01 * w
        momentum_v = 0.9 * momentum_v + gradient_v + 0.01 * v
        w, v = w - 0.1 * momentum_w, v - 0.1 * momentum_v
    torch.testing.assert_close(ours[0].detach().double(), w, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1].detach().double(), v, rtol=1e-4, atol=1e-4)


def test_the_ascent_goes_exactly_rho_far_over_all_parameters_together():
    ours = parameters((3,), (2, 2))
    start, there = [p.detach().clone() for p in ours], []

    def loss():
        there.extend(p.detach().clone() for p in ours)
        return sum((p**2).sum() for p in ours), ours[0]

    SAM([ParameterGroup(ours[:1]), ParameterGroup(ours[1:])], 0.0, 0.0, rho=0.7).step(0.0, loss, lambda: loss()[0])
    moved = torch.cat([(a - b).flatten() for a, b in zip(there[2:], start, strict=True)])
    assert moved.norm().item() == pytest.approx(0.7, rel=1e-5)
    assert all(torch.equal(p, s) for p, s in zip(ours, start, strict=True))  # and comes back to the bit


def test_sam_without_radius_is_sgd():
    plain, sharp = parameters((4,)), parameters((4,))
    for mine, make in (
        (plain, optimiser([ParameterGroup(plain)], recipe())),
        (sharp, SAM([ParameterGroup(sharp)], 0.9, 2e-4, 0.0)),
    ):
        for _ in range(3):
            make.step(0.1, lambda mine=mine: ((mine[0] ** 3).sum(), mine[0]), lambda mine=mine: (mine[0] ** 2).sum())
    assert torch.equal(plain[0], sharp[0])


def test_the_recipe_chooses_the_optimiser():
    groups = [ParameterGroup(parameters((2,)))]
    assert type(optimiser(groups, recipe())) is SGD
    sam = optimiser(groups, recipe(sam_rho=0.05))
    assert (type(sam), sam.rho, sam.momentum, sam.weight_decay) == (SAM, 0.05, 0.9, 2e-4)


def test_mislas_stage_1_schedule():
    rates = [learning_rate(recipe(), epoch) for epoch in range(200)]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[159] == pytest.approx(0.1)
    assert rates[160] == pytest.approx(0.01)
    assert rates[179] == pytest.approx(0.01)
    assert rates[180] == rates[199] == pytest.approx(0.001)


def test_cosine_starts_at_lr_and_falls_towards_zero():
    cosine = recipe(epochs=10, schedule={"shape": "cosine", "warmup": 0, "warmup_lr": 0.0})
    rates = [learning_rate(cosine, epoch) for epoch in range(10)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 10)) for e in range(10)])


def test_bagmar_warms_up_over_two_epochs():
    warm = recipe(schedule={"shape": "cosine", "warmup": 2, "warmup_lr": 0.05})
    assert [learning_rate(warm, e) for e in range(3)] == pytest.approx([0.05, 0.1, 0.1])
    assert learning_rate(warm, 101) == pytest.approx(0.05)  # half way through the 198 epochs of cosine
    assert learning_rate(warm, 199) == pytest.approx(0.05 * (1 + math.cos(math.pi * 197 / 198)))


def test_marc_counts_in_iterations():
    marc = recipe(epochs=None, iterations=13_000, schedule={"shape": "cosine", "warmup": 800, "warmup_lr": 0.05})
    assert learning_rate(marc, 0) == 0.05
    assert learning_rate(marc, 400) == pytest.approx(0.075, abs=1e-4)
    assert learning_rate(marc, 800) == pytest.approx(0.1)
    assert learning_rate(marc, 800 + 6100) == pytest.approx(0.05)
    assert Budget(marc, 10_847).total == 13_000


@pytest.mark.parametrize(("last_batch", "steps"), [("fill", 6), ("drop", 5)])
def test_an_epoch_keeps_or_drops_its_last_batch(last_batch, steps):
    short = recipe(
        epochs=3, batch_size=64, last_batch=last_batch, schedule={"shape": "cosine", "warmup": 0, "warmup_lr": 0.0}
    )
    assert Budget(short, 351).total == 3 * steps


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iterations": 5}, "either epochs or iterations"),
        ({"epochs": None}, "either epochs or iterations"),
        ({"epochs": None, "iterations": 170}, "names iteration 180: must not be above iterations"),
        ({"epochs": 5}, "names epoch 180"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"sam_rho": -1.0}, "greater than or equal to 0"),
        ({"epochs": 5, "schedule": {"shape": "cosine", **RISE}}, "warmup is 5: must be below epochs"),
    ],
)
def test_a_recipe_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        recipe(**changes)
