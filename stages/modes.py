"""See whether faster ways of training may stand in for the reference: metrics/modes.json, and metrics/modes.md to read.

benchmark/modes.yaml says what is trained, and the table by what rule a mode is accepted. The stages are those of the
pipeline, run here one after the other in a folder of its own for each mode, data/modes/<mode>, so that the results of
the grid are left alone. A run that is interrupted goes on where it was. It stands outside the pipeline: see
benchmark/dvc.yaml.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from stages import official, paths, workspace
from tailcal import errors, files, lock, method, params, predictions, provenance, settings, sources, splits, train
from tailcal.benchmark import measure, modes
from tailcal.benchmark.modes import REFERENCE, Cell, Measured, Mode, ModeResult, Outcome, Record, Seed
from tailcal.cell import CellName
from tailcal.metrics.cell import measure as measure_cell
from tailcal.metrics.cell import over_seeds, rounded

OUT = Path("metrics/modes.json")
TEXT = Path("metrics/modes.md")
WORKSPACES = Path("data/modes")


def outcome(p: params.Params, cell: CellName) -> Outcome:
    """What the stages have left of a cell in the present folder."""
    counts = np.array(splits.read_meta(paths.longtail(cell.dataset)).train_counts)
    stage1 = paths.representation(*cell[:2])
    history = pd.read_csv(stage1 / "history.csv").query("epoch == 1").set_index("seed")
    weights = files.read_json(stage1 / "provenance.json")["weights"]
    checksums = files.read_json(paths.predictions(*cell) / "provenance.json")["checksums"]
    runs = predictions.read_seeds(paths.predictions(*cell), checksums, p.seeds, len(counts))
    seeds, measured = {}, []
    for seed, run in zip(p.seeds, runs, strict=True):
        numbers = measure_cell(run.test_logits, run.test_labels, counts, p.evaluate.bins)
        measured.append({name: numbers[name] for name in ("top1", "ece")})
        digests = {
            "representation": weights[f"seed{seed}"],
            "classifier": checksums[f"seed{seed}.safetensors"],
            "predictions": checksums[f"seed{seed}.npz"],
        }
        seeds[str(seed)] = Seed(
            **rounded(measured[-1]),
            first_epoch_loss=float(history.loc[seed, "loss"]),
            sha256=digests,
        )
    return Outcome(
        **over_seeds(measured),
        seconds=round(float(np.mean([workspace.seconds(cell, seed) for seed in p.seeds])), 2),
        seeds=seeds,
    )


def trained(p: params.Params, cell: CellName, name: str, mode: Mode, instead: str | None) -> Outcome:
    """Train and measure a cell in a mode, in the folder of the mode. `instead` is that of `workspace.prepare`."""
    runtime = p.runtime.model_copy(update={"cuda_graphs": mode.cuda_graphs})
    p = p.model_copy(update={"precision": mode.precision, "runtime": runtime})
    with workspace.inside(WORKSPACES / name):
        workspace.prepare(p, cell.dataset, instead)
        workspace.run_stage1(p, *cell[:2])
        with workspace.run_stage2(p, cell):
            return outcome(p, cell)


def compare_modes(p: params.Params, cell: Cell, suite: modes.Suite, instead: str | None) -> Measured:
    """Train a cell in the reference and in every mode, one after the other, and judge the modes."""
    reference = trained(p, cell.full_name, REFERENCE, Mode(precision="float32", cuda_graphs=False), instead)
    results = {}
    for name, mode in suite.modes.items():
        other = trained(p, cell.full_name, name, mode, instead)
        results[name] = ModeResult(outcome=other, verdict=modes.judge(reference, other, mode))
    source = p.datasets[cell.dataset].source["kind"]
    return Measured(**cell.model_dump(), source=source, reference=reference, modes=results)


def code(p: params.Params, suite: modes.Suite) -> str:
    """The digest of all code that the suite's numbers come from."""
    modules = set()
    for cell in suite.cells:
        modules.add(sources.module(sources.configure(p.datasets[cell.dataset]).kind))
        for name, axis in ((cell.representation, "representations"), (cell.classifier, "classifiers")):
            modules.add(method.module(settings.training(p, cell.dataset, name, axis).method))
    return provenance.code_version("stages.modes", *sorted(modules))


def main() -> None:
    parser = errors.CommandLine("stages.modes", __doc__)
    official.accept_images(parser)
    args = parser.parse_args()

    declared, p = modes.load(params.load())
    workspace.require_one_process(p.runtime)
    device = train.prepare(p.runtime)
    suite = getattr(declared, device.type)
    p, instead = official.with_images(p, (cell.dataset for cell in suite.cells), args.images)
    p = p.model_copy(update={"seeds": suite.seeds})
    digest = code(p, suite)  # before hours of training: this reads the settings of every cell
    with lock.alone(paths.LOCKS, OUT, TEXT):
        record = Record(
            machine=measure.machine(device),
            versions=provenance.versions(),
            code=digest,
            at_once=train.at_once(p.runtime, len(suite.seeds), device),
            seeds=suite.seeds,
            modes=suite.modes,
            cells=[compare_modes(p, cell, suite, instead.get(cell.dataset)) for cell in suite.cells],
        )
        files.write_json(OUT, record.model_dump())
        files.write_text(TEXT, modes.markdown(record))
    print(modes.table(record).markdown(), end="")


if __name__ == "__main__":
    errors.run(main, goes_on=True)
