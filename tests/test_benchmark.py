"""The benchmark measures what it says; how fast anything is, no test asks."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages import benchmark as stage
from tailcal import method, mixing
from tailcal.benchmark import cases, measure, references
from tailcal.errors import UserError
from tailcal.method import Batch
from tests.conftest import edit
from tests.test_dvc import ROOT

SHIPPED = ROOT / cases.FILE
CPU = torch.device("cpu")
SETTINGS = {
    "ce": {"augmentation": "standard"},
    "mixup": {"augmentation": "standard", "alpha": 1.0},
    "fsgl": {
        "augmentation": "standard",
        "gamma": 0.5,
        "label_weighting": 1.2,
        "sampling": 0.0,
        "hidden": 16,
        "consistency": 4.0,
    },
}
TINY = """\
repeats: 2
workers: 0
workloads:
  tiny:
    method: mixup
    settings: {augmentation: standard, alpha: 1.0}
    backbone: resnet8
    batch_size: 8
    sam_rho: 0.0
    epochs: 3
    images: {side: 8, channels: 3, classes: 3, largest: 8, factor: 4}
cpu: &suite
  start_up: one
  cases:
    one:
      {workload: tiny, replicas: 1, precision: float32, cuda_graphs: false, epochs: 1, against: [published, resident]}
    two:
      {workload: tiny, replicas: 2, precision: bf16, cuda_graphs: false, epochs: 2, against: [one]}
cuda: *suite
"""


def workload(name: str = "ce", **changes) -> cases.Workload:
    values = {
        "method": name,
        "settings": SETTINGS[name],
        "backbone": "resnet8",
        "batch_size": 12,
        "sam_rho": 0.0,
        "epochs": 3,
        "images": {"side": 8, "channels": 1, "classes": 3, "largest": 24, "factor": 4},
    }
    return cases.Workload.model_validate(values | changes)


def case(**changes) -> cases.Case:
    values = {"workload": "w", "replicas": 1, "precision": "float32", "cuda_graphs": False, "epochs": 2, "against": []}
    return cases.Case.model_validate(values | changes)


def easy_job(name: str, **changes) -> references.Job:
    """Images that are as bright as their class says."""
    w = workload(name, **changes)
    noise, labels = w.images.draw()
    images = (noise // 8 + labels[:, None, None, None] * 100).astype(np.uint8)
    return references.Job(w, images, labels, CPU, "float32", 0)


def test_the_noise_has_a_long_tail():
    noise = cases.Noise(side=8, channels=3, classes=100, largest=500, factor=100.0)
    images, labels = noise.draw()
    assert images.shape == (10847, 8, 8, 3)  # as many as CIFAR-100-LT has at that factor
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.bincount(labels)[[0, 99]].tolist() == [500, 5]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("repeats: 5", "repeats: 0"), "repeats: input should be greater than or equal to 1, got 0"),
        (("repeats: 5", "repeat: 5"), "repeat: unknown key"),
        (("method: ce", "method: cee"), "workloads.digits_ce.method: must be one of bagmar, "),
        (("method: ce", "method: joint"), "workloads.digits_ce.method: must be one of bagmar, "),
        (("backbone: resnet8", "backbone: resnet9"), "workloads.digits_ce.backbone: must be one of resnet8, "),
        (("alpha: 1.0", "alpha: -1.0"), "workloads.small_mixup.settings.alpha: input should be greater than 0"),
        (("batch_size: 64", "batch_size: 640"), "batch_size is 640, but there are 351 images: use 351 or fewer"),
        (("factor: 20", "factor: 105"), "workloads.digits_ce.images: factor is 105: must not be above largest (104)"),
        (("start_up: digits_ce", "start_up: x"), "cpu.start_up: must be one of digits_ce, digits_ce_2, "),
        (("workload: digits_ce", "workload: x"), "cpu.cases.digits_ce.workload: must be one of digits_ce, small_mixup"),
        (("- published", "- x"), "cpu.cases.digits_ce.against: must be one of published, resident, digits_ce, "),
        (("- ce\n", "- resident\n"), "cuda.cases.bagmar.against: there is no loop resident of bagmar: there are ce, "),
        (("precision: float32", "precision: tf32"), "cpu.cases.digits_ce: tf32 and cuda_graphs exist only on a GPU"),
        (("cuda_graphs: false", "cuda_graphs: true"), "cpu.cases.digits_ce: tf32 and cuda_graphs exist only on a GPU"),
        (("batch_size: 128", "batch_size: 4096"), "an epoch of cifar_ce has 2 steps: it must have more than 3"),
    ],
)
def test_a_mistake_in_its_parameters_is_one_line(change, says, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    edit(path, [change])
    with pytest.raises(UserError) as error:
        cases.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_parameters_are_right():
    benchmark = cases.load(SHIPPED)
    assert benchmark.workloads["cifar_mixup"].steps == 84


def test_the_crop_by_hand_is_a_window_of_the_padded_image():
    images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    padded = F.pad(images, (1,) * 4)
    windows = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    windows += [window.flip(-1) for window in windows]
    cropped = references.crop_flip(images, 1)
    same = torch.stack([(window == cropped).flatten(1).all(1) for window in windows])
    assert cropped.dtype == torch.uint8
    assert same.any(0).all()
    assert same.any(1).sum() > 9  # of 18, by 64 images


def test_the_box_by_hand_has_the_share_of_the_area():
    zeros, ones = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    shares = [references.cut(zeros, ones, 0.75).mean().item() for _ in range(50)]
    assert max(shares) == 0.25  # clipped at the border otherwise
    assert torch.equal(references.cut(zeros, ones, 1.0), zeros)


@pytest.mark.parametrize(
    ("loop", "name"), [(loop, name) for loop, names in cases.WRITTEN_BY_HAND.items() for name in names]
)
def test_a_loop_by_hand_learns(loop, name):
    np.random.seed(0)
    epoch = references.LOOPS[loop](easy_job(name, sam_rho=0.05 if name == "fsgl" else 0.0))
    losses = [epoch() for _ in range(20)]
    assert all(np.isfinite(losses))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


def test_a_loop_reads_images_in_worker_processes_too():
    job = easy_job("ce", images={"side": 8, "channels": 3, "classes": 3, "largest": 24, "factor": 4})
    assert np.isfinite(references.published(references.Job(**{**vars(job), "workers": 1}))())


def equations(name: str) -> method.Method:
    counts = torch.from_numpy(workload(name).images.counts)
    cls = method.load(name)
    return cls(cls.Config.model_validate(SETTINGS[name]), counts)


def test_mixup_by_hand_is_mixup(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.3)
    job = easy_job("mixup")
    network = job.network()
    twin = copy.deepcopy(network)
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    partner = torch.randperm(12)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: partner)
    value, logits = references.one_view(job, network, job.sgd(network))(images, labels)
    mixed, targets = mixing.mixup(images, labels, partner, 0.3, 3)
    expected, expected_logits = equations("mixup").loss(twin, Batch(mixed, labels, targets), torch.tensor(0.5))
    torch.testing.assert_close(logits, expected_logits.detach())
    torch.testing.assert_close(value, expected.detach())


def test_fsgl_by_hand_is_fsgl(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.3)
    monkeypatch.setattr(references, "cut", lambda images, others, lam: lam * images + (1 - lam) * others.flip(-1))
    job, equation = easy_job("fsgl"), equations("fsgl")
    network = job.network()
    step = references.fsgl(job, network, equation.counts)
    twin = copy.deepcopy(network)
    images, labels = list(torch.randn(4, 12, 1, 8, 8)), [torch.arange(12) % 3, torch.arange(12) % 2]
    value = step(images, labels)  # rho is 0, so it descends from where it is
    views = [0.3 * images[0] + 0.7 * images[2], 0.3 * images[1] + 0.7 * images[3].flip(-1)]
    targets = mixing.soft_targets(*labels, 0.3, 3)
    batch = Batch(torch.stack(views), labels[0], targets)
    expected, _ = equation.loss(twin, batch, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(value, expected.detach().float())


def test_intervals_that_overlap_count_once():
    assert measure.union([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
    assert measure.union([]) == 0


def test_a_shortened_workload_keeps_its_tail():
    long = cases.load(SHIPPED).workloads["cifar_mixup"]
    short = measure.shortened(long, 20)
    assert 18 <= short.steps <= 22
    assert short.images.factor == long.images.factor
    assert measure.shortened(short, 100) == short


def test_a_spread_keeps_median_and_extremes():
    assert measure.spread([3.0, 1.0, 123456.7]) == {"median": 3.0, "min": 1.0, "max": 123500.0}


def test_a_round_runs_the_real_loop_and_counts_its_epochs():
    begun = []
    w = workload("ce")
    measure.run("tiny", case(replicas=2), w, 3 * w.steps + 1, begun.append)
    assert sorted(begun) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert measure.images_per_second("tiny", case(replicas=2), w) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_gpu_the_profiler_sees_the_kernels(replicas, cuda_graphs):
    told = measure.gpu("tiny", case(replicas=replicas, cuda_graphs=cuda_graphs), workload("mixup", batch_size=8))
    assert 0 < told["busy"] <= 1
    assert told["kernel_ms"] > 0
    assert told["memory"] > 0


@pytest.mark.pipeline
def test_the_stage_writes_its_numbers_and_the_pipeline_does_not_see_it(project):
    p = project()
    (p.root / cases.FILE).write_text(TINY)
    output = p.run("dvc", "repro", "--force", "benchmark/dvc.yaml:benchmark")
    assert "| one " in output
    assert "represent" not in output
    record = json.loads((p.root / "metrics/benchmark.json").read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert record["start_up"]["seconds"]["min"] > 0
    assert set(record["cases"]) == {"one", "two"}
    assert set(record["cases"]["one"]["against"]) == {"published", "resident"}
    one = record["cases"]["one"]
    assert one["step_ms"]["min"] == pytest.approx(8000 / one["images_per_second"]["max"], rel=1e-2)
    changed = json.loads(p.run("dvc", "status", "--json").splitlines()[-1])
    assert not [stage for stage in changed if "benchmark" in stage]
    assert "benchmark" not in p.run("dvc", "metrics", "show")


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Run the stage on invented numbers; returns the cases in its file and what was measured. `broken` ones fail."""
    monkeypatch.chdir(tmp_path)
    cases.FILE.parent.mkdir()
    cases.FILE.write_text(TINY)
    numbers = {"images_per_second": {"median": 8.0, "min": 7.0, "max": 9.0}, "gpu": None}
    numbers |= {"step_ms": {"median": 1.0}, "training_seconds": {"median": 1.0}}

    def measured(name, suite=None, benchmark=None, _device=None):
        run.started.append(name)
        if name in run.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        case = suite[name]
        against = {rival: {"ratio": {"median": 1.0}} for rival in case.against}
        return measure.describe(case, benchmark.workload(case)) | numbers | {"against": against}

    def start_up(name, _repeats):
        run.started.append("start_up")
        if "start_up" in run.broken:
            raise subprocess.CalledProcessError(1, "python")
        return {"case": name, "seconds": {"median": 1.0}}

    def run(*options, broken=()):
        run.started, run.broken = [], broken
        monkeypatch.setattr(sys, "argv", ["benchmark", *options])
        stage.main()
        return list(json.loads(stage.OUT.read_text())["cases"]), run.started

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "start_up", start_up)
    return run


def test_what_fails_does_not_keep_the_rest_from_being_measured(benchmark, capsys):
    with pytest.raises(UserError, match=r"metrics/benchmark.json lacks start_up, one, which failed"):
        benchmark(broken=("start_up", "one"))
    assert "not permitted when stream is capturing" in capsys.readouterr().err
    assert list(json.loads(stage.OUT.read_text())["cases"]) == ["two"]
    # two, which is held against one, cannot tell that it was this one
    assert benchmark("--missing") == (["one", "two"], ["start_up", "one", "two"])
    assert benchmark("--missing") == (["one", "two"], [])
    assert benchmark("--case", "two") == (["one", "two"], ["two"])  # the other is kept
    with pytest.raises(UserError, match="lacks start_up, which failed"):
        benchmark(broken=["start_up"])
    assert benchmark("--missing") == (["one", "two"], ["start_up"])
    assert json.loads(stage.OUT.read_text())["start_up"]
    assert benchmark("--case", "two", "--missing") == (["one", "two"], [])
    with pytest.raises(UserError, match="--case: must be one of one, two, got 'three'"):
        benchmark("--case", "three")
    assert benchmark() == (["one", "two"], ["start_up", "one", "two"])


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("[published, resident]", "[resident]", ["one"]),
        ("replicas: 2", "replicas: 3", ["two"]),
        ("largest: 8", "largest: 9", ["one", "two"]),
        ("replicas: 1", "replicas: 3", ["one", "two"]),  # two is held against one
        ("start_up: one", "start_up: two", ["start_up"]),
    ],
)
def test_what_would_be_measured_otherwise_is_measured_again(benchmark, old, new, again):
    benchmark()
    cases.FILE.write_text(TINY.replace(old, new))
    assert benchmark("--missing")[1] == again
    assert json.loads(stage.OUT.read_text())["start_up"]["case"] == ("two" if again == ["start_up"] else "one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"metrics/benchmark.json is damaged \(.*\): move it away, to begin a new one"),
        ("{}", r"metrics/benchmark.json is damaged \(start_up: .*\): move it away, to begin a new one"),
        ('{"start_up": {}, "cases": {"one": null}}', r"metrics/benchmark.json is damaged \(cases.one: .*"),
        (
            '{"start_up": {}, "cases": {}}',
            r"metrics/benchmark.json: machine was None, and is \{.*move it away, to begin a new one",
        ),
    ],
)
def test_a_file_that_cannot_be_gone_on_from_is_named(benchmark, content, message):
    stage.OUT.parent.mkdir()
    stage.OUT.write_text(content)
    with pytest.raises(UserError, match=message):
        benchmark("--missing")
    assert benchmark() == (["one", "two"], ["start_up", "one", "two"])


@pytest.mark.pipeline
def test_a_case_that_is_not_there_is_one_line(project):
    output = project().inside("benchmark", "--alone", "first_step", "x", ok=False)
    assert output.startswith("error: --alone first_step: must be one of ")
    assert output.count("\n") == 1
