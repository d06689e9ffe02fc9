"""Backbones: sizes that the literature states, and shortcuts by hand."""

import pytest
import torch

from tailcal.errors import UserError
from tailcal.models import BACKBONES, build
from tailcal.models.heads import ScaledLinear
from tailcal.models.resnet import BasicBlock


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_parameter_counts_of_he_et_al_table_6(name, millions):
    network = build(name, 3, 10)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes(name):
    network = build(name, 1, 7).eval()
    images = torch.zeros(2, 1, 8, 8)
    assert network.backbone(images).shape == (2, network.backbone.features)
    assert network(images).shape == (2, 7)
    assert network(images[:0]).shape == (0, 7)


def test_option_a_shortcut_subsamples_and_pads_evenly():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    shortcut = BasicBlock(2, 6, stride=2).shortcut(x)
    assert shortcut.shape == (1, 6, 2, 2)
    assert torch.equal(shortcut[:, 2:4], x[:, :, ::2, ::2])
    assert shortcut[:, :2].abs().sum() == 0
    assert shortcut[:, 4:].abs().sum() == 0


def test_scaled_linear_starts_as_the_linear_head():
    linear = torch.nn.Linear(4, 3)
    head, features = ScaledLinear(linear), torch.randn(5, 4)
    assert torch.equal(head(features), linear(features))
    head.scale.data[1] = 2
    torch.testing.assert_close(head(features)[:, 1], 2 * linear(features)[:, 1])


def test_an_unknown_backbone_is_named():
    with pytest.raises(UserError, match=r"datasets\.x\.backbone: must be one of resnet8, .*got 'resnet33'"):
        build("resnet33", 3, 10, "datasets.x.backbone")
