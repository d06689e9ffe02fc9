"""The branches for GPUs, on a GPU that is pretended: see tests/pretended_gpu.py."""

import numpy as np
import pytest
import torch

from tailcal import checkpoint, engine, store, train
from tailcal.augment import augment
from tailcal.draws import Draws
from tailcal.method import names
from tailcal.models import build
from tailcal.params import PadCrop, ResizedCrop
from tests.pretended_gpu import DEFAULT, GPU, Event, Stream, pretended_gpu
from tests.test_contract import RECIPE, RUNTIME, images, replica_of
from tests.test_engine import LONGER, TRAINED, assert_same

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, with tests of its own")
COLOURS = {"mean": [0.5] * 3, "std": [0.2] * 3}
SMALL = PadCrop(kind="pad_crop", pad=4, flip=True, cutout=16, fill=128, **COLOURS)
LARGE = ResizedCrop(kind="resized_crop", size=24, min_area=0.08, flip=True, jitter=0.4, grey=0.2, blur=0.5, **COLOURS)
ON_GPU = RUNTIME.model_copy(update={"device": "cuda"})


@pytest.fixture
def reference(monkeypatch):
    """Trains on the CPU with the memory format of a GPU, so that the bits are comparable."""

    def run(replica, recipe):
        with monkeypatch.context() as patch:
            patch.setattr(train, "place", lambda network, device: network.to(device))
            return train.train([replica], images(), recipe, RUNTIME)[0]

    return run


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_there(name, tmp_path, monkeypatch, reference):
    expected = reference(replica_of(name, tmp_path / "cpu"), RECIPE)
    with pretended_gpu(monkeypatch) as gpu:
        device = train.prepare(ON_GPU)
        trained = train.train([replica_of(name, tmp_path / "gpu")], images(device=device), RECIPE, ON_GPU)[0]
        assert {value.device for value in trained.network.state_dict().values()} == {GPU}
    assert gpu.operations > 100
    assert_same(expected.network, trained.network)
    assert trained.history == expected.history


@pytest.mark.parametrize("name", ["mixup", "fsgl", "bagmar", "mislas"])
def test_side_by_side_and_replayed_there(name, tmp_path, monkeypatch, reference):
    """With those that draw most; tests/test_engine.py replays every method."""
    recipe = LONGER.model_copy(update={"sam_rho": 0.05})
    expected = reference(replica_of(name, tmp_path / "cpu", 1), recipe)
    runtime = ON_GPU.model_copy(update={"replicas": 2, "cuda_graphs": True})
    with pretended_gpu(monkeypatch):
        replicas = [replica_of(name, tmp_path / "gpu", seed) for seed in range(2)]
        trained = train.train(replicas, images(device=train.prepare(runtime)), recipe, runtime)
    assert_same(expected.network, trained[1].network)
    assert trained[1].history == expected.history


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_images_come_from_elsewhere(placement, tmp_path, monkeypatch, reference):
    expected = reference(replica_of("glmc", tmp_path / "cpu"), RECIPE)
    with pretended_gpu(monkeypatch):
        data = images(placement, train.prepare(ON_GPU))
        trained = train.train([replica_of("glmc", tmp_path / "gpu")], data, RECIPE, ON_GPU)[0]
    assert_same(expected.network, trained.network)


def test_a_step_waits_for_its_images_and_holds_them(monkeypatch):
    with pretended_gpu(monkeypatch):
        data, training = images("host", train.prepare(ON_GPU)), Stream()
        with torch.cuda.stream(training):
            for taken, pairs in enumerate(data.steps([np.arange(20).reshape(5, 4)] * 2), start=1):
                assert training.waited_for == [data._copies] * taken
                held = {id(tensor) for tensor in training.holds}
                assert held.issuperset(id(tensor) for pair in pairs for tensor in pair)


def test_a_training_waits_for_what_it_is_given(monkeypatch):
    begun = []

    def training():
        begun.append(stream := Stream.current())
        assert stream.waited_for == [DEFAULT] * begun.count(stream)
        yield

    with pretended_gpu(monkeypatch):
        engine._stream.cache_clear()
        engine.side_by_side([training] * 5, train.prepare(ON_GPU), 2)
        engine._stream.cache_clear()
        assert torch.cuda.current_stream() is DEFAULT
    assert len(begun) == 5
    assert len({*begun, DEFAULT}) == 3


def test_of_steps_that_wait_for_their_turn_there_are_few(monkeypatch):
    with pretended_gpu(monkeypatch):
        data, before = images("host", train.prepare(ON_GPU)), Event.waited
        for launched, _ in enumerate(data.steps([np.arange(80).reshape(20, 4) % len(images())])):
            assert launched - (Event.waited - before) <= store.AHEAD


@pytest.mark.parametrize("name", sorted(set(names()) - set(TRAINED)))
def test_heads_that_take_no_step(name, tmp_path, monkeypatch, reference):
    expected = reference(replica_of(name, tmp_path / "cpu"), RECIPE)
    with pretended_gpu(monkeypatch):
        data = images(device=train.prepare(ON_GPU))
        trained = train.train([replica_of(name, tmp_path / "gpu")], data, RECIPE, ON_GPU)[0]
    assert_same(expected.network, trained.network)


def test_resuming_there(tmp_path, monkeypatch, reference):
    expected = reference(replica_of("bagmar", tmp_path / "cpu"), LONGER)
    with pretended_gpu(monkeypatch):
        data = images(device=train.prepare(ON_GPU))
        replica = replica_of("bagmar", tmp_path / "gpu")
        save, saved = checkpoint.save, []

        def save_twice(*args):
            save(*args)
            saved.append(args)
            if len(saved) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint, "save", save_twice)
        with pytest.raises(KeyboardInterrupt):
            train.train([replica], data, LONGER, ON_GPU)
        monkeypatch.setattr(checkpoint, "save", save)
        trained = train.train([replica], data, LONGER, ON_GPU)[0]
    assert_same(expected.network, trained.network)
    assert trained.history == expected.history


def test_predictions_made_there(monkeypatch):
    networks = [build("resnet8", "linear", 1, 3) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "place", lambda network, device: network.to(device))
        expected = train.predict(networks, images(), RUNTIME)
    with pretended_gpu(monkeypatch):
        found = train.predict(networks, images(device=train.prepare(ON_GPU)), ON_GPU)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("strength", ["standard", "strong"])
def test_augmentations_there(config, strength, monkeypatch):
    pixels = torch.randint(0, 256, (8, 3, 40, 32), dtype=torch.uint8)
    expected = augment(pixels, config, strength, Draws(0, 0, torch.Generator()))
    with pretended_gpu(monkeypatch) as gpu:
        there, generator = pixels.to(GPU), torch.Generator(GPU)
        augment(there, config, strength, Draws(0, 0, generator))
        with gpu.watching():
            found = augment(there, config, strength, Draws(0, 0, generator))
        assert found.device == GPU
        np.testing.assert_array_equal(found.cpu().numpy(), expected.numpy())


WAITS = "waits for the device"
HOST = "from memory that is not pinned"
MISTAKES = {
    "mixes devices": (lambda there: there + torch.ones(4), "same device"),
    "mixes with one number": (lambda there: torch.ones(4) + there.sum(), "same device"),
    "takes indices of the host": (lambda there: there[torch.tensor([0, 1])], "same device"),
    "takes a list of indices": (lambda there: there[[0, 1]], HOST),
    "takes an array of indices": (lambda there: there[np.array([0, 1])], HOST),
    "sets a list of indices": (lambda there: there.__setitem__([0, 1], 0.0), HOST),
    "has a gradient elsewhere": (lambda there: setattr(there, "grad", torch.ones(4)), "same device"),
    "reads a number back": (lambda there: there.sum().item(), WAITS),
    "branches": (lambda there: 1 if there.sum() > 0 else 0, WAITS),
    "compares": (lambda there: torch.allclose(there, there), WAITS),
    "looks for ones": (lambda there: there[there > 0], WAITS),
    "sets ones": (lambda there: there.__setitem__(there > 0, there.sum()), WAITS),
    "copies to the host": (lambda there: there.cpu(), WAITS),
    "synchronises": (lambda _: torch.cuda.synchronize(), WAITS),
    "copies a list": (lambda there: torch.tensor([1.0], device=there.device), HOST),
    "copies a new list": (lambda there: there.new_tensor([1.0]), HOST),
    "copies what is not pinned": (lambda _: torch.ones(4).to(GPU, non_blocking=True), HOST),
    "copies and waits": (lambda _: torch.ones(4).pin_memory().to(GPU), WAITS),
    "adds up in any order": (lambda there: there.cumsum(0), "no deterministic"),
    "adds up in place in any order": (lambda there: there.cumsum_(0), "no deterministic"),
    "scatters in any order": (lambda there: there.scatter_reduce_(0, there.long(), there, "sum"), "not deterministic"),
    "draws elsewhere": (lambda there: torch.rand(4, generator=torch.Generator(), device=there.device), "elsewhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_complains_as_a_gpu_would(mistake, monkeypatch):
    make, message = MISTAKES[mistake]
    with pretended_gpu(monkeypatch) as gpu:
        there = torch.ones(4, device=GPU)
        with gpu.watching(), pytest.raises((RuntimeError, AssertionError), match=message):
            make(there)


def test_afterwards_there_is_none(monkeypatch):
    before = torch.Generator, torch.load, train.executor
    with pretended_gpu(monkeypatch):
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    assert (torch.Generator, torch.load, train.executor) == before
