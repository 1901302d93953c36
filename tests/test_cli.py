"""The command line, run as a user runs it: in a process of its own."""

import json

import numpy as np
import pytest
from PIL import Image

import vaelib

QUICK = ("--data", "digits", "--hidden", "32", "--latent-dim", "4", "--epochs", "3", "--batch-size", "100", "--device", "cpu")


@pytest.fixture(scope="module")
def run_folder(vaelib_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "runs" / "digits"
    done = vaelib_command("train", *QUICK, "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one JSON object and nothing else
    assert summary["epochs"] == 3
    assert summary["valid_elbo"] < 0
    return folder


def test_version_and_help_say_what_this_is(vaelib_command):
    assert vaelib_command("--version").stdout == f"vaelib {vaelib.__version__}\n"
    listed = vaelib_command("--help").stdout
    assert all(f"\n  {name} " in listed for name in ("train", "evaluate", "sample", "index", "search", "reproduce"))


def test_train_leaves_a_model_its_history_and_a_record_of_the_run(run_folder):
    files = ["checkpoint.pt", "config.json", "history.jsonl", "model.safetensors", "run.json"]
    assert sorted(path.name for path in run_folder.iterdir()) == files
    assert vaelib.load(run_folder).latent_dim == 4
    assert [json.loads(line)["epoch"] for line in (run_folder / "history.jsonl").read_text().splitlines()] == [1, 2, 3]
    record = json.loads((run_folder / "run.json").read_text())
    assert record["command"].startswith("vaelib train --data digits")
    assert {"seed", "commit", "versions", "hardware", "seconds", "metrics"} <= set(record)
    assert record["training"]["epochs"] == 3


def test_evaluate_prints_one_json_object_equal_to_the_library_s_answer(run_folder, vaelib_command):
    done = vaelib_command("evaluate", run_folder, "--json", "--num-samples", 20)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = vaelib.evaluate(vaelib.load(run_folder), vaelib.load_images("digits", "test"), num_samples=20)
    assert result["data"] == "digits"
    assert result["split"] == "test"
    assert result["elbo"] == pytest.approx(expected.elbo, abs=1e-3)
    assert result["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-3)
    assert result["effective_sample_size"] == pytest.approx(expected.effective_sample_size, rel=1e-2)
    assert result["share_of_few_draws"] == pytest.approx(expected.share_of_few_draws, abs=0.01)
    plain = vaelib_command("evaluate", run_folder, "--split", "train")
    assert "elbo " in plain.stdout


def test_sample_writes_a_sheet_of_images(run_folder, vaelib_command, tmp_path):
    done = vaelib_command("sample", run_folder, "--out", tmp_path / "new" / "samples.png", "--num-images", 9)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "new" / "samples.png") as sheet:
        assert sheet.size == (3 * 85 - 1, 3 * 85 - 1)  # each image of 28 pixels enlarged three times: at least 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.png"]


def test_sample_draws_a_grid_from_a_prior_fitted_to_the_training_images(run_folder, vaelib_command, tmp_path):
    from vaelib.plotting import tile
    from vaelib.priors import fit_mixture

    options = ("--grid", "2x5", "--prior", "mixture", "--temperature", 0.7, "--seed", 3, "--device", "cpu", "--json")
    done = vaelib_command("sample", run_folder, "--out", tmp_path / "a.png", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "out": str(tmp_path / "a.png"), "num_images": 10, "temperature": 0.7, "prior": "mixture", "seed": 3
    }  # fmt: skip
    model = vaelib.load(run_folder)
    prior = fit_mixture(model, vaelib.load_images("digits"), seed=3)
    large = vaelib.generate(model, 10, 0.7, 3, prior).repeat_interleave(3, 2).repeat_interleave(3, 3)
    expected = tile(large, columns=5).astype(int)
    with Image.open(tmp_path / "a.png") as sheet:
        found = np.asarray(sheet).astype(int)
    assert found.shape == (2 * 85 - 1, 5 * 85 - 1)
    assert abs(found - expected).max() <= 1  # another process, another number of threads


def test_sample_walks_between_two_image_files(run_folder, vaelib_command, tmp_path):
    digits = vaelib.load_images("digits").pixels
    for name, image in (("a.png", digits[0, 0]), ("b.png", digits[1, 0])):
        Image.fromarray(image.numpy()).save(tmp_path / name)
    ends = ("--interpolate", tmp_path / "a.png", tmp_path / "b.png", "--kind", "spherical", "--device", "cpu")
    done = vaelib_command("sample", run_folder, "--out", tmp_path / "way.png", *ends, "--num-images", 6, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 6
    expected = vaelib.interpolate(vaelib.load(run_folder), digits[0], digits[1], 6, kind="spherical")
    with Image.open(tmp_path / "way.png") as sheet:
        assert sheet.size == (6 * 85 - 1, 84)
        for step, image in enumerate(expected):
            found = np.asarray(sheet)[::3, 85 * step : 85 * step + 84 : 3].astype(int)
            assert abs(found - image[0].numpy().astype(int)).max() <= 1
    before = (tmp_path / "b.png").read_bytes()
    done = vaelib_command("sample", run_folder, "--out", tmp_path / "b.png", *ends)
    assert "b.png, which is an input, expected another file" in done.stderr
    assert (tmp_path / "b.png").read_bytes() == before


def test_train_does_not_overwrite_a_model_unasked(run_folder, vaelib_command):
    before = (run_folder / "model.safetensors").read_bytes()
    done = vaelib_command("train", *QUICK, "--out", run_folder)
    assert done.returncode == 2
    assert "already holds a model" in done.stderr
    done = vaelib_command("train", *QUICK, "--out", run_folder, "--resume", "--overwrite")
    assert "overwrite: got it beside --resume" in done.stderr
    record = (run_folder / "run.json").read_bytes()
    done = vaelib_command("train", *QUICK, "--out", run_folder, "--resume")  # it is finished: nothing is trained or written
    assert done.returncode == 0, done.stderr
    assert (run_folder / "run.json").read_bytes() == record
    assert (run_folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("arguments", "message"), [
    (("train", "--data", "minst", "--out", "{tmp}/x"), "name: got 'minst', expected one of"),
    (("train", "--data", "digits", "--latent-dim", "0", "--out", "{tmp}/x"), "latent_dim: got int 0"),
    (("train", "--data", "digits", "--likelihood", "gausian", "--out", "{tmp}/x"), "did you mean 'gaussian'"),
    (("train", "--data", "digits", "--model", "mlpp", "--out", "{tmp}/x"), "model: got 'mlpp'"),
    (("train", "--data", "digits", "--hidden", "4x", "--out", "{tmp}/x"), "hidden: got '4x'"),
    (("train", "--data", "digits", "--model", "conv", "--hidden", "400"), "hidden: got '400', but the model 'conv' takes no such"),
    (("train", "--data", "digits", "--model", "conv", "--latent-dim", "8x8"), "latent_dim: got"),
    (("train", "--data", "digits", "--model", "conv", "--latent-dim", "64xx"), "latent_dim: got '64xx', expected integers"),
    (("train", "--data", "digits", "--latent-dim", "a"), "latent_dim: got 'a', expected integers such as 128 or 64x8x8"),
    (("train", "--data", "digits", "--likelihood", "{{"), "expected a name or a JSON object"),
    (("train", "--data", "digits", "--model-options", "[1]", "--out", "{tmp}/x"), "model-options: got '[1]', expected a JSON object"),
    (("train", "--data", "digits", "--model-options", '{{"width": 8}}', "--out", "{tmp}/x"), "expected a JSON object with some of act"),
    (("train", "--data", "digits", "--model-options", "{{", "--out", "{tmp}/x"), "model-options: got '{', expected a JSON object ("),
    (("train", "--data", "digits", "--precision", "fp16"), "precision: got 'fp16', expected one of 'bf16', 'float32'"),
    (("train", "--data", "digits", "--batch-size", "5000", "--out", "{tmp}"), "batch_size: got 5000, expected at most the 1375"),
    (("train", "--data", "digits", "--out", "{tmp}/file/run"), "out: got"),
    (("evaluate", "{tmp}/nothing"), "expected a folder written by vaelib.save"),
    (("sample", "{run}", "--temperature", "-1"), "temperature: got float -1.0"),
    (("sample", "{run}", "--out", "{tmp}/file/a.png"), "out: got"),
    (("sample", "{run}", "--out", "{tmp}/new/a.png", "--interpolate", "{tmp}/file", "{tmp}/file"), "file"),
    (("sample", "{run}", "--out", "{tmp}/new/a.png", "--interpolate", "{tmp}/none.png", "{tmp}/file"), "none.png"),
    (("sample", "{run}", "--interpolate", "a.png", "b.png", "--prior", "mixture"), "interpolate: got it beside --prior"),
    (("sample", "{run}", "--grid", "3x4", "--num-images", "12"), "grid: got it beside --num-images, expected one of the two"),
    (("sample", "{run}", "--grid", "3x0"), "grid: got '3x0', expected ROWSxCOLS such as 4x10"),
    (("sample", "{run}", "--num-images", "-3"), "num_images: got int -3"),
    (("sample", "{run}", "--prior", "mixtur"), "prior: got 'mixtur', expected one of 'mixture', 'second-stage', 'standard'; did"),
    (("sample", "{run}", "--prior", "mixture", "--data", "shapes"), "pixels: got images of shape (3, 32, 32), expected (1, 28, 28)"),
    (("sample", "{run}", "--label", "3"), "label: got 3, expected it for a conditional model only"),
    (("sample", "{run}", "--label", "-1"), "label: got -1, expected it for a conditional model only"),
    (("sample", "{run}", "--data", "digits"), "data: got 'digits', expected it beside --prior only"),
    (("sample", "{run}", "--kind", "spherical"), "kind: got 'spherical', expected it beside --interpolate only"),
    (("sample", "{run}", "--kind", "round"), "kind: got 'round', expected one of 'linear', 'spherical'"),
    (("sample", "{run}", "--seed", "-1"), "seed: got int -1"),
    (("sample", "{run}", "--out", "{tmp}/new/samples.txt"), "expected the name of an image file"),
    (("sample", "{run}", "--out", "{tmp}/new/samples.psd"), "expected the name of an image file"),
    (("evaluate", "{run}", "--device", "meta"), "device: got 'meta'"),
    (("train", "--data", "digits", "--hidden", "1000000000000", "--out", "{tmp}/x"), "memory"),
])  # fmt: skip
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, run_folder, vaelib_command, tmp_path):
    (tmp_path / "file").write_text("precious")
    done = vaelib_command(*(a.format(tmp=tmp_path, run=run_folder) for a in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("vaelib: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no folder was left behind


def test_missing_data_without_network_end_with_the_way_out(vaelib_command, tmp_path):
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "VAELIB_DATA": str(tmp_path / "data")}
    done = vaelib_command("train", "--data", "mnist", "--out", tmp_path / "run", **blocked)
    assert done.returncode == 2
    assert "could not be downloaded" in done.stderr
    assert "VAELIB_DATA" in done.stderr


def test_a_diverged_run_says_so_and_saves_nothing(vaelib_command, tmp_path):
    wild = ("--optimizer", "SGD", "--learning-rate", "1e38", "--schedule", "constant", "--warmup", "0", "--clip-norm", "0")
    done = vaelib_command("train", *QUICK, *wild, "--out", tmp_path / "run", "--json")
    assert done.returncode == 2
    assert "vaelib: error: epoch 1, step 2: the" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_convolutional_model_is_trained_resumed_and_evaluated(vaelib_command, tmp_path):
    options = (
        *("--data", "shapes", "--model", "conv", "--channels", "4,8", "--latent-dim", "2x8x8", "--residual-blocks", "1"),
        *("--likelihood", '{"name": "gaussian", "learned": true, "discretized": true}', "--precision", "bf16", "--channels-last"),
        *("--epochs", "1", "--batch-size", "512", "--ema-decay", "0.9", "--flip", "--device", "cpu", "--out", tmp_path, "--json"),
    )
    done = vaelib_command("train", *options)
    assert done.returncode == 0, done.stderr
    again = vaelib_command("train", *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["valid_elbo"] == json.loads(done.stdout)["valid_elbo"]
    other = vaelib_command("train", *options, "--resume", "--beta", "2")
    assert other.returncode == 2
    assert "belongs to another run: its config.beta is 1.0, expected 2.0" in other.stderr
    model = vaelib.load(tmp_path)
    assert model.latent_shape == (2, 8, 8)
    assert json.loads((tmp_path / "run.json").read_text())["model"] == model.config
    done = vaelib_command("evaluate", tmp_path, "--json", "--elbo-samples", 1)
    assert 0 < json.loads(done.stdout)["bits_per_dim"] < 10


def test_a_hierarchical_model_is_trained_with_the_arguments_of_its_function(vaelib_command, tmp_path):
    options = {"levels": [[2, 1], [1, 1]], "width": 8, "bottleneck": 4, "blocks": 1}
    small = ("--data", "shapes", "--model", "hierarchical", "--model-options", json.dumps(options), "--likelihood", "discretized_logistic")
    done = vaelib_command("train", *small, "--epochs", "1", "--batch-size", "512", "--device", "cpu", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    model = vaelib.load(tmp_path)
    assert model.latent_shapes == [(2, 16, 16), (1, 32, 32)]
    assert json.loads(json.dumps(model.config)).items() >= options.items()


def test_overwrite_leaves_nothing_of_the_old_run_even_when_the_new_one_fails(vaelib_command, tmp_path):
    assert vaelib_command("train", *QUICK, "--out", tmp_path).returncode == 0
    (tmp_path / "checkpoint.pt").unlink()
    done = vaelib_command("train", *QUICK, "--out", tmp_path, "--resume")  # a model without a checkpoint cannot be gone on with
    assert done.returncode == 2
    assert "already holds a model" in done.stderr
    wild = ("--optimizer", "SGD", "--learning-rate", "1e38", "--schedule", "constant", "--warmup", "0", "--clip-norm", "0")
    assert vaelib_command("train", *QUICK, *wild, "--out", tmp_path, "--overwrite").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
