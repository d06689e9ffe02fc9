"""The pictures open, are not blank, are the same at every run, and say the numbers they are drawn from."""

from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
import yaml
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager, get_data_path
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
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
    "reliability": lambda path: figures.reliability(report_inputs.bins(_generator()), 0.01, "one cell", path),
    "one seed": lambda path: figures.reliability(report_inputs.bins(_generator(), seeds=1), 0.01, "one seed", path),
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
    "accuracy of one panel": lambda path: figures.per_class_accuracy(
        {GRID[0]: report_inputs.classes(_generator(), 30)}, "names", path
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
    figures.reliability(bins, 0.01, "one cell", tmp_path / "unused.png")
    accuracy = (bins["accuracy"] * bins["count"]).sum() / bins["count"].sum()
    ece = figures.calibration_error(bins)
    assert drawn[0].axes[0].get_title() == f"accuracy {accuracy:.2%}    ECE {ece:.2%} (chance alone 1.00%)"


def test_a_bar_ends_at_its_accuracy_and_its_gap_at_the_confidence(drawn, tmp_path):
    rows = [(0.0, 0.5, 0.375, 0.5, 30), (0.5, 1.0, 0.875, 0.625, 90)]
    columns = ["bin_lower", "bin_upper", "confidence", "accuracy", "count"]
    figures.reliability(pd.DataFrame(rows, columns=columns).assign(seed=0), 0.01, "two bins", tmp_path / "unused.png")
    upper, lower = drawn[0].axes

    def bars(colour):
        found = [bar for bar in upper.patches if bar.get_facecolor()[:3] == to_rgb(colour)]
        return [(bar.get_x(), bar.get_y(), bar.get_height()) for bar in found]

    assert bars(figures.ACCURACY) == [(0.0, 0.0, 0.5), (0.5, 0.0, 0.625)]
    assert bars(figures.OVER[0]) == [(0.5, 0.625, 0.25)]
    assert bars(figures.UNDER[0]) == [(0.0, 0.5, -0.125)]
    assert [bar.get_height() for bar in lower.patches] == [0.25, 0.75]
    named = {
        text.get_text(): bar for text, bar in zip(drawn[0].legends[0].get_texts(), _handles(drawn[0]), strict=True)
    }
    for name, (colour, _) in (("gap: overconfident", figures.OVER), ("gap: underconfident", figures.UNDER)):
        assert named[name].get_facecolor()[:3] == to_rgb(colour)


def _handles(figure):
    return figure.legends[0].legend_handles


def test_a_cell_lies_at_its_accuracy_and_ece_with_the_bars_of_each(drawn, tmp_path):
    points = _points()[:1].assign(top1=0.75, top1_std=0.125, ece=0.5, ece_std=0.25)
    figures.accuracy_against_ece(points, "one cell", tmp_path / "unused.png")
    (_, _, bars) = drawn[0].axes[0].containers[0]
    ends = [bar.get_segments()[0].tolist() for bar in bars]
    assert ends == [[[0.625, 0.5], [0.875, 0.5]], [[0.75, 0.25], [0.75, 0.75]]]
    assert drawn[0].axes[0].xaxis.get_major_formatter()(0.625) == "62.5%"


def test_the_legend_names_each_colour_and_each_marker(drawn, tmp_path):
    points = _points()
    figures.accuracy_against_ece(points, "all cells", tmp_path / "unused.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    handles = dict(zip(texts, _handles(drawn[0]), strict=True))
    for cell, line in zip(points.itertuples(), drawn[0].axes[0].lines, strict=True):
        assert handles[cell.representation].get_color() == line.get_color()
        assert handles[cell.classifier].get_marker() == line.get_marker()


@pytest.mark.parametrize("number", [30, 31])
def test_classes_are_counted_from_the_most_frequent_on_in_the_colours_of_their_groups(drawn, tmp_path, number):
    classes = report_inputs.classes(_generator(), number)
    figures.class_counts(classes.sample(frac=1, random_state=0), "shuffled", tmp_path / "unused.png")
    axes = drawn[0].axes[0]
    lengths = [bar.get_width() if number == 30 else bar.get_height() for bar in axes.patches]
    assert lengths == classes["train_count"].tolist()
    colours = [figures.GROUP_COLOURS[group] for group in classes["group"]]
    assert [bar.get_facecolor()[:3] for bar in axes.patches] == list(map(to_rgb, colours))
    handles = zip(drawn[0].legends[0].get_texts(), _handles(drawn[0]), strict=True)
    shown = {text.get_text(): handle.get_facecolor()[:3] for text, handle in handles}
    groups = {figures.GROUP_TITLES[group]: to_rgb(colour) for group, colour in figures.GROUP_COLOURS.items()}
    assert shown == groups
    if number == 30:
        assert _labels(axes.yaxis)[3:] == classes["name"][3:].tolist()


def test_named_classes_stand_from_the_most_frequent_on_each_with_its_own_accuracy(drawn, tmp_path):
    names = enumerate(product(("ce", "mixup"), ("joint", "crt")))
    cells = {name: report_inputs.classes(np.random.default_rng(k)) for k, name in names}
    cells = {cell: classes.assign(accuracy_std=classes["accuracy"] / 8) for cell, classes in cells.items()}
    shuffled = {cell: classes.sample(frac=1, random_state=0) for cell, classes in cells.items()}
    figures.per_class_accuracy(shuffled, "shuffled", tmp_path / "unused.png")
    assert _labels(drawn[0].axes[0].xaxis)[3:] == [f"class {k}" for k in range(3, 10)]
    lines, bars_of_all = (
        [one for axes in drawn[0].axes for one in getattr(axes, of)] for of in ("lines", "collections")
    )
    for line, bars, classes in zip(lines, bars_of_all, cells.values(), strict=True):
        assert line.get_ydata().tolist() == classes["accuracy"].tolist()
        lower = [bar[0, 1] for bar in bars.get_segments()]
        np.testing.assert_allclose(lower, classes["accuracy"] * 7 / 8)


def test_the_accuracy_of_a_training_is_the_mean_in_a_band_from_the_least_to_the_most(drawn, tmp_path):
    history = report_inputs.history(_generator())
    figures.training_curves({"ce": history}, "stage 1", tmp_path / "unused.png")
    accuracy = drawn[0].axes[0]
    by_epoch = history.groupby("epoch")["train_accuracy"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), by_epoch.mean())
    corners = accuracy.collections[0].get_paths()[0].vertices
    for epoch, values in by_epoch:
        at = corners[corners[:, 0] == epoch, 1]
        assert (at.min(), at.max()) == (values.min(), values.max())


def _texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


@pytest.mark.parametrize(
    "draw",
    [
        lambda bins, *rest: figures.reliability(bins, 0.01, *rest),
        lambda bins, *rest: figures.reliability_overview({GRID[0]: bins}, *rest),
    ],
)
def test_bars_are_said_to_be_pooled_and_the_ece_to_be_a_mean_where_there_is_more_than_one_seed(drawn, tmp_path, draw):
    for seeds in (3, 1):
        draw(report_inputs.bins(_generator(), seeds), "one cell", tmp_path / "unused.png")
    several, one = map(_texts, drawn)
    assert "bars: predictions of 3 seeds pooled; ECE: mean of the seeds' own" in several
    assert not any("seed" in text or "pooled" in text for text in one)


def test_overview_names_a_row_beside_the_label_of_its_axis(drawn, tmp_path):
    figures.reliability_overview(
        {cell: report_inputs.bins(_generator()) for cell in GRID}, "every cell", tmp_path / "unused.png"
    )
    FigureCanvasAgg(drawn[0]).draw()
    for axes, name in zip(drawn[0].axes[:: len(report_inputs.CLASSIFIERS)], report_inputs.REPRESENTATIONS, strict=True):
        assert axes.get_ylabel() == "accuracy"
        (beside,) = [text for text in axes.texts if text.get_text() == name]
        assert beside.get_fontweight() == "bold"
        assert beside.get_window_extent().x1 < axes.yaxis.label.get_window_extent().x0


def test_overview_has_a_panel_a_cell_in_the_order_of_the_grid(drawn, tmp_path):
    cells = {cell: report_inputs.bins(np.random.default_rng(k)) for k, cell in enumerate(GRID)}
    figures.reliability_overview(cells, "every cell", tmp_path / "unused.png")
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == [f"ECE {figures.calibration_error(bins):.1%}" for bins in cells.values()]


def test_with_every_method_on_the_grid_no_two_cells_look_the_same(drawn, tmp_path):
    blocks = yaml.safe_load((report_inputs.ROOT / "params.yaml").read_text())
    grid, generator = list(product(blocks["representations"], blocks["classifiers"])), _generator()
    points = [{"representation": r, "classifier": c} | report_inputs.numbers(generator) for r, c in grid]
    figures.accuracy_against_ece(pd.DataFrame(points), "all", tmp_path / "unused.png")
    figures.per_class_accuracy(
        {cell: report_inputs.classes(generator) for cell in grid}, "all", tmp_path / "unused.png"
    )
    histories = {name: report_inputs.history(generator) for name in blocks["representations"]}
    figures.training_curves(histories, "all", tmp_path / "unused.png")
    for figure, number in zip(drawn, (len(grid), len(blocks["classifiers"]), len(histories)), strict=True):
        lines = figure.axes[0].lines
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker(), line.get_fillstyle()) for line in lines}
        assert len(looks) == len(lines) == number


def test_many_classes_are_averaged_over_neighbouring_ranks(drawn, tmp_path):
    classes = report_inputs.classes(_generator(), 50)
    shuffled = classes.sample(frac=1, random_state=0)
    figures.per_class_accuracy({("ce", "joint"): shuffled}, "many", tmp_path / "unused.png")
    line = drawn[0].axes[0].lines[0]
    assert line.get_xdata()[0] == 3
    assert line.get_ydata()[0] == pytest.approx(classes["accuracy"][:5].mean())
    assert len(line.get_xdata()) == 10
    assert drawn[0].axes[0].get_xlabel() == "class, by frequency (means of 5)"


def test_named_classes_have_bars_of_the_deviation_over_seeds_that_end_at_100_percent(drawn, tmp_path):
    classes = report_inputs.classes(_generator()).assign(accuracy=0.95, accuracy_std=0.1)
    figures.per_class_accuracy({("ce", "joint"): classes}, "bars", tmp_path / "unused.png")
    (bars,) = drawn[0].axes[0].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[pytest.approx(0.85), 1]] * len(classes)
    assert drawn[0].legends[0].get_texts()[-1].get_text() == "one standard deviation over seeds"


def test_no_bar_leaves_what_an_accuracy_can_be(drawn, tmp_path):
    classes = report_inputs.classes(_generator()).assign(accuracy=0.1, accuracy_std=0.4)
    figures.per_class_accuracy({("ce", "joint"): classes}, "bars", tmp_path / "unused.png")
    assert {end for bar in drawn[0].axes[0].collections[0].get_segments() for end in bar[:, 1].tolist()} == {0, 0.5}


def test_one_seed_has_no_bars_and_no_word_of_them(drawn, tmp_path):
    classes = report_inputs.classes(_generator()).assign(accuracy_std=np.nan)
    figures.per_class_accuracy({("ce", "joint"): classes}, "one seed", tmp_path / "unused.png")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["joint"]


def test_the_classifiers_of_a_class_stand_side_by_side_in_the_order_of_the_grid(drawn, tmp_path):
    cells = {("ce", name): report_inputs.classes(_generator()) for name in ("joint", "crt", "marc")}
    figures.per_class_accuracy(cells, "three", tmp_path / "unused.png")
    first = [line.get_xdata()[0] for line in drawn[0].axes[0].lines]
    assert first == sorted(set(first))
    assert first[1] == 1


def test_a_loss_has_a_panel_and_a_scale_of_its_own(drawn, tmp_path):
    histories = {name: report_inputs.history(_generator()) for name in "abcdefg"}
    histories["c"] = histories["c"].assign(loss=histories["c"]["loss"] - 100)
    figures.training_curves(histories, "seven", tmp_path / "unused.png")
    accuracy, *losses = drawn[0].axes
    assert len(accuracy.lines) == 7
    assert [axes.get_title() for axes in losses] == list("abcdefg")
    for name, axes in zip("abcdefg", losses, strict=True):
        means = histories[name].groupby("epoch")["loss"].mean()
        np.testing.assert_allclose(axes.lines[0].get_ydata(), means)
        low, high = axes.get_ylim()
        assert (low == 0) == (name != "c")
        assert high < means.max() + 10


NAMES = ["猫", "cat 猫", "кошка", "a_b", "$\\frac{$", "犬の 写真 dog", "x", "y", "z", "long " * 9 + "猫"]
WITHOUT_FONT = ["#0", "cat #1", "кошка", "a_b", "$\\frac{$", "dog #5", "x", "y", "z"]


def _named(names):
    return report_inputs.classes(_generator(), len(names)).assign(name=names)


def _labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.fixture
def only_its_own_font(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", _font_entries())


def _font_entries():
    """What matplotlib brings along, whatever else this machine has."""
    return [font for font in font_manager.fontManager.ttflist if font.fname.startswith(get_data_path())]


@pytest.fixture
def font_with_a_cat(tmp_path, monkeypatch):
    """An installed font with no other character than 猫."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": pen.glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Only a Cat", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "cat.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", _font_entries())
    font_manager.fontManager.addfont(tmp_path / "cat.ttf")


@pytest.mark.usefixtures("only_its_own_font")
@pytest.mark.filterwarnings("error")
def test_names_that_no_font_can_draw_become_numbers(tmp_path, drawn, caplog):
    classes = _named(NAMES)
    figures.class_counts(classes, "counts", tmp_path / "unused.png")
    figures.per_class_accuracy({("ce", "joint"): classes}, "accuracy", tmp_path / "unused.png")
    counts, accuracy = drawn
    long = ("long " * 9)[:32]
    assert _labels(counts.axes[0].yaxis) == [*WITHOUT_FONT, f"{long}… #9"]
    assert _labels(accuracy.axes[0].xaxis) == [*WITHOUT_FONT, f"{long[:20]}… #9"]
    assert classes["name"].tolist() == NAMES
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
    assert not caplog.records


@pytest.mark.usefixtures("font_with_a_cat")
@pytest.mark.filterwarnings("error")
def test_an_installed_font_stands_in_for_what_the_first_one_lacks(tmp_path, drawn, caplog):
    figures.class_counts(_named(NAMES), "counts", tmp_path / "unused.png")
    axis = drawn[0].axes[0].yaxis
    assert _labels(axis)[:6] == ["猫", "cat 猫", "кошка", "a_b", "$\\frac{$", "dog #5"]
    assert axis.get_ticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Only a Cat"]
    FigureCanvasAgg(drawn[0]).draw()
    assert not caplog.records


@pytest.mark.usefixtures("font_with_a_cat")
def test_names_that_the_first_font_can_draw_are_drawn_in_it_alone(tmp_path, drawn):
    figures.class_counts(_named(["ant", "bée", "кот"]), "counts", tmp_path / "unused.png")
    assert drawn[0].axes[0].yaxis.get_ticklabels()[0].get_fontfamily() == ["DejaVu Sans"]


@pytest.mark.parametrize(("number", "named"), [(30, True), (31, False)])
def test_few_classes_are_named_below_the_lowest_panels(tmp_path, drawn, number, named):
    cells = {(name, "joint"): report_inputs.classes(_generator(), number) for name in "abcde"}
    figures.per_class_accuracy(cells, "five", tmp_path / "unused.png")
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_title()}
    assert list(panels) == list("abcde")
    FigureCanvasAgg(drawn[0]).draw()
    shown = {name: any(label.get_visible() for label in axes.get_xticklabels()) for name, axes in panels.items()}
    assert shown == {"a": False, "b": False, "c": False, "d": True, "e": True}
    assert (_labels(panels["e"].xaxis)[3:5] == ["class 3", "class 4"]) == named
    assert len(panels["a"].lines[0].get_xdata()) == (30 if named else 10)


def test_the_names_below_a_panel_do_not_overlap(tmp_path, drawn):
    for names in ("0123456789", ["airplane", "automobile", *"abcdefgh"], ["a very long name indeed"] * 30):
        cells = {(name, "joint"): _named(list(names)) for name in "abcde"}
        figures.per_class_accuracy(cells, "five", tmp_path / "unused.png")
        FigureCanvasAgg(drawn[-1]).draw()
        boxes = [label.get_window_extent() for label in drawn[-1].axes[-1].get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        assert all(box.y0 > 0 for box in boxes)


def test_no_accuracy_of_a_class_lies_outside_its_panel(drawn, tmp_path):
    classes = report_inputs.classes(_generator())
    lower = classes.assign(accuracy=classes["accuracy"] / 10)
    figures.per_class_accuracy({("ce", "joint"): classes, ("mixup", "joint"): lower}, "two", tmp_path / "unused.png")
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert high == 1
        assert low <= axes.lines[0].get_ydata().min()


LONG = ("a_long_name_of_a_method_of_which_nothing_is_cut", "short", "another_name_that_needs_two_lines")
LONG_DRAWINGS = {
    "reliability": lambda _, path: figures.reliability(report_inputs.bins(_generator()), 0.01, " / ".join(LONG), path),
    "overview": lambda cells, path: figures.reliability_overview(
        {cell: report_inputs.bins(_generator()) for cell in cells}, f"{LONG[0]}: reliability", path
    ),
    "scatter": lambda cells, path: figures.accuracy_against_ece(
        pd.DataFrame([{"representation": r, "classifier": c} | report_inputs.numbers(_generator()) for r, c in cells]),
        f"{LONG[0]}: accuracy against calibration error",
        path,
    ),
    "counts": lambda _, path: figures.class_counts(
        _named(["a class with a long name indeed, cut"] * 20), f"{LONG[0]}: training images per class", path
    ),
    "accuracy": lambda cells, path: figures.per_class_accuracy(
        {cell: report_inputs.classes(_generator()) for cell in cells}, f"{LONG[0]}: accuracy of each class", path
    ),
    "training": lambda cells, path: figures.training_curves(
        {name: report_inputs.history(_generator()) for name, _ in cells}, f"{LONG[0]}: training", path
    ),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("draw", LONG_DRAWINGS.values(), ids=LONG_DRAWINGS.keys())
def test_nothing_long_is_cut_by_the_edge(drawn, tmp_path, draw, rows):
    draw(list(product(LONG[:rows], LONG)), tmp_path / "unused.png")
    canvas = FigureCanvasAgg(drawn[0])
    canvas.draw()
    inches = drawn[0].get_tightbbox(canvas.get_renderer())
    width, height = drawn[0].get_size_inches()
    assert inches.x0 >= 0
    assert inches.y0 >= 0
    assert inches.x1 <= width
    assert inches.y1 <= height


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([50, 50], "50 test images per class"),
        ([50, 3], "3 to 50 test images per class"),
        ([1, 1], "1 test image per class"),
    ],
)
@pytest.mark.parametrize("number", [10, 100])
def test_accuracy_of_classes_says_how_many_images_it_is_measured_on(drawn, tmp_path, number, counts, says):
    classes = report_inputs.classes(_generator(), number).assign(test_count=np.resize(counts, number))
    figures.per_class_accuracy({("ce", "joint"): classes}, "measured", tmp_path / "unused.png")
    assert says in _texts(drawn[0])


@pytest.mark.parametrize("number", [10, 100])
@pytest.mark.parametrize(("factor", "scale"), [(20, "linear"), (1000, "log")])
def test_no_class_has_too_few_images_to_be_seen(drawn, tmp_path, number, factor, scale):
    classes = report_inputs.classes(_generator(), number, 5000, factor)
    figures.class_counts(classes, "a long tail", tmp_path / "unused.png")
    FigureCanvasAgg(drawn[0]).draw()
    axes = drawn[0].axes[0]
    counts = axes.xaxis if number == 10 else axes.yaxis
    assert counts.get_scale() == scale
    assert counts.get_label_text() == "training images" + (", logarithmic" if scale == "log" else "")
    ends = [bar.get_window_extent().corners()[-1] - axes.bbox.p0 for bar in axes.patches]
    assert min(end[0 if number == 10 else 1] for end in ends) > 10


def test_a_class_without_images_keeps_the_axis_linear(drawn, tmp_path):
    classes = report_inputs.classes(_generator()).assign(train_count=[*range(200, 1100, 100), 0])
    figures.class_counts(classes, "none of one", tmp_path / "unused.png")
    FigureCanvasAgg(drawn[0]).draw()
    assert drawn[0].axes[0].get_xscale() == "linear"


def test_one_seed_has_no_spread_and_no_word_of_it(drawn, tmp_path):
    points = _points().assign(top1_std=None, ece_std=None)
    figures.accuracy_against_ece(points, "one seed", tmp_path / "unused.png")
    figures.training_curves({"ce": report_inputs.history(_generator(), seeds=1)}, "stage 1", tmp_path / "unused.png")
    assert not any("over seeds" in text for figure in drawn for text in _texts(figure))


def test_several_seeds_have_a_spread_that_is_explained(drawn, tmp_path):
    figures.accuracy_against_ece(_points(), "seeds", tmp_path / "unused.png")
    figures.training_curves({"ce": report_inputs.history(_generator())}, "stage 1", tmp_path / "unused.png")
    assert all(any("over seeds" in text for text in _texts(figure)) for figure in drawn)


@pytest.mark.parametrize(("least", "scale"), [(0.05, "linear"), (0.01, "log"), (0.0, "linear")])
def test_the_least_ece_is_seen_beside_the_largest(drawn, tmp_path, least, scale):
    points = _points().assign(ece=0.3, ece_std=0.0)
    points.loc[0, "ece"] = least
    figures.accuracy_against_ece(points, "unlike", tmp_path / "unused.png")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert low <= least < 0.3 < high / 1.05  # no marker is cut at the top


def test_a_note_stands_below_the_title(drawn, tmp_path):
    classes = {GRID[0]: report_inputs.classes(_generator())}
    figures.per_class_accuracy(classes, "a title", tmp_path / "unused.png")
    figure = drawn[0]
    FigureCanvasAgg(figure).draw()
    (note,) = [text for text in figure.findobj(Text) if "test images per class" in text.get_text()]
    (title,) = [text for text in figure.findobj(Text) if text.get_text().strip() == "a title"]
    one_line = title.get_window_extent().height / (1 + title.get_text().count("\n"))
    assert note.get_window_extent().y1 <= title.get_window_extent().y1 - one_line * 0.9


def test_bars_of_few_predictions_are_faint(drawn, tmp_path):
    bins = report_inputs.bins(_generator(), seeds=1).assign(count=100)
    bins.loc[bins.index[-2:], "count"] = figures.FEW_PREDICTIONS, figures.FEW_PREDICTIONS - 1
    figures.reliability(bins, 0.01, "one cell", tmp_path / "unused.png")
    bars = [bar for bar in drawn[0].axes[0].patches if bar.get_facecolor()[:3] == to_rgb(figures.ACCURACY)]
    strengths = {round(bar.get_x(), 3): bar.get_facecolor()[3] for bar in bars}
    last = round(bins["bin_lower"].iloc[-1], 3)
    assert strengths.pop(last) < 0.5
    assert set(strengths.values()) == {1.0}
