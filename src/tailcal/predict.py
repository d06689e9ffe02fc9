"""Classes and calibrated confidences for image files, from a model folder that `python -m tailcal.export` made.

    python -m tailcal.predict --model model/ --out predictions.csv photographs/ another.jpg

Folders are searched to any depth. The CSV has one row per image: file, class, confidence, then the next classes and
theirs, as far as --top asks. The confidences are for classes that are equally frequent; --frequencies says how often
each class really occurs. A file that is no readable image, or a folder that cannot be read, is named on stderr, all
others are still predicted, and the exit code is then 1. Nothing in a model folder is executed: it holds numbers and
names.
"""

import argparse
import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tailcal import errors, files
from tailcal.errors import UserError
from tailcal.exported import AGAIN, CARD, ONNX, WEIGHTS, Card, Predictor, load
from tailcal.images import EXTENSIONS, read_image, shown
from tailcal.prior import adjust_to_prior, read_frequencies
from tailcal.train import choose_device, enough_memory
from tailcal.user_files import alone, place


def find(arguments: Iterable[Path]) -> tuple[list[Path], list[UserError]]:
    """The files to predict, each once: those named, and in folders, to any depth and in order, what looks like images.

    Hidden files and folders in folders are left out, and links to folders in them are not followed. Also returns what
    is wrong with the folders that cannot be read. Raises UserError for a folder without any image.
    """
    found: dict[Path, None] = {}
    closed: dict[str, UserError] = {}
    for argument in arguments:
        if not os.path.isdir(argument):  # noqa: PTH112 (unlike Path.is_dir, False for what cannot be seen)
            found[argument] = None
            continue
        unread: list[OSError] = []
        inside = []
        for folder, below, names in os.walk(argument, onerror=unread.append):
            below[:] = [name for name in below if not name.startswith(".")]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            inside += [path for path in paths if path.suffix.lower() in EXTENSIONS]
        if not inside and not unread:
            raise UserError(
                f"{shown(argument)}: no images in this folder: {' '.join(sorted(EXTENSIONS))} are looked for"
            )
        found |= dict.fromkeys(sorted(inside))
        closed |= {
            error.filename: UserError(f"{shown(error.filename)}: cannot be read ({error.strerror})") for error in unread
        }
    return list(found), list(closed.values())


def read(paths: list[Path], card: Card, batch_size: int) -> Iterator[list[tuple[Path, np.ndarray | UserError]]]:
    """The images, uint8 [S, S, C], in order and in batches; the error in place of one that cannot be read.

    The next batch is read, by threads, while the caller works on the one before.
    """

    def one(path: Path) -> tuple[Path, np.ndarray | UserError]:
        try:
            return path, read_image(path, card.image_size, card.channels)
        except UserError as error:
            return path, error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        todo = iter(paths)

        def start() -> list:
            return [readers.submit(one, path) for path in islice(todo, min(batch_size, len(paths)))]

        current = start()
        while current:
            ahead = start()
            yield [reading.result() for reading in current]
            current = ahead


def rows(names: list[str], paths: list[Path], probabilities: Tensor, top: int) -> Iterator[list[str]]:
    """The lines of the CSV for probabilities float [N, K] of N files."""
    best = probabilities.cpu().topk(top, dim=1)
    for path, values, classes in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True):
        ranked = zip(classes, values, strict=True)
        yield [str(path), *(cell for k, value in ranked for cell in (names[k], f"{value:.6f}"))]


def line(cells: list[str]) -> bytes:
    """One line of CSV. A file name that is no valid text keeps the bytes it has on disk."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode(errors="surrogateescape")


@torch.inference_mode()
def predict(
    card: Card,
    model: Predictor,
    paths: list[Path],
    out: Path,
    top: int,
    batch_size: int,
    device: torch.device,
    frequencies: list[float] | None = None,
) -> list[UserError]:
    """Predict the files and write the CSV, whole or not at all; returns what was wrong with the unreadable ones.

    frequencies: of each class where the model is used; None takes the probabilities as they are.
    Raises UserError when no file at all could be read, when memory is too small for a batch, and when what the model
    says is no number; nothing is written then.
    """
    top = min(top, len(card.class_names))
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    wrong = []
    with (
        enough_memory("use a smaller --batch-size"),
        files.atomic(out) as stream,
        tqdm(total=len(paths), desc="predict", unit="image", disable=None) as bar,
    ):
        model = model.to(device)
        stream.write(line(["file", *(f"{kind}{rank}" for rank in ranks for kind in ("class", "confidence"))]))
        for batch in read(paths, card, batch_size):
            good = [(path, image) for path, image in batch if not isinstance(image, UserError)]
            for _, problem in batch:
                if isinstance(problem, UserError):
                    wrong.append(problem)
                    tqdm.write(f"error: {problem}", file=sys.stderr)
            if good:
                images = torch.from_numpy(np.stack([image for _, image in good])).to(device)
                probabilities = model(images)
                if frequencies:
                    probabilities = adjust_to_prior(
                        probabilities, torch.tensor(frequencies, dtype=torch.float64, device=device)
                    )
                if not probabilities.isfinite().all():
                    raise UserError(f"the model's probabilities are no finite numbers: {AGAIN}")
                for cells in rows(card.class_names, [path for path, _ in good], probabilities, top):
                    stream.write(line(cells))
            bar.update(len(batch))
        if len(wrong) == len(paths):
            raise UserError(f"none of the {len(paths)} files could be read as an image: {out} is not written")
    return wrong


def same(one: Path, other: Path) -> bool:
    """Whether both paths lead to one file, as far as can be seen."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is missing, or in a folder without permission
        return False


def check_out(out: Path, read: list[Path], model: Path) -> None:
    """Raise UserError when the CSV would take the place of a file that is read, of one of the model, or of no regular
    file.

    read: the images, and the file of frequencies; model: the exported folder, in which the names of its files are not
    free even where there is no such file.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out}: is {'a folder' if out.is_dir() else 'no regular file'}: must be a file to write")
    if out.exists() and any(same(out, path) for path in read):
        raise UserError(f"--out {out}: is one of the files to read: must be another file")
    own = (CARD, WEIGHTS, ONNX)
    if any(same(out, model / name) for name in own) or (out.name in own and same(out.parent, model)):
        raise UserError(f"--out {out}: is a file of the model: must be another file")


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse. Raises ArgumentTypeError for any other text."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")


def main() -> None:
    summary, _, details = __doc__.partition("\n\n")
    parser = errors.CommandLine(
        "tailcal.predict", summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=place, metavar="FILE_OR_FOLDER", help="images, or folders of them")
    parser.add_argument("--model", required=True, type=place, help="the exported folder")
    parser.add_argument("--out", type=place, default=Path("predictions.csv"), help="CSV to write (%(default)s)")
    parser.add_argument("--top", type=positive, default=5, help="how many classes an image gets (%(default)s, or all)")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time (%(default)s)")
    parser.add_argument(
        "--frequencies",
        metavar="FILE",
        help="how often each class occurs where the images come from: a CSV with the columns class and frequency "
        "(counts or shares), or `train` for as often as in training (as if all were equally frequent); for models that "
        "treat classes alike, such as balanced_softmax or a second stage with class-balanced sampling",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    args = parser.parse_args()

    device = choose_device(args.device, "--device")
    torch.backends.cudnn.allow_tf32 = False  # the temperature was fitted to logits of full precision
    card, model = load(args.model)
    frequencies = None
    if args.frequencies:
        as_in_training = args.frequencies == "train"
        frequencies = (
            card.train_counts if as_in_training else read_frequencies(Path(args.frequencies), card.class_names)
        )
    paths, closed = find(args.images)
    check_out(args.out, paths + ([Path(args.frequencies)] if args.frequencies else []), args.model)
    for problem in closed:
        print(f"error: {problem}", file=sys.stderr)
    if not paths:
        raise UserError(f"no images in the folders that could be read: {args.out} is not written")
    with alone(args.out):
        wrong = predict(card, model, paths, args.out, args.top, args.batch_size, device, frequencies)
    print(f"{args.out}: {len(paths) - len(wrong)} images")
    failed = [f"{len(wrong)} of {len(paths)} files could not be read as images"] if wrong else []
    if closed:
        failed.append(f"{len(closed)} of the folders could not be read")
    if failed:
        raise UserError(f"{' and '.join(failed)}; they are named above")


if __name__ == "__main__":
    errors.run(main)
