"""MARC, DisAlign and NCM on both heads of stage 1: loops, numbers by hand, and where they start."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from pydantic import ValidationError
from sklearn.neighbors import NearestCentroid
from torch import nn

from tailcal import lineage
from tailcal.errors import UserError
from tailcal.files import sha256
from tailcal.losses import generalized_reweight_weights, weighted_cross_entropy
from tailcal.method import Batch, Method, configure, load, names
from tailcal.methods.disalign import align
from tailcal.methods.marc import calibrate_margins
from tailcal.methods.ncm import class_means, euclidean
from tailcal.models import Network, build
from tailcal.models.heads import HEADS
from tailcal.samplers import instance
from tailcal.weights import load_weights, save_weights
from tests.conftest import ROOT, STAGE1

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(5, 4, generator=GENERATOR)
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3, 2])
IMAGES = torch.randn(8, 1, 8, 8, generator=GENERATOR) + 3
COUNTS = torch.tensor([500, 16, 5, 100])
BATCH = Batch(IMAGES, LABELS, LABELS)
MARC = {"augmentation": "strong", "rho": 1.2, "shifted_bn": True}
SETTINGS = {"marc": MARC, "disalign": {"augmentation": "standard", "rho": 1.2}}
NCM = {"distance": "cosine", "scale": 30.0}


def pair(name: str, head: str = "linear", **settings) -> tuple[Network, Network, Method]:
    """A network of stage 1, a copy of it after the set-up of a method, and the method."""
    torch.manual_seed(0)
    before, after = build("resnet8", head, 1, 4), build("resnet8", head, 1, 4)
    before.head.rescale(torch.tensor([3.0, 0.5, 2.0, 1.0]))  # norms apart, as after a training on a long tail
    before(IMAGES)  # running statistics other than those of initialisation
    after.load_state_dict(before.state_dict())
    method = load(name)(load(name).Config(**SETTINGS[name] | settings), COUNTS)
    (group,) = method.setup(after)
    assert {id(p) for p in group.parameters} == {id(p) for p in after.parameters() if p.requires_grad}
    return before.eval(), after.eval(), method


def descend(network: Network, method: Method, steps: int = 3) -> list[float]:
    """A few steps of plain gradient descent on what learns."""
    learning = [p for p in network.parameters() if p.requires_grad]
    method.set_mode(network)
    losses = []
    for _ in range(steps):
        loss, _ = method.loss(network, BATCH, 0.0)
        losses.append(loss.item())
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in learning:
                parameter -= 0.01 * parameter.grad
    return losses


def test_calibrated_margins_naive():
    scale, shift = torch.tensor([0.5, 1.0, 2.0, -1.0]), torch.tensor([0.1, -2.0, 0.0, 3.0])
    norms = torch.tensor([3.0, 1.0, 0.2, 5.0])
    calibrated = calibrate_margins(LOGITS, scale, shift, norms)
    for i in range(5):
        for k in range(4):
            expected = scale[k] * LOGITS[i, k] + shift[k] * norms[k]
            torch.testing.assert_close(calibrated[i, k], expected)


def test_a_margin_is_scaled_and_shifted_in_units_of_distance():
    """(a d + b) ||W|| with d = z / ||W||, the distance to the hyperplane that the paper calibrates."""
    weight, feature = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 1.0]])  # norm 5, z 10, d 2
    calibrated = calibrate_margins(feature @ weight.T, torch.tensor([0.5]), torch.tensor([3.0]), weight.norm(dim=1))
    assert calibrated.item() == pytest.approx((0.5 * 2 + 3) * 5)


def test_alignment_naive():
    scale, offset = torch.tensor([0.5, 1.0, 2.0, -1.0]), torch.tensor([0.1, -2.0, 0.0, 3.0])
    gate = torch.tensor([[0.0], [0.25], [0.5], [0.9], [1.0]])
    aligned = align(LOGITS, gate, scale, offset)
    for i in range(5):
        for k in range(4):
            s, z = gate[i, 0], LOGITS[i, k]
            torch.testing.assert_close(aligned[i, k], s * (scale[k] * z + offset[k]) + (1 - s) * z)
    assert torch.equal(aligned[0], LOGITS[0])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SETTINGS)
def test_they_start_as_stage_1(name, head):
    before, after, _ = pair(name, head)
    assert torch.equal(before(IMAGES), after(IMAGES))


@pytest.mark.parametrize("head", HEADS)
def test_marc_head_is_its_equation(head):
    before, after, _ = pair("marc", head)
    after.head.scale.data = torch.tensor([0.5, 1.0, 2.0, 1.5])
    after.head.shift.data = torch.tensor([0.1, -2.0, 0.0, 3.0])
    norms = before.head.weight.norm(dim=1) if head == "linear" else torch.ones(4)  # of directions
    expected = after.head.scale * before(IMAGES) + after.head.shift * norms
    torch.testing.assert_close(after(IMAGES), expected)
    assert (norms.max() > 3 * norms.min()) == (head == "linear")


@pytest.mark.parametrize("head", HEADS)
def test_disalign_head_is_its_equation(head):
    before, after, _ = pair("disalign", head)
    after.head.scale.data = torch.tensor([0.5, 1.0, 2.0, 1.5])
    after.head.offset.data = torch.tensor([0.1, -2.0, 0.0, 3.0])
    after.head.gate.weight.data = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    after.head.gate.bias.data = torch.tensor([0.3])
    features, logits = after.backbone(IMAGES), before(IMAGES)
    for f, z, aligned in zip(features, logits, after(IMAGES), strict=True):
        s = 1 / (1 + math.exp(-(f @ after.head.gate.weight[0]).item() - 0.3))
        expected = s * (after.head.scale * z + after.head.offset) + (1 - s) * z
        torch.testing.assert_close(aligned, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_generalised_reweighting_of_the_new_logits(name):
    _, network, method = pair(name)
    network.head.scale.data[1] = 2.0
    loss, logits = method.loss(network, BATCH, 0.0)
    assert torch.equal(logits, network(IMAGES))
    torch.testing.assert_close(loss, weighted_cross_entropy(logits, LABELS, generalized_reweight_weights(COUNTS, 1.2)))
    _, network, method = pair(name, rho=0.0)
    loss, logits = method.loss(network, BATCH, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("name", "learning"),
    [
        ("marc", {"head.scale", "head.shift"}),
        ("disalign", {"head.scale", "head.offset", "head.gate.weight", "head.gate.bias"}),
    ],
)
def test_only_the_calibration_learns(name, learning, head):
    before, after, method = pair(name, head)
    losses = descend(after, method)
    assert losses[0] > losses[1] > losses[2]
    assert {key for key, p in after.named_parameters() if p.requires_grad} == learning
    start = dict(before.named_parameters())
    for key, parameter in after.named_parameters():
        if key in learning:
            assert parameter.grad.abs().sum() > 0
        else:
            assert parameter.grad is None
            assert torch.equal(parameter, start[key.replace("head.inner.", "head.")])


@pytest.mark.parametrize(
    ("name", "settings", "moves"),
    [("marc", {"shifted_bn": True}, True), ("marc", {"shifted_bn": False}, False), ("disalign", {}, False)],
)
def test_running_statistics_move_only_with_shifted_bn(name, settings, moves):
    before, after, method = pair(name, **settings)
    descend(after, method)
    start = dict(before.backbone.named_buffers())
    changed = {key for key, value in after.backbone.named_buffers() if not torch.equal(value, start[key])}
    assert changed == ({key for key in start if "running" in key} if moves else set())


@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_drawn_uniformly(name):
    assert pair(name)[2].samplers() == (instance,)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_empty_class_is_named(name):
    with pytest.raises(ValueError, match="class 2 has 0 training images"):
        load(name)(load(name).Config(**SETTINGS[name]), torch.tensor([4, 3, 0]))


@pytest.mark.parametrize("name", SETTINGS)
def test_one_image_has_its_plain_cross_entropy(name):
    _, network, method = pair(name)
    loss, logits = method.loss(network, Batch(IMAGES[:1], LABELS[:1], LABELS[:1]), 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS[:1]))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_stays_on_its_device_and_waits_for_nothing(name, head):
    """The meta device has no values: it refuses an operand from elsewhere, and to be read."""
    _, network, method = pair(name, head)
    network, method = network.to("meta"), method.to("meta")
    loss, _ = method.loss(network, Batch(IMAGES.to("meta"), LABELS.to("meta"), LABELS.to("meta")), 0.0)
    loss.backward()
    assert loss.device.type == "meta"


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_files_are_complete(name):
    _, network, method = pair(name)
    descend(network, method)
    _, other, _ = pair(name)
    assert not torch.equal(other(IMAGES), network.eval()(IMAGES))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(IMAGES), network(IMAGES))
    assert not method.state_dict()


def fitted(features: torch.Tensor, labels: torch.Tensor, classes: int, **settings) -> tuple[Network, Method]:
    network = build("resnet8", "linear", 1, classes)
    method = load("ncm")(load("ncm").Config(**NCM | settings), torch.bincount(labels, minlength=classes))
    assert method.setup(network) == []
    method.fit(network, lambda: features, labels)
    return network, method


def test_class_means_naive():
    features = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([2, 0, 0, 1, 2, 2, 0, 2, 0])
    means = class_means(features, labels, 3)
    for k in range(3):
        members = [features[i].tolist() for i in range(9) if labels[i] == k]
        assert means[k].tolist() == pytest.approx([sum(column) / len(members) for column in zip(*members, strict=True)])


def test_class_means_of_an_empty_class_are_refused():
    for labels, empty in ([0, 0, 2, 2], 1), ([0, 1, 1, 0], 2):
        with pytest.raises(ValueError, match=f"class {empty} has no image"):
            class_means(torch.randn(4, 2), torch.tensor(labels), 3)


def test_ncm_logits_by_hand():
    features = torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 5.0]])  # means (3, 0) and (0, 5)
    labels, query = torch.tensor([0, 0, 1]), torch.tensor([[3.0, 4.0]])
    network, _ = fitted(features, labels, 2, distance="cosine", scale=10.0)
    torch.testing.assert_close(network.head(query), torch.tensor([[6.0, 8.0]]))
    network, _ = fitted(features, labels, 2, distance="euclidean", scale=0.5)
    torch.testing.assert_close(network.head(query), torch.tensor([[-8.0, -5.0]]))


def test_ncm_ranks_as_scikit_learn_does():
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(40, 6, generator=generator), torch.arange(40) % 5
    queries = torch.randn(100, 6, generator=generator)
    network, _ = fitted(features, labels, 5, distance="euclidean", scale=2.0)
    reference = NearestCentroid(metric="euclidean").fit(features.numpy(), labels.numpy())
    assert network.head(queries).argmax(1).tolist() == reference.predict(queries.numpy()).tolist()


def test_the_papers_euclidean_distance_ranks_as_the_cosine():
    """The paper's is to means of unit norm."""
    generator = torch.Generator().manual_seed(4)
    features, labels = torch.randn(40, 6, generator=generator), torch.arange(40) % 5
    queries = torch.randn(100, 6, generator=generator)
    network, _ = fitted(features, labels, 5)
    to_unit = torch.cdist(queries, F.normalize(class_means(features, labels, 5)))
    assert torch.equal(network.head(queries).argmax(1), to_unit.argmin(1))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_scale_moves_confidence_and_no_prediction(distance):
    features, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(5)), torch.arange(12) % 4
    low, high = (fitted(features, labels, 4, distance=distance, scale=scale)[0].head for scale in (1.0, 8.0))
    torch.testing.assert_close(high(features), 8 * low(features))
    assert torch.equal(high(features).argmax(1), low(features).argmax(1))


def test_ncm_euclidean_is_exact_far_from_the_origin():
    """Thirty rows: enough for torch.cdist to choose the form that cancels, when it is left to choose."""
    features = torch.tensor([[4000.1, 0.0], [4000.6, 0.0], [4001.2, 0.0]])
    network, _ = fitted(features, torch.arange(3), 3, distance="euclidean", scale=1.0)
    x = features[:, 0].double()
    expected = -((x[:, None] - x[None]) ** 2).repeat(10, 1).float()
    torch.testing.assert_close(network.head(features.repeat(10, 1)), expected)


def test_ncm_euclidean_as_it_is_exported_is_the_same():
    """ONNX files go by another form of it, as their operators have no torch.cdist."""
    generator = torch.Generator().manual_seed(7)
    features, means = torch.randn(5, 6, generator=generator), torch.randn(3, 6, generator=generator)

    class Head(nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return euclidean(features, means)

    exported = torch.export.export(Head(), (features,))
    assert not [node for node in exported.graph.nodes if "cdist" in str(node.target)]
    torch.testing.assert_close(exported.module()(features), euclidean(features, means))


def test_ncm_means_are_saved_with_the_weights_and_nothing_learns():
    features, labels = torch.randn(12, 64, generator=torch.Generator().manual_seed(6)), torch.arange(12) % 4
    network, method = fitted(features, labels, 4)
    torch.testing.assert_close(network.state_dict()["head.means"], class_means(features, labels, 4))
    assert not method.trained
    assert not [p for p in network.parameters() if p.requires_grad]
    blank, _ = fitted(torch.randn(12, 64), labels, 4)
    blank.load_state_dict(network.state_dict())
    assert torch.equal(blank.eval()(IMAGES), network.eval()(IMAGES))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_ncm_before_its_fit_is_a_head_of_the_right_shape(distance):
    network = build("resnet8", "cosine", 1, 4)
    load("ncm")(load("ncm").Config(**NCM | {"distance": distance}), COUNTS).setup(network)
    assert network.state_dict()["head.means"].shape == (4, network.backbone.features)
    assert network(IMAGES).shape == (8, 4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", names("classifiers"))
def test_the_finished_network_is_rebuilt_from_its_record_and_weights(name, head, tmp_path):
    """What `tailcal.exported` relies on: build, set up, load, and not one number is other than it was."""
    block = yaml.safe_load((ROOT / "params.yaml").read_text())["classifiers"][name]

    def make() -> tuple[Network, Method]:
        network = build("resnet8", head, 1, 4)
        method = load(name)(configure(name, block, "classifiers"), COUNTS)
        method.setup(network)
        return network, method

    finished, method = make()
    if method.trained:
        descend(finished, method)
    else:
        method.fit(finished, lambda: finished.backbone(IMAGES).detach(), LABELS)
    method.finish(finished)
    save_weights(finished, tmp_path / "seed0.safetensors")

    rebuilt, _ = make()
    assert not torch.equal(rebuilt.eval()(IMAGES), finished.eval()(IMAGES))
    load_weights(rebuilt, tmp_path / "seed0.safetensors", sha256(tmp_path / "seed0.safetensors"))
    assert torch.equal(rebuilt(IMAGES), finished(IMAGES))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("marc", MARC | {"rho": -1.0}),
        ("marc", MARC | {"shifted_bn": "yes"}),
        ("disalign", SETTINGS["disalign"] | {"rho": -1.0}),
        ("ncm", NCM | {"scale": 0.0}),
        ("ncm", NCM | {"distance": "manhattan"}),
        ("ncm", NCM | {"augmentation": "standard"}),
    ],
)
def test_a_wrong_setting_is_refused(name, settings):
    with pytest.raises(ValidationError):
        load(name).Config(**settings)


def test_a_seed_that_was_not_trained_is_named():
    names = ["seed0", "seed5.npz", "seed5.safetensors"]
    lineage.require_seeds(names, [5, 0], Path("there"), "run it")
    with pytest.raises(UserError, match=r"^there has no seed 7, and the parameters say seeds 0, 7: run it$"):
        lineage.require_seeds(names, [0, 7], Path("there"), "run it")


def test_the_record_of_stage_1_is_read_whole_or_named(tmp_path):
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps(STAGE1 | {"more": 1}))
    assert lineage.read_represented(tmp_path).model_dump() == STAGE1
    lacking = [{k: v for k, v in STAGE1.items() if k != key} for key in STAGE1]
    for content in ({}, [], None, 7, STAGE1 | {"params": {}}, STAGE1 | {"weights": "x"}, *lacking):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            lineage.read_represented(tmp_path)
        assert re.fullmatch(
            rf"{path}: .+; it is damaged, or of another version: delete {tmp_path} and run `dvc repro`, .+",
            str(caught.value),
        )
