"""Kill anything, any time: what comes out in the end is, bit for bit, what an undisturbed run makes.

DVC writes dvc.lock, and a lock file of its own, in place. When it is killed meanwhile, one line mends that
(`killing.MEND`); everything else recovers by itself.

`pytest tests/test_kills.py --long -s` kills more than a hundred times and prints how often, what, and what it cost.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10

from tests.conftest import ROOT, edit
from tests.killing import Tally, artefacts, kill_until_done, leftovers, processes
from tests.test_sources import stand_in

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("_heeding_interrupts")]
DATASET = ("--dataset", "digits_lt")
CELL = (*DATASET, "--representation", "ce")
BEFORE = {"download": (DATASET, 1), "subsample": (DATASET, 1)}  # how often each is killed at a time
STAGES = {
    "represent": (CELL, 2),
    "calibrate": ((*CELL, "--classifier", "mislas"), 1),
    "evaluate": ((*CELL, "--classifier", "mislas"), 1),
}
BEGUN = ("check", "subsample@digits_lt", "calibrate@digits_lt-ce-mislas", "evaluate@digits_lt-ce-mislas")
OFTEN = ("checkpoint_seconds: 5", "checkpoint_seconds: 0")
LONGER = ("epochs: 8\n", "epochs: 30\n")


@pytest.fixture
def _heeding_interrupts():
    """A shell has what it puts into the background ignore SIGINT, and so would all that is started from here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def test_a_killed_stage_ends_with_the_same_bits(project, long, tmp_path):
    undisturbed = project(OFTEN, *[LONGER] * long, cut=not long)
    killed = undisturbed.copy(tmp_path / "killed")
    generator, tally = random.Random(0), Tally()
    for name, (arguments, kills) in ((BEFORE | STAGES) if long else STAGES).items():
        began = time.monotonic()
        (undisturbed.stage if long else undisturbed.inside)(name, *arguments)
        took = time.monotonic() - began
        if long:
            times, how = (0.4 * took, 0.95 * took), {}
        else:  # each process that is only to end well would import torch for longer than it works
            last = functools.partial(killed.inside, name, *arguments)
            times, how = (0.0, 0.9 * took), {"in_its_work": True, "last": last}
        command = ("python", "-m", f"stages.{name}", *arguments)
        enough = len(tally.kills) + kills * (10 if long else 1)
        while len(tally.kills) < enough:
            shutil.rmtree(killed.root / ".scratch", ignore_errors=True)
            kill_until_done(killed, generator, tally, kills, times, ("stage", "group"), *command, **how)
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
    for _ in range(8 if long else 1):
        shutil.rmtree(killed.root / ".scratch", ignore_errors=True)
        kill_until_done(killed, generator, tally, 2, (0.2 * took, 0.9 * took), ("stage", "group"), *command)
        assert artefacts(killed.root) == artefacts(undisturbed.root)
        assert not leftovers(killed.root)
    print(f"\npacking: {tally.report()}")


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends the server's archive in a second, a little at a time."""

    def do_GET(self):
        archive = self.server.archive
        self.send_response(200)
        self.send_header("Content-Length", str(len(archive)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has been killed
            for start in range(0, len(archive), len(archive) // 10):
                self.wfile.write(archive[start:][: len(archive) // 10])
                time.sleep(0.1)

    def log_message(self, *_):
        pass


MIRRORED = """
import json
from pathlib import Path

from torchvision.datasets import CIFAR10

from stages import download
from tailcal import errors
from tailcal.sources import cifar10

md5, cifar10.SHA256 = json.loads(Path("stand_in.json").read_text())
CIFAR10.train_list = [[name, md5[name]] for name, _ in CIFAR10.train_list]
CIFAR10.test_list = [[name, md5[name]] for name, _ in CIFAR10.test_list]
CIFAR10.meta = CIFAR10.meta | {"md5": md5[CIFAR10.meta["filename"]]}
if __name__ == "__main__":
    errors.run(download.main)
"""


def test_a_killed_download_is_fetched_again(project, long):
    if not long:
        pytest.skip("its leftovers have a short test of their own: pytest --long")
    archive, checksums, _ = stand_in("cifar10", CIFAR10)
    undisturbed, killed = project(), project(name="killed")
    command = ("python", "-m", "stages.mirrored", "--dataset", "cifar10_lt_100")
    generator, tally = random.Random(3), Tally()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.archive = archive
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for one in (undisturbed, killed):
            url = f"http://127.0.0.1:{server.server_port}/archive"
            edit(one.root / "presets/cifar10_lt_100.yaml", [("kind: cifar10\n", f"kind: cifar10\n  url: {url}\n")])
            (one.root / "stages/mirrored.py").write_text(MIRRORED)
            (one.root / "stand_in.json").write_text(json.dumps([checksums, hashlib.sha256(archive).hexdigest()]))
        began = time.monotonic()
        undisturbed.run(*command)
        took = time.monotonic() - began
        for _ in range(4):
            shutil.rmtree(killed.root / "data/downloads", ignore_errors=True)
            kill_until_done(killed, generator, tally, 2, (0.5 * took, took), ("stage", "group"), *command)
            assert artefacts(killed.root) == artefacts(undisturbed.root)
            assert not leftovers(killed.root)
        server.shutdown()
    print(f"\ndownload: {tally.report()}")


def test_a_killed_repro_ends_with_the_same_bits(project, long, tmp_path):
    """From several stages on, and with the long dvc.lock that DVC takes its time to write."""
    if not long:
        pytest.skip("tests/test_pipeline.py kills dvc repro once: pytest --long")
    undisturbed, begun = project(("checkpoint_seconds: 5", "checkpoint_seconds: 1"), LONGER), []
    shutil.copy(ROOT / "dvc.lock", undisturbed.root)
    for stage in BEGUN:
        undisturbed.run("dvc", "repro", stage)
        begun.append(undisturbed.copy(tmp_path / f"from {stage}"))
    undisturbed.run("dvc", "repro")

    generator, tally, kills = random.Random(2), Tally(), 8
    for before in begun:
        enough = len(tally.kills) + kills
        while len(tally.kills) < enough:
            killed = before.copy(tmp_path / f"killed {len(tally.kills)}")
            moments = ((1.0, 12.0), ("stage", "dvc", "group"))
            kill_until_done(killed, generator, tally, kills, *moments, "dvc", "repro")
            assert artefacts(killed.root) == artefacts(undisturbed.root)
            assert not leftovers(killed.root)
            assert not list(processes(killed.root))
            shutil.rmtree(killed.root)
    print(f"\ndvc repro: {tally.report()}")
