"""What users hand over: NumPy's numbers, paths with a ~, and the checks that all modules share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vaelib
from vaelib import _validation, likelihoods, priors, storage
from vaelib.data import load_folder, read_image
from vaelib.evaluation import active_units, annealed_log_likelihood
from vaelib.ledger import record
from vaelib.plotting import show_images
from vaelib.retrieval import LatentIndex, bootstrap_interval, is_index

SHAPE = (np.int64(1), np.int32(8), np.uint8(8))
MODELS = {
    "mlp": lambda: vaelib.mlp_vae(SHAPE, (np.prod((4, 4)),), np.int64(2)),
    "conv": lambda: vaelib.conv_vae(SHAPE, np.int64(2), "discretized_logistic", (np.int64(4), 4), np.int64(1)),
    "spatial": lambda: vaelib.conv_vae(SHAPE, (np.int64(2), np.int64(4), 4), "discretized_logistic", [np.int64(4)]),
    "mixture": lambda: vaelib.mlp_vae(SHAPE, (4,), 2, likelihoods.DiscretizedLogisticMixture(np.int64(3))),
    "gaussian": lambda: vaelib.mlp_vae(SHAPE, (4,), 2, likelihoods.Gaussian(np.float32(0.5), np.bool_(True), np.True_)),
    "hierarchical": lambda: vaelib.hierarchical_vae(SHAPE, [(np.int64(2), 1), (1, np.int64(1))], np.int64(8), np.int64(4), np.int64(1)),
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
    monkeypatch.setenv("VAELIB_DATA", "~/data")
    assert vaelib.data.data_folder() == home / "data"
    with pytest.raises(vaelib.data.DataNotFoundError, match=f"is not in {home / 'other'}"):
        vaelib.load_images("mnist", root=kind("~/other"), download=False)
    assert list(Path.cwd().iterdir()) == []


def test_a_name_that_only_begins_with_a_tilde_is_itself(home):
    assert _validation.as_path("~no-such-user/file") == Path("~no-such-user/file")
    assert storage.writable_folder("path", "~no-such-user-here").is_dir()
    assert Path("~no-such-user-here").is_dir()
