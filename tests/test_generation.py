"""Samples, reconstructions and interpolations: pixels in, pixels out, and the same seed gives the same images."""

import pytest
import torch

import vaelib
import vaelib.conditional
from vaelib import generate, interpolate, latent_grid, mlp_vae, noise, reconstruct
from vaelib.book.plotting import latent_scatter, show_images, tile, training_curves
from vaelib.generation import attribute_vector, class_means, most_used_units, shift, traverse


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (128,), 2)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=20, batch_size=50, learning_rate=5e-3, progress=False, device="cpu"))
    return model


def test_generate_decodes_draws_of_the_prior(trained):
    pixels = generate(trained, 5, seed=3)
    assert pixels.shape == (5, 1, 28, 28)
    assert pixels.dtype == torch.uint8
    generator = torch.Generator().manual_seed(3)
    z = torch.stack([torch.randn(2, generator=generator) for _ in range(5)])
    expected = trained.decode(z).sigmoid().mul(255).round().to(torch.uint8)
    assert torch.equal(pixels, expected)
    assert torch.equal(generate(trained, 5, seed=3), pixels)
    assert not torch.equal(generate(trained, 5, seed=4), pixels)
    assert not torch.equal(generate(trained, 5), generate(trained, 5))


@pytest.mark.parametrize("width", [1, 2, 7, 16, 20, 33])
def test_the_noise_of_a_sample_does_not_depend_on_how_many_are_drawn(width):
    rows = {num: noise.normal_rows(num, width, torch.Generator().manual_seed(5)) for num in (1, 3, 8, 64)}
    for num, drawn in rows.items():
        assert torch.equal(drawn, rows[64][:num])
    many = noise.normal_rows(40_000, width, torch.Generator().manual_seed(0)).double()
    assert (many.mean(0).abs() < 5 / 200).all()
    assert (torch.cov(many.T).view(width, width) - torch.eye(width)).abs().max() < 7 / 200  # sqrt(2) / 200 on the diagonal


SAMPLERS = {
    "two latents": lambda: mlp_vae((1, 8, 8), (16,), 2),
    "twenty latents": lambda: mlp_vae((1, 8, 8), (16,), 20),
    "two layers": lambda: vaelib.two_layer_vae((1, 8, 8), ((16, 16), (8, 8)), (3, 2)),
    "hierarchical": lambda: vaelib.hierarchical_vae(
        (1, 8, 8), ((2, 1), (1, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli"
    ),
    "conditional": lambda: vaelib.conditional.conditional_vae((1, 8, 8), 3, (16,), 2).given(1),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_image_i_of_a_seed_is_the_same_whatever_the_number_of_images(kind):
    torch.manual_seed(0)
    model = SAMPLERS[kind]()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    many = generate(model, 64, seed=0)
    assert (many[0].int() - many[1].int()).abs().max() > 20
    for num in (1, 4, 7, 33):
        assert (generate(model, num, seed=0).int() - many[:num].int()).abs().max() <= 1  # up to rounding


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


@pytest.fixture
def codes(monkeypatch):
    """`interpolate` and the like give their codes instead of what these decode to."""
    monkeypatch.setattr(vaelib.generation, "decode_pixels", lambda model, z: z)


@pytest.mark.equation("slerp")
def test_a_spherical_path_turns_at_constant_speed_and_its_length_goes_linearly(small_vae, digits, codes):
    a, b = digits.pixels[0], digits.pixels[1]
    start, end = vaelib.posterior_means(small_vae, digits.pixels[:2])
    path = interpolate(small_vae, a, b, steps=6, kind="spherical")
    torch.testing.assert_close(path[[0, -1]], torch.stack([start, end]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.norm(dim=1), torch.linspace(start.norm(), end.norm(), 6), rtol=1e-5, atol=1e-6)
    directions = torch.nn.functional.normalize(path.double(), dim=1)
    steps = (directions[1:] * directions[:-1]).sum(1).arccos()
    torch.testing.assert_close(steps, steps.mean().expand(5), rtol=1e-4, atol=1e-5)
    from scipy.spatial import geometric_slerp

    expected = geometric_slerp(directions[0].numpy(), directions[-1].numpy(), torch.linspace(0, 1, 6).numpy(), tol=1e-6)
    torch.testing.assert_close(directions, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    line = interpolate(small_vae, a, b, steps=6)
    torch.testing.assert_close(line, torch.lerp(start, end, torch.linspace(0, 1, 6)[:, None]), rtol=1e-5, atol=1e-6)
    assert (line[2] - path[2]).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_a_spherical_path_between_codes_on_one_line_through_0_is_straight(small_vae, digits, monkeypatch, codes, factor):
    code = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    ends = iter([code, factor * code])
    monkeypatch.setattr(vaelib.generation, "posterior_means", lambda model, image, seed: next(ends))
    path = interpolate(small_vae, digits.pixels[0], digits.pixels[1], steps=5, kind="spherical")
    assert torch.equal(path, torch.lerp(code, factor * code, torch.linspace(0, 1, 5)[:, None]))


def test_images_are_decoded_in_chunks_of_bounded_size(trained, digits, monkeypatch):
    whole = generate(trained, 20, seed=0)
    met = []
    decode = type(trained).decode
    monkeypatch.setattr(type(trained), "decode", lambda self, z: met.append(len(z)) or decode(self, z))
    monkeypatch.setattr(vaelib.generation, "CHUNK", 6)
    assert (generate(trained, 20, seed=0).int() - whole.int()).abs().max() <= 1
    assert met == [6, 6, 6, 2]
    met.clear()
    assert len(reconstruct(trained, digits.pixels[:13])) == 13
    assert met == [6, 6, 1]


def test_chunks_keep_each_code_with_its_label(digits, monkeypatch):
    torch.manual_seed(0)
    model = vaelib.conditional.conditional_vae((1, 28, 28), 10, (16,), 2).given(torch.arange(4))
    whole = generate(model, 8, seed=0)
    for chunk in (1, 3, 5):
        monkeypatch.setattr(vaelib.generation, "CHUNK", chunk)
        assert (generate(model, 8, seed=0).int() - whole.int()).abs().max() <= 1


def test_a_hierarchical_model_generates_the_same_in_chunks(monkeypatch):
    torch.manual_seed(0)
    model = vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (1, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli")
    whole = generate(model, 7, seed=0)
    monkeypatch.setattr(vaelib.generation, "CHUNK", 3)
    assert (generate(model, 7, seed=0).int() - whole.int()).abs().max() <= 1


def test_the_most_used_units_come_in_order_of_their_kl(small_vae, digits):
    with torch.no_grad():
        small_vae.encoder.head.weight[1] = 0  # unit 1 keeps its mean and its variance: it says nothing of the image
        small_vae.encoder.head.weight[5] = 0
        small_vae.encoder.head.bias[[1, 5]] = 0
    units = most_used_units(small_vae, digits[:100], 4)
    kl = vaelib.kl_per_unit(small_vae, digits[:100])[units]
    assert sorted(units.tolist()) == [0, 1, 2, 3]
    assert kl.tolist() == sorted(kl.tolist(), reverse=True)
    assert units[-1] == 1
    assert torch.equal(most_used_units(small_vae, digits[:100], 2), units[:2])


def test_a_traversal_moves_one_unit_at_a_time_and_leaves_the_others_at_the_image_s_code(small_vae, digits, monkeypatch):
    image, units, values = digits.pixels[3], [2, 0], [-2.0, 0.0, 1.5]
    frames = traverse(small_vae, image, units, values)
    assert frames.shape == (2, 3, 1, 28, 28)
    mean = vaelib.posterior_means(small_vae, image[None])
    for row, unit in enumerate(units):
        for column, value in enumerate(values):
            z = mean.clone()
            z[0, unit] = value
            expected = small_vae.decode(z).sigmoid().mul(255).round()[0]
            assert (frames[row, column].float() - expected).abs().max() <= 1
    assert torch.equal(traverse(small_vae, image[None], torch.tensor(units), torch.tensor(values)), frames)
    still = traverse(small_vae, image, [1], [mean[0, 1].item()])
    assert (still[0].int() - reconstruct(small_vae, image[None]).int()).abs().max() <= 1


def test_class_means_are_the_averages_of_each_label_s_codes(trained, digits):
    means = class_means(trained, digits)
    codes = vaelib.posterior_means(trained, digits)
    assert means.shape == (10, 2)
    for label in range(10):
        torch.testing.assert_close(means[label], codes[digits.labels == label].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.equation("attribute-vector")
def test_an_attribute_vector_leads_from_images_without_to_images_with(trained, digits):
    images = digits[(digits.labels == 0) | (digits.labels == 1)]
    has = images.labels == 1
    vector = attribute_vector(trained, images, has)
    means = class_means(trained, digits)
    torch.testing.assert_close(vector, means[1] - means[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attribute_vector(trained, images.pixels, ~has), -vector)
    zeros = images.pixels[~has][:60]
    moved = shift(trained, zeros, vector)
    z = vaelib.posterior_means(trained, zeros) + vector
    assert (moved.float() - trained.decode(z).sigmoid().mul(255).round()).abs().max() <= 1
    assert (shift(trained, zeros, vector, 0.0).int() - reconstruct(trained, zeros).int()).abs().max() <= 1
    ones = images.pixels[has].float().mean(0)
    distance = [(frames.float().mean(0) - ones).square().mean() for frames in (reconstruct(trained, zeros), moved)]
    assert distance[1] < distance[0]


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
        (lambda: interpolate(trained, digits.pixels[0], digits.pixels[1], kind="sperical"), "did you mean 'spherical'"),
        (lambda: most_used_units(trained, digits, 3), "count: got 3, expected at most the model's 2 latent dimensions"),
        (lambda: most_used_units(trained, digits, 0), "count: got int 0"),
        (lambda: traverse(trained, digits.pixels[0], [2], [0.0]), r"units: got \[2\], expected latent dimensions, whole numbers"),
        (lambda: traverse(trained, digits.pixels[0], [], [0.0]), r"units: got \[\]"),
        (lambda: traverse(trained, digits.pixels[0], [0.5], [0.0]), r"units: got \[0.5\]"),
        (lambda: traverse(trained, digits.pixels[0], [0], []), r"values: got \[\], expected a sequence of finite numbers"),
        (lambda: traverse(trained, digits.pixels[0], [0], [float("nan")]), r"values: got \[nan\]"),
        (lambda: traverse(trained, digits.pixels[:2], [0], [1.0]), "image: got 2 images, expected one"),
        (lambda: class_means(trained, digits[digits.labels != 3]), "images: got no image of 3, expected some of each class"),
        (lambda: attribute_vector(trained, digits, digits.labels >= 0), "has: got 1500 of 1500 images, expected some with"),
        (lambda: attribute_vector(trained, digits, digits.labels < 0), "has: got 0 of 1500 images"),
        (lambda: attribute_vector(trained, digits, digits.labels[:9] > 3), r"has: got a bool tensor of shape \(9,\), expected"),
        (lambda: attribute_vector(trained, digits, digits.labels), "has: got a int64 tensor"),
        (lambda: shift(trained, digits.pixels, torch.zeros(3)), r"vector: got a float32 tensor of shape \(3,\), expected"),
        (lambda: shift(trained, digits.pixels, torch.zeros(2), float("inf")), "scale: got inf, expected a finite number"),
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


def test_names_of_classes_with_nearly_the_same_median_stand_apart():
    labels = torch.arange(10).repeat(50)
    codes = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 0.01 * labels[:, None]
    ax = latent_scatter(codes, labels, [str(label) for label in range(10)]).axes[0]
    places = torch.tensor([text.get_position() for text in ax.texts])
    span = (codes.amax(0) - codes.amin(0)).max().item()
    assert torch.pdist(places).min() > 0.069 * span


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
