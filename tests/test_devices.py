"""What the library does with a model on a GPU, on a GPU that is emulated: see `emulated_device`. No CUDA runs here."""

import copy
import importlib.util
import inspect
import json
import tempfile

import pytest
import torch
from emulated_device import GPU, emulated_gpu, failures, on_gpu
from torch import nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import vaelib
from vaelib import cli, evaluation, generation, priors, quality, retrieval
from vaelib.book import oracles, plotting, widgets
from vaelib.book.oracles import LinearGaussian, gaussian_pixels_log_prob
from vaelib.book.reproduce import Budget, iwae_row


@pytest.fixture
def gpu():
    with emulated_gpu():
        yield


def raises_mixed():
    return pytest.raises(RuntimeError, match="on the same device.*cuda:0 and cpu")


# The emulation raises where CUDA would.


@pytest.mark.parametrize(
    "meet",
    [
        lambda a, b: a + b,
        lambda a, b: a.add_(b),
        lambda a, b: b.add_(a),
        lambda a, b: a @ b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack([a[0, 0], b[0, 0]]),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: b[torch.tensor([0], device="cuda")],
        lambda a, b: a.gather(0, b.long()),
        lambda a, b: torch.lerp(a, b[0, 0], b[0, 0]),
        lambda a, b: b[0, 0].add_(a[0, 0]),
        lambda a, b: torch.nn.functional.linear(b, a),
        lambda a, b: torch.equal(a, b),
    ],
)
def test_the_emulation_refuses_tensors_of_both_devices(gpu, meet):
    a, b = torch.eye(2, device="cuda"), torch.ones(2, 2)
    with raises_mixed():
        meet(a, b)


def test_the_emulation_allows_what_cuda_allows(gpu):
    a, b = torch.eye(2, device="cuda"), torch.ones(2, 2)
    for result in (
        a + b[0, 0],
        a * 2,
        a[torch.tensor([1])],
        a[b > 0],
        a.new_zeros(2),
        torch.zeros_like(a),
        a.double(),
        a[0].view(1, 2),
    ):
        assert result.device == GPU
    a[torch.tensor([0])] = torch.tensor(3.0)
    b.copy_(a)
    assert not on_gpu(b)
    assert b.tolist() == [[3, 3], [0, 1]]
    assert a.sum().item() == 7


def test_the_emulation_moves_tensors_modules_and_gradients(gpu):
    layer = nn.Linear(2, 1)
    bias = layer.bias
    assert layer.to("cuda") is layer
    assert layer.weight.device == GPU
    assert layer.bias is bias
    x = torch.ones(3, 2, requires_grad=True)
    layer(x.to("cuda")).sum().cpu().backward()
    assert layer.weight.grad.device == GPU
    assert x.grad.device.type == "cpu"
    assert copy.deepcopy(layer).weight.device == GPU
    assert layer.cpu().weight.device.type == "cpu"
    assert x.to("cpu") is x
    assert x.cuda().is_cuda
    assert not x.is_cuda


def test_the_emulation_keeps_numpy_and_generators_to_their_device(gpu):
    with pytest.raises(TypeError, match="Tensor.cpu"):
        torch.ones(2, device="cuda").numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(2, generator=torch.Generator("cuda"))
    assert torch.rand(2, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).device == GPU


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
def test_the_emulation_carries_the_optimizers(gpu, options):
    layer = nn.Linear(2, 1).to("cuda")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, **options)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    assert layer.weight.device == GPU
    assert torch.allclose(layer.weight, before - 0.1, atol=1e-4)


def test_after_the_emulation_there_is_no_gpu():
    there = torch.cuda.is_available()
    with emulated_gpu():
        assert torch.cuda.is_available()
        assert torch.ones(2, device="cuda").device == GPU
    assert torch.cuda.is_available() == there
    assert not hasattr(torch.Tensor.device, "fget")


def test_a_cell_that_mixes_devices_is_found_in_a_notebook(tmp_path):
    nbformat, _ = (pytest.importorskip(name, reason="notebooks are run by nbclient") for name in ("nbformat", "nbclient"))
    sources = ["import torch; a = torch.ones(2, device='cuda')", "a + torch.ones(2)", "print(a + a)"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)])
    nbformat.write(book, tmp_path / "a.ipynb")
    ((number, cell, error),) = failures(tmp_path / "a.ipynb")
    assert (number, cell) == (1, "cell-1")
    assert "on the same device" in error
    assert nbformat.read(tmp_path / "a.ipynb", 4) == book


# A model on the GPU gives what it gives on the CPU.

VALUES = torch.linspace(-1, 1, 3)


def has(images):
    return images.labels > 4


FUNCTIONS = {  # of the modules below: what is called with (model, images)
    "evaluate": lambda m, x: vaelib.evaluate(m, x, 3, 2).as_dict(),
    "log_likelihood": lambda m, x: vaelib.log_likelihood(m, x, 5),
    "importance_weighted_estimate": lambda m, x: vaelib.importance_weighted_estimate(m, x, 5),
    "annealed_log_likelihood": lambda m, x: evaluation.annealed_log_likelihood(m, x[:5], 3, 2, leapfrog_steps=2),
    "bidirectional_bounds": lambda m, x: evaluation.bidirectional_bounds(
        m, (x.pixels[:5] > 127).float(), torch.ones(5, m.latent_dim, device=x.pixels.device), 3, 2, leapfrog_steps=2
    ),
    "refine_posterior": lambda m, x: evaluation.refine_posterior(m, (x.to(m.device).pixels > 127).float(), 3),
    "inference_gaps": lambda m, x: evaluation.inference_gaps(m, x[:5], 4, 3),
    "check_normalized": lambda m, x: evaluation.check_normalized(m),
    "posteriors": lambda m, x: evaluation.posteriors(m, x),
    "posterior_means": lambda m, x: vaelib.posterior_means(m, x),
    "active_units": lambda m, x: vaelib.active_units(m, x),
    "kl_per_unit": lambda m, x: vaelib.kl_per_unit(m, x),
    "rate_decomposition": lambda m, x: vaelib.rate_decomposition(m, x, 10),
    "decode_pixels": lambda m, x: generation.decode_pixels(m, x.pixels.new_zeros(3, m.latent_dim, dtype=torch.float32)),
    "generate": lambda m, x: vaelib.generate(m, 4, seed=0),
    "reconstruct": lambda m, x: vaelib.reconstruct(m, x.pixels),
    "mean_code": lambda m, x: generation.mean_code(m, "image", x.pixels[0]),
    "interpolate": lambda m, x: [vaelib.interpolate(m, *x.pixels[:2], 4, kind=kind) for kind in ("linear", "spherical")],
    "most_used_units": lambda m, x: generation.most_used_units(m, x, 2),
    "traverse": lambda m, x: generation.traverse(m, x.pixels[0], x.labels.new_tensor([1, 0]), VALUES.to(x.pixels.device)),
    "class_means": lambda m, x: generation.class_means(m, x),
    "attribute_vector": lambda m, x: generation.attribute_vector(m, x, has(x)),
    "shift": lambda m, x: generation.shift(m, x.pixels, torch.ones(m.latent_dim, device=x.pixels.device)),
    "latent_grid": lambda m, x: vaelib.latent_grid(m, 3),
    "posterior_samples": lambda m, x: priors.posterior_samples(m, x),
    "codes_to_fit": lambda m, x: priors.codes_to_fit(m, x, 0, 2),
    "fit_mixture": lambda m, x: [mixture := priors.fit_mixture(m, x, 2), vaelib.generate(m, 4, seed=0, prior=mixture)],
    "fit_second_stage": lambda m, x: vaelib.generate(m, 4, seed=0, prior=priors.fit_second_stage(m, x, (8,), 1)),
    "latent_explorer": lambda m, x: (
        widgets.latent_explorer(m, "a", "b", codes=vaelib.posterior_means(m, x).to(x.pixels.device), labels=x.labels).html
    ),
    "interpolation_slider": lambda m, x: widgets.interpolation_slider(m, x.pixels[:3], "a", "b").html,
    "traversal_sliders": lambda m, x: widgets.traversal_sliders(m, x.pixels[0], [0, 1], "a", "b").html,
    "drawing_board": lambda m, x: widgets.drawing_board(m, x, x, "a", "b").html,
    "board_still": lambda m, x: widgets.board_still(m, x, vaelib.evaluation.posteriors(m, x), 0, 3),
    "page_decoder": lambda m, x: widgets.page_decoder(m),
    "start_code": lambda m, x: widgets.start_code(m, "image", x.pixels[0]),
    "live": lambda m, x: widgets.live(m, lambda z: torch.tensor([2 * z]), z=(0.0, 1.0, 0.0)).children[0].value,
    "live_explorer": lambda m, x: widgets.live_explorer(m).children[0].value,
    "live_interpolation": lambda m, x: widgets.live_interpolation(m, *x.pixels[:2]).children[0].value,
    "live_traversal": lambda m, x: widgets.live_traversal(m, x.pixels[0], [1]).children[0].value,
    "heldout_elbo": lambda m, x: vaelib.heldout_elbo(m, x, 2),
    "fingerprint": lambda m, x: retrieval.fingerprint(m),
    "fit_prior": lambda m, x: flow_fitted(m, x.pixels),
    "compress": lambda m, x: through_a_file(m, (x.pixels[:3] >= 128).to(torch.uint8) * 255),
}
MODULES = (evaluation, generation, priors, widgets)


def flow_fitted(model, pixels):
    torch.manual_seed(0)
    return priors.fit_prior(model, pixels, priors.FlowPrior(model.latent_dim).to(model.device), epochs=1)


def through_a_file(model, pixels):
    with tempfile.TemporaryDirectory() as folder:
        vaelib.compress(model, pixels, f"{folder}/images.vae")
        return vaelib.decompress(f"{folder}/images.vae", model)


def test_the_table_has_every_function_of_a_model():
    of_a_model = {
        name
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and "model" in inspect.signature(function).parameters
    }
    assert of_a_model <= FUNCTIONS.keys()


def plane():
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (16,), 2)
    with torch.no_grad():
        model.encoder.head.weight.mul_(4)
    return model


def equal(result, expected, on_cpu=True):
    """Whether two results agree leaf by leaf, and that of the GPU is back on the CPU."""
    pairs = list(zip(tree_leaves(result), tree_leaves(expected), strict=True))
    for got, value in pairs:
        if isinstance(value, torch.Tensor):
            assert not on_cpu or not on_gpu(got)
            torch.testing.assert_close(got.cpu(), value, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == value
    return True


@pytest.mark.parametrize("images_on", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_on_the_gpu_gives_what_it_gives_on_the_cpu(digits, name, images_on):
    if name.startswith("live"):
        pytest.importorskip("ipywidgets", reason="live figures need ipywidgets")
    function, few = FUNCTIONS[name], digits[:60]
    expected = function(plane(), few)
    with emulated_gpu():
        model = plane().to("cuda")
        result = function(model, few.to(images_on))
        assert equal(result, expected, on_cpu=name != "refine_posterior")
        assert model.device == GPU


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_default_device_leaves_the_results_as_they_are(digits, name):
    if name.startswith("live"):
        pytest.importorskip("ipywidgets", reason="live figures need ipywidgets")
    function, few, model = FUNCTIONS[name], digits[:60], plane()
    expected = function(model, few)
    with emulated_gpu():
        model = copy.deepcopy(model).to("cuda")
        with torch.device("cuda"):
            assert equal(function(model, few), expected, on_cpu=name != "refine_posterior")


def test_all_the_library_runs_under_a_default_device(gpu, digits, tmp_path):
    def results():
        shapes = vaelib.load_images("shapes")
        own = vaelib.image_set(shapes.pixels[:30], range(30), "own")
        train, valid = vaelib.train_valid_split(vaelib.load_images("digits"), 40)
        x, labels = vaelib.posterior_means(plane().cpu(), train[:90]), train.labels[:90]
        found = labels[vaelib.nearest_neighbours(x, x, 5, "cosine").indices]
        scores = retrieval.score_retrieval(found, labels, labels, 5, mAP=retrieval.average_precision(x, labels, x, labels))
        picture = plotting.tile(valid.pixels[:5])
        precision = quality.manifold_scores(x[:40], x[40:], 3)
        pixels = oracles.gaussian_pixels_log_prob(train.pixels[:60, :, :4, :4], valid.pixels[:, :, :4, :4])
        return [shapes.pixels, shapes.factors, own.labels, train.labels, valid.pixels, scores, picture.tolist(), precision, pixels]

    torch.manual_seed(0)
    expected = results()
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    try:
        torch.manual_seed(0)
        assert equal(results(), expected)
        model, few = vaelib.conditional_vae((1, 28, 28), 10, (16,), 2), digits[:300]
        assert model.device == GPU
        vaelib.fit(model, few, few[:50], short(), tmp_path / "run")
        vaelib.save(model, tmp_path / "model")
        again = vaelib.load(tmp_path / "model")
        assert again.device.type == "cpu"
        for each in (model, again):
            assert not on_gpu(vaelib.generate(each.given(3), 3, seed=0))
        vaelib.evaluate(model, few, 2)
        for method in retrieval.METHODS[: 1 if importlib.util.find_spec("faiss") is None else None]:
            pixels = torch.cat([few.pixels, few.pixels[:20]])
            index = vaelib.LatentIndex.build(model.given(3), pixels, method=method)
            assert index.search(pixels[:3], 2).indices[:, 0].tolist() == [0, 1, 2]
    finally:
        torch.set_default_device(before)


CONFIGS = {
    "plain": {},
    "iwae": {"objective": "iwae", "num_samples": 3},
    "dreg": {"objective": "dreg", "num_samples": 3},
    "everything": {"flip": True, "ema_decay": 0.9, "channels_last": True, "free_bits": 0.1, "kl_warmup_epochs": 1, "patience": 1},
    "bf16": {"precision": "bf16"},
    "SGD": {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}, "learning_rate": 1e-4},
    "RMSprop": {"optimizer": "RMSprop", "learning_rate": 1e-4},
}
MODELS = {
    "mlp": lambda: vaelib.mlp_vae((1, 28, 28), (16,), 4),
    "conv": lambda: vaelib.conv_vae((1, 28, 28), 4, "discretized_logistic", channels=(8, 8)),
    "spatial": lambda: vaelib.conv_vae((1, 28, 28), (2, 7, 7), "discretized_logistic_mixture", channels=(8, 8)),
    "gaussian": lambda: vaelib.mlp_vae((1, 28, 28), (16,), 4, {"name": "gaussian", "learned": True}),
    "hierarchical": lambda: vaelib.hierarchical_vae((1, 28, 28), ((4, 1), (4, 1)), 8, 4, 1),
    "two layers": lambda: vaelib.two_layer_vae((1, 28, 28), ((16,), (8,)), (6, 4)),
    "conditional": lambda: vaelib.conditional_vae((1, 28, 28), 10, (16,), 4),
}


def short(**options):
    return vaelib.TrainConfig(**{"epochs": 1, "progress": False, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_fit_trains_on_the_gpu_and_leaves_the_model_there(gpu, digits, name):
    model = MODELS["conv" if name == "everything" else "mlp"]()
    history = vaelib.fit(model, digits[:200], digits[200:260], short(**CONFIGS[name]))
    assert history.device == "cuda:0"
    assert model.device == GPU
    assert all(on_gpu(value) for value in model.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_trained_scored_drawn_from_and_stored(gpu, digits, tmp_path, name):
    few = digits[:150]
    model = MODELS[name]()
    history = vaelib.fit(model, few, few[:50], short(batch_size=30))  # five steps, of which two are replayed
    assert history.not_replayed is None
    assert model.device == GPU
    scores = vaelib.evaluate(model, few[:20], 3, 1)
    assert scores.num_images == 20
    evaluation.annealed_log_likelihood(model, few[:2], 2, 2, leapfrog_steps=1)
    if name == "conditional":
        for labels in (3, few.labels[:4], few.labels[:4].to("cuda")):
            assert not on_gpu(vaelib.generate(model.given(labels), 8, seed=0))
        assert not on_gpu(vaelib.reconstruct(model.given(few.labels[:4]), few.pixels[:4]))
    else:
        assert not on_gpu(vaelib.generate(model, 3, seed=0))
        assert not on_gpu(vaelib.reconstruct(model, few.pixels[:4]))
    vaelib.save(model, tmp_path)
    again = vaelib.load(tmp_path)
    assert again.device.type == "cpu"
    assert vaelib.evaluate(again, few[:20], 3, 1) == scores


def test_a_run_on_the_gpu_resumes_there_and_on_a_cpu(digits, tmp_path):
    def model():
        torch.manual_seed(0)
        return MODELS["mlp"]()

    def run(folder, device, crash=None):
        vae = model()
        if crash:
            observe, calls = vae.likelihood.observe, []

            def fails(*arguments, **named):
                calls.append(1)
                if len(calls) == crash:
                    raise RuntimeError("the power went out")
                return observe(*arguments, **named)

            vae.likelihood.observe = fails
        settings = short(epochs=3, batch_size=64, device=device, ema_decay=0.9)
        vaelib.fit(vae, digits[:256], digits[256:300], settings, folder, resume=True)
        return vae

    with emulated_gpu():
        whole = run(tmp_path / "whole", "cuda")
        for folder in ("gpu", "cpu"):
            with pytest.raises(RuntimeError, match="power"):
                run(tmp_path / folder, "cuda", crash=7)
        again = run(tmp_path / "gpu", "cuda")
        assert all(map(torch.equal, again.parameters(), whole.parameters()))
    assert len(vaelib.training.read_checkpoint(tmp_path / "cpu", {})["history"]) >= 1
    assert run(tmp_path / "cpu", "cpu").device.type == "cpu"


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_an_index_searches_with_a_model_on_the_gpu(gpu, digits, tmp_path, method):
    if method != "exact":
        pytest.importorskip("faiss", reason="the approximate methods are FAISS's")
    model, few = plane().to("cuda"), digits[:300]
    index = vaelib.LatentIndex.build(model, few, method=method)
    expected = index.search(few.pixels[:5], 3)
    index.save(tmp_path / "index")
    assert equal(vaelib.LatentIndex.load(tmp_path / "index").search(few.pixels[:5], 3), expected)
    for queries in (few[:5].to("cuda"), vaelib.posterior_means(model, few[:5]).to("cuda")):
        assert equal(index.search(queries, 3), expected)
    index.to("cuda")
    index.add(few[:10])
    assert len(index) == 310
    assert not any(map(on_gpu, index.search(few.pixels[:5], 3)))


@pytest.mark.parametrize("distance", retrieval.DISTANCES)
def test_neighbours_are_the_same_on_the_gpu(digits, distance):
    codes = evaluation.posteriors(plane(), digits[:400])
    queries = retrieval.at(codes, slice(20))
    expected = vaelib.nearest_neighbours(queries, codes, 5, distance)
    with emulated_gpu():
        moved = vaelib.Posterior(*(part.to("cuda") for part in codes))
        assert equal(vaelib.nearest_neighbours(queries, moved, 5, distance), expected)


def test_retrieval_is_scored_with_labels_of_either_device():
    x, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4

    def scored():
        found = labels[retrieval.nearest_neighbours(x, x, 5).indices]
        at = (lambda t: t.to("cuda")) if torch.cuda.is_available() else (lambda t: t)
        votes = retrieval.knn_accuracy(at(found), at(labels)), retrieval.recall_at_k(at(found), at(labels), at(labels))
        return [score.cpu() for score in (*votes, retrieval.average_precision(x, at(labels), at(x), at(labels)))]

    expected = scored()
    with emulated_gpu():
        assert all(torch.equal(one, other) for one, other in zip(scored(), expected, strict=True))


def test_scores_of_samples_take_images_from_either_device(gpu, digits):
    model, net = plane().to("cuda"), quality.mnist_features().to("cuda")
    fake = vaelib.generate(model, 40, seed=0)
    features = [quality.features_of(net, images) for images in (digits[:40], digits[:40].to("cuda"), fake)]
    assert torch.equal(*features[:2])
    assert not any(map(on_gpu, features))
    quality.manifold_scores(*features[1:], k=2)
    assert quality.frechet_distance(features[0].to("cuda"), features[2]) > 0
    assert equal(
        quality.nearest_training_images(fake.to("cuda"), digits.pixels[:50]), quality.nearest_training_images(fake, digits[:50])
    )


def test_checks_judge_functions_while_there_is_a_gpu(gpu):
    assert vaelib.checks.check_kl(vaelib.gaussian_kl)
    model = plane().to("cuda")
    vaelib.checks.check_encoder_decoder(model.encoder, model.decoder, (1, 28, 28), 2)
    assert model.device == GPU


def test_a_row_of_the_papers_table_is_made_on_the_gpu(gpu, digits):
    budget = Budget({1: 1, 5: 1}, num_samples=5)
    model, row = iwae_row(digits[:200], digits[200:230], 2, "iwae", 5, budget, progress=False)
    assert row["device"] == "cuda:0"
    assert model.device == GPU


def test_the_command_line_works_on_the_gpu(gpu, tmp_path):
    run, index, picture = (str(tmp_path / name) for name in ("run", "digits.index", "a.png"))
    for command in (
        [
            "train",
            "--data",
            "digits",
            "--model",
            "mlp",
            "--hidden",
            "16",
            "--latent-dim",
            "2",
            "--epochs",
            "1",
            "--out",
            run,
            "--json",
        ],
        ["evaluate", run, "--num-samples", "2", "--json"],
        ["sample", run, "--out", picture, "--grid", "2x2", "--prior", "mixture"],
        ["index", run, "--data", "digits", "--out", index],
        ["search", index, "--query-index", "3", "-k", "2", "--out", picture],
    ):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, (done.output, done.exception)
        if command[0] == "train":
            assert json.loads(done.stdout)["device"] == "cuda:0"


def test_figures_and_exact_models_take_tensors_of_the_gpu(gpu, digits):
    on = digits[:30].to("cuda")
    plotting.show_images(on.pixels[:4])
    plotting.latent_scatter(vaelib.posterior_means(plane(), on), on.labels, on.classes)
    plotting.latent_scatter(vaelib.posterior_means(plane(), on).to("cuda"), on.labels, on.classes)
    oracle = LinearGaussian(torch.randn(6, 2).to("cuda"), torch.zeros(6, device="cuda"), 0.5)
    x = oracle.sample(5)
    assert oracle.log_evidence(x).device == GPU
    assert oracle.posterior(x).covariance.device == GPU
    train, test = digits.pixels[:60, :, :4, :4], digits.pixels[60:70, :, :4, :4]
    assert torch.equal(gaussian_pixels_log_prob(train.to("cuda"), test), gaussian_pixels_log_prob(train, test))


def test_x_on_another_device_than_the_model_is_refused_in_words(gpu, digits):
    model = plane().to("cuda")
    with pytest.raises(ValueError, match="x: got torch.float32 on cpu, expected torch.float32 on cuda:0"):
        model.elbo(model.likelihood.observe(digits.pixels[:3]))
    assert model.elbo(model.likelihood.observe(digits.pixels[:3].to(model.device))).elbo.device == GPU
