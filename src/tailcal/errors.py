"""The one kind of error a user sees: a line that says what is wrong, where, and what would be right."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

LONGEST = 2000  # characters of an error line


class UserError(Exception):
    """Something the user can mend. Its text names the file, key or class at fault and what would be right.

    Texts repeat what files say, and a file may say anything: they are kept to one printable line of bounded length.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__()[:LONGEST])


class CommandLine(argparse.ArgumentParser):
    """The options of a command. A wrong one ends it with one line on stderr and exit code 2."""

    def __init__(self, module: str, description: str | None, **more: Any):
        """module: what follows `python -m`; the further arguments are those of argparse."""
        super().__init__(prog=f"python -m {module}", description=description, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {UserError(message)}: see {self.prog} --help\n")


def run(main: Callable[[], None], goes_on: bool = False) -> None:
    """Run a command's `main`; a user's mistake or a failing disk ends it with one line on stderr and exit code 1.

    goes_on: whether it keeps checkpoints, and begins with the last one when it is run again.
    Anything else is a bug of ours and keeps its traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `tailcal` has set it while libraries are imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {where}{error.strerror or error}")
    except KeyboardInterrupt:
        again = "; run the same command again to go on from the last checkpoint" if goes_on else ""
        sys.exit(f"error: interrupted{again}")
