"""Reading one split of a long-tailed data set, verified against the checksums beside it.

A training stage asks for the split `train` and never names another: the test split is opened where predictions are
made.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from tailcal import lineage, sources
from tailcal.duplicates import TWICE
from tailcal.errors import UserError
from tailcal.files import read_array, read_json, verify
from tailcal.params import Dataset, Recorded, recorded

Counts = dict[str, Annotated[int, Field(ge=0)]]


class RawMeta(Recorded):
    """What meta.json of a raw folder must have."""

    class_names: Annotated[list[str], Field(min_length=2)]
    source: dict[str, Any]
    checksums: dict[str, str]
    skipped: Counts = Field({})  # a source of arrays does not say it


class Meta(Recorded):
    """What meta.json of a long-tailed data set must have.

    raw: checksums of the raw folder that it was cut from; imbalance, holdout_per_class: how, as the data set's block
    says it; skipped: images that could not be read, by split of the source ({} for a source of arrays); duplicates:
    those of `tailcal.duplicates.count`.
    """

    class_names: Annotated[list[str], Field(min_length=2)]
    train_counts: list[Annotated[int, Field(ge=1, lt=2**31)]]
    test_counts: list[Annotated[int, Field(ge=1, lt=2**31)]]
    source: dict[str, Any]
    raw: dict[str, str]
    imbalance: dict[str, Any]
    holdout_per_class: Annotated[int, Field(ge=0)]
    checksums: dict[str, str]
    skipped: Counts
    duplicates: Counts

    @model_validator(mode="after")
    def _a_count_a_class(self) -> "Meta":
        for key, counts in (("train_counts", self.train_counts), ("test_counts", self.test_counts)):
            if len(counts) != len(self.class_names):
                raise ValueError(f"{len(self.class_names)} class_names, but {len(counts)} {key}")
        return self

    @field_validator("duplicates")
    @classmethod
    def _each_kind(cls, found: Counts) -> Counts:
        if lacking := [which for which in TWICE if which not in found]:
            raise ValueError(f"lacks {', '.join(lacking)}")
        return found


def read_meta(folder: Path) -> Meta:
    """Class names, counts and checksums of the data set in `folder`. Raises UserError naming the file and the key."""
    path = folder / "meta.json"
    return recorded(Meta, read_json(path), path)


def read_raw_meta(folder: Path) -> RawMeta:
    """The same of the raw folder `folder`."""
    path = folder / "meta.json"
    return recorded(RawMeta, read_json(path), path, remove=folder)


def record(dataset: Dataset) -> dict[str, Any]:
    """What a data set is made and cut by, as its block says it now; provenance has it as params.dataset."""
    return {
        "source": sources.record(sources.configure(dataset)),
        "imbalance": dataset.imbalance.record(),
        "holdout_per_class": dataset.holdout_per_class,
    }


def require_cut(folder: Path, meta: Meta, dataset: Dataset, raw: Path) -> None:
    """Raise UserError unless the data set in `folder` was made and cut as the parameters say now, and from the images
    in the folder `raw`, where these are still there."""
    sources.require(dataset, meta.source, folder)
    for key, then, now in (
        ("imbalance", meta.imbalance, dataset.imbalance.record()),
        ("holdout_per_class", meta.holdout_per_class, dataset.holdout_per_class),
    ):
        if then != now:
            raise UserError(
                f"{folder} was cut with {key} {then}, and {dataset.key(key)} is {now}: "
                f"{lineage.again(subsample=(folder.name,))}"
            )
    require_raw(folder, meta, raw)


def require_raw(folder: Path, meta: Meta, raw: Path) -> None:
    """Raise UserError unless the data set in `folder` was cut from the images in the folder `raw`, if this is there."""
    if raw.exists() and read_raw_meta(raw).checksums != meta.raw:
        raise UserError(
            f"{folder} was cut from other images than {raw} holds: {lineage.again(subsample=(folder.name,))}"
        )


def read_split(folder: Path, split: Literal["train", "holdout", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], memory-mapped, and labels int64 [N] of one split.

    Raises UserError naming the file when one is missing, not the one that meta.json describes, or of another kind.
    """
    meta = read_meta(folder)
    images_path, labels_path = folder / f"{split}_images.npy", folder / f"{split}_labels.npy"
    for path in (images_path, labels_path):
        verify(path, meta.checksums.get(path.name))
    images, labels = read_array(images_path, mmap=True), read_array(labels_path)
    check(folder, split, images, labels, len(meta.class_names))
    if split == "train":
        require_train_counts(folder, meta, labels)
    return images, labels


def require_train_counts(folder: Path, meta: Meta, labels: np.ndarray) -> None:
    """Raise UserError unless the training counts that `meta` tells, which say who is many, medium and few, are those of
    the training labels int64 [N]."""
    if np.bincount(labels, minlength=len(meta.class_names)).tolist() != meta.train_counts:
        raise UserError(
            f"{folder / 'meta.json'}: train_counts are not those of train_labels.npy: delete it and "
            f"{lineage.again(subsample=(folder.name,))}"
        )


def check(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Raise UserError naming the file of `folder` unless images are uint8 [N, H, W, C], labels int64 [N] in 0..K-1."""
    images_path, labels_path = folder / f"{split}_images.npy", folder / f"{split}_labels.npy"
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(f"{images_path} holds {images.dtype} {list(images.shape)}: must be uint8 [N, H, W, C]")
    if labels.shape != images.shape[:1] or labels.dtype != np.int64:
        raise UserError(
            f"{labels_path} holds {labels.dtype} {list(labels.shape)}: "
            f"must be int64 [{len(images)}], one label per image"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{labels_path} holds labels {labels.min()}..{labels.max()}: must lie in 0..{num_classes - 1}")


def check_augmentation(dataset: Dataset, height: int, width: int, channels: int) -> None:
    """Raise UserError unless the data set's augmentation fits images of that many pixels and channels."""
    augmentation = dataset.augmentation
    if channels != (means := len(augmentation.mean)):
        raise UserError(
            f"{dataset.key('augmentation.mean')} has {means} values: the images have "
            f"{channels} channels, so mean and std must have {channels} each"
        )
    # A crop that is shifted by a whole image's side shows nothing of it.
    if augmentation.kind == "pad_crop" and augmentation.pad >= min(height, width):
        raise UserError(
            f"{dataset.key('augmentation.pad')} is {augmentation.pad}: the images have {height}x{width} pixels, "
            f"so must be at most {min(height, width) - 1}"
        )
    if augmentation.kind == "pad_crop" and augmentation.cutout > min(height, width):
        raise UserError(
            f"{dataset.key('augmentation.cutout')} is {augmentation.cutout}: the images have {height}x{width} pixels, "
            f"so must be at most {min(height, width)}"
        )
    # Of test images the centre is cut out, and a box of a training image is not brought to less than a 15th.
    least, most = -(-max(height, width) // 15), min(height, width)
    if augmentation.kind == "resized_crop" and not least <= augmentation.size <= most:
        raise UserError(
            f"{dataset.key('augmentation.size')} is {augmentation.size}: the images have {height}x{width} pixels, "
            f"so must lie in {least}..{most}"
        )
