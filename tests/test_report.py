"""The report says the numbers of the grid's cells, and nothing else."""

import base64
import html
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from stages import paths, readme, report
from tailcal import costs, figures, files, lineage, params, splits
from tailcal.costs import Cost
from tailcal.duplicates import TWICE
from tailcal.errors import UserError
from tailcal.page import CAPTIONS
from tailcal.posthoc import RULES
from tailcal.tables import signed
from tests import report_inputs

SMALL = {"representations": ("ce", "mixup"), "classifiers": ("joint", "mislas")}
OUTPUTS = (paths.TABLE, paths.TABLE_TEXT, paths.SUMMARY, paths.RELIABILITY, paths.REPORT)
PICTURES = (
    "reliability",
    "reliability_overview",
    "accuracy_against_ece",
    "class_counts",
    "per_class_accuracy",
    "training_curves",
)


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """What a function of `figures` draws of the same values is the same picture, so it is drawn once: its bytes, by
    the function and the values. Drawing is nearly all that a report takes."""
    drawn = {}

    def once(draw):
        def drawing(*values):
            *values, path = values
            key = draw.__name__, pickle.dumps(values)
            if key not in drawn:
                draw(*values, path)
                drawn[key] = path.read_bytes()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(drawn[key])

        return drawing

    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(figures, name, once(getattr(figures, name)))
        yield drawn


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    report_inputs.write(root, **SMALL)
    return root


@pytest.fixture(autouse=True)
def project(inputs, tmp_path, monkeypatch):
    """A fresh copy of a small project, as the working directory."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def _lines():
    """The table's rows: {(representation, classifier): {title: text}}."""
    rows = [
        [text.strip() for text in line.strip("|\n ").split("|")]
        for line in paths.TABLE_TEXT.read_text().splitlines()
        if line.startswith("|")
    ]
    assert len(rows[1]) == len(rows[0]), "the rule has as many columns, or it is no table"
    return {(row[0], row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_numbers_are_those_of_the_cells():
    report.main()
    table = pd.read_csv(paths.TABLE, keep_default_na=False)
    assert table["posthoc"].tolist() == ["none", *report_inputs.RULES] * 4
    assert table["transductive"].tolist() == [name in report_inputs.TRANSDUCTIVE for name in table["posthoc"]]
    for row in table.to_dict("records"):
        metrics = json.loads(paths.metrics(row["dataset"], row["representation"], row["classifier"]).read_text())
        numbers = metrics if row["posthoc"] == "none" else metrics["posthoc"][row["posthoc"]]
        for name in report_inputs.NUMBERS:
            assert row[name] == numbers[name]
            assert row[f"{name}_std"] == numbers[f"{name}_std"]
        assert row["ece_floor"] == numbers["ece_floor"]
        assert row["seeds"] == 3
    plain = table[table["posthoc"] == "none"]
    summary = json.loads(paths.SUMMARY.read_text())["digits_lt"]
    assert summary == {
        f"mean_{name}": pytest.approx(plain[name].mean(), abs=1e-4) for name in ("top1", "few", "ece", "nll")
    }


def test_table_in_percent_with_the_best_in_bold():
    for k, cell in enumerate(product(("digits_lt",), *SMALL.values())):
        numbers = {"top1": 0.8 + k / 100, "ece": 0.02 + k / 100, "ece_floor": 0.011, "many": 0.5, "few": 0.1 * (k < 2)}
        groups = {"medium": 0.4 + k / 100, "nll": 0.5 + k / 10}
        rules = json.loads(paths.metrics(*cell).read_text())["posthoc"]
        after = {"temperature": rules["temperature"] | {"ece_floor": 0.012 + k / 1000}}
        report_inputs.measure(cell, top1_std=0.005, posthoc=rules | after, **numbers, **groups)
    report.main()
    lines = _lines()
    assert lines["mixup", "mislas"]["top-1"] == "**83.00 ± 0.50**"
    assert lines["mixup", "joint"]["top-1"] == "82.00 ± 0.50"
    assert lines["ce", "joint"]["ECE"] == "**2.00 ± 1.23**"
    assert lines["mixup", "mislas"]["ECE"] == "5.00 ± 1.23"
    assert [line["few"].startswith("**10.00") for line in lines.values()] == [True, True, False, False], "both are best"
    assert lines["mixup", "joint"]["few"] == "0.00 ± 1.23", "a number as well"
    assert {line["many"] for line in lines.values()} == {"50.00 ± 1.23"}, "what most have reached is no distinction"
    assert {line["ECE floor"] for line in lines.values()} == {"1.10"}, "and there is no best of it"
    assert [line["ECE floor after it"] for line in lines.values()] == ["1.20", "1.30", "1.40", "1.50"]
    assert lines["mixup", "mislas"]["medium"] == "**43.00 ± 1.23**"
    assert lines["ce", "joint"]["NLL"] == "**0.500 ± 0.012**"


def test_what_is_equal_as_shown_is_equally_good():
    for k, cell in enumerate(product(("digits_lt",), *SMALL.values())):
        top1, nll = (0.83 + 1e-5 * k, 0.5 + 1e-4 * k) if k < 2 else (0.5, 0.6)
        report_inputs.measure(cell, top1=top1, ece=0.1, nll=nll)
    report.main()
    for number, best in (("top-1", "**83.00"), ("NLL", "**0.500")):
        assert [line[number].startswith(best) for line in _lines().values()] == [True, True, False, False]


def test_of_two_eces_that_chance_alone_gives_the_lower_is_no_better():
    for k, cell in enumerate(product(("digits_lt",), *SMALL.values())):
        report_inputs.measure(cell, top1=0.5, ece=0.02 + k / 1000, ece_floor=(0.02, 0.03, 0.021, 0.0)[k])
    report.main()
    lines = _lines()
    assert [line["ECE"].startswith("**") for line in lines.values()] == [True, True, False, False]
    assert lines["ce", "mislas"]["ECE"] == "**2.10 ± 1.23**"


def test_of_two_rules_whose_ece_chance_alone_gives_the_lower_is_no_better():
    where = paths.metrics("digits_lt", "ce", "joint")
    rules = json.loads(where.read_text())["posthoc"]
    for numbers, ece in zip(rules.values(), (0.020, 0.025, 0.019, 0.026, 0.027, 0.001), strict=True):
        numbers |= {"ece": ece, "ece_floor": 0.03 if ece in (0.020, 0.025) else 0.01}
    report_inputs.measure(("digits_lt", "ce", "joint"), posthoc=rules, top1=0.5, ece=0.05)
    report.main()
    errors = {name: texts[0] for name, texts in _page_tables()["ECE, %"].items()}
    assert [name for name, text in errors.items() if text.startswith("<strong>")] == ["temperature", "vector scaling"]


def test_of_two_cells_of_which_one_has_a_number_neither_is_the_best(tmp_path):
    report_inputs.write(tmp_path, representations=("ce",), classifiers=("joint", "mislas"))
    report_inputs.change(paths.metrics("digits_lt", "ce", "joint"), few=None, few_std=None)
    report_inputs.change(paths.metrics("digits_lt", "ce", "mislas"), few=0.5)
    report.main()
    assert [line["few"] for line in _lines().values()] == ["—", "50.00 ± 1.23"]


def test_a_cell_without_an_nll_has_a_dash_and_is_no_worse_than_a_guess():
    report_inputs.change(paths.metrics("digits_lt", "ce", "joint"), nll=None, nll_std=None)
    report.main()
    assert _lines()["ce", "joint"]["NLL"] == "—"
    assert "the NLL of" not in paths.TABLE_TEXT.read_text()


def test_the_deviation_after_a_temperature_is_its_own():
    cell = paths.metrics("digits_lt", "ce", "joint")
    rules = json.loads(cell.read_text())["posthoc"]
    after = rules["temperature"] | {"ece": 0.05, "ece_std": 0.034}
    report_inputs.change(cell, posthoc=rules | {"temperature": after})
    report.main()
    assert _lines()["ce", "joint"]["ECE after temperature"].strip("*") == "5.00 ± 3.40"


def test_empty_group_is_a_dash_and_never_the_best():
    for cell in product(("digits_lt",), *SMALL.values()):
        report_inputs.change(paths.metrics(*cell), few=None, few_std=None)
    report.main()
    assert {line["few"] for line in _lines().values()} == {"—"}
    assert set(pd.read_csv(paths.TABLE, keep_default_na=False).query("posthoc == 'none'")["few"]) == {""}
    assert json.loads(paths.SUMMARY.read_text())["digits_lt"]["mean_few"] is None


def test_absent_temperature_is_a_dash_with_its_reason():
    for cell in product(("digits_lt",), *SMALL.values()):
        report_inputs.change(paths.metrics(*cell), posthoc={}, posthoc_absent={"temperature": "nothing is held out"})
    report.main()
    assert {line["ECE after temperature"] for line in _lines().values()} == {"—"}
    assert "No temperature: nothing is held out." in paths.TABLE_TEXT.read_text()
    assert "Post-hoc rules" not in paths.REPORT.read_text()


def test_rules_absent_for_one_reason_share_a_sentence():
    absent = {"temperature": "nothing is held out", "platt": "of the weather.", "pn_inductive": "nothing is held out"}
    for cell in product(("digits_lt",), *SMALL.values()):
        report_inputs.change(paths.metrics(*cell), posthoc_absent=absent)
    report.main()
    end = "No temperature, pn inductive: nothing is held out.\n\nNo platt: of the weather.\n"
    assert paths.TABLE_TEXT.read_text().endswith(end)


def test_a_rule_that_one_cell_alone_lacks_is_told():
    report_inputs.change(paths.metrics("digits_lt", "mixup", "mislas"), posthoc_absent={"platt": "of the weather"})
    report.main()
    assert paths.TABLE_TEXT.read_text().endswith("\n\nNo platt: of the weather.\n")


def test_what_is_to_be_said_of_the_images_is_said_below_the_table():
    images = {"skipped": {"train": 0, "test": 1200}, "duplicates": {"test": 7, "holdout": 0, "train": 2000}}
    for cell in product(("digits_lt",), *SMALL.values()):
        report_inputs.change(paths.metrics(*cell), images=images)
    report.main()
    for sentence in (
        "There twice: 7 of the test images in the training split too, and so not new to the model; 2,000 of the "
        "training images in another class too.",
        "Images that could not be read are left out: 1,200 of the test split.",
    ):
        assert f"\n\n{sentence}\n" in paths.TABLE_TEXT.read_text()
        assert sentence in _html()


def _page_tables():
    """The page's tables of rules: {title: {column: texts}}, the best as the page marks it."""
    tables = {}
    for title, body in re.findall(r"<h4>(.*?)</h4>(.*?)</table>", _html(), re.DOTALL):
        names = re.findall(r"<th>(.*?)</th>", body)
        rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)[1:]]
        tables[title] = dict(zip(names, zip(*rows, strict=True), strict=True))
    return tables


def test_page_sets_the_rules_side_by_side_one_table_per_number():
    report.main()
    tables = _page_tables()
    assert list(tables) == ["ECE, %", "NLL", "Top-1 accuracy, %", "Few-shot accuracy, %"]
    rules = [*(rule.replace("_", " ") for rule in report_inputs.RULES[:-1]), "pn transductive †"]
    for table in tables.values():
        assert list(table) == ["representation", "classifier", "none", *rules]
        assert {len(column) for column in table.values()} == {4}
    metrics = json.loads(paths.metrics("digits_lt", "ce", "joint").read_text())["posthoc"]
    shown = tables["NLL"]["vector scaling"][0].removeprefix("<strong>").removesuffix("</strong>")
    assert shown == f"{metrics['vector_scaling']['nll']:.3f}"


def test_the_best_rule_of_a_cell_is_marked_and_a_transductive_one_does_not_compete():
    where = paths.metrics("digits_lt", "ce", "joint")
    rules = json.loads(where.read_text())["posthoc"]
    for k, numbers in enumerate(rules.values()):
        numbers |= {"ece": 0.10 - k / 100, "top1": 0.5, "few": None, "nll": 0.5 - k / 10}
    report_inputs.measure(("digits_lt", "ce", "joint"), posthoc=rules, ece=0.2, top1=0.5, few=None, nll=0.6)
    other = paths.metrics("digits_lt", "ce", "mislas")  # here two rules alone, of which one does not compete
    rules = json.loads(other.read_text())["posthoc"]
    best = {
        "pn_transductive": rules["pn_transductive"],
        "temperature": rules["temperature"] | {"top1": 0.9, "few": 0.8},
    }
    report_inputs.change(other, posthoc=best, few=0.7)
    without = paths.metrics("digits_lt", "mixup", "joint")  # and here none that does
    report_inputs.change(without, posthoc={"pn_transductive": rules["pn_transductive"]})
    report_inputs.measure(("digits_lt", "mixup", "joint"), top1=0.5, ece=0.1)
    report.main()
    first = {title: [column[0] for column in table.values()][2:] for title, table in _page_tables().items()}
    eces = ["20.00", "10.00", "9.00", "8.00", "7.00", "<strong>6.00</strong>", "5.00"]
    assert first["ECE, %"] == eces
    assert first["Top-1 accuracy, %"] == ["<strong>50.00</strong>"] * 6 + ["50.00"], "equal is equally good"
    assert first["NLL"] == ["0.600", "0.500", "0.400", "0.300", "0.200", "<strong>0.100</strong>", "0.000"]
    assert first["Few-shot accuracy, %"] == ["—"] * 7
    second = {title: table["temperature"][1] for title, table in _page_tables().items()}
    assert second["Top-1 accuracy, %"] == "<strong>90.00</strong>"
    assert second["Few-shot accuracy, %"] == "<strong>80.00</strong>"
    assert _page_tables()["Top-1 accuracy, %"]["none"][2] == "50.00"


def _class_table():
    """The page's section of classes: (its summary, {column: texts})."""
    summary, body = re.search(r"<summary>(Test accuracy.*?)</summary>(.*?)</details>", _html(), re.DOTALL).groups()
    titles = [html.unescape(title).replace("\xa0", " ") for title in re.findall(r"<th>(.*?)</th>", body)]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)[1:]]
    return summary, dict(zip(titles, zip(*rows, strict=True), strict=True))


def _html():
    return paths.REPORT.read_text()


def _per_class(representation, classifier):
    path = paths.cell_plots("digits_lt", representation, classifier) / "per_class.csv"
    return path, pd.read_csv(path, keep_default_na=False)


def test_page_has_every_class_by_name_from_the_most_frequent_on():
    for cell in product(*SMALL.values()):
        path, classes = _per_class(*cell)
        classes["name"] = ["猫 <b>", *classes["name"][1:]]
        classes.iloc[::-1].to_csv(path, index=False)
    report.main()
    summary, table = _class_table()
    assert summary == "Test accuracy of every class of digits_lt"
    assert list(table)[5:] == ["ce / joint", "ce / mislas", "mixup / joint", "mixup / mislas"]
    classes = _per_class("ce", "joint")[1].sort_values("train_count", ascending=False)
    assert table["class"][:3] == ("猫 &lt;b&gt;", "a rather $long$ name of a class, past any axis", "null")
    assert table["number"] == tuple("0123456789")
    assert table["shot group"] == tuple(classes["group"])
    assert table["training images"] == tuple(map(str, classes["train_count"]))
    assert set(table["test images"]) == {"50"}
    for cell in product(*SMALL.values()):
        accuracies = _per_class(*cell)[1].sort_values("class")["accuracy"]
        assert table[" / ".join(cell)] == tuple(f"{100 * accuracy:.1f} ± 1.0" for accuracy in accuracies)


@pytest.mark.parametrize("number", [100, 101])
def test_of_very_many_classes_the_page_has_the_least_accurate(tmp_path, number):
    report_inputs.write(tmp_path, representations=("ce",), classifiers=("joint", "crt"), number=number)
    means = sum(_per_class("ce", name)[1]["accuracy"] for name in ("joint", "crt")) / 2
    report.main()
    summary, table = _class_table()
    listed = sorted(map(int, table["number"]))
    if number == 100:
        assert listed == list(range(100))
    else:
        assert listed == sorted(sorted(range(101), key=lambda k: means[k])[:50])
        assert summary.endswith(
            "the 50 classes of the lowest accuracy, averaged over the cells, among the 101 of digits_lt"
        )
    assert [int(count) for count in table["training images"]] == sorted(map(int, table["training images"]))[::-1]
    assert "plots/cells/digits_lt/&lt;representation&gt;/&lt;classifier&gt;/per_class.csv" in _html()


def test_classes_of_as_many_images_come_in_the_order_of_their_numbers(tmp_path):
    report_inputs.write(tmp_path, representations=("ce",), classifiers=("joint",), number=100)
    path, classes = _per_class("ce", "joint")
    classes.assign(train_count=[20 + k % 2 for k in range(100)]).to_csv(path, index=False)
    report.main()
    assert list(map(int, _class_table()[1]["number"])) == [*range(1, 100, 2), *range(0, 100, 2)]


def test_classes_have_no_deviation_where_there_is_none_or_no_room(tmp_path, monkeypatch):
    def blank(*values):  # the table has no pictures
        values[-1].parent.mkdir(parents=True, exist_ok=True)
        values[-1].write_bytes(b"\x89PNG")

    for name in PICTURES:
        monkeypatch.setattr(figures, name, blank)
    report_inputs.write(tmp_path, representations=("ce",), classifiers=("joint",), seeds=1)
    path, classes = _per_class("ce", "joint")
    classes.assign(accuracy_std="").to_csv(path, index=False)
    report.main()
    assert "±" not in "".join(_class_table()[1]["ce / joint"])
    for representations, classifiers, room in (
        (("ce", "mixup"), ("joint", "crt", "lws", "mislas"), True),
        (("ce", "mixup", "fsgl"), ("joint", "crt", "lws"), False),
    ):
        report_inputs.write(tmp_path, representations=representations, classifiers=classifiers)
        report.main()
        assert ("±" in "".join(_class_table()[1]["ce / joint"])) == room


@pytest.mark.parametrize("rules", [report_inputs.RULES, ("temperature",)])
def test_page_explains_the_rules_that_were_applied(rules):
    for cell in product(("digits_lt",), *SMALL.values()):
        posthoc = json.loads(paths.metrics(*cell).read_text())["posthoc"]
        report_inputs.change(paths.metrics(*cell), posthoc={rule: posthoc[rule] for rule in rules})
    report.main()
    text = paths.REPORT.read_text()
    assert ("Transductive: computed from" in text) == ("pn_transductive" in rules)
    for name, rule in RULES.items():
        assert (rule.says in html.unescape(text)) == (name in rules)


def test_one_seed_has_no_deviation(tmp_path):
    report_inputs.write(tmp_path, representations=("ce",), classifiers=("joint",), seeds=1)
    report.main()
    assert "±" not in paths.TABLE_TEXT.read_text()
    assert "**" not in paths.TABLE_TEXT.read_text(), "one cell is no contest"
    assert "one seed" in paths.TABLE_TEXT.read_text()


def _shorten(dataset, representation):
    """Have a representation be trained for 7 epochs."""
    history = paths.representation(dataset, representation) / "history.csv"
    pd.read_csv(history).query("epoch <= 7").to_csv(history, index=False)
    report_inputs.change(history.with_name("provenance.json"), history=files.sha256(history))


def test_caption_is_counted_in_the_files():
    _shorten("digits_lt", "mixup")
    report.main()
    caption = paths.TABLE_TEXT.read_text().splitlines()[0]
    classes = pd.read_csv(paths.cell_plots("digits_lt", "ce", "joint") / "per_class.csv")["train_count"]
    for fact in (
        "digits_lt: exponential profile, imbalance factor 20 ",
        f"{classes.sum()} in all",
        "2 many, 5 medium, 3 few",
        "200 held-out and 500 test images",
        "over 3 seeds",
        "last epoch (7 to 30)",
        "15 bins",
    ):
        assert fact in caption


@pytest.mark.parametrize(
    ("most", "fewest", "factor"), [(120, 16, "7.5"), (400, 30, "13.3"), (5000, 3, "1,670"), (5000, 5, "1,000")]
)
def test_the_factor_of_a_natural_tail_is_counted(most, fewest, factor):
    edit(
        Path("params.yaml"),
        lambda content: content["datasets"]["digits_lt"].update(imbalance={"profile": "natural", "seed": 0}),
    )
    for cell in product(("digits_lt",), *SMALL.values()):
        provenance = json.loads(paths.metrics(*cell).read_text())["provenance"]
        provenance["params"]["dataset"]["imbalance"] = {"profile": "natural", "seed": 0}
        report_inputs.change(paths.metrics(*cell), provenance=provenance)
        path, classes = _per_class(*cell[1:])
        classes.assign(train_count=[most, *[60] * 8, fewest]).to_csv(path, index=False)
    report.main()
    assert paths.TABLE_TEXT.read_text().startswith(
        f"digits_lt: natural profile, imbalance factor {factor} (10 classes of {most} to {fewest} "
    )


def test_of_the_shot_groups_those_are_counted_that_there_are():
    for cell in product(*SMALL.values()):
        path, classes = _per_class(*cell)
        classes.assign(group=["many"] * 4 + ["few"] * 6).to_csv(path, index=False)
    report.main()
    assert "; 4 many, 6 few), 200 held-out and" in paths.TABLE_TEXT.read_text()


def test_a_caption_says_no_hold_out_where_there_is_none():
    edit(Path("params.yaml"), lambda content: content["datasets"]["digits_lt"].update(holdout_per_class=0))
    for cell in product(("digits_lt",), *SMALL.values()):
        provenance = json.loads(paths.metrics(*cell).read_text())["provenance"]
        provenance["params"]["dataset"]["holdout_per_class"] = 0
        report_inputs.change(paths.metrics(*cell), provenance=provenance)
    report.main()
    assert "3 few), 500 test images; " in paths.TABLE_TEXT.read_text()


@pytest.mark.parametrize(
    ("points", "digits", "text"),
    [(1.005, 2, "+1.00"), (-0.25, 2, "−0.25"), (-0.004, 2, "+0.00"), (0.0, 1, "+0.0"), (-12.34, 1, "−12.3")],
)
def test_a_difference_has_a_sign_and_zero_no_minus(points, digits, text):
    assert signed(points, digits) == text


def test_only_the_cells_of_the_grid_are_read():
    stale = paths.metrics("digits_lt", "ce", "of_another_grid")
    stale.write_text("not JSON")
    report.main()
    assert not any("of_another_grid" in path.read_text() for path in OUTPUTS)


def test_two_data_sets_of_many_classes(tmp_path, pictures):
    report_inputs.write(
        tmp_path,
        datasets=("digits_lt", "cifar100_lt"),
        representations=("ce",),
        classifiers=("joint", "crt"),
        number=100,
    )
    _shorten("cifar100_lt", "ce")
    report.main()
    assert set(json.loads(paths.SUMMARY.read_text())) == {"digits_lt", "cifar100_lt"}
    assert paths.TABLE_TEXT.read_text().count("| representation |") == 2
    assert "\n\ncifar100_lt: " in paths.TABLE_TEXT.read_text(), "a paragraph of its own"
    for text in (paths.TABLE_TEXT.read_text(), _html()):
        assert re.findall(r"at the last epoch \((\d+)\)", text) == ["30", "7"]
    assert len(list(paths.FIGURES.glob("*/*.png"))) == 10
    drawn = {name: _drawn_of(pictures, name)["training"]["ce"] for name in ("digits_lt", "cifar100_lt")}
    assert {name: history["epoch"].max() for name, history in drawn.items()} == {"digits_lt": 30, "cifar100_lt": 7}


def _drawn_of(pictures, dataset):
    """Of which values each picture of a data set that lies there was drawn, by the picture's name."""
    drawn = {content: pickle.loads(values)[0] for (_, values), content in pictures.items()}
    return {path.stem: drawn[path.read_bytes()] for path in paths.FIGURES.glob(f"{dataset}/*.png")}


def test_each_picture_is_drawn_of_the_cells_own_numbers(pictures):
    report.main()
    drawn = _drawn_of(pictures, "digits_lt")
    plain = pd.read_csv(paths.TABLE, keep_default_na=False).query("posthoc == 'none'")
    shown = ["representation", "classifier", "top1", "ece"]
    assert drawn["accuracy_ece"][shown].to_numpy().tolist() == plain[shown].to_numpy().tolist()
    for cell in product(*SMALL.values()):
        bins = pd.read_csv(paths.cell_plots("digits_lt", *cell) / "reliability.csv")
        assert drawn["reliability"][cell]["accuracy"].equals(bins["accuracy"])
        assert drawn["per_class"][cell]["accuracy"].equals(_per_class(*cell)[1]["accuracy"])
    assert drawn["class_counts"]["train_count"].equals(_per_class("ce", "joint")[1]["train_count"])
    for name in SMALL["representations"]:
        history = pd.read_csv(paths.representation("digits_lt", name) / "history.csv")
        assert drawn["training"][name]["loss"].equals(history["loss"])


def test_the_page_of_costs_has_the_stages_in_their_order():
    for stage, *cell in (("calibrate", "digits_lt", "ce", "mislas"), ("represent", "digits_lt", "ce")):
        machine = {"name": "CPU, 2 cores", "gpu_memory": None}
        costs.write(paths.costs(stage, *cell), {0: Cost(2.0, 0.5, 300, machine, "device", 1)})
    report.main()
    assert re.findall(r"<td .*?>(represent|calibrate)<", paths.COSTS_PAGE.read_text()) == ["represent", "calibrate"]


def test_what_a_killed_report_left_is_removed():
    made = (*OUTPUTS, paths.COSTS_PAGE, paths.FIGURES / "digits_lt/training.png")
    left = [path.with_name(f".{path.name}.x1.part") for path in made]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    report.main()
    assert not [path for path in left if path.exists()]


def test_a_cell_that_is_worse_than_a_guess_is_named_and_widens_no_column():
    report_inputs.change(paths.metrics("digits_lt", "ce", "mislas"), nll=29738719.619, nll_std=51448966.635)
    report_inputs.change(paths.metrics("digits_lt", "ce", "joint"), nll=2.303)
    rules = json.loads(paths.metrics("digits_lt", "ce", "joint").read_text())["posthoc"]
    rules["temperature"]["nll"] = 2.303
    report_inputs.change(paths.metrics("digits_lt", "ce", "joint"), posthoc=rules)
    report_inputs.change(paths.metrics("digits_lt", "mixup", "joint"), nll=2.302, nll_std=1000.0)
    report_inputs.change(paths.metrics("digits_lt", "mixup", "mislas"), nll=2.303)
    report_inputs.change(paths.metrics("digits_lt", "mixup", "mislas"), posthoc={})
    report.main()
    text = paths.TABLE_TEXT.read_text()
    assert "3e+07 ± 5.1e+07" in text
    assert "2.302 ± 1e+03" in text
    # A temperature mends one, does not mend another, and there is none for the third.
    assert "Worse than a guess: the NLL of ce/joint is above ln K = 2.303, that of equal probabilities. Look at" in text
    assert (
        "Much too sure: the NLL of ce/mislas is above ln K = 2.303, that of equal probabilities; after a temp" in text
    )
    assert (
        "Much too sure, or lost: the NLL of mixup/mislas is above ln K = 2.303, that of equal probabilities; without"
    ) in text
    assert "Worse than a guess" in _html()


def test_a_temperature_at_its_bound_is_told_and_its_ece_is_not_the_best():
    cell = paths.metrics("digits_lt", "ce", "joint")
    report_inputs.measure(("digits_lt", "ce", "joint"), top1=0.99, ece=0.1)
    rules = json.loads(cell.read_text())["posthoc"]
    nothing = rules["temperature"] | {"ece": 0.0001, "temperature": 99.99}
    report_inputs.change(cell, posthoc=rules | {"temperature": nothing})
    report.main()
    text = paths.TABLE_TEXT.read_text()
    assert "The temperature of ce/joint ended at its bound: the ECE after it says nothing." in text
    assert "| 0.01" in text
    assert "**0.01" not in text
    assert "<strong>0.01" not in _html()
    assert _lines()["ce", "joint"]["top-1"].startswith("**99.00"), "and the rest competes"
    report_inputs.change(cell, posthoc=rules | {"temperature": nothing | {"temperature": 50.0}})
    report.main()
    assert "**0.01" in paths.TABLE_TEXT.read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ece": 0.125, "ece_floor": 0.0624}, True),
        ({"ece": 0.125, "ece_floor": 0.0625}, False),  # as much as chance alone gives, and no more
        ({"ece": 0.125, "ece_floor": 0.0624, "temperature": 100.0}, False),  # what is at its bound is told already
        ({"ece": 0.01, "ece_floor": 0.0}, False),
    ],
)
def test_a_temperature_that_does_harm_beyond_chance_is_told(change, told):
    cell = "digits_lt", "ce", "joint"
    report_inputs.measure(cell, top1=0.75, ece=0.0625)
    rules = json.loads(paths.metrics(*cell).read_text())["posthoc"]
    report_inputs.change(paths.metrics(*cell), posthoc=rules | {"temperature": rules["temperature"] | change})
    report.main()
    for text in (paths.TABLE_TEXT.read_text(), _html()):
        harmed = re.search(r"The temperature made the ECE of (.*) worse, by more than the floor", text)
        assert ("ce/joint" in (harmed[1] if harmed else "").split(", ")) == told


def test_same_bytes_at_every_run(pictures):
    written = []
    for _ in range(2):
        pictures.clear()
        report.main()
        written.append({path: path.read_bytes() for path in [*OUTPUTS, *sorted(paths.FIGURES.rglob("*.png"))]})
    assert written[0] == written[1]


def test_reliability_records_are_numbers_pooled_over_seeds():
    report.main()
    records = pd.DataFrame(json.loads(paths.RELIABILITY.read_text()))
    bins = pd.read_csv(paths.cell_plots("digits_lt", "mixup", "joint") / "reliability.csv")
    own = records[records["cell"] == "mixup/joint"]
    assert own["count"].sum() == bins["count"].sum() == 1500
    assert (records["count"] > 0).all()
    assert (set(own["representation"]), set(own["classifier"])) == ({"mixup"}, {"joint"})
    for number in ("confidence", "accuracy"):
        assert own[number].tolist() == figures.pool(bins)[number].round(4).tolist()


def test_page_is_self_contained():
    report.main()
    page = _html()
    # A link to the page beside it loads nothing.
    assert not re.search(r"""(src|href)\s*=(?!"data:|"costs\.html")|url\(|@import|<script|<link""", page)
    images = [base64.b64decode(image) for image in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(images) == 5 + 4
    assert images[:5] == [(paths.FIGURES / f"digits_lt/{name}.png").read_bytes() for name in CAPTIONS]
    assert all(image.startswith(b"\x89PNG") for image in images)
    titled = dict(re.findall(r'alt="Reliability diagram of (\S+)" src="data:image/png;base64,(.+?)"', page))
    for cell in product(*SMALL.values()):
        picture = (paths.cell_plots("digits_lt", *cell) / "reliability.png").read_bytes()
        assert base64.b64decode(titled["/".join(cell)]) == picture
    for fact in ("fedcba9876543210", "aa4ca0a", "2.4.6"):
        assert page.count(fact) == 1, "what all cells share is said once"


def test_what_one_cell_has_of_its_own_is_said_of_it_alone():
    where = paths.metrics("digits_lt", "ce", "joint")
    report_inputs.change(where, provenance=json.loads(where.read_text())["provenance"] | {"device": "a GPU"})
    report.main()
    own = dict(re.findall(r"<details><summary>(\w+/\w+)</summary>(.*?)</details>", _html(), re.DOTALL))
    assert ["a GPU" in facts for facts in own.values()] == [True, False, False, False]
    assert ["cpu" in facts for facts in own.values()] == [False, True, True, True]
    assert _html().count("a GPU") == 1


def test_page_escapes_what_it_is_given():
    where = paths.metrics("digits_lt", "ce", "joint")
    provenance = json.loads(where.read_text())["provenance"]
    report_inputs.change(where, provenance=provenance | {"device": "<script>alert(1)</script>"})
    report.main()
    assert "<script>" not in paths.REPORT.read_text()


@pytest.mark.parametrize(
    "path",
    [
        paths.metrics("digits_lt", "mixup", "joint"),
        paths.cell_plots("digits_lt", "mixup", "joint") / "reliability.csv",
        paths.cell_plots("digits_lt", "mixup", "joint") / "reliability.png",
        paths.cell_plots("digits_lt", "mixup", "joint") / "per_class.csv",
        paths.representation("digits_lt", "mixup") / "history.csv",
    ],
    ids=lambda path: path.name,
)
def test_missing_file_is_one_clear_line(path):
    path.unlink()
    with pytest.raises(UserError, match=re.escape(f"{path} is missing: {files.REPRO}")) as error:
        report.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", '"a'], ids=["empty", "other columns", "cut"])
def test_damaged_table_is_one_clear_line(content):
    path = paths.cell_plots("digits_lt", "mixup", "joint") / "reliability.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        report.main()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "top1: this key is missing; few: this key is missing; ece: this key is missing (and 7 more)"),
        ("[]", "must be a mapping of keys to values"),
    ],
)
def test_metrics_of_another_kind_are_one_clear_line(content, says):
    path = paths.metrics("digits_lt", "mixup", "joint")
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        report.main()
    assert str(caught.value) == f"{path}: {says}; it is damaged, or of another version: delete it and {files.REPRO}"


def edit(path, change):
    """Change a YAML file that holds a mapping."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda p: p["recipes"]["digits"].update(lr=0.03),
            "ce/joint.json was made with params.representation.recipe.lr 0.1, and the parameters say 0.03: run `dvc "
            "repro`, or without DVC or off the grid `python -m stages.represent --dataset digits_lt --representation "
            "ce` and `python -m "
            "stages.calibrate --dataset digits_lt --representation ce --classifier joint` and `python -m "
            "stages.evaluate --dataset digits_lt --representation ce --classifier joint`",
        ),
        (
            lambda p: p.update(precision="bf16"),
            "was made with params.representation.precision float32, and .* say bf16",
        ),
        (lambda p: p["datasets"]["digits_lt"]["imbalance"].update(factor=10), "imbalance.factor 20.0, and .* say 10.0"),
        (
            lambda p: p["evaluate"].update(bins=9),
            "was made with evaluate.bins 15, and the parameters say 9: run `dvc repro`, or without DVC or off the grid "
            "`python -m "
            "stages.evaluate --dataset digits_lt --representation ce --classifier joint`$",
        ),
        (
            lambda p: p["datasets"]["digits_lt"]["source"].update(test_per_class=40),
            "was made with params.dataset.source.test_per_class 50, and .* say 40: .* without DVC or off the grid "
            "`python -m stages.download "
            "--dataset digits_lt` and `python -m stages.subsample --dataset digits_lt` and .*stages.evaluate",
        ),
        (
            lambda p: p["evaluate"]["posthoc"].pop("temperature"),
            r"was made with evaluate.posthoc.temperature \{\}, and the parameters have none: run",
        ),
        (
            lambda p: p.update(seeds=[0, 1, 4]),
            r"was made with seeds \[0, 1, 2\], and the parameters say \[0, 1, 4\]: run",
        ),
    ],
)
def test_cells_of_other_parameters_are_not_reported(change, says):
    edit(Path("params.yaml"), change)
    with pytest.raises(UserError, match=says) as caught:
        report.main()
    assert "\n" not in str(caught.value)


def test_cells_of_another_stage_1_are_not_reported():
    path = paths.representation("digits_lt", "mixup") / "provenance.json"
    report_inputs.change(path, weights={"seed0": "another"})
    with pytest.raises(UserError, match=r"mixup/joint\.json is not of the networks that data/rep.*/mixup holds: run"):
        report.main()
    path.unlink()
    with pytest.raises(UserError, match=r"mixup/provenance\.json is missing: run"):
        report.main()


@pytest.fixture
def images():
    """What the cells' images were, as the stages download and subsample say it; the cells are of them."""
    digits = params.dataset(params.load(), "digits_lt")
    sums = {name: name for name in (*lineage.TRAINED_ON, *lineage.PREDICTED)}
    raw = {"class_names": ["a", "b"], "source": splits.record(digits)["source"], "checksums": {"train_images.npy": "r"}}
    meta = splits.record(digits) | {
        **{
            "class_names": ["a", "b"],
            "train_counts": [2, 1],
            "test_counts": [1, 1],
            "checksums": sums,
            "raw": raw["checksums"],
        },
        **{"skipped": {}, "duplicates": dict.fromkeys(TWICE, 0)},
    }
    files.write_json(paths.raw("digits_lt") / "meta.json", raw)
    files.write_json(paths.longtail("digits_lt") / "meta.json", meta)
    for path in Path("metrics/cells/digits_lt").rglob("*.json"):
        origin = {"data": sums, "predicted": sums}
        report_inputs.change(path, provenance=files.read_json(path)["provenance"] | origin)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("folder", "change", "says"),
    [
        (
            paths.longtail,
            {"train_images.npy": "x"},
            "ce/joint.json is of networks that were trained on another training split",
        ),
        (
            paths.longtail,
            {"test_labels.npy": "x"},
            "ce/joint.json is of other held-out or test images than data/lt/digits_lt holds: run `dvc repro`, or "
            "without DVC or off the grid `python -m stages.calibrate --dataset digits_lt --representation ce "
            "--classifier joint` and "
            "`python -m stages.evaluate --dataset digits_lt --representation ce --classifier joint`",
        ),
        (
            paths.raw,
            {"train_images.npy": "x"},
            "data/lt/digits_lt was cut from other images than data/raw/digits_lt holds",
        ),
    ],
)
def test_cells_of_other_images_are_not_reported(folder, change, says):
    report.main()
    path = folder("digits_lt") / "meta.json"
    report_inputs.change(path, checksums=files.read_json(path)["checksums"] | change)
    with pytest.raises(UserError, match=says):
        report.main()


def _provenance(**imbalance):
    return {"provenance": {"params": {"dataset": {"imbalance": imbalance}}}}


IMBALANCE = "provenance.params.dataset.imbalance"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top1": "0.9"}, "top1: input should be a valid number, got '0.9'"),
        ({"many": True}, "many: input should be a valid number, got True"),
        ({"few_std": [0.1]}, "few_std: input should be a valid number"),
        ({"nll": float("nan")}, "nll: input should be a finite number, got nan"),
        ({"seeds": 2.5}, "seeds: input should be a valid integer, got 2.5"),
        ({"seeds": 0}, "seeds: input should be greater than or equal to 1, got 0"),
        ({"top1_std": -0.01}, "top1_std is -0.01: must be 0 or more"),
        ({"posthoc": [1]}, "posthoc: must be a mapping of keys to values"),
        (
            {"posthoc": {"platt": 0.1}},
            "posthoc.platt: must be a mapping of keys to values, got 0.1",
        ),
        ({"posthoc": {"platt": {"ece": "x"}}}, "posthoc.platt.ece: input should be a valid number, got 'x'"),
        (
            {"posthoc": {"platt": {"transductive": 1}}},
            "posthoc.platt.transductive: input should be a valid boolean, got 1",
        ),
        ({"posthoc_absent": [1]}, "posthoc_absent: must be a mapping of keys to values"),
        ({"posthoc_absent": {"platt": 1}}, "posthoc_absent.platt: input should be a valid string, got 1"),
        ({"provenance": {}}, f"{IMBALANCE}: this key is missing"),
        ({"provenance": {"params": [1]}}, f"{IMBALANCE}: this key is missing"),
        (_provenance(profile="step", seed=0), f"{IMBALANCE}.factor: this key is missing"),
        (
            _provenance(profile="step", seed=0, factor="20"),
            f"{IMBALANCE}.factor: input should be a valid number, got '20'",
        ),
    ],
)
def test_a_damaged_value_of_the_metrics_is_one_clear_line(change, says):
    path = paths.metrics("digits_lt", "mixup", "joint")
    report_inputs.change(path, **change)
    with pytest.raises(UserError) as caught:
        report.main()
    assert str(caught.value) == f"{path}: {says}; it is damaged, or of another version: delete it and {files.REPRO}"


def test_readme_imports_no_torch():
    code = "import sys; import stages.readme; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(report_inputs.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


BLOCKS = "# Title\n\n{0}\n{1}\n{2}\n\nbetween\n\n{3}\n{4}\n{5}\n\nafter\n"
MARKERS = [f"<!-- {name}:{end} -->" for name in readme.TABLES for end in ("begin", "end")]


def test_readme_blocks_are_replaced_and_stay():
    report.main()
    paths.OVERVIEW.parent.mkdir(parents=True)
    paths.OVERVIEW.write_text("what was published\n")
    first, first_end, second, second_end = MARKERS
    readme.README.write_text(BLOCKS.format(first, "old", first_end, second, "older", second_end))
    readme.main()
    once = readme.README.read_text()
    table = f"\n{paths.TABLE_TEXT.read_text().strip()}\n"
    assert once == BLOCKS.format(first, table, first_end, second, "\nwhat was published\n", second_end)
    readme.main()
    assert readme.README.read_text() == once


@pytest.mark.parametrize("text", [None, "no markers", f"{MARKERS[1]}\n{MARKERS[0]}"])
def test_readme_without_markers(text):
    report.main()
    if text is not None:
        readme.README.write_text(text)
    with pytest.raises(UserError, match=r"README\.md"):
        readme.main()
    assert text is None or readme.README.read_text() == text


@pytest.mark.parametrize("rows", [2, 9])
def test_a_list_of_classes_that_is_cut_short_is_named(rows):
    path, classes = _per_class("mixup", "joint")
    classes[:rows].to_csv(path, index=False)
    says = r"mixup/joint/per_class.csv is damaged \(not each of 10 classes once\): delete it"
    with pytest.raises(UserError, match=says):
        report.main()


@pytest.mark.parametrize(("name", "number"), [("per_class.csv", "top1"), ("reliability.csv", "ece")])
def test_a_table_of_another_cell_is_named(name, number):
    own, other = (paths.cell_plots("digits_lt", "mixup", classifier) / name for classifier in ("joint", "mislas"))
    own.write_bytes(other.read_bytes())
    metrics = paths.metrics("digits_lt", "mixup", "joint")
    says = rf"^{own} gives {number} 0\.\d{{6}}, and {metrics} says 0\.\d{{6}}: run `dvc repro`, or .*stages\.evaluate "
    with pytest.raises(UserError, match=says) as caught:
        report.main()
    assert "--representation mixup --classifier joint" in str(caught.value)


def test_an_accuracy_that_was_edited_is_named():
    report_inputs.change(paths.metrics("digits_lt", "ce", "mislas"), top1=0.999)
    with pytest.raises(UserError, match=r"ce/mislas/per_class\.csv gives top1 .*/ce/mislas\.json says 0\.999000"):
        report.main()


def test_the_history_of_another_representation_is_named():
    own, other = (paths.representation("digits_lt", name) / "history.csv" for name in ("ce", "mixup"))
    own.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=rf"^{own} is damaged: its SHA-256 is "):
        report.main()


def test_a_class_that_is_listed_twice_is_named():
    path, classes = _per_class("mixup", "joint")
    classes.assign(**{"class": classes["class"].replace(3, 2)}).to_csv(path, index=False)
    with pytest.raises(UserError, match=r"mixup/joint/per_class.csv is damaged \(not each of 10 classes once"):
        report.main()


def test_a_test_split_that_is_not_balanced_is_told():
    for representation, classifier in product(("ce", "mixup"), ("joint", "mislas")):
        path, classes = _per_class(representation, classifier)
        classes = classes.assign(test_count=[1000, *[50] * 9])
        classes.to_csv(path, index=False)
        top1 = float(np.average(classes["accuracy"], weights=classes["test_count"]))
        report_inputs.change(paths.metrics("digits_lt", representation, classifier), top1=top1)
    report.main()
    says = (
        "The test split is not balanced (50 to 1,000 images of a class): top-1, ECE and NLL weigh classes by that, and"
    )
    assert says in paths.TABLE_TEXT.read_text()
    assert says in _html()


@pytest.mark.parametrize("instead", ["x", ""])
def test_a_text_or_nothing_where_numbers_belong_is_named(instead):
    path = paths.cell_plots("digits_lt", "ce", "joint") / "reliability.csv"
    path.write_text(path.read_text().replace("\n1,", f"\n{instead},", 1))
    with pytest.raises(UserError, match=r"reliability.csv is damaged \(seed has what is no number\): delete it"):
        report.main()


def test_a_picture_that_is_none_is_named():
    (paths.cell_plots("digits_lt", "ce", "joint") / "reliability.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"ce/joint/reliability.png is damaged \(it is no PNG\): delete it"):
        report.main()


def test_a_folder_in_the_place_of_a_picture_is_named():
    path = paths.cell_plots("digits_lt", "ce", "joint") / "reliability.png"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"ce/joint/reliability.png is missing: run"):
        report.main()


@pytest.mark.parametrize(("name", "value"), [("top1", 7), ("ece", None), ("few", -0.1), ("nll", -1)])
def test_a_number_that_cannot_be_is_named(name, value):
    report_inputs.change(paths.metrics("digits_lt", "ce", "joint"), **{name: value})
    with pytest.raises(UserError, match=rf"ce/joint.json: {name}: .*: delete it and run `dvc repro`"):
        report.main()
