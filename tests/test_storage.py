"""Saved models come back equal; broken, foreign or unwritable files are refused and nothing is half-written."""

import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vaelib
from vaelib import load, mlp_vae, save, storage
from vaelib.likelihoods import LIKELIHOODS

ROOT = Path(__file__).parent.parent
FILES = ["config.json", "model.safetensors"]


@pytest.fixture
def saved(small_vae, tmp_path):
    save(small_vae, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "likelihood",
    [*LIKELIHOODS, {"name": "gaussian", "scale": 0.3, "learned": True}, {"name": "bernoulli", "binarize": "threshold"}],
)
def test_a_loaded_model_gives_the_same_elbo(likelihood, digits, tmp_path):
    model = mlp_vae((1, 28, 28), (16, 8), 3, likelihood, activation="tanh")
    save(model, tmp_path / "deep" / "run")
    again = load(tmp_path / "deep" / "run")
    assert again.config == model.config
    assert not again.training
    assert torch.equal(vaelib.heldout_elbo(again, digits[:20]).elbo, vaelib.heldout_elbo(model, digits[:20]).elbo)
    assert sorted(os.listdir(tmp_path / "deep" / "run")) == FILES


def test_the_config_is_readable_and_says_what_the_model_is(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["model"] == "mlp"
    assert config["latent_dim"] == 4
    assert config["likelihood"]["name"] == "bernoulli"


def test_saving_again_replaces_the_model(saved):
    other = mlp_vae((1, 8, 8), (4,), 2)
    save(other, saved)
    assert load(saved).image_shape == (1, 8, 8)
    assert sorted(os.listdir(saved)) == FILES


@pytest.mark.skipif(os.name != "posix", reason="files elsewhere have no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_saved_file_follows_the_umask(mask, small_vae, digits, tmp_path):
    before = os.umask(mask)
    try:
        save(small_vae, tmp_path)
        vaelib.LatentIndex.build(small_vae, digits[:5]).save(tmp_path / "a.index")
    finally:
        os.umask(before)
    assert {name: (tmp_path / name).stat().st_mode & 0o777 for name in [*FILES, "a.index"]} == dict.fromkeys(
        [*FILES, "a.index"], 0o666 & ~mask
    )


def test_loading_runs_no_code_from_the_files(saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved / "exploded"),)

    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is broken or not the weights of the model"):
        load(saved)
    torch.save({"w": Bomb()}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="is broken"):
        load(saved)
    assert not (saved / "exploded").exists()


def test_missing_broken_and_foreign_files_are_named(saved, tmp_path):
    weights, config = (saved / "model.safetensors").read_bytes(), (saved / "config.json").read_text()
    with pytest.raises(ValueError, match=r"path: got .*nowhere, expected a folder written by vaelib.save; it has no config.json"):
        load(tmp_path / "nowhere")

    (saved / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.safetensors is broken"):
        load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no model.safetensors"):
        load(saved)
    save_file({"weight": torch.zeros(3)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="belong to another model"):
        load(saved)
    save_file({"weight": torch.zeros(3)}, saved / "model.safetensors", {"config": config})
    with pytest.raises(ValueError, match="not the weights of the model"):
        load(saved)

    (saved / "model.safetensors").write_bytes(weights)
    for broken in ("{", "[]", "{}", '{"model": "mpl"}', '{"model": "mlp", "depth": 3}', '{"model": "mlp", "latent_dim": 0}'):
        (saved / "config.json").write_text(broken)
        with pytest.raises(ValueError, match="config.json is not a config written by vaelib.save"):
            load(saved)
    (saved / "config.json").write_text(config.replace('"latent_dim": 4', '"latent_dim": 5'))
    with pytest.raises(ValueError, match="belong to another model"):
        load(saved)
    (saved / "config.json").write_text(config)
    assert load(saved).latent_dim == 4


def test_an_unwritable_path_is_refused_and_nothing_is_left(small_vae, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"path: got .*file.*, expected a folder that can be written"):
            save(small_vae, path)
    assert (tmp_path / "file").read_text() == "precious"
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_that_fails_midway_keeps_the_earlier_model(saved, small_vae, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vaelib.storage.save_file", full_disk)
    with pytest.raises(ValueError, match="path: got .*No space left on device"):
        save(small_vae, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(saved)) == FILES


def test_a_model_of_ones_own_networks_is_not_saved_silently_wrong(small_vae, tmp_path):
    small_vae.config = None
    with pytest.raises(ValueError, match="model: got a VAE without a config"):
        save(small_vae, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_its_config_does_not_build_again_is_refused_before_anything_is_written(digits, tmp_path):
    class MyBernoulli(vaelib.Bernoulli):
        """A likelihood of one's own, which `load` could not know."""

    mine = mlp_vae((1, 28, 28), (8,), 2, MyBernoulli())
    other_decoder = mlp_vae((1, 28, 28), (8,), 2)
    other_decoder.decoder = vaelib.MLPDecoder(2, (9,), (1, 28, 28))
    for model in (mine, other_decoder, mlp_vae((1, 28, 28), (8,), 2).double()):
        with pytest.raises(ValueError, match="model: got a VAE that its config does not build again"):
            save(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loading_draws_no_random_number(saved):
    torch.manual_seed(0)
    load(saved)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


def test_a_loaded_model_can_be_trained_on(saved, digits):
    model = load(saved)
    before = vaelib.heldout_elbo(model, digits[:100]).elbo.mean()
    vaelib.fit(model, digits[:500], config=vaelib.TrainConfig(epochs=2, batch_size=50, progress=False, device="cpu"))
    assert vaelib.heldout_elbo(model, digits[:100]).elbo.mean() > before


def test_an_architecture_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    import pathlib

    before = {name: (saved / name).read_bytes() for name in FILES}
    write = pathlib.Path.write_text

    def full_disk(path, *arguments, **keywords):
        if path.name.startswith(".config"):
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **keywords)

    monkeypatch.setattr(pathlib.Path, "write_text", full_disk)
    with pytest.raises(ValueError, match="No space left on device"):
        save(mlp_vae((1, 8, 8), (4,), 2), saved)
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert sorted(os.listdir(saved)) == FILES


def test_weights_that_are_not_finite_are_refused(saved, small_vae):
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            small_vae.decoder.head.bias[3] = value
        save(small_vae, saved)
        with pytest.raises(ValueError, match=r"path: .*model.safetensors holds weights that are not finite .*, decoder.head.bias"):
            load(saved)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("config", [
    {"model": "conv", "residual_blocks": 10**9},
    {"model": "conv", "residual_blocks": 10**30},
    {"model": "conv", "latent_dim": [1, 32, 32], "channels": [1] * 3000, "residual_blocks": 1},
    {"model": "hierarchical", "blocks": 10**9},
    {"model": "hierarchical", "levels": [[1, 10**9]]},
    {"model": "mlp", "hidden_dims": [1] * 10**6},
    {"model": "mlp", "hidden_dims": [2**62, 2**62]},
    {"model": "mlp", "hidden_dims": [10**30]},
    {"model": "mlp", "likelihood": {"name": "gaussian", "scale": 10**400}},
    {"model": "mlp", "likelihood": [[]]},
    {"model": "two-layer", "hidden_dims": [[[1]], [1]]},
    {"model": ["mlp"]}, {"model": {}}, {"model": None}, {}, [], None, 3, "mlp", [["model", "mlp"], 3],
])  # fmt: skip
def test_a_config_of_nonsense_is_refused_at_once(config, saved):
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="path: .*config.json is not a config written by vaelib.save"):
        load(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": "mlp"', b"NaN", b"\0"])
def test_a_config_that_is_no_json_is_refused(text, saved):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="path: .*config.json is not a config written by vaelib.save"):
        load(saved)


# --- released models

RELEASED = ["cifar-map", "mnist-mlp", "mnist-plane"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The released models in a folder that a test may damage."""
    shutil.copytree(storage.RELEASED, tmp_path / "models")
    monkeypatch.setattr(storage, "RELEASED", tmp_path / "models")
    monkeypatch.setattr(storage, "MANIFEST", tmp_path / "models" / "released.json")
    return tmp_path / "models"


def test_the_released_models_are_small_and_each_has_its_record():
    cards = vaelib.released()
    assert sorted(cards) == RELEASED == sorted(path.name for path in storage.RELEASED.iterdir() if path.is_dir())
    ledger = json.loads((ROOT / "results" / "released.json").read_text())
    for name, card in cards.items():
        assert (storage.RELEASED / name / "model.safetensors").stat().st_size <= 5_000_000
        record = ledger[name]
        assert card["test"] == record["metrics"]["test"]  # of the weights as stored: the same checksum
        assert card["sha256"] == record["metrics"]["sha256"]
        assert record["metrics"]["model"] == load(name).config
        assert record["metrics"]["test"]["num_images"] == 10000
        for commit in (record["commit"], card["training"]["commit"]):
            assert re.fullmatch("[0-9a-f]{12}", commit)  # no "+changes"


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_loaded_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(name)
    assert not model.training
    pixels = vaelib.generate(model, 3, seed=0)
    assert pixels.shape == (3, *model.image_shape)
    assert torch.equal(vaelib.generate(load(name), 3, seed=0), pixels)
    assert len(vaelib.reconstruct(model, pixels)) == 3


def test_a_released_model_knows_digits_from_noise(digits):
    noise = torch.randint(0, 256, (50, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for name in ("mnist-mlp", "mnist-plane"):
        known, unknown = (vaelib.heldout_elbo(load(name), images).elbo.mean() for images in (digits[:50], noise))
        assert known > unknown + 100


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["mnist-mlp", "mnist-plane"])
def test_a_released_model_scores_what_its_card_says(name):
    scores, card = vaelib.evaluate(load(name), vaelib.load_images("mnist", "test")), vaelib.released()[name]["test"]
    assert scores.elbo == pytest.approx(card["elbo"], abs=0.01)


def test_an_unknown_name_is_answered_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="path: got mnist-mpl, .* released models are 'cifar-map', 'mnist-mlp', 'mnist-plane'"):
        load("mnist-mpl")


def test_a_damaged_released_model_is_refused_and_says_what_to_do(copied):
    weights = copied / "mnist-plane" / "model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit of one weight
    for damage in (bytes(flipped), whole[:1000], b""):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match="the released model 'mnist-plane' is missing or damaged .*; install vaelib again"):
            load("mnist-plane")
    weights.unlink()
    with pytest.raises(ValueError, match="the released model 'mnist-plane' is missing or damaged .*No such file"):
        load("mnist-plane")
    weights.write_bytes(whole)
    assert load("mnist-plane").latent_dim == 2
    config = copied / "mnist-plane" / "config.json"
    config.write_text(config.read_text().replace("gelu", "relu"))
    with pytest.raises(ValueError, match="they belong to another model"):
        load("mnist-plane")


def test_a_folder_with_the_name_of_a_released_model_comes_first_and_is_told_of(small_vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small_vae, "mnist-mlp")
    with pytest.warns(UserWarning, match="path: got 'mnist-mlp', a folder here and a released model; the folder is loaded"):
        assert load("mnist-mlp").config == small_vae.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "mnist-mlp").config == small_vae.config  # a path that is no bare name
