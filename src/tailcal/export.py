"""Make a folder of a finished cell that classifies images anywhere: weights, ONNX and a description.

    python -m tailcal.export --dataset D --representation R --classifier C --out model/

model.safetensors  the weights, for `python -m tailcal.predict`
model.onnx         for anything else: `images` uint8 [N, H, W, C] in, `probabilities` float32 [N, K] out, with
                   normalisation and calibration inside; N is free. Needs the packages onnx and onnxscript here.
model.json         classes and their training counts, image size, network, calibration, accuracy and ECE on the test
                   split, versions, provenance

With --rule temperature (the default where the data set holds images out) the logits are divided by the temperature that
suits the held-out logits of that seed, so that the confidence is a calibrated one. Only rules that act on one image at
a time can be exported: pn_transductive, say, needs all test images together.
"""

import argparse
import contextlib
import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import tailcal
from tailcal import errors, files, lineage, models, posthoc, predictions, provenance, settings, splits
from tailcal.errors import UserError
from tailcal.exported import AGAIN, CARD, ONNX, WEIGHTS, Card, CellSeed, MeasuredModel, Predictor
from tailcal.method import set_up
from tailcal.metrics.accuracy import top1
from tailcal.metrics.calibration import ece, ece_floor
from tailcal.metrics.scores import log_softmax, softmax
from tailcal.models import Network
from tailcal.params import PARAMS, Augmentation, load, recorded, validate
from tailcal.user_files import alone, place
from tailcal.weights import load_weights, save_weights

CHECKED = 16  # images whose logits must be those that were saved when the cell was made
TOLERANCE = 0.01  # of the largest of these logits; GPUs and CPUs differ by far less, another network by far more
FEW = 50  # held-out images; a temperature fitted on fewer is a matter of chance
SURE = 2.0  # standard errors from which on a difference is called one


class ClassifierParams(lineage.Named):
    """What stage 2 trained by."""

    method: str
    settings: dict[str, Any]
    augmentation: Augmentation


class ExportedParams(lineage.CellParams):
    """The parameters of a cell."""

    classifier: ClassifierParams


class Predicted(lineage.Predicted):
    """The provenance of predictions."""

    params: ExportedParams


def require_finished(cell: Path, root: Path) -> None:
    """Raise UserError naming the cells below `root` that are finished, when the one with the predictions `cell` is
    not."""
    made = cell / "provenance.json"
    folder = root / "data/predictions"
    if not folder.is_dir():
        raise UserError(
            f"{root.absolute()} is not a project in which `dvc repro` has run (no data/predictions there): run this "
            "from the project's root, or give --root"
        )
    if not made.is_file():
        finished = ", ".join(str(path.parent.relative_to(folder)) for path in sorted(folder.glob("*/*/*/" + made.name)))
        raise UserError(
            f"{cell.relative_to(folder)} is not finished here: put it on the grid of {PARAMS} and run "
            f"`dvc repro`; finished are: {finished or 'none'}"
        )


def check_out(out: Path, cell: CellSeed) -> None:
    """Raise UserError unless `out` is free for this model: absent, empty, or what an export of the same cell left."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: must be a folder to make")
    if (out / CARD).is_file():
        card = files.read_json(out / CARD, AGAIN)
        if not isinstance(card, dict) or card.get("cell") != cell.model_dump():
            raise UserError(f"--out {out}: holds the model of another cell or seed: choose another folder")
    elif out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - {ONNX, WEIGHTS})):
        raise UserError(f"--out {out}: holds another file, {others[0]}: choose a folder of its own")


def check_images(images: np.ndarray, path: Path) -> None:
    """Raise UserError naming the file of images [N, H, W, C] that no exported model takes."""
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
        raise UserError(
            f"{path} holds images {list(images.shape)}: only square ones of 1 or 3 channels can be exported"
        )


def fit_temperature(holdout: posthoc.Holdout, path: Path) -> float:
    """The temperature that suits the hold-out's logits. Raises UserError naming their file."""
    try:
        return posthoc.fit_rule("temperature", posthoc.NoSettings(), holdout).numbers["temperature"]
    except ValueError as error:
        raise UserError(
            f"{path}: the held-out predictions are of no use ({error}): delete it and {files.REPRO}"
        ) from None


def measure(saved: predictions.Predictions, temperature: float, trained_on: int) -> MeasuredModel:
    """What the saved predictions say of the test split, as they are and with the logits divided by `temperature`.

    trained_on: how many test images are in the training split too.
    """
    logits, labels = saved.test_logits, saved.test_labels
    probabilities = softmax(logits / temperature)
    before_N, after_N = (-log_softmax(logits / T)[np.arange(len(labels)), labels] for T in (1.0, temperature))
    return MeasuredModel(
        holdout_images=len(saved.holdout_labels),
        test_images=len(labels),
        trained_on=trained_on,
        top1=top1(logits, labels),
        ece_as_trained=ece(softmax(logits), labels),
        ece=ece(probabilities, labels),
        ece_floor=ece_floor(probabilities),
        nll_as_trained=float(before_N.mean()),
        nll=float(after_N.mean()),
        nll_error=float((after_N - before_N).std() / math.sqrt(len(labels))),
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the block with the KeyboardInterrupt that came while it ran, whatever the block has made of that.

    torch's exporter looks up `torch._dynamo.exc.UserError` in an `except` clause: while that module is being imported,
    an interrupt becomes an AttributeError there, and then an error of the exporter. In a callback of Python's import
    locks it is lost altogether.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # interrupts are ignored, end the process at once, or come to another thread
        return
    came = []

    def take_down(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler(number, frame)

    signal.signal(signal.SIGINT, take_down)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            raise KeyboardInterrupt


def to_onnx(model: Predictor, size: int, channels: int) -> bytes:
    """The whole of it, from pixels to probabilities, as an ONNX file for batches of any size.

    Raises UserError when the packages are not there, or torch cannot translate the network.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the package {error.name} is not installed: pip install onnx onnxscript") from None
    from torch.onnx.errors import OnnxExporterError

    example = torch.zeros(2, size, size, channels, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__:  # the first says what is wrong, those around it where to ask
            cause = cause.__cause__
        raise UserError(f"torch cannot translate this network ({str(cause).strip().splitlines()[0]})") from None
    proto = program.model_proto
    for node in proto.graph.node:  # where in our source each comes from: paths of this machine, and no use elsewhere
        node.ClearField("metadata_props")
    return proto.SerializeToString()


@dataclass(frozen=True)
class Finished:
    """One seed's network of a finished cell, with the predictions that the pipeline saved of it, and the files of both,
    `weights` and `logits`. `images` are those of `split`."""

    meta: splits.Meta
    record: dict[str, Any]  # of the network
    trained: ClassifierParams
    provenance: dict[str, Any]
    network: Network
    images: np.ndarray
    saved: predictions.Predictions
    weights: Path
    logits: Path

    @property
    def split(self) -> str:
        """The hold-out, or the test split where there is none."""
        return "holdout" if len(self.saved.holdout_labels) else "test"


def read_finished(cell: CellSeed, root: Path) -> Finished:
    """The network of a finished cell below `root`. Raises UserError naming the file that is missing, damaged or not of
    this cell."""
    where = f"{cell.dataset}/{cell.representation}"
    longtail = root / f"data/lt/{cell.dataset}"
    weights = root / f"data/classifiers/{where}/{cell.classifier}/seed{cell.seed}.safetensors"
    predicted = root / f"data/predictions/{where}/{cell.classifier}"
    stage1 = root / f"data/representations/{where}"
    made = predicted / "provenance.json"

    meta = splits.read_meta(longtail)
    network_record = lineage.read_represented(stage1).network
    origin = files.read_json(made)
    record = recorded(Predicted, origin, made)
    trained, checksums = record.params.classifier, record.checksums
    splits.require_raw(longtail, meta, root / f"data/raw/{cell.dataset}")
    lineage.require_images(record, predicted, cell.cell, meta.checksums, longtail)
    lineage.require_cell(record, predicted, cell.cell, stage1)
    logits = predicted / f"seed{cell.seed}.npz"
    if logits.name not in checksums:
        seeds = ", ".join(
            sorted(name.removeprefix("seed").removesuffix(".npz") for name in checksums if ".npz" in name)
        )
        raise UserError(f"--seed {cell.seed}: {predicted.relative_to(root)} has the seeds {seeds}")
    saved = predictions.read(logits, checksums[logits.name], len(meta.class_names))

    body = models.rebuild(network_record, stage1 / "provenance.json")
    network = set_up(body, trained.method, trained.settings, meta.train_counts, made)
    load_weights(network, weights, checksums.get(weights.name))
    path = longtail / ("holdout_images.npy" if len(saved.holdout_labels) else "test_images.npy")
    files.verify(path, meta.checksums.get(path.name))
    images = files.read_array(path, mmap=True)
    check_images(images, path)
    return Finished(meta, network_record, trained, origin, network, images, saved, weights, logits)


@torch.inference_mode()
def check_logits(finished: Finished) -> None:
    """Compare the rebuilt network with the logits that the pipeline saved for its images.

    Raises UserError naming the weights when they differ: they are not those that were measured, or were made otherwise.
    """
    model = Predictor(finished.network, finished.trained.augmentation, 1.0)
    found = model.logits(torch.from_numpy(np.array(finished.images[:CHECKED]))).numpy()
    saved = getattr(finished.saved, f"{finished.split}_logits")[:CHECKED]
    if found.shape != saved.shape or not np.abs(found - saved).max() <= TOLERANCE * np.abs(saved).max():
        raise UserError(
            f"{finished.weights} does not give the logits that were saved with it: a file has changed since, or "
            f"the code has; delete it and {files.REPRO}"
        )


def outdated(cell: CellSeed, finished: Finished, root: Path) -> list[str]:
    """What the parameters below `root` say that the network was not trained by: a line for the first of it."""
    try:
        now = settings.of_cell(load(root / PARAMS), *cell.cell, root)
    except UserError:  # an exported cell need not be one that can be trained today
        return []
    found = itertools.islice(lineage.differences(finished.provenance["params"], now), 1)
    return [f"{lineage.unlike('the network', *each)}; exported is the network as it was trained" for each in found]


def describe(cell: CellSeed, finished: Finished, rule: str) -> Card:
    """The card of an export that is still to be written. `rule`: temperature or none. Raises UserError naming the file
    of the predictions that no temperature can be fitted on."""
    meta, trained, saved = finished.meta, finished.trained, finished.saved
    fitted, counts = {}, meta.train_counts
    if rule == "temperature":
        holdout = posthoc.Holdout(np.array(counts), saved.holdout_logits, saved.holdout_labels)
        fitted = {rule: fit_temperature(holdout, finished.logits)}
    described = {
        "format": 1,
        "class_names": meta.class_names,
        "train_counts": counts,
        "image_size": finished.images.shape[2],
        "channels": finished.images.shape[3],
        "augmentation": trained.augmentation,
        "network": finished.record,
        "classifier": trained.method,
        "settings": trained.settings,
        "rule": rule,
        "fitted": fitted,
        "cell": cell,
        "measured": measure(saved, fitted.get(rule, 1.0), meta.duplicates["test"]),
        "weights": "",
        "onnx": None,
        "versions": {"tailcal": tailcal.__version__, **provenance.versions()},
        "provenance": finished.provenance,
    }
    return validate(Card, described, "", finished.logits.with_name("provenance.json"))


def export(cell: CellSeed, out: Path, rule: str | None = None, root: Path = Path()) -> Card:
    """Write the folder `out` from the artefacts of a finished cell below `root`; model.json comes last.

    rule: temperature, none, or None for temperature where something is held out. Raises UserError as `read_finished`
    and `describe` do; nothing is written then.
    """
    require_finished((root / "data/predictions").joinpath(*cell.cell), root)
    check_out(out, cell)
    finished = read_finished(cell, root)
    for line in outdated(cell, finished, root):
        print(f"warning: {line}", file=sys.stderr)
    if rule == "temperature" and finished.split == "test":
        raise UserError(f"--rule temperature is fitted on held-out images, and {cell.dataset} holds none out: use none")
    card = describe(cell, finished, rule or ("temperature" if finished.split == "holdout" else "none"))
    check_logits(finished)
    try:
        with interruptible():
            onnx = to_onnx(
                Predictor(finished.network, card.augmentation, card.temperature), card.image_size, card.channels
            )
    except UserError as error:
        onnx = None
        print(f"{out / ONNX} is left out: {error}", file=sys.stderr)

    written = {"weights": save_weights(finished.network, out / WEIGHTS)}
    if onnx is None:
        (out / ONNX).unlink(missing_ok=True)  # of an earlier export
    else:
        files.write_bytes(out / ONNX, onnx)
        written["onnx"] = files.sha256(out / ONNX)
    card = card.model_copy(update=written)
    files.write_json(out / CARD, card.model_dump())
    return card


def percent(fraction: float) -> str:
    """As a number of per cent with one digit behind the point."""
    return f"{100 * fraction:.1f} %"


def result(measured: MeasuredModel, rule: str) -> str:
    """What the model does on the test split, in a line."""
    calibration = f"ECE {percent(measured.ece)}"
    if rule != "none":
        calibration = f"ECE {percent(measured.ece_as_trained)} as trained, {percent(measured.ece)} as exported"
    images = f"{measured.test_images:,} images"
    if measured.trained_on:
        images += f", of which {measured.trained_on:,} are in the training split too"
    return (
        f"test: top-1 {percent(measured.top1)}, {calibration} ({images}; 15 bins; chance alone would give an ECE of "
        f"{percent(measured.ece_floor)})"
    )


def doubts(card: Card) -> list[str]:
    """Reasons not to trust the calibration of a model that has just been exported, each a line."""
    measured = card.measured
    if card.rule == "none":
        return []
    found = []
    if posthoc.at_bound(card.temperature):
        found.append(
            f"the temperature ended at its bound, {card.temperature:.4g}: these logits say nothing, or are on a scale "
            "that is far from that of logits; look at the cell's accuracy and NLL"
        )
    if measured.holdout_images < FEW:
        found.append(
            f"{measured.holdout_images} held-out images are too few to calibrate well: raise holdout_per_class"
        )
    # Not by the ECE, which chance alone raises half the time where there is nothing to mend.
    if measured.nll - measured.nll_as_trained > SURE * measured.nll_error:
        found.append(
            f"on the test split the calibration made the NLL worse, {measured.nll:.3f} instead of "
            f"{measured.nll_as_trained:.3f}, by more than chance: the held-out images are too few, or unlike those of "
            "the test split"
        )
    return found


def main() -> None:
    summary, _, details = __doc__.partition("\n\n")
    parser = errors.CommandLine(
        "tailcal.export", summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--representation", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--seed", type=int, default=0, help="which of the cell's networks (%(default)s)")
    parser.add_argument(
        "--rule", choices=["temperature", "none"], help="calibration (temperature if there is a hold-out)"
    )
    parser.add_argument("--out", required=True, type=place, help="the folder to make, for instance model/")
    parser.add_argument("--root", type=place, default=Path(), help="the project's root (the current folder)")
    args = parser.parse_args()

    cell = CellSeed(
        dataset=args.dataset, representation=args.representation, classifier=args.classifier, seed=args.seed
    )
    with alone(*(args.out / name for name in (CARD, WEIGHTS, ONNX))):  # no others: the folder may be somebody else's
        card = export(cell, args.out, args.rule, args.root)
    if card.rule == "temperature":
        held_out = card.measured.holdout_images
        said = f"calibrated with temperature {card.temperature:.4g}, fitted on {held_out} held-out images"
    elif args.rule is None:
        said = f"not calibrated: {args.dataset} holds no images out to fit a temperature on (rule none)"
    else:
        said = "not calibrated (rule none)"
    for doubt in doubts(card):
        print(f"warning: {doubt}", file=sys.stderr)
    print(f"{args.out}: {cell.cell} seed {cell.seed}, {said}")
    print(result(card.measured, card.rule))


if __name__ == "__main__":
    errors.run(main)
