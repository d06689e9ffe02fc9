"""Hostile input: whatever a file holds, a loader reads it or refuses it in one line that names it.

Every loader is given bytes that were damaged at random (`mutated`) and content that was made up by hypothesis. While it
reads, no process is started, no connection made, no file opened for writing outside the test's own folder (`Guard`),
and its memory is bounded. With --long: at least 10,000 inputs, and the figures are printed.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as save_safetensors
from torchvision.datasets import CIFAR10

from stages import paths
from tailcal import (
    checkpoint,
    cifar_archive,
    evaluated,
    exported,
    files,
    images,
    method,
    models,
    params,
    posthoc,
    predictions,
    sources,
    splits,
    tables,
    weights,
)
from tailcal.cell import CellName
from tailcal.duplicates import TWICE
from tailcal.errors import UserError
from tailcal.models.imagenet import load_pretrained
from tailcal.settings import training as resolve
from tailcal.sources import Raw
from tailcal.sources import folder as folder_source
from tailcal.sources import list as list_source
from tests.conftest import ROOT

MEBI = 1 << 20
INPUTS, LONG_INPUTS = 50, 1000  # of each loader, damaged at random
EXAMPLES, LONG_EXAMPLES = 30, 500  # of each, made up by hypothesis
HYPOTHESIS = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)
MAX_LINE = 3000  # characters of an error line

# What is allowed while a loader reads


class Guard:
    """Watches what the interpreter does, by its audit events, while `active`; only `folder` may be written to."""

    FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.")

    def __init__(self):
        self.active, self.folder = False, ""
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        makes = event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod")
        outside = (writes or makes) and not self.inside(arguments[0])
        if outside or event.startswith(self.FORBIDDEN):
            self.seen.append(f"{event} {arguments[:2]}")

    def inside(self, path: object) -> bool:
        if isinstance(path, int):
            return True
        return f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(f"{self.folder}{os.sep}")

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch what the block does."""
        self.active, self.seen = True, []
        try:
            yield
        finally:
            self.active = False
        assert self.seen == []


GUARD = Guard()


def peak() -> int:
    """Bytes of memory that this process has held at most since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


@contextlib.contextmanager
def bounded(folder: Path, bytes_: int) -> Iterator[None]:
    """Let the block take at most `bytes_` of memory; what it feeds to loaders may be written to `folder` alone.

    Address space is limited as well, so that what is asked for and never used is found, too.
    """
    before = reset_peak()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + bytes_ + 512 * MEBI, limits[1]))
    GUARD.folder = os.path.realpath(folder)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    FIGURES.memory = max(FIGURES.memory, peak() - before)
    assert peak() - before <= bytes_


@dataclass
class Figures:
    """What came of the inputs of each loader, for the README."""

    outcomes: dict[str, Counter] = field(default_factory=dict)
    memory: int = 0

    def note(self, loader: str, outcome: str) -> None:
        self.outcomes.setdefault(loader, Counter())[outcome] += 1


FIGURES = Figures()


@pytest.fixture(scope="module", autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what came of the long form."""
    yield
    if not request.config.getoption("--long"):
        return
    rows_ = [f"{loader}: {sum(of.values()):,} inputs, {dict(of)}" for loader, of in FIGURES.outcomes.items()]
    total = sum(sum(of.values()) for of in FIGURES.outcomes.values())
    last = f"{total:,} inputs in all; at most {FIGURES.memory / MEBI:.0f} MiB more memory than before"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *rows_, last, sep="\n")


@pytest.fixture(scope="module", autouse=True)
def _tables_of_unicode() -> None:
    """Hypothesis makes them, in some 200 MiB, when it first draws a text in a clone: not the memory of any loader."""

    @settings(parent=HYPOTHESIS, max_examples=1)
    @given(st.text())
    def draw(text: str) -> None:
        assert isinstance(text, str)

    draw()


def feed(loader: str, read: Callable[[], object], named: Path | str) -> None:
    """Let a loader read one input: it may succeed, or refuse in one short line that names the file or a part of it."""
    try:
        with GUARD.watch():
            read()
    except UserError as error:
        said = str(error)
    except OSError as error:
        assert error.filename, repr(error)
        said = f"{error.filename}: {error.strerror}"
    else:
        FIGURES.note(loader, "read")
        return
    assert said.isprintable(), ascii(said)
    assert len(said) <= MAX_LINE, said[:200]
    assert str(named) in said, said
    FIGURES.note(loader, "refused")


# Bytes damaged at random

LIES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def mutated(seeds: list[bytes], tokens: list[bytes], rng: random.Random) -> bytes:
    """One of `seeds` with a few things done to it; `tokens` are what may be put into it."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice([1, 4, 16, 256]))
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place:end] = rng.randbytes(end - place)
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.choice([1, 2, 8, 64]))
        elif kind == 3:
            del data[place:end]
        elif kind == 4:
            data[place:place] = data[place:end] * rng.choice([1, 2, 50])
        elif kind == 5:
            width = rng.choice([1, 2, 4, 8])
            lie = rng.choice(LIES) % (1 << 8 * width)
            data[place : place + width] = lie.to_bytes(width, rng.choice(["little", "big"]))
        elif kind == 6:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[place:end] = other[start : start + 256]
        elif kind == 7 and tokens:
            data[place : place if rng.random() < 0.5 else end] = rng.choice(tokens)
        elif kind == 8 and rng.random() < 0.3:
            del data[place:]
    return bytes(data)


@dataclass(frozen=True)
class Loader:
    """A loader to be fed with bytes: valid files to begin with, what reads one, and what its error lines must name."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    name: str  # of the file, which an error line names
    tokens: tuple[bytes, ...] = ()
    share: float = 1.0  # of the inputs that a loader gets
    memory: int = 256 * MEBI
    named: str | None = None  # what error lines must say instead


def array_bytes(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def npz_bytes(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def image_bytes() -> list[bytes]:
    """Small images of every format and of modes with decoders of their own."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 1 << 16, (20, 30), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (colour, "PNG", {}),
        (colour.convert("RGBA"), "PNG", {}),
        (colour.quantize(16), "PNG", {"transparency": 3}),
        (grey16, "PNG", {}),
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "GIF", {}),
        (colour, "BMP", {}),
        (colour, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (grey16, "TIFF", {"compression": "tiff_deflate"}),
        (colour, "WEBP", {}),
        (colour.convert("RGBA"), "WEBP", {"lossless": True}),
    ]
    made = []
    for image, kind, options in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        made.append(stream.getvalue())
    return made


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def pth_bytes(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def state_files() -> list[bytes]:
    state = small_network().state_dict()
    return [pth_bytes(state), pth_bytes(state, _use_new_zipfile_serialization=False)]


CHECKPOINT = {"network": {"w": torch.arange(6.0)}, "optimiser": [[torch.zeros(6)]], "epoch": 1, "history": [{"e": 1}]}


def read_checkpoint(path: Path) -> None:
    """As it is, and once more with the digest that makes its bytes a whole checkpoint; a damaged one is removed."""
    content = path.read_bytes()
    checkpoint.load(path, torch.device("cpu"))
    path.write_bytes(hashlib.sha256(content[32:]).digest() + content[32:])
    state = checkpoint.load(path, torch.device("cpu"))
    assert isinstance(state, dict) if path.exists() else state is None


def checkpoint_bytes() -> list[bytes]:
    content = pth_bytes(CHECKPOINT)
    return [hashlib.sha256(content).digest() + content]


META = {
    "class_names": ["ant", "bee", "cat"],
    "train_counts": [3, 2, 1],
    "holdout_counts": [0, 0, 0],
    "test_counts": [1, 1, 1],
    "source": {"kind": "digits"},
    "imbalance": {"profile": "natural", "seed": 0},
    "raw": {},
    "holdout_per_class": 0,
    "checksums": {"train_images.npy": "0" * 64, "train_labels.npy": "1" * 64},
    "skipped": {"train": 0, "test": 0},
    "duplicates": dict.fromkeys(TWICE, 0),
}
CARD = {
    "format": 1,
    "class_names": ["ant", "bee", "cat"],
    "train_counts": [3, 2, 1],
    "image_size": 8,
    "channels": 1,
    "augmentation": {
        "kind": "pad_crop",
        "pad": 1,
        "flip": False,
        "cutout": 4,
        "fill": 128,
        "mean": [0.3],
        "std": [0.4],
    },
    "network": {"backbone": "resnet8", "head": "linear", "channels": 1, "num_classes": 3},
    "classifier": "crt",
    "settings": {"augmentation": "standard"},
    "rule": "temperature",
    "fitted": {"temperature": 1.5},
    "measured": dict.fromkeys(exported.MeasuredModel.model_fields, 1),
    "cell": {"dataset": "d", "representation": "r", "classifier": "c", "seed": 0},
    "weights": "0" * 64,
    "onnx": None,
    "versions": {"torch": "2"},
    "provenance": {},
}


METRICS = {
    **dict.fromkeys(("top1", "few", "ece", "nll"), 0.5),
    **dict.fromkeys(("top1_std", "few_std", "ece_std", "nll_std"), 0.1),
    "seeds": 2,
    "provenance": {
        "code": "0+0",
        "params": {"dataset": {"imbalance": {"profile": "step", "factor": 1.5, "seed": 0}, "holdout_per_class": 2}},
    },
    "posthoc": {"temperature": {"top1": 0.5, "ece": 0.1, "transductive": False}},
    "posthoc_absent": {"platt": "a reason"},
    "images": {"skipped": {"train": 1}, "duplicates": {"test": 1}},
}


def save_model(folder: Path) -> str:
    """Write the weights that CARD describes; returns their SHA-256."""
    torch.manual_seed(0)
    network = method.set_up(
        models.rebuild(CARD["network"], folder), CARD["classifier"], CARD["settings"], CARD["train_counts"], folder
    )
    weights.save_weights(network, folder / exported.WEIGHTS)
    return files.sha256(folder / exported.WEIGHTS)


def save_plots() -> None:
    """The tables of the cell d/r/c."""
    plots = paths.cell_plots("d", "r", "c")
    files.write_text(plots / "reliability.csv", f"{','.join(evaluated.BINS)}\n0,0.0,1.0,0.5,0.5,2\n")
    classes = "0,ant,3,9,few,0.5,\n1,bee,2,9,few,0.5,\n"
    files.write_text(plots / "per_class.csv", f"{','.join(evaluated.CLASSES)}\n{classes}")


def read_cell(path: Path) -> None:
    """A cell as the report reads it, and the tables it makes of it."""
    cell = evaluated.read_cell(CellName("d", "r", "c"), path, paths.cell_plots("d", "r", "c"))
    tables.rows([cell])
    tables.markdown([cell], [1])
    tables.summary([cell])


def read_weights(path: Path) -> None:
    weights.load_weights(small_network(), path, files.sha256(path))


def read_pretrained(path: Path) -> None:
    load_pretrained(small_network(), path)


def read_model(path: Path) -> None:
    """A model folder whose weights go with its card, or with a sound one where the card is hostile."""
    card, model = exported.load(path.parent)
    pixels = np.zeros((2, card.image_size, card.image_size, card.channels), np.uint8)
    with torch.inference_mode():
        assert model(torch.from_numpy(pixels)).shape == (2, len(card.class_names))


def read_params(path: Path) -> None:
    p = params.load(path)
    for dataset in p.datasets.values():
        sources.configure(dataset)


def read_preset(path: Path) -> None:
    p = params.load(ROOT / "params.yaml")
    sources.configure(params.dataset(p, path.stem, path.parent.parent))


def list_config(path: Path, **keys: str) -> list_source.Config:
    block = {"kind": "list", "root": str(path.parent), "train": path.name, "test": "test.txt", "size": 8, "channels": 3}
    return params.validate(list_source.Config, block | keys, "source")


def read_list(path: Path) -> None:
    (path.parent / "test.txt").write_text("t/a.jpg 0\nt/b.jpg 1\n")
    listing = list_source.load(list_config(path), path.parent)
    for name in listing.train_files:
        inside = os.path.normpath(path.parent / name)
        assert inside.startswith(f"{path.parent}{os.sep}"), name


def read_names(path: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (path.parent / name).write_text(f"{name}/a.jpg 0\n{name}/b.jpg 1\n")
    list_source.load(list_config(path.parent / "train.txt", class_names=path.name), path.parent)


YAML_TOKENS = (
    *(b"&a [", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!int x", b"!!timestamp x", b"!!bool x"),
    *(b"2001-99-99", b"!!float ", b"!!binary =", b"\t", b"? [", b": ", b"- ", b"{", b"}", b"[" * 500, b"\x00", b"\xff"),
    *(b'"\\ud800"', b'"a\\nb": 1', b"9" * 5000, b"1e999", b".nan", b"~", b"null", b"\xef\xbb\xbf", b"\xe2\x80\xa8"),
    *(b"%YAML 9.9", b"---\n", b"...\n", b"|\n", b">\n", b"#", b"1:30", b"0x", b"0b", b"-1", b"true"),
)
JSON_TOKENS = (
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'"\\u0000"'),
    *(b"null", b"true", b"{}", b"[]", b'""', b"-1", b"1e400", b"1.5", b'"\\n"', b"\xff", b"\xef\xbb\xbf", b'"../../x"'),
)
LINE_TOKENS = (
    b"../x.jpg 0\n",
    b"/etc/passwd 0\n",
    b"\0",
    b" 99999999999\n",
    b"a/../../b 1\n",
    b"\r",
    b"\xe2\x80\xa8",
    b"..",
)
NPY_TOKENS = (
    b"'|O'",
    b"'<f8'",
    b"'<U99999'",
    b"(-1,)",
    b"(99999999999999999999,)",
    b"True",
    b"[('a','O')]",
    b"(" * 300,
)

LOADERS = {
    "params.yaml": Loader(
        lambda: [(ROOT / "params.yaml").read_bytes()], read_params, "params.yaml", YAML_TOKENS, share=0.2
    ),
    "a preset": Loader(
        lambda: [path.read_bytes() for path in sorted((ROOT / "presets").glob("*.yaml"))],
        read_preset,
        "presets/x.yaml",
        YAML_TOKENS,
        share=0.2,
    ),
    "a list file": Loader(
        lambda: [b"a.jpg 0\nb c.jpg 1\n# x\nd/e.jpg 1\n", b"\xef\xbb\xbfa.jpg\t0\r\nb.jpg 1\r\n"],
        read_list,
        "list.txt",
        LINE_TOKENS,
    ),
    "a file of class names": Loader(
        lambda: [b"crane\ncat\n", "ü\n猫\n".encode()], read_names, "names.txt", LINE_TOKENS, named=".txt"
    ),
    "an image": Loader(image_bytes, lambda path: images.read_image(path, 8, 3), "image", share=2, memory=2048 * MEBI),
    "a grey image": Loader(image_bytes, lambda path: images.read_image(path, 8, 1), "image", memory=2048 * MEBI),
    "npy": Loader(
        lambda: [
            array_bytes(np.arange(12.0).reshape(3, 4)),
            array_bytes(np.asfortranarray(np.ones((3, 4), np.uint8))),
            array_bytes(np.array([{}, 1], object), allow_pickle=True),
            array_bytes(np.zeros(2, [("a", "<i4"), ("b", "<U3")])),
        ],
        lambda path: (files.read_array(path), files.read_array(path, mmap=True)),
        "array.npy",
        NPY_TOKENS,
    ),
    "npz": Loader(
        lambda: [npz_bytes(a=np.arange(5), b=np.ones((2, 3), np.float32)), npz_bytes(a=np.zeros(0), b=np.zeros(3))],
        lambda path: files.read_arrays(path, ["a", "b"]),
        "arrays.npz",
        NPY_TOKENS,
    ),
    "meta.json": Loader(
        lambda: [json.dumps(META, indent=1).encode()],
        lambda path: splits.read_split(path.parent, "train"),
        "meta.json",
        JSON_TOKENS,
        named="",
    ),
    "weights": Loader(
        lambda: [save_safetensors(small_network().state_dict())],
        read_weights,
        "seed0.safetensors",
        JSON_TOKENS,
    ),
    "pretrained .safetensors": Loader(
        lambda: [save_safetensors(small_network().state_dict())],
        read_pretrained,
        "pretrained.safetensors",
        JSON_TOKENS,
    ),
    "pretrained .pth": Loader(state_files, read_pretrained, "pretrained.pth"),
    "a checkpoint": Loader(checkpoint_bytes, read_checkpoint, "seed0.pt"),
    "model.json": Loader(
        lambda: [json.dumps(CARD, indent=1).encode()],
        read_model,
        "model/model.json",
        JSON_TOKENS,
        share=0.5,
        named="model",
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_bytes_are_read_or_refused_in_one_line(name, tmp_path, long):
    loader = LOADERS[name]
    seeds, rng = loader.seeds(), random.Random(zlib.crc32(name.encode()))
    path = tmp_path / loader.name
    path.parent.mkdir(exist_ok=True)
    if name == "model.json":
        digest = save_model(path.parent).encode()
        seeds = [seed.replace(b"0" * 64, digest) for seed in seeds]
    if loader.seeds is not image_bytes and name not in ("npy", "meta.json"):
        path.write_bytes(seeds[0])
        loader.read(path)  # the undamaged one is right
    with bounded(tmp_path, loader.memory):
        for number in range(round(loader.share * (LONG_INPUTS if long else INPUTS))):
            data = mutated(seeds, list(loader.tokens), rng)
            path.write_bytes(data)
            try:
                feed(name, lambda: loader.read(path), loader.name if loader.named is None else loader.named)
            except Exception as error:
                raise AssertionError(f"input {number}: {data[:300]!r}") from error


# Documents made up by hypothesis

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document of dicts and lists, at any depth."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    return [pair for key in keys for pair in ((document, key), *places(document[key]))]


@st.composite
def edited(draw, document: Any) -> Any:
    """The document with one to three values replaced, removed, or put where there were none."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(made)):
            break
        container, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del container[key]
        elif kind == "replace":
            container[key] = draw(JSON)
        elif isinstance(container, dict):
            container[draw(st.text(max_size=8))] = draw(JSON)
        else:
            container.insert(key, draw(JSON))
    return made


@dataclass(frozen=True)
class Document:
    """A document to be edited, how it is written, and what reads it."""

    content: Any
    read: Callable[[Path], object]
    name: str
    dump: Callable[[Any], str] = json.dumps
    share: float = 1.0


def check_params(path: Path) -> None:
    """What the stage `check` does with params.yaml, short of writing."""
    p = params.load(path)
    for stage in ("representations", "classifiers"):
        for name, block in getattr(p, stage).items():
            method.configure(name, block, stage)
    posthoc.configure(p.evaluate.posthoc)
    for name, dataset in p.datasets.items():
        sources.configure(dataset)
        for stage in ("representations", "classifiers"):
            for each in getattr(p, stage):
                resolve(p, name, each, stage).record(p.precision)


def dump_yaml(content: Any) -> str:
    return yaml.safe_dump(content, allow_unicode=True)


DOCUMENTS = {
    "params.yaml": Document(
        yaml.safe_load((ROOT / "params.yaml").read_text()), check_params, "params.yaml", dump_yaml, 0.2
    ),
    "a preset": Document(
        yaml.safe_load((ROOT / "presets" / "imagenet_lt.yaml").read_text()), read_preset, "presets/x.yaml", dump_yaml
    ),
    "meta.json": Document(META, lambda path: splits.read_meta(path.parent), "meta.json"),
    "metrics": Document(METRICS, read_cell, "metrics/cells/d/r/c.json"),
    "model.json": Document(CARD, read_model, "model/model.json"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_any_content_are_read_or_refused_in_one_line(name, tmp_path, monkeypatch, long):
    document = DOCUMENTS[name]
    content, path = copy.deepcopy(document.content), tmp_path / document.name
    path.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if name == "model.json":
        content["weights"] = save_model(path.parent)
    if name == "metrics":
        save_plots()
    path.write_text(document.dump(content))
    document.read(path)

    @settings(parent=HYPOTHESIS, max_examples=round(document.share * (LONG_EXAMPLES if long else EXAMPLES)))
    @given(edited(content))
    def fuzz(made: Any) -> None:
        try:
            path.write_text(document.dump(made))
        except (UnicodeEncodeError, yaml.YAMLError):  # a lone surrogate is no text, so it cannot come from a file
            return
        feed(f"{name}, edited", lambda: document.read(path), "")

    with bounded(tmp_path, 256 * MEBI):
        fuzz()


@st.composite
def lines(draw) -> bytes:
    """A list file of lines that are nearly right."""
    path = st.text(max_size=12) | st.sampled_from(["../a.jpg", "/a", "a/../../b", ".", "..", "a\0b", "a.jpg", "b.jpg"])
    label = st.integers(-1, 3).map(str) | st.text(max_size=3) | st.just("9" * 12)
    made = draw(st.lists(st.tuples(path, st.sampled_from([" ", "\t", "", "\r"]), label), max_size=6))
    return "\n".join(f"{path}{blank}{label}" for path, blank, label in made).encode("utf-8", "surrogatepass")


def test_list_files_of_any_lines(tmp_path, long):
    @settings(parent=HYPOTHESIS, max_examples=LONG_EXAMPLES if long else EXAMPLES)
    @given(lines())
    def fuzz(data: bytes) -> None:
        (tmp_path / "list.txt").write_bytes(data)
        feed("a list file, made up", lambda: read_list(tmp_path / "list.txt"), ".txt")

    with bounded(tmp_path, 64 * MEBI):
        fuzz()


# A tree of folders: paths of up to three names, and what lies there.
NAME = st.sampled_from(
    ["a", "b", "train", "test", "x.jpg", "y.PNG", ".h", "..x", "n\n.jpg", "\udcff.jpg", "ü.gif", " "]
)
TREE = st.dictionaries(
    st.lists(NAME, min_size=1, max_size=3).map("/".join),
    st.sampled_from(["folder", "file", "image", "outside", "outside folder", "circle", "dangling", "fifo"]),
    max_size=8,
)


PIXEL = image_bytes()[0]


def plant(root: Path, outside: Path, tree: dict[str, str]) -> None:
    """Make the tree below `root`, as far as no name is in another's way."""
    for name, kind in tree.items():
        path = root / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, FileNotFoundError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "folder":
                path.mkdir()
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind in ("file", "image"):
                path.write_bytes(PIXEL if kind == "image" else b"text")
            else:
                targets = {"outside": outside / "secret", "outside folder": outside, "circle": root}
                path.symlink_to(targets.get(kind, "nowhere"))


def read_tree(root: Path, test_per_class: int) -> None:
    """List a tree, and decode what is listed."""
    block = {"kind": "folder", "path": str(root), "size": 4, "channels": 1, "test_per_class": test_per_class}
    listing = folder_source.load(params.validate(folder_source.Config, block, "source"), root)
    for name in [*listing.train_files, *listing.test_files]:
        assert os.path.normpath(root / name).startswith(f"{root}{os.sep}")
        with contextlib.suppress(UserError):
            images.read_image(root / name, 4, 1)


def test_folders_of_any_shape_with_links_out_of_them(tmp_path, long):
    outside, root = tmp_path / "outside", tmp_path / "root"

    @settings(parent=HYPOTHESIS, max_examples=LONG_EXAMPLES if long else EXAMPLES)
    @given(TREE, st.sampled_from([0, 1]), st.booleans())
    def fuzz(tree: dict[str, str], test_per_class: int, classes: bool) -> None:
        for folder in (outside, root):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (outside / "secret").write_bytes(b"secret")
        if classes:  # so that more of the trees are nearly right
            tree = {f"{split}/{k}/{i}.png": "image" for split in ("train", "test") for k in "ab" for i in "12"} | tree
        plant(root, outside, tree)
        before = sorted(outside.iterdir())
        feed("an image folder", lambda: read_tree(root, test_per_class), root)
        assert sorted(outside.iterdir()) == before
        assert (outside / "secret").read_bytes() == b"secret"

    with bounded(tmp_path, 64 * MEBI):
        fuzz()


# Archives


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def batch(n: int = 2) -> bytes:
    pixels = np.arange(n * 3072, dtype=np.uint64).astype(np.uint8).reshape(n, 3072)
    return pickle.dumps({"data": pixels, "labels": [k % 2 for k in range(n)]})


def python2_batch() -> bytes:
    """A batch as the official ones are: pickled by Python 2 and an old NumPy."""
    pixels = bytes(range(256)) * 12
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tbU\x06labels](K\x01eU\x0bbatch_labelU\x01xu."
    )


class Code:
    """Unpickled as a call."""

    def __init__(self, call: Callable, *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


PARTS = {"train": batch(), "test": batch(), "about": pickle.dumps({"label_names": ["ant", "bee"]})}


def archive_members(parts: dict[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(member(f"cifar/{name}"), content) for name, content in parts.items()]


def read_archive(path: Path, parts: dict[str, bytes] = PARTS, sha256: str | None = None) -> Raw:
    """Read an archive; its checksum, where none is given, and those of `parts` are taken to be the official ones."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in parts.items()}

    class Official(CIFAR10):
        filename, url, base_folder = path.name, "http://127.0.0.1:9/", "cifar"
        train_list, test_list = ([[name, md5[name]]] for name in ("train", "test"))
        meta: ClassVar = {"filename": "about", "key": "label_names", "md5": md5["about"]}

    sha256 = sha256 or files.sha256(path)
    return cifar_archive.load(Official, sha256, cifar_archive.ArchiveConfig(), path.parent)


@pytest.fixture
def unpacking(tmp_path, monkeypatch) -> Path:
    """The folder for temporary ones, with what `Guard` sees as relative to a descriptor in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_batches_of_python_2_are_read(tmp_path):
    path, parts = tmp_path / "archive.tar.gz", PARTS | {"train": python2_batch()}
    path.write_bytes(tar_bytes(archive_members(parts)))
    raw = read_archive(path, parts)
    assert raw.train_images.shape == (1, 32, 32, 3)
    assert raw.train_images[0, 0, :3].tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert (raw.train_labels.tolist(), raw.class_names) == ([1], ["ant", "bee"])


@pytest.mark.parametrize("train", [b"", pickle.dumps([]), pickle.dumps({"data": [1]}), pickle.dumps({"labels": [0]})])
def test_batches_that_are_none_of_cifar(unpacking, train):
    path, parts = unpacking / "archive.tar.gz", PARTS | {"train": train}
    path.write_bytes(tar_bytes(archive_members(parts)))
    with pytest.raises(UserError, match=r"cannot be unpacked to .* although its checksum is right") as caught:
        read_archive(path, parts)
    assert str(caught.value).startswith(f"{path}: ")
    assert list(unpacking.iterdir()) == [path]


def test_archives_damaged_anywhere(unpacking, long):
    rng, path = random.Random(2), unpacking / "archive.tar.gz"
    whole = tar_bytes(archive_members(PARTS))
    plain = gzip.decompress(whole)
    with bounded(unpacking, 256 * MEBI):
        for number in range(LONG_INPUTS if long else INPUTS):
            # Every other one is damaged inside, below the checksum of gzip.
            path.write_bytes(mutated([whole], [], rng) if number % 2 else gzip.compress(mutated([plain], [], rng), 1))
            feed("a CIFAR archive", lambda: read_archive(path), path)
            assert list(unpacking.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no filter of tar members")
def test_an_archive_puts_no_file_anywhere(unpacking):
    """Names with `..`, absolute ones, links and devices, with the official checksum: nothing is written."""
    path = unpacking / "in" / "archive.tar.gz"
    path.parent.mkdir()
    hostile = [
        *(
            member(name)
            for name in ("../escaped", f"{unpacking}/absolute", "cifar/../../escaped", "cifar/../train", "")
        ),
        *(member("cifar/link", type=kind, linkname="/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
        *(member("cifar/train", type=kind) for kind in (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)),
        member("cifar/train", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    ]
    with bounded(unpacking, 256 * MEBI):
        for info in hostile:
            content = b"" if info.type != tarfile.REGTYPE else b"written"
            path.write_bytes(tar_bytes([(info, content), *archive_members(PARTS)]))
            feed("a hostile CIFAR archive", lambda: read_archive(path), path)
            assert [entry.name for entry in unpacking.rglob("*")] == ["in", "archive.tar.gz"]


def test_an_archive_with_another_checksum_is_not_even_opened(tmp_path, monkeypatch):
    rng, path = random.Random(3), tmp_path / "archive.tar.gz"
    whole = tar_bytes(archive_members(PARTS))

    def unreachable(url: str, archive: Path) -> Iterator[bytes]:
        raise UserError(f"cannot fetch {url} to {archive}")

    monkeypatch.setattr(cifar_archive, "_blocks", unreachable)
    for module, name in ((tarfile, "open"), (pickle, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("opened"))
    with bounded(tmp_path, 64 * MEBI):
        for _ in range(INPUTS):
            path.write_bytes(mutated([whole], [], rng))
            feed("a CIFAR archive with another checksum", lambda: read_archive(path, sha256="0" * 64), path)
            assert path.is_file()


# Made with intent


def bomb_npz() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", array_bytes(np.zeros(32 * MEBI)))
    return stream.getvalue()


def bomb_pth() -> bytes:
    """Pretrained weights whose tensor of zeros is compressed, which torch never does and yet reads."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pth_bytes({"0.weight": torch.zeros(64 * MEBI)}))) as whole,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for part in whole.infolist():
            archive.writestr(part.filename, whole.read(part))
    return stream.getvalue()


def lying_npy(shape: tuple, descr: str = "<f8") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


def lying_npz(shape: tuple) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.npy", lying_npy(shape))
    return stream.getvalue()


def lying_safetensors(length: int, header: Any) -> bytes:
    return length.to_bytes(8, "little") + (header if isinstance(header, bytes) else json.dumps(header).encode())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiled_tiff(tile: int, compression: int) -> bytes:
    """A grey image of 16 x 16 pixels in one tile of `tile` x `tile`."""
    tags = [(256, 16), (257, 16), (258, 8), (259, compression), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 1000), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return head.ljust(1000, b"\0") + zlib.compress(bytes(MEBI))


def read_npz(path: Path) -> None:
    files.read_arrays(path, ["a"])


def read_predictions(path: Path) -> None:
    predictions.read(path, files.sha256(path), 3)


def read_picture(path: Path) -> None:
    images.read_image(path, 8, 3)


SPAN = {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 40]}
CRAFTED: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "npy of a terabyte": (lambda: lying_npy((1 << 37,)), files.read_array),
    "npy of more than any": (lambda: lying_npy((1 << 80,)), files.read_array),
    "npy whose size overflows to 0": (lambda: lying_npy((1 << 32, 1 << 32)), files.read_array),
    "npy of a negative size": (lambda: lying_npy((-8,)), files.read_array),
    "npy of objects": (lambda: array_bytes(np.array([Code(os.mkdir, "x")]), allow_pickle=True), files.read_array),
    "npy of empty texts": (lambda: lying_npy((1 << 60,), "<U0"), files.read_array),
    "a zip in place of npy": (lambda: npz_bytes(a=np.zeros(3)), files.read_array),
    "a pickle in place of npy": (lambda: pickle.dumps(Code(os.mkdir, "x")), files.read_array),
    "npz that unpacks to a quarter of a gigabyte": (bomb_npz, read_npz),
    "npz of a terabyte": (lambda: lying_npz((1 << 37,)), read_npz),
    "npz of objects": (lambda: npz_bytes(a=np.array([Code(os.mkdir, "x")])), read_npz),
    "npz without the array": (lambda: npz_bytes(b=np.zeros(3)), read_npz),
    "JSON of 100,000 brackets": (lambda: b"[" * 100_000, files.read_json),
    "JSON of a long number": (lambda: b"9" * 10_000, files.read_json),
    "safetensors with a header of 2^63": (lambda: lying_safetensors(1 << 63, b"{}"), read_weights),
    "safetensors with a header of 2^30": (lambda: lying_safetensors(1 << 30, b"{}"), read_weights),
    "safetensors past its end": (lambda: lying_safetensors(90, {"0.weight": SPAN}), read_weights),
    "safetensors of a nesting header": (lambda: lying_safetensors(50_000, b"[" * 50_000), read_weights),
    "PNG of 2^31 pixels a side": (lambda: png((1 << 31) - 1, (1 << 31) - 1), read_picture),
    "PNG of 100 million pixels": (lambda: png(10_000, 10_000), read_picture),
    "PNG without pixels": (lambda: png(0, 0), read_picture),
    "PNG whose profile is a bomb": (
        lambda: png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 28), 1))),
        read_picture,
    ),
    "PNG whose text is a bomb": (
        lambda: png(8, 8, *[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))] * 99),
        read_picture,
    ),
    "TIFF in one tile of 2^28 bytes": (lambda: tiled_tiff(1 << 14, 1), read_picture),
    "TIFF in one deflated tile of 2^28 bytes": (lambda: tiled_tiff(1 << 14, 8), read_picture),
    "TIFF in one deflated tile of 2^40 bytes": (lambda: tiled_tiff(1 << 20, 8), read_picture),
    "npz of predictions that unpacks": (bomb_npz, read_predictions),
    "npz of predictions of a terabyte": (
        lambda: lying_npz((1 << 37,)),
        read_predictions,
    ),
    "pth that unpacks to a quarter of a gigabyte": (bomb_pth, read_pretrained),
    "pth of no numbers": (lambda: pth_bytes({"0.weight": torch.full((3, 4), torch.nan)}), read_pretrained),
    "pth without its numbers": (lambda: pth_bytes({"0.weight": torch.empty(3, 4, device="meta")}), read_pretrained),
    "pth with gaps": (lambda: pth_bytes({"0.weight": torch.eye(3, 4).to_sparse()}), read_pretrained),
    "YAML that stands for more than any memory": (
        lambda: (
            b"a: &a {x: 1}\n"
            + b"".join(b"%c: &%c {<<: [%b]}\n" % (k + 1, k + 1, b"*%c," % k * 9) for k in range(97, 110))
        ),
        check_params,
    ),
    "YAML that would print more than any memory": (
        lambda: b"a: [&a [x]" + b"".join(b", &%c [%b]" % (k + 1, b"*%c," % k * 9) for k in range(97, 110)) + b"]",
        check_params,
    ),
    "YAML of 2,000 brackets": (lambda: b"a: " + b"[" * 2000, check_params),
    "YAML of an impossible date": (lambda: b"a: 2001-99-99", check_params),
    "YAML of a long number": (lambda: b"a: " + b"9" * 5000, check_params),
    "YAML of a number that is none": (lambda: b"a: !!int x", check_params),
    "YAML with code": (lambda: b"a: !!python/object/apply:os.mkdir [x]", check_params),
    "pth with code": (lambda: pth_bytes({"a": Code(os.mkdir, "x")}), read_pretrained),
    "pth of before 2020 with code": (
        lambda: pth_bytes({"a": Code(os.mkdir, "x")}, _use_new_zipfile_serialization=False),
        read_pretrained,
    ),
    "a pickle in place of pth": (lambda: pickle.dumps(Code(os.mkdir, "x")), read_pretrained),
    "pth whose names are numbers": (lambda: pth_bytes({1: torch.zeros(2)}), read_pretrained),
    "pth of other shapes": (lambda: pth_bytes(torch.nn.Linear(4, 2).state_dict()), read_pretrained),
    "pth that spreads one number over a terabyte": (
        lambda: pth_bytes({"0.weight": torch.zeros(1).expand(1 << 38)}),
        read_pretrained,
    ),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", read_picture),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_what_was_made_with_intent_ends_in_one_line_and_little_memory(name, tmp_path, monkeypatch):
    make, read = CRAFTED[name]
    path = tmp_path / "file"
    path.write_bytes(make())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with bounded(tmp_path, 128 * MEBI):
        feed("made with intent", lambda: read(path), path)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("key", ["root", "train", "class_names", "path"])
@pytest.mark.parametrize("value", ["a\0b", "~no such user/x", "x" * 300, "/proc/self/mem", "/dev/zero", "."])
def test_places_that_cannot_be_are_named(key, value, tmp_path, monkeypatch):
    kind = "folder" if key == "path" else "list"
    lists = {"root": str(tmp_path), "train": "list.txt", "test": "list.txt", "class_names": "list.txt"}
    block = {"kind": kind, "size": 8, "channels": 3} | (lists if kind == "list" else {}) | {key: value}
    module = {"list": list_source, "folder": folder_source}[kind]
    (tmp_path / "list.txt").write_text("a 0\nb 1\n")

    def read() -> None:
        module.load(params.validate(module.Config, block, "source"), tmp_path)

    monkeypatch.chdir(tmp_path)
    with bounded(tmp_path, 64 * MEBI):
        feed("places", read, "")


NETWORK = CARD["network"]
CARDS = [
    *({"network": NETWORK | {"channels": value}} for value in (1 << 40, -1, 0, 3, 1.5, None)),
    *({"network": NETWORK | {"num_classes": value}} for value in (1 << 40, -1, 0, 4)),
    *({"network": NETWORK | more} for more in ({"trains": "last_block"}, {"head": []}, {"backbone": "none"}, {"x": 1})),
    *({"image_size": value} for value in (10**9, 20_000)),
    *({"train_counts": value} for value in ([10**30, 1, 1], [2**62] * 3)),
    {"channels": 3},
    {"augmentation": CARD["augmentation"] | {"mean": [0.1] * 3, "std": [1.0] * 3}},
    {"classifier": "../x"},
]


@pytest.mark.parametrize("change", CARDS, ids=str)
def test_a_model_whose_card_does_not_describe_it_is_refused(change, tmp_path):
    path = tmp_path / exported.CARD
    path.write_text(json.dumps(CARD | {"weights": save_model(tmp_path)} | change))
    with bounded(tmp_path, 64 * MEBI), pytest.raises(UserError, match=r"model\.json"):
        read_model(path)
