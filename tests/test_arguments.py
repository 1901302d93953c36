"""What users hand over: NumPy's numbers, paths with a ~, and the checks that all modules share."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import vaelib
from vaelib import _validation, cli, likelihoods, priors, storage
from vaelib._validation import help_at
from vaelib.book.ledger import finished, record
from vaelib.book.plotting import latent_scatter, show_images, training_curves
from vaelib.data import load_folder, read_image
from vaelib.evaluation import active_units, annealed_log_likelihood
from vaelib.generation import class_means
from vaelib.retrieval import LatentIndex, average_precision, bootstrap_interval, is_index, score_retrieval

SHAPE = (np.int64(1), np.int32(8), np.uint8(8))
MODELS = {
    "mlp": lambda: vaelib.mlp_vae(SHAPE, (np.prod((4, 4)),), np.int64(2)),
    "conv": lambda: vaelib.conv_vae(SHAPE, np.int64(2), "discretized_logistic", (np.int64(4), 4), np.int64(1)),
    "spatial": lambda: vaelib.conv_vae(SHAPE, (np.int64(2), np.int64(4), 4), "discretized_logistic", [np.int64(4)]),
    "mixture": lambda: vaelib.mlp_vae(SHAPE, (4,), 2, likelihoods.DiscretizedLogisticMixture(np.int64(3))),
    "gaussian": lambda: vaelib.mlp_vae(SHAPE, (4,), 2, likelihoods.Gaussian(np.float32(0.5), np.bool_(True), np.True_)),
    "hierarchical": lambda: vaelib.hierarchical_vae(
        SHAPE, [(np.int64(2), 1), (1, np.int64(1))], np.int64(8), np.int64(4), np.int64(1)
    ),
    "two layers": lambda: vaelib.two_layer_vae(SHAPE, ((np.int64(8),), (8,)), (np.int64(3), 2)),
    "conditional": lambda: vaelib.conditional_vae(SHAPE, np.int64(3), (4,), np.int64(2)),
}


def types_in(value):
    """The types of all leaves of dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        return {kind for entry in (value.values() if isinstance(value, dict) else value) for kind in types_in(entry)}
    return {type(value)}


@pytest.mark.parametrize("name", MODELS)
def test_numpy_s_numbers_build_a_model_and_its_config_is_plain(name, tmp_path):
    model = MODELS[name]()
    assert types_in(model.config) <= {int, float, bool, str}
    assert json.loads(json.dumps(model.config)) == model.config
    assert {type(size) for size in (*model.image_shape, *model.latent_shape, model.latent_dim)} == {int}
    vaelib.save(model, tmp_path)
    assert vaelib.load(tmp_path).config == model.config


def test_numpy_s_numbers_train_a_model_and_the_record_is_plain(digits, tmp_path):
    config = vaelib.TrainConfig(
        epochs=np.int64(1), batch_size=np.int32(50), learning_rate=np.float32(1e-3), warmup=np.float64(0.1), clip_norm=np.float32(10),
        skip_norm=np.float64(1e6), beta=np.float32(0.5), kl_warmup_epochs=np.int64(1), free_bits=np.float64(0.1),
        num_samples=np.int64(1), ema_decay=np.float64(0.9), flip=np.bool_(False), compile=np.bool_(False),
        channels_last=np.bool_(False), seed=np.int64(3), patience=np.int64(2), checkpoint_epochs=np.int64(1),
        checkpoint_minutes=np.float32(1), optimizer_options={"betas": (np.float64(0.9), np.float64(0.99))}, progress=np.bool_(False),
        device="cpu",
    )  # fmt: skip
    assert types_in(config.as_dict()) <= {int, float, bool, str}
    assert config.as_dict() == json.loads(json.dumps(config.as_dict()), object_hook=lambda d: {
        key: tuple(value) if isinstance(value, list) else value for key, value in d.items()
    })  # fmt: skip
    model = vaelib.mlp_vae((1, 28, 28), (8,), 2)
    vaelib.fit(model, digits[:100], digits[100:150], config, tmp_path)
    assert vaelib.fit(model, digits[:100], digits[100:150], config, tmp_path, resume=True).steps == 0


def test_numpy_s_numbers_do_where_functions_take_numbers(digits):
    model, few, seed, two = vaelib.mlp_vae((1, 28, 28), (8,), 2), digits[:40], np.int64(1), np.int64(2)
    scores = vaelib.evaluate(model, few, two, two, np.int64(7), seed)
    assert types_in(json.loads(json.dumps(scores.as_dict()))) <= {int, float, bool, type(None)}
    assert scores == vaelib.evaluate(model, few, 2, 2, 7, 1)
    assert torch.equal(vaelib.generate(model, two, np.float32(0.5), seed), vaelib.generate(model, 2, 0.5, 1))
    vaelib.log_likelihood(model, few, two, two, two, seed)
    annealed_log_likelihood(model, few[:2], two, two, two, np.int64(1), seed)
    active_units(model, few, np.float64(0.01))
    vaelib.train_valid_split(few, two, seed)
    vaelib.interpolate(model, few.pixels[0], few.pixels[1], np.int64(3))
    vaelib.latent_grid(model, two, np.float64(0.1))
    next(vaelib.minibatches(few, two))
    prior = priors.fit_mixture(model, few, two, seed)
    vaelib.generate(model, two, seed=seed, prior=prior)
    vaelib.generate(model, two, seed=seed, prior=priors.fit_second_stage(model, few, (np.int64(4),), np.int64(1), seed))
    index = LatentIndex.build(model, few, np.int64(9))
    index.search(few.pixels[:2], two)
    assert index.label(np.int64(3)) == "3"
    bootstrap_interval(torch.rand(9), np.float64(0.9), np.int64(20), seed)
    vaelib.beta_elbo(vaelib.ElboTerms(torch.zeros(2), torch.zeros(2)), np.float32(0.5))
    vaelib.conditional_vae((1, 28, 28), 3).given(np.int64(2))
    show_images(few.pixels[:4], np.int64(2))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vaelib.mlp_vae(latent_dim=np.float64(2)), "latent_dim: got float64 .*2.0.*, expected an integer of at least 1"),
    (lambda: vaelib.mlp_vae(latent_dim=np.int64(0)), "latent_dim: got int64 .*0.*, expected an integer"),
    (lambda: vaelib.mlp_vae(latent_dim=np.bool_(True)), "latent_dim: got bool.* expected an integer"),
    (lambda: vaelib.mlp_vae(latent_dim=True), "latent_dim: got bool True, expected an integer"),
    (lambda: vaelib.TrainConfig(learning_rate=np.float32("nan")), "learning_rate: got float.* expected a finite number above 0"),
    (lambda: vaelib.TrainConfig(beta=np.bool_(True)), "beta: got bool"),
    (lambda: vaelib.TrainConfig(flip=np.int64(1)), "flip: got int 1, expected True or False"),
    (lambda: likelihoods.Gaussian(learned=1), "learned: got int 1, expected True or False"),
    (lambda: vaelib.train_valid_split(vaelib.load_images("digits"), 3, np.uint64(2**63)), "seed: got .* expected an integer below"),
])  # fmt: skip
def test_other_values_of_numpy_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# What a user hands in as images.


@pytest.fixture
def binary(digits):
    """Digits of 0 and 1 only, on the wrong scale."""
    return (digits.pixels[:50] >= 128).to(torch.uint8)


MESSAGE = "pixels: got levels of 0 and 1 only, expected 0..255, where 255 is white; multiply them by 255 if 1 is white"


@pytest.mark.parametrize("hand_in", [
    lambda model, pixels: vaelib.image_set(pixels),
    lambda model, pixels: vaelib.ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.int64), ("a",)),
    lambda model, pixels: vaelib.heldout_elbo(model, pixels),
    lambda model, pixels: vaelib.log_likelihood(model, pixels, 2),
    lambda model, pixels: vaelib.posterior_means(model, pixels),
    lambda model, pixels: vaelib.reconstruct(model, pixels),
    lambda model, pixels: LatentIndex.build(model, pixels),
])  # fmt: skip
def test_pixels_of_0_and_1_are_warned_of_where_they_are_handed_in(hand_in, small_vae, binary):
    with pytest.warns(UserWarning, match="pixels") as caught:
        hand_in(small_vae, binary)
    assert [str(warning.message) for warning in caught] == [MESSAGE + help_at("pixels-of-0-and-1")]
    assert caught[0].filename == __file__  # the user's line, not one of the library


def test_the_page_on_troubles_quotes_what_the_library_says():
    page = (Path(__file__).parent.parent / "book" / "troubleshooting.md").read_text(encoding="utf-8")
    assert MESSAGE in page
    for call, argument in ((lambda: vaelib.image_set(LAST), "pixels"), (lambda: vaelib.fit(
        vaelib.conditional_vae((3, 32, 32), 10, (8,), 2), vaelib.image_set(LAST.permute(0, 3, 1, 2), name="mine")), "images")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{argument}: got") as caught:
            call()
        assert str(caught.value).partition("; see https:")[0] in page
    assert "OMP: Error #15" in page
    assert "KMP_DUPLICATE_LIB_OK" in page


def test_the_warning_comes_once_for_a_set_and_all_that_is_done_with_it(small_vae, binary):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, valid = vaelib.train_valid_split(vaelib.image_set(binary).to("cpu"), 10)
        vaelib.fit(small_vae, train, valid[:5], vaelib.TrainConfig(2, 10, progress=False, device="cpu"))
        vaelib.evaluate(small_vae, valid, 2)
    assert [str(warning.message) for warning in caught] == [MESSAGE + help_at("pixels-of-0-and-1")]


@pytest.mark.parametrize("levels", [1 / 15, 1 / 16])
def test_a_set_of_sixteen_levels_or_so_is_warned_of(levels, digits):
    with pytest.warns(UserWarning, match=f"pixels: got levels of at most {round(1 / levels)}, expected 0..255"):
        vaelib.image_set((digits.pixels[:50] / 255 / levels).round().to(torch.uint8))


@pytest.mark.filterwarnings("error")
def test_sets_on_the_right_scale_are_not_warned_of(small_vae, binary, digits):
    vaelib.image_set(255 * binary)  # binarized MNIST is stored so
    vaelib.image_set(torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    dark = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    dark[0, 0, 3, 3] = 9
    vaelib.heldout_elbo(small_vae, dark)  # two dark images of a set, not the set
    barely = torch.cat([digits.pixels[:20], dark.clamp(max=1)])
    assert len(vaelib.image_set(barely)[20:]) == 2  # so dark are these alone
    vaelib.load_images("shapes")


LAST = torch.zeros(128, 32, 32, 3, dtype=torch.uint8)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vaelib.image_set(LAST), r"pixels: got shape \(128, 32, 32, 3\), expected \(N, C, H, W\): the channels come before"),
    (lambda: vaelib.image_set(LAST[..., :1]), r"pixels: got shape \(128, 32, 32, 1\), .*permute\(0, 3, 1, 2\)"),
    (lambda: vaelib.ImageSet(LAST, torch.zeros(128, dtype=torch.int64), ("a",)), "pixels: got shape"),
    (lambda: vaelib.Bernoulli().observe(LAST), "pixels: got shape"),
    (lambda: show_images(LAST[:4]), "pixels: got shape"),
    (lambda: vaelib.conv_vae((32, 32, 3)), r"image_shape: got \(32, 32, 3\), expected \(channels, height, width\)"),
    (lambda: vaelib.mlp_vae((28, 28, 1)), "image_shape: got"),
    (lambda: vaelib.hierarchical_vae((32, 32, 3), ((2, 1),)), "image_shape: got"),
    (lambda: read_image("a.png", (32, 32, 3)), "image_shape: got"),
])  # fmt: skip
def test_channels_that_come_last_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (32, 1, 1), (1, 1, 3), (3, 3, 3), (4, 64, 4), (8, 8, 8), (6, 2, 3)])
def test_channels_that_come_first_are_not(shape):
    vaelib.image_set(torch.zeros(2, *shape, dtype=torch.uint8))
    assert vaelib.mlp_vae(shape, (4,), 2).image_shape == shape


@pytest.fixture
def unlabelled(digits):
    return vaelib.image_set(digits.pixels[:40], name="mine")


@pytest.mark.parametrize(("argument", "call"), [
    ("images", lambda m, x, some: vaelib.heldout_elbo(m, x)),
    ("images", lambda m, x, some: vaelib.evaluate(m, x)),
    ("images", lambda m, x, some: vaelib.log_likelihood(m, x, 2)),
    ("images", lambda m, x, some: priors.posterior_samples(m, x[:5])),
    ("images", lambda m, x, some: vaelib.fit(m, x, config=vaelib.TrainConfig(1, 10, progress=False, device="cpu"))),
    ("valid", lambda m, x, some: vaelib.fit(m, some, x, vaelib.TrainConfig(1, 10, progress=False, device="cpu"))),
])  # fmt: skip
def test_a_conditional_model_refuses_images_that_nobody_labelled(argument, call, unlabelled, digits):
    model = vaelib.conditional_vae((1, 28, 28), 10, (8,), 2)
    with pytest.raises(ValueError, match=f"{argument}: got 'mine' without labels, expected labels, or model.given"):
        call(model, unlabelled, digits[:40])
    vaelib.heldout_elbo(model.given(3), unlabelled)
    zeros = torch.zeros(40, dtype=torch.int64)  # by their owner's word
    vaelib.heldout_elbo(model, vaelib.image_set(unlabelled.pixels, zeros))


def test_evaluate_on_the_command_line_refuses_a_set_without_labels(unlabelled, tmp_path, monkeypatch):
    vaelib.save(vaelib.conditional_vae((1, 28, 28), 10, (8,), 2), tmp_path / "run")
    monkeypatch.setattr(cli, "load_images", lambda name, split: unlabelled)
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path / "run"), "--data", "binarized-mnist", "--device", "cpu"])
    assert str(done.exception).startswith("images: got 'mine' without labels, expected labels")


def test_a_set_knows_whether_it_has_labels(unlabelled, digits):
    assert digits.labelled
    assert digits[:3].labelled
    assert not unlabelled.labelled
    assert not unlabelled[3:].to("cpu").labelled
    assert not vaelib.train_valid_split(unlabelled, 3)[0].labelled
    with pytest.raises(ValueError, match="images: got 'mine' without labels"):
        class_means(vaelib.mlp_vae(), unlabelled)


def test_an_index_of_images_without_labels_has_none(small_vae, unlabelled, digits):
    index = LatentIndex.build(small_vae, unlabelled)
    assert index.labels.tolist() == [-1] * 40
    assert index.label(3) is None
    index.add(digits[:5])
    assert index.label(41) == "1"
    found = index.labels[index.search(digits[:5], 5).indices]
    with pytest.raises(ValueError, match=r"labels: got 40 images without a label \(-1\), expected a class for each"):
        score_retrieval(found, digits.labels[:5], index.labels, 5)


CODES, LABELS = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(("call", "message"), [
    (lambda: latent_scatter(torch.zeros(6, 8), LABELS, "abc"), r"codes: got a float32 tensor of shape \(6, 8\), expected shape \(N, 2\)"),
    (lambda: latent_scatter(CODES, LABELS[:5], "abc"), r"labels: got a int64 tensor of shape \(5,\), expected an int64 .* \(6,\)"),
    (lambda: latent_scatter(CODES, list("abcabc"), "abc"), r"labels: got list \['a', .*expected an int64 tensor"),
    (lambda: latent_scatter(CODES, LABELS, "ab"), "labels: got 2, expected numbers from 0 to 1, one for each of the classes"),
    (lambda: latent_scatter(CODES, LABELS - 1, "abc"), "labels: got -1, expected numbers from 0 to 2"),
    (lambda: training_curves([]), "history: got one without a finished epoch, expected at least one"),
    (lambda: training_curves([{"epoch": 1}], skip=1), "skip: got 1, expected less than the 1 epochs"),
    (lambda: vaelib.image_set(LAST.permute(0, 3, 1, 2)[:2], ["cat", "dog"]), r"labels: got list \['cat', 'dog'\], expected whole numbers"),
    (lambda: vaelib.image_set(LAST.permute(0, 3, 1, 2)[:2], [[0], [1, 2]]), "labels: got list .*expected whole numbers"),
    (lambda: score_retrieval(LABELS[None], ["a"], LABELS, 2), "query_labels: got list .*expected the numbers of classes"),
    (lambda: score_retrieval(LABELS, LABELS, LABELS, 2), r"found: got a int64 tensor of shape \(6,\), expected .* with 2 axes"),
    (lambda: score_retrieval(LABELS[None], LABELS[:1], torch.full((6,), -1), 2), r"labels: got 6 images without a label \(-1\)"),
    (lambda: score_retrieval(0 * LABELS[None], 0 * LABELS[:1], 0 * LABELS, 2), "labels: got class 0 for all images, expected several"),
    (lambda: average_precision(CODES, LABELS, CODES, LABELS - 1), "labels: got 2 images without a label"),
])  # fmt: skip
def test_labels_and_codes_that_do_not_fit_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and a working folder that is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(kind, home, digits, monkeypatch):
    from PIL import Image

    model = vaelib.mlp_vae((1, 28, 28), (8,), 2)
    vaelib.save(model, kind("~/a/model"))
    assert vaelib.load(kind("~/a/model")).config == model.config
    vaelib.fit(model, digits[:50], config=vaelib.TrainConfig(1, 50, progress=False, device="cpu"), folder=kind("~/run"))
    assert (home / "run" / "checkpoint.pt").is_file()
    (home / "pictures").mkdir()
    Image.fromarray(digits.pixels[3, 0].numpy()).save(home / "pictures" / "a.png")
    assert load_folder(kind("~/pictures"), (1, 28, 28)).names == ("a.png",)
    assert torch.equal(read_image(kind("~/pictures/a.png"), (1, 28, 28)), digits.pixels[3])
    index = LatentIndex.build(model, digits[:50])
    index.save(kind("~/digits.index"))
    assert is_index(kind("~/digits.index"))
    assert len(LatentIndex.load(kind("~/digits.index"))) == 50
    monkeypatch.setenv("VAELIB_RESULTS", "~/results")
    record("row", "command", 0, 1.0, {})
    assert (home / "results" / "row.json").is_file()
    assert finished("row", kind("~/results")) == {"row": {}}
    monkeypatch.setenv("VAELIB_DATA", "~/data")
    assert vaelib.data.data_folder() == home / "data"
    with pytest.raises(vaelib.data.DataNotFoundError, match=f"is not in {home / 'other'}"):
        vaelib.load_images("mnist", root=kind("~/other"), download=False)
    assert list(Path.cwd().iterdir()) == []


def test_a_name_that_only_begins_with_a_tilde_is_itself(home):
    assert _validation.as_path("~no-such-user/file") == Path("~no-such-user/file")
    assert storage.writable_folder("path", "~no-such-user-here").is_dir()
    assert Path("~no-such-user-here").is_dir()


def test_a_tilde_is_the_home_folder_on_the_command_line_too(home, digits):
    from PIL import Image

    (home / "pictures").mkdir()
    for i in (3, 4):
        Image.fromarray(digits.pixels[i, 0].numpy()).save(home / "pictures" / f"{i}.png")
    short = ["--data=digits", "--hidden=8", "--latent-dim=2", "--epochs=1", "--device=cpu", "--json"]
    for command in (
        ["train", "--out=~/run", *short],
        ["evaluate", "~/run", "--device=cpu"],
        ["sample", "~/run", "--out=~/a.png", "--device=cpu"],
        ["sample", "~/run", "--out=~/b.png", "--interpolate", "~/pictures/3.png", "~/pictures/4.png", "--device=cpu"],
        ["index", "~/run", "--out=~/a.index", "--folder=~/pictures", "--device=cpu"],
        ["search", "~/a.index", "~/pictures/3.png", "~/pictures", "--out=~/c.png", "--device=cpu"],
    ):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
    assert {path.name for path in home.iterdir()} == {"run", "pictures", "a.png", "b.png", "c.png", "a.index"}
    assert list(Path.cwd().iterdir()) == []
    done = CliRunner().invoke(cli.app, ["train", "--out=~/run", *short])
    assert "already holds a model" in str(done.exception)


def test_every_message_that_leads_to_the_page_on_troubles_leads_to_an_entry_that_is_there():
    root = Path(__file__).parent.parent
    page = (root / "book" / "troubleshooting.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^\(([a-z0-9-]+)\)=\n(?:\*\*|```text)", page, re.MULTILINE))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (root / "vaelib").rglob("*.py"))
    named = set(re.findall(r"""help_at\(["']([^"']+)["']\)""", code))
    assert named == entries
    assert len(named) >= 10
    base = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
    assert help_at("no-network") == f"; see {base}troubleshooting.html#no-network"


def test_what_users_get_wrong_most_ends_with_the_address_of_its_entry(small_vae, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("VAELIB_DATA", str(tmp_path))
    (tmp_path / "checkpoint.pt").touch()
    config = vaelib.TrainConfig(epochs=1, device="cpu", progress=False)
    conditional = vaelib.conditional_vae((1, 28, 28), 10, (8,), 2)
    for entry, call in {
        "no-network": lambda: vaelib.load_images("mnist", download=False),
        "channels-last": lambda: vaelib.mlp_vae((28, 28, 1)),
        "no-labels": lambda: vaelib.fit(conditional, vaelib.image_set(digits.pixels[:8])),
        "other-device": lambda: small_vae.elbo(digits.pixels[:8].double() / 255),
        "no-device": lambda: vaelib.fit(small_vae, digits, config=vaelib.TrainConfig(device="cuda:99")),
        "cut-off": lambda: vaelib.fit(small_vae, digits, config=config, folder=tmp_path),
        "no-resume": lambda: vaelib.fit(small_vae, digits, config=config, folder=tmp_path, resume=True),
        "released-model": lambda: vaelib.load("mnist-mpl"),
    }.items():
        with pytest.raises(ValueError, match="expected|is truncated|is not in") as caught:
            call()
        assert str(caught.value).endswith(help_at(entry)), entry
