"""Kill anything, any time: what comes out in the end is, bit for bit, what an undisturbed run makes.

`pytest tests/test_kills.py --long -s` kills more than a hundred times and prints how often, what, and what it cost.
"""

import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.killing import Tally, artefacts, kill_until_done, leftovers, processes

pytestmark = pytest.mark.pipeline
DATASET = ("--dataset", "digits_lt")
CELL = (*DATASET, "--representation", "ce")
STAGES = {
    "download": DATASET,
    "subsample": DATASET,
    "represent": CELL,
    "calibrate": (*CELL, "--classifier", "mislas"),
    "evaluate": (*CELL, "--classifier", "mislas"),
}
OFTEN = ("checkpoint_seconds: 5", "checkpoint_seconds: 0")


def own_images(root: Path, images: int) -> None:
    """A folder a class with JPEGs large enough to take their time, and a preset for them on the grid."""
    pixels = np.linspace(0, 255, 1200 * 900 * 3).reshape(900, 1200, 3)
    for i in range(images):
        path = root / f"data/images/{'ab'[i % 2]}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((pixels + i) % 256).astype(np.uint8)).save(path)
    preset = yaml.safe_load((root / "presets/own_images.yaml").read_text())
    preset["source"] |= {"test_per_class": 5, "workers": 2}
    (root / "presets/own_images.yaml").write_text(yaml.safe_dump(preset))


def run_stages(project) -> dict[str, float]:
    """Run each of STAGES undisturbed; returns how many seconds it took."""
    took = {}
    for name, arguments in STAGES.items():
        began = time.monotonic()
        project.stage(name, *arguments)
        took[name] = time.monotonic() - began
    return took


def test_a_killed_stage_ends_with_the_same_bits(project, long):
    undisturbed, killed = project(OFTEN), project(OFTEN, name="killed")
    took = run_stages(undisturbed)
    generator, tally = random.Random(0), Tally()
    for name, arguments in STAGES.items():
        kills = {"represent": 3, "calibrate": 2}.get(name, 1)
        command = ("python", "-m", f"stages.{name}", *arguments)
        for _ in range(6 if long else 1):
            shutil.rmtree(killed.root / ".scratch", ignore_errors=True)
            kill_until_done(killed, generator, tally, kills, took[name], ("stage", "group"), *command)
    assert tally.kills
    assert artefacts(killed.root) == artefacts(undisturbed.root)
    assert not leftovers(killed.root)
    print(f"\nstages by themselves: {tally.report()}")


def test_a_killed_packing_ends_with_the_same_bits(project, long):
    undisturbed, killed = project(), project(name="killed")
    command = ("python", "-m", "stages.download", "--dataset", "own_images")
    for one in (undisturbed, killed):
        own_images(one.root, 200 if long else 40)
    began = time.monotonic()
    undisturbed.run(*command)
    took, generator, tally = time.monotonic() - began, random.Random(1), Tally()
    for _ in range(5 if long else 1):
        kill_until_done(killed, generator, tally, 3 if long else 2, took, ("stage", "group"), *command)
    assert artefacts(killed.root) == artefacts(undisturbed.root)
    assert not leftovers(killed.root)
    print(f"\npacking: {tally.report()}")


def test_a_killed_repro_ends_with_the_same_bits(project, long):
    """Of the whole pipeline in the long form, DVC's writing of dvc.lock included."""
    target = () if long else ("calibrate@digits_lt-ce-mislas",)
    undisturbed = project()
    undisturbed.run("dvc", "repro", *target)
    generator, tally = random.Random(2), Tally()
    for i in range(4 if long else 1):
        killed = project(name=f"killed{i}")
        whom = ("stage", "dvc", "group")
        kill_until_done(killed, generator, tally, 15 if long else 2, 14.0, whom, "dvc", "repro", *target)
        assert artefacts(killed.root) == artefacts(undisturbed.root)
        assert not leftovers(killed.root)
        assert not list(processes(killed.root))
        assert "up to date" in killed.run("dvc", "repro", *target)
    print(f"\ndvc repro: {tally.report()}")
