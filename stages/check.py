"""Check all of params.yaml before anything is trained. The output never changes, so nothing reruns because of it."""

from stages import paths
from tailcal import errors, files, method, params, posthoc, sources
from tailcal.models import BACKBONES


def main() -> None:
    p = params.load()
    for name, dataset in p.datasets.items():
        sources.configure(dataset.source, f"datasets.{name}.source")
        if dataset.backbone not in BACKBONES:
            raise errors.UserError(
                f"{params.PARAMS}: datasets.{name}.backbone: must be one of {', '.join(BACKBONES)}, "
                f"got {dataset.backbone!r}"
            )
    for stage in ("representations", "classifiers"):
        for name, block in getattr(p, stage).items():
            method.configure(name, block, stage)
    posthoc.configure(p.evaluate.posthoc, "evaluate.posthoc")
    files.write_text(paths.CHECKED, "params.yaml is valid\n")


if __name__ == "__main__":
    errors.run(main)
