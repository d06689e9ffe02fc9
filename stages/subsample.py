"""Cut one data set's long-tailed training split, its hold-out and its test split: data/lt/<dataset>."""

import sys
from pathlib import Path

import numpy as np

from stages import paths
from tailcal import duplicates, errors, files, lock, longtail, params, rows, sources, splits
from tailcal.errors import UserError


def read_raw(folder: Path) -> tuple[splits.RawMeta, dict[str, np.ndarray]]:
    """meta.json and the four arrays (memory-mapped) of a raw folder.

    Raises UserError naming the file that is missing, is not as it was downloaded, or is not images or labels.
    """
    meta = splits.read_raw_meta(folder)
    arrays = {}
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        path = folder / f"{part}.npy"
        files.verify(path, meta.checksums.get(path.name), remove=folder)
        arrays[part] = files.read_array(path, mmap=True)
    class_names = meta.class_names
    for split in ("train", "test"):
        labels = arrays[f"{split}_labels"]
        splits.check(folder, split, arrays[f"{split}_images"], labels, len(class_names))
        counts = np.bincount(labels, minlength=len(class_names))
        if not counts.all():
            raise UserError(
                f"{folder}/{split}_labels.npy: {longtail.class_title(int(counts.argmin()), class_names)} "
                f"has no images in the {split} split: every class needs at least one"
            )
    return meta, arrays


def train_counts(available: np.ndarray, dataset: params.Dataset, class_names: list[str]) -> np.ndarray:
    """Training images to keep of each class, int64 [K]; `available` (int [K]) counts those of the source.

    Raises UserError naming the key of `dataset` that asks for more than there is.
    """
    left = available - dataset.holdout_per_class
    if left.min() < 1:
        k = int(left.argmin())
        raise UserError(
            f"{dataset.key('holdout_per_class')} is {dataset.holdout_per_class}: "
            f"{longtail.class_title(k, class_names)} has {available[k]} images, "
            f"so must be at most {available[k] - 1}"
        )
    imbalance = dataset.imbalance
    if isinstance(imbalance, params.Natural):
        return left
    rarest = int(left.min())
    try:
        n_max = imbalance.largest or rarest
        counts = longtail.class_counts(n_max, len(left), imbalance.factor, imbalance.profile, class_names)
    except UserError as error:
        cut = imbalance.largest is None and rarest < left.max()
        why = f"; the largest is cut to the {rarest} of the rarest unless imbalance.largest says more" if cut else ""
        raise UserError(f"{dataset.key('imbalance')}: {error}{why}") from None
    if (counts > left).any():
        k = int(np.argmax(counts > left))
        raise UserError(
            f"{dataset.key('imbalance.largest')} is {imbalance.largest}: {longtail.class_title(k, class_names)} would "
            f"have {counts[k]} images, and there are {left[k]}: must be smaller, or the factor larger"
        )
    return counts


def warn_of_holdout(dataset: params.Dataset, available: np.ndarray, class_names: list[str]) -> None:
    """One line on stderr when the hold-out takes half or more of a class; `available` (int [K]) counts its images."""
    k, held_out = int(available.argmin()), dataset.holdout_per_class
    if 2 * held_out >= available[k]:
        print(
            f"warning: {dataset.key('holdout_per_class')} is {held_out}: it takes {held_out} of the {available[k]} "
            f"images of {longtail.class_title(k, class_names)}, the rarest, and leaves {available[k] - held_out} to "
            "train on; fewer, or 0, would leave more",
            file=sys.stderr,
        )


def warn_of_duplicates(name: str, found: dict[str, int]) -> None:
    """A line on stderr for each kind of `duplicates.TWICE` that there is."""
    for which, what in duplicates.TWICE.items():
        if found[which]:
            print(f"warning: {name}: {found[which]:,} {what}", file=sys.stderr)


def main() -> None:
    parser = errors.CommandLine("stages.subsample", __doc__)
    parser.add_argument("--dataset", required=True)
    name = parser.parse_args().dataset
    dataset = params.dataset(params.load(), name)
    with lock.alone(paths.LOCKS, paths.longtail(name)):
        subsample(name, dataset)


def subsample(name: str, dataset: params.Dataset) -> None:
    """Check the raw arrays, choose the images, write the three splits and meta.json."""
    meta, raw = read_raw(paths.raw(name))
    sources.require(dataset, meta.source, paths.raw(name))
    class_names = meta.class_names

    splits.check_augmentation(dataset, *raw["train_images"].shape[1:])
    available = np.bincount(raw["train_labels"], minlength=len(class_names))
    counts = train_counts(available, dataset, class_names)
    warn_of_holdout(dataset, available, class_names)
    train, holdout = longtail.subset_indices(
        raw["train_labels"], counts, dataset.imbalance.seed, dataset.holdout_per_class, class_names
    )
    chosen = {
        "train": ("train", train),
        "holdout": ("train", holdout),
        "test": ("test", np.arange(len(raw["test_labels"]))),
    }
    folder = paths.longtail(name)
    checksums, labels = {}, {}
    for split, (source, positions) in chosen.items():
        rows.write_rows(folder / f"{split}_images.npy", raw[f"{source}_images"], positions)
        labels[split] = raw[f"{source}_labels"][positions]
        files.write_array(folder / f"{split}_labels.npy", labels[split])
        for path in (folder / f"{split}_images.npy", folder / f"{split}_labels.npy"):
            checksums[path.name] = files.sha256(path)
    digests = {
        split: duplicates.digests(files.read_array(folder / f"{split}_images.npy", mmap=True)) for split in chosen
    }
    twice = duplicates.count(train_labels=labels["train"], **digests)
    warn_of_duplicates(name, twice)
    files.write_json(
        folder / "meta.json",
        {
            "class_names": class_names,
            "train_counts": counts.tolist(),
            "holdout_counts": np.bincount(labels["holdout"], minlength=len(class_names)).tolist(),
            "test_counts": np.bincount(labels["test"], minlength=len(class_names)).tolist(),
            "skipped": meta.skipped,
            "duplicates": twice,
            "n_max": int(counts.max()),
            "imbalance": dataset.imbalance.record(),
            "holdout_per_class": dataset.holdout_per_class,
            "measured_factor": float(counts.max() / counts.min()),
            "source": meta.source,
            "raw": meta.checksums,
            "checksums": checksums,
        },
    )


if __name__ == "__main__":
    errors.run(main)
