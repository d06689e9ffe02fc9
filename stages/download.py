"""Fetch one data set and keep it as arrays, whole and unchanged: data/raw/<dataset>."""

import argparse

from stages import paths
from tailcal import errors, files, params, sources


def main() -> None:
    """Write train and test images and labels, and meta.json with the class names, the source and the checksums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True)
    name = parser.parse_args().dataset
    config = sources.configure(params.dataset(params.load(), name))
    raw = sources.load(config, paths.DOWNLOADS)
    folder = paths.raw(name)
    checksums = {}
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        path = folder / f"{part}.npy"
        files.write_array(path, getattr(raw, part))
        checksums[path.name] = files.sha256(path)
    meta = {"class_names": raw.class_names, "source": config.model_dump(), "checksums": checksums}
    files.write_json(folder / "meta.json", meta)


if __name__ == "__main__":
    errors.run(main)
