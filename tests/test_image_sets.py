"""Images of one's own, from a folder, an array or a data set, are one type, which every public function takes."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, TensorDataset

import vaelib
from vaelib import ImageSet, TrainConfig, fit, image_set, mlp_vae
from vaelib.data import as_image_set, load_folder
from vaelib.evaluation import annealed_log_likelihood, inference_gaps

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two photographs cut into 64 x 64 pieces, in a folder of each: 66 and 66 files."""
    root = tmp_path_factory.mktemp("photographs")
    for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        pieces = [photograph[y : y + 64, x : x + 64] for y in range(0, 384, 64) for x in range(0, 640, 64)]
        for i, piece in enumerate(pieces):
            Image.fromarray(piece).save(root / name / f"{i:02}.png")
    return root


# --- a set


def test_a_set_gives_single_images_slices_and_batches(digits):
    pixels, label = digits[3]
    assert torch.equal(pixels, digits.pixels[3])
    assert (label, type(label)) == (int(digits.labels[3]), int)
    assert digits[np.int64(3)][1] == digits[-len(digits) + 3][1] == label
    with pytest.raises(IndexError):
        digits[len(digits)]
    assert torch.equal(torch.stack([pixels for pixels, _ in digits[:5]]), digits.pixels[:5])
    assert [label for _, label in digits[:5]] == digits.labels[:5].tolist()
    batches = list(DataLoader(digits[:10], batch_size=4))
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), digits.pixels[:10])
    assert torch.equal(torch.cat([y for _, y in batches]), digits.labels[:10])


def test_names_go_with_their_images(digits):
    named = ImageSet(digits.pixels[:4], digits.labels[:4], digits.classes, names=tuple("abcd"))
    assert named[1:3].names == ("b", "c")
    assert named[torch.tensor([3, 0])].names == ("d", "a")
    assert named[named.labels == 2].names == ("c",)
    assert named.to("cpu").names == named.names
    with pytest.raises(ValueError, match="names: got 3, expected one for each of the 4 images"):
        ImageSet(digits.pixels[:4], digits.labels[:4], digits.classes, names=tuple("abc"))


# --- a folder


def test_a_folder_of_folders_has_them_as_classes(photographs):
    images = load_folder(photographs, (3, 64, 64))
    assert images.image_shape == (3, 64, 64)
    assert images.classes == ("flower", "temple")
    assert images.labels.tolist() == [0] * 60 + [1] * 60
    assert images.names[0] == "flower/00.png"
    assert images.labelled
    assert images.name == photographs.name
    flower = load_folder(photographs / "flower", (3, 64, 64))
    assert not flower.labelled
    assert torch.equal(flower.pixels, images.pixels[:60])
    assert torch.equal(images.pixels[0], torch.from_numpy(load_sample_images().images[1][:64, :64].copy()).permute(2, 0, 1))


def test_files_beside_folders_make_no_classes(photographs, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("top.png", "deep/below.png"):
        (tmp_path / name).write_bytes((photographs / "flower" / "00.png").read_bytes())
    images = load_folder(tmp_path, (1, 8, 8))
    assert not images.labelled
    assert images.names == ("deep/below.png", "top.png")


def test_a_folder_is_trained_on_scored_and_searched(photographs):
    images = load_folder(photographs, (3, 64, 64))
    train, valid = vaelib.train_valid_split(images, 20)
    torch.manual_seed(0)
    model = vaelib.conv_vae(images.image_shape, 8, channels=(8, 16, 16))
    before = vaelib.evaluate(model, valid).elbo
    fit(model, train, valid, TrainConfig(epochs=3, batch_size=20, **QUIET))
    assert vaelib.evaluate(model, valid).elbo > before + 1000
    index = vaelib.LatentIndex.build(model, train)
    assert index.names == train.names
    assert index.label(0) in images.classes
    assert index.search(valid, k=3).indices.shape == (20, 3)


def test_the_command_line_trains_on_a_folder_and_scores_another(vaelib_here, photographs, tmp_path):
    small = ("--model", "conv", "--channels", "8,16", "--latent-dim", "4", "--epochs", "1", "--batch-size", "20", "--device", "cpu")
    done = vaelib_here("train", "--folder", photographs, "--size", "64", *small, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(photographs.resolve())
    model = vaelib.load(tmp_path / "run")
    assert model.image_shape == (3, 64, 64)
    done = vaelib_here("evaluate", tmp_path / "run", "--folder", photographs / "temple", "--json")
    assert done.returncode == 0, done.stderr
    expected = vaelib.evaluate(model, load_folder(photographs / "temple", (3, 64, 64)))
    result = json.loads(done.stdout)
    assert result["elbo"] == pytest.approx(expected.elbo, abs=0.1)
    assert result["num_images"] == 60
    for arguments, message in [
        (("evaluate", tmp_path / "run"), f"was trained on the folder {photographs.resolve()}"),
        (("evaluate", tmp_path / "run", "--folder", photographs, "--data", "digits"), "folder: got it beside --data"),
        (("train", "--folder", photographs, "--data", "digits", "--out", tmp_path / "no"), "folder: got it beside --data"),
        (("train", "--folder", photographs, "--size", "0", "--out", tmp_path / "no"), "size: got '0', expected a number of pixels"),
        (("train", "--size", "32", "--data", "digits", "--out", tmp_path / "no"), "size: got it without --folder"),
        (("train", "--grey", "--out", tmp_path / "no"), "grey: got it without --folder"),
        (("train", "--folder", tmp_path / "nowhere", "--out", tmp_path / "no"), "nowhere, expected a folder; there is none"),
    ]:
        done = vaelib_here(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "no").exists()


def test_grey_and_oblong_folders_train_too(vaelib_here, photographs, tmp_path):
    small = ("--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--batch-size", "20", "--device", "cpu")
    done = vaelib_here("train", "--folder", photographs, "--size", "12x16", "--grey", *small, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert vaelib.load(tmp_path / "run").image_shape == (1, 12, 16)


# --- a data set


class Rows:
    """As a data set of Hugging Face: rows are dicts, the features have the names of the classes."""

    class Feature:
        names = ("no", "yes")

    features = {"label": Feature}  # noqa: RUF012

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Pairs(Rows):
    """As a data set of torchvision."""

    features = None
    classes = ("no", "yes")


@pytest.mark.parametrize("kind", ["pairs", "dicts", "bytes", "floats", "arrays"])
def test_a_data_set_of_any_kind_gives_the_same_pixels(kind, photographs, capfd):
    files = sorted((photographs / "flower").iterdir())[:6]
    expected = load_folder(photographs / "flower", (3, 64, 64)).pixels[:6]
    pictures = [Image.open(file) for file in files]
    labels = [0, 1, 1, 0, 1, 0]
    dataset = {
        "pairs": lambda: Pairs(list(zip(pictures, labels, strict=True))),
        "dicts": lambda: Rows([{"image": picture, "label": label} for picture, label in zip(pictures, labels, strict=True)]),
        "bytes": lambda: TensorDataset(expected, torch.tensor(labels)),
        "floats": lambda: TensorDataset(expected.float() / 255, torch.tensor(labels)),
        "arrays": lambda: Pairs([(np.array(picture), label) for picture, label in zip(pictures, labels, strict=True)]),
    }[kind]()
    images = ImageSet.from_dataset(dataset, (3, 64, 64), name="mine")
    assert torch.equal(images.pixels, expected)
    assert images.labels.tolist() == labels
    assert images.classes == (("0", "1") if kind in ("bytes", "floats") else ("no", "yes"))
    assert (images.name, images.labelled) == ("mine", True)
    assert "mine: 0 MiB" in capfd.readouterr().err


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_a_data_set_of_hugging_face_s_own_gives_images_and_classes(form):
    datasets = pytest.importorskip("datasets", reason="reads the library's own data set: pip install datasets")
    pyarrow = pytest.importorskip("pyarrow")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = []
    for level in (0, 200, 100):
        file = io.BytesIO()
        Image.fromarray(np.full((9, 9), level, np.uint8)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": level // 200})
    table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
    dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="rows").with_format(form)
    images = ImageSet.from_dataset(dataset, (1, 9, 9), progress=False)
    assert images.pixels[:, 0, 4, 4].tolist() == [0, 200, 100]
    assert (images.classes, images.labels.tolist()) == (("dark", "light"), [0, 1, 0])


def test_an_array_that_nobody_may_write_to_is_copied_without_a_warning():
    array = np.full((8, 8), 7, np.uint8)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = ImageSet.from_dataset(Pairs([(array, 0)]), (1, 8, 8), progress=False)
    assert images.pixels.unique().tolist() == [7]


def test_a_data_set_without_labels_and_pictures_of_other_sizes(photographs):
    pictures = [Image.new("RGB", (100, 50 + i), (10 * i, 0, 0)) for i in range(3)]
    images = ImageSet.from_dataset(Rows([{"img": picture} for picture in pictures]), (1, 16, 16), progress=False)
    assert images.image_shape == (1, 16, 16)
    assert not images.labelled


@pytest.mark.parametrize(("dataset", "message"), [
    (Pairs([]), "dataset: got an empty one"),
    (Pairs([(torch.zeros(3, 8, 8), 0)]), r"dataset: item 0 has the shape \(3, 8, 8\), expected \(3, 4, 4\); only images of Pillow"),
    (Pairs([(torch.full((3, 4, 4), 2.0), 0)]), "dataset: item 0 is a float32 tensor .*, expected uint8, or floating-point numbers"),
    (Pairs([(torch.zeros(3, 4, 4, dtype=torch.int64), 0)]), "dataset: item 0 is a int64 tensor"),
    (Pairs([("word", 0)]), "dataset: item 0 is str 'word', expected an image of Pillow, an array or a tensor"),
    (Rows([{"picture": 1}]), "dataset: item 0 is a dict of 'picture', expected one with 'image' or 'img'"),
    (Rows([{"image": torch.zeros(3, 4, 4), "label": 1}, {"image": torch.zeros(3, 4, 4)}]), "dataset: got labels for 1 of 2 items"),
])  # fmt: skip
def test_items_that_are_no_images_are_named(dataset, message):
    with pytest.raises(ValueError, match=message):
        ImageSet.from_dataset(dataset, (3, 4, 4), progress=False)


def test_a_set_that_no_memory_holds_is_refused_before_it_starts():
    class Endless(Pairs):
        def __len__(self):
            return 10**13

    with pytest.raises(ValueError, match="dataset: got 10000000000000 images, .* GiB as uint8, more than there is memory for"):
        ImageSet.from_dataset(Endless([]), (3, 64, 64), progress=False)


# --- at every border


CALLS = {
    "heldout_elbo": lambda m, x: vaelib.heldout_elbo(m, x).elbo,
    "evaluate": lambda m, x: vaelib.evaluate(m, x, 5).elbo,
    "log_likelihood": lambda m, x: vaelib.log_likelihood(m, x, 5),
    "annealed": lambda m, x: annealed_log_likelihood(m, x, 2, 2),
    "gaps": lambda m, x: inference_gaps(m, x, 5, 2).elbo,
    "means": vaelib.posterior_means,
    "units": vaelib.active_units,
    "kl": vaelib.kl_per_unit,
    "rates": lambda m, x: vaelib.rate_decomposition(m, x, 5),
    "reconstruct": vaelib.reconstruct,
    "shift": lambda m, x: vaelib.generation.shift(m, x, torch.zeros(4)),
    "interpolate": lambda m, x: vaelib.interpolate(m, x[:1], x[1:2], 3),
    "attribute": lambda m, x: vaelib.generation.attribute_vector(m, x, torch.arange(12) % 2 == 0),
    "codes": lambda m, x: vaelib.priors.posterior_samples(m, x),
    "mixture": lambda m, x: vaelib.priors.fit_mixture(m, x, 2).means,
    "index": lambda m, x: vaelib.LatentIndex.build(m, x).search(x, 3).indices,
    "observe": lambda m, x: m.likelihood.observe(x),
    "features": lambda m, x: vaelib.quality.features_of(vaelib.quality.mnist_features(), x),
    "nearest": lambda m, x: vaelib.quality.nearest_training_images(x, x).distances,
    "tile": lambda m, x: torch.from_numpy(vaelib.plotting.tile(x)),
    "gaussian": lambda m, x: vaelib.oracles.gaussian_pixels_log_prob(x, x),
    "fit": lambda m, x: fit(m, x, x, TrainConfig(epochs=1, batch_size=6, **QUIET))["valid_elbo"],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_takes_a_set_a_tensor_or_an_array(name, digits):
    pixels = digits.pixels[:12]
    results = []
    for images in (image_set(pixels), pixels, pixels.numpy()):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (8,), 4, {"name": "bernoulli", "binarize": "threshold"})
        results.append(CALLS[name](model, images))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_what_is_no_image_is_named(digits):
    model = mlp_vae((1, 28, 28), (8,), 4)
    words = "images: got str 'words', expected an ImageSet, or a uint8 tensor"
    for images, message in (("words", words), (digits.pixels.float(), "images: got a float32")):
        with pytest.raises(ValueError, match=message):
            fit(model, images)
    assert as_image_set("images", digits) is digits


# --- larger than the device


@pytest.mark.parametrize("skip", [0, 3, 40, 60, 61])
def test_a_set_on_the_host_gives_the_same_batches_in_chunks(skip, digits):
    for field in ("pixels", "labels"):
        resident, host = (
            list(vaelib.minibatches(digits, 25, torch.Generator().manual_seed(1), skip, field, device)) for device in (None, "cpu")
        )
        assert [len(batch) for batch in host] == [len(batch) for batch in resident]
        assert sum(map(len, host)) == max(0, 1500 - 25 * skip)
        assert all(map(torch.equal, host, resident))


def test_a_set_that_does_not_fit_the_device_is_trained_on_from_the_host(digits, monkeypatch):
    copied, weights = [], []
    to = ImageSet.to
    monkeypatch.setattr(ImageSet, "to", lambda images, device: copied.append(len(images)) or to(images, device))
    for resident in (True, False):
        monkeypatch.setattr(vaelib.training, "fits", lambda *sets, resident=resident: resident)
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (8,), 4)
        fit(model, digits[:300], digits[300:350], TrainConfig(epochs=2, batch_size=40, **QUIET))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    assert copied == [300, 50]  # once, where they fit


def test_half_of_a_gpu_s_free_memory_is_the_limit(digits, monkeypatch):
    size = digits.pixels.nbytes + digits.labels.nbytes
    for free, expected in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert vaelib.training.fits(torch.device("cuda"), digits, None) == expected
    assert vaelib.training.fits(torch.device("cpu"), digits, None)
