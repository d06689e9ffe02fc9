"""params.yaml: what is refused, and that every key is read."""

import ast
import re

import pytest
from pydantic import BaseModel

from tailcal import method, params, posthoc, sources
from tailcal.errors import UserError
from tests.test_dvc import ROOT

TEXT = (ROOT / "params.yaml").read_text()


def load_with(tmp_path, old: str, new: str, count: int = 1):
    assert old in TEXT
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(old, new, count))
    return params.load(path)


def test_the_shipped_file_loads_and_every_block_is_valid():
    p = params.load(ROOT / "params.yaml")
    for stage in ("representations", "classifiers"):
        for name, block in getattr(p, stage).items():
            method.configure(name, block, stage)
    for name, dataset in p.datasets.items():
        sources.configure(dataset.source, f"datasets.{name}.source")
    posthoc.configure(p.evaluate.posthoc, "evaluate.posthoc")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "factor: 20",
            "factor: twenty",
            "datasets.digits_lt.imbalance.factor: input should be a valid number, got 'twenty'",
        ),
        (
            "factor: 20",
            "factor: 0.5",
            "datasets.digits_lt.imbalance.factor: input should be greater than or equal to 1, got 0.5",
        ),
        ("factor: 20", "factr: 20", "datasets.digits_lt.imbalance.factr: unknown key (and 1 more)"),
        ("  bins: 15", "  bins: 15\n  binz: 3", "evaluate.binz: unknown key"),
        ("  - ce\n", "  - cee\n", "grid.representations names cee, which has no block"),
        ("  - ce\n", "  - ce\n  - ce\n", "grid.representations: lists ce more than once"),
        ("  - ce\n", "  - c-e\n", "must be letters, digits and _ only"),
        ("threads: 2", "threads: 0", "runtime.threads"),
        ("device: auto", "device: gpu", "runtime.device: input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("shape: multistep", "shape: stairs", "datasets.digits_lt.represent.schedule"),
        ("warmup_epochs: 5", "warmup_epochs: 500", "warmup_epochs is 500: must be below epochs"),
        ("- 0.3052", "- 0.3052\n      - 0.1", "mean has 2 values and std 1"),
        ("seeds: ", "seeds: []\nseedz: ", "seedz: unknown key"),
        ("bins: 15", "bins: 15\n  bins: 20", "the key bins appears twice"),
        ("- 48\n        - 54", "- 54\n        - 48", "milestones must rise"),
        ("- 54\n", "- 540\n", "schedule.milestones names epoch 540: must not be above epochs (60)"),
        ("grid: ", "grid: [", "not valid YAML"),
        ("lr: 0.1", "lr: .nan", "datasets.digits_lt.represent.lr"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, old, new, says):
    with pytest.raises(UserError) as error:
        load_with(tmp_path, old, new)
    assert says in str(error.value)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_1_2_numbers_as_dvc_writes_them(tmp_path):
    p = load_with(tmp_path, "weight_decay: 0.0005", "weight_decay: 5e-04")
    assert p.datasets["digits_lt"].represent.weight_decay == 5e-4


@pytest.mark.parametrize(("content", "says"), [(b"\xff\xfe\x00", "UTF-8"), (b"", "mapping"), (b"- 1\n", "mapping")])
def test_a_file_that_is_no_params(tmp_path, content, says):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        params.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="project's root"):
        params.load(tmp_path / "params.yaml")


def models_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A pydantic model and all models in its fields."""
    found = {model}
    for field in model.model_fields.values():
        todo = [field.annotation]
        while todo:
            annotation = todo.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found |= models_of(annotation)
            todo.extend(getattr(annotation, "__args__", ()))
    return found


def test_every_key_is_read_by_some_code():
    models = models_of(params.Params)
    models |= {method.load(name).Config for name in method.names()}
    models |= {rule.Config for rule in posthoc.RULES.values()}
    for kind in sources.kinds():
        models.add(__import__(f"tailcal.sources.{kind}", fromlist=["Config"]).Config)
    code = [path for folder in ("src", "stages") for path in (ROOT / folder).rglob("*.py")]
    read = {
        node.attr for path in code for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    text = "\n".join(path.read_text() for path in code)
    for model in models:
        for field in model.model_fields:
            # `shape` and the axes of the grid are read by name: pydantic's discriminator, getattr over the axes.
            assert field in read or re.search(rf'["\']{field}["\']', text), (
                f"{model.__name__}.{field} is read by nothing"
            )
