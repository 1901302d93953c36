"""Figures to touch, driven in a real browser: what the page draws is what the model decodes, and nothing leaves the page."""

import base64
import io
import math
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image

import vaelib
from vaelib.book import widgets
from vaelib.generation import decode_pixels

ALT = "A figure of the tests: what it shows is said here."
LEVELS = 4  # int8 weights: how far a pixel may be from the model's, of 255
READ = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 === 0)"


@pytest.fixture(scope="module")
def plane(digits):
    """A model of the digits with a 2-D latent space."""
    return fitted(digits, 2)


@pytest.fixture(scope="module")
def deep(digits):
    """A model of the digits with 20 latent dimensions."""
    return fitted(digits, 20)


def fitted(digits, latent_dim):
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (256,), latent_dim)
    config = vaelib.TrainConfig(epochs=5, batch_size=50, learning_rate=3e-3, progress=False, device="cpu")
    vaelib.fit(model, digits, config=config)
    return model


@pytest.fixture(scope="module")
def neighbours(digits):
    """For six queries their four neighbours among later digits, under two distances."""
    x = digits.pixels.flatten(1).float()
    return {
        name: torch.cdist(x[:6], x[6:300], p=p).topk(4, largest=False).indices
        for name, p in (("Euclidean", 2.0), ("Manhattan", 1.0))
    }


@pytest.fixture(scope="module")
def figures(plane, deep, digits, neighbours):
    """Each kind of figure once, at the sizes of the book."""
    codes = vaelib.posterior_means(plane, digits)
    labels = {"query_labels": digits.labels[:6], "gallery_labels": digits.labels[6:300], "classes": digits.classes}
    return {
        "explorer": widgets.latent_explorer(plane, "caption", ALT, codes=codes, labels=digits.labels, classes=digits.classes),
        "map": widgets.latent_explorer(plane, "caption", ALT),
        "interpolation": widgets.interpolation_slider(deep, digits.pixels[:10], "caption", ALT),
        "traversal": widgets.traversal_sliders(deep, digits.pixels[0], [3, 1, 4, 15, 9, 2], "caption", ALT),
        "retrieval": widgets.retrieval_browser(digits.pixels[:6], digits.pixels[6:300], neighbours, "caption", ALT, **labels),
    }


@pytest.fixture
def shown(browser):
    """Open a page that embeds a figure: (page, frame). The test fails where a page asks another host or its console complains."""
    pages, complaints, contexts = {}, [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path, "").encode()
            self.send_response(200 if body else 204)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home = f"http://127.0.0.1:{server.server_port}/"

    def guard(route):
        if route.request.url.startswith(home):
            route.continue_()
        else:
            complaints.append(route.request.url[:80])
            route.abort()

    def open_page(widget, width=1280, **options):
        path = f"page{len(pages)}"
        pages["/" + path] = (
            "<!doctype html><html lang='en'><head><meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>A chapter</title></head><body style='margin: 20px'>{widget.html}</body></html>"
        )
        context = browser.new_context(viewport={"width": width, "height": 1000}, **options)
        contexts.append(context)
        context.route("**/*", guard)
        page = context.new_page()
        # what the browser says of this file's own reading of the canvases is no complaint
        page.on("console", lambda message: "willReadFrequently" in message.text or complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(home + path)
        frame = page.locator("iframe").element_handle().content_frame()
        frame.wait_for_selector("main canvas")
        return page, frame

    yield open_page
    for context in contexts:
        context.close()
    server.shutdown()
    thread.join()
    server.server_close()
    assert complaints == []


def pixels(frame, selector="main > .picture"):
    """The levels that a canvas shows, (H, W)."""
    return torch.tensor(frame.eval_on_selector(selector, READ)).view(28, 28)


def difference(frame, model, z, selector="main > .picture"):
    """How far a canvas is from what the model decodes at z, in levels."""
    return (pixels(frame, selector) - decode_pixels(model, z)[0, 0].int()).abs().max().item()


def z_of(frame):
    """The code that the explorer's readout names."""
    numbers = re.findall(r"[−\d.]+", frame.inner_text("output"))
    return torch.tensor([[float(number.replace("−", "-")) for number in numbers]])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", "silu"])
def test_the_page_decodes_what_the_model_decodes_for_each_activation(activation, shown):
    torch.manual_seed(1)
    model = vaelib.mlp_vae((1, 28, 28), (8, 6), 2, activation=activation)
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.mul_(4)
    _, frame = shown(widgets.latent_explorer(model, "caption", ALT))
    assert difference(frame, model, torch.zeros(1, 2)) <= 1  # float32 on both sides: one level of rounding
    frame.locator(".plane").press("Shift+ArrowRight")
    frame.locator(".plane").press("ArrowUp")
    assert difference(frame, model, torch.tensor([[0.5, 0.05]])) <= 1
    assert decode_pixels(model, torch.tensor([[0.0, 0.0], [0.5, 0.05]])).float().std(0).max() > 5  # the two pictures differ


def test_images_of_three_colours_and_unequal_sides_are_drawn_as_the_model_decodes_them(shown):
    torch.manual_seed(2)
    model = vaelib.mlp_vae((3, 6, 5), (8,), 2)
    with torch.no_grad():
        model.decoder.head.bias.normal_()
    _, frame = shown(widgets.latent_explorer(model, "caption", ALT))
    drawn = frame.eval_on_selector("main > .picture", READ.replace(".filter((_, i) => i % 4 === 0)", ""))
    expected = decode_pixels(model, torch.zeros(1, 2))[0].int()
    assert (torch.tensor(drawn).view(6, 5, 4).permute(2, 0, 1)[:3] - expected).abs().max() <= 1


def test_pointer_and_keys_move_over_the_latent_plane(figures, plane, shown):
    page, frame = shown(figures["explorer"])
    assert difference(frame, plane, torch.zeros(1, 2)) <= LEVELS
    box = frame.locator(".plane").bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.9 * box["height"])
    assert (z_of(frame) - torch.tensor([[-1.5, -2.0]])).abs().max() < 0.02
    assert difference(frame, plane, torch.tensor([[-1.5, -2.0]])) <= LEVELS
    marker = frame.locator(".marker").bounding_box()
    assert abs(marker["x"] + marker["width"] / 2 - box["x"] - 0.2 * box["width"]) < 2
    assert abs(marker["y"] + marker["height"] / 2 - box["y"] - 0.9 * box["height"]) < 2
    before = pixels(frame)
    page.mouse.move(10, 990)  # away from the plane: the picture stays
    frame.locator(".plane").press("Home")
    frame.locator(".plane").press("Shift+ArrowUp")
    assert torch.equal(z_of(frame), torch.tensor([[0.0, 0.5]]))
    assert not torch.equal(pixels(frame), before)
    for _ in range(6):
        frame.locator(".plane").press("Shift+ArrowLeft")
    assert torch.equal(z_of(frame), torch.tensor([[-2.5, 0.5]]))  # stops at the edge


def test_a_finger_moves_over_the_latent_plane_on_a_phone(figures, plane, shown):
    page, frame = shown(figures["explorer"], width=390, has_touch=True, is_mobile=True)
    box = frame.locator(".plane").bounding_box()
    page.touchscreen.tap(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"])
    assert (z_of(frame) - 1.0).abs().max() < 0.03
    assert difference(frame, plane, z_of(frame)) <= LEVELS


def test_any_two_images_are_joined_by_a_path_of_decoded_codes(figures, deep, digits, shown):
    _, frame = shown(figures["interpolation"])
    means = vaelib.posterior_means(deep, digits.pixels[:10])
    assert difference(frame, deep, means[:1]) <= LEVELS
    frame.check("input[name=end0][value='3']", force=True)
    frame.focus("input[name=end1][value='1']")
    frame.press("input[name=end1][value='1']", "ArrowRight")
    assert "4th image to 3rd" in frame.inner_text("output")
    frame.fill("input[type=range]", "0.25")
    assert difference(frame, deep, torch.lerp(means[3:4], means[2:3], 0.25)) <= LEVELS
    path = vaelib.interpolate(deep, digits.pixels[3], digits.pixels[2], steps=11)
    assert (pixels(frame, ".strip canvas:nth-child(6)") - path[5, 0].int()).abs().max() <= LEVELS
    frame.press("input[type=range]", "ArrowRight")
    assert "t = 0.26" in frame.inner_text("output")
    frame.fill("input[type=range]", "0.5")
    frame.check("input[name=path][value='1']", force=True)
    angle = torch.acos(torch.cosine_similarity(means[3], means[2], dim=0)).item()
    middle = (means[3:4] + means[2:3]) * math.sin(angle / 2) / math.sin(angle)
    assert difference(frame, deep, middle) <= LEVELS


def test_sliders_traverse_single_latent_dimensions_and_reset(figures, deep, digits, shown):
    _, frame = shown(figures["traversal"])
    code = vaelib.posterior_means(deep, digits.pixels[:1])
    assert difference(frame, deep, code) <= LEVELS
    assert torch.equal(pixels(frame, ".start canvas"), digits.pixels[0, 0].int())
    start = pixels(frame)
    frame.fill("input[aria-label='z[15]']", "-2")
    frame.fill("input[aria-label='z[3]']", "1.5")
    moved = code.clone()
    moved[0, 15], moved[0, 3] = -2, 1.5
    assert difference(frame, deep, moved) <= LEVELS
    assert frame.get_attribute("input[aria-label='z[15]']", "aria-valuetext") == "z[15] = −2.00"
    frame.press("input[aria-label='z[15]']", "ArrowRight")
    assert frame.get_attribute("input[aria-label='z[15]']", "aria-valuetext") != "z[15] = −2.00"
    frame.click("button")
    assert torch.equal(pixels(frame), start)


def test_the_retrieval_browser_shows_each_query_s_neighbours_and_marks_other_labels(figures, digits, neighbours, shown):
    _, frame = shown(figures["retrieval"])
    gallery, labels = digits.pixels[6:300], digits.labels[6:300]

    def check(query, distance):
        found = neighbours[distance][query]
        for rank, i in enumerate(found.tolist()):
            item = f".neighbours li:nth-child({rank + 1})"
            assert torch.equal(pixels(frame, f"{item} canvas"), gallery[i, 0].int())
            differs = labels[i] != digits.labels[query]
            assert frame.inner_text(item).strip() == ("✗ " if differs else "") + digits.classes[labels[i]]
            style = frame.eval_on_selector(f"{item} canvas", "canvas => getComputedStyle(canvas).outlineStyle")
            assert (style == "dashed") == differs
        same = int((labels[found] == digits.labels[query]).sum())
        assert frame.inner_text("output").startswith(f"Query {query + 1}: {digits.labels[query]}. {same} of 4 neighbours")

    check(0, "Euclidean")
    frame.press("input[name=query][value='0']", "ArrowRight")
    check(1, "Euclidean")
    frame.check("input[name=query][value='5']", force=True)
    frame.get_by_label("Manhattan").check(force=True)
    check(5, "Manhattan")
    marked = sum((labels[found] != digits.labels[:6, None]).sum() for found in neighbours.values())
    assert marked > 0  # there was something to mark


@pytest.mark.parametrize("kind", ["explorer", "map", "interpolation", "traversal", "retrieval"])
def test_a_figure_fits_its_frame_on_a_phone_and_on_a_desk(kind, figures, shown):
    for width in (320, 390, 600, 1280):
        page, frame = shown(figures[kind], width=width)
        page.evaluate("scrollTo(2000, 0)")
        assert page.evaluate("scrollX") == 0
        box = frame.evaluate(
            """() => { const root = document.documentElement, main = document.querySelector("main").getBoundingClientRect();
            return {across: root.scrollWidth - root.clientWidth, down: root.scrollHeight - root.clientHeight,
                    rest: root.clientHeight - main.bottom}; }"""
        )
        assert box["across"] == 0, (width, box)
        assert box["down"] == 0, (width, box)
        assert box["rest"] < 100, (width, box)  # no large hole under the figure


@pytest.mark.parametrize("kind", ["explorer", "interpolation", "traversal", "retrieval"])
def test_every_control_has_a_name_and_a_sensible_size(kind, figures, shown):
    _, frame = shown(figures[kind], width=390)
    for control in frame.query_selector_all("input, button, [tabindex]"):
        name = control.evaluate(
            "node => node.ariaLabel || node.innerText || node.closest('label').innerText || node.nextSibling.ariaLabel"
        )
        assert len(name.strip()) >= 1
        box = control.bounding_box()
        assert min(box["width"], box["height"]) >= 24
    assert frame.locator("output").count() == 1  # one live region that says what is shown
    assert frame.locator("output").inner_text() != ""


def test_in_print_the_still_picture_stands_in_for_the_frame_and_dark_pages_get_a_dark_card(figures, shown):
    page, frame = shown(figures["traversal"], color_scheme="dark")
    assert frame.eval_on_selector("body", "body => getComputedStyle(body).backgroundColor") == "rgb(23, 25, 29)"
    assert page.locator("iframe").is_visible()
    assert not page.locator(".still").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("iframe").is_visible()
    assert page.locator(".still").is_visible()


def test_names_can_break_neither_the_page_nor_its_script(digits, neighbours, shown):
    classes = ["</script><script>alert(1)</script>", *"\"&<b>'"]
    classes += digits.classes[len(classes) :]
    text = 'It\'s "<b>bold</b>" & </script> @@data@@'
    widget = widgets.retrieval_browser(
        digits.pixels[:6], digits.pixels[6:300], neighbours, text, text, digits.labels[:6], digits.labels[6:300], classes
    )
    page, frame = shown(widget)
    assert page.locator("figcaption").inner_text() == text
    assert page.get_attribute("iframe", "title") == text
    assert classes[digits.labels[0]] in frame.inner_text("output")
    assert frame.locator("script").count() == 1


def test_a_figure_is_one_sandboxed_page_of_at_most_400_kb_that_comes_out_the_same_each_time(figures, plane, deep, digits):
    for kind, widget in figures.items():
        assert len(widget.html.encode()) <= 400_000, kind
        soup = BeautifulSoup(widget.html, "html.parser")
        frame = soup.select_one("iframe")
        assert frame["sandbox"] in ("allow-scripts", ["allow-scripts"])
        assert frame["title"] == soup.select_one("img.still")["alt"] == ALT
        page = BeautifulSoup(frame["srcdoc"], "html.parser")
        assert page.html["lang"] == "en"
        assert not page.select("script[src], link, img, iframe")
        assert not re.search(r"https?://|fetch\(|XMLHttp|localStorage|cookie", frame["srcdoc"])
    again = widgets.interpolation_slider(deep, digits.pixels[:10], "caption", ALT)
    assert again.html == figures["interpolation"].html
    assert widgets.latent_explorer(plane, "caption", ALT) == figures["map"]


def test_image_sets_and_what_a_search_found_give_the_figures_of_their_pixels_and_indices(figures, deep, digits, neighbours):
    queries, gallery = digits[:6], digits[6:300]
    labels = {"query_labels": queries.labels, "gallery_labels": gallery.labels, "classes": digits.classes}
    found = {name: vaelib.Neighbours(indices, torch.zeros(6, 4)) for name, indices in neighbours.items()}
    assert widgets.retrieval_browser(queries, gallery, found, "caption", ALT, **labels) == figures["retrieval"]
    assert widgets.interpolation_slider(deep, digits[:10], "caption", ALT) == figures["interpolation"]
    assert widgets.traversal_sliders(deep, digits[:1], [3, 1, 4, 15, 9, 2], "caption", ALT) == figures["traversal"]


def test_a_figure_is_described_in_a_line(figures):
    for widget in figures.values():
        assert repr(widget) == f"Widget({ALT!r}, {len(widget.html.encode()) // 1000} KB)"


def test_a_notebook_gets_the_frame_a_still_picture_and_words(figures):
    for widget in figures.values():
        bundle = widget._repr_mimebundle_()
        assert sorted(bundle) == ["image/png", "text/html", "text/plain"]
        assert bundle["text/html"].startswith("<figure")
        assert bundle["text/plain"] == ALT
        with Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))) as picture:
            assert picture.width > 150
            assert len(set(picture.convert("L").tobytes())) > 5


def test_rounding_keeps_the_outputs_better_than_the_nearest_whole_numbers_do(generator):
    h = torch.randn(500, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    h = (h + 0.1 * torch.randn(500, 64, generator=generator)).relu()
    weight = torch.randn(50, 64, generator=generator)
    whole, scale = widgets.rounded(weight, h)
    assert torch.equal(whole, whole.round())
    assert whole.abs().max() <= 127
    nearest = (weight / scale).round() * scale
    error = (h @ (whole * scale - weight).T).square().mean()
    assert error < 0.25 * (h @ (nearest - weight).T).square().mean()


def test_live_figures_follow_their_sliders(plane, deep, digits):
    pytest.importorskip("ipywidgets")

    def image(box):
        with Image.open(io.BytesIO(box.children[0].value)) as picture:
            return torch.tensor(list(picture.resize((28, 28), Image.Resampling.NEAREST).tobytes())).view(28, 28)

    box = widgets.live_explorer(plane)
    assert torch.equal(image(box), decode_pixels(plane, torch.zeros(1, 2))[0, 0])
    box.children[2].value = -1.5
    assert torch.equal(image(box), decode_pixels(plane, torch.tensor([[0.0, -1.5]]))[0, 0])
    box = widgets.live_interpolation(deep, *digits.pixels[:2])
    box.children[1].value = 0.5
    assert torch.equal(image(box), vaelib.interpolate(deep, *digits.pixels[:2], steps=3)[1, 0])
    box = widgets.live_traversal(deep, digits.pixels[0], [3, 7])
    code = vaelib.posterior_means(deep, digits.pixels[:1])
    assert [slider.description for slider in box.children[1:]] == ["z[3]", "z[7]"]
    assert torch.equal(image(box), decode_pixels(deep, code)[0, 0])
    code[0, 7] = 2.5
    box.children[2].value = 2.5
    assert torch.equal(image(box), decode_pixels(deep, code)[0, 0])


def test_a_live_figure_without_ipywidgets_says_what_is_missing(plane, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="ipywidgets is missing"):
        widgets.live_explorer(plane)


def test_bad_arguments_are_refused(plane, deep, small_vae, digits, neighbours):
    images, labels = digits.pixels, digits.labels
    conv = vaelib.conv_vae((1, 28, 28), 2, "bernoulli", (4, 8))
    gaussian = vaelib.mlp_vae((1, 28, 28), (8,), 2, "gaussian")
    wide = vaelib.mlp_vae((1, 28, 28), (400,), 2)
    two = vaelib.mlp_vae((2, 28, 28), (8,), 2)
    colour = images[:6].expand(-1, 3, -1, -1)
    words = ("caption", ALT)

    def browse(found, queries=images[:6], gallery=images[6:300], **named):
        return widgets.retrieval_browser(queries, gallery, found, *words, **named)

    for call, message in [
        (lambda: widgets.latent_explorer(small_vae, *words), "model: got latent_dim 4, expected 2"),
        (lambda: widgets.live_explorer(small_vae), "model: got latent_dim 4, expected 2"),
        (lambda: widgets.latent_explorer(conv, *words), "model: got decoder ConvDecoder and likelihood Bernoulli"),
        (lambda: widgets.latent_explorer(gaussian, *words), "model: got decoder MLPDecoder and likelihood Gaussian"),
        (lambda: widgets.latent_explorer(two, *words), "model: got images of 2 channels, expected 1 or 3"),
        (lambda: widgets.latent_explorer("model", *words), "model: got decoder NoneType"),
        (lambda: widgets.latent_explorer(wide, *words), r"explorer: got \d+ bytes of HTML, expected at most 400000"),
        (lambda: widgets.latent_explorer(plane, *words, extent=0), "extent: got int 0, expected a finite number above 0"),
        (lambda: widgets.latent_explorer(plane, *words, codes=torch.zeros(5, 3)), r"codes: got .* expected shape \(N, 2\)"),
        (
            lambda: widgets.latent_explorer(plane, *words, codes=torch.zeros(5, 2), labels=labels),
            "labels: got an int64|labels: got a int64",
        ),
        (lambda: widgets.latent_explorer(plane, "", ALT), "caption: got str '', expected a text"),
        (lambda: widgets.latent_explorer(plane, "caption", " "), "alt: got str ' ', expected a text"),
        (lambda: widgets.interpolation_slider(deep, images[:1], *words), "images, steps: got 1 images"),
        (lambda: widgets.interpolation_slider(deep, images[:13], *words), "images, steps: got 13 images"),
        (lambda: widgets.interpolation_slider(deep, images[:3].float(), *words), "got a float32 tensor"),
        (lambda: widgets.interpolation_slider(deep, images[:3], *words, steps=1), "steps: got int 1"),
        (lambda: widgets.interpolation_slider(deep, images[:3], *words, steps=99), "got 3 images and 99 steps"),
        (lambda: widgets.traversal_sliders(deep, images[:2], [1], *words), "image: got 2 images, expected one"),
        (lambda: widgets.traversal_sliders(deep, images[0], [20], *words), r"units: got \[20\], expected 1 to 10 different"),
        (lambda: widgets.traversal_sliders(deep, images[0], [1, 1], *words), r"units: got \[1, 1\]"),
        (lambda: widgets.traversal_sliders(deep, images[0], [], *words), r"units: got \[\]"),
        (lambda: widgets.traversal_sliders(deep, images[0], [1], *words, span=-1), "span: got int -1"),
        (lambda: widgets.live_traversal(deep, images[0], [-1]), r"units: got \[-1\]"),
        (lambda: browse(neighbours, queries=images[:6].float()), "queries: got a float32 tensor"),
        (lambda: browse(neighbours, gallery=images[6:300, :, :14]), r"gallery: got images of shape \(1, 14, 28\)"),
        (lambda: browse(neighbours, queries=colour[:, :2], gallery=colour[:, :2]), "queries: got images of 2 channels"),
        (lambda: browse({}), "neighbours: got dict {}"),
        (lambda: browse({"a": neighbours["Euclidean"][:5]}), r"neighbours\['a'\]: got a int64 tensor of shape \(5, 4\)"),
        (lambda: browse({"a": neighbours["Euclidean"].float()}), r"neighbours\['a'\]: got a float32 tensor"),
        (lambda: browse({"a": neighbours["Euclidean"] + 294}), "expected int64 indices .* from 0 to 293"),
        (lambda: browse({"a": neighbours["Euclidean"] - 294}), "expected int64 indices .* from 0 to 293"),
        (lambda: browse({"a": neighbours["Euclidean"], "b": neighbours["Euclidean"][:, :3]}), r"neighbours\['b'\]: got"),
        (lambda: browse(neighbours, query_labels=labels[:6]), "query_labels, gallery_labels: got one of them"),
        (
            lambda: browse(neighbours, query_labels=labels[:5], gallery_labels=labels[6:300]),
            r"query_labels: got a int64 tensor of shape \(5,\)",
        ),
        (
            lambda: browse(neighbours, query_labels=labels[:6], gallery_labels=labels[6:300], classes="01234"),
            "gallery_labels: got 0 to 9, expected 0 to 4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
