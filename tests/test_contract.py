"""What every method promises, checked on every block of params.yaml and every file of tailcal.methods: nobody has to
remember to add a test here."""

import copy
import dataclasses
import inspect
import itertools
import math
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from stages import calibrate
from tailcal import checkpoint, params, train
from tailcal import method as methods
from tailcal.cell import CellName
from tailcal.costs import Cost
from tailcal.errors import UserError
from tailcal.method import Method, TrainedConfig, configure
from tailcal.models import build
from tailcal.models.heads import HEADS
from tailcal.optim import SGD, learning_rate
from tailcal.params import PadCrop, Recipe, Runtime
from tailcal.store import Images
from tests.test_dvc import ROOT

COUNTS = [12, 6, 3]
CPU = torch.device("cpu")
AUGMENTATION = PadCrop(kind="pad_crop", pad=1, flip=False, cutout=3, fill=128, mean=[0.5], std=[0.25])
RECIPE = Recipe.model_validate(
    {
        "epochs": 3,
        "batch_size": 8,
        "last_batch": "fill",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "sam_rho": 0.0,
        "schedule": {"shape": "cosine", "warmup": 0, "warmup_lr": 0.0},
    }
)
RUNTIME = Runtime(
    device="cpu",
    replicas=1,
    processes=1,
    placement="device",
    cuda_graphs=False,
    checkpoint_seconds=0.0,
)
BLOCKS = yaml.safe_load((ROOT / "params.yaml").read_text())


FILES = {
    name: block.get("method", name)
    for stage in ("representations", "classifiers")
    for name, block in BLOCKS[stage].items()
}


def load(name) -> type[Method]:
    return methods.load(FILES.get(name, name))


def names(stage=None) -> list[str]:
    """Of blocks and of files, so that a file without a block is found out."""
    return sorted(name for name in {*FILES, *methods.names()} if stage in (None, load(name).stage))


def config_of(name):
    stage = load(name).stage
    assert name in BLOCKS[stage], f"params.yaml ships no block {stage}.{name}"
    return configure(name, BLOCKS[stage][name], stage)


def images(placement="device", device=CPU) -> Images:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), COUNTS)
    pixels = rng.integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
    return Images(pixels, labels, AUGMENTATION, device, placement)


def replica_of(name, tmp_path, seed=0, head="linear", cls=None):
    def make():
        return build("resnet8", head, 1, 3), (cls or load(name))(config_of(name), torch.tensor(COUNTS))

    return train.Replica(name, seed, make, tmp_path / name / f"seed{seed}.pt", "recipe")


def trained(replica, recipe=RECIPE, placement="device"):
    ((network, history, _),) = train.train([replica], images(placement), recipe, RUNTIME)
    return network, history


def run(name, tmp_path, seed=0, epochs=3, sam_rho=0.0):
    recipe = RECIPE.model_copy(update={"epochs": epochs, "sam_rho": sam_rho})
    return trained(replica_of(name, tmp_path, seed), recipe)


def predict(network, data):
    (logits,) = train.predict([network], data, RUNTIME)
    return logits


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    network, history = run("ce", tmp_path, epochs=1)
    parameters = SimpleNamespace(runtime=RUNTIME)
    placed = {"holdout": images(), "test": images()}
    good, bad = (train.TrainedNetwork(copy.deepcopy(network), history, Cost()) for _ in range(2))
    found = calibrate.predict(parameters, {3: good}, placed, CellName("d", "ce", "crt"))
    assert np.array_equal(found[3].test_logits, predict(network, images()))
    assert np.array_equal(found[3].holdout_labels, images().labels)
    with torch.no_grad():
        bad.network.head.bias[0] = math.inf  # one number of each image is enough
    with pytest.raises(UserError, match=r"^d/ce/crt seed 5: its holdout logits are not finite numbers: milder .* crt"):
        calibrate.predict(parameters, {3: good, 5: bad}, placed, CellName("d", "ce", "crt"))


def test_the_history_is_the_mean_over_the_steps_of_an_epoch_and_progress_the_share_that_is_over(tmp_path):
    losses, hits, shares = [], [], []

    class Noting(load("ce")):
        def loss(self, network, batch, progress):
            shares.append(progress.item())
            return super().loss(network, batch, progress)

        def observe(self, logits, batch):
            losses.append(F.cross_entropy(logits, batch.targets).item())
            hits.append((logits.argmax(1) == batch.labels).float().mean().item())

    _, history = trained(replica_of("ce", tmp_path, cls=Noting))
    for epoch, row in enumerate(history):
        steps = slice(3 * epoch, 3 * epoch + 3)
        assert row["loss"] == pytest.approx(np.mean(losses[steps]), rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(np.mean(hits[steps]), rel=1e-5)
        assert shares[steps] == [epoch / len(history)] * 3


def test_the_seconds_of_a_training_are_those_that_passed(tmp_path):
    began = time.monotonic()
    ((_, _, cost),) = train.train([replica_of("ce", tmp_path)], images(), RECIPE, RUNTIME)
    assert 0 < cost.seconds <= time.monotonic() - began


def test_what_a_training_took_is_told_as_it_was_when_it_is_gone_on_with(tmp_path):
    alone, other = (replica_of("ce", tmp_path, seed) for seed in (0, 1))
    ((_, _, first),) = train.train([alone], images(), RECIPE, RUNTIME)
    both = RUNTIME.model_copy(update={"replicas": 2})
    (_, _, again), (_, _, second) = train.train([alone, other], images("host"), RECIPE, both)
    assert again == first
    assert (first.at_once, first.placement) == (1, "device")
    assert (second.at_once, second.placement) == (2, "host")
    assert first.machine == train.machine(CPU)


def test_a_checkpoint_that_began_with_other_weights_is_not_gone_on_from(tmp_path, capsys):
    """Nor with weights where it began at random, and the other way around."""
    begins = (None, "a", "b")
    for before, now in itertools.product(begins, begins):
        replica = dataclasses.replace(replica_of("ce", tmp_path / f"{before}{now}"), begins=before)
        short = RECIPE.model_copy(update={"epochs": 1})
        trained(replica, short)
        capsys.readouterr()
        _, history = trained(dataclasses.replace(replica, begins=now))
        assert len(history) == 3
        assert ("goes on after 1 of 3 epochs" in capsys.readouterr().err) == (before == now)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("epoch"),
        lambda saved: saved.update(cost={"hours": 1}),
        lambda saved: saved.update(optimiser=[]),
        lambda saved: saved.update(network=7),
        lambda saved: saved["network"].popitem(),
    ],
)
def test_a_checkpoint_of_another_training_is_one_line(change, tmp_path):
    run("ce", tmp_path, epochs=1)
    path = tmp_path / "ce/seed0.pt"
    saved = checkpoint.load(path, CPU)
    change(saved)
    checkpoint.save(path, saved)
    with pytest.raises(UserError, match=r"holds a checkpoint of another training \(\w+\): delete it and run again$"):
        run("ce", tmp_path, epochs=2)


@pytest.mark.parametrize(
    ("replicas", "networks", "device", "expected"),
    [(3, 5, "cpu", 3), (9, 5, "cpu", 5), (2, 0, "cpu", 1), (40, 50, "cpu", 40), (40, 50, "cuda", 32)],
)
def test_how_many_train_at_once(replicas, networks, device, expected):
    runtime = RUNTIME.model_copy(update={"replicas": replicas})
    assert train.at_once(runtime, networks, torch.device(device)) == expected


@pytest.mark.parametrize("name", names())
def test_it_trains_and_predicts(name, tmp_path):
    network, history = run(name, tmp_path)
    assert all(parameter.grad is None for parameter in network.parameters())  # of no use, and of a network's size
    assert len(history) == (3 if load(name).trained else 0)
    assert all(np.isfinite(row["loss"]) for row in history)
    logits = predict(network, images())
    assert logits.shape == (sum(COUNTS), 3)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_a_precision_that_the_device_lacks_is_refused():
    with pytest.raises(UserError, match=r"^params.yaml: precision: is tf32, which exists only on a GPU"):
        train.prepare(RUNTIME, "tf32")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), r"Tried to allocate 2 GiB\)$"),
        (MemoryError(), r"\(MemoryError\)$"),
        (None, "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line_that_names_what_takes_it(error, says, tmp_path):
    class Huge(load("ce")):
        def loss(self, network, batch, progress):
            del network, progress
            if error:
                raise error
            return torch.empty(1 << 50).sum(), batch.images

    with pytest.raises(UserError, match=rf"^there is not enough memory: use a smaller runtime.replicas, or .*{says}"):
        trained(replica_of("ce", tmp_path, cls=Huge))


def test_another_error_of_torch_stays_what_it_is(tmp_path):
    class Wrong(load("ce")):
        def loss(self, network, batch, progress):
            del network, progress
            return torch.ones(2) @ torch.ones(3), batch.images

    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trained(replica_of("ce", tmp_path, cls=Wrong))


def test_large_images_are_predicted_in_small_batches(monkeypatch):
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return images

    monkeypatch.setattr(train, "EVALUATION_PIXELS", 5 * 8 * 8)
    train.over_batches(Looks(), images())
    assert max(seen) == 5
    assert sum(seen) == sum(COUNTS)
    monkeypatch.setattr(train, "EVALUATION_PIXELS", 1)
    train.over_batches(Looks(), images())
    assert seen[-1] == 1


@pytest.mark.parametrize("name", names())
def test_gradient_reaches_exactly_what_it_says_it_trains(name):
    network = build("resnet8", "linear", 1, 3)
    method = load(name)(config_of(name), torch.tensor(COUNTS))
    groups = method.setup(network)
    named = {id(p) for group in groups for p in group.parameters}
    if not method.trained:
        assert not named
        return
    assert named == {id(p) for p in [*network.parameters(), *method.parameters()] if p.requires_grad}
    method.set_mode(network)
    data, draws = images(), train.Draws(0, 0, torch.Generator())
    (pairs,) = data.steps([np.arange(21)[None]] * len(method.samplers()))
    views = [data.prepare(*pair, method.config.augmentation, draws) for pair in pairs for _ in range(method.views)]
    batch = method.mix(views, draws)
    reached = set()
    for _ in range(2):  # a gate between two equal things takes no gradient at the very start
        loss, logits = method.loss(network, batch, torch.tensor(0.5, dtype=torch.float64))
        assert loss.shape == ()
        assert logits.shape == (21, 3)
        network.zero_grad()
        loss.backward()
        learning = [p for p in [*network.parameters(), *method.parameters()] if p.grad is not None]
        reached |= {id(p) for p in learning if p.grad.abs().sum() > 0}
        with torch.no_grad():
            for parameter in learning:
                parameter -= 0.05 * parameter.grad
    assert reached == named


@pytest.mark.parametrize("name", names())
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, tmp_path):
    weights = [run(name, tmp_path / str(i), seed)[0].state_dict() for i, seed in enumerate((4, 4, 5))]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("name", [n for n in names() if load(n).trained])
def test_an_interrupted_training_ends_with_the_same_bits(name, tmp_path):
    class StoppedError(Exception):
        pass

    whole, history = run(name, tmp_path / "whole")
    save, saves = train.checkpoint.save, []

    def save_once(path, state):
        save(path, state)
        saves.append(state["epoch"])
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.checkpoint, "save", save_once)
        for _ in range(2):
            with pytest.raises(StoppedError):
                run(name, tmp_path / "broken")
    resumed, resumed_history = run(name, tmp_path / "broken")
    assert saves == [1, 2]
    assert resumed_history == history
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("name", names("representations"))
def test_it_finishes_with_the_head_that_it_names(name, tmp_path):
    network, _ = run(name, tmp_path, epochs=1)
    fresh = build("resnet8", load(name).head, 1, 3)
    fresh.load_state_dict(network.state_dict())
    assert np.array_equal(predict(fresh, images()), predict(network, images()))


@pytest.mark.parametrize("classifier", names("classifiers"))
@pytest.mark.parametrize("head", HEADS)
def test_every_classifier_goes_on_every_head(classifier, head, tmp_path):
    network, _ = trained(replica_of(classifier, tmp_path, head=head))
    assert np.isfinite(predict(network, images())).all()


@pytest.mark.parametrize("name", [n for n in names() if load(n).trained])
def test_sam_trains_it_too(name, tmp_path):
    plain, _ = run(name, tmp_path / "plain", epochs=1)
    network, history = run(name, tmp_path / "sam", epochs=1, sam_rho=0.05)
    assert np.isfinite(history[0]["loss"])
    other = plain.state_dict()
    assert any(not torch.equal(value, other[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", names())
def test_what_takes_steps_has_an_augmentation_and_nothing_else_has(name):
    cls = load(name)
    assert issubclass(cls.Config, TrainedConfig) == cls.trained


@pytest.mark.parametrize("name", methods.names())
def test_its_settings_have_no_key_of_the_blocks_own(name):
    """These stand in a block or an override beside the settings, and would never reach them."""
    assert not {"method", "recipe", "backbone"} & load(name).Config.model_fields.keys()


@pytest.mark.parametrize("name", names())
def test_it_is_documented_and_typed(name):
    cls = load(name)
    module = inspect.getmodule(cls)
    assert module.__doc__
    assert re.search(r"\b20[0-2]\d\b|et al\.", module.__doc__), "the docstring names its paper"
    assert issubclass(cls.Config, params.Strict)


@pytest.mark.parametrize("name", names())
def test_a_method_imports_no_other_method(name):
    source = inspect.getsource(inspect.getmodule(load(name)))
    assert "tailcal.methods" not in source


def test_training_accuracy_counts_a_mixed_label_with_its_share():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    assert train.training_accuracy(logits, torch.tensor([0, 1, 1])).item() == pytest.approx(2 / 3)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.5, 0.5, 0.0]])
    assert train.training_accuracy(logits, soft).item() == pytest.approx((0.7 + 0.6 + 0.0) / 3)


SCHEDULES = {
    "cosine": {"shape": "cosine", "warmup": 1, "warmup_lr": 0.01},
    "multistep": {"shape": "multistep", "warmup": 1, "warmup_lr": 0.0, "milestones": [2, 3], "gamma": 0.1},
}


@pytest.mark.parametrize("shape", SCHEDULES)
def test_every_step_has_the_learning_rate_of_its_epoch(shape, tmp_path, monkeypatch):
    recipe = Recipe.model_validate(RECIPE.model_dump(exclude_none=True) | {"epochs": 4, "schedule": SCHEDULES[shape]})
    taken, step = [], SGD.step

    def noted(self, lr, *losses):
        taken.append(lr.item())
        if len(taken) == 7:
            raise KeyboardInterrupt
        return step(self, lr, *losses)

    monkeypatch.setattr(SGD, "step", noted)
    with pytest.raises(KeyboardInterrupt):
        trained(replica_of("ce", tmp_path), recipe)
    trained(replica_of("ce", tmp_path), recipe)
    rates = [learning_rate(recipe, epoch) for epoch in range(4)]
    assert len(set(rates)) == 4
    steps = [rate for rate in rates for _ in range(3)]  # of 8 of the 21 images
    assert taken == pytest.approx(steps[:7] + steps[6:])  # resumed at the third epoch


def test_a_budget_of_iterations_ends_within_an_epoch(tmp_path):
    steps = []

    class Counting(load("ce")):
        def observe(self, logits, batch):
            assert not logits.requires_grad
            steps.append(len(batch.labels))

    values = RECIPE.model_dump(exclude_none=True) | {"iterations": 7}
    values.pop("epochs")
    recipe = Recipe.model_validate(values)
    _, history = trained(replica_of("ce", tmp_path, cls=Counting), recipe)
    assert steps == [8] * 7  # 3 + 3 + 1 full batches of the 21 images
    assert [row["lr"] for row in history] == pytest.approx([learning_rate(recipe, spent) for spent in (0, 3, 6)])


@pytest.mark.parametrize(
    ("iterations", "schedule", "refused"),
    [
        (
            3,
            {"shape": "cosine", "warmup": 1, "warmup_lr": 0.0},
            "say 1, .* epoch of 3 iterations begins, the last at 0 ",
        ),
        (7, {"shape": "cosine", "warmup": 6, "warmup_lr": 0.0}, None),
        (6, {"shape": "cosine", "warmup": 4, "warmup_lr": 0.0}, "say 4, .* the last at 3 .*: must be 3 or less"),
        (6, {"shape": "multistep", "warmup": 0, "warmup_lr": 0.0, "milestones": [2, 4], "gamma": 0.1}, "say 4, "),
        (6, {"shape": "multistep", "warmup": 0, "warmup_lr": 0.0, "milestones": [2, 3], "gamma": 0.1}, None),
    ],
)
def test_a_change_of_the_learning_rate_that_would_come_too_late_is_refused(iterations, schedule, refused, tmp_path):
    """21 images in batches of 8 are 3 iterations an epoch."""
    values = RECIPE.model_dump(exclude={"epochs"}, exclude_none=True) | {"iterations": iterations, "schedule": schedule}
    replica = replica_of("ce", tmp_path)
    if refused:
        with pytest.raises(UserError, match=rf"\.schedule: warmup or milestones {refused}"):
            trained(replica, Recipe.model_validate(values))
    else:
        assert trained(replica, Recipe.model_validate(values))


def test_each_view_and_each_sampler_gets_its_own_draws(tmp_path):
    seen = []

    class Watching(load("fsgl")):
        def mix(self, batches, draws):
            seen.append(batches)
            return super().mix(batches, draws)

    trained(replica_of("fsgl", tmp_path, cls=Watching), RECIPE.model_copy(update={"epochs": 1}))
    one, two, other_one, other_two = seen[0]
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(other_one.labels, other_two.labels)
    assert not torch.equal(one.labels, other_one.labels)
    assert not torch.equal(one.images, two.images)


@pytest.mark.parametrize("name", ["fsgl", "mislas", "ncm"])
@pytest.mark.parametrize("placement", ["host", "disk"])
def test_where_the_images_lie_makes_no_difference(name, placement, tmp_path):
    (here, told), (there, told_there) = (
        trained(replica_of(name, tmp_path / where), placement=where) for where in ("device", placement)
    )
    assert told == told_there
    assert all(torch.equal(value, there.state_dict()[key]) for key, value in here.state_dict().items())
    assert np.array_equal(predict(here, images("device")), predict(here, images(placement)))


def test_a_training_that_diverges_in_its_very_last_step_is_refused(tmp_path):
    # One step with a rate that leaves no weight a number: the only loss is measured before, and is finite.
    recipe = RECIPE.model_copy(update={"epochs": None, "iterations": 1, "lr": float("nan")})
    with pytest.raises(UserError, match=r"ce: a weight became no finite number in epoch 1; there is no checkpoint yet"):
        trained(replica_of("ce", tmp_path), recipe)
