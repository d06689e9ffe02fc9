"""What the README promises to a reader who follows it to the letter."""

import ast
import importlib
import inspect
import json
import re

import pytest

from tailcal import params, posthoc
from tests.test_dvc import ROOT

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The code between two markers of the README."""
    return re.search(rf"<!-- {name}:begin -->\s*```\w+\n(.*?)```\s*<!-- {name}:end -->", README, re.DOTALL).group(1)


@pytest.mark.pipeline
def test_the_method_and_the_rule_of_the_walk_throughs_can_really_be_added(project):
    p = project(name="added", cut=True)
    (p.root / "src/tailcal/methods/label_smoothing.py").write_text(block("method"))
    source, params = p.root / "src/tailcal/posthoc.py", p.root / "params.yaml"
    imported = source.read_text().replace("from pydantic import", "from pydantic import Field,")
    source.write_text(f"{imported}\n\n{block('rule')}")
    text = params.read_text()
    for place, added in (("\nrepresentations:", "block"), ("\n  posthoc:", "setting")):
        start = text.index("\n", text.index(place) + 1) + 1
        text = text[:start] + block(added) + text[start:]
    params.write_text(text)
    assert "passed" in p.run("python", "-m", "pytest", "-q", "tests/test_contract.py", "-k", "label_smoothing")
    added = "--dataset digits_lt --representation label_smoothing"
    cell = f"{added} --classifier joint"
    p.in_order("check", f"represent {added}", f"calibrate {cell}", f"evaluate {cell}")
    cell = json.loads((p.root / "metrics/cells/digits_lt/label_smoothing/joint.json").read_text())
    assert cell["provenance"]["params"]["representation"]["settings"] == {"augmentation": "standard", "epsilon": 0.1}
    assert cell["posthoc"]["sharpness"]["top1"] == cell["top1"]
    assert cell["posthoc"]["sharpness"]["confidence"] > cell["confidence"]


def test_the_pieces_can_be_imported_and_say_where_they_come_from():
    statements = ast.parse(block("pieces")).body
    assert len(statements) > 10
    for statement in statements:
        module = importlib.import_module(statement.module)
        for alias in statement.names:
            piece = getattr(module, alias.name)
            assert len(inspect.getdoc(piece)) > 60, f"{alias.name} is hardly documented"
            assert re.search(r"(19|20)\d\d|equation", f"{module.__doc__} {piece.__doc__}"), f"{alias.name}: no source"


def test_the_table_of_methods_lists_each_one_and_each_rule():
    p = params.load(ROOT / "params.yaml")
    for stage in ("representations", "classifiers"):
        for name in getattr(p, stage):
            assert f"| `{name}` |" in README, f"{name} is not in the table"
    for rule in posthoc.RULES:
        assert f"`{rule}`" in README
