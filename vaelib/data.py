"""Named image sets, each one ``uint8`` tensor (N, C, H, W) that stays on the device; minibatches are slices of it.

Nothing here scales, crops or binarizes: the likelihood owns the pixels (`vaelib.likelihoods`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from vaelib._validation import (
    as_path,
    check_choice,
    check_image_shape,
    check_int,
    check_pixels,
    check_seed,
    describe,
    help_at,
    warn_of_scale,
)
from vaelib.files import as_pixels, image_and_label, read_files
from vaelib.files import read_image as read_image

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPES = ("circle", "square", "triangle")
SHAPE_FACTORS = ("shape", "x", "y", "size", "hue")

# The uncompressed files of the official distributions, with their md5.
CHECKSUMS = {
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "binarized-mnist": {  # numpy.packbits over the rows of the official text files: (N, 98)
        "BinarizedMNIST/binarized_mnist_train.npy": "27ff78d84acc5e3879a681618c73ffcc",
        "BinarizedMNIST/binarized_mnist_valid.npy": "b03645d07bb9d5e4fd260f90a9c28bbe",
        "BinarizedMNIST/binarized_mnist_test.npy": "f15bc02618bd90ebbb29c52596157553",
    },
}
# The official text files of binarized MNIST, with their sha256.
BINARIZED_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
BINARIZED_CHECKSUMS = {
    "binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
NAMES = (*CHECKSUMS, "digits", "shapes")


class DataNotFoundError(FileNotFoundError, ValueError):
    """A data set is neither on disk nor to be had from the network; the message names the folder and the way out."""


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, all on one device.

    Attributes:
        pixels: uint8 tensor (N, C, H, W), values 0..255.
        labels: int64 tensor (N,).
        classes: the name of each label.
        name: where the images come from, for messages and records.
        factors: float tensor (N, F), the factors that generated each image (`shapes` only), else None.
        factor_names: the name of each factor.
        labelled: False where nobody gave labels; they are then all 0, and what needs labels refuses the set.
        names: the name of each image, such as its file's within the folder; () where they have none.
        skipped: the files that could not be read, each with the reason (`load_folder` only).
        scale_checked: whether a warning was due already for levels that do not reach beyond 16: it comes once, not for each subset.

    Raises:
        ValueError: If pixels or labels have another dtype or shape, or there is no image.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str = "images"
    factors: Tensor | None = None
    factor_names: tuple[str, ...] = ()
    labelled: bool = True
    names: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    scale_checked: bool = field(default=False, repr=False, compare=False)

    @property
    def known_labels(self) -> Tensor | None:
        """The labels, or None where nobody gave any."""
        return self.labels if self.labelled else None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", check_pixels("pixels", self.pixels))
        if not self.scale_checked:
            warn_of_scale("pixels", self.pixels)
            object.__setattr__(self, "scale_checked", True)
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(f"labels: got {describe(self.labels)}, expected an int64 tensor of shape ({len(self.pixels)},)")
        if self.factors is not None and len(self.factors) != len(self.pixels):
            raise ValueError(f"factors: got {describe(self.factors)}, expected one row for each of the {len(self.pixels)} images")
        if len(self.names) not in (0, len(self.pixels)):
            raise ValueError(f"names: got {len(self.names)}, expected one for each of the {len(self.pixels)} images, or none")

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images of shape {self.image_shape}, {len(self.classes)} classes)"

    @overload
    def __getitem__(self, indices: int) -> tuple[Tensor, int]: ...

    @overload
    def __getitem__(self, indices: Tensor | slice) -> ImageSet: ...

    def __getitem__(self, indices: Any) -> Any:
        """The images at `indices` (a tensor or a slice) as a new set; of one index the pixels (C, H, W) and the label.

        So a set is a data set for `torch.utils.data.DataLoader` too, which makes batches of pixels and labels of it.
        """
        if isinstance(indices, (int, np.integer)):
            return self.pixels[int(indices)], int(self.labels[int(indices)])
        factors = None if self.factors is None else self.factors[indices]
        names = self.names and tuple(self.names[i] for i in torch.arange(len(self), device="cpu")[_on_cpu(indices)].tolist())
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices], factors=factors, names=names)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Pixels (C, H, W) and label of each image."""
        return zip(self.pixels, self.labels.tolist(), strict=True)

    @classmethod
    def from_dataset(cls, dataset: Any, image_shape: Sequence[int], name: str = "images", progress: bool = True) -> ImageSet:
        """The images of a data set of torchvision, torch or Hugging Face, read one by one into ``uint8``.

        An item is an image, or a pair of it and its label, or a dict with ``"image"`` (or ``"img"``) and, where it is labelled,
        ``"label"``. An image is one of Pillow, which is resized and cropped to its centre, or an array or tensor of `image_shape`:
        ``uint8``, or floating-point numbers from 0 to 1. Names of the classes are the data set's ``classes``, or of its feature ``label``.

        Args:
            dataset: what has a length and gives item i by ``dataset[i]``.
            image_shape: (C, H, W); C is 1 (grey) or 3 (RGB) for images of Pillow.
            name: where the images come from.
            progress: show a bar, which says at its start how much memory all pixels take.

        Raises:
            ValueError: For an empty data set, an item that is none of these, too little memory, or labels for only some.
        """
        from tqdm.auto import tqdm

        shape, count = check_image_shape("image_shape", image_shape), len(dataset)
        if count == 0:
            raise ValueError("dataset: got an empty one, expected at least one image")
        size = count * math.prod(shape)
        try:
            pixels = torch.empty(count, *shape, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            needed = f"{count} images, {size / 2**30:.1f} GiB as uint8"
            raise ValueError(f"dataset: got {needed}, more than there is memory for") from error
        labels: list[Any] = []
        for i in tqdm(range(count), desc=f"{name}: {size / 2**20:.0f} MiB", unit="image", disable=not progress):
            image, label = image_and_label(i, dataset[i])
            pixels[i] = as_pixels(f"dataset: item {i}", image, shape)
            labels += [] if label is None else [int(label)]
        if len(labels) not in (0, count):
            raise ValueError(f"dataset: got labels for {len(labels)} of {count} items, expected one for each, or none")
        found = image_set(pixels, labels or None, name)
        feature = getattr(dataset, "features", None)
        classes = getattr(dataset, "classes", None) or getattr(feature and feature.get("label"), "names", None)
        return replace(found, classes=tuple(map(str, classes))) if labels and classes else found

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`."""
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device), factors=factors)


def data_folder() -> Path:
    """Where the real data sets live: `$VAELIB_DATA`, or `vaelib` in the user's cache folder."""
    if folder := os.environ.get("VAELIB_DATA"):
        return as_path(folder)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("vaelib", appauthor=False))


def load_images(name: str, split: str = "train", root: str | Path | None = None, download: bool = True) -> ImageSet:
    """A named image set as one ``uint8`` tensor.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"`` (read from `root`, fetched through torchvision where they are missing);
            ``"binarized-mnist"`` (its pixels 0 or 255, drawn once and for all, so that `Bernoulli` leaves them as they are; no labels:
            the fixed set on which the field reports nats. Salakhutdinov and Murray 2008; Larochelle and Murray 2011);
            ``"digits"`` (1797 real handwritten digits that scikit-learn ships, enlarged from 8x8 to 28x28);
            ``"shapes"`` (drawn: 32x32 RGB, with the factors that generated each image).
        split: ``"train"`` or ``"test"``; ``"binarized-mnist"`` alone has a ``"valid"`` of its own. For a validation set of another
            cut one off the training split: `train_valid_split`.
        root: the folder of the real data sets; default `data_folder()`.
        download: whether a missing set may be fetched.

    Raises:
        ValueError: For an unknown name or split, and for a truncated or corrupted file.
        DataNotFoundError: If the set is missing and could not be fetched; it is a ValueError and a FileNotFoundError.
            There is no silent fallback.

    Example:
        >>> import vaelib
        >>> vaelib.load_images("digits", "test")
        ImageSet('digits', 297 images of shape (1, 28, 28), 10 classes)
    """
    check_choice("name", name, NAMES)
    if split == "valid" and name != "binarized-mnist":
        raise ValueError(f"split: got 'valid', expected 'train' or 'test'; of {name} train_valid_split cuts a validation set off")
    check_choice("split", split, ("train", "valid", "test") if name == "binarized-mnist" else ("train", "test"))
    if name == "digits":
        return _digits(split)
    if name == "shapes":
        return _shapes(split)
    root = data_folder() if root is None else as_path(root)
    _fetch(name, root, download)
    return _read(name, split, root)


def train_valid_split(images: ImageSet, valid_size: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Hold `valid_size` images out for validation, chosen by `seed`; the same seed gives the same two sets.

    Raises:
        ValueError: If `valid_size` leaves no image on either side.
    """
    valid_size = check_int("valid_size", valid_size)
    seed = check_seed("seed", seed)
    if valid_size >= len(images):
        raise ValueError(f"valid_size: got {valid_size}, expected less than the {len(images)} images there are")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu").to(images.pixels.device)
    return images[order[valid_size:]], images[order[:valid_size]]


BATCHES_AT_ONCE = 32  # batches of a set that stays on the host are copied together: fewer and longer copies


def minibatches(
    images: ImageSet,
    batch_size: int,
    generator: torch.Generator | None = None,
    skip: int = 0,
    field: str = "pixels",
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """Pixels (B, C, H, W) of one epoch; shuffled where a `generator` is given, in order otherwise.

    Every image comes exactly once: the last, smaller batch counts. The first `skip` batches are left out. With the `field`
    ``"labels"`` the labels (B,) come instead: from a generator of the same seed, those of the same images. They are where the set
    is, or on `device`: then the images of `BATCHES_AT_ONCE` batches are gathered on the host and copied at once.
    """
    batch_size, skip = check_int("batch_size", batch_size), check_int("skip", skip, minimum=0)
    values = getattr(images, check_choice("field", field, ("pixels", "labels")))
    if generator is None:
        order = torch.arange(len(images), device=values.device)
    else:
        order = torch.randperm(len(images), generator=generator, device=generator.device).to(values.device)
    together = batch_size * (1 if device is None else BATCHES_AT_ONCE)
    rest = order[skip * batch_size :]
    for indices in rest.split(together) if len(rest) else ():  # an empty tensor splits into one empty part
        yield from values[indices].to(values.device if device is None else device).split(batch_size)


def _missing(name: str, root: Path) -> list[str]:
    return [file for file in CHECKSUMS[name] if not (root / file).is_file()]


def _fetch(name: str, root: Path, download: bool) -> None:
    """See that the files of a set are in `root`; a download arrives whole or not at all."""
    missing = _missing(name, root)
    if not missing:
        return
    way_out = "put the files there, or set VAELIB_DATA to a folder that has them, or use the bundled sets 'digits' and 'shapes'"
    way_out += help_at("no-network")
    if not download:
        raise DataNotFoundError(f"{name}: {missing[0]} is not in {root} and download=False; {way_out}")
    from torchvision import datasets

    sets = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    dataset = sets.get(name, _download_binarized)
    folder = missing[0].split("/")[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as partial:
            with contextlib.redirect_stdout(sys.stderr):  # torchvision reports there; our stdout belongs to results
                dataset(partial, train=True, download=True)
            for file in missing:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(partial) / file, root / file)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataNotFoundError(f"{name}: {folder} is not in {root} and could not be downloaded ({reason}); {way_out}") from error


def _download_binarized(folder: str, train: bool, download: bool) -> None:
    """Fetch the text files of binarized MNIST and pack them; called as a data set of torchvision is, it fetches every split."""
    from torchvision.datasets.utils import check_integrity, download_url

    for file, md5 in CHECKSUMS["binarized-mnist"].items():
        packed = Path(folder) / file
        text = packed.with_suffix(".amat")
        download_url(BINARIZED_URL + text.name, str(text.parent))
        content, sha256 = text.read_bytes(), BINARIZED_CHECKSUMS[text.name]
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RuntimeError(f"the sha256 of {text.name} is not {sha256}")
        np.save(packed, pack_amat(content))
        if not check_integrity(str(packed), md5):
            raise RuntimeError(f"the md5 of {packed.name} is not {md5}")


def pack_amat(text: bytes) -> np.ndarray:
    """The rows of a text file of binarized MNIST, 784 digits 0 or 1 with a space or the line's end after each: bits, (N, 98).

    They lie column by column, as in the packed files whose md5 is known.
    """
    return np.asfortranarray(np.packbits(np.frombuffer(text, np.uint8)[::2].reshape(-1, 784) - ord("0"), axis=1))


def _read(name: str, split: str, root: Path) -> ImageSet:
    """Read one split, after its files have passed their checksums."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    train = split == "train"
    others = {"train": ("t10k", "test", "valid"), "valid": ("train", "test"), "test": ("train", "data_batch", "valid")}[split]
    for file, md5 in CHECKSUMS[name].items():
        if not any(word in file for word in others) and not check_integrity(str(root / file), md5):
            raise ValueError(
                f"{name}: the file {root / file} is truncated or corrupted (its md5 is not {md5}); delete it and load again"
                + help_at("broken-file")
            )
    if name == "cifar10":
        cifar = CIFAR10(str(root), train=train)
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(pixels, torch.tensor(cifar.targets, device="cpu"), CIFAR, name)
    if name == "binarized-mnist":
        bits = np.unpackbits(np.load(root / f"BinarizedMNIST/binarized_mnist_{split}.npy"), axis=1)
        pixels = torch.from_numpy(255 * np.ascontiguousarray(bits)).view(-1, 1, 28, 28)
        return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64, device="cpu"), ("digit",), name, labelled=False)
    # The idx files themselves: torchvision would prefer a `processed` folder of its earlier versions, which nobody has checked.
    images_file, labels_file = list(CHECKSUMS[name])[:2] if train else list(CHECKSUMS[name])[2:]
    pixels = torch.from_numpy(np.fromfile(root / images_file, np.uint8)[16:].reshape(-1, 1, 28, 28))
    labels = torch.from_numpy(np.fromfile(root / labels_file, np.uint8)[8:]).long()
    return ImageSet(pixels, labels, DIGITS if name == "mnist" else FASHION, name)


def _digits(split: str) -> ImageSet:
    """scikit-learn's digits (8x8, 17 grey levels), enlarged to 20x20 and centred in 28x28 as MNIST's are.

    The last 297 images are the test split: the set is ordered by writer, so most of them are hands unseen in training.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(grey, size=(20, 20), mode="bicubic", align_corners=False)
    pixels = torch.nn.functional.pad(large.round().clamp(0, 255), (4, 4, 4, 4)).to(torch.uint8)
    rows = slice(0, 1500) if split == "train" else slice(1500, None)
    return ImageSet(pixels, torch.from_numpy(digits.target).long(), DIGITS, "digits")[rows]


def _shapes(split: str) -> ImageSet:
    """Circles, squares and triangles in a random place, size and hue on a dark ground, drawn with soft edges.

    4096 images for training and 1024 for test, the same on every machine.
    """
    count, seed = (4096, 1) if split == "train" else (1024, 2)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (count,), generator=generator, device="cpu")
    x, y, size, hue = torch.rand(4, count, generator=generator, dtype=torch.float64, device="cpu")
    size = 5 + 5 * size  # half the width, in pixels
    x, y = (size + 1) + x * (30 - 2 * size), (size + 1) + y * (30 - 2 * size)
    axis = torch.arange(32, dtype=torch.float64, device="cpu") + 0.5
    across, down = axis - x[:, None, None], axis[:, None] - y[:, None, None]  # (N, 1, 32), (N, 32, 1)
    radius = size[:, None, None]
    circle = (across**2 + down**2).sqrt() - radius
    square = torch.maximum(across.abs(), down.abs()) - 0.85 * radius
    triangle = torch.maximum(0.894 * across.abs() - 0.447 * down - 0.447 * radius, down - 0.85 * radius)
    each = torch.arange(count, device="cpu")
    distance = torch.stack([circle, square, triangle.expand_as(circle)])[kind, each]  # (N, 32, 32), in pixels
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    phase = (6 * hue[:, None] + torch.tensor([0.0, 4.0, 2.0]).to(hue)) % 6  # (N, 3): hue to RGB, full saturation
    colour = ((phase - 3).abs() - 1).clamp(0, 1)[:, :, None, None]
    pixels = (255 * (0.08 + cover * (0.2 + 0.72 * colour))).round().to(torch.uint8)
    factors = torch.stack([kind.double(), x, y, size, hue], dim=1).float()
    return ImageSet(pixels, kind, SHAPES, "shapes", factors, SHAPE_FACTORS)


def _on_cpu(indices: Any) -> Any:
    return indices.cpu() if isinstance(indices, Tensor) else indices


def as_image_set(argument: str, images: Any) -> ImageSet:
    """An `ImageSet` as it is; a ``uint8`` tensor or NumPy array (N, C, H, W) as one without labels."""
    if isinstance(images, ImageSet):
        return images
    if not isinstance(images, (Tensor, np.ndarray)):
        raise ValueError(f"{argument}: got {describe(images)}, expected an ImageSet, or a uint8 tensor or array (N, C, H, W)")
    return image_set(check_pixels(argument, images))


def image_set(pixels: Tensor, labels: Tensor | Sequence[int] | None = None, name: str = "images") -> ImageSet:
    """Wrap a ``uint8`` tensor or array (N, C, H, W) of your own; without labels all are 0, and the set is not `labelled`."""
    pixels = check_pixels("pixels", pixels)
    try:
        codes = torch.as_tensor([0] * len(pixels) if labels is None else labels, device=pixels.device)
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "whole numbers of at least 0, one for each image; ImageSet takes their names as classes"
        raise ValueError(f"labels: got {describe(labels)}, expected {expected}") from error
    if codes.is_floating_point() or codes.numel() == 0 or codes.min() < 0:
        raise ValueError(f"labels: got {describe(labels)}, expected whole numbers of at least 0")
    codes = codes.long()
    classes = tuple(map(str, range(int(codes.max()) + 1)))
    return ImageSet(pixels, codes.to(pixels.device), classes, name, labelled=labels is not None)


def load_folder(path: str | Path, image_shape: Sequence[int]) -> ImageSet:
    """All image files of a folder and its subfolders, sorted by name, see `read_image`; other and broken files are skipped.

    The set's `names` are the files' within the folder, its `skipped` what could not be read, with the reasons. Where every image
    lies in a subfolder, the subfolders are the classes; else the set has no labels.
    Links are followed, but into no folder twice; broken ones and folders that cannot be read are among the skipped. Hidden files and
    folders (the name begins with a dot) are left out silently, and so is `__MACOSX`, which zip files of macOS bring along.

    Raises:
        ValueError: If `path` is no folder, or no image in it can be read.
    """
    path = as_path(path)
    found, skipped = read_files(path, image_shape)
    folders = [name.partition("/")[0] for name in found if "/" in name]
    classes = sorted(set(folders)) if len(folders) == len(found) else []
    pixels, codes = torch.stack(list(found.values())), [classes.index(folder) for folder in folders] if classes else None
    images = image_set(pixels, codes, path.resolve().name)
    return replace(images, classes=tuple(classes) or images.classes, names=tuple(found), skipped=skipped)
