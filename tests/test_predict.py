"""From a finished cell to predictions: the exported folder, its ONNX file, the CSV, and what is said of wrong files."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.onnx.errors import OnnxExporterError

from stages import paths
from tailcal import errors, exported, files, posthoc, predict, train, user_files
from tailcal import export as exporting
from tailcal.augment import normalise, plain
from tailcal.duplicates import TWICE
from tailcal.errors import UserError
from tailcal.export import export
from tailcal.exported import CellSeed, Predictor
from tailcal.method import Batch, configure, load, resolve
from tailcal.metrics.accuracy import top1
from tailcal.metrics.calibration import ece, ece_floor, nll
from tailcal.metrics.scores import softmax
from tailcal.models import build
from tailcal.params import Augmentation, Strict, validate
from tailcal.prior import read_frequencies
from tailcal.weights import save_weights
from tests.conftest import ROOT, STAGE1
from tests.test_readme import block as of_readme

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
DIGITS = PARAMS["datasets"]["digits_lt"]["augmentation"]
NAMES = ["ant", "bee, a worker", "cow", "dög"]
COUNTS = [9, 6, 4, 2]
CELLS = {  # classifier: representation; of each representation the network
    "joint": "ce",
    "mislas": "ce",
    "mislas_shifted_bn": "ce",
    "tau_norm": "ce",
    "ncm": "ce",
    "disalign": "ldam_drw",
    "marc": "ldam_drw",
}
NETWORKS = {"ce": ("resnet8", "linear"), "ldam_drw": ("resnet20", "cosine")}


class Prepared(Strict):
    augmentation: Augmentation


def make_cell(
    root: Path, classifier: str = "joint", holdout: int = 40, size: int = 8, augmentation=DIGITS, **settings
) -> CellSeed:
    """The artefacts of one cell below `root`, as the stages leave them, after a few steps on made-up images."""
    representation = CELLS[classifier]
    where = ("made_up", representation, classifier)
    channels = len(augmentation["mean"])
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 21), ("holdout", holdout), ("test", 30)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 4
    checksums = {}
    for name, array in arrays.items():
        path = root / paths.longtail("made_up") / f"{name}.npy"
        files.write_array(path, array)
        checksums[path.name] = files.sha256(path)
    meta = {
        "class_names": NAMES,
        "train_counts": COUNTS,
        "test_counts": [1] * 4,
        "source": {},
        "imbalance": {},
        "raw": {},
        "holdout_per_class": 0,
        "checksums": checksums,
        "skipped": {},
        "duplicates": dict.fromkeys(TWICE, 0),
    }
    files.write_json(root / paths.longtail("made_up") / "meta.json", meta)

    torch.manual_seed(0)
    record = dict(zip(("backbone", "head"), NETWORKS[representation], strict=True))
    record |= {"channels": channels, "num_classes": 4}
    block = PARAMS["classifiers"][classifier] | settings
    chosen, own = resolve(classifier, block, "classifiers")
    method = load(chosen)(configure(classifier, block, "classifiers"), torch.tensor(COUNTS))
    network = build(**record)
    method.setup(network)
    config = validate(Prepared, {"augmentation": augmentation}, "").augmentation
    images = torch.from_numpy(arrays["train_images"])
    prepared = normalise(plain(images.permute(0, 3, 1, 2), config), torch.tensor(config.mean), torch.tensor(config.std))
    labels = torch.from_numpy(arrays["train_labels"])
    network.train()(prepared)  # running statistics of these images
    if method.trained:
        method.set_mode(network)
        loss, _ = method.loss(network, Batch(prepared, labels, labels), torch.tensor(0.0))
        loss.backward()
        with torch.no_grad():
            for parameter in (p for p in network.parameters() if p.grad is not None):
                parameter -= 0.1 * parameter.grad
    else:
        method.fit(network, lambda: network.eval().backbone(prepared).detach(), labels)
    save_weights(network, root / paths.classifier(*where) / "seed0.safetensors")

    files.write_json(
        root / paths.representation("made_up", representation) / "provenance.json", STAGE1 | {"network": record}
    )
    training = {"name": classifier, "method": chosen, "settings": own, "augmentation": augmentation}
    provenance = {
        "code": "0+0",
        "data": checksums,
        "predicted": checksums,
        "starts": STAGE1["weights"],
        "params": {"representation": {"name": representation}, "classifier": training},
    }
    model = Predictor(network, config, 1.0)
    with torch.no_grad():
        logits = {
            f"{split}_logits": model.logits(torch.from_numpy(arrays[f"{split}_images"])).numpy()
            for split in ("holdout", "test")
        }
    labels = {f"{split}_labels": arrays[f"{split}_labels"] for split in ("holdout", "test")}
    with files.atomic(root / paths.predictions(*where) / "seed0.npz") as stream:
        np.savez(stream, **logits, **labels)
    files.write_json(root / paths.predictions(*where) / "provenance.json", provenance)
    cell = CellSeed(dataset="made_up", representation=representation, classifier=classifier, seed=0)
    seal(root, cell)
    return cell


def seal(root: Path, cell: CellSeed) -> None:
    """Take down the checksums of weights and predictions as they are, like the stage calibrate."""
    where = (cell.dataset, cell.representation, cell.classifier)
    made = root / paths.predictions(*where) / "provenance.json"
    written = [root / paths.classifier(*where) / "seed0.safetensors", made.with_name("seed0.npz")]
    checksums = {path.name: files.sha256(path) for path in written}
    files.write_json(made, json.loads(made.read_text()) | {"checksums": checksums})


def saved(root: Path, cell: CellSeed) -> dict[str, np.ndarray]:
    """The logits that the stages saved."""
    with np.load(root / paths.predictions(cell.dataset, cell.representation, cell.classifier) / "seed0.npz") as file:
        return dict(file)


@pytest.fixture
def no_onnx(monkeypatch):
    """The translation takes seconds, and most tests are not about it."""

    def refuse(*_):
        raise UserError("not wanted here")

    monkeypatch.setattr(exporting, "to_onnx", refuse)


@pytest.fixture
def model(tmp_path, request) -> Path:
    """An exported folder, without ONNX."""
    request.getfixturevalue("no_onnx")
    export(make_cell(tmp_path), tmp_path / "model", root=tmp_path)
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """The test images of the cell that `model` has made, as files in folders."""
    images = np.load(tmp_path / paths.longtail("made_up") / "test_images.npy")
    for i, image in enumerate(images):
        path = tmp_path / f"pictures/{i % 3}/{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(path)
    return tmp_path / "pictures"


def call(*arguments: object, cwd: Path, module: str = "predict") -> subprocess.CompletedProcess:
    """Run a command as a user does, in any folder."""
    command = [sys.executable, "-m", f"tailcal.{module}", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


# The others have the modules of `joint` and of `mislas`, and only other numbers in them.
@pytest.mark.parametrize("classifier", ["joint", "mislas", "ncm", "disalign", "marc"])
def test_the_onnx_file_gives_the_calibrated_probabilities_of_any_batch(classifier, tmp_path):
    cell = make_cell(tmp_path, classifier, **({"distance": "euclidean"} if classifier == "ncm" else {}))
    card = export(cell, tmp_path / "model", root=tmp_path)
    assert card.onnx == files.sha256(tmp_path / "model/model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model/model.onnx", providers=["CPUExecutionProvider"])
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [8, 8, 1])
    assert (probabilities.name, probabilities.type) == ("probabilities", "tensor(float)")

    pixels = np.load(tmp_path / paths.longtail("made_up") / "test_images.npy")
    expected = softmax(saved(tmp_path, cell)["test_logits"] / card.temperature)
    _, rebuilt = exported.load(tmp_path / "model")
    for n in (1, 30):
        found = session.run(None, {"images": pixels[:n]})[0]
        np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-5)
        with torch.no_grad():
            np.testing.assert_allclose(found, rebuilt(torch.from_numpy(pixels[:n])), rtol=0, atol=1e-5)
    assert str(ROOT).encode() not in (tmp_path / "model/model.onnx").read_bytes()


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("classifier", CELLS)
def test_the_folder_gives_the_networks_probabilities(classifier, tmp_path):
    cell = make_cell(tmp_path, classifier)
    card = export(cell, tmp_path / "model", root=tmp_path)
    assert card.temperature != 1
    pixels = torch.from_numpy(np.load(tmp_path / paths.longtail("made_up") / "test_images.npy"))
    loaded, rebuilt = exported.load(tmp_path / "model")
    assert loaded == card
    with torch.no_grad():
        probabilities = rebuilt(pixels)
        one_by_one = torch.cat([rebuilt(pixel[None]) for pixel in pixels[:5]])
    expected = softmax(saved(tmp_path, cell)["test_logits"] / card.temperature)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(30))
    torch.testing.assert_close(one_by_one, probabilities[:5], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("no_onnx")
def test_the_temperature_suits_the_held_out_logits_and_no_others(tmp_path):
    cell = make_cell(tmp_path)
    found = export(cell, tmp_path / "model", root=tmp_path).temperature
    arrays = saved(tmp_path, cell)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100), 2001))
    best = grid[np.argmin([nll(arrays["holdout_logits"] / T, arrays["holdout_labels"]) for T in grid])]
    assert found == pytest.approx(best, rel=0.01)


@pytest.mark.usefixtures("no_onnx")
def test_without_a_hold_out_there_is_no_rule(tmp_path):
    cell = make_cell(tmp_path, holdout=0)
    card = export(cell, tmp_path / "model", root=tmp_path)
    assert (card.rule, card.fitted, card.temperature) == ("none", {}, 1.0)
    with pytest.raises(UserError, match="made_up holds none out: use none"):
        export(cell, tmp_path / "other", "temperature", tmp_path)
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("no_onnx")
def test_a_network_of_other_parameters_is_exported_with_a_warning(tmp_path, monkeypatch, capsys):
    cell = make_cell(tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    made = tmp_path / paths.predictions("made_up", "ce", "joint") / "provenance.json"
    record, now = json.loads(made.read_text()), json.loads(made.read_text())["params"]
    now["classifier"]["recipe"] = {"lr": 0.1}
    monkeypatch.setattr(exporting.settings, "of_cell", lambda *_: now)  # made_up has no preset
    for lr, warned in ((0.1, False), (0.2, True)):
        record["params"]["classifier"]["recipe"] = {"lr": lr}
        files.write_json(made, record)
        export(cell, tmp_path / "model", root=tmp_path)
        said = capsys.readouterr().err
        line = (
            "warning: the network was made with classifier.recipe.lr 0.2, and the parameters say 0.1; exported is the "
            "network"
        )
        assert (line in said) == warned


@pytest.mark.usefixtures("no_onnx")
def test_no_rule_on_request(tmp_path):
    assert export(make_cell(tmp_path), tmp_path / "model", "none", tmp_path).rule == "none"


def test_the_card_says_what_the_model_is(model):
    card = json.loads((model / "model.json").read_text())
    assert card["class_names"] == NAMES
    assert card["train_counts"] == COUNTS
    assert (card["image_size"], card["channels"]) == (8, 1)
    assert (card["augmentation"]["mean"], card["augmentation"]["std"]) == (DIGITS["mean"], DIGITS["std"])
    assert card["network"] == {"backbone": "resnet8", "head": "linear", "channels": 1, "num_classes": 4}
    assert (card["classifier"], card["settings"]) == ("joint", {})
    assert card["cell"] == {"dataset": "made_up", "representation": "ce", "classifier": "joint", "seed": 0}
    assert card["weights"] == files.sha256(model / "model.safetensors")
    assert {"tailcal", "torch", "numpy", "python"} <= set(card["versions"])
    assert card["provenance"]["code"] == "0+0"


def test_without_the_packages_all_but_onnx_is_written_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.onnx").write_text("of an earlier export")
    card = export(make_cell(tmp_path), tmp_path / "model", root=tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install onnx onnxscript" in said
    assert card.onnx is None
    assert not (tmp_path / "model/model.onnx").exists()
    assert exported.load(tmp_path / "model")[0] == card


def test_a_network_that_cannot_be_translated_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OnnxExporterError("Failed.\nNext steps:\n- ask") from ValueError("No ONNX function found for x\nmore")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    export(make_cell(tmp_path), tmp_path / "model", root=tmp_path)
    said = capsys.readouterr().err
    assert said.endswith("left out: torch cannot translate this network (No ONNX function found for x)\n")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("refuses", [True, False])
def test_an_interrupt_that_torch_makes_something_else_of_ends_the_export(refuses, tmp_path, monkeypatch):
    def swallow(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if refuses:
                raise OnnxExporterError("Failed.") from AttributeError("module 'torch._dynamo' has no attribute 'exc'")
        return SimpleNamespace(model_proto=onnx.ModelProto())

    make_cell(tmp_path)
    monkeypatch.setattr(torch.onnx, "export", swallow)
    with pytest.raises(SystemExit, match=r"^error: interrupted$"):
        errors.run(lambda: run_export(monkeypatch, tmp_path, "--out", tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_interrupts_that_are_ignored_or_come_to_another_thread_change_nothing():
    def block() -> int:
        with exporting.interruptible():
            return 1

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(block).result() == 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with exporting.interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("rule", ["temperature", "none"])
def test_the_card_says_what_the_model_does_on_the_test_split(rule, tmp_path):
    cell = make_cell(tmp_path)
    card = export(cell, tmp_path / "model", rule, tmp_path)
    arrays = saved(tmp_path, cell)
    logits, labels = arrays["test_logits"], arrays["test_labels"]
    probabilities = softmax(logits / card.temperature)
    temperature = 1.0 if rule == "none" else card.fitted["temperature"]
    changes = [
        nll(one[None] / temperature, k[None]) - nll(one[None], k[None]) for one, k in zip(logits, labels, strict=True)
    ]
    assert card.measured.model_dump() == pytest.approx(
        {
            "holdout_images": 40,
            "trained_on": 0,
            "test_images": 30,
            "top1": top1(logits, labels),
            "ece_as_trained": ece(softmax(logits), labels, bins=15),
            "ece": ece(probabilities, labels, bins=15),
            "ece_floor": ece_floor(probabilities, bins=15),
            "nll_as_trained": nll(logits, labels),
            "nll": nll(logits / temperature, labels),
            "nll_error": np.std(changes) / 30**0.5,
        }
    )
    assert (card.measured.ece == card.measured.ece_as_trained) == (rule == "none")
    pixels = torch.from_numpy(np.load(tmp_path / paths.longtail("made_up") / "test_images.npy"))
    loaded, rebuilt = exported.load(tmp_path / "model")
    assert loaded == card
    with torch.no_grad():  # the numbers are those of the folder
        assert ece(rebuilt(pixels).numpy(), labels) == pytest.approx(card.measured.ece, abs=1e-6)


def test_doubts_about_a_calibration(model):
    card = exported.load(model)[0]

    def doubts(**changed) -> list[str]:
        fine = {"holdout_images": 50, "nll_as_trained": 0.3, "nll": 0.3199, "nll_error": 0.01}
        return exporting.doubts(card.model_copy(update={"measured": card.measured.model_copy(update=fine | changed)}))

    assert doubts() == []
    assert doubts(holdout_images=49) == ["49 held-out images are too few to calibrate well: raise holdout_per_class"]
    assert doubts(nll=0.3201) == [
        "on the test split the calibration made the NLL worse, 0.320 instead of 0.300, by more than chance: the "
        "held-out images are too few, or unlike those of the test split"
    ]
    assert doubts(nll=0.1) == []
    for bound in posthoc.TEMPERATURES:
        ended = {"fitted": {"temperature": bound}, "measured": card.measured.model_copy(update={"holdout_images": 50})}
        (said,) = exporting.doubts(card.model_copy(update=ended))
        assert said.startswith(f"the temperature ended at its bound, {bound:g}: these logits say nothing, or")


@pytest.mark.usefixtures("no_onnx")
def test_test_images_that_were_trained_on_are_told(tmp_path):
    cell, meta = make_cell(tmp_path), tmp_path / paths.longtail("made_up") / "meta.json"
    assert "in the training split too" not in exporting.result(
        export(cell, tmp_path / "model", root=tmp_path).measured, "none"
    )
    meta.write_bytes(change(duplicates=dict.fromkeys(TWICE, 0) | {"test": 4})(meta.read_bytes()))
    leaked = export(cell, tmp_path / "model", root=tmp_path).measured
    assert " images, of which 4 are in the training split too; 15 bins; " in exporting.result(leaked, "none")


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_the_block_at_once():
    def block() -> None:
        with exporting.interruptible():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it came, and the block went on")

    with pytest.raises(KeyboardInterrupt):
        block()


SEALED = ("other weights as sealed", "wider weights")  # whose checksums are taken down after the change


def wrong_cells(root: Path, cell: CellSeed) -> dict[str, tuple[Path, bytes | None, str]]:
    """What a user may find in a cell: the file, its bytes (None: it is not there), what is said."""
    folder = (cell.dataset, cell.representation, cell.classifier)
    weights = root / paths.classifier(*folder) / "seed0.safetensors"
    state = load_file(weights)
    other = weights.with_name("other.safetensors")
    save_file(state | {"head.bias": state["head.bias"] + 1.0}, other)
    wider = weights.with_name("wider.safetensors")
    save_file(state | {"head.bias": torch.zeros(5)}, wider)
    logits = root / paths.predictions(*folder) / "seed0.npz"
    longtail = root / paths.longtail(cell.dataset)
    meta = longtail / "meta.json"
    described = json.loads(meta.read_text())
    coloured = {"mean": [0.1] * 3, "std": [0.1] * 3}
    colours = meta.with_name("colours.npy")
    files.write_array(colours, np.zeros((40, 8, 8, 3), np.uint8))
    made = logits.with_name("provenance.json")
    checksums = json.loads(made.read_text())["checksums"]
    recorded = json.loads(made.read_text())

    def provenance(checksums: object = checksums, **changed) -> bytes:
        trained = recorded["params"] | {"classifier": recorded["params"]["classifier"] | changed}
        content = recorded | {"params": trained, "checksums": checksums}
        return json.dumps({key: value for key, value in content.items() if value is not None}).encode()

    def counted(**changed) -> bytes:
        return json.dumps(described | changed).encode()

    stage1 = root / paths.representation(*folder[:2]) / "provenance.json"
    return {
        "no weights": (weights, None, "is missing: run `dvc repro`"),
        "cut weights": (weights, weights.read_bytes()[:2000], "is damaged"),
        "other weights": (weights, other.read_bytes(), "is damaged: its SHA-256 is"),
        "other weights as sealed": (weights, other.read_bytes(), "does not give the logits that were saved with it"),
        "wider weights": (weights, wider.read_bytes(), "of another network"),
        "no logits": (logits, None, "is missing: run `dvc repro`"),
        "cut logits": (logits, logits.read_bytes()[:200], "is damaged"),
        "no checksums": (made, provenance(checksums=None), "checksums: this key is missing"),
        "a number for checksums": (made, provenance(checksums=5), "checksums: must be a mapping of keys to values"),
        "a list for checksums": (made, provenance(checksums=["seed0.npz"]), "checksums: must be a mapping of keys"),
        "no name": (
            made,
            json.dumps(recorded | {"params": {"classifier": recorded["params"]["classifier"]}}).encode(),
            "provenance.json: params.representation: this key is missing; it is damaged, or of another version: delete",
        ),
        "of another cell": (made, provenance(name="joint2"), "ce/joint is of the classifier joint2: run `dvc repro`"),
        "old record": (made, provenance(augmentation={"pad": 1}), "params.classifier.augmentation"),
        "other method": (made, provenance(method="nope"), "no classifier 'nope'"),
        "other settings": (made, provenance(settings={"rho": 1.0}), "settings.rho"),
        "no network": (stage1, b"{}", "ce/provenance.json: code: this key is missing"),
        "unknown network": (
            stage1,
            json.dumps(STAGE1 | {"network": {"backbone": "nope"}}).encode(),
            "made_up/ce/provenance.json: this version",
        ),
        "another stage 1": (
            stage1,
            json.dumps(STAGE1 | {"weights": {"seed0": "another"}}).encode(),
            f"ce/joint is not of the networks that {stage1.parent} holds: run `dvc repro`, or without DVC or "
            f"off the grid `python -m "
            "stages.calibrate --dataset made_up ",
        ),
        "other colours": (made, provenance(augmentation=DIGITS | coloured), "mean has 3 values: must be 1"),
        "no meta": (meta, b"[]", "must be a mapping of keys to values"),
        "a word for a count": (meta, counted(train_counts=["a"]), "train_counts.0: input should be a valid integer"),
        "no counts": (meta, counted(train_counts=None), "train_counts: input should be a valid list"),
        "a class of none": (meta, counted(train_counts=[9, 6, 4, 0]), "train_counts.3: input should be greater than"),
        "a number for names": (meta, counted(class_names=5), "class_names: input should be a valid list, got 5"),
        "other training images": (
            meta,
            counted(checksums=described["checksums"] | {"train_images.npy": "0"}),
            "ce/joint is of networks that were trained on another training split than",
        ),
        "other test images": (
            meta,
            counted(checksums=described["checksums"] | {"test_images.npy": "0"}),
            "ce/joint is of other held-out or test images than",
        ),
        "no images": (longtail / "holdout_images.npy", None, "is missing"),
        "other images": (
            longtail / "holdout_images.npy",
            colours.read_bytes(),
            "holdout_images.npy is damaged: its SHA-256 is",
        ),
    }


@pytest.mark.usefixtures("no_onnx")
def test_what_is_wrong_with_a_cell_is_one_line_and_writes_nothing(tmp_path):
    cell = make_cell(tmp_path)
    for what, (path, content, says) in wrong_cells(tmp_path, cell).items():
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        if what in SEALED:
            seal(tmp_path, cell)
        with pytest.raises(UserError) as error:
            export(cell, tmp_path / "model", root=tmp_path)
        path.write_bytes(whole)
        seal(tmp_path, cell)
        assert "\n" not in str(error.value), what
        assert says in str(error.value), what
        file = "/".join(path.parts[-2:])
        assert file in str(error.value) or any(of in says for of in ("nope", "network", "is of")), what
        assert not (tmp_path / "model").exists(), what
    export(cell, tmp_path / "model", root=tmp_path)


def test_a_cell_that_is_not_there_is_told_those_that_are(tmp_path):
    make_cell(tmp_path)
    other = CellSeed(dataset="made_up", representation="ce", classifier="crt", seed=0)
    with pytest.raises(UserError, match=r"^made_up/ce/crt is not finished here: .*; finished are: made_up/ce/joint$"):
        export(other, tmp_path / "model", root=tmp_path)
    (tmp_path / "new/data/predictions").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^made_up/ce/crt is not finished here: .*; finished are: none$"):
        export(other, tmp_path / "model", root=tmp_path / "new")
    with pytest.raises(UserError, match=r"other is not a project in which `dvc repro` has run .* or give --root$"):
        export(other, tmp_path / "model", root=tmp_path / "other")


def test_a_cell_of_other_images_than_those_that_lie_there_is_refused(tmp_path):
    cell = make_cell(tmp_path)
    raw = {"class_names": NAMES, "source": {}, "checksums": {"train_images.npy": "other"}}
    files.write_json(tmp_path / paths.raw("made_up") / "meta.json", raw)
    with pytest.raises(UserError, match=r"lt/made_up was cut from other images than .*raw/made_up holds: run"):
        export(cell, tmp_path / "model", root=tmp_path)


def test_a_seed_that_was_not_trained_is_told_those_that_were(tmp_path):
    other = make_cell(tmp_path).model_copy(update={"seed": 9})
    with pytest.raises(UserError, match=r"^--seed 9: data/predictions/made_up/ce/joint has the seeds 0$"):
        export(other, tmp_path / "model", root=tmp_path)


@pytest.mark.usefixtures("no_onnx")
def test_an_export_takes_the_place_of_nothing_but_itself(tmp_path):
    cell, other = make_cell(tmp_path), make_cell(tmp_path, "mislas")
    export(cell, tmp_path / "model", root=tmp_path)
    export(cell, tmp_path / "model", root=tmp_path)
    with pytest.raises(UserError, match="holds the model of another cell or seed"):
        export(other, tmp_path / "model", root=tmp_path)
    with pytest.raises(UserError, match="holds another file, "):
        export(cell, tmp_path, root=tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export(cell, tmp_path / "model/model.json", root=tmp_path)


def run_export(monkeypatch, root: Path, *more: object) -> None:
    """Export the cell that `make_cell` makes of joint."""
    cell = ("--dataset", "made_up", "--representation", "ce", "--classifier", "joint", "--root", root)
    monkeypatch.setattr(sys, "argv", ["export", *map(str, (*cell, *more))])
    exporting.main()


@pytest.mark.usefixtures("no_onnx")
def test_what_a_killed_export_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    make_cell(tmp_path)
    out = tmp_path / "model"
    out.mkdir()
    left = out / ".model.safetensors.1a2b3c4d.part"
    left.touch()
    run_export(monkeypatch, tmp_path, "--out", out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "model.json"}
    others = [tmp_path / "download/.film.mp4.part", tmp_path / "download/below/.model.json.x.part"]
    others[1].parent.mkdir(parents=True)
    for other in others:
        other.touch()
    with pytest.raises(UserError, match="holds another file, "):
        run_export(monkeypatch, tmp_path, "--out", tmp_path / "download")
    assert all(other.exists() for other in others)


@pytest.fixture
def locks(tmp_path, monkeypatch) -> Path:
    """Where lock files lie, and nobody else's."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    return tmp_path / f"locks/tailcal-{os.getuid()}"


def test_a_second_export_to_a_folder_is_told_who_is_first_and_spoils_nothing(tmp_path, locks, monkeypatch):
    def meanwhile(*_):
        monkeypatch.setattr(exporting, "to_onnx", None)
        says = rf"^{tmp_path}/model/model\.json: another process \(pid {os.getpid()}\) is making it: wait for it"
        with pytest.raises(UserError, match=says):
            run_export(monkeypatch, tmp_path, "--out", tmp_path / "other/../model")
        raise UserError("not wanted here")

    make_cell(tmp_path)
    monkeypatch.setattr(exporting, "to_onnx", meanwhile)
    run_export(monkeypatch, tmp_path, "--out", tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "model.json"}
    assert not list(locks.iterdir())


def test_a_second_prediction_to_a_file_is_told_who_is_first_and_spoils_nothing(
    tmp_path, locks, model, pictures, monkeypatch
):
    forward = Predictor.forward

    def meanwhile(*arguments):
        monkeypatch.setattr(Predictor, "forward", forward)
        says = rf"^{tmp_path}/out\.csv: another process \(pid {os.getpid()}\) is making it: wait for it"
        with pytest.raises(UserError, match=says):
            run(monkeypatch, "--model", model, "--out", "out.csv", pictures)
        return forward(*arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "forward", meanwhile)
    before = set(tmp_path.iterdir())
    run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", pictures)
    assert len(table(tmp_path / "out.csv")) == 30
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out.csv"}
    assert not list(locks.iterdir())


def test_locks_lie_where_nobody_else_can_write(tmp_path, locks, monkeypatch):
    with user_files.alone(tmp_path / "out.csv"):
        assert locks.stat().st_mode & 0o777 == 0o700
        assert len(list(locks.iterdir())) == 1
    other = os.getuid() + 1
    locks.rename(locks.with_name(f"tailcal-{other}"))
    monkeypatch.setattr(os, "getuid", lambda: other)
    with (
        pytest.raises(UserError, match=rf"locks/tailcal-{other}: is another user's: set TMPDIR"),
        user_files.alone(tmp_path / "out.csv"),
    ):
        pytest.fail("it is locked in another user's folder")


def test_what_a_killed_prediction_left_is_removed_and_nothing_else(tmp_path, model, pictures, monkeypatch):
    out = tmp_path / "new/[a].csv"
    out.parent.mkdir()
    for name in (".[a].csv.1a2b3c4d.part", ".a.csv.1a2b3c4d.part"):
        (out.parent / name).touch()
    run(monkeypatch, "--model", model, "--out", out, pictures)
    assert {path.name for path in out.parent.iterdir()} == {out.name, ".a.csv.1a2b3c4d.part"}


@pytest.mark.usefixtures("no_onnx")
def test_where_the_card_of_an_earlier_export_is_damaged_what_is_advised_helps(tmp_path):
    cell, card = make_cell(tmp_path), tmp_path / "model/model.json"
    export(cell, card.parent, root=tmp_path)
    card.write_text("{")
    with pytest.raises(UserError, match=r"model\.json is damaged \(.*\): delete it and export the model again$"):
        export(cell, card.parent, root=tmp_path)
    card.unlink()
    export(cell, card.parent, root=tmp_path)


def test_predictions_take_the_place_of_no_image_and_of_nothing_strange(tmp_path, model, pictures, monkeypatch):
    image = next(pictures.rglob("*.png"))
    content = image.read_bytes()
    for out, says in (
        (image, "is one of the files to read"),
        (tmp_path, "is a folder"),
        ("/dev/null", "no regular file"),
    ):
        with pytest.raises(UserError, match=says):
            run(monkeypatch, "--model", model, "--out", out, image)
    assert image.read_bytes() == content


def test_a_folder_that_is_a_link_to_itself_is_one_line(tmp_path, model, pictures, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: run(monkeypatch, "--model", model, "--out", tmp_path / "loop/x.csv", pictures))
    assert re.fullmatch(r"error: .*loop/x\.csv.*", ended.value.code)


def test_predictions_take_the_place_of_no_file_of_the_model(tmp_path, model, pictures, monkeypatch):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "link.csv").symlink_to(model / "model.json")
    (tmp_path / "hard.csv").hardlink_to(model / "model.safetensors")
    (tmp_path / "again").symlink_to(model)
    for out in ("model/model.json", "model/model.safetensors", "model/model.onnx", "again/model.onnx"):
        with pytest.raises(UserError, match=rf"^--out {tmp_path}/{out}: is a file of the model: must be another file$"):
            run(monkeypatch, "--model", model, "--out", tmp_path / out, pictures)
    for out in ("link.csv", "hard.csv"):
        with pytest.raises(UserError, match="is a file of the model"):
            run(monkeypatch, "--model", tmp_path / "again", "--out", tmp_path / out, pictures)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    run(monkeypatch, "--model", model, "--out", model / "predictions.csv", pictures)
    run(monkeypatch, "--model", model, "--out", tmp_path / "elsewhere/model.onnx", pictures)


def test_images_that_are_not_square_are_refused():
    path = Path("holdout_images.npy")
    with pytest.raises(UserError, match="only square ones"):
        exporting.check_images(np.zeros((2, 8, 6, 3), np.uint8), path)
    with pytest.raises(UserError, match="only square ones"):
        exporting.check_images(np.zeros((2, 8, 8, 4), np.uint8), path)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    predict.main()


def test_confidences_are_softmax_of_logits_by_temperature(tmp_path, model, pictures, monkeypatch, capsys):
    out = tmp_path / "new/predictions.csv"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run(monkeypatch, "--model", model, "--out", out, "--top", 3, "--batch-size", 7, pictures)
    assert not torch.backends.cudnn.allow_tf32
    assert capsys.readouterr().out == f"{out}: 30 images\n"
    rows = table(out)
    assert list(rows[0]) == ["file", "class", "confidence", "class_2", "confidence_2", "class_3", "confidence_3"]
    assert [row["file"] for row in rows] == [str(path) for path in sorted(pictures.rglob("*.png"))]
    card, _ = exported.load(model)
    cell = CellSeed(dataset="made_up", representation="ce", classifier="joint", seed=0)
    logits = saved(tmp_path, cell)["test_logits"]
    for row in rows:
        z = logits[int(Path(row["file"]).stem)].astype(np.float64) / card.temperature
        p = np.exp(z) / np.exp(z).sum()
        for rank, suffix in enumerate(("", "_2", "_3")):
            k = np.argsort(-p)[rank]
            assert row[f"class{suffix}"] == NAMES[k]
            assert float(row[f"confidence{suffix}"]) == pytest.approx(p[k], abs=2e-6)


def test_the_readme_says_how_to_predict_in_python(tmp_path, model, pictures, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / "here/model")
    for name, picture in (("one.png", "0/00.png"), ("two.jpg", "1/01.png")):
        shutil.copy(pictures / picture, tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    exec(of_readme("python"), {})
    run(monkeypatch, "--model", "model", "one.png", "two.jpg")
    said = capsys.readouterr().out.splitlines()[0]
    assert said == str([row["class"] for row in table(Path("predictions.csv"))])


@pytest.mark.parametrize("option", ["FILE_OR_FOLDER", "--model", "--out"])
def test_an_empty_path_is_not_the_present_folder(option, model, monkeypatch, capsys):
    arguments = {"FILE_OR_FOLDER": ["--model", model, ""], "--model": ["--model", "", "a.png"]}
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments.get(option, ["--model", model, "--out", "", "a.png"]))
    said = f"error: argument {option}: is empty: must be a path: see python -m tailcal.predict --help\n"
    assert capsys.readouterr().err == said


def frequency_file(path: Path, *numbers: object) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("class", "frequency"), *reversed(list(zip(NAMES, numbers, strict=True)))])
    return path


def test_frequencies_multiply_the_probabilities(tmp_path, model, pictures, monkeypatch):
    numbers = [0.5, 2, 1e-3, 40]
    card, _ = exported.load(model)
    given = {"file": frequency_file(tmp_path / "not train.csv", *numbers), "train": "train"}
    for name, often in (("file", numbers), ("train", card.train_counts)):
        out = {kind: tmp_path / f"{kind}.csv" for kind in ("plain", "shifted")}
        run(monkeypatch, "--model", model, "--out", out["plain"], "--top", 4, pictures)
        run(monkeypatch, "--model", model, "--out", out["shifted"], "--top", 4, "--frequencies", given[name], pictures)
        for before, after in zip(table(out["plain"]), table(out["shifted"]), strict=True):
            ranks = ("", "_2", "_3", "_4")
            p = {before[f"class{rank}"]: float(before[f"confidence{rank}"]) for rank in ranks}
            weighted = {k: p[k] * often[NAMES.index(k)] for k in NAMES}
            best = sorted(NAMES, key=weighted.get, reverse=True)
            assert [after[f"class{rank}"] for rank in ranks] == best
            shares = [weighted[k] / sum(weighted.values()) for k in best]
            assert [float(after[f"confidence{rank}"]) for rank in ranks] == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize("often", [7, 5e-324])
def test_equal_frequencies_change_nothing(tmp_path, model, pictures, monkeypatch, often):
    written = []
    for more in ((), ("--frequencies", frequency_file(tmp_path / "often.csv", *[often] * 4))):
        run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", *more, pictures)
        written.append(table(tmp_path / "out.csv"))
    for before, after in zip(*written, strict=True):
        assert after["class"] == before["class"]
        assert float(after["confidence"]) == pytest.approx(float(before["confidence"]), abs=2e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r": cannot be read \(No such file or directory\); or say train$"),
        ("", " line 1: must be class,frequency$"),
        ("name,count\n", " line 1: must be class,frequency$"),
        ("class,frequency\nzebra,1\n", " line 2: the model has no class 'zebra'$"),
        ("class,frequency\nant,1\nant,2\n", " line 3: 'ant' is there twice$"),
        ("class,frequency\nant\n", " line 2: must have a class and its frequency$"),
        *(
            (f"class,frequency\nant,{wrong}\n", " line 2: must be a number above 0")
            for wrong in (0, -1, "x", "nan", "inf")
        ),
        ("class,frequency\nant,1\n", ": lacks 'bee, a worker': every class of the model must have a line$"),
        ('class,frequency\n"ant,1\n', r": must be CSV in UTF-8 \("),
        ("class,frequency\ndög,1\n", r": must be CSV in UTF-8 \("),
    ],
)
def test_what_is_wrong_with_frequencies_is_one_line(text, says, tmp_path, model, pictures, monkeypatch):
    path = tmp_path / "often.csv"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"^--frequencies {path}{says}") as caught:
        run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", "--frequencies", path, pictures)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_frequencies_may_lie_far_apart_begin_with_a_byte_order_mark_and_end_in_an_empty_line(
    tmp_path, model, pictures, monkeypatch
):
    path = frequency_file(tmp_path / "often.csv", 1e40, 1e-50, 1, 1)
    path.write_text(f"\ufeff{path.read_text()}\n")
    run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", "--frequencies", path, pictures)
    assert {(row["class"], row["confidence"]) for row in table(tmp_path / "out.csv")} == {(NAMES[0], "1.000000")}


def test_predictions_do_not_take_the_place_of_the_frequencies(tmp_path, model, pictures, monkeypatch):
    path = frequency_file(tmp_path / "often.csv", 1, 1, 1, 1)
    with pytest.raises(UserError, match="is one of the files to read: must be another file"):
        run(monkeypatch, "--model", model, "--out", path, "--frequencies", path, pictures)


def test_a_name_of_two_classes_has_no_frequency(tmp_path):
    with pytest.raises(UserError, match=r"two classes of the model have one name: only `train` can be given$"):
        read_frequencies(frequency_file(tmp_path / "often.csv", 1, 1, 1, 1), ["crane", "crane"])


@pytest.mark.parametrize("top", [("--top", 99), ()])
def test_top_is_at_most_every_class_and_files_count_once(top, tmp_path, model, pictures, monkeypatch):
    file = sorted(pictures.rglob("*.png"))[0]
    run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", *top, file, pictures / "0", file)
    rows = table(tmp_path / "out.csv")
    assert len(rows) == 10
    assert sum(float(rows[0][f"confidence{rank}"]) for rank in ("", "_2", "_3", "_4")) == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("model")
def test_bad_images_are_named_and_the_others_are_predicted(tmp_path, pictures):
    (pictures / "0/torn.PNG").write_bytes((pictures / "0/00.png").read_bytes()[:60])
    (pictures / "notes.txt").write_text("no image, and not looked at")
    (pictures / "0/._00.png").write_text("what some systems leave behind")
    (tmp_path / "elsewhere").mkdir()
    ran = call("--model", "../model", "../pictures", "none.jpg", "--device", "cpu", cwd=tmp_path / "elsewhere")
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines[:2]] == [["error", "../pictures/0/torn.PNG"], ["error", "none.jpg"]]
    assert lines[2:] == ["error: 2 of 32 files could not be read as images; they are named above"]
    assert ran.stdout == "predictions.csv: 30 images\n"
    assert len(table(tmp_path / "elsewhere/predictions.csv")) == 30


@pytest.fixture
def locked(pictures, monkeypatch) -> Path:
    """A folder of images that cannot be listed; permissions do not bind root, who may run the tests."""
    scandir, folder = os.scandir, pictures / "1"

    def refuse(path="."):
        if Path(os.fsdecode(path)) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return folder


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_predicted(
    tmp_path, model, pictures, locked, monkeypatch, capsys
):
    out = tmp_path / "out.csv"
    with pytest.raises(UserError, match=r"^1 of the folders could not be read; they are named above$"):
        run(monkeypatch, "--model", model, "--out", out, pictures, locked, pictures)
    said = capsys.readouterr()
    assert said.err == f"error: {locked}: cannot be read (Permission denied)\n"
    assert said.out == f"{out}: 20 images\n"
    assert {Path(row["file"]).parent.name for row in table(out)} == {"0", "2"}
    with pytest.raises(UserError, match=r"^1 of 21 files could not be read as images and 1 of the folders could not"):
        run(monkeypatch, "--model", model, "--out", out, pictures, "none.jpg")
    assert len(table(out)) == 20


def test_when_no_folder_can_be_read_nothing_is_written(tmp_path, model, locked, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"^no images in the folders that could be read: .*out\.csv is not written$"):
        run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", locked)
    assert capsys.readouterr().err == f"error: {locked}: cannot be read (Permission denied)\n"
    assert not (tmp_path / "out.csv").exists()


def test_files_in_a_folder_that_can_be_listed_but_not_entered_are_named(tmp_path, model, pictures, monkeypatch, capsys):
    stat, folder = Path.stat, pictures / "1"

    def refuse(path, **more):
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", refuse)
    for _ in range(2):  # the second time there is a file of that name, to compare with the images
        with pytest.raises(UserError, match=r"^11 of 31 files could not be read as images"):
            run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", pictures, folder / "none.jpg")
        assert capsys.readouterr().err.count(": cannot be read (Permission denied)\n") == 11
        assert len(table(tmp_path / "out.csv")) == 20


def test_what_is_found_in_folders(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/a/1.JPG", "b/.thumbs/3.gif", "b/.4.png", "b/notes.txt", "b.png", "b/x.png/5.tif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in/folder").symlink_to(tmp_path / "in/b")
    (tmp_path / "in/file.png").symlink_to(tmp_path / "in/b/2.png")
    (tmp_path / "in/nothing.png").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "in/pipe.png")
    monkeypatch.chdir(tmp_path / "in")
    found = ["b/2.png", "b/a/1.JPG", "b/x.png/5.tif", "b.png", "file.png", "nothing.png", "pipe.png"]
    assert predict.find([Path(), Path("b")]) == ([Path(name) for name in found], [])
    assert predict.find([Path("b/a"), Path("folder"), Path("folder/2.png")])[0] == [
        Path(name) for name in ("b/a/1.JPG", "folder/2.png", "folder/a/1.JPG", "folder/x.png/5.tif")
    ]


@pytest.mark.parametrize("option", ["--top", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_a_number_that_must_be_positive_is_told_so(option, value, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--model", "model", option, value, "a.png")
    assert ended.value.code == 2
    said = (
        f"error: argument {option}: must be a whole number of 1 or more, got {value!r}: see python -m tailcal.predict"
    )
    assert capsys.readouterr().err == f"{said} --help\n"


def test_a_batch_is_never_larger_than_what_there_is(tmp_path, model, pictures, monkeypatch):
    run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", "--batch-size", 10**30, pictures)
    assert len(table(tmp_path / "out.csv")) == 30


def test_too_little_memory_is_one_line_and_writes_nothing(tmp_path, model, pictures, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")

    monkeypatch.setattr(Predictor, "forward", forward)
    with pytest.raises(UserError) as error:
        run(monkeypatch, "--model", model, "--out", tmp_path / "new/out.csv", pictures)
    assert str(error.value) == ("there is not enough memory: use a smaller --batch-size (CUDA out of memory.)")
    assert not list((tmp_path / "new").iterdir())


def test_a_model_that_gives_no_numbers_writes_nothing(tmp_path, model, pictures, monkeypatch):
    card = model / "model.json"
    card.write_bytes(change(fitted={"temperature": 1e-320})(card.read_bytes()))
    with pytest.raises(UserError, match=r"the model's probabilities are no finite numbers: export the model again"):
        run(monkeypatch, "--model", model, "--out", tmp_path / "new/out.csv", pictures)
    assert not list((tmp_path / "new").iterdir())


def test_a_model_that_gives_no_numbers_for_some_images_writes_nothing(tmp_path, model, pictures, monkeypatch):
    """Its temperature is so small that float32 has no room for what it makes of the largest logits."""
    cell = CellSeed(dataset="made_up", representation="ce", classifier="joint", seed=0)
    highest = saved(tmp_path, cell)["test_logits"].max(axis=1)
    card = model / "model.json"
    fitted = {"temperature": float(np.median(highest) / np.finfo(np.float32).max)}
    card.write_bytes(change(fitted=fitted)(card.read_bytes()))
    with torch.inference_mode():
        _, rebuilt = exported.load(model)
        images = np.load(tmp_path / paths.longtail("made_up") / "test_images.npy")
        finite = rebuilt(torch.from_numpy(images)).isfinite()
    assert finite.any()
    assert not finite.all()
    with pytest.raises(UserError, match=r"the model's probabilities are no finite numbers"):
        run(monkeypatch, "--model", model, "--out", tmp_path / "new/out.csv", pictures)
    assert not list((tmp_path / "new").iterdir())


def test_a_card_that_is_no_file_is_one_line(model, pictures, monkeypatch):
    """A pipe would keep its reader waiting for ever."""
    (model / "model.json").unlink()
    os.mkfifo(model / "model.json")
    with pytest.raises(UserError, match=r"model\.json is not a file: export the model again"):
        run(monkeypatch, "--model", model, pictures)


def test_a_file_in_the_place_of_a_model_is_one_line(model):
    with pytest.raises(UserError, match=r"model\.json/model\.json is missing: --model must be a folder made by"):
        exported.load(model / "model.json")


def test_when_no_image_can_be_read_nothing_is_written(tmp_path, model, monkeypatch):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    with pytest.raises(UserError, match="none of the 1 files"):
        run(monkeypatch, "--model", model, "--out", tmp_path / "out.csv", bad)
    assert not (tmp_path / "out.csv").exists()


def test_a_folder_without_images_is_one_line(tmp_path, model, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images in this folder"):
        run(monkeypatch, "--model", model, tmp_path / "empty")


def test_a_file_name_that_is_no_text_keeps_its_bytes():
    name = b"caf\xe9,1.png"
    assert predict.line([name.decode("utf-8", "surrogateescape"), "x"]) == b'"caf\xe9,1.png",x\n'


def change(**changed):
    return lambda content: json.dumps(json.loads(content) | changed).encode()


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("model.json", None, "--model must be a folder made by"),
        ("model.json", lambda content: content[:50], "model.json is damaged"),
        ("model.json", lambda content: b"\xff" + content, "model.json is damaged"),
        ("model.json", lambda _: b"[]", "model.json: "),
        ("model.json", change(format=2), "model.json: format: "),
        ("model.json", change(rule="none"), "rule none does not go with"),
        ("model.json", change(fitted={}), "rule temperature does not go with the fitted numbers []"),
        ("model.json", change(class_names=["a"], train_counts=[1]), "model.json: class_names: "),
        ("model.json", change(image_size=0), "model.json: image_size: "),
        (
            "model.json",
            change(channels=3, network={"backbone": "resnet8", "head": "linear", "channels": 3, "num_classes": 4}),
            "augmentation.mean has 1 values: must be 3",
        ),
        ("model.json", change(fitted={"temperature": 0.0}), "model.json: fitted.temperature: "),
        ("model.json", change(class_names=[*"abc", "\ud800"]), r"model.json: class_names.3 is '\ud800': must be text"),
        ("model.json", change(measured=None), "model.json: measured: "),
        ("model.json", change(train_counts=[1, 2]), "4 class_names, but 2 train_counts"),
        ("model.json", change(train_counts=[9, 6, 4, 0]), "model.json: train_counts.3: "),
        ("model.json", change(classifier="os"), "no classifier 'os'"),
        ("model.json", change(settings={"tau": 1.0}), "model.json: settings.tau: unknown key"),
        ("model.json", change(network={"backbone": "nope"}), "has no network"),
        ("model.safetensors", None, "model.safetensors is missing: export the model again"),
        ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "model.safetensors is damaged"),
        ("model.safetensors", lambda content: content[:1000], "model.safetensors is damaged"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(model, name, edit, says):
    path = model / name
    path.unlink() if edit is None else path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(UserError) as error:
        exported.load(model)
    assert "\n" not in str(error.value)
    assert says in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("module", [exporting, predict])
def test_the_commands_explain_themselves(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert f"{module.__name__} --" in capsys.readouterr().out


def test_neither_needs_what_only_linux_has(tmp_path, model, pictures):
    (tmp_path / ".out.csv.1a2b3c4d.part").touch()
    code = (
        "import os, sys; sys.modules['fcntl'] = None\n"
        "from tailcal import export, predict; del os.getuid, os.sched_getaffinity\n"
        "predict.main(); sys.exit('tailcal.pack' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--model", model, "--out", "out.csv", pictures]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert len(table(tmp_path / "out.csv")) == 30
    assert not (tmp_path / ".out.csv.1a2b3c4d.part").exists()


def test_a_mistake_at_the_command_line_is_one_line(tmp_path):
    cell = ("--dataset", "made_up", "--representation", "ce", "--classifier", "joint")
    ran = call(*cell, "--out", "model", cwd=tmp_path, module="export")
    assert ran.returncode == 1
    assert ran.stderr == (
        f"error: {tmp_path} is not a project in which `dvc repro` has run (no data/predictions there): run this from "
        "the project's root, or give --root\n"
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here, asking for a CUDA device is no mistake")
def test_a_device_that_is_not_there_is_one_line():
    assert [train.choose_device(name, "--device").type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match=r"^--device is cuda, but torch sees no CUDA device here; use auto or cpu$"):
        train.choose_device("cuda", "--device")


@pytest.mark.usefixtures("no_onnx")
def test_the_export_command_says_what_it_made(tmp_path, monkeypatch, capsys):
    def said(*more: str) -> list[str]:
        run_export(monkeypatch, tmp_path, "--out", tmp_path / "model", *more)
        told = capsys.readouterr()
        warned[:] = [line for line in told.err.splitlines() if line.startswith("warning: ")]
        return told.out.splitlines()

    warned: list[str] = []
    make_cell(tmp_path, holdout=60)
    made, measured = said()
    assert "made_up/ce/joint seed 0, calibrated with temperature" in made
    assert made.endswith(", fitted on 60 held-out images")
    number = r"\d+\.\d %"
    chance = rf"\(30 images; 15 bins; chance alone would give an ECE of {number}\)"
    assert re.fullmatch(rf"test: top-1 {number}, ECE {number} as trained, {number} as exported {chance}", measured)
    assert not [line for line in warned if "too few to calibrate" in line]
    made, measured = said("--rule", "none")
    assert made.endswith("seed 0, not calibrated (rule none)")
    assert re.fullmatch(rf"test: top-1 {number}, ECE {number} {chance}", measured)
    assert not warned
    make_cell(tmp_path)
    said()
    assert "warning: 40 held-out images are too few to calibrate well: raise holdout_per_class" in warned
    make_cell(tmp_path, holdout=0)
    assert "not calibrated: made_up holds no images out" in said()[0]
    assert not warned


@pytest.mark.usefixtures("no_onnx")
@pytest.mark.parametrize("size", [20, 16])
def test_large_images_are_cropped_as_in_the_evaluation(size, tmp_path):
    """What is read is as large as the stored images; the network then takes what `augment.plain` makes of it."""
    colours = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    large = {"kind": "resized_crop", "size": 16, "min_area": 0.1, "flip": True, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
    cell = make_cell(tmp_path, size=size, augmentation=large | colours)
    card = export(cell, tmp_path / "model", root=tmp_path)
    assert (card.image_size, card.channels) == (size, 3)
    smaller = tmp_path / "smaller"
    shutil.copytree(tmp_path / "model", smaller)
    (smaller / "model.json").write_bytes(change(image_size=15)((smaller / "model.json").read_bytes()))
    with pytest.raises(UserError, match=r"model\.json: augmentation\.size must be at most image_size, 15"):
        exported.load(smaller)
    pixels = torch.from_numpy(np.load(tmp_path / paths.longtail("made_up") / "test_images.npy"))
    with torch.no_grad():
        found = exported.load(tmp_path / "model")[1](pixels)
    expected = softmax(saved(tmp_path, cell)["test_logits"] / card.temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
