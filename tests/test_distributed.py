"""Two processes (gloo, on the CPU) against one: the same losses and weights but for rounding, whatever the loss."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from tailcal import distributed
from tailcal.errors import UserError
from tailcal.models import resnet
from tests import distributed_worker
from tests.conftest import ENVIRONMENT
from tests.test_dvc import ROOT

# One process and two differ by rounding, which grows tenfold an epoch where the rate is high: so it stays below 4e-6.
SLOW = [("lr: 0.1\n", "lr: 0.0001\n"), ("warmup_lr: 0.02\n", "warmup_lr: 0.0001\n")]
SHORT = [("warmup: 5", "warmup: 1"), ("epochs: 8\n", "epochs: 3\n"), ("- 6\n", "- 2\n")]
METHODS = ("ce", "class_balanced", "ldam_drw", "bagmar", "fsgl", "mislas", "marc")


def work(processes: int, out: Path, epochs: int = 3, methods=METHODS) -> tuple[dict, dict]:
    """Losses and weights of each method, trained by so many processes: one is this one, which has torch already."""
    out.mkdir(parents=True, exist_ok=True)
    arguments = [str(out), str(epochs), *methods]
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["distributed_worker", *arguments])
            distributed_worker.main()
    else:
        start(processes, arguments)
    losses = {name: json.loads((out / f"{name}.json").read_text()) for name in methods}
    return losses, {name: torch.load(out / f"{name}.pt", weights_only=True) for name in methods}


def start(processes: int, arguments: list[str]) -> None:
    """Have so many processes train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed_worker", *arguments],
                cwd=ROOT,
                env=ENVIRONMENT
                | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
                | {key: str(value) for key, value in place.items()},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said


def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    alone, together = work(1, tmp_path / "alone"), work(2, tmp_path / "together")
    for name in METHODS:
        assert together[0][name] == pytest.approx(alone[0][name], rel=2e-3, abs=2e-4)
        for key, value in alone[1][name].items():
            torch.testing.assert_close(together[1][name][key], value, rtol=2e-2, atol=2e-3)

    longer, _ = work(1, tmp_path / "together", epochs=4, methods=("bagmar",))
    assert longer["bagmar"][:3] == together[0]["bagmar"]  # taken up, not begun anew
    assert len(longer["bagmar"]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_in_step_is_batch_norm_in_any_precision(dtype):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        x = (3 + 2 * torch.randn(16, 4, 5, 5)).to(dtype)
        weights = torch.rand(16, 4, 5, 5)
        plain, ours = resnet.BatchNorm2d(4), distributed.SyncBatchNorm2d(4)
        known, own = x.clone().float().requires_grad_(), x.clone().requires_grad_()
        expected, found = plain(known), ours(own)
        (expected.sigmoid() * weights).sum().backward()
        (found.sigmoid() * weights).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert found.dtype == own.grad.dtype == dtype
    half = dtype == torch.bfloat16
    close = {"rtol": 1e-2, "atol": 1e-2} if half else {}
    torch.testing.assert_close(found.float(), expected, **close)
    # Gradients are sums over bf16's rounding of results and of their gradients too.
    close = {"rtol": 5e-2, "atol": 5e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(own.grad.float(), known.grad, **close)
    for mine, given in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, given.grad, **close)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


@pytest.mark.parametrize(("epochs", "differ"), [((3, 0), True), ((3, 3), False)])
def test_processes_that_do_not_see_the_same_checkpoint_do_not_train(epochs, differ, monkeypatch):
    def gather(out, _own):
        for tensor, epoch in zip(out, epochs, strict=True):
            tensor.fill_(epoch)

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_gather", gather)
    with pytest.raises(UserError, match=r"from different epochs \(0, 3\)") if differ else contextlib.nullcontext():
        distributed.require_same(3, Path("folder/seed0.pt"), torch.device("cpu"))


@pytest.mark.parametrize("speaks", ["first", "later", "both"])
def test_whoever_sees_the_mistake_it_is_told_once(tmp_path, speaks):
    (tmp_path / "worker.py").write_text(
        "import os, sys, time\n"
        "if 'RANK' not in os.environ:\n"
        "    from stages import processes\n"
        "    processes.SHARED_MISTAKE_SECONDS = 1\n"
        "    processes.launch('worker', 2)\n"
        "rank = int(os.environ['RANK'])\n"
        f"if {speaks!r} == 'both' or ({speaks!r} == 'first') == (rank == 0):\n"
        "    time.sleep(0.5 * (rank == 0))\n"
        "    sys.exit('error: one clear line')\n"
        "time.sleep(60)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "worker"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (1, "error: one clear line\n")


def test_half_of_what_torchrun_tells_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(
        UserError, match="has RANK, and lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start with torchrun"
    ):
        distributed.join(torch.device("cpu"))


def test_alone_there_is_nothing_to_share():
    network = torch.nn.Linear(2, 2)
    assert distributed.share(network) is network
    assert distributed.is_first()
    assert distributed.record() == {}


@pytest.mark.pipeline
def test_a_batch_that_processes_cannot_share_is_refused(project, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    p = project(("batch_size: 64", "batch_size: 63"), cut=True)
    said = p.inside("represent", "--dataset", "digits_lt", "--representation", "ce", ok=False)
    assert said.startswith("error: params.yaml: recipes.digits.batch_size is 63, which 2 processes cannot share evenly")
    assert said.count("\n") == 1, said
    assert not (p.root / "data/representations/digits_lt/ce").exists()


@pytest.mark.pipeline
def test_a_stage_started_with_two_processes_ends_as_with_one(project):
    cell = ("--dataset", "digits_lt", "--representation", "ce")
    one, two = (
        project(*SLOW, *SHORT, name="one", cut=True),
        project(*SLOW, *SHORT, ("processes: 1", "processes: 2"), name="two", cut=True),
    )
    one.inside("represent", *cell)
    two.stage("represent", *cell)
    folder = "data/representations/digits_lt/ce"
    alone, shared = (pd.read_csv(p.root / folder / "history.csv")["loss"].to_numpy() for p in (one, two))
    assert shared == pytest.approx(alone, rel=5e-5)
    told = json.loads((two.root / folder / "provenance.json").read_text())
    assert told["processes"] == 2
    assert "processes" not in json.loads((one.root / folder / "provenance.json").read_text())


@pytest.mark.pipeline
def test_two_processes_make_a_published_cell_as_one_does(project):
    plan = {
        "seeds": [0],
        "tables": {
            "short": {
                "late_epochs": 2,
                "grids": [{"datasets": ["digits_lt"], "representations": ["ce"], "classifiers": ["joint", "mislas"]}],
            }
        },
        "datasets": {},
        "footing": {},
    }
    made = {}
    for processes in (1, 2):
        p = project(*SLOW, ("processes: 1", f"processes: {processes}"), name=str(processes), cut=True)
        (p.root / "published/params.yaml").write_text(yaml.safe_dump(plan))
        shutil.rmtree(p.root / "metrics/published/cells", ignore_errors=True)
        published = p.inside if processes == 1 else p.stage
        assert published("published").count("cells written: 2") == 1
        cells = {path.parent.name: path for path in (p.root / "metrics/published/cells").rglob("seed0.json")}
        made[processes] = {name: json.loads(path.read_text()) for name, path in cells.items()}
    for name in ("joint", "mislas"):
        one, two = made[1][name], made[2][name]
        assert two["nll"] == pytest.approx(one["nll"], rel=1e-3)
        assert two["best_on_test"]["epochs"] == 2
        assert two["provenance"]["processes"] == two["provenance"]["stage1"]["processes"] == 2
        assert "processes" not in one["provenance"].keys() | one["provenance"]["stage1"].keys()
