"""The rule that accepts a faster way of training, at its borders; the stage from digits to its table; wrong files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages import modes as stage
from tailcal import params
from tailcal.benchmark import modes
from tailcal.benchmark.modes import Mode, Outcome, Record, Seed
from tailcal.errors import UserError
from tests.conftest import ROOT, edit

BF16 = Mode(precision="bf16", cuda_graphs=False, tolerance=0.02)
GRAPHS = Mode(precision="float32", cuda_graphs=True)
SMALL = {
    "seeds": [3, 1, 4, 0, 5],
    "modes": {"bf16": {"precision": "bf16", "cuda_graphs": False, "tolerance": 0.02}},
    "cells": [{"dataset": "digits_lt", "representation": "mixup", "classifier": "mislas"}],
}


def outcome(top1=0.9, ece=0.05, losses=(2.0, 1.0, 4.0, 2.0, 3.0), digest="a") -> Outcome:
    """A reference whose deviations are 1 point of top-1 and 0.5 of ECE; or what is held against it."""
    seeds = {
        str(i): Seed(top1=top1, ece=ece, first_epoch_loss=loss, sha256={"classifier": f"{digest}{i}"})
        for i, loss in enumerate(losses)
    }
    return Outcome(top1=top1, top1_std=0.01, ece=ece, ece_std=0.005, seconds=1.0, seeds=seeds)


@pytest.mark.parametrize("mode", [BF16, GRAPHS])
def test_what_equals_the_reference_is_accepted(mode):
    verdict = modes.judge(outcome(), outcome(), mode)
    assert (verdict.top1, verdict.ece, verdict.first_epoch_loss, verdict.refused_for) == (0, 0, 0, [])
    assert verdict.same_bits
    assert verdict.accepted


@pytest.mark.parametrize(
    ("other", "refused_for"),
    [
        (outcome(top1=0.91), []),  # 0.91 - 0.9 is a little more than 0.01 in floating point
        (outcome(top1=0.89), []),
        (outcome(top1=0.910001), ["top-1"]),
        (outcome(top1=0.889999), ["top-1"]),
        (outcome(ece=0.055), []),
        (outcome(ece=0.045), []),
        (outcome(ece=0.055001), ["ECE"]),
        (outcome(ece=0.044999), ["ECE"]),
        (outcome(losses=(2.0, 1.02, 4.08, 1.96, 3.0)), []),
        (outcome(losses=(2.0, 1.0, 4.0801, 2.0, 3.0)), ["first epoch"]),
        (outcome(losses=(2.0, 0.9799, 4.0, 2.0, 3.0)), ["first epoch"]),
        (outcome(top1=0.92, ece=0.06, losses=(9.0, 1.0, 4.0, 2.0, 3.0)), ["top-1", "ECE", "first epoch"]),
        (outcome(digest="b"), []),
    ],
)
def test_another_precision_must_agree_within_the_spread_of_the_seeds(other, refused_for):
    verdict = modes.judge(outcome(), other, BF16)
    assert verdict.refused_for == refused_for
    assert verdict.accepted == (not refused_for)


def test_the_same_precision_must_give_the_same_bits():
    verdict = modes.judge(outcome(), outcome(digest="b"), GRAPHS)
    assert (verdict.refused_for, verdict.same_bits, verdict.accepted) == (["bits"], False, False)
    one = outcome()
    one.seeds["3"].sha256["predictions"] = "c"
    assert not modes.judge(outcome(), one, GRAPHS).accepted


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("shift", [0, 0.5, 1, 2])
def test_how_often_a_mode_passes(seeds, shift):
    samples = np.random.default_rng(0).normal(size=(2, 40_000, seeds))
    off = np.abs(samples[0].mean(1) - shift - samples[1].mean(1)) > samples[0].std(1, ddof=1)
    assert 1 - modes.passes(seeds, shift) == pytest.approx(off.mean(), abs=0.01)


def test_a_table_says_what_a_mode_was_refused_for():
    reference = outcome()
    results = {}
    for name, mode, other in (
        ("bf16", BF16, outcome(top1=0.88, ece=0.0512, losses=(2.01, 1.0, 4.0, 2.0, 3.0))),
        ("graphs", GRAPHS, outcome()),
    ):
        results[name] = modes.ModeResult(outcome=other, verdict=modes.judge(reference, other, mode))
    cell = {"dataset": "d", "representation": "r", "classifier": "c", "source": "folder"}
    record = Record(
        machine={"gpu": "A GPU", "torch": "2"},
        versions={},
        code="",
        at_once=2,
        seeds=[0, 1, 2, 3, 4],
        modes={"bf16": BF16, "graphs": GRAPHS},
        cells=[modes.Measured(**cell, reference=reference, modes=results)],
    )
    text = modes.markdown(record)
    assert "| d/r/c | float32 | 90.00 ± 1.00 | 5.00 ± 0.50 | — | — | — | 1.0 | — |" in text
    assert "| d/r/c | bf16 | 88.00 ± 1.00 | 5.12 ± 0.50 | −2.00 | +0.12 | 0.50% (0.0100) | 1.0 | no: top-1 |" in text
    assert "| d/r/c | graphs | 90.00 ± 1.00 | 5.00 ± 0.50 | +0.00 | +0.00 | 0.00% (0.0000) | 1.0 | yes |" in text
    assert "bf16: accepted on 0 of 1 cells, refused on d/r/c." in text
    assert "graphs: accepted on 1 of 1 cells." in text
    assert "at every seed: bf16 2%." in text
    assert "graphs must do more" in text
    assert "The images of d came from a folder" in text


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's parameters with trainings of one and two epochs, and a small benchmark/modes.yaml."""
    for name in ("presets", "published"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    short = [("epochs: 60\n", "epochs: 2\n"), ("warmup: 5 ", "warmup: 0 "), ("- 48\n      - 54\n", "- 1\n")]
    edit(tmp_path / "params.yaml", [*short, ("epochs: 10\n", "epochs: 1\n")])
    (tmp_path / "benchmark").mkdir()
    write(tmp_path / modes.FILE, SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modes"])
    return tmp_path


def write(path: Path, cpu: dict, cuda: dict | None = None) -> None:
    path.write_text(yaml.safe_dump({"cpu": cpu, "cuda": cuda or cpu}))


@pytest.mark.pipeline
def test_from_digits_to_the_table(project, capsys):
    stage.main()
    text = (project / stage.OUT).read_text()
    record = Record.model_validate(json.loads(text))
    assert record.seeds == SMALL["seeds"]
    (cell,) = record.cells
    assert cell.name == "digits_lt/mixup/mislas"
    other = cell.modes["bf16"]
    assert other.verdict == modes.judge(cell.reference, other.outcome, BF16)
    assert not other.verdict.same_bits
    assert other.verdict.first_epoch_loss > 0
    for one in (cell.reference, other.outcome):
        assert list(one.seeds) == ["3", "1", "4", "0", "5"]
        for key in ("top1", "ece"):
            values = [getattr(seed, key) for seed in one.seeds.values()]
            assert np.mean(values) == pytest.approx(getattr(one, key), abs=2e-6)
            assert np.std(values, ddof=1) == pytest.approx(getattr(one, f"{key}_std"), abs=2e-6)
        assert one.seconds > 0
    assert (project / stage.TEXT).read_text() == modes.markdown(record)
    assert capsys.readouterr().out == modes.table(record).markdown()
    assert {path.name for path in Path("data").iterdir()} == {"downloads", "modes"}
    assert {path.name for path in Path("metrics").iterdir()} == {"modes.json", "modes.md"}

    stage.main()  # everything is there, times included: nothing is trained again
    assert (project / stage.OUT).read_text() == text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_recorded_steps_are_accepted(project):
    write(project / modes.FILE, SMALL, SMALL | {"modes": {"graphs": GRAPHS.model_dump()}})
    stage.main()
    record = Record.model_validate(json.loads((project / stage.OUT).read_text()))
    assert record.cells[0].modes["graphs"].verdict.same_bits


def test_the_shipped_file_is_right_and_its_cells_can_be_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    declared, p = modes.load(params.load())
    for suite in (declared.cpu, declared.cuda):
        assert stage.code(p, suite)
    assert set(declared.cuda.modes) == {"graphs", "tf32", "bf16"}


def test_a_data_set_of_the_published_tables_can_be_a_cell(project):
    cell = {"dataset": "footing_cpu", "representation": "ce", "classifier": "marc"}
    write(project / modes.FILE, SMALL | {"cells": [cell]})
    declared, p = modes.load(params.load())
    assert p.datasets["footing_cpu"].backbone == "resnet8"
    assert stage.code(p, declared.cpu)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": [0, 1]}, "cpu.seeds: must be 5 or more, got 2: fewer say nothing of their spread"),
        ({"seeds": [0, 1, 2, 2, 3]}, "cpu.seeds: lists 2 more than once"),
        ({"late_epochs": 3}, "cpu.late_epochs: unknown key"),
        ({"modes": {}}, "cpu.modes: must have 1 entry or more"),
        ({"modes": {"x": {"precision": "fp8", "cuda_graphs": False}}}, "cpu.modes.x.precision: input should be 'float"),
        (
            {"modes": {"x": {"precision": "bf16", "cuda_graphs": False}}},
            "cpu.modes.x: tolerance is missing: precision ",
        ),
        ({"modes": {"x": BF16.model_dump() | {"tolerance": 0.0}}}, "cpu.modes.x.tolerance: input should be greater"),
        ({"modes": {"x": GRAPHS.model_dump()}}, "cpu.modes.x: tf32 and cuda_graphs exist only on a GPU: use bf16"),
        ({"modes": {"x": BF16.model_dump() | {"precision": "tf32"}}}, "cpu.modes.x: tf32 and cuda_graphs exist only"),
        (
            {"modes": {"x": GRAPHS.model_dump() | {"tolerance": 0.1}}},
            "cpu.modes.x: tolerance must be left out with precision float32, which must give the same bits",
        ),
        ({"modes": {"float32": BF16.model_dump()}}, "cpu: modes.float32: float32 without cuda_graphs is the reference"),
        (
            {"modes": {"plain": {"precision": "float32", "cuda_graphs": False}}},
            "cpu: modes.plain: float32 without cuda_graphs is the reference, trained anyway",
        ),
        ({"cells": [SMALL["cells"][0]] * 2}, "cpu: cells lists digits_lt/mixup/mislas more than once"),
        ({"cells": [SMALL["cells"][0] | {"dataset": "x"}]}, "cpu.cells.0.dataset: must be one of cifar100_lt_10, "),
        ({"cells": [SMALL["cells"][0] | {"representation": "crt"}]}, "cpu.cells.0.representation: must be one of ba"),
        ({"cells": [SMALL["cells"][0] | {"classifier": "x"}]}, "cpu.cells.0.classifier: must be one of crt, disalign"),
        ({"cells": [{"dataset": "digits_lt", "representation": "ce"}]}, "cpu.cells.0.classifier: this key is missing"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(project, change, says):
    write(project / modes.FILE, SMALL | change)
    with pytest.raises(UserError) as caught:
        stage.main()
    assert str(caught.value).startswith(f"{modes.FILE}: {says}")
    assert "\n" not in str(caught.value)
    assert not Path("data").exists()


def test_images_that_are_not_there_are_one_line(project, monkeypatch):
    write(project / modes.FILE, SMALL | {"cells": [SMALL["cells"][0] | {"dataset": "cifar10_lt_100"}]})
    monkeypatch.setattr(sys, "argv", ["modes", "--images", "nowhere"])
    with pytest.raises(UserError, match="nowhere/cifar10: there is no such folder") as caught:
        stage.main()
    assert "\n" not in str(caught.value)
    assert Path.cwd() == project


def test_several_processes_are_refused(project):
    edit(project / "params.yaml", [("processes: 1", "processes: 2")])
    with pytest.raises(UserError, match=r"^params\.yaml: runtime\.processes: is 2, and .*: must be 1 here; "):
        stage.main()


def test_images_for_no_archive_are_refused(project, monkeypatch):
    write(project / modes.FILE, SMALL)
    monkeypatch.setattr(sys, "argv", ["modes", "--images", "images"])
    with pytest.raises(UserError, match="archives of cifar10 and cifar100, and none of digits_lt has one: leave it"):
        stage.main()


def test_the_committed_table_is_that_of_the_committed_numbers():
    record = Record.model_validate(json.loads((ROOT / stage.OUT).read_text()))
    assert (ROOT / stage.TEXT).read_text() == modes.markdown(record)
    for cell in record.cells:
        for name, result in cell.modes.items():
            assert result.verdict == modes.judge(cell.reference, result.outcome, record.modes[name])
