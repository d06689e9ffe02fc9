"""Measure how fast training is on this machine: `metrics/benchmark.json`, and a table of it on stdout.

What is measured, benchmark/params.yaml says. A case that fails is named in the end and does not keep the others from
being measured; each is written once it is. It stands outside the pipeline: see benchmark/dvc.yaml.
"""

import argparse
import json
import subprocess
import traceback
from pathlib import Path
from typing import Any

import torch

from tailcal import errors, files
from tailcal.benchmark import cases, measure

OUT = Path("metrics/benchmark.json")
COLUMNS = ["case", "images/s", "least", "most", "step", "training", "busy", "memory", "against"]


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The cases, a line each, as a table of Markdown."""
    rows = [COLUMNS, ["---", *["--:"] * (len(COLUMNS) - 2), "---"]]
    for name, case in measured.items():
        rate, gpu = case["images_per_second"], case["gpu"]
        rivals = [f"{against['ratio']['median']:.2f} x {rival}" for rival, against in case["against"].items()]
        rows.append(
            [
                name,
                *(f"{rate[key]:,.0f}" for key in ("median", "min", "max")),
                f"{case['step_ms']['median']:.2f} ms",
                f"{case['training_seconds']['median']:,.1f} s",
                f"{gpu['busy']:.0%}" if gpu and gpu["busy"] is not None else "",
                f"{gpu['memory_reserved'] / 1e9:.2f} GB" if gpu else "",
                ", ".join(rivals),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def unchanged(known: dict[str, Any], suite: cases.Suite, benchmark: cases.Benchmark) -> dict[str, Any]:
    """Those of the cases measured before that are still what they were."""
    described = {name: measure.describe(case, benchmark.workload(case)) for name, case in suite.cases.items()}
    same = json.loads(json.dumps(described))  # tuples as lists, as in the file
    return {n: case for n, case in known.items() if n in same and case | same[n] == case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--alone", nargs=2, metavar=("PART", "CASE"), help=f"only this of a case: {' or '.join(measure.ALONE)}, as JSON"
    )
    parser.add_argument("--case", action="append", help="only this case, or these, and keep the others of the file")
    parser.add_argument("--missing", action="store_true", help="leave out the cases that the file has of this machine")
    args = parser.parse_args()

    benchmark = cases.load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suite = getattr(benchmark, device.type)
    if args.alone:
        part, name = args.alone
        cases.require(part, measure.ALONE, "--alone")
        cases.require(name, suite.cases, f"--alone {part}")
        case = suite.cases[name]
        print(json.dumps(measure.ALONE[part](name, case, benchmark.workload(case))))
        return
    for name in args.case or []:
        cases.require(name, suite.cases, "--case")
    record = {"machine": measure.machine(device), "images": "noise, in memory", "repeats": benchmark.repeats}
    before = files.read_json(OUT) if (args.case or args.missing) and OUT.exists() else {}
    if any(before.get(key) != value for key, value in record.items()):
        before = {"start_up": measure.start_up(suite.start_up, benchmark.repeats), "cases": {}}
    done = unchanged(before["cases"], suite, benchmark)
    failed = []
    for name in args.case or suite.cases:
        if args.missing and name in done:
            continue
        done.pop(name, None)
        try:
            done[name] = measure.measure(name, suite.cases, benchmark, device)
        except (RuntimeError, errors.UserError, subprocess.CalledProcessError) as error:
            traceback.print_exception(error)
            failed.append(name)
        record |= {"start_up": before["start_up"], "cases": {name: done[name] for name in suite.cases if name in done}}
        files.write_json(OUT, record)
    seconds = before["start_up"]["seconds"]["median"]
    print(f"{record['machine']['gpu'] or record['machine']['cpu']}, {record['machine']['cores']} cores; ", end="")
    print(f"first step after {seconds:.1f} s\n\n{table({name: done[name] for name in suite.cases if name in done})}")
    if failed:
        raise errors.UserError(f"{OUT} lacks {', '.join(failed)}, which failed: see above; --missing tries again")


if __name__ == "__main__":
    errors.run(main)
