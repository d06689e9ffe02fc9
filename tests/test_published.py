"""The published numbers are those of their sources, and the tables say what the measured cells say."""

import itertools
import json
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from stages import official, paths
from stages import tables as stage
from tailcal import measured, params, plan, published, published_page, references
from tailcal.errors import UserError
from tailcal.tables import signed
from tests.conftest import ROOT

REFERENCES = ROOT / "references/published.csv"
HEADER = ",".join(references.COLUMNS)
IMAGES = 400
SHORT = """
tables:
  short:
    late_epochs: 0
    grids:
    - {datasets: [footing_cpu, footing_strong], representations: [ce, mixup, fsgl], classifiers: [joint, mislas]}
"""
TABLES = (ROOT / plan.PLAN).read_text().partition("\nfooting: ")[0].replace("\ntables:\n", SHORT) + "\n"
FOOTING = """\
footing:
  small:
    title: Everything on one footing
    table: short
    dataset: footing_cpu
    rows:
    - {representation: ce, classifier: joint}
    - {representation: mixup, classifier: mislas}
    - {representation: mixup, classifier: mislas, rule: temperature}
    - {representation: ce, classifier: joint, rule: pn_transductive}
    - {representation: fsgl, classifier: joint}
  never:
    title: Not run
    table: short
    dataset: footing_strong
    rows:
    - {representation: ce, classifier: joint}
"""


def predictions(*accuracies, seed=0):
    """bool [S, IMAGES] of exactly these accuracies."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(IMAGES) < round(accuracy * IMAGES) for accuracy in accuracies])


def spread(mean, deviation, S):
    """S numbers of that mean and sample standard deviation."""
    steps_S = np.arange(S) - (S - 1) / 2
    return (mean + deviation * steps_S / steps_S.std(ddof=1)).tolist() if S > 1 else [mean]


def numbers_of(correct_SN, ece, deviation=0.0, **others):
    """The numbers of each seed: its own top-1, and ECEs of that mean and standard deviation."""
    return [
        {"top1": float(right.mean()), "ece": one, "nll": 1.5, "correct": measured.pack(right)} | others
        for right, one in zip(correct_SN, spread(ece, deviation, len(correct_SN)), strict=True)
    ]


def cell(correct_SN, ece=0.0512, deviation=0.0031, posthoc=None, **others):
    """A measured cell as the runner writes it, a list of seeds. `posthoc` has a rule's numbers as `numbers_of` does."""
    S = len(correct_SN)
    late = zip(spread(0.481, 0.004, S), spread(0.05, 0.002, S), range(S), strict=True)
    best = [
        {"epochs": 20, "top1": top1, "ece": ece, "ece_least": 0.031 + 0.01 * i, "ece_most": 0.0904 - 0.01 * i}
        for top1, ece, i in late
    ]
    return [
        numbers
        | {
            **{"top5": 0.9, "many": 0.7, "medium": 0.5, "few": None},
            "posthoc": {rule: seeds[i] for rule, seeds in (posthoc or {}).items()},
            "provenance": {"params": {}},
            "data": {"train_images": 10847, "official": False, "test_split": {"test_images.npy": "a"}},
            "cost": {"machine": "NVIDIA H200", "seconds": 1041.2, "at_once": 3},
            "best_on_test": best[i],
            "seed": i,
            "epochs": 200,
            "backbone": "resnet32",
            "precision": "float32",
            "test_images": correct_SN.shape[1],
        }
        | others
        for i, numbers in enumerate(numbers_of(correct_SN, ece, deviation))
    ]


def put(runs, dataset="cifar100_lt_100", representation="mixup", classifier="mislas"):
    """Write the seeds of a cell; returns the file of the first."""
    for seed, run in enumerate(runs):
        path = measured.run_file(paths.PUBLISHED, (dataset, representation, classifier), seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))
    return path.with_name("seed0.json")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project with references and footing tables, and nothing measured."""
    monkeypatch.chdir(tmp_path)
    references.REFERENCES.parent.mkdir()
    references.REFERENCES.write_text(REFERENCES.read_text())
    for name in ("params.yaml", "presets"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(official, "require_planned", lambda *_: None)  # test_plan has cells that were trained
    plan.PLAN.parent.mkdir()
    plan.PLAN.write_text(TABLES + FOOTING)


def section(title):
    """The part of tables.md below a heading."""
    return re.split(r"^## ", stage.TEXT.read_text(), flags=re.M)[[title in h for h in headings()].index(True) + 1]


def headings():
    return re.findall(r"^## (.*)$", stage.TEXT.read_text(), flags=re.M)


def rows(text):
    """Each line of a Markdown table as a list of texts, its head first."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[field.strip() for field in line.strip("|").split("|")] for line in lines]


def test_names_are_known():
    published_rows = references.read_references(REFERENCES)
    _, p = plan.load(params.load(ROOT / "params.yaml"), ROOT / plan.PLAN)
    assert {row.table for row in published_rows} == set(references.TITLES)
    for row in published_rows:
        assert row.representation in p.representations
        assert row.classifier in p.classifiers
        assert row.rule in ("", *p.evaluate.posthoc)
        params.dataset(p, row.dataset, ROOT)
        assert "RETRACTED" not in row.method + row.note
        assert row.top1 is not None or "not known" in row.note


LISTED = re.compile(
    r"#   (?P<representation>\w+) +(?P<classifier>\w+)(, then (?P<rule>\w+))? +"
    r"((?P<top1>[\d.]+)( \((?P<ece>[\d.]+)\))?|not known here) +(?P<source>\S.*)"
)
ELSEWHERE = ("x4", "LADE")  # another network, and a paper without a table here


def test_numbers_are_those_that_the_presets_aim_at():
    """In both directions, as far as both list a method."""
    listed = set()
    for path in sorted((ROOT / "presets").glob("cifar*.yaml")):
        for line in path.read_text().splitlines():
            found = LISTED.fullmatch(line)
            if found and found["representation"] != "ldam_drw" and not any(word in line for word in ELSEWHERE):
                numbers = [found[name] and float(found[name]) for name in ("top1", "ece")]
                cell = (found["representation"], found["classifier"], found["rule"] or "")
                listed.add((path.stem, *cell, *numbers))
    variants = plan.read(ROOT / plan.PLAN).datasets
    ours = {
        (
            variants[row.dataset].preset if row.dataset in variants else row.dataset,
            *(row.representation, row.classifier, row.rule, row.top1, row.ece),
        )
        for row in references.read_references(REFERENCES)
        # The presets aim at the second release, and list nothing of the code that MARC's builds on.
        if "first release" not in row.source and "BALMS" not in row.method
    }
    assert len(listed) > 50
    assert ours == listed


GOOD = "mislas,MiSLAS,cifar100_lt_100,mixup,mislas,,ResNet-32,200+10,47.0,4.83,somewhere,"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER},colour\n{GOOD},red\n", "line 1: unknown column colour: its columns must be table,method,"),
        (HEADER.replace("ece,", ""), "line 1: no column ece: its columns must be"),
        (HEADER.replace("top1,ece", "ece,top1"), "line 1: wrong order"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('47.0', 'about 47')}\n", "line 3: top1 must be a number in percent.*'about"),
        (f"{HEADER}\n{GOOD.replace('4.83', 'nan')}\n", "line 2: ece must be a number in percent, 0 to 100, or empty"),
        (f"{HEADER}\n{GOOD.replace('47.0', '470')}\n", "line 2: top1 must be a number"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('47.0', '46.9')}\n", "line 3: repeats line 2"),
        (f"{HEADER}\n{GOOD.replace('mislas,', 'paper,', 1)}\n", "line 2: table must be one of mislas, marc, .*'paper'"),
        (f"{HEADER}\n{GOOD.replace('somewhere', '')}\n", "line 2: source must not be empty"),
        (f"{HEADER}\n{GOOD}\n\n{GOOD}\n", "line 3: has 0 fields: must have 12, table,"),
        (f"{HEADER}\n{GOOD.rpartition(',somewhere')[0]}\n", "line 2: has 10 fields: must have 12"),
        (f"{HEADER}\n{GOOD}\n{GOOD},more\n", "line 3: has 13 fields: must have 12"),
        (f"{HEADER}\n{GOOD.replace('somewhere', chr(34) + 'some')}\n{GOOD}\n", "line 2: not valid CSV: unexpected end"),
        (
            f"{HEADER}\n{GOOD.replace('some', chr(34) + 'a')}\n{GOOD}{chr(34)}\n",
            "line 2: a quotation mark is not closed",
        ),
        ("", "is empty"),
        ("\udcff", "must be text in UTF-8"),
    ],
)
def test_a_wrong_line_is_named(text, message):
    references.REFERENCES.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=f"references/published.csv:? ?{message}") as caught:
        references.read_references(references.REFERENCES)
    assert "\n" not in str(caught.value)


def test_references_as_a_spreadsheet_writes_them():
    references.REFERENCES.write_bytes(f"\ufeff{HEADER}\r\n{GOOD}\r\n".encode())
    (row,) = references.read_references(references.REFERENCES)
    assert (row.top1, row.cell, row.note) == (47.0, "mixup/mislas", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "mixup,mislas",
            "mixup,misla",
            "MiSLAS: published/params.yaml: tables.mislas does not train cifar100_lt_100/mixup/misla",
        ),
        (
            "lt_100",
            "lt_1000",
            "MiSLAS: published/params.yaml: tables.mislas does not train cifar100_lt_1000/mixup/mislas",
        ),
        ("mislas,,", "mislas,pn,", "MiSLAS: there is no rule pn: use one of temperature, "),
    ],
)
def test_a_published_row_that_nothing_trains_is_named(old, new, message):
    references.REFERENCES.write_text(f"{HEADER}\n{GOOD.replace(old, new)}\n")
    with pytest.raises(UserError, match=f"references/published.csv line 2: {message}"):
        stage.main()


def test_no_references_at_all():
    references.REFERENCES.unlink()
    with pytest.raises(UserError, match=r"references/published\.csv is missing"):
        stage.main()


def test_nothing_has_been_run():
    stage.main()
    assert headings() == [*references.TITLES.values(), "Everything on one footing", "Not run"]
    for name, title in references.TITLES.items():
        text = section(title)
        assert "Nothing of this table has been run yet." in text
        assert f"rows have not been measured. `python -m stages.published --table {name} --missing` runs them." in text
        assert {tuple(row[4:12]) for row in rows(text)[1:]} == {("—",) * 8}
    assert section("Not run").endswith(
        "Not run yet: `python -m stages.published --table short --dataset footing_strong --missing` runs it.\n"
    )
    assert len(pd.read_csv(stage.ROWS)) == len(references.read_references(REFERENCES))
    assert pd.read_csv(stage.ROWS)["top1"].isna().all()
    assert pd.read_csv(stage.PAIRS).empty


def test_the_numbers_of_a_row():
    """By hand: accuracies 0.44, 0.45, 0.46 are 45.00 ± 1.00, which is 2 points less than the published 47.0."""
    put(cell(predictions(0.44, 0.45, 0.46)))
    stage.main()
    text = section("MiSLAS")
    head, *body = rows(text)
    assert head[6:11] == ["our ECE", "ECE difference", "best on test, last 20 epochs", "ECE there", "ECE in all"]
    (row,) = [row for row in body if row[:2] == ["cifar100_lt_100", "MiSLAS"]]
    assert row[2:8] == ["47.0", "4.83", "45.00 ± 1.00", "−2.00", "5.12 ± 0.31", "+0.29"]
    assert row[8:13] == ["48.10 ± 0.40", "5.00 ± 0.20", "3.10 to 9.04", "3", "1,041"]
    assert f"- {row[13]} repo README dvlab-research/MiSLAS@0fc381e; released checkpoint" in text
    assert "at the last epoch (200)" in text
    assert "Trained in float32, 3 networks at a time on NVIDIA H200." in text
    assert "The training images of cifar100_lt_100 (10,847) were taken from a folder" in text
    assert (
        "standard deviation, in top-1 or ECE: none of 1." in text
    )  # at the border: 2.00 is 1 point and one deviation, and not more
    assert "Not trained as published" not in text
    frame = pd.read_csv(stage.ROWS)
    assert "10847," in stage.ROWS.read_text()  # and not 10847.0
    (line,) = frame[frame["top1"].notna()].to_dict("records")
    expected = {"top1": 45, "top1_std": 1, "best_on_test": 48.1, "ece": 5.12, "difference": -2, "misses": False}
    expected |= {"published_top1": 47, "seconds": 1041.2, "official": False, "measured_epochs": 200}
    assert {key: line[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("top1", "deviation", "misses"),
    [
        (0.448, 0.012, False),  # 2.20 = 1 + 1.20
        (0.4479, 0.012, True),
        (0.492, 0.012, False),  # upwards too
        (0.4921, 0.012, True),
        (0.46, None, False),  # one seed
        (0.4599, None, True),
        (0.459951, None, False),  # 46.00 as it is shown
    ],
)
def test_the_border_of_a_miss(top1, deviation, misses):
    steps = [0.0] if deviation is None else [-deviation / 2**0.5, deviation / 2**0.5]
    run = cell(predictions(0.4))[0] | {"correct": None}
    runs = [measured.Run.model_validate(run | {"top1": top1 + step}) for step in steps]
    (reference,) = [
        row for row in references.read_references(REFERENCES) if row.top1 == 47.0 and row.classifier == "mislas"
    ]
    comparison = published.Comparison(reference, measured.MeasuredCell(runs))
    assert comparison.top1.misses is misses
    text = published_page.paper("mislas", [comparison], "command")
    shown = rows(text)[1][5]
    assert (shown == f"**{shown.strip('*')}**") is misses
    assert ("- cifar100_lt_100, MiSLAS: " in text) is misses


def test_a_cell_behind_two_published_rows_and_a_rule():
    """Table and checkpoint both show the cell; a rule shows its own numbers, and its own best epochs."""
    put(cell(predictions(0.52, 0.53), epochs=20), "cifar100_lt_50")
    rule = numbers_of(predictions(0.51, 0.52), 0.04, transductive=True)
    bagmar = cell(predictions(0.5, 0.51), posthoc={"pn_transductive": rule}, epochs=20)
    for run in bagmar:
        run["best_on_test"]["posthoc"] = {"pn_transductive": {"top1": 0.53, "ece": 0.04}}
    put(bagmar, "cifar100_lt_100", "bagmar", "joint")
    put(cell(predictions(0.5, 0.51)), "cifar100_lt_50", "bagmar", "joint")  # the rule was not applied
    stage.main()
    ours = [row for row in rows(section("MiSLAS"))[1:] if row[4] != "—"]
    assert [(*row[:4], row[4]) for row in ours] == [
        ("cifar100_lt_50", "MiSLAS", "52.3", "2.47", "52.50 ± 0.71"),
        ("cifar100_lt_50", "MiSLAS", "52.3", "2.25", "52.50 ± 0.71"),
    ]
    assert "- epochs 20 (published 200): cifar100_lt_50, MiSLAS\n" in section("MiSLAS"), "which is named once"
    text = section("BaGMar")
    ours = [row for row in rows(text)[1:] if row[4] != "—"]
    assert [(row[0], row[1], row[4], row[8]) for row in ours] == [
        ("cifar100_lt_100", "GALA loss (BaGMar)", "50.50 ± 0.71", "48.10 ± 0.40"),
        ("cifar100_lt_100", "GALA loss + prediction re-balancing †", "51.50 ± 0.71", "53.00 ± 0.00"),
        ("cifar100_lt_100", "BaGMar + PN (tau 1) †", "51.50 ± 0.71", "53.00 ± 0.00"),
        ("cifar100_lt_50", "GALA loss (BaGMar)", "50.50 ± 0.71", "48.10 ± 0.40"),
    ]
    assert "† transductive" in text
    assert "at the last epoch (20 to 200)" in text
    assert "- epochs 20 (published 200): cifar100_lt_100, GALA loss (BaGMar), GALA loss + prediction" in text
    assert "8 of 12 rows have not been measured" in text


@pytest.mark.parametrize(
    ("ece", "deviation", "misses"),
    [(0.0583, None, False), (0.0584, None, True), (0.0683, 0.01, False), (0.0684, 0.01, True), (0.038, None, True)],
)
def test_the_border_of_a_miss_of_the_ece(ece, deviation, misses):
    """Published is 4.83."""
    put(cell(predictions(0.47, 0.47), ece, deviation) if deviation else cell(predictions(0.47), ece))
    stage.main()
    text = section("MiSLAS")
    (row,) = [row for row in rows(text)[1:] if row[2:4] == ["47.0", "4.83"]]
    assert row[5] == "+0.00"
    assert row[7].startswith("**") is misses
    line = f"- cifar100_lt_100, MiSLAS: ECE {signed(round(100 * ece - 4.83, 2))} (ours {100 * ece:.2f}"
    assert (line in text) is misses
    assert ("; at the epoch that is best on test 5.00)" in text) is misses


def test_rows_that_share_a_network_are_told():
    put(cell(predictions(0.47, 0.48)))
    put(cell(predictions(0.4, 0.41)), classifier="joint")
    stage.main()
    assert "Behind these rows stand 2 networks of stage 1." in section("MiSLAS")
    overview = paths.OVERVIEW.read_text()
    assert "- mixup: baseline as listed by MiSLAS; CE and mixup there are the numbers" in overview


def test_a_classifier_may_lack_seeds_that_another_has():
    put(cell(predictions(0.4, 0.41, 0.42)), classifier="joint")
    put(cell(predictions(0.47)))
    stage.main()
    assert "Behind these rows stand 3 networks of stage 1." in section("MiSLAS")


def test_networks_of_one_name_that_were_trained_otherwise_are_two():
    for i, classifier in enumerate(("joint", "crt")):
        trained = {"representation": {"name": "mixup", "recipe": {"epochs": 200 + i}}}
        put(cell(predictions(0.44), provenance={"params": trained}), classifier=classifier)
    stage.main()
    assert "Behind these rows stand 2 networks of stage 1." in section("MiSLAS")


def test_a_row_of_which_an_ece_alone_was_printed_is_listed():
    references.REFERENCES.write_text(f"{HEADER}\n{GOOD.replace('47.0', '')}\n")
    put(cell(predictions(0.47), ece=0.06))
    stage.main()
    assert "in top-1 or ECE: 1 of 1.\n\n- cifar100_lt_100, MiSLAS: ECE +1.17 (ours 6.00" in section("MiSLAS")


@pytest.mark.parametrize(
    ("accuracies", "shown", "apart"),
    [
        ((0.62, 0.62, 0.63), "**+12.3", True),
        ((0.38, 0.38, 0.38), "**−12.0", True),
        ((0.61, 0.62, 0.59), "+10.7", False),  # a seed of the other is better
        ((0.38, 0.40, 0.38), "−11.3", False),
        ((0.80, 0.80), "+30.0", False),  # of two seeds nobody knows the spread
    ],
)
def test_a_difference_that_the_seeds_do_not_share_is_not_bold(accuracies, shown, apart):
    put(cell(predictions(0.40, 0.50, 0.60)), "footing_cpu", "ce", "joint")
    put(cell(predictions(*accuracies, seed=1)), "footing_cpu", "mixup", "mislas")
    stage.main()
    frame = pd.read_csv(stage.PAIRS).set_index(["first", "second"])
    assert frame.loc[("mixup/mislas", "ce/joint"), ["excludes_zero", "seeds_apart"]].tolist() == [True, apart]
    below = section("Everything on one footing").partition("Top-1 of the row minus")[2]
    (text,) = [row[2] for row in rows(below)[1:]]
    assert text.startswith(shown)


def test_a_second_stage_is_told_with_its_budget():
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "ce", "joint")
    recipe = {"params": {"classifier": {"recipe": {"epochs": 5, "iterations": None}}}}
    put(cell(predictions(0.5, 0.52), provenance=recipe), "footing_cpu", "mixup", "mislas")
    stage.main()
    assert "at the last epoch (200; stage 2 takes 5 epochs more: mixup/mislas)." in section("Everything on one")


def test_seconds_of_unlike_conditions_say_theirs():
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "ce", "joint")
    cost = {"machine": "NVIDIA H200", "seconds": 9, "at_once": 1}
    put(cell(predictions(0.5, 0.52), cost=cost), "footing_cpu", "mixup", "mislas")
    stage.main()
    assert [row[9] for row in rows(section("Everything on one"))[1:3]] == ["1,041, 3 at a time", "9, 1 at a time"]


def test_the_overview_says_once_what_holds_of_all_its_footing_tables():
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "ce", "joint")
    put(cell(predictions(0.5, 0.52)), "footing_strong", "ce", "joint")
    stage.main()
    text = paths.OVERVIEW.read_text()
    said = ("The training images of footing_cpu (10,847), footing_strong (10,847) were", "Many, medium and few are")
    trained = "Trained in float32, 3 networks at a time on NVIDIA H200."
    assert [text.count(sentence) for sentence in (*said, trained)] == [1, 1, 1]
    assert [section(title).count(trained) for title in ("Everything on one footing", "Not run")] == [1, 1]
    cost = {"machine": "CPU, 1 core", "seconds": 9, "at_once": 1}
    put(cell(predictions(0.5, 0.52), cost=cost), "footing_strong", "ce", "joint")
    stage.main()
    common, small, never = re.split(r"\*\*.*\*\*\n", paths.OVERVIEW.read_text())
    assert all(sentence in common for sentence in said)
    assert [trained in text for text in (common, small, never)] == [False, True, False]
    assert "(200). Trained in float32, one network at a time on CPU, 1 core.\n" in never


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backbone": "resnet8"}, "its backbone is resnet8, that of ce/joint resnet32"),
        ({"epochs": 10}, "its epochs is 10, that of ce/joint 200"),
        ({"data": {"train_images": 9, "official": False, "test_split": {"test_images.npy": "a"}}}, "images is 9, that"),
        (
            {"provenance": {"data": {"train_images.npy": "b"}}},
            "its provenance.data.train_images.npy is b, that of ce/joint a",
        ),
        (
            {
                "provenance": {
                    "data": {"train_images.npy": "a"},
                    "params": {"representation": {"recipe": {"lr": 0.5, "sam_rho": 0.05}}},
                }
            },
            "its provenance.params.representation.recipe.lr is 0.5, that of ce/joint None",
        ),
        (
            {"provenance": {"data": {"train_images.npy": "a"}, "evaluate": {"bins": 20}}},
            "its provenance.evaluate.bins is 20, that of ce/joint None",
        ),
    ],
)
def test_what_shares_no_footing_is_refused(change, says):
    same = {"provenance": {"data": {"train_images.npy": "a"}}}
    put(cell(predictions(0.4, 0.42), **same), "footing_cpu", "ce", "joint")
    put(cell(predictions(0.4, 0.42), **same | change), "footing_cpu", "mixup", "mislas")
    with pytest.raises(UserError, match=says):
        stage.main()


def test_a_footing_is_of_one_precision():
    for name, classifier, precision in (("ce", "joint", "float32"), ("mixup", "mislas", "bf16")):
        put(cell(predictions(0.4, 0.42), precision=precision), "footing_cpu", name, classifier)
    with pytest.raises(
        UserError,
        match=r"mixup/mislas: its precision is bf16, that of ce/joint float32: that is no common",
    ):
        stage.main()
    put(cell(predictions(0.4, 0.42), precision="bf16"), "footing_cpu", "ce", "joint")
    stage.main()
    assert "Trained in bf16, 3 networks at a time on NVIDIA H200." in section("Everything on one footing")


def test_a_footing_table():
    right_1, right_2 = predictions(0.4, 0.41, 0.42), predictions(0.6, 0.62, 0.64, seed=1)
    after = predictions(0.6, 0.62, 0.65, seed=2)
    numbers = {"few": 0.3, "nll": None}
    mislas = cell(right_2, posthoc={"temperature": numbers_of(after, 0.03, **numbers)})
    unkept = numbers | {"transductive": True, "correct": None}
    joint = cell(right_1, posthoc={"pn_transductive": numbers_of(after, 0.03, **unkept)})
    put(joint, "footing_cpu", "ce", "joint")
    put(mislas, "footing_cpu", "mixup", "mislas")
    stage.main()
    text = section("Everything on one footing")
    above, below = text.split("Top-1 of the row minus that of the column")
    rest = ["—", "—", "30.00", "3.00 ± 0.00", "—", "3", "1,041"]
    assert rows(above)[1:] == [
        ["1", "ce/joint", "41.00 ± 1.00", "70.00", "50.00", "—", "5.12 ± 0.31", "1.500", "3", "1,041"],
        ["2", "mixup/mislas", "62.00 ± 2.00", "70.00", "50.00", "—", "5.12 ± 0.31", "1.500", "3", "1,041"],
        ["3", "mixup/mislas + temperature", "62.33 ± 2.52", *rest],
        ["4", "ce/joint + pn_transductive †", "62.33 ± 2.52", *rest],
    ]
    assert (
        "Not run yet: fsgl/joint. `python -m stages.published --table short --dataset footing_cpu --missing`" in above
    )
    head, *matrix = rows(below)
    assert head == ["no.", "method", "1", "2"]
    assert [row[:2] for row in matrix] == [["2", "mixup/mislas"], ["3", "mixup/mislas + temperature"]]
    assert re.fullmatch(r"\*\*\+21\.0<br>\+1\d\.\d to \+2\d\.\d\*\*", matrix[0][2])
    assert matrix[0][3] == ""
    assert re.fullmatch(r"\+0\.3<br>−\d\.\d to \+\d\.\d", matrix[1][3])
    assert "since their predictions were not kept image by image: ce/joint + pn_transductive." in below

    frame = pd.read_csv(stage.PAIRS)
    assert list(frame.columns) == published.PAIR_COLUMNS
    assert frame["first"].tolist() == ["mixup/mislas", *["mixup/mislas + temperature"] * 2]
    assert frame["second"].tolist() == ["ce/joint", "ce/joint", "mixup/mislas"]
    assert frame["difference"].tolist() == [21.0, 21.3333, 0.3333]
    assert frame["excludes_zero"].tolist() == [True, True, False]
    pairs = published.paired(np.stack([right.mean(axis=0) for right in (right_1, right_2, after)]))
    assert frame["low"].tolist() == [round(100 * pair.low, 4) for pair in pairs]


def test_the_bootstrap_against_a_loop():
    """The same resamples, drawn one after the other, give the same percentiles for every pair."""
    correct_MN = np.stack([predictions(accuracy, seed=i).mean(axis=0) for i, accuracy in enumerate((0.3, 0.5, 0.55))])
    rng, means = np.random.default_rng(7), []
    for _ in range(200):
        drawn = rng.integers(0, IMAGES, (1, IMAGES))[0]
        means.append(correct_MN[:, drawn].mean(axis=1))
    means_RM = np.array(means)
    pairs = published.paired(correct_MN, resamples=200, seed=7)
    assert [(pair.row, pair.column) for pair in pairs] == [(1, 0), (2, 0), (2, 1)]
    for pair in pairs:
        low, high = np.percentile(means_RM[:, pair.row] - means_RM[:, pair.column], [2.5, 97.5])
        low, high = round(low, published.DIGITS), round(high, published.DIGITS)
        assert (pair.low, pair.high) == pytest.approx((low, high), abs=1e-12)
        assert pair.difference == pytest.approx(correct_MN[pair.row].mean() - correct_MN[pair.column].mean())


def test_the_bootstrap_against_the_normal_interval():
    """Of 4,000 images a mean is as good as normal: d ± 1.96 s / sqrt(N), with s of the paired differences."""
    rng = np.random.default_rng(0)
    hard_N = rng.random(4000)  # what is hard for one is hard for the other, which is why pairing tells more
    correct_MN = np.stack([(hard_N + 0.1 * rng.random(4000) < bound).astype(float) for bound in (0.5, 0.52)])
    (pair,) = published.paired(correct_MN)
    difference_N = correct_MN[1] - correct_MN[0]
    half = 1.96 * difference_N.std() / np.sqrt(4000)
    assert (pair.low, pair.high) == pytest.approx(
        (difference_N.mean() - half, difference_N.mean() + half), abs=half * 0.1
    )
    unpaired = 1.96 * np.sqrt(correct_MN.var(axis=1).sum() / 4000)
    assert pair.high - pair.low < unpaired


def test_what_is_half_way_is_shown_alike_by_every_version_of_numpy():
    """Means of thirds, which floats sum to a little less or more: their last digits depend on the order."""
    rng = np.random.default_rng(0)
    correct_MN = rng.binomial(3, np.linspace(0.3, 0.7, 12)[:, None], (12, 10_000)) / 3
    shuffled = published.paired(correct_MN[:, rng.permutation(10_000)], resamples=2)
    for pair, other in zip(published.paired(correct_MN, resamples=2), shuffled, strict=True):
        exact = Fraction(int(np.rint(3 * (correct_MN[pair.row] - correct_MN[pair.column])).sum()), 30_000)
        assert pair.difference == other.difference == round(float(exact), published.DIGITS)
    (equal,) = published.paired(np.stack([correct_MN[0], correct_MN[0][::-1]]), resamples=2)
    assert equal.difference == 0


def test_methods_that_agree_do_not_differ():
    (pair,) = published.paired(np.stack([predictions(0.5)[0]] * 2).astype(float))
    assert (pair.difference, pair.low, pair.high, pair.excludes_zero) == (0, 0, 0, False)
    assert published.paired(np.zeros((1, IMAGES))) == []


@pytest.mark.parametrize("N", [2, 8, 9, 400, 10001])
def test_bits_come_back(N):
    right = np.random.default_rng(N).random(N) < 0.3
    unpacked = measured.unpack(measured.pack(right), N)
    assert unpacked.dtype == bool
    assert np.array_equal(unpacked, right)


@pytest.mark.parametrize(
    ("text", "N", "message"),
    [("A", 4, "base64"), ("Ä", 4, "ASCII"), ("AAAA", 8, "3 bytes are not one bit for each of 8"), ("/w==", 7, "more")],
)
def test_damaged_bits_are_refused(text, N, message):
    with pytest.raises(ValueError, match=message):
        measured.unpack(text, N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top1": 0.6}, r"seed0.json is damaged \(.*correct has an accuracy of 0.40*, and top1 is 0.60*\): delete it"),
        ({"correct": "AAAA"}, r"joint/seed0.json is damaged \(.*3 bytes are not one bit"),
        ({"test_images": 500}, "50 bytes are not one bit for each of 500 images"),
        ({"posthoc": {"unused": {"top1": 0.5, "ece": 0.1, "nll": 1.0, "correct": "AAAA"}}}, "3 bytes are not one bit"),
        ({"epochs": "many"}, r"footing_cpu/ce/joint/seed0.json is damaged \(epochs: .*got 'many'"),
        ({"cost": {"machine": "a", "seconds": 1.0}}, r"is damaged \(cost.at_once: this key is missing"),
        ({"top1": 41.0}, r"is damaged \(top1: .*less than or equal to 1"),
        ({"nll": -3.0}, r"is damaged \(nll: .*greater than or equal to 0"),
        (
            {"best_on_test": {"epochs": 20, "top1": 0.5, "ece": 0.1, "ece_least": 0.2, "ece_most": 0.3}},
            r"is damaged \(best_on_test: .*ece is 0\.1: must lie from ece_least 0\.2 to ece_most 0\.3",
        ),
    ],
)
def test_a_damaged_seed_is_named(change, message):
    put([run | change for run in cell(predictions(0.4, 0.42))], "footing_cpu", "ce", "joint")
    with pytest.raises(UserError, match=message) as caught:
        stage.main()
    assert "\n" not in str(caught.value)
    assert not stage.TEXT.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16"}, "its precision is bf16, that of seed0.json float32, and the seeds of a cell must be"),
        ({"epochs": 20}, "its epochs is 20, that of seed0.json 200"),
        ({"provenance": {"evaluate": {"tau": 2.0}}}, "its provenance.evaluate.tau is 2.0, that of seed0.json None"),
        (
            {"provenance": {"params": {"representation": {"recipe": {"lr": 0.1}}}}},
            "its provenance.params.representation.recipe.lr is 0.1, that of seed0.json None",
        ),
        (
            {"provenance": {"data": {"train_images.npy": "b"}}},
            "its provenance.data.train_images.npy is b, that of seed0",
        ),
        (
            {"data": {"train_images": 10847, "official": False, "test_split": {"test_images.npy": "b"}}},
            "its data.test_split.test_images.npy is b, that of seed0.json a",
        ),
        ({"posthoc": {}}, "its rules is , that of seed0.json pn_transductive"),
        (
            {
                "test_images": 999,
                "correct": None,
                "posthoc": {"pn_transductive": {"top1": 0.5, "ece": None, "nll": None}},
            },
            "its test_images is 999, that of seed0.json",
        ),
        ({"best_on_test": None}, "its late epochs is None, that of seed0.json 20"),
        ({"best_on_test": {"epochs": 40, "top1": 0.5, "ece": 0.1}}, "its late epochs is 40, that of seed0.json 20"),
    ],
)
def test_seeds_that_were_not_trained_and_measured_alike_are_no_cell(change, message):
    rule = {"pn_transductive": numbers_of(predictions(0.51, 0.52), 0.04)}
    first, second = cell(predictions(0.4, 0.42), posthoc=rule)
    put([first, second | change])
    with pytest.raises(
        UserError,
        match=f"mixup/mislas/seed1.json: {message}.*: delete the one that is not as params.yaml, "
        "published/params.yaml and your options say, and run `python -m stages.published --missing --dataset "
        "cifar100_lt_100 --representation mixup --classifier mislas --seed SEED`, with",
    ) as caught:
        stage.main()
    assert "\n" not in str(caught.value)


def test_seeds_of_two_machines_are_a_cell():
    first, second, third = cell(predictions(0.44, 0.45, 0.46))
    put([first, second | {"cost": {"machine": "CPU, 1 core", "seconds": 2000.0, "at_once": 1}}, third])
    stage.main()
    text = section("MiSLAS")
    assert (
        "Trained in float32, 3 networks at a time on NVIDIA H200; or in float32, one network at a time on CPU, 1 core."
    ) in text
    (line,) = pd.read_csv(stage.ROWS).dropna(subset="top1").to_dict("records")
    said = (line["top1"], line["seeds"], line["seconds"], line["at_once"], line["machine"])
    assert said == (45, 3, 1360.8, "1 to 3", "NVIDIA H200 and CPU, 1 core")


def test_a_copied_seed_is_no_other_seed():
    path = put(cell(predictions(0.4, 0.42)))
    path.with_name("seed2.json").write_text(path.read_text())
    with pytest.raises(UserError, match=r"mixup/mislas/seed2\.json is of seed 0: must be called seed0\.json: rename"):
        stage.main()


def test_seeds_of_other_code_and_versions_are_a_cell_and_told():
    made = {"code": "0.1.0+a", "device": "cuda", "versions": {"torch": "2.11"}, "stage1": {"code": "0.1.0+c"}}
    other = {"code": "0.1.0+b", "versions": {"torch": "2.12"}}
    runs = cell(predictions(0.44, 0.45))
    put([run | {"provenance": made | change} for run, change in zip(runs, ({}, {}), strict=True)])
    stage.main()
    assert "trained apart" not in section("MiSLAS")
    put([run | {"provenance": made | change} for run, change in zip(runs, ({}, other), strict=True)])
    stage.main()
    assert (
        "Of cifar100_lt_100, some seeds of a cell were trained apart, and their files differ in code, versions.torch."
    ) in section("MiSLAS")


def test_best_on_test_may_be_absent():
    put([run | {"best_on_test": None} for run in cell(predictions(0.44, 0.45, 0.46))])
    stage.main()
    (row,) = [row for row in rows(section("MiSLAS"))[1:] if row[:2] == ["cifar100_lt_100", "MiSLAS"] and row[4] != "—"]
    assert row[4] == "45.00 ± 1.00"
    assert row[8:11] == ["—", "—", "—"]


def test_networks_behind_rows_are_counted_by_their_seeds():
    """Two rows with two seeds each, of which they share one, have three networks."""
    joint, crt = cell(predictions(0.44, 0.45)), cell(predictions(0.46, 0.47))
    put(joint, classifier="joint")
    put(crt, classifier="crt").rename(paths.PUBLISHED / "cifar100_lt_100/mixup/crt/seed2.json")
    path = paths.PUBLISHED / "cifar100_lt_100/mixup/crt/seed2.json"
    path.write_text(json.dumps(crt[0] | {"seed": 2}))
    stage.main()
    assert "Behind these rows stand 3 networks of stage 1." in section("MiSLAS")


def test_a_footing_tells_its_rows_seeds_apart():
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "ce", "joint")
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "mixup", "mislas")
    stage.main()
    assert "Seeds: " not in section("Everything on one footing")
    (paths.PUBLISHED / "footing_cpu/mixup/mislas/seed1.json").unlink()
    stage.main()
    assert "Seeds: 0, 1: ce/joint; 0: mixup/mislas." in section("Everything on one footing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ({"classifier": "joint"}, "mixup/joint/seed0.json is of mislas, and lies in a folder of joint: move it away"),
        ({"representation": "ce"}, "ce/mislas/seed0.json is of mixup, and lies in a folder of ce: move it away"),
    ],
)
def test_files_in_another_cells_folder_are_named(name, message):
    names = {"representation": {"name": "mixup"}, "classifier": {"name": "mislas"}}
    runs = cell(predictions(0.4, 0.42), provenance={"params": names})
    put(runs)
    stage.main()
    put(runs, **name)
    with pytest.raises(UserError, match=message):
        stage.main()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100_lt_100/mixup/mislas.json", r"mislas\.json: must lie in <dataset>/.* as seed<k>\.json: move it away"),
        (
            "cifar100_lt_100/stray/joint/seed0.json",
            r"cells/cifar100_lt_100/stray/joint/seed0\.json: no table of published/params\.yaml trains "
            "cifar100_lt_100/stray/joint: move it away",
        ),
    ],
)
def test_files_that_no_table_has_are_named(name, message):
    path = paths.PUBLISHED / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(cell(predictions(0.4))[0]))
    with pytest.raises(UserError, match=message):
        stage.main()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("seed00.json", r"seed00\.json: must lie in <dataset>/.* as seed<k>\.json: move it away"),
        ("notes.txt", r"notes\.txt: must lie in <dataset>/.* as seed<k>\.json: move it away"),
        ("seed3.json", r"seed3\.json: published/params\.yaml: seeds are 0, 1, 2: move it away, or add 3"),
    ],
)
def test_a_file_of_another_name_among_the_seeds_is_named(name, message):
    path = put(cell(predictions(0.4, 0.42)))
    path.rename(path.with_name(name))
    with pytest.raises(UserError, match=f"mixup/mislas/{message}"):
        stage.main()


def test_what_is_no_seed_of_a_cell_is_named_or_passed_over():
    path = put(cell(predictions(0.4, 0.42)))
    path.with_name(".seed0.json.0a1b2c3d.part").write_text("{")  # what a killed process leaves
    path.with_name(".seed2.json").write_text("{")
    stage.main()
    path.with_name("seed2.json").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"mixup/mislas/seed2\.json is a folder, or a link to nothing: move it away"):
        stage.main()
    path.with_name("seed2.json").unlink()
    path.with_name("seed2.json").mkdir()
    with pytest.raises(UserError, match=r"mixup/mislas/seed2\.json is a folder, or a link to nothing: move it away"):
        stage.main()
    path.with_name("seed2.json").rmdir()
    linked = paths.PUBLISHED / "cifar100_lt_50"
    linked.symlink_to("cifar100_lt_100")
    with pytest.raises(UserError, match="cells/cifar100_lt_50: must lie in <dataset>/"):
        stage.main()
    linked.unlink()
    path.parent.with_name("joint").write_text("")
    with pytest.raises(UserError, match="cifar100_lt_100/mixup/joint: must lie in <dataset>/"):
        stage.main()


def test_test_images_that_were_trained_on_are_told():
    data = {"train_images": 10847, "official": True, "test_split": {"test_images.npy": "a"}}
    put(cell(predictions(0.40, 0.41), data=data | {"trained_on": 15}), "footing_cpu", "ce", "joint")
    put(cell(predictions(0.50, 0.51, seed=1), data=data), "footing_cpu", "mixup", "mislas")  # of before it was kept
    stage.main()
    says = "Of the test images, 15 of footing_cpu are in the training split too."
    assert says in stage.TEXT.read_text()
    assert says in paths.OVERVIEW.read_text()


def test_a_copy_of_a_seed_is_named():
    runs = cell(predictions(0.40, 0.41, 0.42))
    put([runs[0], runs[1], runs[1] | {"seed": 2, "top1": runs[1]["top1"], "ece": 0.07}])
    message = r"seed2\.json has the predictions of seed1\.json, image by image, and each seed is a network of its own: "
    with pytest.raises(UserError, match=message) as caught:
        stage.main()
    assert "\n" not in str(caught.value)
    surer = runs[1] | {"seed": 2, "nll": runs[1]["nll"] + 1e-6}  # right on the same images, and another network
    put([runs[0], runs[1], surer])
    stage.main()


def test_a_seed_that_is_cut_off_is_named_with_how_it_is_made():
    path = put(cell(predictions(0.4, 0.42)))
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError) as caught:
        stage.main()
    assert re.fullmatch(
        rf"{path} is damaged \(.+\): delete it and run `python -m stages\.published --missing --dataset "
        "cifar100_lt_100 --representation mixup --classifier mislas --seed 0`, with the --precision and "
        "--images of the other seeds",
        str(caught.value),
    )


def test_cells_of_other_test_images_are_not_paired():
    """As many, but in another order, as an official archive and a folder have them."""
    put(cell(predictions(0.4, 0.42)), "footing_cpu", "ce", "joint")
    data = {"train_images": 10847, "official": False, "test_split": {"test_images.npy": "b"}}
    put(cell(predictions(0.4, 0.42), data=data), "footing_cpu", "mixup", "mislas")
    with pytest.raises(UserError, match=r"mixup/mislas: its data\.test_split\.test_images\.npy is b, that of ce"):
        stage.main()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rule: temperature", "rule: heat", "footing.small: there is no rule heat: use one of temperature, "),
        ("title: Not run", "titel: Not run", "published/params.yaml: footing.never.titel: unknown key"),
        ("rule: temperature", "rule: none", "footing.small: rows lists mixup/mislas more than once"),
        ("dataset: footing_strong", "dataset: 7", "footing.never.dataset: "),
    ],
)
def test_a_wrong_footing_is_named(old, new, message):
    plan.PLAN.write_text(TABLES + FOOTING.replace(old, new))
    with pytest.raises(UserError, match=message):
        stage.main()


def test_the_same_bytes_twice():
    for representation, classifier in itertools.product(("ce", "mixup"), ("joint", "mislas")):
        put(cell(predictions(0.4, 0.5)), "footing_cpu", representation, classifier)
    outputs = (stage.TEXT, stage.ROWS, stage.PAIRS)
    stage.main()
    first = [path.read_bytes() for path in outputs]
    stage.main()
    assert [path.read_bytes() for path in outputs] == first
