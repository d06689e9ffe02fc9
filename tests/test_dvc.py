"""dvc.yaml against the code: a stage's deps are what it imports, and its params are what it reads."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from stages import paths
from tailcal import method, params, provenance, sources

ROOT = Path(__file__).resolve().parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SOURCES = [f"tailcal.sources.{kind}" for kind in sources.kinds()]


def variants(stage: str) -> list[tuple[dict[str, str], list[str]]]:
    """Each substitution of ${item...} that changes a stage's deps, and the modules the stage then loads by name."""
    if stage == "represent":
        return [({"representation": name}, [f"tailcal.methods.{name}"]) for name in method.names("representations")]
    if stage == "calibrate":
        return [({"classifier": name}, [f"tailcal.methods.{name}"]) for name in method.names("classifiers")]
    return [({}, SOURCES if stage in ("check", "download") else [])]


def test_the_settings_that_dvc_compares_are_written_for_every_stage():
    """A dep below data/settings that check does not write would never be found; a wrong name would never change."""
    for stage in ("download", "subsample", "represent", "calibrate"):
        (dep,) = [d for d in STAGES[stage]["deps"] if d.startswith("data/settings")]
        axes = [f"${{item.{axis}}}" for axis in STAGES[stage]["matrix"] if f"${{item.{axis}}}" in dep]
        assert dep == str(paths.settings(stage, *axes))
        assert "${item.dataset}" in axes


def declared(stage: str, item: dict[str, str]) -> set[str]:
    """The source files among a stage's deps."""
    files = set()
    for dep in STAGES[stage]["deps"]:
        for key, value in item.items():
            dep = dep.replace(f"${{item.{key}}}", value)
        if dep.startswith(("src/", "stages/")):
            path = ROOT / dep
            found = path.rglob("*.py") if path.is_dir() else [path]
            files |= {str(file.relative_to(ROOT)) for file in found}
    return files


def imported(stage: str, modules: list[str]) -> set[str]:
    """The project's files that a fresh interpreter loads for a stage, and those that functions import."""
    code = (
        f"import sys, importlib\n"
        f"for name in ['stages.{stage}', *{modules!r}]: importlib.import_module(name)\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items() "
        "if n.split('.')[0] in ('stages', 'tailcal') and getattr(m, '__file__', None)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {Path(line) for line in ran.stdout.split()}
    files |= set(provenance.closure(*files))
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_imports(stage):
    files = set().union(*(declared(stage, item) for item, _ in variants(stage)))
    modules = [module for _, names in variants(stage) for module in names]
    assert {file for file in files if file.endswith(".py")} == imported(stage, modules)


@pytest.mark.parametrize("stage", ["represent", "calibrate"])
def test_deps_hold_for_every_method(stage):
    for item, modules in variants(stage):
        source = ROOT / "src/tailcal/methods" / f"{modules[0].rsplit('.', 1)[1]}.py"
        needed = {str(path.relative_to(ROOT)) for path in provenance.closure(source)}
        assert needed <= declared(stage, item), f"{source.name} imports files that {stage} does not list"


def test_the_page_template_is_a_dep_of_the_report():
    assert "src/tailcal/templates/report.html" in STAGES["report"]["deps"]


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_tracks_runtime(stage):
    assert not [p for p in STAGES[stage].get("params", []) if p.startswith("runtime")]


@pytest.mark.parametrize("stage", ["evaluate", "report"])
def test_measuring_and_reporting_load_no_torch(stage):
    code = f"import stages.{stage}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert not [f for f in declared(stage, {}) if "import torch" in (ROOT / f).read_text()]


def test_every_output_that_git_keeps_is_not_ignored_and_every_cached_one_is():
    for stage in STAGES.values():
        for kind in ("outs", "metrics", "plots"):
            for entry in stage.get(kind, []):
                path, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
                path = path.replace("${item.", "").replace("}", "")
                ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0
                assert ignored == options.get("cache", True), path


def test_the_committed_cells_are_those_of_the_grid():
    """The report depends on whole folders: a leftover cell would change dvc.lock in every fresh clone."""
    grid = params.load(ROOT / "params.yaml").grid
    cells = {f"{d}/{r}/{c}.json" for d, r, c in product(grid.datasets, grid.representations, grid.classifiers)}
    for folder in ("metrics/cells", "metrics/headline"):
        listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {line.removeprefix(f"{folder}/") for line in listed.stdout.split()} == cells


def test_the_readme_shows_the_committed_table():
    table = (ROOT / "metrics/table.md").read_text()
    assert table.strip() in (ROOT / "README.md").read_text(), "run `python -m stages.readme`"
