"""Check params.yaml and the presets on its grid before anything is trained, and write what each stage goes by.

Every other stage depends on its own file of these, so that a change reruns what it concerns and nothing else.
"""

import shutil
from pathlib import Path

from stages import paths
from tailcal import errors, files, method, params, posthoc, settings, sources


def main() -> None:
    """Write data/settings/<stage>/<cell>.json. Raises UserError for the first thing that is wrong."""
    p = params.load()
    for stage in ("representations", "classifiers"):
        for name, block in getattr(p, stage).items():
            method.configure(name, block, stage)
    posthoc.configure(p.evaluate.posthoc, "evaluate.posthoc")

    resolved = {}
    for name in dict.fromkeys([*p.grid.datasets, *p.datasets]):
        dataset = params.dataset(p, name)
        source = sources.configure(dataset)
        means = len(dataset.augmentation.mean)
        if getattr(source, "channels", means) != means:
            raise errors.UserError(
                f"{dataset.key('augmentation.mean')} has {means} values, and source.channels is {source.channels}: "
                "mean and std must have one value a channel"
            )
        if name in p.grid.datasets and dataset.pretrained and not Path(dataset.pretrained.file).is_file():
            raise errors.UserError(f"{dataset.key('pretrained.file')}: there is no file {dataset.pretrained.file}")
        resolved["download", name] = source.model_dump()
        resolved["subsample", name] = {
            "imbalance": dataset.imbalance.model_dump(),
            "holdout_per_class": dataset.holdout_per_class,
            "channels": means,
            "pad": getattr(dataset.augmentation, "pad", 0),
        }
        for representation in p.representations:
            training = settings.training(p, name, representation, "representations")
            resolved["represent", name, representation] = training.record()
        for classifier in p.classifiers:
            resolved["calibrate", name, classifier] = settings.training(p, name, classifier, "classifiers").record()

    shutil.rmtree(paths.SETTINGS, ignore_errors=True)
    for (stage, *cell), values in resolved.items():
        files.write_json(paths.settings(stage, *cell), values)


if __name__ == "__main__":
    errors.run(main)
