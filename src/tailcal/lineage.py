"""Whether predictions go with the data set beside which they lie."""

from pathlib import Path
from typing import Any

from tailcal.errors import UserError

TRAINING = ("train_images.npy", "train_labels.npy")


def require_same_training(record: Any, meta: dict[str, Any], predicted: Path, longtail: Path) -> None:
    """Raise UserError unless the predictions in the folder `predicted`, of the provenance `record`, are of networks
    that were trained on the training split in `longtail`, which `meta` describes."""
    trained_on = record.get("data") if isinstance(record, dict) else None
    if not isinstance(trained_on, dict) or any(
        trained_on.get(name) != meta["checksums"].get(name) for name in TRAINING
    ):
        raise UserError(
            f"{predicted} is of networks that were trained on another training split than {longtail} holds: run `dvc "
            "repro`, or without DVC stages.represent and stages.calibrate again"
        )
