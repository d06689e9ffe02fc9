"""tailcal: long-tailed image classification, trained and calibrated on one footing."""

import signal
import sys

__version__ = "0.1.0"

# While a command (`python -m ...`) still imports its libraries, an interrupt ends it as it ends most programs, without
# a traceback; from then on `errors.run` says it in a line. Not where interrupts are ignored, nor in others' programs.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
