"""Backbones: sizes that the literature states, and shortcuts by hand."""

import pytest
import torch
import torchvision

from tailcal.method import load
from tailcal.models import BACKBONES, build
from tailcal.models.heads import HEADS, CosineClassifier, Linear, Scaled
from tailcal.models.resnet import BasicBlock, BatchNorm2d, ConvShortcut, PadShortcut


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_parameter_counts_of_he_et_al_table_6(name, millions):
    assert round(size(build(name, "linear", 3, 10)) / 1e6, 2) == millions


def size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("resnet18", 11_173_962), ("resnet34", 21_282_122)])
def test_parameter_counts_of_the_ones_with_four_stages(name, parameters):
    """Torchvision's network of that name with a 3x3 stem of 3 * 64 * 9 weights for its 7x7 one, and 10 classes."""
    reference = size(getattr(torchvision.models, name)(num_classes=10)) - 64 * 3 * (49 - 9)
    assert size(build(name, "linear", 3, 10)) == reference == parameters


def test_resnet18_is_torchvisions_with_a_small_stem():
    torch.manual_seed(0)
    ours, theirs = build("resnet18", "linear", 3, 10), torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_wide_one_is_four_times_as_wide():
    narrow, wide = build("resnet32", "linear", 3, 10), build("resnet32_x4", "linear", 3, 10)
    assert wide.backbone.features == 4 * narrow.backbone.features == 256
    convolutions = [[m.weight for m in n.modules() if isinstance(m, torch.nn.Conv2d)] for n in (narrow, wide)]
    assert all(w.numel() == 16 * n.numel() for n, w in list(zip(*convolutions, strict=True))[1:])


@pytest.mark.parametrize(("name", "kaiming"), [("resnet32", True), ("resnet32_x4", True), ("resnet18", False)])
def test_first_weights(name, kaiming):
    """Kaiming-normal: a variance of 2 / inputs; PyTorch's own: uniform, of 1 / (3 inputs)."""
    torch.manual_seed(0)
    network = build(name, "linear", 3, 100)
    wide = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 5000]
    for weight in [*wide, network.head.weight]:
        expected = (2 if kaiming else 1 / 3) / weight[0].numel()
        assert weight.var().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("name", "kaiming"), [("resnet32_x4", True), ("resnet18", False)])
def test_first_weights_of_the_stem(name, kaiming):
    torch.manual_seed(0)
    weight = build(name, "linear", 3, 100).backbone.conv1.weight
    assert weight.var().item() == pytest.approx((2 if kaiming else 1 / 3) / 27, rel=0.15)


@pytest.mark.parametrize(("name", "kaiming"), [("resnet32", True), ("resnet18", False), ("resnet10", False)])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_fresh_classifier_of_stage_2_begins_as_one_of_stage_1(head, name, kaiming):
    torch.manual_seed(0)
    network = build(name, head, 3, 100)
    crt = load("crt")
    crt(crt.Config(augmentation="standard"), torch.ones(100, dtype=torch.int64)).setup(network)
    for weight in (network.head.weight, build(name, "linear", 3, 100).head.weight):
        assert weight.var().item() == pytest.approx((2 if kaiming else 1 / 3) / weight.shape[1], rel=0.05)


@pytest.mark.parametrize("name", BACKBONES)
def test_shapes(name):
    network = build(name, "linear", 1, 7).eval()
    images = torch.zeros(2, 1, 8, 8)
    assert network.backbone(images).shape == (2, network.backbone.features)
    assert network(images).shape == (2, 7)
    assert network(images[:0]).shape == (0, 7)


def test_option_a_shortcut_subsamples_and_pads_evenly():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    shortcut = BasicBlock(2, 6, 2, PadShortcut).shortcut(x)
    assert shortcut.shape == (1, 6, 2, 2)
    assert torch.equal(shortcut[:, 2:4], x[:, :, ::2, ::2])
    assert shortcut[:, :2].abs().sum() == 0
    assert shortcut[:, 4:].abs().sum() == 0


def test_a_shortcut_is_the_identity_where_the_shape_stays():
    x = torch.randn(2, 4, 3, 3)
    for kind in (PadShortcut, ConvShortcut):
        assert torch.equal(BasicBlock(4, 4, 1, kind).shortcut(x), x)
        assert BasicBlock(4, 8, 2, kind).shortcut(x).shape == (2, 8, 2, 2)


def test_cosine_head_by_hand():
    head = CosineClassifier(2, 2)
    head.direction.data = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(head(torch.tensor([[0.6, 0.8]])), torch.tensor([[0.6, 0.8]]))
    head.rescale(torch.tensor([30.0, 10.0]))
    torch.testing.assert_close(head(torch.tensor([[1.2, 1.6]])), torch.tensor([[18.0, 8.0]]))
    assert head.norms().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", HEADS)
def test_rescaling_a_head_scales_its_logits(name):
    head, features, factors = HEADS[name](5, 3), torch.randn(4, 5), torch.tensor([2.0, 0.5, 1.0])
    bias = getattr(head, "bias", torch.zeros(3))
    before = head(features) - bias
    head.rescale(factors)
    torch.testing.assert_close(head(features) - bias, before * factors)


def test_a_linear_head_has_the_norms_of_its_weights():
    head = HEADS["linear"](2, 2)
    head.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert head.norms().tolist() == [5.0, 2.0]


def test_scaled_starts_as_the_head_within():
    linear = Linear(4, 3)
    head, features = Scaled(linear), torch.randn(5, 4)
    assert torch.equal(head(features), linear(features))
    head.scale.data[1] = 2
    torch.testing.assert_close(head(features)[:, 1], 2 * linear(features)[:, 1])


def test_batch_norm_is_torchs_but_for_the_counter():
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for training in (True, True, False):
        images = 2 + 3 * torch.randn(4, 3, 5, 5)
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [m.train(training)(x) for m, x in zip((ours, theirs), inputs, strict=True)]
        torch.cat(outputs).square().sum().backward()
        assert torch.equal(*outputs)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    counters = {"num_batches_tracked": (0, 2)}
    for name, value in ours.state_dict().items():
        expected = theirs.state_dict()[name]
        assert (int(value), int(expected)) == counters[name] if name in counters else torch.equal(value, expected)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet10"])
def test_no_backbone_counts_its_batches(name):
    network = build(name, "linear", 3, 4).train()
    network(torch.randn(2, 3, 32, 32))
    counters = [value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")]
    assert len(counters) > 3
    assert not any(counters)
