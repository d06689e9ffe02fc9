"""The stages of dvc.yaml, one script each. Run them from the project's root: `python -m stages.represent --help`."""

import sys
from pathlib import Path

# The library of this very tree, not of an installed copy: `dvc exp run --temp` and `--queue` run in a copy of the
# project, and must import that copy's code.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
