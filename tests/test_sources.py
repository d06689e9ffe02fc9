"""Sources: the digits, and the CIFAR archives, which a small stand-in on loopback serves here."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision.datasets
from sklearn.datasets import load_digits

from tailcal import params, sources
from tailcal.errors import UserError
from tailcal.sources import cifar10, cifar100, digits
from tests.test_dvc import ROOT

DIGITS = params.load(ROOT / "params.yaml").datasets["digits_lt"]
LABELS_KEY = {"cifar10": "labels", "cifar100": "fine_labels"}


def test_kinds_are_the_modules():
    assert sources.kinds() == ["cifar10", "cifar100", "digits", "folder", "list"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "datasets.digits_lt.source.kind: must be one of cifar10, cifar100, digits, folder, list, got None"),
        ({"kind": "mnist"}, "got 'mnist'"),
        ({"kind": "digits", "seed": 0}, "params.yaml: datasets.digits_lt.source.test_per_class: this key is missing"),
        ({"kind": "digits", "seed": 0, "test_per_class": 0}, "greater than or equal to 1, got 0"),
        ({"kind": "digits", "seed": -1, "test_per_class": 9}, "source.seed"),
        ({"kind": "cifar10", "root": "x"}, "source.root: unknown key"),
        ({"kind": "cifar100", "url": "ftp://host/file"}, "source.url"),
    ],
)
def test_bad_blocks(block, message):
    with pytest.raises(UserError, match=message):
        sources.configure(DIGITS.model_copy(update={"source": block}))


def test_a_mirror_does_not_change_what_is_recorded():
    config = cifar10.Config(kind="cifar10", url="http://mirror/archive")
    assert config.model_dump() == sources.record(config) == {"kind": "cifar10"}


@pytest.fixture
def configured_digits():
    return digits.Config(kind="digits", test_per_class=50, seed=0)


def test_digits(configured_digits, tmp_path):
    raw = sources.load(configured_digits, tmp_path)
    assert raw.train_images.shape == (1297, 8, 8, 1)
    assert raw.test_images.shape == (500, 8, 8, 1)
    assert raw.train_images.dtype == raw.test_images.dtype == np.uint8
    assert raw.train_labels.dtype == raw.test_labels.dtype == np.int64
    assert raw.class_names == list("0123456789")
    assert np.bincount(raw.test_labels).tolist() == [50] * 10
    # Every image of the package is there once, with its own label, and no grey level was merged with another.
    levels = np.unique(np.concatenate([raw.train_images, raw.test_images]))
    assert len(levels) == 17
    assert (levels[0], levels[-1]) == (0, 255)
    ours = [
        (image.tobytes(), int(label))
        for images, labels in ((raw.train_images, raw.train_labels), (raw.test_images, raw.test_labels))
        for image, label in zip(images, labels, strict=True)
    ]
    official = load_digits()
    theirs = [
        (bytes(int(level) * 255 // 16 for level in image.ravel()), int(label))
        for image, label in zip(official.images, official.target, strict=True)
    ]
    assert sorted(ours) == sorted(theirs)


def test_digits_split_follows_its_seed(configured_digits, tmp_path):
    again = sources.load(configured_digits, tmp_path)
    other = sources.load(configured_digits.model_copy(update={"seed": 1}), tmp_path)
    first = sources.load(configured_digits, tmp_path)
    assert (first.test_images == again.test_images).all()
    assert (first.test_images != other.test_images).any()


def test_digits_need_a_training_image(configured_digits, tmp_path):
    sources.load(configured_digits.model_copy(update={"test_per_class": 173}), tmp_path)
    with pytest.raises(
        UserError, match=r"source\.test_per_class is 174: class 8 has 174 images, so must be at most 173 "
    ):
        sources.load(configured_digits.model_copy(update={"test_per_class": 174}), tmp_path)


def stand_in(kind, dataset):
    """A small archive in the official layout: (its bytes, the MD5 of each member, images and labels by split)."""
    generator = np.random.default_rng(5)
    content, splits = {}, {"train": ([], []), "test": ([], [])}
    for split, members in (("train", dataset.train_list), ("test", dataset.test_list)):
        for name, _ in members:
            data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels = generator.integers(0, 3, 4).tolist()
            content[name] = pickle.dumps({"data": data, LABELS_KEY[kind]: labels})
            splits[split][0].append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            splits[split][1].extend(labels)
    content[dataset.meta["filename"]] = pickle.dumps({dataset.meta["key"]: ["ant", "bee", "cat"]})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, member in content.items():
            info = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    checksums = {name: hashlib.md5(member).hexdigest() for name, member in content.items()}
    return stream.getvalue(), checksums, splits


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on loopback: `answer` (bytes, or None for 404) is what it sends, `requests` what it was asked."""
    monkeypatch.setenv("no_proxy", "*")
    state = SimpleNamespace(answer=b"", promised=None, requests=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if state.answer is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(state.promised or len(state.answer)))
            self.end_headers()
            self.wfile.write(state.answer)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}/archive.tar.gz"
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield state
        listening.shutdown()


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch, server, tmp_path):
    """One of the two sources, expecting the stand-in's checksums, with the stand-in served."""
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[request.param]
    module = {"cifar10": cifar10, "cifar100": cifar100}[request.param]
    archive, md5, splits = stand_in(request.param, dataset)
    monkeypatch.setattr(dataset, "train_list", [[name, md5[name]] for name, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [[name, md5[name]] for name, _ in dataset.test_list])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5[dataset.meta["filename"]]})
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(archive).hexdigest())
    server.answer = archive
    return SimpleNamespace(
        config=module.Config(kind=request.param, url=server.url),
        module=module,
        dataset=dataset,
        splits=splits,
        bytes=archive,
        downloads=tmp_path / "downloads",
        path=tmp_path / "downloads" / dataset.filename,
    )


def test_cifar_is_fetched_once(cifar, server):
    for _ in range(2):
        raw = sources.load(cifar.config, cifar.downloads)
        for split in ("train", "test"):
            images, labels = cifar.splits[split]
            assert (getattr(raw, f"{split}_images") == np.concatenate(images)).all()
            assert getattr(raw, f"{split}_labels").tolist() == labels
        assert raw.train_images.dtype == np.uint8
        assert raw.train_labels.dtype == raw.test_labels.dtype == np.int64
        assert raw.class_names == ["ant", "bee", "cat"]
        assert list(cifar.downloads.iterdir()) == [cifar.path]
    assert len(server.requests) == 1


def test_official_address_and_checksums_are_the_default():
    for module, dataset, sha256 in (
        (cifar10, torchvision.datasets.CIFAR10, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
        (cifar100, torchvision.datasets.CIFAR100, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),
    ):
        assert sha256 == module.SHA256
        assert module.Config(kind=module.__name__.rsplit(".", 1)[1]).url is None
        assert dataset.url.endswith(dataset.filename)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_damaged_archive_is_fetched_again(cifar, server, harm, capsys):
    flipped = bytearray(cifar.bytes)
    flipped[len(flipped) // 2] ^= 1
    cifar.downloads.mkdir()
    cifar.path.write_bytes({"truncated": cifar.bytes[:100], "flipped": bytes(flipped), "empty": b""}[harm])
    raw = sources.load(cifar.config, cifar.downloads)
    assert raw.test_labels.tolist() == cifar.splits["test"][1]
    assert len(server.requests) == 1
    assert cifar.path.read_bytes() == cifar.bytes
    assert "damaged or cut short: fetching it again" in capsys.readouterr().err


def test_unpacked_files_lying_about_are_never_read(cifar):
    folder = cifar.downloads / cifar.dataset.base_folder
    folder.mkdir(parents=True)
    for name, _ in [*cifar.dataset.train_list, *cifar.dataset.test_list]:
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert sources.load(cifar.config, cifar.downloads).train_labels.tolist() == cifar.splits["train"][1]


def test_wrong_batch_inside_a_right_archive_is_not_unpickled(cifar, monkeypatch):
    monkeypatch.setattr(cifar.dataset, "test_list", [[cifar.dataset.test_list[0][0], "0" * 32]])
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(UserError, match="do not have the official MD5"):
        sources.load(cifar.config, cifar.downloads)
    assert list(cifar.downloads.iterdir()) == [cifar.path]


@pytest.mark.parametrize("present", [False, True])
def test_wrong_archive_from_the_server(cifar, server, present):
    if present:
        cifar.downloads.mkdir()
        cifar.path.write_bytes(b"old and wrong")
    server.answer = b"x" * 300
    found = hashlib.sha256(server.answer).hexdigest()
    with pytest.raises(UserError) as caught:
        sources.load(cifar.config, cifar.downloads)
    text = str(caught.value)
    assert "\n" not in text
    for part in (str(cifar.path), cifar.config.url, found, cifar.module.SHA256, "300 bytes"):
        assert part in text
    assert [path.read_bytes() for path in cifar.downloads.iterdir()] == ([b"old and wrong"] if present else [])


def test_connection_cut_short(cifar, server):
    server.answer, server.promised = cifar.bytes[:50], len(cifar.bytes)
    with pytest.raises(UserError):
        sources.load(cifar.config, cifar.downloads)
    assert list(cifar.downloads.iterdir()) == []


def test_file_not_on_the_server(cifar, server):
    server.answer = None
    with pytest.raises(UserError, match=r"^cannot fetch http://127\.0\.0\.1.*: Not Found; .*put the archive at"):
        sources.load(cifar.config, cifar.downloads)


def test_no_server(cifar):
    config = cifar.config.model_copy(update={"url": "http://127.0.0.1:9/archive.tar.gz"})
    with pytest.raises(UserError) as caught:
        sources.load(config, cifar.downloads)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("cannot fetch http://127.0.0.1:9/archive.tar.gz: ")
    assert text.endswith(f"put the archive at {cifar.path}")
    assert list(cifar.downloads.iterdir()) == []
    # What the message advises works.
    cifar.path.write_bytes(cifar.bytes)
    assert sources.load(config, cifar.downloads).train_labels.tolist() == cifar.splits["train"][1]
