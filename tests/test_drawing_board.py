"""The board to draw on, in a real browser: its numbers are those of the model that the page holds, by pointer, finger and keys."""

import base64
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from test_book import load_script
from test_widgets import ALT, fitted, pixels, shown  # noqa: F401  # shown is a fixture

import vaelib
from vaelib.book import widgets

BOARD = (Path(__file__).parent.parent / "book" / "_static" / "front-board.html").read_text(encoding="utf-8")
SEVEN = [(0.25, 0.25), (0.7, 0.22), (0.45, 0.85)]
SCRIBBLE = [(0.1 + 0.8 * (i % 2), 0.1 + 0.04 * i) for i in range(20)]
front = load_script("front")


class Figure:
    """A figure as the fixture `shown` opens it."""

    html = BOARD


@pytest.fixture(scope="module")
def data():
    return front.page_data(BOARD)


def array(text, dtype):
    return torch.tensor(np.frombuffer(base64.b64decode(text), dtype))


def terms(data, levels):
    """Mean, deviation, rate and distortion of an image (784,) of levels, as the page's numbers give them in float64."""
    model = front.page_model(data).double()
    x = (array(data["noise"], np.uint8) < levels).double().view(1, 1, 28, 28)
    with torch.no_grad():
        mean, log_var = model.encoder(x)
        deviation = (0.5 * log_var).exp()
        z = mean + deviation * array(data["draws"], np.float32).view(-1, 2).double()
        distortion = -model.likelihood.log_prob(x.expand(len(z), -1, -1, -1), model.decoder(z)).mean()
    return mean[0], deviation[0], vaelib.gaussian_kl(mean, log_var).item(), distortion.item()


def read(frame):
    """Mean, deviation, rate, distortion and their sum, as the figure says them once it has settled."""
    for _ in range(20):  # what is said follows what is seen after a pause, which a busy machine draws out
        frame.wait_for_timeout(700)
        numbers = re.findall(r"−?\d+\.\d+", frame.inner_text("output"))
        cells = [float(frame.inner_text(f"td.mine.{name}")) for name in ("rate", "distortion", "sum")]
        found = [float(number.replace("−", "-")) for number in numbers]
        if found[4:] == cells:
            break
    assert found[4:] == cells  # what is said is what is seen
    return torch.tensor(found[:2]), torch.tensor(found[2:4]), *cells


def draw(page, frame, points, steps=8):
    box = frame.locator(".board").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for point in at[1:]:
        page.mouse.move(*point, steps=steps)
    page.mouse.up()


def test_the_board_is_small_lazy_sandboxed_and_described():
    frame, still = (BeautifulSoup(BOARD, "html.parser").select_one(tag) for tag in ("iframe", "img.still"))
    assert len(BOARD.encode()) <= 400_000
    assert frame["loading"] == "lazy"
    assert 'sandbox="allow-scripts"' in BOARD
    assert frame["title"] == still["alt"]
    assert len(frame["title"]) > 40
    assert not re.search(r"https?://|fetch\(|XMLHttp", unescape(frame["srcdoc"]))


def test_the_page_s_numbers_are_those_of_its_model_for_every_stored_digit(data, shown):  # noqa: F811
    _, frame = shown(Figure)
    digits = array(data["digits"], np.uint8).view(-1, 784)
    assert data["names"] == list("0123456789")
    for i, levels in enumerate(digits):
        frame.check(f"input[name=digit][value='{i}']", force=True)
        mean, deviation, rate, distortion, total = read(frame)
        exact = terms(data, levels)
        assert (mean - exact[0]).abs().max() < 0.006  # two decimals
        assert (deviation - exact[1]).abs().max() < 0.006
        assert abs(rate - exact[2]) < 0.06
        assert abs(distortion - exact[3]) < 0.06
        assert abs(total - rate - distortion) < 0.11
        assert torch.equal(
            pixels(frame, ".pair div:first-child canvas"), (array(data["noise"], np.uint8) < levels).view(28, 28) * 255
        )
        decoded = front.page_model(data).decoder(exact[0].float()[None]).sigmoid().view(28, 28)
        assert (pixels(frame, ".pair div:last-child canvas") - 255 * decoded).abs().max() <= 1


def test_rounding_the_weights_moves_the_elbo_of_a_digit_by_a_tenth_of_a_nat():
    record = json.loads((Path(__file__).parent.parent / "results" / "front-board.json").read_text(encoding="utf-8"))
    assert record["metrics"]["page"]["mean_change"] < 0.15
    assert record["metrics"]["page"]["bytes"] == len(BOARD.encode())
    assert not record["commit"].endswith("+changes")


def test_what_a_test_digit_costs_is_what_the_page_s_model_finds(data, real_data):
    test = real_data("mnist", "test")
    found = vaelib.heldout_elbo(front.page_model(data), test, num_samples=10)
    assert abs(found.kl.mean() - data["rate"]) < 0.05
    assert abs(-found.log_likelihood.mean() - data["distortion"]) < 0.1


def test_a_digit_is_drawn_with_the_mouse_taken_back_and_cleared_and_a_scribble_costs_more(data, shown):  # noqa: F811
    page, frame = shown(Figure)
    start = read(frame)
    draw(page, frame, SEVEN)
    seven = read(frame)
    assert seven[4] != start[4]
    assert frame.locator("input[name=digit]:checked").count() == 0
    assert seven[4] < data["rate"] + data["distortion"]
    levels = torch.tensor(frame.evaluate("[...normalized()]")).view(28, 28).float()
    for axis in (0, 1):
        mass = levels.sum(1 - axis)
        assert abs((mass * (torch.arange(28) + 0.5)).sum() / mass.sum() - 14.5) < 0.1  # the centre of mass, where MNIST has it
    assert 19 <= (levels.amax(1) > 0).sum() <= 21  # the box of MNIST
    draw(page, frame, SCRIBBLE, steps=1)
    both = read(frame)
    frame.get_by_role("button", name="Undo").click()
    assert read(frame)[4] == seven[4]
    frame.get_by_role("button", name="Clear").click()
    frame.wait_for_timeout(700)
    assert frame.inner_text("output") == "Draw a digit, or choose one."
    assert frame.inner_text("td.mine.sum") == "–"
    assert pixels(frame, ".pair div:first-child canvas").max() == 0
    draw(page, frame, SCRIBBLE, steps=1)
    assert min(read(frame)[4], both[4]) > max(seven[4], start[4]) + 50
    assert "more than" in frame.inner_text("output")


def test_where_and_how_large_a_digit_is_drawn_makes_no_difference(shown):  # noqa: F811
    page, frame = shown(Figure)
    draw(page, frame, SEVEN)
    large = pixels(frame, ".pair div:first-child canvas")
    frame.get_by_role("button", name="Clear").click()
    draw(page, frame, [(0.05 + 0.5 * x, 0.4 + 0.5 * y) for x, y in SEVEN])
    frame.wait_for_timeout(300)
    assert (pixels(frame, ".pair div:first-child canvas") != large).float().mean() < 0.02


def test_a_finger_draws_on_a_phone(shown):  # noqa: F811
    page, frame = shown(Figure, width=390, has_touch=True, is_mobile=True)
    start = read(frame)
    box = frame.locator(".board").bounding_box()
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    assert read(frame)[4] != start[4]
    assert frame.eval_on_selector(".board", "board => getComputedStyle(board).touchAction") == "none"


def test_the_keyboard_draws_lifts_the_pen_and_takes_a_stroke_back(shown):  # noqa: F811
    _, frame = shown(Figure)
    board = frame.locator(".board")
    start = read(frame)
    for key in ("Shift+ArrowUp", "Space", *["ArrowDown"] * 8):
        board.press(key)
    assert "The pen is down" in frame.inner_text("#keys")
    first = read(frame)
    assert first[4] != start[4]
    board.press("Space")
    assert "The pen is down" not in frame.inner_text("#keys")
    for key in ("ArrowRight", "Space", *["Shift+ArrowRight"] * 2):
        board.press(key)
    second = read(frame)
    assert second[4] != first[4]
    board.press("Backspace")
    assert read(frame)[4] == first[4]
    board.press("Tab")
    assert frame.evaluate("document.activeElement.name || document.activeElement.textContent") in ("digit", "Undo")
    frame.press("input[name=digit][value='2']", "ArrowRight")
    assert "A test digit, 3" in [read(frame), frame.inner_text("output")][1]


@pytest.mark.parametrize("width", [320, 390, 600, 1280])
def test_the_board_fits_its_frame_and_its_controls_are_named(width, shown):  # noqa: F811
    page, frame = shown(Figure, width=width)
    page.evaluate("scrollTo(2000, 0)")
    assert page.evaluate("scrollX") == 0
    read(frame)
    box = frame.evaluate(
        """() => { const root = document.documentElement, main = document.querySelector("main").getBoundingClientRect();
        return {across: root.scrollWidth - root.clientWidth, down: root.scrollHeight - root.clientHeight,
                rest: root.clientHeight - main.bottom}; }"""
    )
    assert (box["across"], box["down"]) == (0, 0), box
    assert box["rest"] < 100, box
    for control in frame.query_selector_all("input, button, [tabindex]"):
        size = control.bounding_box()
        assert min(size["width"], size["height"]) >= 24
    assert frame.locator("output").count() == 1


def test_a_board_of_other_digits_is_made_and_what_does_not_fit_is_refused(digits, small_vae):
    plane = fitted(digits, 2)
    torch.manual_seed(0)
    small = vaelib.mlp_vae((1, 28, 28), (32,), 2)
    made = widgets.drawing_board(small, digits[:500], digits, "caption", ALT, num_samples=3)
    assert len(made.html.encode()) < 300_000
    assert made == widgets.drawing_board(small, digits[:500], digits, "caption", ALT, num_samples=3)
    held = front.page_model(front.page_data(made.html))
    change = vaelib.heldout_elbo(held, digits, 1).elbo - vaelib.heldout_elbo(small, digits, 1).elbo
    assert change.abs().mean() < 0.1
    gaussian = vaelib.mlp_vae((1, 28, 28), (8,), 2, "gaussian")
    words = ("caption", ALT)
    for call, message in [
        (lambda: widgets.drawing_board(small_vae, digits, digits, *words), "with 4 latents for images"),
        (lambda: widgets.drawing_board(gaussian, digits, digits, *words), "likelihood Gaussian"),
        (lambda: widgets.drawing_board("model", digits, digits, *words), "decoder NoneType"),
        (lambda: widgets.drawing_board(plane, digits, digits, *words), "expected at most 400000"),
        (lambda: widgets.drawing_board(plane, digits, digits, *words, num_samples=0), "num_samples: got int 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
