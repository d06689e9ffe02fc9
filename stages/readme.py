"""Put metrics/table.md into README.md, between its two markers. Not a stage of DVC: run it on final results."""

from pathlib import Path

from stages import paths
from tailcal.errors import UserError, run
from tailcal.files import write_text

README = Path("README.md")
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def main() -> None:
    """Replace what lies between the markers; everything else of README.md stays as it is."""
    text, table = _read(README), _read(paths.TABLE_TEXT)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{README}: must have the markers {BEGIN} and {END}, in this order")
    write_text(README, f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


if __name__ == "__main__":
    run(main)
