"""The pictures open, are not blank, are the same at every run, and say the numbers they are drawn from."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tailcal import figures
from tests import report_inputs

GRID = [
    (representation, classifier)
    for representation in report_inputs.REPRESENTATIONS
    for classifier in report_inputs.CLASSIFIERS
]


def _generator():
    return np.random.default_rng(1)


def _points():
    generator = _generator()
    return pd.DataFrame([{"representation": r, "classifier": c} | report_inputs.numbers(generator) for r, c in GRID])


DRAWINGS = {
    "reliability": lambda path: figures.reliability(report_inputs.bins(_generator()), "one cell", path),
    "one seed": lambda path: figures.reliability(report_inputs.bins(_generator(), seeds=1), "one seed", path),
    "overview": lambda path: figures.reliability_overview(
        {cell: report_inputs.bins(_generator()) for cell in GRID}, "every cell", path
    ),
    "overview of one": lambda path: figures.reliability_overview(
        {GRID[0]: report_inputs.bins(_generator())}, "one cell", path
    ),
    "scatter": lambda path: figures.accuracy_against_ece(_points(), "all cells", path),
    "scatter without deviations": lambda path: figures.accuracy_against_ece(
        _points().assign(top1_std=None, ece_std=None), "one seed", path
    ),
    "10 classes": lambda path: figures.class_counts(report_inputs.classes(_generator()), "few classes", path),
    "100 classes": lambda path: figures.class_counts(report_inputs.classes(_generator(), 100), "many", path),
    "accuracy of 10 classes": lambda path: figures.per_class_accuracy(
        {cell: report_inputs.classes(_generator()) for cell in GRID}, "few classes", path
    ),
    "accuracy of 100 classes": lambda path: figures.per_class_accuracy(
        {cell: report_inputs.classes(_generator(), 100) for cell in GRID}, "many classes", path
    ),
    "training": lambda path: figures.training_curves(
        {name: report_inputs.history(_generator()) for name in report_inputs.REPRESENTATIONS}, "stage 1", path
    ),
    "training of one epoch": lambda path: figures.training_curves(
        {"ce": report_inputs.history(_generator(), epochs=1)}, "stage 1", path
    ),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figure that a function of `figures` would save."""
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: kept.append(figure))
    return kept


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_picture_opens_is_not_blank_and_is_the_same_twice(draw, tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))
        assert image.format == "PNG"
        assert not image.info.keys() & {"Software", "Creation Time", "date"}
    assert min(pixels.shape) > 300
    assert 0.005 < (pixels < 200).mean() < 0.6


def test_calibration_error_is_the_mean_over_seeds_of_its_definition():
    bins = report_inputs.bins(_generator())
    expected = []
    for seed in (0, 1, 2):
        rows = [row for row in bins.itertuples() if row.seed == seed and row.count > 0]
        total = sum(row.count for row in rows)
        expected.append(sum(row.count / total * abs(row.accuracy - row.confidence) for row in rows))
    assert figures.calibration_error(bins) == pytest.approx(sum(expected) / 3, abs=1e-12)


def test_a_gap_of_opposite_sign_in_two_seeds_does_not_cancel():
    row = {"bin_lower": 0.5, "bin_upper": 1.0, "confidence": 0.75, "count": 10}
    bins = pd.DataFrame([{"seed": 0, "accuracy": 0.65} | row, {"seed": 1, "accuracy": 0.85} | row])
    assert figures.calibration_error(bins) == pytest.approx(0.1)
    assert figures.pool(bins)["accuracy"].tolist() == [pytest.approx(0.75)]


def test_pooled_bins_are_weighted_by_their_counts():
    row = {"bin_lower": 0.5, "bin_upper": 1.0}
    bins = pd.DataFrame(
        [
            {"seed": 0, "confidence": 0.6, "accuracy": 0.5, "count": 30} | row,
            {"seed": 1, "confidence": 0.8, "accuracy": 1.0, "count": 10} | row,
            {"seed": 1, "confidence": None, "accuracy": None, "count": 0, "bin_lower": 0.0, "bin_upper": 0.5},
        ]
    )
    pooled = figures.pool(bins)
    assert pooled.to_dict("records") == [
        row | {"count": 40, "confidence": pytest.approx(0.65), "accuracy": pytest.approx(0.625)}
    ]


def test_reliability_diagram_says_its_ece_and_accuracy(drawn, tmp_path):
    bins = report_inputs.bins(_generator())
    figures.reliability(bins, "one cell", tmp_path / "unused.png")
    accuracy = (bins["accuracy"] * bins["count"]).sum() / bins["count"].sum()
    assert drawn[0].axes[0].get_title() == f"accuracy {accuracy:.1%}    ECE {figures.calibration_error(bins):.2%}"


def test_overview_has_a_panel_a_cell_in_the_order_of_the_grid(drawn, tmp_path):
    cells = {cell: report_inputs.bins(np.random.default_rng(k)) for k, cell in enumerate(GRID)}
    figures.reliability_overview(cells, "every cell", tmp_path / "unused.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == [f"ECE {figures.calibration_error(bins):.1%}" for bins in cells.values()]


def test_many_classes_are_averaged_over_neighbouring_ranks(drawn, tmp_path):
    classes = report_inputs.classes(_generator(), 100)
    shuffled = classes.sample(frac=1, random_state=0)
    figures.per_class_accuracy({("ce", "joint"): shuffled}, "many", tmp_path / "unused.png")
    line = drawn[0].axes[0].lines[0]
    assert line.get_xdata()[0] == 5.5
    assert line.get_ydata()[0] == pytest.approx(classes["accuracy"][:10].mean(), abs=0.02)
    assert len(line.get_xdata()) == 10


def test_no_accuracy_of_a_class_lies_outside_its_panel(drawn, tmp_path):
    classes = report_inputs.classes(_generator())
    lower = classes.assign(accuracy=classes["accuracy"] / 10)
    figures.per_class_accuracy({("ce", "joint"): classes, ("mixup", "joint"): lower}, "two", tmp_path / "unused.png")
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert high == 1
        assert low <= axes.lines[0].get_ydata().min()
