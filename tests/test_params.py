"""params.yaml: what is refused, and that every key is read."""

import ast
import re

import pytest
from pydantic import BaseModel

from stages import check
from tailcal import method, params, posthoc, settings, sources
from tailcal.errors import UserError
from tests.conftest import edit
from tests.test_dvc import ROOT

TEXT = (ROOT / "params.yaml").read_text()
PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def load_with(tmp_path, old: str, new: str, count: int = 1):
    assert old in TEXT
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(old, new, count))
    return params.load(path)


def test_the_shipped_file_loads_and_every_block_is_valid():
    p = params.load(ROOT / "params.yaml")
    for stage in ("representations", "classifiers"):
        used = {method.resolve(name, block, stage)[0] for name, block in getattr(p, stage).items()}
        assert used == set(method.names(stage)), "a method without a block"
    posthoc.configure(p.evaluate.posthoc)


@pytest.mark.parametrize("name", ["digits_lt", *PRESETS])
@pytest.mark.parametrize("stage", ["representations", "classifiers"])
def test_every_method_has_settings_on_every_data_set(name, stage):
    p = params.load(ROOT / "params.yaml")
    sources.configure(params.dataset(p, name, ROOT))
    for each, block in getattr(p, stage).items():
        training = settings.training(p, name, each, stage, ROOT)
        assert (training.name, training.method) == (each, block.get("method", each))
        assert (training.recipe is not None) == method.load(training.method).trained
        assert (training.backbone is not None) == (stage == "representations")


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
        (
            "factor: 20",
            "factr: 20",
            "datasets.digits_lt.imbalance.factr: unknown key: there are seed, profile, factor, largest",
        ),
        (
            "- digits_lt",
            "- digits",
            "there is no data set digits: add datasets.digits or presets/digits.yaml, or use one",
        ),
        (
            "represent: digits ",
            "represent: digit ",
            "datasets.digits_lt.represent: there is no recipe 'digit': there are",
        ),
        ("recipe: digits_sam", "recipe: sam", "datasets.digits_lt.overrides.fsgl.recipe: there is no recipe 'sam'"),
        ("      fsgl:\n", "      fsgll:\n", "datasets.digits_lt.overrides.fsgll: no method of that name has a block"),
        ("    epochs: 60", "    epochs: 60\n    iterations: 9", "recipes.digits: must have a budget: either epochs or"),
        ("cutout: 4", "cutout: -4", "datasets.digits_lt.augmentation.cutout: input should be greater"),
        ("cutout: 4", f"cutout: {10**23}", "datasets.digits_lt.augmentation.cutout: input should be less"),
        ("fill: 0", "fill: 300", "datasets.digits_lt.augmentation.fill: input should be less than or equal to 255"),
        ("      - 0.3761", "      - 1e-320", "datasets.digits_lt.augmentation.std.0: input should be greater"),
        ("holdout_per_class: 20", f"holdout_per_class: {10**24}", "datasets.digits_lt.holdout_per_class: input should"),
        ("factor: 20", f"factor: 20\n      largest: {10**23}", "datasets.digits_lt.imbalance.largest: input should be"),
        ("  bins: 15", "  bins: 15\n  binz: 3", "evaluate.binz: unknown key"),
        (
            "      fsgl:\n",
            "      fsgl:\n        method: ce\n",
            "datasets.digits_lt.overrides.fsgl.method: a data set cannot choose another method: give it a block of its",
        ),
        (
            "classifiers:               #",
            "classifiers:\n  ce: {method: joint} #",
            "classifiers.ce: representations has a block of that name too, and overrides could not tell them apart",
        ),
        ("  - ce\n", "  - cee\n", "grid.representations names cee, which has no block"),
        ("  - ce\n", "  - ce\n  - ce\n", "grid.representations: lists ce more than once"),
        ("  - ce\n", "  - c-e\n", "must be letters, digits and _ only"),
        ("replicas: 2", "replicas: 0", "runtime.replicas"),
        ("device: auto", "device: gpu", "runtime.device: input should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ("shape: multistep", "shape: stairs", "recipes.digits.schedule"),
        ("warmup: 5 ", "warmup: 500 ", "recipes.digits: schedule.warmup is 500: must be below epochs"),
        ("- 0.3052", "- 0.3052\n      - 0.1", "mean has 2 values and std 1"),
        ("seeds: ", "seeds: []\nseedz: ", "seedz: unknown key"),
        ("bins: 15", "bins: 15\n  bins: 20", "the key bins appears twice"),
        ("- 48\n      - 54", "- 54\n      - 48", "milestones must rise"),
        ("- 54\n", "- 540\n", "schedule.milestones names epoch 540: must not be above epochs (60)"),
        ("grid: ", "grid: [", "not valid YAML"),
        ("lr: 0.1", "lr: .nan", "recipes.digits.lr"),
        ("recipes:  ", "recipes:\n  cosine: {epochs: six} #", "recipes.cosine.epochs: input should be a valid integer"),
        ("epochs: 60", "epochs: 0x3c", "recipes.digits.epochs: input should be a valid integer, got '0x3c'"),
        ("epochs: 60", "epochs: 1:30", "recipes.digits.epochs: input should be a valid integer, got '1:30'"),
        ("epochs: 60", "epochs: !!int six", "not valid YAML"),
        (
            "profile: exponential",
            "profile: linear",
            "datasets.digits_lt.imbalance.profile: must be one of exponential, step, natural, got 'linear'",
        ),
        ("      profile: exponential\n", "", "datasets.digits_lt.imbalance.profile: this key is missing"),
        ("      shape: multistep\n", "", "recipes.digits.schedule.shape: this key is missing"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, old, new, says):
    with pytest.raises(UserError) as error:
        load_with(tmp_path, old, new)
    assert says in str(error.value)
    assert "params.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["params.yaml", *(f"presets/{name}.yaml" for name in PRESETS)])
def test_no_file_that_an_experiment_changes_repeats_itself_by_an_alias(file):
    """DVC's -S writes into the mapping behind an alias, or beside it, and says nothing."""
    check.refuse_aliases(ROOT / file)


def test_an_alias_is_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("recipes:\n  one: &one {lr: 0.1}\n  two:\n    <<: *one\n")
    with pytest.raises(
        UserError, match=r"own\.yaml line 4: \*one is an alias, which `-S` does not see through: write "
    ):
        check.refuse_aliases(file)


def test_the_check_looks_for_aliases_in_the_presets_on_the_grid(tmp_path, monkeypatch):
    text = (ROOT / "presets/own_images.yaml").read_text()
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/own_images.yaml").write_text(
        text.replace("  stage2:\n", "  stage2: &two\n").replace("overrides:\n", "  other: *two\noverrides:\n")
    )
    load_with(tmp_path, "- digits_lt", "- own_images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"presets/own_images\.yaml line \d+: \*two is an alias"):
        check.main()


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "presets/own_images.yaml",
            "pad: 8",
            "pad: 64",
            r"presets/own_images\.yaml: augmentation\.pad is 64: the images have 64x64 pixels, so must be at most 63$",
        ),
        ("params.yaml", "kind: digits", "kind: digit", r"datasets\.digits_lt\.source\.kind: must be one of"),
    ],
)
def test_the_check_looks_at_sources_on_the_grid_and_off_it(file, old, new, says, tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/own_images.yaml").write_text((ROOT / "presets/own_images.yaml").read_text())
    load_with(tmp_path, "- digits_lt", "- own_images")
    edit(tmp_path / file, [(old, new)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        check.main()


def test_numbers_are_those_that_dvc_reads(tmp_path):
    p = load_with(tmp_path, "    epochs: 60", "    epochs: 060")
    assert p.recipes["digits"].epochs == 60


def with_preset(tmp_path, old: str, new: str):
    """The shipped CIFAR-100-LT preset with a change, alone on the grid."""
    (tmp_path / "presets").mkdir()
    text = (ROOT / "presets/cifar100_lt_100.yaml").read_text()
    assert old in text
    (tmp_path / "presets/cifar100_lt_100.yaml").write_text(text.replace(old, new, 1))
    return load_with(tmp_path, "- digits_lt", "- cifar100_lt_100")


def test_of_several_wrong_presets_the_first_on_the_grid_is_named(tmp_path):
    (tmp_path / "presets").mkdir()
    names = [f"wrong{i}" for i in range(20)]
    for name in names:
        (tmp_path / f"presets/{name}.yaml").write_text("[]")
    with pytest.raises(UserError, match=r"^\S*presets/wrong0\.yaml: must be a mapping"):
        load_with(tmp_path, "- digits_lt", "\n  ".join(f"- {name}" for name in names))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  kind: pad_crop\n", "", "presets/cifar100_lt_100.yaml: augmentation.kind: this key is missing"),
        ("factor: 100", "factr: 100", "presets/cifar100_lt_100.yaml: imbalance.factr: unknown key"),
        (
            "recipe: marc\n",
            "recipe: mark\n",
            "presets/cifar100_lt_100.yaml: overrides.ce_strong.recipe: there is no recipe",
        ),
        ("source:", "source: [", "presets/cifar100_lt_100.yaml line"),
        ("source:", "? [a, b]\n: 1\nsource:", "a key must be a plain word"),
        (
            "recipe: marc\n",
            "recipe: [marc]\n",
            "presets/cifar100_lt_100.yaml: overrides.ce_strong.recipe: input should be",
        ),
        ("backbone: resnet34", "backbone: [resnet34]", "presets/cifar100_lt_100.yaml: overrides.glmc.backbone: input"),
        ("backbone: resnet32\n", "", "presets/cifar100_lt_100.yaml: backbone: this key is missing"),
    ],
)
def test_a_mistake_in_a_preset_names_its_file(tmp_path, old, new, says):
    with pytest.raises(UserError) as error:
        with_preset(tmp_path, old, new)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("backbone: resnet32\n", "backbone: resnet33\n", "100.yaml: backbone: must be one of"),
        ("backbone: resnet34", "backbone: resnet35", "100.yaml: overrides.glmc.backbone: must be one of"),
        ("smooth_head: 0.4", "smooth_head: 4.0", "100.yaml: overrides.mislas.smooth_head: input should be less"),
        ("smooth_head: 0.4", "smoth_head: 0.4", "100.yaml: overrides.mislas.smoth_head: unknown key"),
        ("smooth_head: 0.4", "backbone: resnet20", "100.yaml: overrides.mislas.backbone: a classifier has no backbone"),
        ("kind: cifar100", "kind: cifar1000", "100.yaml: source.kind: must be one of"),
    ],
)
def test_a_mistake_in_an_override_names_its_key(tmp_path, old, new, says):
    p = with_preset(tmp_path, old, new)
    with pytest.raises(UserError) as error:
        sources.configure(params.dataset(p, "cifar100_lt_100", tmp_path))
        for stage in ("representations", "classifiers"):
            for name in getattr(p, stage):
                settings.training(p, "cifar100_lt_100", name, stage, tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_variant_trains_with_the_file_that_it_names_and_its_own_settings():
    p = params.load(ROOT / "params.yaml")
    p.classifiers["late"] = {"method": "tau_norm", "tau": 2.0}
    training = settings.training(p, "digits_lt", "late", "classifiers", ROOT)
    assert (training.name, training.method, training.settings.tau) == ("late", "tau_norm", 2.0)
    assert type(training.settings) is method.load("tau_norm").Config
    assert training.record("float32")["name"] == "late"
    assert training.record("float32")["method"] == "tau_norm"
    p.classifiers["late"]["method"] = "no_such"
    with pytest.raises(UserError, match=r"params\.yaml: classifiers\.late\.method: no such method: there are crt, "):
        settings.training(p, "digits_lt", "late", "classifiers", ROOT)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "own_images"])
def test_the_blocks_of_mislas_are_its_ablation_on_every_data_set(name):
    """Smoothing and shifted batch norm, each on and off, and images in a row; all else as in mislas."""
    p = params.load(ROOT / "params.yaml")
    mislas = settings.training(p, name, "mislas", "classifiers", ROOT)
    unsmoothed = {"smooth_head": 0.0, "smooth_tail": 0.0}
    for variant, changes in {
        "mislas_four_in_a_row": {"in_a_row": 4},
        "mislas_shifted_bn": {"shifted_bn": True},
        "mislas_fixed_bn": {"shifted_bn": False},
        "mislas_unsmoothed_shifted_bn": unsmoothed | {"shifted_bn": True},
        "mislas_unsmoothed": unsmoothed | {"shifted_bn": False},
    }.items():
        found = settings.training(p, name, variant, "classifiers", ROOT)
        expected = mislas.record("float32") | {
            "name": variant,
            "settings": mislas.record("float32")["settings"] | changes,
        }
        assert found.record("float32") == expected


def test_a_recipe_for_what_takes_no_step_is_a_mistake(tmp_path):
    p = with_preset(tmp_path, "  marc:\n", "  joint:\n    recipe: marc_stage2\n  marc:\n")
    with pytest.raises(UserError, match=r"overrides\.joint\.recipe: joint takes no training step"):
        settings.training(p, "cifar100_lt_100", "joint", "classifiers", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "dangling", "twice"])
def test_a_preset_that_is_no_file_of_its_own(tmp_path, kind):
    (tmp_path / "presets").mkdir()
    name = "digits_lt" if kind == "twice" else "mine"
    if kind == "folder":
        (tmp_path / f"presets/{name}.yaml").mkdir()
    elif kind == "dangling":
        (tmp_path / f"presets/{name}.yaml").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / f"presets/{name}.yaml").write_text("")
    says = "is also the file presets/digits_lt.yaml" if kind == "twice" else "presets/mine.yaml: must be a file"
    with pytest.raises(UserError, match=says):
        load_with(tmp_path, "- digits_lt", f"- {name}")


def test_an_override_replaces_what_it_names_and_nothing_else(tmp_path):
    p = with_preset(tmp_path, "lr_factor: 0.2", "lr_factor: 0.7")
    training = settings.training(p, "cifar100_lt_100", "mislas", "classifiers", tmp_path)
    shipped = method.configure("mislas", p.classifiers["mislas"], "classifiers").model_dump()
    assert training.settings.model_dump() == shipped | {
        "smooth_head": 0.4,
        "smooth_tail": 0.1,
        "lr_factor": 0.7,
        "shifted_bn": True,
    }
    assert training.recipe == p.recipes["mislas_stage2"]
    fsgl = settings.training(p, "cifar100_lt_100", "fsgl", "representations", tmp_path)
    assert (fsgl.backbone, fsgl.recipe.sam_rho, fsgl.settings.gamma) == ("resnet34", 0.05, 1.0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "own_images"])
def test_a_preset_says_in_its_header_what_it_aims_at(name):
    lines = (ROOT / f"presets/{name}.yaml").read_text().splitlines()
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert f"dvc exp run -S 'grid.datasets=[{name}]'" in header
    assert "top-1 in %" in header
    assert re.search(r"mixup +mislas +\d\d\.\d+ \(\d+\.\d+\) +MiSLAS", header) or name.endswith("_200")


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("cifar")])
def test_a_cifar_preset_carries_the_published_settings(name):
    """The paper's table for MiSLAS, and the budgets of the others."""
    p = params.load(ROOT / "params.yaml")
    cifar, _, factor = name.split("_")
    dataset = params.dataset(p, name, ROOT)
    assert (dataset.source["kind"], dataset.imbalance.factor) == (cifar, float(factor))
    published = {
        ("cifar10", "10"): (0.1, 0.0, False, 0.2),
        ("cifar10", "50"): (0.2, 0.0, False, 0.2),
        ("cifar10", "100"): (0.3, 0.0, False, 0.5),
        ("cifar100", "10"): (0.2, 0.0, True, 0.1),
        ("cifar100", "50"): (0.3, 0.0, True, 0.1),
        ("cifar100", "100"): (0.4, 0.1, True, 0.2),
    }
    mislas = settings.training(p, name, "mislas", "classifiers", ROOT).settings
    found = (mislas.smooth_head, mislas.smooth_tail, mislas.shifted_bn, mislas.lr_factor)
    assert found == published[cifar, "100" if factor == "200" else factor]
    assert settings.training(p, name, "ce_strong", "representations", ROOT).recipe.iterations == 13_000
    marc = settings.training(p, name, "marc", "classifiers", ROOT).recipe
    assert (marc.iterations, marc.batch_size) == (2000, 512)
    assert settings.training(p, name, "bagmar", "representations", ROOT).recipe.batch_size == 64
    assert settings.training(p, name, "fsgl", "representations", ROOT).settings.gamma == {"cifar10": 0.5}.get(
        cifar, 1.0
    )


@pytest.mark.parametrize(
    ("name", "epochs", "weight_decay", "backbone", "smoothing", "marc_budget"),
    [
        ("imagenet_lt", 180, 5e-4, "resnet50", (0.3, 0.0), (10, 256)),
        ("inaturalist2018", 200, 1e-4, "resnet50", (0.3, 0.0), (30, 256)),
        ("places_lt", 90, 5e-4, "resnet152", (0.4, 0.1), (10, 128)),
    ],
)
def test_a_large_preset_carries_the_published_settings(name, epochs, weight_decay, backbone, smoothing, marc_budget):
    p = params.load(ROOT / "params.yaml")
    mixup = settings.training(p, name, "mixup", "representations", ROOT)
    assert (mixup.recipe.epochs, mixup.recipe.batch_size, mixup.recipe.weight_decay) == (epochs, 256, weight_decay)
    assert (mixup.backbone, mixup.settings.alpha, mixup.recipe.schedule.shape) == (backbone, 0.2, "cosine")
    assert (mixup.pretrained.trains if mixup.pretrained else None) == ("last_block" if name == "places_lt" else None)
    mislas = settings.training(p, name, "mislas", "classifiers", ROOT)
    assert (mislas.settings.smooth_head, mislas.settings.smooth_tail) == smoothing
    assert (mislas.settings.lr_factor, mislas.settings.shifted_bn, mislas.recipe.epochs) == (0.05, True, 10)
    marc = settings.training(p, name, "marc", "classifiers", ROOT)
    assert (marc.recipe.epochs, marc.recipe.batch_size) == marc_budget
    assert (marc.recipe.lr, marc.recipe.weight_decay) == (0.05, weight_decay)
    assert marc.settings.augmentation == "standard"
    bagmar, fsgl, glmc = (
        settings.training(p, name, each, "representations", ROOT) for each in ("bagmar", "fsgl", "glmc")
    )
    assert (bagmar.recipe, bagmar.settings.augmentation) == (mixup.recipe, "standard")
    assert (fsgl.recipe.sam_rho, fsgl.settings.gamma, fsgl.settings.augmentation) == (0.05, 0.1, "strong")
    assert (glmc.recipe.sam_rho, glmc.settings.gamma, glmc.settings.augmentation) == (0.0, 0.0, "strong")


def test_only_some_backbones_can_be_pretrained(tmp_path):
    p = with_preset(tmp_path, "backbone: resnet32\n", "pretrained: {file: x.pth, trains: all}\nbackbone: resnet32\n")
    with pytest.raises(UserError, match=r"100\.yaml: backbone: resnet32 cannot be pretrained: use one of resnet10, "):
        settings.training(p, "cifar100_lt_100", "ce", "representations", tmp_path)


def test_yaml_1_2_numbers_as_dvc_writes_them(tmp_path):
    p = load_with(tmp_path, "weight_decay: 0.0005", "weight_decay: 5e-04")
    assert p.recipes["digits"].weight_decay == 5e-4


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
