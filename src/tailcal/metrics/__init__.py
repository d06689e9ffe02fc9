"""Functions that measure saved predictions: numpy only, no torch, no files.

Array names end in their axes: N samples, K classes, B bins. Every public function raises ValueError on input it
cannot measure; `tailcal.metrics.scores.check` is where that is decided.
"""
