"""The pictures, drawn from data frames alone. The same numbers give the same bytes. Imports no torch.

A representation has one colour and a classifier one marker, each by its place on the grid, the same in every picture.
Where representations outnumber the colours, these begin again with other lines and with markers that are not filled.
Palettes: Okabe and Ito's for representations, Paul Tol's muted and high-contrast ones for classifiers and shot groups;
all three survive colour blindness.

Frames of bins have the columns of a cell's reliability.csv, frames of classes those of its per_class.csv, histories
those of history.csv. Mappings keep the order of the grid.
"""

from collections.abc import Mapping
from itertools import cycle, product
from math import ceil
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib import font_manager, get_data_path, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageOps

from tailcal.files import atomic

Cell = tuple[str, str]  # representation, classifier

REPRESENTATION_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CLASSIFIER_COLOURS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#AA4499", "#44AA99", "#999933", "#882255", "#88CCEE")
CLASSIFIER_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "d", "p", "h")
LAPS = (  # what goes with the colours when they are gone through for the first time, the second, the third
    {"linestyle": "-", "fillstyle": "full"},
    {"linestyle": "--", "fillstyle": "none"},
    {"linestyle": ":", "fillstyle": "left"},
)
GROUP_COLOURS = {"many": "#004488", "medium": "#DDAA33", "few": "#BB5566"}
GROUP_TITLES = {"many": "many (over 100 images)", "medium": "medium (20 to 100)", "few": "few (below 20)"}
ACCURACY, INK = "#A9C4DE", "#333333"
BAND = "#F3F3F3"  # behind every other class
ENDS = {"color": "#1F4E79", "linewidth": 1.8}  # of the bars of an accuracy, seen also above or below a gap
# The colour and the hatch of a gap, unlike any colour of the other pictures.
OVER, UNDER = ("#C1272D", "////"), ("#5B2A86", "\\\\\\\\")

NAMED_CLASSES = 30  # more classes than this are not named, and accuracies averaged over neighbouring frequency ranks
RANK_GROUPS = 10
LEVEL_CHARACTERS = 40  # names that need more than this beside each other are written upwards
FEW_PREDICTIONS, FAINT = 10, 0.3  # of a bin, over all seeds: what so few say is drawn with this opacity
LOSSES_ACROSS = 5  # panels in a row
WIDE_RANGE = 8  # largest over smallest ECE, from which on their axis is logarithmic
LONG_TAIL = 50  # the same of training images, whose shortest bars could not be seen otherwise
TITLE_CHARACTERS = 50  # of a line of a title, as many as the narrowest picture has room for

ROUND = (1, 2, 5, 10)  # what ticks are multiples of
MARGIN = 10  # pixels around a picture

FONT = "DejaVu Sans"  # comes with matplotlib
# Every setting that a user's own matplotlibrc might change, and text taken literally: class names may hold a $.
STYLE = {
    "font.family": FONT,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "hatch.linewidth": 0.8,
    "figure.dpi": 110,
    "figure.facecolor": "white",
}


def calibration_error(bins: pd.DataFrame) -> float:
    """The expected calibration error, a fraction: the mean over seeds of each seed's own, from the seed's own bins."""
    filled = bins[bins["count"] > 0]
    weighted = filled["count"] * (filled["accuracy"] - filled["confidence"]).abs()
    return float((weighted.groupby(filled["seed"]).sum() / filled["count"].groupby(filled["seed"]).sum()).mean())


def pool(bins: pd.DataFrame) -> pd.DataFrame:
    """One row a bin that any seed fills: confidence and accuracy averaged over all its predictions, counts added."""
    filled = bins[bins["count"] > 0]
    sums = filled[["count"]].assign(
        confidence=filled["confidence"] * filled["count"], accuracy=filled["accuracy"] * filled["count"]
    )
    pooled = sums.groupby([filled["bin_lower"], filled["bin_upper"]]).sum().reset_index()
    for column in ("confidence", "accuracy"):
        pooled[column] /= pooled["count"]
    return pooled


@rc_context(STYLE)
def reliability(bins: pd.DataFrame, floor: float, title: str, path: Path) -> None:
    """One cell's reliability diagram: accuracy a bin, its gap to the confidence, and the share of predictions.

    `floor`: what chance alone would give as its ECE, a fraction.
    """
    pooled = pool(bins)
    accuracy = np.average(pooled["accuracy"], weights=pooled["count"])
    figure = Figure(figsize=(5.6, 7.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.suptitle(_fold(title, TITLE_CHARACTERS), fontsize=12, fontweight="bold")
    note = _pooling(bins)
    error = calibration_error(bins)
    numbers = f"accuracy {accuracy:.2%}    ECE {error:.2%} (chance alone {floor:.2%})"
    upper.set_title(numbers, pad=22 if note else None)
    upper.annotate(note, (0.5, 1), (0, 8), "axes fraction", "offset points", ha="center", fontsize=9)
    _reliability_panel(upper, pooled)
    upper.set_ylabel("accuracy")
    share = pooled["count"] / pooled["count"].sum()
    lower.bar(pooled["bin_lower"], share, _width(pooled), align="edge", color="#888888", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="predictions")
    _percent(lower.yaxis)
    lower.yaxis.set_major_locator(MaxNLocator(3))
    figure.legend(handles=_reliability_legend(), loc="outside lower center", ncols=2)
    _save(figure, path)


@rc_context(STYLE)
def reliability_overview(cells: Mapping[Cell, pd.DataFrame], title: str, path: Path) -> None:
    """The reliability diagrams of all cells of a data set: one row per representation, one column per classifier."""
    rows, columns = _axes_of(cells)
    figure = Figure(figsize=(max(1.2 + 2 * len(columns), 6.5), 1.6 + 2.1 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # 100% of a panel and 0% of the next are two numbers
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    _head(figure, title, _pooling(next(iter(cells.values()))))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = panels[i, j]
            _reliability_panel(axes, pool(cells[row, column]))
            axes.set_title(f"ECE {calibration_error(cells[row, column]):.1%}", fontsize=10)
            axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
            axes.tick_params(labelsize=9)
        label = panels[i, 0].set_ylabel("accuracy", fontsize=10)
        panels[i, 0].annotate(
            _fold(row),
            (0, 0.5),
            (-4, 0),
            label,
            "offset points",
            ha="right",
            va="center",
            multialignment="center",
            rotation=90,
            fontsize=10,
            fontweight="bold",
        )
    for axes, column in zip(panels[0], columns, strict=True):
        axes.annotate(
            _fold(column),
            (0.5, 1),
            (0, 22),
            "axes fraction",
            "offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
        )
    for axes in panels[-1]:
        axes.set_xlabel("confidence", fontsize=10)
    figure.legend(handles=_reliability_legend(), loc="outside lower center", ncols=3)
    _save(figure, path)


@rc_context(STYLE)
def accuracy_against_ece(cells: pd.DataFrame, title: str, path: Path) -> None:
    """Top-1 accuracy against ECE, one point per cell, bars of one standard deviation over seeds.

    `cells` has the columns representation, classifier, top1, top1_std, ece and ece_std (fractions; no std: no bar).
    """
    looks, markers = _looks(cells["representation"].unique()), _markers(cells["classifier"].unique())
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axes = figure.subplots()
    note = "bars: one standard deviation over seeds" if cells[["top1_std", "ece_std"]].notna().any(axis=None) else ""
    axes.set_title(_fold(title, TITLE_CHARACTERS), fontweight="bold", pad=24 if note else None)
    axes.annotate(note, (0.5, 1), (0, 8), "axes fraction", "offset points", ha="center")
    axes.grid(True)
    for cell in cells.astype({"top1_std": float, "ece_std": float}).fillna({"top1_std": 0, "ece_std": 0}).itertuples():
        look = looks[cell.representation]
        axes.errorbar(
            cell.top1,
            cell.ece,
            cell.ece_std,
            cell.top1_std,
            **look,
            marker=markers[cell.classifier],
            markersize=9,
            markeredgecolor="white" if look["fillstyle"] == "full" else look["color"],
            elinewidth=1,
            alpha=0.85,
        )
    axes.set(xlabel="top-1 accuracy (right is better)", ylabel="ECE (down is better)")
    if _wide(cells["ece"], WIDE_RANGE):  # one overconfident cell would press all others to the floor
        axes.set(yscale="log", ylabel="ECE, logarithmic (down is better)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(cells["ece"].min() / 1.5, cells["ece"].max() * 1.5)
    else:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # a marker at the top is seen whole
    _percent(axes.xaxis, axes.yaxis)
    points = [Line2D([], [], marker="o", markersize=9, **look | {"linestyle": ""}) for look in looks.values()]
    shapes = [Line2D([], [], color="#666666", marker=marker, linestyle="", markersize=9) for marker in markers.values()]
    blank = Line2D([], [], linestyle="")
    legend = figure.legend(
        [blank, *points, blank, blank, *shapes],
        ["representation", *map(_fold, looks), "", "classifier", *map(_fold, markers)],
        loc="outside right upper",
    )
    for heading in (0, len(points) + 2):
        legend.get_texts()[heading].set_fontweight("bold")
    _save(figure, path)


@rc_context(STYLE)
def class_counts(classes: pd.DataFrame, title: str, path: Path) -> None:
    """Training images per class, the most frequent first, coloured by shot group; names where they fit."""
    ranked = _ranked(classes)
    colours = ranked["group"].map(GROUP_COLOURS)
    named, wide = len(ranked) <= NAMED_CLASSES, _wide(ranked["train_count"], LONG_TAIL)
    label, lowest = ("training images, logarithmic", 0.5) if wide else ("training images", 0)
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(ranked)) if named else (9, 4.8), layout="constrained")
    axes = figure.subplots()
    _head(figure, title)
    if named:
        bars = axes.barh(ranked.index, ranked["train_count"], color=colours, log=wide)
        axes.bar_label(bars, padding=4)
        names, families = _drawable(ranked, 36)
        axes.set_yticks(ranked.index, names, fontfamily=families)
        axes.margins(x=0.08)
        axes.set(xlim=(lowest, None), ylim=(len(ranked) - 0.4, -0.6), xlabel=label, ylabel="class")
    else:
        axes.bar(ranked.index + 1, ranked["train_count"], width=1, color=colours, log=wide)
        axes.set(xlim=(0.5, len(ranked) + 0.5), ylim=(lowest, None), xlabel="class, by frequency", ylabel=label)
    if wide:
        (axes.xaxis if named else axes.yaxis).set_major_formatter("{x:.0f}")
    present = [group for group in GROUP_COLOURS if (ranked["group"] == group).any()]
    figure.legend(
        handles=[Patch(color=GROUP_COLOURS[group], label=GROUP_TITLES[group]) for group in present],
        loc="outside lower center",
        ncols=3,
    )
    _save(figure, path)


@rc_context(STYLE)
def per_class_accuracy(cells: Mapping[Cell, pd.DataFrame], title: str, path: Path) -> None:
    """Test accuracy per class against its frequency rank: one panel per representation, one marker per classifier.

    Up to NAMED_CLASSES classes are named below the lowest panels, a band each, in which the classifiers stand side by
    side with bars of one standard deviation over seeds; more are averaged over groups of ranks, with lines.
    """
    rows, columns = _axes_of(cells)
    colours = dict(zip(columns, cycle(CLASSIFIER_COLOURS), strict=False))
    markers = _markers(columns)
    names, families = _drawable(_ranked(cells[rows[0], columns[0]]), 24)
    named, upright = len(names) <= NAMED_CLASSES, len(names) * max(map(len, names)) > LEVEL_CHARACTERS
    across = min(2, len(rows))  # wide enough for names, also on a page
    down = ceil(len(rows) / across)
    below = 0.07 * max(map(len, names)) if named and upright else 0.2
    figure = Figure(figsize=(max(5.2 * across, 7), 1.1 + 2.8 * down + below), layout="constrained")
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel())
    beside = np.linspace(-0.3, 0.3, len(columns)) if named and len(columns) > 1 else np.zeros(len(columns))
    spare = panels.pop(1) if len(panels) > len(rows) else None  # at the top, so that the lowest row is full
    _head(figure, title, _test_images(cells[rows[0], columns[0]]))
    for axes, row in zip(panels, rows, strict=True):
        for column, shift in zip(columns, beside, strict=True):
            rank, accuracy = _by_rank(cells[row, column])
            if named:
                std = _ranked(cells[row, column])["accuracy_std"].to_numpy(dtype=float)
                bars = (np.maximum(accuracy - std, 0), np.minimum(accuracy + std, 1))
                axes.vlines(rank + shift, *bars, color=colours[column], linewidth=1, alpha=0.6)
            axes.plot(
                rank + shift,
                accuracy,
                color=colours[column],
                marker=markers[column],
                markersize=6,
                linewidth=0 if named else 1.2,  # between names there is nothing
                alpha=0.85,
                label=_fold(column),
                clip_on=False,
            )
        axes.set_title(_fold(row, TITLE_CHARACTERS), pad=10)
        axes.grid(True, axis="y" if named else "both")
        if named:
            axes.set_xlim(0.5, len(rank) + 0.5)
            for place in rank[1::2]:
                axes.axvspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)
            axes.tick_params("x", length=0)
            axes.set_xticks(rank, names, fontfamily=families, fontsize=9, rotation=90 if upright else 0)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel=_rank_label(len(rank), len(names)), ylabel="test accuracy")
        axes.label_outer()
        _percent(axes.yaxis)
    # After the last line: a limit that is set stops the shared axis from growing.
    panels[0].set_ylim(top=1)
    handles, _ = panels[0].get_legend_handles_labels()
    if named and any(cell["accuracy_std"].notna().any() for cell in cells.values()):
        bar = {"color": INK, "linestyle": "", "marker": "|", "markersize": 14}
        handles.append(Line2D([], [], **bar, label="one standard deviation over seeds"))
    if spare:
        spare.set_axis_off()
        spare.legend(handles=handles, loc="center", ncols=ceil(len(handles) / 10))
    else:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * across))
    _save(figure, path)


@rc_context(STYLE)
def training_curves(histories: Mapping[str, pd.DataFrame], title: str, path: Path) -> None:
    """Stage 1 over the epochs, one line per representation: the mean over seeds, and a band from minimum to maximum.

    Accuracies share a panel. Losses do not, since those of two methods have no scale in common.
    """
    down = ceil(len(histories) / LOSSES_ACROSS)
    across = ceil(len(histories) / down)
    figure = Figure(figsize=(10, 4.2 + 2.2 * down), layout="constrained")
    grid = figure.add_gridspec(1 + down, across, height_ratios=(1.6, *[1] * down))
    accuracy = figure.add_subplot(grid[0, :])
    losses = [figure.add_subplot(grid[1 + k // across, k % across]) for k in range(len(histories))]
    _head(figure, title)
    for loss, (name, look) in zip(losses, _looks(histories).items(), strict=True):
        for axes, column in ((accuracy, "train_accuracy"), (loss, "loss")):
            curve = histories[name].groupby("epoch")[column].agg(["mean", "min", "max"])
            axes.fill_between(curve.index, curve["min"], curve["max"], color=look["color"], alpha=0.2, linewidth=0)
            axes.plot(curve.index, curve["mean"], marker="o" if len(curve) < 4 else None, label=_fold(name), **look)
        loss.set_title(_fold(name), fontsize=10)
        if histories[name]["loss"].min() >= 0:  # a consistency term may be negative
            loss.set_ylim(bottom=0)
        loss.tick_params(labelsize=9)
        loss.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=ROUND))
        loss.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
    accuracy.set_title("training accuracy (where labels are mixed, the predicted class's share of the label)")
    accuracy.set_ylim(0, 1.02)  # a line at 100% is seen whole
    accuracy.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=ROUND))
    _percent(accuracy.yaxis)
    for axes in (accuracy, *losses):
        axes.set_xlabel("epoch")
        axes.grid(True)
    for loss in losses[::across]:
        loss.set_ylabel("loss")
    handles, _ = accuracy.get_legend_handles_labels()
    if any(history["seed"].nunique() > 1 for history in histories.values()):
        handles.append(Patch(color=INK, alpha=0.2, linewidth=0, label="band: minimum to maximum over seeds"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    _save(figure, path)


def _head(figure: Figure, title: str, note: str = "") -> None:
    """A title and, where there is one, a note in plain letters below it, in the room of an empty last line."""
    above = figure.suptitle(_fold(title, TITLE_CHARACTERS) + ("\n" if note else ""), fontweight="bold")
    figure.add_artist(Annotation(note, (0.5, 0), (0, 5), above, "offset points", ha="center", fontsize=10))


def _pooling(bins: pd.DataFrame) -> str:
    """Where there are several seeds, how their bars and their ECE come about: not the one from the other."""
    seeds = bins["seed"].nunique()
    return f"bars: predictions of {seeds} seeds pooled; ECE: mean of the seeds' own" if seeds > 1 else ""


def _test_images(classes: pd.DataFrame) -> str:
    """How many images an accuracy of a class is measured on."""
    fewest, most = classes["test_count"].min(), classes["test_count"].max()
    images = f"{fewest:,} to {most:,}" if fewest < most else f"{most:,}"
    return f"{images} test image{'' if most == 1 else 's'} per class"


def _reliability_panel(axes: Axes, pooled: pd.DataFrame) -> None:
    """Bars up to the accuracy, where a line ends them; from there to the confidence the gap, hatched. Bars of few
    predictions are faint."""
    few = pooled["count"] < FEW_PREDICTIONS
    for strength, bins in ((1.0, pooled[~few]), (FAINT, pooled[few])):
        width = _width(bins)
        colour = (ACCURACY, strength)
        axes.bar(bins["bin_lower"], bins["accuracy"], width, align="edge", color=colour, edgecolor="white")
        gap = bins["confidence"] - bins["accuracy"]
        for look, side in ((OVER, gap > 0), (UNDER, gap < 0)):
            axes.bar(
                bins["bin_lower"][side],
                gap[side],
                width[side],
                bins["accuracy"][side],
                align="edge",
                linewidth=0.8,
                **_gap_style(*look, strength),
            )
        axes.hlines(bins["accuracy"], bins["bin_lower"], bins["bin_upper"], **ENDS, alpha=strength)
    axes.plot((0, 1), (0, 1), color=INK, linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    _percent(axes.xaxis, axes.yaxis)


def _gap_style(colour: str, hatch: str, strength: float = 1.0) -> dict:
    return {"facecolor": (colour, 0.2 * strength), "edgecolor": (colour, strength), "hatch": hatch}


def _reliability_legend() -> list[Patch | Line2D]:
    return [
        Line2D([], [], **ENDS, label="accuracy"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="perfectly calibrated"),
        Patch(**_gap_style(*OVER), label="gap: overconfident"),
        Patch(**_gap_style(*UNDER), label="gap: underconfident"),
        Patch(color=(INK, FAINT), linewidth=0, label=f"faint: under {FEW_PREDICTIONS} predictions"),
    ]


def _ranked(classes: pd.DataFrame) -> pd.DataFrame:
    """The classes from the most to the least frequent."""
    return classes.sort_values("train_count", ascending=False, kind="stable").reset_index(drop=True)


def _drawable(classes: pd.DataFrame, length: int) -> tuple[list[str], list[str]]:
    """The names of classes as a picture can show them, and the fonts to draw them in.

    Installed fonts stand in where FONT lacks a character. A name with characters that none has loses these and gains
    the class's number: "cat #7". No name is longer than `length` characters.
    """
    families, missing = _fonts_for(set("".join(classes["name"])))
    names = []
    for name, k in zip(classes["name"], classes["class"], strict=True):
        kept = " ".join("".join(" " if character in missing else character for character in name).split())
        number = f" #{k}" if missing & set(name) else ""
        names.append((_cut(kept if number else name, length - len(number)) + number).lstrip())
    return names, families


def _fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """FONT and as few installed ones as draw what can be drawn of `characters`; and those that none of them draws."""
    families, missing = [FONT], characters - _characters(FONT)
    known = {family: missing & _characters(family) for family in sorted(_installed())} if missing else {}
    while any(found & missing for found in known.values()):
        families.append(max(known, key=lambda family: len(known[family] & missing)))
        missing = missing - known[families[-1]]
    return families, missing


def _installed() -> set[str]:
    """The families that have an upright regular font, but for matplotlib's own, which are mathematics and boxes."""
    return {
        font.name
        for font in font_manager.fontManager.ttflist
        if (font.style, font.stretch) == ("normal", "normal")
        and font.weight in (400, "normal", "regular")
        and not font.fname.startswith(get_data_path())
    }


def _characters(family: str) -> set[str]:
    """What a font can draw; nothing if it cannot be read."""
    try:
        where = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
        return {chr(code) for code in font_manager.get_font(where).get_charmap()}
    except (OSError, RuntimeError, ValueError):
        return set()


def _by_rank(classes: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Frequency ranks from 1 and the accuracy there; many classes are averaged over groups of neighbouring ranks."""
    accuracy = _ranked(classes)["accuracy"].to_numpy(dtype=float)
    groups = np.array_split(np.arange(len(accuracy)), RANK_GROUPS if len(accuracy) > NAMED_CLASSES else len(accuracy))
    return np.array([group.mean() + 1 for group in groups]), np.array([np.mean(accuracy[group]) for group in groups])


def _rank_label(points: int, classes: int) -> str:
    return "class, by frequency" + (f" (means of {classes / points:.0f})" if points < classes else "")


def _axes_of(cells: Mapping[Cell, pd.DataFrame]) -> tuple[list[str], list[str]]:
    """The representations and the classifiers, in the order of the grid."""
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))


def _looks(representations: Mapping | np.ndarray) -> dict[str, dict[str, str]]:
    looks = cycle(product(LAPS, REPRESENTATION_COLOURS))
    return {name: {"color": colour, **lap} for name, (lap, colour) in zip(representations, looks, strict=False)}


def _markers(classifiers: list[str] | np.ndarray) -> dict[str, str]:
    return dict(zip(classifiers, cycle(CLASSIFIER_MARKERS), strict=False))


def _width(pooled: pd.DataFrame) -> pd.Series:
    return pooled["bin_upper"] - pooled["bin_lower"]


def _percent(*axes: Axis) -> None:
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.6g}%"))


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _wide(values: pd.Series, ratio: float) -> bool:
    """Whether a linear axis would press the least of the values to the floor; no logarithmic one shows a zero."""
    return values.min() > 0 and values.max() / values.min() > ratio


def _fold(text: str, length: int = 20) -> str:
    """A long text on several lines, between words where it has any."""
    return fill(text, length)


def _save(figure: Figure, path: Path) -> None:
    """Write the picture with a palette of its own: a third of the bytes, which git keeps at every change."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = ImageOps.expand(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), MARGIN, "white")
    with atomic(path) as stream:
        image.quantize(256, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
