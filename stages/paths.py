"""Where every artefact lies, relative to the project's root. dvc.yaml names the same places."""

from pathlib import Path

SETTINGS = Path("data/settings")
COSTS = Path("data/costs")
DOWNLOADS = Path("data/downloads")
PRETRAINED = Path("data/pretrained")
SCRATCH = Path(".scratch")
LOCKS = SCRATCH / "locks"
SUMMARY = Path("metrics/summary.json")
TABLE = Path("metrics/table.csv")
TABLE_TEXT = Path("metrics/table.md")
FIGURES = Path("plots/figures")
RELIABILITY = Path("plots/reliability.json")
REPORT = Path("plots/report.html")
PUBLISHED = Path("metrics/published/cells")
OVERVIEW = Path("metrics/published/overview.md")
COSTS_PAGE = Path("plots/costs.html")


def settings(stage: str, *cell: str) -> Path:
    """What a stage goes by in one cell (in all, where none is named), as `check` resolved it: what DVC compares."""
    return SETTINGS / stage / f"{'-'.join(cell)}.json" if cell else SETTINGS / f"{stage}.json"


def costs(stage: str, *cell: str) -> Path:
    """What the trainings of a cell took on the machine that ran them; not tracked."""
    return COSTS / stage / f"{'-'.join(cell)}.json"


def scratch(stage: str, *cell: str) -> Path:
    """The unfinished work of one stage of a cell; not tracked, and gone on with after an interruption."""
    return SCRATCH / stage / "-".join(cell)


def raw(dataset: str) -> Path:
    """Images and labels as the source gave them."""
    return Path("data/raw") / dataset


def longtail(dataset: str) -> Path:
    """The long-tailed training split, the held-out split and the test split."""
    return Path("data/lt") / dataset


def representation(dataset: str, representation: str) -> Path:
    """Stage 1: weights a seed, history.csv, provenance.json."""
    return Path("data/representations") / dataset / representation


def classifier(dataset: str, representation: str, classifier: str) -> Path:
    """Stage 2: weights a seed, history.csv."""
    return Path("data/classifiers") / dataset / representation / classifier


def predictions(dataset: str, representation: str, classifier: str) -> Path:
    """Logits of the held-out and the test split, one file per seed, and provenance.json."""
    return Path("data/predictions") / dataset / representation / classifier


def metrics(dataset: str, representation: str, classifier: str) -> Path:
    """The cell's metrics."""
    return Path("metrics/cells") / dataset / representation / f"{classifier}.json"


def headline(dataset: str, representation: str, classifier: str) -> Path:
    """The cell's few numbers that `dvc metrics` and `dvc exp show` list."""
    return Path("metrics/headline") / dataset / representation / f"{classifier}.json"


def cell_plots(dataset: str, representation: str, classifier: str) -> Path:
    """The cell's reliability.csv, reliability.png, per_class.csv and confusion.csv."""
    return Path("plots/cells") / dataset / representation / classifier
