"""The rendered pages in a real browser (`make book`): accessible, quiet, light, and known to search engines.

Each page is loaded once for all the tests that only look at it (`page`), with all but its own server cut off, and looked at wide
and narrow, light and dark, its folds open.
The rules are those of axe-core 4.14.1, which stands in tests/web (Mozilla Public License 2.0).
"""

import gzip
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse
from xml.etree import ElementTree

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SITE = CONFIG["html"]["baseurl"]
PREFIX = urlparse(SITE).path  # pages are served below it, as where they are published
CONTENTS = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [CONTENTS["root"], *(chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"])]
OTHERS = ["404", "genindex", "index", "search", "_modules/index", "_modules/vaelib/vae"]  # made by Sphinx and the extension
AXE = (Path(__file__).parent / "web" / "axe.min.js").read_text(encoding="utf-8")
RUN_AXE = """async () => {
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], whole = [];
    // Code is the other half: of the words of a cell that look alike, axe is shown the first, and the rest as plain text.
    for (const code of document.querySelectorAll("pre")) {
        const looks = new Set(), short = code.cloneNode(true), copies = [...short.querySelectorAll("span[class]")];
        [...code.querySelectorAll("span[class]")].forEach((word, place) => {
            if (word.attributes.length > 1 || word.childElementCount || !word.textContent) return;
            const {color, backgroundColor, backgroundImage, fontSize, fontWeight, opacity, position, textShadow} = getComputedStyle(word);
            const look = [word.className, word.parentElement.className, color, backgroundColor, backgroundImage, fontSize,
                fontWeight, opacity, position, textShadow].join();
            if (looks.has(look)) copies[place].replaceWith(word.textContent);
            looks.add(look);
        });
        short.normalize();
        whole.push([code, [...code.childNodes], short]);
    }
    for (const [code, , short] of whole) code.replaceChildren(...short.childNodes);
    const only = {runOnly: {type: "tag", values: tags}, resultTypes: ["violations"], iframes: false, selectors: false};
    const found = await axe.run(document, only);
    for (const [code, words] of whole) code.replaceChildren(...words);
    return found.violations.flatMap(rule => rule.nodes.map(node => `${rule.id}: ${node.html.slice(0, 200)}`));
}"""
STROKES = """() => {  // a formula is half of a chapter's elements: axe has nothing to say on its strokes, and looks at each of them
    const more = ":not(svg, defs, g, path, use, rect), [role], [tabindex], [aria-hidden], [aria-label], [aria-labelledby]";
    for (const drawing of document.querySelectorAll("mjx-container > svg[aria-hidden=true]"))
        if (!drawing.querySelector(more)) drawing.replaceChildren();
}"""
SHAPES = """async () => {  // of every picture, after the reader has come to it: what is wrong with its shape or its place
    const faults = [];
    for (const picture of document.querySelectorAll("img")) {
        if (!picture.checkVisibility()) continue;  // that of the other scheme
        picture.scrollIntoView();
        await picture.decode().catch(() => faults.push(`${picture.src} is not loaded`));
        const box = picture.getBoundingClientRect();
        if (!box.width) continue;
        let column = picture.parentElement;
        while (getComputedStyle(column).display.startsWith("inline")) column = column.parentElement;
        const edges = column.getBoundingClientRect();
        const says = `${picture.src.split("/").pop()} is ${box.width} x ${box.height}`;
        const ratio = (box.width / box.height) / (picture.naturalWidth / picture.naturalHeight);
        if (Math.abs(ratio - 1) > 0.01) faults.push(`${says}, its file ${picture.naturalWidth} x ${picture.naturalHeight}`);
        if (box.left < edges.left - 1 || box.right > edges.right + 1) faults.push(`${says}, its column ${edges.width} wide`);
    }
    return faults;
}"""
GEOMETRY = """() => {  // what runs out, lies over something, stands apart or cannot be read
    const faults = [], article = document.querySelector("article") ?? document.querySelector("main");
    const says = part => `${part.tagName.toLowerCase()} "${(part.textContent || part.alt || "").trim().slice(0, 50)}"`;
    const seen = part => part.checkVisibility() && part.getBoundingClientRect().width > 0;
    // What is wider than its column scrolls inside its box, which shows that there is more; nothing else leaves the column.
    const edge = article.getBoundingClientRect().right + 1;
    for (const part of article.querySelectorAll("pre, table, mjx-container, p, li, dt, dd, code, img, h1, h2, h3")) {
        if (!seen(part)) continue;
        const style = getComputedStyle(part), scrolls = ["auto", "scroll"].includes(style.overflowX);
        if (scrolls && part.scrollWidth > part.clientWidth + 1 && !style.backgroundAttachment.includes("local"))
            faults.push(`${says(part)} scrolls in its box without a mark`);
        const rows = part.matches("table") ? [...part.rows] : [];
        if (part.scrollWidth > part.clientWidth + 1 && rows.some(row => getComputedStyle(row).backgroundColor !== "rgba(0, 0, 0, 0)"))
            faults.push(`the rows of ${says(part)} hide its mark`);
        if (innerWidth >= 1280 && part.matches("table, mjx-container") && part.scrollWidth > part.clientWidth + 1)
            faults.push(`${says(part)} does not fit its column on a desk`);
        let box = part.parentElement;
        while (box !== article && !["auto", "scroll"].includes(getComputedStyle(box).overflowX)) box = box.parentElement;
        if (box === article && part.getBoundingClientRect().right > edge) faults.push(`${says(part)} runs out of its column`);
    }
    // A caption stands under its picture.
    for (const figure of article.querySelectorAll("figure")) {
        const caption = figure.querySelector("figcaption"), picture = figure.querySelector("img, svg, iframe, table");
        if (!caption || !picture || !seen(caption)) continue;
        const below = caption.getBoundingClientRect(), above = picture.getBoundingClientRect();
        if (below.top < above.bottom - 1 || below.top > above.bottom + 60 || below.right < above.left || below.left > above.right)
            faults.push(`the caption ${says(caption)} is not under its picture`);
    }
    // No block lies over the next.
    const inFlow = part => {
        const style = getComputedStyle(part);
        return !["absolute", "fixed", "sticky"].includes(style.position) && style.display !== "inline";
    };
    const walk = parent => {
        const blocks = [...parent.children].filter(part => part instanceof HTMLElement && seen(part) && inFlow(part));
        for (let i = 0; i < blocks.length; i++) for (const other of blocks.slice(i + 1, i + 4)) {
            const a = blocks[i].getBoundingClientRect(), b = other.getBoundingClientRect();
            const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
            const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
            if (wide > 2 && high > 2) faults.push(`${says(blocks[i])} and ${says(other)} lie over each other`);
        }
        for (const part of blocks) if (!part.matches("pre, table, mjx-container, p")) walk(part);
    };
    walk(article);
    // A picture in which letters get small can be opened; letters of a drawn picture are large enough.
    for (const picture of article.querySelectorAll("img"))
        if (seen(picture) && picture.getBoundingClientRect().width < 0.999 * picture.naturalWidth && !picture.closest("a[href]"))
            faults.push(`${picture.src.split("/").pop()} is shown smaller than it is, and does not open`);
    for (const text of article.querySelectorAll("svg text")) {
        if (!seen(text) || text.closest("mjx-container")) continue;
        const size = parseFloat(getComputedStyle(text).fontSize) * Math.abs(text.getScreenCTM().a);
        if (size < 11.9) faults.push(`"${text.textContent}" of a drawing has ${size.toFixed(1)} px`);
    }
    return faults;
}"""
STILL = """() => document.getAnimations().every(one =>
    one.playState !== "running" || one.effect.getComputedTiming().endTime === Infinity)"""
SETTLED = """scheme => {  // the theme gives what scrolls a place among the tab stops a while after a change of size, and fades its colours
    const scrolling = "pre, .cell_output > .output, .jp-RenderedHTMLCommon, .pst-scrollable-table-container";
    const stops = [...document.querySelectorAll(scrolling)].every(part =>
        part.scrollWidth <= part.clientWidth && part.scrollHeight <= part.clientHeight || part.tabIndex === 0);
    return document.documentElement.dataset.theme === scheme && stops;
}"""
STATES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
LIMIT = 1_500_000  # bytes of a page with all that it loads, compressed

pytestmark = pytest.mark.skipif(not (HTML / "intro.html").exists(), reason="the book is not built: run make book first")


def opened(browser, address, name, width=1280, scheme="light"):
    """A page in a context of its own; `.said` and `.asked` hold errors and the addresses asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.said, tab.asked = [], []
    context.on("request", lambda request: tab.asked.append(request.url))
    tab.on("console", lambda message: message.type == "error" and tab.said.append(message.text))
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    context.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
    tab.goto(address + name)
    tab.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")
    return tab


@pytest.fixture
def open_page(browser, address):
    """Opens a page that a test may change or leave."""
    tabs = []

    def load(*arguments, **options):
        tabs.append(opened(browser, address, *arguments, **options))
        return tabs[-1]

    yield load
    for tab in tabs:
        tab.context.close()


@pytest.fixture(scope="module")
def page(request, browser, address):
    """A page with its folds open, loaded once for the tests that look at it; `.weight` is what was sent before they opened."""
    tab = opened(browser, address, f"{request.param}.html")
    tab.weight = sum(transferred(address, url) for url in set(tab.asked) if url.startswith(address))
    unfold(tab)
    yield tab
    tab.context.close()


def text_of(name):
    return (HTML / f"{name}.html").read_text(encoding="utf-8")


def head_of(name):
    return BeautifulSoup(text_of(name).partition("</head>")[0], "html.parser")


def transferred(address, url):
    """The bytes of a file of the book as a server sends them: what is text is compressed."""
    path = HTML / unquote(urlparse(url).path.removeprefix(PREFIX))
    data = path.read_bytes()
    return len(gzip.compress(data)) if path.suffix in {".html", ".css", ".js", ".svg"} else len(data)


def unfold(tab):
    """Open every fold of a page: what is hidden has to fit as well."""
    tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    tab.evaluate("document.querySelectorAll('button.toggle-button-hidden').forEach(button => button.click())")
    assert tab.locator(".toggle-hidden").count() == 0
    tab.wait_for_function(STILL)  # what opens moves for a while


@pytest.mark.parametrize("page", PAGES + OTHERS, indirect=True)
def test_pictures_keep_their_shape_and_everything_its_place_at_three_widths(page):
    faults = {}
    for width in (1280, 768, 390):
        page.set_viewport_size({"width": width, "height": 900})
        if found := page.evaluate(SHAPES) + page.evaluate(GEOMETRY):
            faults[width] = found
    assert faults == {}


@pytest.mark.parametrize("page", PAGES + OTHERS, indirect=True)
def test_a_page_is_accessible_quiet_and_light_in_every_state(page, address):
    for frame in page.locator("article iframe").all():
        frame.scroll_into_view_if_needed()
        frame.content_frame.locator("main").wait_for()
    page.evaluate("window.scrollTo(0, 0)")
    page.evaluate(STROKES)
    for frame in page.frames:
        frame.evaluate(AXE)
    faults = {}
    for width, scheme in STATES:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(SETTLED, arg=scheme)
        for frame in page.frames:
            frame.wait_for_function(STILL)
        found = [fault for frame in page.frames for fault in frame.evaluate(RUN_AXE)]
        page.evaluate("window.scrollTo(2000, 0)")
        found += ["scrolls sideways"] * (page.evaluate("window.scrollX") != 0)
        if found:
            faults[width, scheme] = found
    assert faults == {}
    assert page.said == []
    assert [url for url in page.asked if not url.startswith((address, "about:", "data:", "blob:"))] == []
    assert page.weight <= LIMIT


def test_the_check_of_accessibility_finds_the_faults_of_the_theme_when_they_are_put_back(open_page):
    tab = open_page("elbo.html")
    tab.evaluate(STROKES)
    tab.evaluate(AXE)
    assert tab.evaluate(RUN_AXE) == []
    tab.evaluate("""() => {
        document.querySelector("[role=listitem]").setAttribute("role", "doc-biblioentry");
        document.querySelector("details.hide summary").setAttribute("aria-label", "Toggle hidden content");
        document.querySelector("article img").removeAttribute("alt");
        document.querySelector("article p").style.color = "#aaa";
    }""")
    faults = {fault.partition(":")[0] for fault in tab.evaluate(RUN_AXE)}
    assert {"aria-deprecated-role", "label-content-name-mismatch", "image-alt", "color-contrast"} <= faults


def test_the_check_of_places_finds_each_fault_that_is_put_in(open_page):
    tab = open_page("elbo.html", 390)
    unfold(tab)
    assert tab.evaluate(GEOMETRY) == []
    tab.evaluate("""() => {
        const article = document.querySelector("article"), first = (what) => article.querySelector(what);
        [...article.querySelectorAll("pre")].find(part => part.scrollWidth > part.clientWidth + 1).style.background = "none";
        first("p").style.width = "600px";
        first("h2").style.marginBottom = "-60px";
        first("figure img").closest("a").replaceWith(first("figure img"));
        [...article.querySelectorAll("figcaption")].at(-1).style.marginTop = "100px";
        article.insertAdjacentHTML("beforeend", '<svg width="100" height="20"><text y="12" font-size="9">small</text></svg>');
    }""")
    faults = " | ".join(tab.evaluate(GEOMETRY))
    for fault in (
        "without a mark",
        "runs out of its column",
        "lie over each other",
        "does not open",
        "not under its picture",
        "9.0 px",
    ):
        assert fault in faults, faults


BREAKS = """() => {  // the code of tables that goes on in a next line, up to each end of a line
    const ends = [], text = document.createRange();
    for (const code of document.querySelectorAll("article td code")) {
        if (!code.checkVisibility()) continue;
        const nodes = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
        let before = null, said = "";
        while (nodes.nextNode()) for (let i = 0; i < nodes.currentNode.length; i++) {
            text.setStart(nodes.currentNode, i);
            text.setEnd(nodes.currentNode, i + 1);
            const box = text.getClientRects()[0];
            if (before !== null && box && box.top > before + 5) ends.push(said);
            if (box) before = box.top;
            said += nodes.currentNode.data[i];
        }
    }
    return ends;
}"""


@pytest.mark.parametrize("page", ["notation", "models", "extending", "troubleshooting", "protocol"], indirect=True)
def test_a_name_of_code_in_a_table_breaks_only_between_its_parts(page):
    for width in (1280, 768, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert [end for end in page.evaluate(BREAKS) if end[-1] not in "_./(,= -"] == []


@pytest.mark.parametrize("page", ["notation"], indirect=True)
def test_the_check_of_names_of_code_sees_where_they_break_and_finds_a_break_inside_of_a_part(page):
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate(BREAKS)
    style = page.add_style_tag(content=".bd-article td code .pre { overflow-wrap: anywhere !important; }")
    found = page.evaluate(BREAKS)
    style.evaluate("style => style.remove()")
    assert [end for end in found if end[-1] not in "_./(,= -"]


@pytest.mark.parametrize("page", ["mnist-mlp"], indirect=True)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_heading_is_smaller_and_no_heavier_than_the_one_above_it(width, page):
    page.set_viewport_size({"width": width, "height": 900})
    styles = page.evaluate("""() => {
        const four = document.querySelector("article").appendChild(document.createElement("h4"));
        const styles = ["h1", "h2", "h3", "h4", "p"].map(tag => {
            const style = getComputedStyle(document.querySelector(`article ${tag}`));
            return [parseFloat(style.fontSize), parseFloat(style.fontWeight)];
        });
        four.remove();
        return styles;
    }""")
    sizes, weights = zip(*styles, strict=True)
    assert all(above > below for above, below in pairwise(sizes)), sizes
    assert len(set(weights[:3])) == 1


def test_the_check_of_shapes_finds_a_squashed_and_a_wide_picture(open_page):
    tab = open_page("elbo.html", 390)
    tab.add_style_tag(
        content=".bd-article figure img { height: 720px !important; width: 500px !important; max-width: none !important; }"
    )
    faults = tab.evaluate(SHAPES)
    assert any("its file 1520 x" in fault for fault in faults)
    assert any("its column" in fault for fault in faults)


def test_pages_have_each_its_own_title_and_its_own_description_in_words():
    heads = {name: head_of(name) for name in PAGES}
    titles = [head.title.text for head in heads.values()]
    found = {name: [tag["content"] for tag in head.select('meta[name="description"]')] for name, head in heads.items()}
    assert all(len(texts) == 1 and 30 <= len(texts[0]) <= 300 for texts in found.values()), found
    words = [texts[0] for texts in found.values()]
    assert len(set(titles)) == len(set(words)) == len(PAGES)
    assert all(text[0].isupper() and text[-1] in ".?!" and not set(text) & set("\\$^_{}<>\ufffc") for text in words), words


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_its_one_address_and_its_card(name):
    head = head_of(name)
    card = {tag["property"]: tag["content"] for tag in head.select('meta[property^="og:"]')}
    assert [link["href"] for link in head.select('link[rel="canonical"]')] == [f"{SITE}{name}.html"] == [card["og:url"]]
    assert card["og:site_name"] == CONFIG["title"]
    assert card["og:title"] in head.title.text
    assert card["og:description"] == head.select_one('meta[name="description"]')["content"]
    if "og:image" in card:
        assert (HTML / card["og:image"].removeprefix(SITE)).is_file()
        assert len(card["og:image:alt"]) > 40
    assert (HTML / f"{name}.html").parent.joinpath(head.select_one('link[rel="icon"]')["href"]).is_file()


def test_the_site_map_lists_every_page_and_nothing_else():
    tree = ElementTree.parse(HTML / "sitemap.xml")
    names = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9"}
    assert sorted(place.text for place in tree.findall("s:url/s:loc", names)) == sorted(f"{SITE}{name}.html" for name in PAGES)


def test_every_link_and_anchor_of_every_page_resolves():
    texts = {path: path.read_text(encoding="utf-8") for path in HTML.rglob("*.html") if "_static" not in path.parts}
    anchors = {path: {*re.findall(r' id="([^"]+)"', text), *re.findall(r' name="([^"]+)"', text)} for path, text in texts.items()}
    broken = []
    for path, text in texts.items():
        here = urljoin(SITE, path.relative_to(HTML).as_posix())
        for link in set(re.findall(r'<\w+ [^<>]*?(?:href|src)="([^"]*)"', text)):
            place = urlparse(urljoin(here, unescape(link)))
            if not place.geturl().startswith(SITE):
                continue
            target = HTML / unquote(place.path.removeprefix(PREFIX))
            if not target.is_file() or (place.fragment and unquote(place.fragment) not in anchors.get(target, ())):
                broken.append((here, link))
    assert len(texts) > len(PAGES) + len(OTHERS)
    assert broken == []


def test_an_address_that_is_not_there_shows_a_page_that_leads_back_at_any_depth(open_page, address):
    tab = open_page("assignments/nowhere/page.html")
    assert len(tab.asked) > 5
    assert all(url.startswith(address) for url in tab.asked)
    assert [line for line in tab.said if "404" not in line] == []  # the page itself is one
    assert len(tab.said) <= 1
    assert "no such page" in tab.locator("article h1").inner_text()
    tab.locator("article a", has_text="first page").click()
    tab.wait_for_url(address + "intro.html")


def test_the_first_page_stands_at_the_address_of_the_book():
    assert text_of("index") == text_of("intro")


def test_without_a_choice_the_page_follows_the_system_and_a_choice_stays(open_page):
    tab = open_page("notation.html", scheme="dark")
    theme = lambda: tab.evaluate("document.documentElement.dataset.theme")  # noqa: E731
    assert theme() == "dark"
    tab.emulate_media(color_scheme="light")
    tab.wait_for_function("document.documentElement.dataset.theme === 'light'")
    button = tab.locator("button.theme-switch-button").first
    while tab.evaluate("document.documentElement.dataset.mode") != "dark":
        button.click()
    assert theme() == "dark"
    tab.goto(tab.url.replace("notation", "protocol"))
    assert theme() == "dark"


def test_the_keyboard_opens_the_search_and_the_search_finds_a_page(open_page):
    tab = open_page("intro.html")
    tab.keyboard.press("Control+k")
    tab.locator("#pst-search-dialog input[type=search]").fill("Bernoulli")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=Bernoulli*")
    tab.locator("#search-results li a[href*='mnist-mlp.html']").first.wait_for()
    # Results come before the page is ready.
    tab.route("**/bootstrap.js*", lambda request: (tab.wait_for_timeout(1000), request.continue_()))
    tab.goto(tab.url.replace("Bernoulli", "encoder"))
    excerpts = tab.locator("#search-results li p.context")
    excerpts.nth(4).wait_for()
    words = " ".join(excerpts.all_inner_texts())
    assert "encoder" in words.lower()
    assert not re.search(r"\\[(\[a-z]|^import ", words)  # neither formulas as they are typed nor code


def test_formulas_are_set_a_few_at_a_time_and_take_before_about_the_place_that_they_have_then(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script('setInterval(() => (window.set ??= []).push(document.querySelectorAll("mjx-container").length), 0)')
    widths = """() => [...document.querySelectorAll("p span.math, td span.math")]
        .map(span => [...span.getClientRects()].reduce((width, box) => width + box.width, 0)).reduce((a, b) => a + b)"""
    tab = context.new_page()
    tab.goto(f"{address}elbo.html")
    tab.evaluate("() => MathJax.startup.promise.then(() => null)")
    formulas, set_width = tab.locator(".math").count(), tab.evaluate(widths)
    assert tab.locator("mjx-container").count() == formulas > 200
    assert sum(0 < count < formulas for count in set(tab.evaluate("window.set"))) >= 3  # the page did other things meanwhile
    tab.route("**/tex-svg-full.js*", lambda route: route.abort())
    tab.reload()
    assert abs(math.log(tab.evaluate(widths) / set_width)) < 0.2
    context.close()


def test_folds_open_and_code_is_copied(open_page):
    tab = open_page("elbo.html")
    fold = tab.locator("details.hide").first
    inside = fold.locator("pre").first
    assert not inside.is_visible()
    fold.locator("summary").click()
    assert inside.is_visible()
    solution = tab.locator("div.solution.dropdown").first
    assert not solution.locator("p").last.is_visible()
    solution.locator("button.toggle-button").click()
    assert solution.locator("p").last.is_visible()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = tab.locator("button.copybtn >> visible=true").first
    code = button.locator("xpath=preceding-sibling::pre").inner_text()
    button.click(force=True)
    assert tab.evaluate("navigator.clipboard.readText()").strip() == code.strip()


def test_the_menus_of_a_phone_open_and_close(open_page):
    tab = open_page("elbo.html", width=390)
    chapters = tab.locator("#pst-primary-sidebar-modal, #pst-primary-sidebar").locator("a", has_text="Retrieval").first
    assert not chapters.is_visible()
    tab.locator("button.primary-toggle").first.click()
    chapters.wait_for()
    tab.keyboard.press("Escape")
    chapters.wait_for(state="hidden")


def test_figures_to_touch_are_asked_for_only_when_the_reader_comes_to_them(open_page):
    tab = open_page("generation.html")
    frames = tab.locator("article iframe")
    assert frames.count() > 0
    assert [url for url in tab.asked if "/_frames/" in url] == []
    with tab.context.expect_event("request", lambda request: "/_frames/" in request.url):
        frames.last.scroll_into_view_if_needed()
    frames.last.content_frame.locator("canvas").first.wait_for()


def test_a_page_opened_from_a_file_shows_its_mathematics_and_its_figures_to_touch(browser):
    context = browser.new_context()
    try:
        tab = context.new_page()
        tab.goto((HTML / "generation.html").as_uri())
        tab.locator("mjx-container").first.wait_for()
        frame = tab.locator("article iframe").first
        frame.scroll_into_view_if_needed()
        frame.content_frame.locator("canvas").first.wait_for()
    finally:
        context.close()
