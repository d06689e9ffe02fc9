"""Check params.yaml and the presets on its grid before anything is trained, and write what each stage goes by.

That is its settings and a digest of its code. Every other stage depends on its own file of these and on data, so that
a change reruns what it concerns and nothing else.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import yaml

from stages import paths
from tailcal import errors, files, lock, method, params, posthoc, provenance, settings, sources, splits, weights

TEMPLATES = provenance.PACKAGE / "templates"


def pretrained(dataset: params.Dataset) -> dict[str, str]:
    """The block `pretrained` with its file's SHA-256, so that another file of the same name reruns stage 1.

    DVC runs this stage when something in PRETRAINED has changed, so the file must lie there; a link will do. Raises
    UserError when it does not, and when there is no such file.
    """
    file = dataset.pretrained.file
    if paths.PRETRAINED not in Path(os.path.normpath(file)).parents:
        raise errors.UserError(
            f"{dataset.key('pretrained.file')}: must lie in {paths.PRETRAINED}, where DVC sees it change (a link to a "
            f"file elsewhere will do), got {file}"
        )
    return dataset.pretrained.model_dump() | {"sha256": weights.pretrained_digest(dataset)}


def refuse_aliases(file: Path) -> None:
    """Raise UserError for a YAML alias in `file`: what it repeats, `-S` would change elsewhere too, or not at all, and
    DVC would not say so."""
    for event in yaml.parse(file.read_text(encoding="utf-8"), yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise errors.UserError(
                f"{file} line {event.start_mark.line + 1}: *{event.anchor} is an alias, which `-S` does not see "
                "through: write out what it stands for"
            )


def code(stage: str, *modules: str, data: Iterable[Path] = ()) -> dict[str, str]:
    """The digest of a stage's code: of its script, of the modules it loads by name, of the files `data` they read."""
    return {"code": provenance.code_version(f"stages.{stage}", *modules, data=data)}


def main() -> None:
    """Write data/settings/<stage>/<cell>.json and data/settings/<stage>.json.

    Raises UserError for the first thing that is wrong.
    """
    p = params.load()
    refuse_aliases(params.PARAMS)
    for stage in ("representations", "classifiers"):
        for name, block in getattr(p, stage).items():
            method.configure(name, block, stage)
    posthoc.configure(p.evaluate.posthoc)

    resolved = {
        ("evaluate",): {"seeds": p.seeds, "evaluate": p.evaluate.model_dump()} | code("evaluate"),
        ("report",): {"grid": p.grid.model_dump()} | code("report", data=TEMPLATES.glob("*.html")),
    }
    for name in dict.fromkeys([*p.grid.datasets, *p.datasets]):
        dataset = params.dataset(p, name)
        if name not in p.datasets:
            refuse_aliases(params.PRESETS / f"{name}.yaml")
        source = sources.configure(dataset)
        if isinstance(source, sources.ImageFiles):
            splits.check_augmentation(dataset, source.size, source.size, source.channels)
        begins = {"pretrained": pretrained(dataset)} if name in p.grid.datasets and dataset.pretrained else {}
        resolved["download", name] = {"source": source.model_dump()} | code("download", sources.module(source.kind))
        resolved["subsample", name] = {
            "imbalance": dataset.imbalance.record(),
            "holdout_per_class": dataset.holdout_per_class,
            "channels": len(dataset.augmentation.mean),
            "augmentation": dataset.augmentation.model_dump(include={"kind", "pad", "cutout", "size"}),
            **code("subsample"),
        }
        for representation in p.representations:
            training = settings.training(p, name, representation, "representations")
            own = begins | code("represent", method.module(training.method))
            resolved["represent", name, representation] = training.record(p.precision) | {"seeds": p.seeds} | own
        for classifier in p.classifiers:
            training = settings.training(p, name, classifier, "classifiers")
            own = code("calibrate", method.module(training.method))
            resolved["calibrate", name, classifier] = training.record(p.precision) | {"seeds": p.seeds} | own

    with lock.alone(paths.LOCKS, paths.SETTINGS):
        shutil.rmtree(paths.SETTINGS, ignore_errors=True)
        for (stage, *cell), values in resolved.items():
            files.write_json(paths.settings(stage, *cell), values)


if __name__ == "__main__":
    errors.CommandLine("stages.check", __doc__).parse_args()
    errors.run(main)
