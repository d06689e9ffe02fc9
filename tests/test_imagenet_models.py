"""Backbones for photographs: torchvision's networks without their classifier, its weights in them, and freezing."""

import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tailcal.errors import UserError
from tailcal.models import BACKBONES, build, imagenet, resnet
from tailcal.models.imagenet import load_pretrained

NAMES = list(imagenet.BACKBONES)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def reference(name: str) -> torch.nn.Module:
    """Torchvision's network of that name; it has a resnet10 only by its class."""
    if name == "resnet10":
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    return getattr(torchvision.models, name)()


def on_meta(name: str, channels: int = 3) -> torch.nn.Module:
    """The backbone without values: sizes are all that is asked of the large ones."""
    with torch.device("meta"):
        return BACKBONES[name](channels)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_torchvisions_but_for_the_classifier(name):
    with torch.device("meta"):
        expected = {key: value.shape for key, value in reference(name).state_dict().items()}
    found = {key: value.shape for key, value in on_meta(name).state_dict().items()}
    features = on_meta(name).features
    assert found | {"fc.weight": (1000, features), "fc.bias": (1000,)} == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet10", 4_905_792),  # the five of the literature: 5.4 M, 25.6 M, 44.5 M, 60.2 M, 25.0 M with 1000 classes
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
        ("resnext50_32x4d", 25_028_904 - 2_049_000),
    ],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_224_pixels(name, channels):
    backbone = on_meta(name, channels).eval()
    assert backbone.features == (512 if name == "resnet10" else 2048)
    assert backbone(torch.zeros(2, channels, 224, 224, device="meta")).shape == (2, backbone.features)


def test_a_network_of_it_makes_finite_logits_of_one_channel():
    torch.manual_seed(0)
    network = build("resnet10", "linear", 1, 7).eval()
    assert network(IMAGES[:, :1]).shape == (2, 7)
    assert network(IMAGES[:, :1]).isfinite().all()


def test_no_name_is_one_of_the_small_networks():
    assert not set(NAMES) & set(resnet.BACKBONES)
    assert set(BACKBONES) == {*NAMES, *resnet.BACKBONES}


def test_importing_the_models_imports_no_torchvision():
    code = "import sys, tailcal.models; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"import stages; {code}"], check=False).returncode == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_weights_make_its_features(tmp_path, suffix):
    torch.manual_seed(0)
    theirs = reference("resnet10")
    theirs(IMAGES)  # running statistics other than those of initialisation
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pth" else save_file)(theirs.state_dict(), path)
    ours = BACKBONES["resnet10"](3)
    load_pretrained(ours, path)
    theirs.fc = torch.nn.Identity()
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


def test_a_file_without_batch_counters_loads(tmp_path):
    """Torchvision's oldest files, such as resnet50-19c8e357.pth."""
    state = reference("resnet10").state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.pth")
    ours = BACKBONES["resnet10"](3)
    load_pretrained(ours, tmp_path / "old.pth")
    assert torch.equal(ours.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_a_training_script_loads(tmp_path, wrap, prefix):
    """Weights among other things, and the names that DataParallel makes."""
    torch.manual_seed(0)
    theirs = reference("resnet10")
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1).state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save({wrap: state, "epoch": 3, "arch": "resnet10", "optimizer": optimizer} if wrap else state, path)
    ours = BACKBONES["resnet10"](3)
    load_pretrained(ours, path)
    theirs.fc = torch.nn.Identity()
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


def test_a_tensor_called_model_is_no_wrap(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": torch.zeros(1)}, path)
    assert one_line(BACKBONES["resnet10"](3), path).endswith("(its first tensor is called model)")


def one_line(backbone: torch.nn.Module, path) -> str:
    """What loading a wrong file says; it must have loaded nothing."""
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_pretrained(backbone, path)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_named(tmp_path):
    state, path = BACKBONES["resnet10"](3).state_dict(), tmp_path / "weights.pth"
    torch.save(state, path)
    assert "conv1.weight is [64, 3, 7, 7] there and [64, 1, 7, 7] here" in one_line(BACKBONES["resnet10"](1), path)
    assert "it lacks stages.0." in one_line(BACKBONES["resnet8"](3), path)
    ours = BACKBONES["resnet10"](3)
    torch.save({k: v for k, v in state.items() if k != "layer4.0.bn2.weight"}, path)
    assert one_line(ours, path).endswith("of another network: it lacks layer4.0.bn2.weight")
    torch.save(state | {"layer5.bias": torch.zeros(1), "layer6.bias": torch.zeros(1)}, path)
    assert one_line(ours, path).endswith("this backbone has no layer5.bias, and 1 more")


def test_what_is_no_file_of_weights_is_one_line(tmp_path):
    ours = BACKBONES["resnet10"](3)
    assert "missing" in one_line(ours, tmp_path / "none.pth")
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"text{suffix}"
        path.write_text("no weights")
        assert "damaged" in one_line(ours, path)
        path.write_bytes(b"")
        assert "damaged" in one_line(ours, path)
    path = tmp_path / "checkpoint.pth"
    torch.save({"weights": ours.state_dict(), "epoch": 3}, path)
    says = (
        "holds a dict of 'weights' (OrderedDict), 'epoch' (int): must hold a state_dict, names and tensors and nothing"
    )
    assert f"{path} {says} else, by itself or as its state_dict or model" in one_line(ours, path)
    torch.save({"model": {"a": 1}} | dict.fromkeys("bcdefg", 0), path)
    assert "a dict of 'model' (dict), 'b' (int), 'c' (int), 'd' (int), 'e' (int) and 2 more: must" in one_line(
        ours, path
    )
    torch.save([1], path)
    assert "holds a list: must hold a state_dict" in one_line(ours, path)
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(1)}}, path)
    assert one_line(ours, path).endswith("(its first tensor is called encoder_q.conv1.weight)")
    torch.save(torch.nn.Linear(1, 1), path)
    assert "more than tensors" in one_line(ours, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in one_line(ours, path)


def test_only_the_last_block_learns_and_the_rest_keeps_its_statistics():
    torch.manual_seed(0)
    network = build("resnet50", "linear", 3, 5, trains="last_block")
    named = {name for name, p in network.backbone.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 2)[0] for name in named} == {"layer4.2"}

    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(IMAGES).sum().backward()
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"backbone.layer4.2.bn{i}.{kind}" for i in (1, 2, 3) for kind in ("running_mean", "running_var")}
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
    assert network.head.training
    assert not any(module.training for module in network.eval().modules())


def test_nothing_is_pinned_where_all_trains():
    network = build("resnet10", "linear", 3, 5).train()
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad for p in network.parameters())
