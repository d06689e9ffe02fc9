"""Put the tables into README.md, each between its two markers. Not a stage of DVC: run it on final results."""

from pathlib import Path

from stages import paths
from tailcal.errors import CommandLine, UserError, run
from tailcal.files import write_text

README = Path("README.md")
TABLES = {"table": paths.TABLE_TEXT, "published": paths.OVERVIEW}  # marker: what stands between its two ends


def main() -> None:
    """Replace what lies between the markers; everything else of README.md stays as it is."""
    text = _read(README)
    for marker, path in TABLES.items():
        begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise UserError(f"{README}: must have the markers {begin} and {end}, in this order")
        text = f"{before}{begin}\n\n{_read(path).strip()}\n\n{end}{after}"
    write_text(README, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be text in UTF-8") from None


if __name__ == "__main__":
    CommandLine("stages.readme", __doc__).parse_args()
    run(main)
