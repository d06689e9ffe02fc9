"""tailcal: long-tailed image classification, trained and calibrated on one footing."""

__version__ = "0.1.0"
