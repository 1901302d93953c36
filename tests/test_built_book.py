"""The rendered pages, where they were built (`make book`): alt texts, links, Colab buttons, nothing fetched from elsewhere."""

import functools
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image
from test_book import CHAPTERS, CONTENTS, prose

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "book" / "_ext"))
from dark_figures import dark, lossless  # noqa: E402
from mended_pages import RULES  # noqa: E402

PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
ASSIGNMENTS = [name for name in PAGES if name.startswith("assignments/")]

pytestmark = pytest.mark.skipif(not (HTML / "intro.html").exists(), reason="the book is not built: run make book first")


FIGURES = [("intro", 0), ("intro", 1), ("generation", 0), ("generation", 1), ("generation", 2), ("retrieval", 0)]


def each(names):
    """A test of each page; those of one page are neighbours, so that it is read once for all of them."""
    return pytest.mark.parametrize("name", names, scope="module")


@functools.lru_cache(maxsize=1)
def page(name):
    return BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


@functools.cache
def places(target):
    """What a link into a page may point to."""
    return set(re.findall(r'id="([^"]+)"', target.read_text(encoding="utf-8")))


@each(PAGES)
def test_images_have_alt_texts_that_are_no_paths(name):
    images = page(name).select("article img:not(.only-dark)")  # that of dark pages has the alt text of its fellow
    alts = [image.get("alt", "") for image in images]
    assert all(len(alt) > 40 and "/" not in alt[:20] and not alt.endswith(".png") for alt in alts), alts
    assert len(set(alts)) == len(alts)
    if name in CHAPTERS:
        assert len(images) >= 5


@each(PAGES)
def test_internal_links_and_anchors_resolve(name):
    broken = []
    for link in page(name).select("article a[href]"):
        address = urlparse(link["href"])
        if address.scheme or address.netloc:
            continue
        target = (HTML / name).parent / unquote(address.path) if address.path else HTML / f"{name}.html"
        place = unquote(address.fragment) if target.suffix == ".html" else ""
        if not target.exists() or (place and place not in places(target.resolve())):
            broken.append(link["href"])
    assert broken == []


@each(PAGES)
def test_a_page_loads_nothing_from_another_host(name):
    soup = page(name)
    loaded = [tag.get("src") or tag.get("href") for tag in soup.select("script[src], link[rel=stylesheet], img[src], iframe[src]")]
    assert [address for address in loaded if urlparse(address).netloc] == []
    assert soup.select_one('script[src*="tex-svg-full.js"]') or not soup.select(".math")


@each(CHAPTERS + ASSIGNMENTS)
def test_the_colab_button_opens_this_chapter_in_plain_markdown(name):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    owner = repository["url"].removeprefix("https://github.com/")
    buttons = [link["href"] for link in page(name).select('a[href*="colab.research.google.com"]')]
    place = "notebooks" if name in CHAPTERS else f"{repository['branch']}/book"
    assert buttons == [f"https://colab.research.google.com/github/{owner}/blob/{place}/{name}.ipynb"]
    pushed = (ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8")
    assert "git init --quiet --initial-branch notebooks\n" in pushed


@each(CHAPTERS)
def test_solutions_are_folded_and_equations_numbered(name):
    soup = page(name)
    assert len(soup.select("div.solution.dropdown")) >= 4
    labelled = len(re.findall(r"^\$\$ \(", prose(name), re.MULTILINE))
    assert len({number.text for number in soup.select("span.eqno")}) == labelled
    assert "system-message" not in str(soup)
    assert not soup.find(string=lambda text: text and ("{eq}`" in text or "{numref}`" in text or "{cite}`" in text))


@pytest.fixture(scope="module")
def offline(request, browser, address):
    """A chapter at a width with the network cut, opened once for all its figures; `.asked` holds the addresses refused."""
    name, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.asked = []

    def guard(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            tab.asked.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    tab.goto(address + f"{name}.html", wait_until="domcontentloaded")
    yield tab
    context.close()


@pytest.mark.parametrize(
    ("offline", "name", "number"),
    [
        pytest.param((chapter, width), chapter, number, id=f"{width}-{chapter}-{number}")
        for chapter in dict.fromkeys(name for name, _ in FIGURES)
        for width in (1280, 390)
        for name, number in FIGURES
        if name == chapter
    ],
    indirect=["offline"],
    scope="module",
)
def test_a_figure_to_touch_answers_pointer_and_key_with_the_network_cut(offline, name, number):
    frames = offline.locator("article .vaelib-widget iframe")
    assert frames.count() == sum(page_name == name for page_name, _ in FIGURES)
    frame = frames.nth(number)
    frame.scroll_into_view_if_needed()
    inside = frame.content_frame
    inside.locator("canvas").first.wait_for()
    drawn = lambda: inside.locator("canvas").evaluate_all("all => all.map(canvas => canvas.toDataURL()).join()")  # noqa: E731
    seen = [drawn()]
    choices = inside.locator("input[type=radio]") if name == "retrieval" else inside.locator("[tabindex='0'], input[type=range]")
    control = choices.first if name == "retrieval" else choices.last
    control.focus()
    for key in ("ArrowRight", "ArrowUp", "ArrowLeft"):
        offline.keyboard.press(key)
    offline.wait_for_timeout(200)
    seen.append(drawn())
    if name == "retrieval":
        inside.locator("label").nth(4).click()
    else:
        box = control.bounding_box()
        offline.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
    offline.wait_for_timeout(200)
    seen.append(drawn())
    assert seen[0] != seen[1] != seen[2]
    offline.evaluate("window.scrollTo(2000, 0)")
    assert offline.evaluate("window.scrollX") == 0
    assert offline.asked == []


def test_dark_figures_have_light_strokes_on_the_page_and_their_pictures_as_they_were():
    ground, ink, blue = (np.array(rgb, np.uint8) for rgb in ((255, 255, 255), (0, 0, 0), (0, 114, 178)))
    drawing = np.tile(ground, (60, 80, 1))
    drawing[30, 5:75], drawing[5:55, 40] = ink, blue
    turned = np.asarray(dark(Image.fromarray(drawing)))
    assert turned[0, 0, 3] == 0  # nothing: the page shows
    assert turned[30, 10].tolist() == [255, 255, 255, 255]
    red, green, light_blue, cover = turned[10, 40].astype(int)
    assert light_blue == cover == 255 > green > red  # still blue, and lighter
    assert green > 114

    tones = np.tile(np.array([[(204, 121, 167), (242, 207, 178), (176, 176, 176)]], np.uint8), (60, 1, 1)).repeat(20, 1)
    lines = np.tile(ground, (200, 200, 1))
    lines[70:130, 70:130] = tones
    turned = np.asarray(dark(Image.fromarray(lines))).astype(int)
    purple, tint, grey = (turned[100, column, :3].max() * turned[100, column, 3] / 255 for column in (80, 100, 120))
    assert purple > 150 > grey > tint  # a colour of middle lightness is seen; what was pale or grey stays behind it

    depth = np.linspace(0, 1, 300)  # the shades of a density, from nearly white over blue to a dark blue
    shades = np.stack([np.interp(depth, [0, 0.5, 1], values) for values in ((250, 107, 8), (252, 174, 48), (255, 214, 107))], 1)
    density = np.tile(ground, (200, 500, 1))
    density[70:130, 100:400] = shades.round()
    turned = np.asarray(dark(Image.fromarray(density))).astype(int)[100, 100:400]
    steps = np.diff(turned[:, :3].max(1) * turned[:, 3])
    assert steps.min() >= 0  # lighter step by step, with no edge where there was none
    assert steps.max() < 4 * 255

    grid = np.tile(ground, (60, 124, 1))  # a label and two photographs, between which is a gap
    grid[20:40, 4:10] = ink
    noise = np.random.default_rng(0).integers(0, 200, (60, 50, 3), np.uint8)
    grid[:, 20:70], grid[:, 74:124] = noise, noise[::-1]
    turned = np.asarray(dark(Image.fromarray(grid)))
    np.testing.assert_array_equal(turned[:, 20:70, :3], noise)
    np.testing.assert_array_equal(turned[:, 74:124, :3], noise[::-1])
    assert (turned[:, 20:70, 3].min(), turned[:, 70:74, 3].max(), turned[0, 0, 3]) == (255, 0, 0)
    assert turned[30, 6].tolist() == [255, 255, 255, 255]

    table = np.tile(ground, (148, 148, 1))  # four of them with wide gaps
    for top, left in ((0, 0), (0, 84), (84, 0), (84, 84)):
        table[top : top + 64, left : left + 64] = noise[:32, :32].repeat(2, 0).repeat(2, 1)
    turned = np.asarray(dark(Image.fromarray(table)))
    np.testing.assert_array_equal(turned[84:, 84:, :3], table[84:, 84:])
    assert turned[64:84, :, 3].max() == turned[:, 64:84, 3].max() == 0

    chart = np.tile(ground, (108, 150, 1))  # one with a colour bar, its tick and the label of that
    chart[4:104, 4:104], chart[4:104, 112:124] = noise[:50].repeat(2, 0).repeat(2, 1), noise[:50, :12].repeat(2, 0)
    chart[4, 124:128], chart[2:8, 132:138] = ink, ink
    turned = np.asarray(dark(Image.fromarray(chart)))
    for left, right in ((4, 104), (112, 124)):
        np.testing.assert_array_equal(turned[4:104, left:right, :3], chart[4:104, left:right])
    assert (turned[60, 108, 3], turned[4, 126, 0], turned[4, 135, 0]) == (0, 255, 255)

    page = np.tile(ground, (300, 500, 1))  # the same laid out freely, the photographs large
    page[20:40, 4:10], page[100:220, 100:300] = ink, np.kron(noise[:12, :20], np.ones((10, 10, 1), np.uint8))
    turned = np.asarray(dark(Image.fromarray(page), free=True))
    np.testing.assert_array_equal(turned[100:220, 100:300, :3], page[100:220, 100:300])
    assert (turned[0, 0, 3], turned[30, 6, 0]) == (0, 255)
    page[100:220, 100:300] = (64, 64, 64)  # a thick bar is no photograph
    turned = np.asarray(dark(Image.fromarray(page), free=True)).astype(int)
    assert turned[150, 200, :3].max() * turned[150, 200, 3] / 255 > 180


def test_a_figure_is_kept_without_the_channels_that_tell_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    opaque, grey = noise.copy(), noise.copy()
    opaque[..., 3], grey[..., :3] = 255, noise[..., :1]
    plain = np.where(np.arange(4) == 3, opaque, grey)
    for levels, mode in ((noise, "RGBA"), (opaque, "RGB"), (grey, "LA"), (plain, "L")):
        smaller = lossless(Image.fromarray(levels))
        assert smaller.mode == mode
        np.testing.assert_array_equal(np.asarray(smaller.convert("RGBA")), levels)


@each(PAGES)
def test_each_figure_has_a_drawing_for_each_scheme(name):
    soup, folder = page(name), (HTML / f"{name}.html").parent
    light, night = soup.select("article img.only-light"), soup.select("article img.only-dark")
    assert [image["src"].replace(".png", ".dark.png") for image in light] == [image["src"] for image in night]
    assert [image["alt"] for image in light] == [image["alt"] for image in night]
    for image in night:
        with Image.open(folder / image["src"]) as figure, Image.open(folder / image["src"].replace(".dark", "")) as other:
            assert figure.size == other.size
            cover = figure.convert("RGBA").getchannel("A")
            assert cover.getpixel((0, 0)) == 0 or cover.getpixel((figure.width - 1, figure.height - 1)) == 0, image["src"]


def test_a_column_of_plain_numbers_is_marked_and_one_of_words_or_spreads_is_not():
    rows = [("th", "of", "nats", "share", "found by"), ("td", "a", "−1.5", "0.2 ± 0.1", "none"), ("td", "b", "12", "0.3", "4")]
    lines = ["".join(f"<{kind}><p>{text}</p></{kind}>" for text in texts) for kind, *texts in rows]
    table = '<table class="table"><thead><tr>' + "</tr><tr>".join(lines) + "</tr></table>"
    for pattern, replacement in RULES:
        table = re.sub(pattern, replacement, table, flags=re.DOTALL)
    marked = BeautifulSoup(table, "html.parser").select("[data-number]")
    assert [cell.get_text() for cell in marked] == ["nats", "−1.5", "12"]


def test_a_number_keeps_its_spread_and_its_unit_behind_the_source_of_the_number_too():
    text = "<p>of −1.5<!-- a:b --> ± 0.2 nats<!-- a:b --> and 3<!-- a:b --> bits on 8 × 8 places, 7 images</p>"
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    shown = re.sub(r"<[^>]*>", "", text)
    assert shown == "of −1.5&nbsp;±&nbsp;0.2&nbsp;nats and 3&nbsp;bits on 8&nbsp;×&nbsp;8 places, 7 images"
