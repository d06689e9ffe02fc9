"""Measure how fast training is on this machine: `metrics/benchmark.json`, and a table of it on stdout.

What is measured, benchmark/params.yaml says. A case that fails is named in the end and does not keep the others from
being measured; each is written once it is. It stands outside the pipeline: see benchmark/dvc.yaml.
"""

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from stages import paths
from tailcal import errors, files, lock, params
from tailcal.benchmark import cases, measure, modes
from tailcal.tables import Table

OUT = Path("metrics/benchmark.json")
COLUMNS = ["case", "images/s", "least", "most", "step", "training", "busy", "memory", "against"]


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The cases, a line each, as a table of Markdown."""
    rows = []
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
                f"{gpu['memory'] / 1e9:.2f} GB" if gpu else "",
                ", ".join(rivals),
            ]
        )
    return Table(COLUMNS, rows).markdown()


class Before(BaseModel):
    """What a file of before must hold, that a measurement may go on from it."""

    model_config = ConfigDict(extra="allow")

    start_up: dict[str, Any]
    cases: dict[str, dict[str, Any]]


def before(record: dict[str, Any], suite: cases.Suite, benchmark: cases.Benchmark) -> tuple[dict, dict]:
    """The start-up and those of the cases of OUT that would be measured again as they were; both may be empty.

    record: what all measurements of a file share. Raises UserError when OUT is damaged, or of another machine.
    """
    if not OUT.exists():
        return {}, {}
    try:
        known = Before.model_validate(files.read_json(OUT))
    except ValidationError as error:
        raise errors.UserError(
            f"{OUT} is damaged ({params.describe(error, '')}): move it away, to begin a new one"
        ) from None
    for key, value in record.items():
        if (other := known.model_extra.get(key)) != value:
            raise errors.UserError(f"{OUT}: {key} was {other}, and is {value} here: move it away, to begin a new one")
    asked = {name: measure.describe(case, benchmark.workload(case)) for name, case in suite.cases.items()}
    asked = json.loads(json.dumps(asked))  # tuples as lists, as in the file
    same = {name for name, case in known.cases.items() if name in asked and case | asked[name] == case}
    kept = {
        name: case
        for name, case in known.cases.items()
        # It is held against the same rivals as before, and those that are cases themselves are what they were.
        if name in same
        and list(case["against"]) == suite.cases[name].against
        and not (set(case["against"]) & set(asked)) - same
    }
    return (known.start_up if known.start_up.get("case") == suite.start_up else {}), kept


def main() -> None:
    parser = errors.CommandLine("stages.benchmark", __doc__)
    parser.add_argument(
        "--alone", nargs=2, metavar=("PART", "CASE"), help=f"only this of a case: {' or '.join(measure.ALONE)}, as JSON"
    )
    parser.add_argument("--case", action="append", help=f"only this case, or these (all); {OUT} keeps the others")
    parser.add_argument("--missing", action="store_true", help=f"leave out what {OUT} has already")
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
    record = {"machine": measure.machine(device), "images": "noise, in memory"}
    record |= {"repeats": benchmark.repeats, "workers": benchmark.workers}
    for name in args.case or []:
        cases.require(name, suite.cases, "--case")
    start_up, done = before(record, suite, benchmark) if args.missing or args.case else ({}, {})
    chosen = [name for name in args.case or suite.cases if not (args.missing and name in done)]
    failed = []

    def attempt(what: str, measuring: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured; nothing where that failed, and why is said."""
        try:
            return measuring()
        except errors.UserError as error:
            print(f"{what}: {error}", file=sys.stderr)
        except (RuntimeError, ValueError, ImportError, MemoryError, subprocess.CalledProcessError) as error:
            traceback.print_exception(error)
        failed.append(what)
        return {}

    def known() -> dict[str, Any]:
        """The cases that have been measured, in the order of the suite."""
        return {name: done[name] for name in suite.cases if name in done}

    def write() -> None:
        files.write_json(OUT, record | {"start_up": start_up, "cases": known()})

    with lock.alone(paths.LOCKS, OUT):
        if not start_up:
            start_up = attempt("start_up", lambda: measure.start_up(suite.start_up, benchmark.repeats))
            if start_up and done:
                write()
        for name in chosen:
            if measured := attempt(name, partial(measure.measure, name, suite.cases, benchmark, device)):
                done[name] = measured
                write()
    print(modes.device_name(record["machine"]), end="")
    print(f"; first step after {start_up['seconds']['median']:.1f} s" if start_up else "", end="\n\n")
    print(table(known()), end="")
    if failed:
        raise errors.UserError(f"{OUT} lacks {', '.join(failed)}, which failed: see above; --missing tries again")


if __name__ == "__main__":
    errors.run(main)
