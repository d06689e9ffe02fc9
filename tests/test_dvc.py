"""dvc.yaml against the code: what `check` writes for a stage is what the stage consists of and goes by, and no more."""

import hashlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

import tailcal
from stages import check, paths, readme, tables
from tailcal import method, params, provenance, sources
from tests.conftest import ENVIRONMENT, edit

ROOT = Path(__file__).resolve().parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
AXES = {"represent": "representations", "calibrate": "classifiers"}
PUBLISHED = yaml.safe_load((ROOT / "published/dvc.yaml").read_text())["stages"]
# What stages.tables loads too, and on which nothing in the published tables depends: where files lie, how they are
# read, written and locked, and how an error ends; what refuses wrong parameters; and what measured the cells before.
NO_TABLES = ["stages/__init__.py", "stages/paths.py"]
NO_TABLES += [f"src/tailcal/{name}.py" for name in ("__init__", "errors", "files", "lock", "portable", "params")]
NO_TABLES += [f"src/tailcal/{name}.py" for name in ("duplicates", "longtail", "posthoc", "yaml12")]
NO_TABLES += [f"src/tailcal/metrics/{name}.py" for name in ("__init__", "accuracy", "calibration", "scores")]
DATASETS = ("digits_lt", "cifar10_lt_100", "cifar100_lt_100", "own_images", "imagenet_lt")  # one a source
# What an interpreter that has loaded nothing of ours loads of it: a line for each stage alone, and a line for the stage
# with each of its modules. Then the import statements inside functions are run too, as often as they bring new modules.
# The libraries that take long are there before, once for all.
LOADED = """
import ast, importlib, json, os, sys
import matplotlib.pyplot, pandas, torch

def ours():
    return {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("stages", "tailcal")}

done = set()

def loaded():
    while new := ours().keys() - done:
        for name in new:
            module = ours()[name]
            for node in ast.walk(ast.parse(open(module.__file__).read())):
                named = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
                if isinstance(node, ast.Import | ast.ImportFrom) and named[0].split(".")[0] in ("stages", "tailcal"):
                    exec(ast.unparse(node), dict(vars(module)))
        done.update(new)
    return " ".join(sorted(m.__file__ for m in ours().values()))

assert not ours()
for stage, modules in json.loads(sys.argv[1]).items():
    if not os.fork():
        importlib.import_module(f"stages.{stage}")
        print(loaded(), flush=True)
        for module in modules:
            if not os.fork():
                importlib.import_module(module)
                print(loaded(), flush=True)
                os._exit(0)
            os.wait()
        os._exit(0)
    os.wait()
"""


def test_what_is_changed_in_a_preset_is_told():
    """`dvc exp show` and the diffs list the files that dvc.yaml names as parameters; a user's own may be missing."""
    told = yaml.safe_load((ROOT / "dvc.yaml").read_text())["params"]
    assert {"presets/own_images.yaml", "presets/imagenet_lt.yaml", "presets/cifar10_lt_200.yaml"} <= set(told)
    assert all((ROOT / path).is_file() for path in told)


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[list[Path]]]:
    """The sources that an interpreter loads for each stage: for it alone, and for it with each of its modules."""
    asked = {stage: [method.module(name) for name in method.names(axis)] for stage, axis in AXES.items()}
    asked |= {"download": [sources.module(kind) for kind in sources.kinds()]}
    asked |= {stage: [] for stage in ("subsample", "evaluate", "report")}
    command = [sys.executable, "-c", LOADED, json.dumps(asked)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = iter([[Path(file) for file in line.split()] for line in ran.stdout.splitlines()])
    found = {stage: [next(lines) for _ in ["", *modules]] for stage, modules in asked.items()}
    assert not list(lines)
    return found


def digest(files: list[Path]) -> str:
    """Of sources: the stage's `code`."""
    texts = {path: path.read_text() for path in files}
    code = {path: provenance.without_prose(text) if path.suffix == ".py" else text for path, text in texts.items()}
    content = "".join(f"{path.name}\0{text}\0" for path, text in code.items())
    return f"{tailcal.__version__}+{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder in which `check` has written the settings of every block, for a data set of every source."""
    root = tmp_path_factory.mktemp("checked")
    (root / "presets").symlink_to(ROOT / "presets")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    edit(root / "params.yaml", [("  - digits_lt\n", "".join(f"  - {name}\n" for name in DATASETS))])
    before = root / paths.settings("represent", "digits_lt", "of_another_grid")
    before.parent.mkdir(parents=True)
    before.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        check.main()
    return root


def settings(root: Path, stage: str, *cell: str) -> dict:
    return json.loads((root / paths.settings(stage, *cell)).read_text())


def test_every_stage_depends_on_its_settings_and_on_no_source():
    """A dep below data/settings that check does not write would never be found; a wrong name would never change."""
    assert STAGES["check"]["deps"] == [str(paths.PRETRAINED), "presets", "src/tailcal", "stages"]
    for name, stage in STAGES.items():
        if name == "check":
            continue
        (dep,) = [dep for dep in stage["deps"] if dep.startswith(f"{paths.SETTINGS}/")]
        axes = [f"${{item.{axis}}}" for axis in stage.get("matrix", {}) if f"${{item.{axis}}}" in dep]
        assert dep == str(paths.settings(name, *axes))
        assert all(dep.startswith(("data/", "metrics/", "plots/")) for dep in stage["deps"])


def test_check_writes_the_settings_of_each_stage_and_no_others(written):
    p = params.load(ROOT / "params.yaml")
    expected = {paths.settings("evaluate"), paths.settings("report")}
    for dataset in DATASETS:
        expected |= {paths.settings(stage, dataset) for stage in ("download", "subsample")}
        expected |= {paths.settings(stage, dataset, name) for stage, axis in AXES.items() for name in getattr(p, axis)}
    assert {path.relative_to(written) for path in (written / paths.SETTINGS).rglob("*.json")} == expected


def test_check_tracks_every_parameter_but_runtime():
    """And it alone: what a stage reads of them is in its settings."""
    assert set(STAGES["check"]["params"]) == set(params.Params.model_fields) - {"runtime"}
    assert [name for name, stage in STAGES.items() if "params" in stage] == ["check"]


def test_what_a_stage_reads_of_the_parameters_is_in_its_settings(written):
    p = params.load(written / "params.yaml")
    for stage, axis in AXES.items():
        for name in getattr(p, axis):
            found = settings(written, stage, "digits_lt", name)
            assert (found["seeds"], found["precision"]) == (p.seeds, p.precision)
    assert settings(written, "evaluate").items() >= {"seeds": p.seeds, "evaluate": p.evaluate.model_dump()}.items()
    assert settings(written, "report")["grid"] == p.grid.model_dump()
    own = yaml.safe_load((ROOT / "presets/own_images.yaml").read_text())
    assert settings(written, "download", "own_images")["source"].items() >= own["source"].items()
    found = settings(written, "subsample", "own_images")
    assert found["imbalance"].items() >= own["imbalance"].items()
    assert (found["holdout_per_class"], found["channels"]) == (own["holdout_per_class"], own["source"]["channels"])
    assert found["augmentation"] == {key: own["augmentation"][key] for key in ("kind", "pad", "cutout")}
    large = yaml.safe_load((ROOT / "presets/imagenet_lt.yaml").read_text())["augmentation"]
    found = settings(written, "subsample", "imagenet_lt")
    assert found["augmentation"] == {key: large[key] for key in ("kind", "size")}


@pytest.mark.parametrize("stage", ["represent", "calibrate"])
def test_the_code_of_a_training_is_what_it_loads(stage, written, loaded):
    blocks = getattr(params.load(ROOT / "params.yaml"), AXES[stage])
    methods = method.names(AXES[stage])
    alone, *each = loaded[stage]
    files = dict(zip(methods, each, strict=True))
    for name, own in files.items():
        here = {path.stem for path in set(own) - set(alone) if path.parent.name == "methods"}
        assert here == {name}, "its own file, and no other method's"
    for (name, block), dataset in product(blocks.items(), DATASETS):
        assert settings(written, stage, dataset, name)["code"] == digest(files[block.get("method", name)])


def test_the_code_of_a_download_is_what_it_loads(written, loaded):
    kinds = sources.kinds()
    _, *each = loaded["download"]
    files, seen = dict(zip(kinds, each, strict=True)), set()
    for dataset in DATASETS:
        found = settings(written, "download", dataset)
        seen.add(found["source"]["kind"])
        assert found["code"] == digest(files[found["source"]["kind"]])
    assert seen == set(kinds)


@pytest.mark.parametrize("stage", ["subsample", "evaluate", "report"])
def test_the_code_of_a_stage_is_what_it_loads(stage, written, loaded):
    (files,) = loaded[stage]
    templates = sorted(ROOT.glob("src/tailcal/templates/*")) if stage == "report" else []
    cell = ["digits_lt"] if stage == "subsample" else []
    assert settings(written, stage, *cell)["code"] == digest([*files, *templates])


PROSE = '''"""A module."""

import this  # for fun


class Empty:
    """Nothing but words."""


f"{print}"


def f(a):  # takes one
    """Several
    lines."""
    text = "no # comment"
    return [text, f"{a}  # none either", """

    not a docstring""", ("of two "
                         "parts")]
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A module.", "Another.", True),
        ('"""A module."""', "", True),
        ("  # for fun", "", True),
        ("\n\n\nclass", "\n\nclass", True),
        ("    lines.", "    more\n\n    lines, and übel.", True),
        ("words.", "wörds.", True),
        ("no # comment", "no # remark", False),
        ('f"{print}"', "", False),
        ("# for fun", "\f# for fun\n#", True),
        ("# none either", "# either", False),
        ("\n\n    not a", "\n    not a", False),
        ("not a docstring", "a docstring", False),
        ("of two", "of too", False),
        ("this", "that", False),
        ("    return", "    if a:\n      return", False),
    ],
)
def test_prose_is_no_part_of_the_code(old, new, same):
    assert old in PROSE
    assert (provenance.without_prose(PROSE.replace(old, new)) == provenance.without_prose(PROSE)) is same


def test_relative_and_late_imports_are_part_of_the_code(tmp_path, monkeypatch):
    """Nothing of ours has relative ones; a user's method may."""
    sources_of = {
        "__init__": "",
        "one": "from . import two\n",
        "two": "def f():\n    import ours.deep.three, os\n",
        "deep/__init__": "",
        "deep/three": "from ..four import name\n",
        "four": "name = 1\n",
        "five": "import ours.one\n",
    }
    for name, text in sources_of.items():
        (tmp_path / f"ours/{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ours/{name}.py").write_text(text)
    monkeypatch.setattr(provenance, "OURS", {"ours": tmp_path})
    expected = sorted(tmp_path / f"ours/{name}.py" for name in sources_of if name != "five")
    assert provenance.closure("ours.one") == expected
    with pytest.raises(ValueError, match=r"ours\.six is no module of ours"):
        provenance.code_version("ours.six")


@pytest.mark.pipeline
def test_an_edit_of_code_changes_the_settings_of_what_it_concerns(project, monkeypatch):
    p = project()
    monkeypatch.setattr(provenance, "OURS", {"tailcal": p.root / "src", "stages": p.root})
    monkeypatch.setattr(check, "TEMPLATES", p.root / "src/tailcal/templates")

    def changed(*edited: str) -> set[str]:
        """The settings that other code in these files changes: their paths below data/settings, without the cell."""
        before = {path: path.read_bytes() for path in (p.root / paths.SETTINGS).rglob("*.json")}
        for name in edited:
            with (p.root / name).open("a") as source:
                source.write("# an edit\n" if name.endswith(".html") else "EDITED = True\n")
        p.inside("check")
        assert {path for path in (p.root / paths.SETTINGS).rglob("*.json")} == before.keys()
        return {
            str(path.relative_to(p.root / paths.SETTINGS).with_suffix(""))
            for path, content in before.items()
            if path.read_bytes() != content
        }

    p.inside("check")
    blocks = params.load(ROOT / "params.yaml").classifiers
    mislas = {name for name, block in blocks.items() if block.get("method", name) == "mislas"}
    assert len(mislas) == 6
    assert changed("src/tailcal/methods/mislas.py") == {f"calibrate/digits_lt-{name}" for name in mislas}
    assert changed("src/tailcal/tables.py") == {"report"}
    assert changed("src/tailcal/templates/costs.html") == {"report"}
    assert changed("src/tailcal/sources/digits.py") == {"download/digits_lt"}
    assert changed("src/tailcal/sources/list.py", "stages/benchmark.py", "src/tailcal/predict.py") == set()
    edit(p.root / "params.yaml", [("smooth_head: 0.1", "smooth_head: 0.2")])
    assert changed() == {"calibrate/digits_lt-mislas"}


def test_the_published_tables_depend_on_the_code_that_makes_them(monkeypatch):
    """Of stages.official they only use what refuses a cell of other parameters: what it loads to train is left out."""
    imports = provenance._imports
    monkeypatch.setattr(provenance, "_imports", lambda name: set() if name == "stages.official" else imports(name))
    loaded = {str(path.relative_to(ROOT)) for path in provenance.closure("stages.tables")}
    deps = [dep for dep in PUBLISHED["tables"]["deps"] if dep.endswith(".py")]
    assert sorted([*deps, *NO_TABLES]) == sorted(loaded)


def test_measuring_loads_no_torch():
    """It runs once a cell, and torch takes longer to import than a cell to measure."""
    code = "import stages.evaluate, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert not [f for f in provenance.closure("stages.evaluate") if "import torch" in f.read_text()]


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


@pytest.mark.parametrize("table", readme.TABLES.values(), ids=readme.TABLES)
def test_the_readme_shows_the_committed_tables(table):
    assert (ROOT / table).read_text().strip() in (ROOT / "README.md").read_text(), "run `python -m stages.readme`"


def test_the_committed_tables_are_those_of_the_committed_cells(tmp_path, monkeypatch):
    for name in ("params.yaml", "presets", "published", "references"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "metrics/published").mkdir(parents=True)
    (tmp_path / paths.PUBLISHED).symlink_to(ROOT / paths.PUBLISHED)
    monkeypatch.chdir(tmp_path)
    tables.main()
    for path in (paths.OVERVIEW, tables.TEXT, tables.ROWS, tables.PAIRS, tables.SUMMARY):
        assert path.read_bytes() == (ROOT / path).read_bytes(), "run `python -m stages.tables`"


def test_on_another_system_the_stages_end_with_one_line():
    code = "import ctypes, platform, shutil, sys; sys.platform = 'darwin'; import stages.subsample"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the stages run on Linux only, and this is darwin; tailcal.predict may run here\n"


def test_a_stage_under_dvc_on_a_disk_that_takes_nothing_begins_and_tells_no_child_of_dvc(tmp_path):
    """It would write a copy of dvc.lock; what it cannot write itself it names, in one line."""
    (tmp_path / ".scratch").write_text("in the way")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, stages; sys.exit(os.environ.get('DVC_STAGE'))"
    environment = ENVIRONMENT | {"DVC_STAGE": "check"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
