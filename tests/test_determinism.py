"""The same code, parameters, data and seeds give the same bits, wherever and however they are run on a CPU."""

import shutil

import pytest
import torch

from tailcal import checkpoint, params, portable, train
from tests.conftest import Project
from tests.killing import artefacts

DATASET = "--dataset digits_lt"
CELL = f"{DATASET} --representation ce"


def run_stages(p: Project, threads: int | None, classifiers: tuple[str, ...]) -> dict[str, bytes]:
    """Everything up to the measurements of one representation, with so many threads allowed; classifiers in order.

    threads None: in this process, which has torch already, and allows itself one.
    """
    shutil.rmtree(p.root / "metrics/cells")
    shutil.rmtree(p.root / "metrics/headline")
    allowed = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")}
    stages = [f"download {DATASET}", f"subsample {DATASET}", f"represent {CELL}"]
    stages += [f"{stage} {CELL} --classifier {name}" for stage in ("calibrate", "evaluate") for name in classifiers]
    if threads:
        p.in_order(*stages, **allowed)
    for stage in () if threads else stages:
        p.inside(*stage.split())
    return artefacts(p.root)


@pytest.mark.pipeline
def test_threads_neighbours_order_and_folder_change_no_bit(project):
    one = run_stages(project(), None, ("joint", "mislas"))
    other = run_stages(project(("replicas: 1", "replicas: 3"), name="elsewhere"), 4, ("mislas", "joint"))
    assert any(name.endswith(".safetensors") for name in one)
    assert any(name.endswith(".npz") for name in one)
    assert one == other


@pytest.mark.pipeline
def test_an_experiment_in_a_copy_gives_the_same_bits(project, long):
    if not long:
        pytest.skip("twice the whole pipeline: pytest --long")
    workspace, temporary = project(), project(name="temporary")
    workspace.run("dvc", "repro")
    temporary.run("dvc", "exp", "run", "--temp", "-n", "same")
    temporary.run("dvc", "exp", "apply", "same")
    temporary.run("dvc", "checkout")
    assert artefacts(temporary.root) == artefacts(workspace.root)


def test_other_instructions_are_told_in_the_provenance_and_have_checkpoints_of_their_own(monkeypatch):
    cpu = torch.device("cpu")
    for name, value in portable.VARIABLES.items():
        monkeypatch.setenv(name, value)
    plain = train.described(cpu)
    assert plain == f"cpu, {torch.backends.cpu.get_cpu_capability()}"
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    assert train.described(cpu) == f"{plain}, MKL_CBWR=AUTO"
    assert checkpoint.fingerprint({"device": plain}) != checkpoint.fingerprint({"device": train.described(cpu)})


@pytest.mark.pipeline
def test_stage_1_goes_on_from_no_checkpoint_of_other_instructions(project, monkeypatch):
    p, found = project(("device: auto", "device: cpu"), cut=True), []
    for value in (portable.VARIABLES["MKL_CBWR"], "AUTO"):
        monkeypatch.setenv("MKL_CBWR", value)
        p.inside("represent", *CELL.split())
        found += [path.name for path in p.root.glob(".scratch/represent/*/*")]  # of the last training alone
    assert len(set(found)) == len(found) == 2


def test_what_cannot_be_deterministic_is_refused():
    train.prepare(params.Runtime.model_validate(RUNTIME))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_a_sum_is_not_split_by_thread():
    numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(4)
    split = numbers.sum()
    train.make_deterministic("float32")
    assert numbers.sum() != split
    whole = numbers.sum()
    torch.set_num_threads(1)
    assert numbers.sum() == whole


RUNTIME = {
    "device": "cpu",
    "replicas": 1,
    "processes": 1,
    "placement": "auto",
    "cuda_graphs": False,
    "checkpoint_seconds": 5,
}
