"""SGD against torch's own, and schedules against the numbers written in the papers."""

import math

import pytest
import torch

from tailcal.method import ParameterGroup
from tailcal.optim import SGD, learning_rate
from tailcal.params import Recipe


def recipe(**changes) -> Recipe:
    values = {
        "epochs": 200,
        "batch_size": 128,
        "last_batch": "fill",
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-4,
        "schedule": {"shape": "multistep", "warmup_epochs": 5, "milestones": [160, 180], "gamma": 0.1},
    }
    return Recipe.model_validate(values | changes)


def test_sgd_is_torch_sgd():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
    ours = [torch.nn.Parameter(t.clone()) for t in start]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    sgd = SGD([ParameterGroup([ours[0]]), ParameterGroup([ours[1]], lr_factor=0.2)], 0.9, 0.01)
    reference = torch.optim.SGD(
        [{"params": [theirs[0]], "lr": 0.1}, {"params": [theirs[1]], "lr": 0.02}], momentum=0.9, weight_decay=0.01
    )
    for step in range(5):
        for parameters in (ours, theirs):
            for p in parameters:
                p.grad = None
            sum(((p - step) ** 2).sum() for p in parameters).backward()
        sgd.step(0.1)
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_mislas_stage_1_schedule():
    rates = [learning_rate(recipe(), epoch) for epoch in range(200)]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[159] == pytest.approx(0.1)
    assert rates[160] == pytest.approx(0.01)
    assert rates[179] == pytest.approx(0.01)
    assert rates[180] == rates[199] == pytest.approx(0.001)


def test_cosine_starts_at_lr_and_falls_towards_zero():
    cosine = recipe(epochs=10, schedule={"shape": "cosine", "warmup_epochs": 0})
    rates = [learning_rate(cosine, epoch) for epoch in range(10)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 10)) for e in range(10)])
    warm = recipe(epochs=12, schedule={"shape": "cosine", "warmup_epochs": 2})
    assert [learning_rate(warm, e) for e in range(3)] == pytest.approx([0.05, 0.1, 0.1])
