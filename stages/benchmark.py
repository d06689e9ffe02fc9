"""Measure how fast training is on this machine: `metrics/benchmark.json`, and a table of it on stdout.

What is measured, benchmark/params.yaml says. It stands outside the pipeline: see benchmark/dvc.yaml.
"""

import argparse
import json
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
                f"{gpu['busy']:.0%}" if gpu else "",
                f"{gpu['memory_reserved'] / 1e9:.2f} GB" if gpu else "",
                ", ".join(rivals),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--alone", nargs=2, metavar=("PART", "CASE"), help=f"only this of a case: {' or '.join(measure.ALONE)}, as JSON"
    )
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
    record = {
        "machine": measure.machine(device),
        "images": "noise, in memory",
        "repeats": benchmark.repeats,
        "start_up": measure.start_up(suite.start_up, benchmark.repeats),
        "cases": {name: measure.measure(name, suite.cases, benchmark, device) for name in suite.cases},
    }
    files.write_json(OUT, record)
    seconds = record["start_up"]["seconds"]["median"]
    print(f"{record['machine']['gpu'] or record['machine']['cpu']}, {record['machine']['cores']} cores; ", end="")
    print(f"first step after {seconds:.1f} s\n\n{table(record['cases'])}")


if __name__ == "__main__":
    errors.run(main)
