"""The engine changes nothing: not the number of networks side by side, not recorded steps, not one that fails."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tailcal import engine, train
from tailcal.draws import Draws
from tailcal.errors import UserError
from tailcal.method import load, names
from tailcal.models import BFloat16Backbone, Network
from tests.recording import record
from tests.test_contract import RECIPE, RUNTIME, images, replica_of, trained

TRAINED = [name for name in names() if load(name).trained]
LONGER = RECIPE.model_copy(update={"epochs": 4})  # 12 steps, of which the first three are never replayed


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("at_once", [2, 5])
def test_a_network_does_not_depend_on_those_beside_it(at_once, tmp_path):
    names_ = ["fsgl", "mixup", "bagmar", "ce"]
    runtime = RUNTIME.model_copy(update={"replicas": at_once})
    replicas = [replica_of(name, tmp_path / "together", seed) for seed, name in enumerate(names_)]
    together = train.train(replicas, images(), RECIPE, runtime)
    for seed, (name, beside) in enumerate(zip(names_, together, strict=True)):
        alone, history = trained(replica_of(name, tmp_path / "alone", seed))
        assert_same(alone, beside.network)
        assert beside.history == history


def test_each_is_trained_by_one_thread_of_its_own():
    seen = []

    def training():
        seen.append((threading.get_ident(), torch.get_num_threads()))
        yield
        barrier.wait(timeout=10)  # passes only when two are under way at a time
        return len(seen)

    barrier = threading.Barrier(2)
    engine.side_by_side([training] * 2, torch.device("cpu"), 2)
    assert len({thread for thread, _ in seen}) == 2
    assert [count for _, count in seen] == [1, 1]


def test_the_first_failure_stops_the_others_at_their_next_step():
    def fails():
        yield
        raise UserError("too bad")

    def endless():
        while True:
            yield

    with pytest.raises(UserError, match="too bad"):
        engine.side_by_side([endless, fails, endless], torch.device("cpu"), 2)


def test_results_keep_their_order():
    def training(number):
        for _ in range(10 - number):
            yield
        return number

    runs = [partial(training, number) for number in range(6)]
    for at_once in (1, 2, 6):
        assert engine.side_by_side(runs, torch.device("cpu"), at_once) == list(range(6))


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
@pytest.mark.parametrize("name", TRAINED)
def test_a_recorded_step_is_the_step(name, sam_rho, tmp_path, monkeypatch):
    """On a CPU, with an emulation of a CUDA graph: see tests/recording.py."""
    recipe = LONGER.model_copy(update={"sam_rho": sam_rho})
    plain, history = trained(replica_of(name, tmp_path / "plain"), recipe)
    # On a CPU one_hot looks at its labels first; on a GPU it does not.
    monkeypatch.setattr(
        F, "one_hot", lambda labels, k: torch.zeros(len(labels), k).long().scatter(1, labels[:, None], 1)
    )
    taken = []

    def recorded(step, seed, device, _cuda_graphs):
        graphed = engine.Graphed(step, seed, device, record)
        taken.append(graphed)
        return graphed

    monkeypatch.setattr(train, "executor", recorded)
    replayed, replayed_history = trained(replica_of(name, tmp_path / "replayed"), recipe)
    assert taken[0].replay is not None
    assert_same(plain, replayed)
    assert replayed_history == history


def test_recorded_numbers_of_the_host_are_those_of_each_step():
    def drawn(draws):
        return draws.host(lambda generator: [generator.random(), generator.random()]), draws.beta(0.5)

    tape = engine._Tape(7, torch.Generator())
    for number in range(3):
        tape.slots.clear()
        tape.turn_to(number)
        drawn(tape)
    tape.complete = True
    tape.turn_to(3)
    fixed = drawn(tape)
    for number in (3, 4, 9):
        tape.turn_to(number)
        for ours, expected in zip(fixed, drawn(Draws(7, number, torch.Generator())), strict=True):
            assert torch.equal(ours, expected)


def test_bf16_is_near_float32_and_keeps_float32_weights(tmp_path):
    def run(precision):
        ((network, history, _),) = train.train(
            [replica_of("mixup", tmp_path / precision)], images(), LONGER, RUNTIME, precision
        )
        return network, history

    (exact, told), (rough, told_rough) = run("float32"), run("bf16")
    assert {value.dtype for value in rough.state_dict().values()} == {torch.float32, torch.int64}
    losses = [np.array([row["loss"] for row in history]) for history in (told, told_rough)]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(*losses, rtol=0.05)
    assert any(not torch.equal(v, exact.state_dict()[k]) for k, v in rough.state_dict().items())


@pytest.mark.parametrize("name", TRAINED)
def test_in_bf16_heads_and_losses_compute_in_float32(name, tmp_path):
    class Played(torch.nn.Module):
        """A backbone of features that are known already."""

        def forward(self, _):
            return features.pop(0)

    network, method = replica_of(name, tmp_path).make()
    method.setup(network)
    method.set_mode(network)
    data, draws = images(), Draws(0, 0, torch.Generator())
    (pairs,) = data.steps([np.arange(8)[None]] * len(method.samplers()))
    views = [data.prepare(*pair, method.config.augmentation, draws) for pair in pairs for _ in range(method.views)]
    batch, progress, features = method.mix(views, draws), torch.tensor(0.5, dtype=torch.float64), []
    half = BFloat16Backbone(network.backbone)
    half.register_forward_hook(lambda _module, _images, made: features.append(made))
    value, logits = method.loss(Network(half, network.head), batch, progress)
    assert {made.dtype for made in features} == {torch.float32}
    assert all(torch.equal(made, made.bfloat16().float()) for made in features)  # the backbone's are bf16's
    exact_value, exact_logits = method.loss(Network(Played(), network.head), batch, progress)
    assert torch.equal(value, exact_value)
    assert torch.equal(logits, exact_logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", TRAINED)
def test_gpu_replayed_and_side_by_side_it_is_the_eager_network_alone(name, tmp_path):
    device = train.prepare(RUNTIME.model_copy(update={"device": "cuda"}))
    alone = train.train([replica_of(name, tmp_path / "alone", 1)], images(device=device), LONGER, RUNTIME)[0].network
    runtime = RUNTIME.model_copy(update={"replicas": 3, "cuda_graphs": True})
    replicas = [replica_of(name, tmp_path / "together", seed) for seed in range(3)]
    together = train.train(replicas, images(device=device), LONGER, runtime)
    assert_same(alone, together[1].network)


def test_on_a_cpu_no_step_is_recorded():
    assert type(engine.executor(lambda *_: None, 0, torch.device("cpu"), True)) is engine.Eager
