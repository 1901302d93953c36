"""The command line, run as a user runs it: in a process of its own."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vaelib
from vaelib.checkpoints import read_checkpoint, write_checkpoint
from vaelib.cli import main
from vaelib.storage import LOCK

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


def test_version_and_help_say_what_this_is(vaelib_here):
    assert vaelib_here("--version").stdout == f"vaelib {vaelib.__version__}\n"
    listed = vaelib_here("--help").stdout
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


def test_evaluate_prints_one_json_object_equal_to_the_library_s_answer(run_folder, vaelib_here):
    done = vaelib_here("evaluate", run_folder, "--json", "--num-samples", 20)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    expected = vaelib.evaluate(vaelib.load(run_folder), vaelib.load_images("digits", "test"), num_samples=20)
    assert result["data"] == "digits"
    assert result["split"] == "test"
    assert result["elbo"] == pytest.approx(expected.elbo, abs=1e-3)
    assert result["log_likelihood"] == pytest.approx(expected.log_likelihood, abs=1e-3)
    assert result["effective_sample_size"] == pytest.approx(expected.effective_sample_size, rel=1e-2)
    assert result["share_of_few_draws"] == pytest.approx(expected.share_of_few_draws, abs=0.01)
    plain = vaelib_here("evaluate", run_folder, "--split", "train")
    assert "elbo " in plain.stdout


def test_sample_writes_a_sheet_of_images(run_folder, vaelib_here, tmp_path):
    done = vaelib_here("sample", run_folder, "--out", tmp_path / "new" / "samples.png", "--num-images", 9)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "new" / "samples.png") as sheet:
        assert sheet.size == (3 * 85 - 1, 3 * 85 - 1)  # each image of 28 pixels enlarged three times: at least 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.png"]


def test_sample_draws_a_grid_from_a_prior_fitted_to_the_training_images(run_folder, vaelib_here, tmp_path):
    from vaelib.book.plotting import tile
    from vaelib.priors import fit_mixture

    options = ("--grid", "2x5", "--prior", "mixture", "--temperature", 0.7, "--seed", 3, "--device", "cpu", "--json")
    done = vaelib_here("sample", run_folder, "--out", tmp_path / "a.png", *options)
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


def test_sample_walks_between_two_image_files(run_folder, vaelib_here, tmp_path):
    digits = vaelib.load_images("digits").pixels
    for name, image in (("a.png", digits[0, 0]), ("b.png", digits[1, 0])):
        Image.fromarray(image.numpy()).save(tmp_path / name)
    ends = ("--interpolate", tmp_path / "a.png", tmp_path / "b.png", "--kind", "spherical", "--device", "cpu")
    done = vaelib_here("sample", run_folder, "--out", tmp_path / "way.png", *ends, "--num-images", 6, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 6
    expected = vaelib.interpolate(vaelib.load(run_folder), digits[0], digits[1], 6, kind="spherical")
    with Image.open(tmp_path / "way.png") as sheet:
        assert sheet.size == (6 * 85 - 1, 84)
        for step, image in enumerate(expected):
            found = np.asarray(sheet)[::3, 85 * step : 85 * step + 84 : 3].astype(int)
            assert abs(found - image[0].numpy().astype(int)).max() <= 1
    before = (tmp_path / "b.png").read_bytes()
    done = vaelib_here("sample", run_folder, "--out", tmp_path / "b.png", *ends)
    assert "b.png, which is an input, expected another file" in done.stderr
    assert (tmp_path / "b.png").read_bytes() == before


def test_train_does_not_overwrite_a_model_unasked(run_folder, vaelib_here):
    before = (run_folder / "model.safetensors").read_bytes()
    done = vaelib_here("train", *QUICK, "--out", run_folder)
    assert done.returncode == 2
    assert "already holds a model" in done.stderr
    done = vaelib_here("train", *QUICK, "--out", run_folder, "--resume", "--overwrite")
    assert "overwrite: got it beside --resume" in done.stderr
    record = (run_folder / "run.json").read_bytes()
    done = vaelib_here("train", *QUICK, "--out", run_folder, "--resume")  # it is finished: nothing is trained or written
    assert done.returncode == 0, done.stderr
    assert (run_folder / "run.json").read_bytes() == record
    assert (run_folder / "model.safetensors").read_bytes() == before


def test_a_run_that_was_cut_off_between_its_last_step_and_its_record_gets_the_record(run_folder, tmp_path, vaelib_here):
    out = tmp_path / "again"
    shutil.copytree(run_folder, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"metrics": record["metrics"] | {"stopped": "interrupted", "epochs": 0}}))
    done = vaelib_here("train", *QUICK, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "run.json").read_text())["metrics"]
    assert (found["stopped"], found["epochs"], found["steps"]) == ("finished", record["metrics"]["epochs"], 0)


@pytest.mark.parametrize(("arguments", "message"), [
    (("train", "--data", "minst", "--out", "{tmp}/x"), "data: got 'minst', expected one of"),
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
    (("sample", "{run}", "--prior", "mixtur"), "prior: got 'mixtur', expected one of 'diffusion', 'mixture', 'second-st"),
    (("sample", "{run}", "--prior", "mixture", "--data", "shapes"), "pixels: got images of shape (3, 32, 32), expected (1, 28, 28)"),
    (("sample", "{run}", "--label", "3"), "label: got 3, expected it for a conditional model only"),
    (("sample", "{run}", "--label", "-1"), "label: got -1, expected it for a conditional model only"),
    (("sample", "{run}", "--guidance", "2"), "guidance: got 2.0, expected it beside --prior diffusion and --label only"),
    (("sample", "{run}", "--prior-steps", "9"), "prior_steps: got 9, expected it beside --prior diffusion only"),
    (("train", "--prior", "mixture"), "prior: got 'mixture', expected one of 'diffusion', 'standard'"),
    (("train", "--prior", "diffusion", "--model", "conditional"), "prior: got 'diffusion' for the model 'conditional'"),
    (("sample", "{run}", "--data", "digits"), "data: got 'digits', expected it beside --prior only"),
    (("sample", "{run}", "--kind", "spherical"), "kind: got 'spherical', expected it beside --interpolate only"),
    (("sample", "{run}", "--kind", "round"), "kind: got 'round', expected one of 'linear', 'spherical'"),
    (("sample", "{run}", "--seed", "-1"), "seed: got int -1"),
    (("sample", "{run}", "--out", "{tmp}/new/samples.txt"), "expected the name of an image file"),
    (("sample", "{run}", "--out", "{tmp}/new/samples.psd"), "expected the name of an image file"),
    (("evaluate", "{run}", "--device", "meta"), "device: got 'meta'"),
    (("train", "--data", "digits", "--hidden", "1000000000000", "--out", "{tmp}/x"), "memory"),
])  # fmt: skip
def test_bad_input_ends_with_one_line_and_status_2(arguments, message, run_folder, here, tmp_path):
    (tmp_path / "file").write_text("precious")
    code, out, err = here(*(a.format(tmp=tmp_path, run=run_folder) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("vaelib: error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no folder was left behind


def test_missing_data_without_network_end_with_the_way_out(vaelib_here, tmp_path, monkeypatch):
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "VAELIB_DATA": str(tmp_path / "data")}
    for variable, value in blocked.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("urllib.request._opener", None)  # one that was made before knows no proxy
    done = vaelib_here("train", "--data", "mnist", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "could not be downloaded" in done.stderr
    assert "VAELIB_DATA" in done.stderr


def test_a_diverged_run_says_so_and_saves_nothing(vaelib_here, tmp_path):
    wild = ("--optimizer", "SGD", "--learning-rate", "1e38", "--schedule", "constant", "--warmup", "0", "--clip-norm", "0")
    done = vaelib_here("train", *QUICK, *wild, "--out", tmp_path / "run", "--json")
    assert done.returncode == 2
    assert "vaelib: error: epoch 1, step 2: the" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_convolutional_model_is_trained_resumed_and_evaluated(vaelib_here, tmp_path):
    options = (
        *("--data", "digits", "--model", "conv", "--channels", "4,8", "--latent-dim", "2x7x7", "--residual-blocks", "1"),
        *("--likelihood", '{"name": "gaussian", "learned": true, "discretized": true}', "--precision", "bf16", "--channels-last"),
        *("--epochs", "1", "--batch-size", "512", "--ema-decay", "0.9", "--flip", "--device", "cpu", "--out", tmp_path, "--json"),
    )
    done = vaelib_here("train", *options)
    assert done.returncode == 0, done.stderr
    again = vaelib_here("train", *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["valid_elbo"] == json.loads(done.stdout)["valid_elbo"]
    other = vaelib_here("train", *options, "--resume", "--beta", "2")
    assert other.returncode == 2
    assert "belongs to another run: its config.beta is 1.0, expected 2.0" in other.stderr
    model = vaelib.load(tmp_path)
    assert model.latent_shape == (2, 7, 7)
    assert json.loads((tmp_path / "run.json").read_text())["model"] == model.config
    done = vaelib_here("evaluate", tmp_path, "--json", "--elbo-samples", 1)
    assert 0 < json.loads(done.stdout)["bits_per_dim"] < 10


def test_a_hierarchical_model_is_trained_with_the_arguments_of_its_function(vaelib_here, tmp_path):
    options = {"levels": [[2, 1], [1, 1]], "width": 8, "bottleneck": 4, "blocks": 1}
    small = ("--data", "digits", "--model", "hierarchical", "--likelihood", "discretized_logistic", "--valid-size", 1000)
    small += ("--model-options", json.dumps(options))
    done = vaelib_here("train", *small, "--epochs", "1", "--batch-size", "128", "--device", "cpu", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    model = vaelib.load(tmp_path)
    assert model.latent_shapes == [(2, 14, 14), (1, 28, 28)]
    assert json.loads(json.dumps(model.config)).items() >= options.items()


def test_a_vq_vae_gets_a_prior_over_its_codes_and_is_sampled_from_it(vaelib_here, tmp_path):
    sizes = '{"num_codes": 8, "code_dim": 2, "width": 8, "narrow": 4, "blocks": 1}'
    arguments = ("train", "--data", "digits", "--likelihood", "bernoulli", "--epochs", 2, "--device", "cpu")
    arguments += ("--model", "vq", "--model-options", sizes, "--code-prior-epochs", 1)
    done = vaelib_here(*arguments, "--out", tmp_path / "vq", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 0 < summary["code_prior_rate"] < summary["train_kl"]
    assert summary["codes_used"] <= 8
    result = json.loads(vaelib_here("evaluate", tmp_path / "vq", "--elbo-samples", 1, "--json").stdout)
    assert result["kl"] < summary["train_kl"]
    sheet = tmp_path / "vq.png"
    assert vaelib_here("sample", tmp_path / "vq", "--out", sheet, "--num-images", 4).returncode == 0
    assert Image.open(sheet).size[0] > 28
    refused = vaelib_here("train", *QUICK, "--code-prior-epochs", 1, "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert "code-prior-epochs: got 1, but the model 'mlp' has no codes, expected vq" in refused.stderr


def test_overwrite_leaves_nothing_of_the_old_run_even_when_the_new_one_fails(vaelib_here, tmp_path):
    assert vaelib_here("train", *QUICK, "--out", tmp_path).returncode == 0
    (tmp_path / "checkpoint.pt").unlink()
    done = vaelib_here("train", *QUICK, "--out", tmp_path, "--resume")  # a model without a checkpoint cannot be gone on with
    assert done.returncode == 2
    assert "already holds a model" in done.stderr
    wild = ("--optimizer", "SGD", "--learning-rate", "1e38", "--schedule", "constant", "--warmup", "0", "--clip-norm", "0")
    assert vaelib_here("train", *QUICK, *wild, "--out", tmp_path, "--overwrite").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """Run the command in this process, in a new folder: exit status, stdout and stderr. Any traceback fails the test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaelib", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def refused(done, message):
    """Whether the command ended with one line on stderr that has `message` in it, and nothing on stdout."""
    code, out, err = done
    assert (code, out, len(err.splitlines())) == (2, "", 1), done
    assert message in err
    return err.startswith("vaelib: error: ")


def cut_off(folder, run_folder, **changes):
    """The folder of a run that was killed: a checkpoint and a history, and no model."""
    folder.mkdir()
    shutil.copy(run_folder / "history.jsonl", folder)
    write_checkpoint(folder, read_checkpoint(run_folder, {}) | changes)
    return folder


def test_a_run_that_was_cut_off_is_evaluated_sampled_and_indexed_by_its_checkpoint(run_folder, here, tmp_path):
    killed = cut_off(tmp_path / "killed", run_folder)
    said = f"vaelib: {killed} has no finished model; its checkpoint is used, after 3 epochs and 42 steps; train --resume goes on from it\n"
    code, out, err = here("evaluate", killed, "--json", "--device", "cpu")
    assert (code, err) == (0, said)
    assert json.loads(out) == json.loads(here("evaluate", run_folder, "--json", "--device", "cpu")[1])
    assert here("sample", killed, "--device", "cpu")[::2] == (0, said)
    assert here("index", killed, "--device", "cpu")[::2] == (0, said)
    images = here("sample", run_folder, "--out", "whole.png", "--device", "cpu")
    assert images[::2] == (0, "")
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    averages = [torch.zeros_like(value) for value in read_checkpoint(run_folder, {})["weights"].values()]
    averaged = cut_off(tmp_path / "averaged", run_folder, averages=averages)
    code, out, _ = here("evaluate", averaged, "--json", "--device", "cpu")
    assert json.loads(out)["elbo"] == pytest.approx(-784 * np.log(2))  # weights of 0: each pixel a fair coin, no KL
    assert refused(
        here("evaluate", cut_off(tmp_path / "own", run_folder, model="VAE(...)")), "does not hold the weights of a model"
    )


def test_weights_of_nan_are_an_error_of_every_command(run_folder, here, tmp_path):
    model = vaelib.load(run_folder)
    with torch.no_grad():
        model.encoder.head.weight[0, 0] = float("nan")
    vaelib.save(model, tmp_path / "nan")
    shutil.copy(run_folder / "run.json", tmp_path / "nan")
    for command in ("evaluate", "sample", "index"):
        assert refused(here(command, tmp_path / "nan"), "holds weights that are not finite (NaN or infinity), encoder.head.weight")
    with torch.no_grad():
        model.encoder.head.weight.fill_(1e38)  # finite, but what they compute is not
    vaelib.save(model, tmp_path / "nan")
    assert refused(here("index", tmp_path / "nan"), "gives codes that are not finite")
    killed = cut_off(tmp_path / "killed", run_folder, averages=[torch.full_like(value, torch.nan) for value in model.parameters()])
    assert refused(here("sample", killed), "holds weights that are not finite")
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.index"))


HUGE = 10**25


@pytest.mark.parametrize(("arguments", "message"), [
    (("train", "--epochs", HUGE), "epochs: got int 1000"),
    (("train", "--batch-size", HUGE), "batch_size: got int 1000"),
    (("train", "--hidden", HUGE), "hidden_dims: got int 1000"),
    (("train", "--valid-size", HUGE), "valid_size: got int 1000"),
    (("train", "--latent-dim", f"{HUGE}x8x8", "--model", "conv"), "latent_dim: got int 1000"),
    (("train", "--likelihood", '{"name": "gaussian", "scale": 1%s}' % ("0" * 400)), ""),
    (("train", "--model", "conv", "--residual-blocks", 10**9), "residual_blocks: got int 1000000000, which makes 3000000003 layers"),
    (("train", "--data", "DIGITS"), "'mnist', 'shapes'; did you mean 'digits'?"),
    (("train", "--data", "my-images"), "data: got 'my-images', expected one of"),
    (("train", "--data", ""), "data: got '' on the command line, expected a value"),
    (("train", "--out", ""), "out: got '' on the command line, expected a value"),
    (("evaluate", "{run}", "--num-samples", HUGE), "num_samples: got int 1000"),
    (("evaluate", "{run}", "--elbo-samples", 0), "elbo_samples: got int 0"),
    (("evaluate", "{run}", "--seed", HUGE), "seed: got 1000"),
    (("evaluate", "{run}", "--data", "digit"), "data: got 'digit', expected one of"),
    (("sample", "{run}", "--num-images", HUGE), "num_images: got int 1000"),
    (("sample", "{run}", "--grid", f"{HUGE}x{HUGE}"), "grid: got int 1000"),
    (("sample", "{run}", "--num-images", 1, "--interpolate", "a.png", "b.png"), "num_images: got int 1, expected an integer of at least 2"),
    (("sample", "{run}", "--label", HUGE), "label: got 1000"),
    (("sample", "{run}", "--seed", HUGE), "seed: got 1000"),
    (("index", "{run}", "--folder", ""), "folder: got '' on the command line, expected a value"),
    (("index", "{run}", "--folder="), "folder: got '' on the command line, expected a value"),
    (("index", "{run}", "--data", "my-images"), "data: got 'my-images', expected one of"),
    (("evaluate", ""), "evaluate: got '' on the command line"),
    (("reproduce", "iwae", "--data", "Digits"), "data: got 'Digits'"),
    (("reproduce", "iwae", "--data", "digits", "-k", HUGE), "k: got "),
    (("reproduce", "iwae", "--data", "digits", "--seed", HUGE), "seed: got 1000"),
    (("reproduce", "iwae", "--data", "digits", "--ledger", "/dev/full"), "ledger: got /dev/full, expected the name of a JSON file"),
    (("reproduce", "iwae", "--data", "digits", "--ledger", "{run}"), "expected the name of a JSON file"),
    (("reproduce", "iwae", "--data", "digits", "--ledger", "{run}/run.json/rows.json"), "ledger: got"),
])  # fmt: skip
def test_odd_arguments_end_with_one_line_before_any_work(arguments, message, run_folder, here, tmp_path):
    given = [str(argument).replace("{run}", str(run_folder)) for argument in arguments]
    if given[0] == "train":
        given += [] if "--data" in given else ["--data", "shapes" if "conv" in given else "digits"]
        given += [] if "--out" in given else ["--out", tmp_path / "x"]
    assert refused(here(*given), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "null", "3", "", "{", "[" * 100_000, "\0"])
def test_a_ledger_or_a_record_that_is_no_json_object_is_refused(text, run_folder, here, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    done = here("reproduce", "iwae", "--data", "digits", "--ledger", "rows.json")
    assert refused(done, "ledger: rows.json is no file of one JSON object")
    assert os.listdir(tmp_path) == ["rows.json"]
    shutil.copytree(run_folder, tmp_path / "run")
    for broken in (text, '{"data": 3, "metrics": 3}', '{"data": ["digits"], "metrics": [1]}'):
        (tmp_path / "run" / "run.json").write_text(broken)
        assert refused(here("evaluate", "run"), "data: ")
        assert refused(here("train", *QUICK, "--out", "run", "--resume", "--json"), "out: ")
        assert (tmp_path / "run" / "run.json").read_text() == broken


def test_a_checkpoint_without_weights_ends_with_one_line(run_folder, here, tmp_path):
    state = read_checkpoint(run_folder, {})
    del state["weights"]
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run", state)
    assert refused(here("evaluate", "run"), "path: run/checkpoint.pt does not hold the weights of a model that vaelib builds")
    assert refused(here("train", *QUICK, "--out", "run", "--resume"), "resume: got a checkpoint without weights")


@pytest.mark.parametrize("name", ["model.safetensors", "history.jsonl", "run.json", "checkpoint.pt", "config.json"])
def test_a_foreign_file_of_a_name_that_training_writes_is_not_replaced_unasked(name, here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    for further in ((), () if name == "checkpoint.pt" else ("--resume",)):
        assert refused(here("train", *QUICK, "--out", "run", *further), "out: run already holds a ")
    row = tmp_path / "rows" / "digits-1-vae-1.minutes"
    row.mkdir(parents=True)
    (row / name).write_text("precious")
    assert refused(here("reproduce", "iwae", "--data", "digits", "--out", "rows"), str(row.relative_to(tmp_path)))
    assert [(path.name, path.read_text()) for path in [*(tmp_path / "run").iterdir(), *row.iterdir()]] == [(name, "precious")] * 2
    code, out, err = here("train", *QUICK, "--epochs", 1, "--out", "run", "--overwrite", "--json")
    assert code == 0, err
    assert json.loads(out)["diverged"] is None


def test_two_trainings_into_one_folder_at_once_do_not_mix(vaelib_here, tmp_path):
    (tmp_path / "run").mkdir()
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / LOCK)]  # what a training holds, in a process without torch
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for further in ((), ("--resume",), ("--overwrite",)):
            done = vaelib_here("train", *QUICK, "--out", tmp_path / "run", *further)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr == f"vaelib: error: out: another process is writing to {tmp_path / 'run'}, expected another folder\n"
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        other.stdin.close()


@pytest.mark.filterwarnings("default::UserWarning")  # as for a user; the tests make errors of the library's own
def test_a_training_that_diverged_says_so_on_stderr_and_in_its_summary_and_record(here, tmp_path):
    wild = ("--optimizer", "SGD", "--learning-rate", 1e16, "--schedule", "constant", "--warmup", 0, "--clip-norm", 1e-10)
    code, out, err = here("train", *QUICK, "--epochs", 1, *wild, "--out", "run", "--json")
    assert code == 0
    assert err.startswith("vaelib: warning: training diverged: after epoch 1 the ELBO is -")
    assert len(err.splitlines()) == 1
    assert json.loads(out)["diverged"].startswith("after epoch 1 the ELBO is -")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["diverged"] == json.loads(out)["diverged"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_process_with_one_line_and_status_130(run_folder, tmp_path):
    code = """
import os, signal, sys, time
from vaelib import cli

def evaluate(*arguments, **options):  # the signal comes amid the work, and not while torch is being imported
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

cli.evaluate_model = evaluate
cli.main()
"""
    command = [sys.executable, "-c", code, "evaluate", str(run_folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vaelib: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "sample", "index", "reproduce"])
def test_ctrl_c_amid_the_work_of_a_command_is_one_line(command, run_folder, here, tmp_path, monkeypatch):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    for name in ("evaluate_model", "generate", "LatentIndex.save", "iwae_row"):
        monkeypatch.setattr(f"vaelib.cli.{name}", press)
    arguments = ("iwae", "--data", "digits", "--out", tmp_path / "rows") if command == "reproduce" else (run_folder,)
    assert here(command, *arguments) == (130, "", "vaelib: interrupted\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_row_whose_training_was_interrupted_is_not_entered(here, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        history = vaelib.History()
        history.stopped = "interrupted"
        return history

    monkeypatch.setattr("vaelib.book.reproduce.fit", interrupted)
    assert here("reproduce", "iwae", "--data", "digits", "--ledger", "rows.json")[::2] == (130, "vaelib: interrupted\n")
    assert not (tmp_path / "rows.json").exists()
    assert not list(tmp_path.rglob("run.json"))


def test_digits_are_compressed_and_come_back(vaelib_here, tmp_path):
    options = ("--hidden", "32", "--latent-dim", "4", "--epochs", "2", "--device", "cpu", "--likelihood", "discretized_logistic")
    assert vaelib_here("train", "--data", "digits", *options, "--out", tmp_path / "run", "--json").returncode == 0
    pixels = vaelib.load_images("digits", "test").pixels[:30]
    (tmp_path / "in").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image[0].numpy()).save(tmp_path / "in" / f"{number:05}.png")
    file, model = tmp_path / "digits.vae", ("--model", tmp_path / "run")
    done = vaelib_here("compress", tmp_path / "in", *model, "--out", file, "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["images"] == 30
    assert written["bytes"] == file.stat().st_size < sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    done = vaelib_here("decompress", file, *model, "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 30
    for number, image in enumerate(pixels):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "again" / f"{number:05}.png")), image[0].numpy())


def test_what_compress_and_decompress_refuse_is_said_in_one_line(vaelib_here, tmp_path):
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    Image.new("L", (30, 28)).save(tmp_path / "wide.png")
    Image.new("RGB", (28, 28)).save(tmp_path / "colour.png")
    Image.new("L", (28, 28), 100).save(tmp_path / "grey.png")
    (tmp_path / "empty").mkdir()
    model, out = ("--model", "mnist-mlp"), ("--out", tmp_path / "out.vae")
    for arguments, reason in (
        ((*model, *out), "images: got none"),
        ((tmp_path / "white.png", "--data", "digits", *model, *out), "images: got files beside --data"),
        ((tmp_path / "white.png", "--split", "test", *model, *out), "split: got 'test' without --data"),
        ((tmp_path / "wide.png", *model, *out), "is a L image of 30x28 pixels, expected L and 28x28"),
        ((tmp_path / "colour.png", *model, *out), "is a RGB image of 28x28 pixels, expected L and 28x28"),
        ((tmp_path / "grey.png", *model, *out), "grey pixels, expected only 0 and 255"),
        ((tmp_path / "empty", *model, *out), "expected one with image files"),
        ((tmp_path / "white.png", *model, "--out", tmp_path / "white.png"), "already exists"),
        ((tmp_path / "white.png", *model, "--out", tmp_path / "white.png", "--overwrite"), "which is an input"),
        ((tmp_path / "white.png", *model, *out, "--bins", "100"), "bins: got 100"),
    ):
        done = vaelib_here("compress", *arguments)
        assert done.returncode == 2
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
    assert vaelib_here("compress", tmp_path / "white.png", *model, *out).returncode == 0
    for arguments, reason in (
        ((tmp_path / "white.png", *model, "--out", tmp_path / "pngs"), "does not begin as one"),
        ((tmp_path / "out.vae", "--model", "mnist-plane", "--out", tmp_path / "pngs"), "model: got one with the fingerprint"),
        ((tmp_path / "out.vae", *model, "--out", tmp_path), "holds files"),
        ((tmp_path / "out.vae", *model, "--out", tmp_path / "white.png"), "which is a file"),
    ):
        done = vaelib_here("decompress", *arguments)
        assert done.returncode == 2
        assert reason in done.stderr
    assert not (tmp_path / "pngs").exists()
