"""Fetch one data set and keep it as arrays, whole and unchanged: data/raw/<dataset>."""

from stages import paths
from tailcal import errors, files, lock, pack, params, sources


def main() -> None:
    parser = errors.CommandLine("stages.download", __doc__)
    parser.add_argument("--dataset", required=True)
    name = parser.parse_args().dataset
    config = sources.configure(params.dataset(params.load(), name))
    with lock.alone(paths.LOCKS, paths.raw(name), paths.scratch("pack", name)):
        download(name, config)


def download(name: str, config: sources.Source) -> None:
    """Write train and test images and labels, and meta.json with the class names, the source and the checksums."""
    loaded = sources.load(config, paths.DOWNLOADS)
    folder, scratch = paths.raw(name), paths.scratch("pack", name)
    parts = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
    more = {}
    if isinstance(loaded, sources.Listing):
        more = pack.write(loaded, folder, scratch)
    else:
        for lists in (pack.SKIPPED, pack.DUPLICATES):  # of image files that lay here before
            (folder / lists).unlink(missing_ok=True)
        for part in parts:
            files.write_array(folder / f"{part}.npy", getattr(loaded, part))
    checksums = {f"{part}.npy": files.sha256(folder / f"{part}.npy") for part in parts}
    meta = {"class_names": loaded.class_names, "source": sources.record(config), "checksums": checksums, **more}
    files.write_json(folder / "meta.json", meta)
    pack.clean(scratch)


if __name__ == "__main__":
    errors.run(main)
