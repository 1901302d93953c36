"""Statically binarized MNIST: its three splits, its way from text to bits, and that no second binarization touches it."""

import hashlib
import io
import os
import urllib.error

import numpy as np
import pytest
import torch
from torchvision.datasets import utils

import vaelib
from vaelib import DataNotFoundError, data, load_images
from vaelib.data import BINARIZED_CHECKSUMS, BINARIZED_URL, CHECKSUMS, pack_amat

COUNTS = {"train": 12, "valid": 5, "test": 7}


def amat(bits):
    """The official text format: a row's digits joined by single spaces, ended by a newline."""
    text = np.full((len(bits), 2 * 784), ord(" "), np.uint8)
    text[:, ::2], text[:, -1] = bits + ord("0"), ord("\n")
    return text.tobytes()


def packed(text):
    """The file that holds the packed rows, as bytes."""
    file = io.BytesIO()
    np.save(file, pack_amat(text))
    return file.getvalue()


@pytest.fixture
def tiny(monkeypatch):
    """A few rows for each split, with their checksums in place of the official ones: {split: bits}."""
    rows = {split: np.random.default_rng(count).integers(0, 2, (count, 784), dtype=np.uint8) for split, count in COUNTS.items()}
    for split, bits in rows.items():
        monkeypatch.setitem(BINARIZED_CHECKSUMS, f"binarized_mnist_{split}.amat", hashlib.sha256(amat(bits)).hexdigest())
    sums = {split: hashlib.md5(packed(amat(bits))).hexdigest() for split, bits in rows.items()}
    sums = {f"BinarizedMNIST/binarized_mnist_{split}.npy": md5 for split, md5 in sums.items()}
    monkeypatch.setitem(CHECKSUMS, "binarized-mnist", sums)
    return rows


@pytest.fixture
def served(tiny, monkeypatch):
    """Downloads answer with these texts; {address: text}, to be changed by the test."""
    texts = {f"{BINARIZED_URL}binarized_mnist_{split}.amat": amat(bits) for split, bits in tiny.items()}

    def download_url(url, root, filename=None, md5=None):
        if url not in texts:
            raise urllib.error.URLError("no such file")
        os.makedirs(root, exist_ok=True)
        with open(os.path.join(root, os.path.basename(url)), "wb") as file:
            file.write(texts[url])

    monkeypatch.setattr(utils, "download_url", download_url)
    return texts


@pytest.mark.parametrize("split", list(COUNTS))
def test_a_download_becomes_packed_files_that_read_back_bit_for_bit(tiny, served, tmp_path, split):
    images = load_images("binarized-mnist", split, root=tmp_path)
    assert images.pixels.shape == (COUNTS[split], 1, 28, 28)
    assert images.pixels.is_contiguous()
    assert images.pixels.flatten(1).tolist() == (tiny[split] * 255).tolist()
    assert images.labels.tolist() == [0] * COUNTS[split]
    assert images.classes == ("digit",)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["binarized_mnist_test.npy", "binarized_mnist_train.npy", "binarized_mnist_valid.npy"]
    served.clear()
    assert torch.equal(load_images("binarized-mnist", split, root=tmp_path).pixels, images.pixels)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_broken_download_leaves_nothing_behind(served, tmp_path, damage):
    address = f"{BINARIZED_URL}binarized_mnist_test.amat"
    text = served.pop(address)
    if damage != "missing":
        served[address] = text[:1000] if damage == "cut" else (b"1" if text[:1] == b"0" else b"0") + text[1:]
    reason = "no such file" if damage == "missing" else "the sha256 of binarized_mnist_test.amat is not"
    with pytest.raises(DataNotFoundError, match=f"binarized-mnist: BinarizedMNIST is not in .* could not be downloaded .*{reason}"):
        load_images("binarized-mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_packing_that_gives_other_bytes_than_the_published_ones_is_refused(served, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "pack_amat", lambda text: pack_amat(text)[::-1])
    with pytest.raises(DataNotFoundError, match="the md5 of binarized_mnist_train.npy is not"):
        load_images("binarized-mnist", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupted_packed_file_is_named(served, tmp_path):
    load_images("binarized-mnist", root=tmp_path)
    path = tmp_path / "BinarizedMNIST" / "binarized_mnist_valid.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="binarized-mnist: the file .*binarized_mnist_valid.npy is truncated or corrupted"):
        load_images("binarized-mnist", "valid", root=tmp_path)
    for split in ("train", "test"):
        assert len(load_images("binarized-mnist", split, root=tmp_path)) == COUNTS[split]


def test_the_likelihood_leaves_binary_pixels_exactly_as_they_are(served, tmp_path):
    pixels = load_images("binarized-mnist", root=tmp_path).pixels
    model = vaelib.mlp_vae((1, 28, 28), (4,), 2)
    wanted = (pixels == 255).float()
    for seed in range(20):
        assert torch.equal(model.likelihood.observe(pixels, torch.Generator().manual_seed(seed)), wanted)
        assert torch.equal(torch.cat([x for x, _ in vaelib.heldout.observations(model, pixels, 5, seed)]), wanted)
        assert torch.equal(vaelib.likelihoods.binarize_by_draws(pixels, torch.Generator().manual_seed(seed)), wanted)


def test_only_this_set_has_a_validation_split_of_its_own():
    for name in set(data.NAMES) - {"binarized-mnist"}:
        with pytest.raises(ValueError, match=f"split: got 'valid', expected 'train' or 'test'; of {name} train_valid_split cuts"):
            load_images(name, "valid")
    with pytest.raises(ValueError, match="split: got 'vald', expected one of 'test', 'train', 'valid'; did you mean 'valid'"):
        load_images("binarized-mnist", "vald")


@pytest.mark.real_data
def test_the_official_text_packs_to_the_official_bits(real_data):
    for split in COUNTS:
        images = real_data("binarized-mnist", split)
        text = amat((images.pixels.flatten(1) == 255).numpy().astype(np.uint8))
        assert hashlib.sha256(text).hexdigest() == BINARIZED_CHECKSUMS[f"binarized_mnist_{split}.amat"]
        md5 = CHECKSUMS["binarized-mnist"][f"BinarizedMNIST/binarized_mnist_{split}.npy"]
        assert hashlib.md5(packed(text)).hexdigest() == md5
