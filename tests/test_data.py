"""Image sets: what they hold, how they split, and what happens when the files are missing or broken."""

import os
import shutil
import urllib.error
import urllib.request

import pytest
import torch

import vaelib
from vaelib import DataNotFoundError, ImageSet, image_set, load_images, minibatches, train_valid_split
from vaelib.data import CHECKSUMS, NAMES, SHAPE_FACTORS, data_folder


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails at once, as it does without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize(("name", "split", "count", "shape"), [
    ("digits", "train", 1500, (1, 28, 28)),
    ("digits", "test", 297, (1, 28, 28)),
    ("shapes", "train", 4096, (3, 32, 32)),
    ("shapes", "test", 1024, (3, 32, 32)),
])  # fmt: skip
def test_bundled_sets_need_no_files(name, split, count, shape, no_network):
    images = load_images(name, split)
    assert images.pixels.shape == (count, *shape)
    assert images.pixels.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert len(images) == count
    assert images.image_shape == shape
    assert images.labels.unique().tolist() == list(range(len(images.classes)))
    assert torch.equal(load_images(name, split).pixels, images.pixels)
    assert images.pixels.float().std() > 30


def test_train_and_test_of_a_bundled_set_share_no_image():
    for name in ("digits", "shapes"):
        both = torch.cat([load_images(name, split).pixels.flatten(1) for split in ("train", "test")])
        assert len(both.unique(dim=0)) == len(both)


def test_shapes_come_with_the_factors_that_drew_them():
    images = load_images("shapes")
    assert images.factor_names == SHAPE_FACTORS == ("shape", "x", "y", "size", "hue")
    assert images.factors.shape == (4096, 5)
    assert torch.equal(images.factors[:, 0].long(), images.labels)
    bright = images.pixels.float().amax(1) - 20.4
    axis = torch.arange(32) + 0.5
    circles = images.labels == 0  # the centre of mass of a circle is its centre
    x = (bright * axis).sum((1, 2)) / bright.sum((1, 2))
    y = (bright * axis[:, None]).sum((1, 2)) / bright.sum((1, 2))
    assert (x - images.factors[:, 1])[circles].abs().max() < 0.35
    assert (y - images.factors[:, 2])[circles].abs().max() < 0.35
    area = (bright > 60).sum((1, 2))[circles]
    assert torch.corrcoef(torch.stack([area, images.factors[circles, 3] ** 2]))[0, 1] > 0.99
    # hue 0 is red, 1/3 green, 2/3 blue
    colour = images.pixels.float().mean((2, 3)).argmax(1)
    hue = images.factors[:, 4]
    for channel, centre in enumerate((0.0, 1 / 3, 2 / 3)):
        near = ((hue - centre + 0.5) % 1 - 0.5).abs() < 0.1
        assert (colour[near] == channel).all()


def test_subset_and_device_keep_labels_and_factors_together():
    images = load_images("shapes")
    order = torch.tensor([5, 3])
    subset = images[order].to("cpu")
    assert torch.equal(subset.pixels, images.pixels[order])
    assert torch.equal(subset.labels, images.labels[order])
    assert torch.equal(subset.factors, images.factors[order])
    assert len(images[:7]) == 7


def test_validation_split_is_a_partition_chosen_by_the_seed(digits):
    marked = image_set(torch.arange(200).to(torch.uint8).view(200, 1, 1, 1), labels=range(200))
    train, valid = train_valid_split(marked, 30, seed=1)
    assert (len(train), len(valid)) == (170, 30)
    assert sorted([*train.labels.tolist(), *valid.labels.tolist()]) == list(range(200))
    assert torch.equal(train.pixels.flatten().long(), train.labels)
    assert torch.equal(train_valid_split(marked, 30, seed=1)[1].labels, valid.labels)
    assert not torch.equal(train_valid_split(marked, 30, seed=2)[1].labels, valid.labels)
    for size in (0, 200, 1.5):
        with pytest.raises(ValueError, match="valid_size: got"):
            train_valid_split(marked, size)


def test_minibatches_show_every_image_once_and_keep_the_last_partial_batch():
    images = image_set(torch.arange(103).to(torch.uint8).view(103, 1, 1, 1))
    for generator in (None, torch.Generator().manual_seed(0)):
        batches = list(minibatches(images, 25, generator))
        assert [len(batch) for batch in batches] == [25, 25, 25, 25, 3]
        assert sorted(torch.cat(batches).flatten().tolist()) == list(range(103))
    assert torch.equal(torch.cat(list(minibatches(images, 25))), images.pixels)
    shuffled = [torch.cat(list(minibatches(images, 25, torch.Generator().manual_seed(s)))) for s in (0, 0, 1)]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    with pytest.raises(ValueError, match="batch_size: got int 0"):
        next(minibatches(images, 0))


def test_minibatches_of_labels_are_those_of_the_same_images():
    images = image_set(torch.arange(103).to(torch.uint8).view(103, 1, 1, 1), torch.arange(103))
    for skip in (0, 2):
        for generators in ((None, None), [torch.Generator().manual_seed(0) for _ in range(2)]):
            pixels = list(minibatches(images, 25, generators[0], skip))
            labels = list(minibatches(images, 25, generators[1], skip, field="labels"))
            assert [len(batch) for batch in labels] == [25, 25, 25, 25, 3][skip:]
            assert torch.equal(torch.cat(labels), torch.cat(pixels).flatten().long())
    with pytest.raises(ValueError, match="field: got 'label', expected one of 'labels', 'pixels'; did you mean 'labels'"):
        next(minibatches(images, 25, field="label"))


@pytest.mark.parametrize(("pixels", "labels", "message"), [
    (torch.zeros(2, 1, 4, 4), torch.zeros(2).long(), r"pixels: got a float32 tensor .*, expected pixels: a uint8"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), r"pixels: .*expected shape \(N, C, H, W\)"),
    (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(0).long(), "pixels: got an empty set"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), r"labels: got .*, expected an int64 tensor"),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels: got a float32"),
])  # fmt: skip
def test_an_image_set_checks_what_it_is_given(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(pixels, labels, ("a",))


def test_labels_and_factors_must_fit_the_images():
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for labels in ([0.9, 1.9], [-1, 0]):
        with pytest.raises(ValueError, match="labels: got list .*, expected whole numbers of at least 0"):
            image_set(pixels, labels)
    assert image_set(pixels, [3, 1]).labels.tolist() == [3, 1]
    with pytest.raises(ValueError, match="factors: got .*, expected one row for each of the 2 images"):
        ImageSet(pixels, torch.zeros(2).long(), ("a",), factors=torch.zeros(3, 5))


def test_a_processed_folder_of_old_torchvision_versions_is_not_read(tiny_mnist):
    (tiny_mnist / "MNIST/processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), tiny_mnist / "MNIST/processed" / name)
    assert len(load_images("mnist", root=tiny_mnist)) == 20


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="name: got 'minst', expected one of .*; did you mean 'mnist'"):
        load_images("minst")
    with pytest.raises(ValueError, match="split: got 'tset', expected one of 'test', 'train'; did you mean 'test'"):
        load_images("digits", "tset")
    assert set(NAMES) == {"mnist", "fashion-mnist", "cifar10", "binarized-mnist", "digits", "shapes"}


def test_the_data_folder_is_vaelib_data_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VAELIB_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("VAELIB_DATA", "")
    assert data_folder().name == "vaelib"
    monkeypatch.delenv("VAELIB_DATA")
    assert data_folder().name == "vaelib"


@pytest.mark.parametrize("name", list(CHECKSUMS))
def test_missing_data_without_network_name_the_folder_and_the_way_out(name, tmp_path, no_network):
    root = tmp_path / "data"
    with pytest.raises(
        DataNotFoundError, match=f"{name}: .* is not in .*could not be downloaded.*VAELIB_DATA.*bundled sets 'digits'"
    ):
        load_images(name, root=root)
    assert list(root.iterdir()) == []  # nothing half-written
    with pytest.raises(ValueError, match="download=False"):
        load_images(name, root=root, download=False)
    with pytest.raises(FileNotFoundError):
        load_images(name, root=root, download=False)


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path, no_network):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataNotFoundError, match="file"):
        load_images("mnist", root=tmp_path / "file" / "data")


def write_idx(path, array):
    """An idx file as MNIST's are: magic number, sizes, bytes."""
    header = bytes([0, 0, 8, array.dim()]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.numpy().tobytes())


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """A folder with four files in MNIST's format, and their checksums in place of the official ones."""
    import hashlib

    sums = {}
    for split, count in (("train", 20), ("t10k", 10)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        write_idx(tmp_path / f"MNIST/raw/{split}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / f"MNIST/raw/{split}-labels-idx1-ubyte", torch.arange(count, dtype=torch.uint8) % 10)
    for file in CHECKSUMS["mnist"]:
        sums[file] = hashlib.md5((tmp_path / file).read_bytes()).hexdigest()
    monkeypatch.setitem(CHECKSUMS, "mnist", sums)
    return tmp_path


def test_idx_files_become_one_uint8_tensor(tiny_mnist, no_network):
    train, test = load_images("mnist", root=tiny_mnist), load_images("mnist", "test", root=tiny_mnist)
    assert train.pixels.shape == (20, 1, 28, 28)
    assert test.labels.tolist() == list(range(10))
    assert train.pixels.flatten().tolist() == list((tiny_mnist / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:])
    assert train.classes == tuple("0123456789")


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "empty"])
def test_a_broken_data_file_is_named_and_left_in_place(tiny_mnist, damage, no_network):
    path = tiny_mnist / "MNIST/raw/train-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"truncated": bytes(data[: len(data) // 2]), "corrupted": bytes(data), "empty": b""}[damage])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="mnist: the file .*train-images-idx3-ubyte is truncated or corrupted.*delete it"):
        load_images("mnist", root=tiny_mnist)
    assert path.read_bytes() == before
    assert len(load_images("mnist", "test", root=tiny_mnist)) == 10  # the other split is whole


def test_a_download_arrives_whole_in_the_data_folder(tiny_mnist, tmp_path, monkeypatch):
    from torchvision import datasets

    source, root = tiny_mnist / "MNIST", tmp_path / "new"
    fetched = []

    class Download:
        def __init__(self, folder, train, download):
            assert download
            fetched.append(folder)
            shutil.copytree(source, os.path.join(folder, "MNIST"))

    real = datasets.MNIST
    monkeypatch.setattr(datasets, "MNIST", Download)
    vaelib.data._fetch("mnist", root, download=True)
    monkeypatch.setattr(datasets, "MNIST", real)
    assert len(load_images("mnist", root=root, download=False)) == 20
    assert len(fetched) == 1
    assert os.listdir(root) == ["MNIST"]
