"""Samples, reconstructions and interpolations: pixels in, pixels out, and the same seed gives the same images."""

import pytest
import torch

import vaelib
from vaelib import generate, interpolate, latent_grid, mlp_vae, reconstruct
from vaelib.plotting import latent_scatter, show_images, tile, training_curves


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (128,), 2)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=40, batch_size=50, learning_rate=5e-3, progress=False, device="cpu"))
    return model


def test_generate_decodes_draws_of_the_prior(trained):
    pixels = generate(trained, 5, seed=3)
    assert pixels.shape == (5, 1, 28, 28)
    assert pixels.dtype == torch.uint8
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(3))
    expected = trained.decode(z).sigmoid().mul(255).round().to(torch.uint8)
    assert torch.equal(pixels, expected)
    assert torch.equal(generate(trained, 5, seed=3), pixels)
    assert not torch.equal(generate(trained, 5, seed=4), pixels)
    assert not torch.equal(generate(trained, 5), generate(trained, 5))


def test_temperature_zero_gives_the_decoded_mean_of_the_prior(trained):
    cold = generate(trained, 3, temperature=0.0)
    assert torch.equal(cold, cold[:1].expand_as(cold))
    hot = generate(trained, 50, temperature=1.0, seed=0).float()
    assert hot.std(0).mean() > generate(trained, 50, temperature=0.3, seed=0).float().std(0).mean()


def test_reconstructions_are_close_deterministic_and_in_order(trained, digits):
    images = digits.pixels[:60]
    again = reconstruct(trained, images)
    assert again.shape == images.shape
    assert again.dtype == torch.uint8
    assert torch.equal(again, reconstruct(trained, images))
    assert torch.equal(again[7:9], reconstruct(trained, images[7:9]))
    error = (again.float() - images.float()).abs().mean((1, 2, 3))
    shuffled = (again.float() - images.roll(1, 0).float()).abs().mean((1, 2, 3))
    assert error.mean() < 0.8 * shuffled.mean()


def test_interpolation_runs_from_one_reconstruction_to_the_other(trained, digits):
    a, b = digits.pixels[0], digits.pixels[1]
    path = interpolate(trained, a, b, steps=7)
    assert path.shape == (7, 1, 28, 28)
    ends = reconstruct(trained, digits.pixels[:2])
    assert (path[[0, -1]].int() - ends.int()).abs().max() <= 1
    assert torch.equal(interpolate(trained, a[None], b[None], steps=7), path)


def test_the_latent_grid_is_the_decoded_plane_in_equal_steps_of_probability(trained):
    grid = latent_grid(trained, side=3, tail=0.1)
    assert grid.shape == (9, 1, 28, 28)
    q = torch.special.ndtri(torch.tensor(0.9)).item()
    for place, z in ((0, (-q, q)), (2, (q, q)), (4, (0.0, 0.0)), (6, (-q, -q))):
        expected = trained.decode(torch.tensor([z])).sigmoid().mul(255).round()
        assert (grid[place].float() - expected[0]).abs().max() <= 1


def test_bad_arguments_are_refused(trained, digits, small_vae):
    for call, message in [
        (lambda: generate(trained, 0), "num_images: got int 0"),
        (lambda: generate(trained, 3, temperature=-0.5), "temperature: got float -0.5, expected a finite number of at least 0"),
        (lambda: generate(trained, 3, seed=-1), "seed: got int -1"),
        (lambda: reconstruct(trained, digits.pixels[:0]), "pixels: got an empty set"),
        (lambda: reconstruct(trained, digits.pixels.float()), "pixels: got a float32 tensor"),
        (lambda: interpolate(trained, digits.pixels[0], digits.pixels[1], steps=1), "steps: got int 1"),
        (lambda: interpolate(trained, digits.pixels[:2], digits.pixels[1]), "a: got 2 images, expected one"),
        (lambda: interpolate(trained, digits.pixels[0], digits.pixels[0, :, :14]), r"b: got images of shape \(1, 14, 28\)"),
        (lambda: latent_grid(small_vae), "model: got latent_dim 4, expected 2"),
        (lambda: latent_grid(trained, side=1), "side: got int 1"),
        (lambda: latent_grid(trained, tail=0.0), "tail: got float 0.0, expected a finite number above 0"),
        (lambda: latent_grid(trained, tail=0.5), "tail: got 0.5, expected a probability below 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_tiles_stand_row_by_row_with_a_gap():
    pixels = torch.arange(1, 6, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    sheet = tile(pixels, columns=3)
    assert sheet.shape == (5, 8)
    assert sheet[0].tolist() == [1, 1, 255, 2, 2, 255, 3, 3]
    assert sheet[3].tolist() == [4, 4, 255, 5, 5, 255, 255, 255]
    assert tile(torch.zeros(4, 3, 2, 2, dtype=torch.uint8)).shape == (5, 5, 3)


def test_figures_hold_what_their_axes_say(trained, digits):
    history = [
        {"epoch": e, **{f"{p}_{t}": e * 1.0 for p in ("train", "valid") for t in ("elbo", "log_likelihood", "kl")}}
        for e in (1, 2, 3)
    ]
    axes = training_curves(history, skip=1).axes
    assert [ax.get_title() for ax in axes] == ["ELBO", "E[log p(x given z)]", "KL to the prior"]
    assert [line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else line.get_xdata() for line in axes[0].lines] == [
        [2, 3]
    ] * 2
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["training", "held out"]
    ax = show_images(digits.pixels[:6], columns=3, row_labels=["data", "model"]).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["data", "model"]
    codes = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))
    ax = latent_scatter(codes, digits.labels, digits.classes).axes[0]
    assert sorted(text.get_text() for text in ax.texts) == list("0123456789")


def test_figures_of_the_library_show_at_the_end_of_every_notebook_cell():
    import nbformat
    from nbclient import NotebookClient

    first = "import torch, vaelib; pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)"
    cells = [first, *["vaelib.plotting.show_images(pixels);"] * 3]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, kernel_name="python3").execute()
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in notebook.cells]
    assert shown == [0, 1, 1, 1]


def test_the_style_of_one_figure_leaves_the_reader_s_settings_alone():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    tile_figure = show_images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    plt.close(tile_figure)
    assert dict(plt.rcParams) == before
