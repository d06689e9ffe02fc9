"""The pipeline run as a user runs it, in copies of the project with a tiny grid."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score

from tailcal import params, provenance, store
from tailcal.models import BACKBONES
from tests.conftest import Project, edit
from tests.killing import artefacts, stage_at_work, wait_for_the_end

pytestmark = pytest.mark.pipeline
CELL = ("--dataset", "digits_lt", "--representation", "ce")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def until(there: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for something that a running process brings about."""
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def changed(p: Project, *targets: str) -> dict[str, list]:
    """What DVC says has changed since it last ran, by stage."""
    return json.loads(p.run("dvc", "status", "--json", *targets).splitlines()[-1])


def test_repro_makes_everything_then_nothing_and_an_edit_reruns_only_its_own(project, monkeypatch):
    p = project(("  - joint\n  - mislas\n", "  - joint\n"))
    p.run("dvc", "repro", "evaluate@digits_lt-ce-joint")
    p.run("git", "add", "-A")
    p.run("git", "commit", "-qm", "results")
    same = ("dvc", "exp", "run", "--temp", "-S", "evaluate.bins=15", "-n", "same", "evaluate@digits_lt-ce-joint")
    assert "Running stage" not in p.run(*same)

    # Another cell, and with it the report: all there is.
    output = p.run(
        "dvc", "exp", "run", "-S", "grid.classifiers=[joint,mislas]", "-S", "classifiers.mislas.smooth_head=0.2"
    )
    ran = re.findall(r"Running stage '(\S+)'", output)
    assert ran == ["check", "calibrate@digits_lt-ce-mislas", "evaluate@digits_lt-ce-mislas", "report"]
    difference = json.loads(p.run("dvc", "metrics", "diff", "--json"))
    assert set(difference.get("diff", difference)) == {
        "metrics/headline/digits_lt/ce/mislas.json",
        "metrics/summary.json",
    }
    for name in ("joint", "mislas"):
        cell = json.loads((p.root / f"metrics/cells/digits_lt/ce/{name}.json").read_text())
        tops = []
        for seed in (0, 1):
            with np.load(p.root / f"data/predictions/digits_lt/ce/{name}/seed{seed}.npz") as z:
                tops.append(accuracy_score(z["test_labels"], z["test_logits"].argmax(1)))
        assert cell["top1"] == pytest.approx(np.mean(tops), abs=1e-6)
        assert cell["top1_std"] == pytest.approx(np.std(tops, ddof=1), abs=1e-6)
        assert cell["seeds"] == 2
        assert cell["provenance"]["params"]["dataset"]["imbalance"]["factor"] == 20
    assert cell["provenance"]["params"]["classifier"]["settings"]["smooth_head"] == 0.2
    assert (p.root / "plots/report.html").stat().st_size > 50_000
    assert changed(p) == {}

    with (p.root / "src/tailcal/methods/mislas.py").open("a") as source:
        source.write("EDITED = True\n")
    monkeypatch.setattr(provenance, "OURS", {"tailcal": p.root / "src", "stages": p.root})
    p.inside("check")
    measured = ("data/predictions/digits_lt/ce/joint", "metrics/cells")  # what the next stage must see change
    for path in (p.root / measured[0] / "provenance.json", p.root / measured[1] / "digits_lt/ce/joint.json"):
        path.write_text(path.read_text() + " ")
    found = changed(p)
    joint = {"calibrate@digits_lt-ce-joint", "evaluate@digits_lt-ce-joint"}
    assert found.keys() == {"check", "calibrate@digits_lt-ce-mislas", *joint, "report"}
    assert {"changed deps": {"src/tailcal": "modified"}} in found["check"]
    assert {"changed deps": {measured[0]: "modified"}} in found["evaluate@digits_lt-ce-joint"]
    assert {"changed deps": {measured[1]: "modified"}} in found["report"]


def test_a_killed_repro_goes_on_whoever_asks_meanwhile_and_ends_with_the_same_bits(project, long):
    """DVC keeps a second one out of what the first is making, and says so; nothing of the first is lost."""
    longer = [("epochs: 8\n", "epochs: 20\n"), ("checkpoint_seconds: 5", "checkpoint_seconds: 0")]
    p = project(*longer)
    undisturbed = project(*longer, name="undisturbed", cut=True)
    undisturbed.inside("represent", *CELL)
    out, repro = "data/representations/digits_lt/ce", ("dvc", "repro", "represent@digits_lt-ce")

    killed = p.start(*repro)
    until(lambda: list(p.root.glob(".scratch/represent/*/*/seed1.pt")), killed)  # in the midst of the second seed
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    wait_for_the_end(p.root)
    assert not (p.root / out / "provenance.json").exists()

    first = p.start(*repro)
    until(lambda: stage_at_work(p.root), first)
    stage = stage_at_work(p.root)
    assert stage.name == "represent"  # all before it is there
    os.kill(stage.pid, signal.SIGSTOP)  # so that it is not done before the others have asked
    try:
        output = p.run(*repro, ok=False)
        assert "is busy, it is being blocked by" in output
        assert f"(PID {first.pid}): " in output
        if long:  # in a copy of the project, which has its own locks
            assert "Ran experiment(s): beside" in p.run("dvc", "exp", "run", "--temp", "-n", "beside", repro[-1])
    finally:
        os.kill(stage.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    assert "goes on after " in output
    assert snapshot(p.root / out) == snapshot(undisturbed.root / out)
    if long:
        assert "up to date" in p.run(*repro)
        alone = project(*longer, name="alone")
        alone.run(*repro)
        assert artefacts(p.root) == artefacts(alone.root)


# How it is run: as a `stage`, a process of its own; as a `script`, or `inside`, in this process, where importing torch
# again would show nothing new.
@pytest.mark.parametrize(
    ("run", "change", "stage", "arguments", "says"),
    [
        ("stage", ("factor: 20", "factor: 9999"), "subsample", CELL[:2], "class"),
        ("stage", ("test_per_class: 50", "test_per_class: 5000"), "download", CELL[:2], "class"),
        ("stage", ("holdout_per_class: 20", "holdout_per_class: 124"), "subsample", CELL[:2], "class"),
        ("script", ("batch_size: 64", "batch_size: 100000"), "represent", CELL, "batch_size is 100000, but the trai"),
        ("script", ("alpha: 1.0", "alpha: -1.0"), "check", (), "representations.mixup.alpha"),
        ("inside", ("kind: digits", "kind: digit"), "check", (), "datasets.digits_lt.source.kind"),
        ("inside", ("backbone: resnet8", "backbone: resnet9"), "check", (), "datasets.digits_lt.backbone"),
        ("inside", ("tau: 1.0\n  mislas", "taw: 1.0\n  mislas"), "check", (), "classifiers.tau_norm.ta"),
        ("inside", ("    temperature: {}", "    temprature: {}"), "check", (), "temprature"),
        ("inside", ("device: auto", "device: cuda"), "represent", CELL, "runtime.device"),
        ("inside", ("precision: float32", "precision: tf32"), "represent", CELL, "precision: is tf32"),
        ("inside", None, "represent", ("--dataset", "digits_lt", "--representation", "nope"), "no block nope"),
        ("inside", None, "represent", CELL, "data/lt/digits_lt/meta.json is missing"),
        ("stage", None, "evaluate", (*CELL, "--classifier", "joint"), "missing"),
        ("script", None, "report", (), "missing"),
    ],
)
def test_a_mistake_ends_with_one_line(project, run, change, stage, arguments, says):
    if says in ("runtime.device", "precision: is tf32") and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so asking for one is no mistake")
    p = project(*[change] if change else [], cut="batch_size" in says)
    shutil.rmtree(p.root / "metrics/cells", ignore_errors=True)
    if stage == "subsample":
        p.inside("download", *arguments)
    before = set(p.root.rglob("*"))
    output = getattr(p, run)(stage, *arguments, ok=False)
    assert output.count("\n") == 1, output
    assert output.startswith("error: ")
    assert says in output
    left = {path for path in set(p.root.rglob("*")) - before if path.is_file() and path.suffix != ".pyc"}
    assert not left


def test_images_for_which_there_is_no_room_are_one_line(project, monkeypatch):
    def full(*_):
        raise MemoryError

    p = project(cut=True)
    monkeypatch.setattr(store, "Images", full)
    said = p.inside("represent", *CELL, ok=False)
    assert said == "error: there is not enough memory: set runtime.placement to auto or disk (MemoryError)\n"


def test_damaged_artefacts_are_named_and_never_trained_on(project):
    p = project(cut=True)
    labels = p.root / "data/lt/digits_lt/train_labels.npy"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-8] + bytes([1]) + whole[-7:])
    assert "train_labels.npy is damaged" in p.inside("represent", *CELL, ok=False)
    labels.write_bytes(whole)
    misspelt = ("--dataset", "digits_lt", "--representation", "nope", "--classifier", "crt")
    assert "representations has no block nope" in p.inside("calibrate", *misspelt, ok=False)
    p.inside("represent", *CELL)
    weights = p.root / "data/representations/digits_lt/ce/seed1.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5] + bytes([whole[-5] ^ 255]) + whole[-4:])
    assert "seed1.safetensors is damaged" in p.inside("calibrate", *CELL, "--classifier", "tau_norm", ok=False)
    weights.write_bytes(whole[:1000])
    assert "seed1.safetensors is damaged" in p.inside("calibrate", *CELL, "--classifier", "crt", ok=False)


def test_lists_of_the_image_files_of_before_do_not_outlast_them(project):
    p = project()
    lists = [p.root / "data/raw/digits_lt" / name for name in ("skipped.txt", "duplicates.txt")]
    for path in lists:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("train/a.png\tis empty (0 bytes)\n")
    p.inside("download", "--dataset", "digits_lt")
    assert not any(path.exists() for path in lists)


def test_the_training_stage_never_opens_the_test_split(project):
    p = project(cut=True)
    for file in (p.root / "data/lt/digits_lt").glob("*_*.npy"):
        if not file.name.startswith("train"):
            file.unlink()
    p.inside("represent", *CELL)
    assert "data/lt/digits_lt/holdout_images.npy is missing" in p.inside(
        "calibrate", *CELL, "--classifier", "crt", ok=False
    )
    assert (p.root / "data/classifiers/digits_lt/ce/crt/seed1.safetensors").exists()  # trained before it was looked for


def test_another_file_of_pretrained_weights_reruns_stage_1(project):
    """And the same bytes with another date, or behind a link, rerun nothing."""
    begins = "pretrained: {file: data/pretrained/w.safetensors, trains: last_block}"
    short = [
        ("- 0\n- 1\n", "- 0\n"),
        ("epochs: 8\n", "epochs: 1\n"),
        ("warmup: 5 ", "warmup: 0 "),
        ("      - 6\n", "      - 1\n"),
    ]
    p = project(("    backbone: resnet8\n", f"    backbone: resnet10\n    {begins}\n"), *short, cut=True)
    assert "pretrained.file: there is no file data/pretrained/w.safetensors" in p.inside("check", ok=False)
    file, settings = p.root / "data/pretrained/w.safetensors", p.root / "data/settings"

    def checked() -> dict[str, bytes]:
        p.inside("check")
        found = snapshot(settings)
        digest = json.loads(found["represent/digits_lt-ce.json"])["pretrained"]["sha256"]
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(BACKBONES["resnet10"](1).state_dict(), file)  # through the link, where it is one

    write(0)
    before = checked()
    write(1)
    after = checked()
    stage_1 = {f"represent/digits_lt-{name}.json" for name in params.load(p.root / "params.yaml").representations}
    assert {name for name, content in after.items() if content != before[name]} == stage_1
    p.inside("represent", *CELL)
    told = json.loads((p.root / "data/representations/digits_lt/ce/provenance.json").read_text())
    assert told["data"]["pretrained"] == hashlib.sha256(file.read_bytes()).hexdigest()
    began, made = load_file(file), load_file(p.root / "data/representations/digits_lt/ce/seed0.safetensors")
    same = {
        name: torch.equal(made[f"backbone.{name}"], began[name]) for name in ("conv1.weight", "layer4.0.conv1.weight")
    }
    assert list(same.values()) == [True, False], "the last block alone has learned, from these weights on"

    p.run("dvc", "commit", "--force", "check")
    os.utime(file, (0, 0))
    file.rename(p.root / "elsewhere")
    file.symlink_to(p.root / "elsewhere")
    assert changed(p, "check") == {}
    write(2)
    assert changed(p, "check") == {"check": [{"changed deps": {"data/pretrained": "modified"}}]}

    edit(p.root / "params.yaml", [("data/pretrained/w.safetensors", "elsewhere")])
    output = p.inside("check", ok=False)
    assert "datasets.digits_lt.pretrained.file: must lie in data/pretrained, where DVC sees it change" in output
    assert output.count("\n") == 1


def test_without_a_holdout_a_cell_is_measured_and_says_what_is_missing(project):
    """As in every published preset: nothing held out, so the rules that are fitted are absent."""
    p = project(("holdout_per_class: 20", "holdout_per_class: 0"))
    for stage in ("download", "subsample"):
        p.inside(stage, *CELL[:2])
    p.inside("represent", *CELL)
    for classifier in ("mislas", "ncm"):
        p.inside("calibrate", *CELL, "--classifier", classifier)
        p.inside("evaluate", *CELL, "--classifier", classifier)
        with np.load(p.root / f"data/predictions/digits_lt/ce/{classifier}/seed0.npz") as z:
            assert z["holdout_logits"].shape == (0, 10)
            assert z["test_logits"].shape == (500, 10)
        cell = json.loads((p.root / f"metrics/cells/digits_lt/ce/{classifier}.json").read_text())
        assert set(cell["posthoc"]) == {"logit_adjustment", "pn_transductive"}
        assert set(cell["posthoc_absent"]) == {"temperature", "vector_scaling", "class_temperature", "pn_inductive"}


def test_without_dvc_stages_refuse_a_data_set_that_was_cut_otherwise_or_that_the_augmentation_does_not_fit(project):
    p = project(cut=True)
    edit(p.root / "params.yaml", [("factor: 20", "factor: 50")])
    said = p.inside("represent", *CELL, ok=False)
    assert re.fullmatch(
        r"error: data/lt/digits_lt was cut with imbalance \{.*20\.0.*\}, and params\.yaml: datasets\.digits_lt"
        r"\.imbalance is \{.*50\.0.*\}: run `dvc repro`, or without DVC or off the grid `python -m "
        r"stages\.subsample --dataset "
        r"digits_lt`\n",
        said,
    )
    edit(p.root / "params.yaml", [("test_per_class: 50", "test_per_class: 40")])
    for stage, folder in (("subsample", "raw"), ("represent", "lt")):
        said = p.inside(stage, *CELL[: 2 if stage == "subsample" else None], ok=False)
        assert said == (
            f"error: data/{folder}/digits_lt was made with source.test_per_class 50, and params.yaml: "
            "datasets.digits_lt.source.test_per_class is 40: run `dvc repro`, or without DVC or off the grid "
            "`python -m "
            "stages.download --dataset digits_lt` and `python -m stages.subsample --dataset digits_lt`\n"
        )
    edit(p.root / "params.yaml", [("test_per_class: 40", "test_per_class: 50")])
    edit(p.root / "params.yaml", [("factor: 50", "factor: 20"), ("holdout_per_class: 20", "holdout_per_class: 19")])
    assert "was cut with holdout_per_class 20, and params.yaml: datasets" in p.inside("represent", *CELL, ok=False)
    edit(p.root / "params.yaml", [("holdout_per_class: 19", "holdout_per_class: 20")])
    p.inside("represent", *CELL)
    edit(p.root / "params.yaml", [("factor: 20", "factor: 50")])
    assert "was cut with imbalance" in p.inside("calibrate", *CELL, "--classifier", "joint", ok=False)
    edit(p.root / "params.yaml", [("factor: 50", "factor: 20"), ("pad: 1", "pad: 8")])
    for stage, more in (("represent", []), ("calibrate", ["--classifier", "joint"])):
        said = p.inside(stage, *CELL, *more, ok=False)
        assert "datasets.digits_lt.augmentation.pad is 8: the images have 8x8 pixels, so must be at most 7\n" in said


def test_a_file_where_a_folder_should_be_is_one_line(project):
    p = project()
    (p.root / "data/raw").mkdir(parents=True)
    (p.root / "data/raw/digits_lt").write_text("a file where a folder should be")
    output = p.inside("download", "--dataset", "digits_lt", ok=False)
    assert output.startswith("error: ")
    assert "data/raw/digits_lt" in output
    assert output.count("\n") == 1
