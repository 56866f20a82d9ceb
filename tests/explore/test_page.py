"""The page in a real Chromium: what is shown, by mouse and by keyboard, without an error on its console."""

import json
import re
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("starlette", reason="clt browse needs the extra `serve`")
pytest.importorskip("uvicorn", reason="clt browse needs the extra `serve`")
pytest.importorskip("playwright", reason="the page is tested with playwright: pip install playwright")

import uvicorn
from playwright.sync_api import Error, expect, sync_playwright

from clt.explore.browse import make_app, write_static
from clt.explore.files import pack, write_layer, write_summary

TEXT = "abc fed gab"
HOSTILE = ["<img src=x onerror=\"document.title='run'\">", "<b>bold</b>", "&amp;", "\u202e"]


@pytest.fixture(scope="module")
def browser():
    """Chromium of the system, or playwright's own."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium was found (install one, or run `playwright install chromium`): {error}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A copy of the run in which some tokens look like HTML."""
    run = shutil.copytree(made.run, tmp_path_factory.mktemp("browsed") / "run")
    features = made.features
    known = {text: text for text in features.vocabulary}
    usual = features.record(0, most_frequent(features))["examples_quantiles"][0]["examples"][0]["tokens"]
    known |= dict(zip(dict.fromkeys(usual[1:]), HOSTILE))

    def renamed(tree):
        if isinstance(tree, str):
            return known.get(tree, tree)
        if isinstance(tree, list):
            return [renamed(item) for item in tree]
        return {key: renamed(item) for key, item in tree.items()} if isinstance(tree, dict) else tree

    offsets = [
        write_layer(
            run / "features", layer, (pack(renamed(features.record(layer, f))) for f in range(features.d_features))
        )
        for layer in range(features.n_layers)
    ]
    summary = {key: value for key, value in features.summary.items() if key != "format_version"}
    write_summary(run / "features", offsets, features.arrays, renamed(features.vocabulary), summary)
    return run


def most_frequent(features):
    """Of the first layer."""
    return int(features.arrays["count"][0].argmax())


@pytest.fixture(scope="module")
def served(made, run):
    """The address of the page."""
    server = uvicorn.Server(uvicorn.Config(make_app(made.config, run), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


class Quiet(SimpleHTTPRequestHandler):
    """Knows no ranges."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hosted(run, tmp_path_factory):
    """The address of the static pages."""
    site = tmp_path_factory.mktemp("site")
    write_static(run, site)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["served", "hosted"])
def site(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def page(browser):
    """A page whose console must stay empty."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.close()
    assert said == []


def go(page, site, place=""):
    page.goto(f"{site}#/{place}")
    expect(page.locator("h1")).to_be_visible()


def ids(page):
    return page.locator("tbody td:first-child a").all_inner_texts()


def test_the_overview_tells_the_figures_and_a_click_on_a_point_opens_it(page, served, made):
    go(page, served)
    arrays = made.features.arrays
    summary = json.loads((made.run / "summary.json").read_text())
    expect(page.locator("dl")).to_contain_text(re.compile(rf"explained.*{summary['fve']:.3g}"[:24]))
    expect(page.locator(".charts")).to_contain_text(f"{(arrays['count'][0].sum() / made.features.tokens):.3g}")
    canvas = page.locator("#scatter")
    canvas.focus()
    canvas.press("ArrowRight")
    told = page.locator("#told").inner_text()
    rarest = min(count for count in arrays["count"].flat if count)
    layer, feature = map(int, re.match(r"Feature (\d+)\.(\d+) fires", told).groups())
    assert arrays["count"][layer, feature] == rarest
    canvas.press("Enter")
    expect(page.locator("h1")).to_have_text(f"Feature {layer}.{feature}")
    page.go_back()
    box = page.locator("#scatter").bounding_box()
    most = arrays["count"].max()
    page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 4)
    for y in range(4, int(box["height"]), 8):
        page.mouse.move(box["x"] + box["width"] - 16, box["y"] + y)
        if (told := page.locator("#told").inner_text()).startswith("Feature"):
            break
    layer, feature = map(int, re.match(r"Feature (\d+)\.(\d+) fires", told).groups())
    assert arrays["count"][layer, feature] == most
    page.mouse.click(box["x"] + box["width"] - 16, box["y"] + y)
    expect(page.locator("h1")).to_have_text(f"Feature {layer}.{feature}")


def test_the_table_sorts_filters_and_is_linked(page, site, made):
    counts = made.features.arrays["count"]
    go(page, site, "features")
    expect(page.locator("tbody tr")).to_have_count(30)
    assert ids(page) == [f"{layer}.{feature}" for layer in range(3) for feature in range(10)]
    page.get_by_role("button", name="Fires on").click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("Fires on ↓")
    layer, feature = divmod(int(counts.argmax()), 10)
    expect(page.locator("tbody td a").first).to_have_text(f"{layer}.{feature}")
    page.get_by_label("Layer").select_option("1")
    expect(page.locator("tbody tr")).to_have_count(10)
    assert [int(name.split(".")[1]) for name in ids(page)] == sorted(range(10), key=lambda f: -counts[1, f])
    assert page.url.endswith("#/features?sort=-count&layer=1")
    page.get_by_role("button", name="Fires on").click()
    expect(page.locator("th[aria-sort=ascending]")).to_have_text("Fires on ↑")
    assert [int(name.split(".")[1]) for name in ids(page)] == sorted(range(10), key=lambda f: counts[1, f])
    page.reload()
    expect(page.locator("tbody tr")).to_have_count(10)
    top = [{made.features.vocabulary[id].lower() for id in of} for of in made.features.arrays["top_logits"][1]]
    token = min(top[3], key=lambda token: sum(token in "".join(texts) for texts in top))  # that few others promote
    page.get_by_label("Token that it promotes").fill(token)
    promoting = [f for f in range(10) if any(token in text for text in top[f])]
    expect(page.locator("tbody tr")).to_have_count(len(promoting))
    assert {int(name.split(".")[1]) for name in ids(page)} == {*promoting} >= {3}
    assert len(promoting) < 10
    page.get_by_label("Token that it promotes").fill("nothing that there is")
    expect(page.locator(".pager")).to_contain_text("No feature is like that.")
    page.get_by_label("Token that it promotes").fill("")
    page.get_by_label("to %").fill("0")
    never = int((counts[1] == 0).sum())
    expect(page.locator("tbody tr")).to_have_count(never)


def test_an_answer_that_is_overtaken_is_not_shown(page, served):
    """The first word's answer never comes; the second word ends that request without a message."""
    go(page, served, "features")
    first = re.compile(r"features\?text=a&")
    page.route(first, lambda route: None)
    with page.expect_request(first) as request:
        page.get_by_label("Token in examples").last.fill("a")
    with page.expect_event("requestfailed") as ended:
        page.get_by_label("Token in examples").last.fill("no such token")
    assert ended.value.url == request.value.url
    expect(page.locator(".pager")).to_contain_text("No feature is like that.")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_feature_shows_its_examples_and_where_it_leads(page, site, made):
    feature = most_frequent(made.features)
    record = made.features.record(0, feature)
    go(page, site, f"feature/0/{feature}")
    examples = record["examples_quantiles"]
    expect(page.locator(".example")).to_have_count(sum(len(group["examples"]) for group in examples))
    expect(page.locator(".group h2")).to_have_text([group["quantile_name"] for group in examples])
    first = page.locator(".example").first
    activations = examples[0]["examples"][0]["tokens_acts_list"]
    expect(first.locator(".hot")).to_have_count(sum(value > 0 for value in activations))
    expect(first.locator(".peak")).to_have_attribute("title", f"activation {max(activations):.3g}")
    peak = first.locator(".peak").evaluate("element => getComputedStyle(element).backgroundColor")
    assert peak not in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)")
    page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text(f"Feature 0.{min(feature + 1, 9)}")
    page.go_back()
    expect(page.locator("h1")).to_have_text(f"Feature 0.{feature}")  # before, a click would hit the page that is left
    page.locator(".near a").first.click()
    near = record["coactive"][0]
    expect(page.locator("h1")).to_have_text(f"Feature {near['layer']}.{near['feature']}")


def test_texts_that_look_like_html_are_shown_as_they_are(page, served, made):
    go(page, served, f"feature/0/{most_frequent(made.features)}")
    expect(page.locator("#examples")).to_contain_text(HOSTILE[0])
    expect(page.locator("#examples")).to_contain_text(HOSTILE[1])
    assert page.locator("main img, main b, main script").count() == 0
    go(page, served, "features?text=onerror")
    expect(page.locator("tbody")).to_contain_text(HOSTILE[0])
    assert page.locator("main img").count() == 0
    assert not page.title().startswith("run")


def test_the_keyboard_goes_everywhere(page, served, made):
    go(page, served)
    page.keyboard.press("/")
    page.keyboard.type(made.features.vocabulary[0][:3])
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Features")
    expect(page.get_by_label("Token in examples").last).to_have_value(made.features.vocabulary[0][:3])
    go(page, served, "features")
    expect(page.locator("tbody tr").first).to_be_visible()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Feature 0.1")
    page.keyboard.press("k")
    expect(page.locator("h1")).to_have_text("Feature 0.0")
    page.keyboard.press("r")
    expect(page.locator("h1")).to_contain_text("Feature")
    for key, title in {
        "p": "Prompt",
        "f": "Features",
        "o": f"Features of {made.features.summary['transcoder_id']}",
    }.items():
        page.keyboard.press("Escape")  # leaves the prompt's box
        page.keyboard.press(key)
        expect(page.locator("h1")).to_have_text(title)


def shares(page, model):
    return page.locator(f"#next .{model}").all_inner_texts()


def test_a_prompt_and_an_intervention(page, served):
    go(page, served, "prompt")
    page.get_by_label("Prompt").fill(TEXT)
    page.get_by_label("Prompt").press("Enter")
    tokens = page.locator(".strip button")
    expect(tokens.last).to_have_attribute("aria-pressed", "true")
    count = tokens.count()
    tokens.last.press("ArrowLeft")
    expect(tokens.nth(count - 2)).to_have_attribute("aria-pressed", "true")
    expect(tokens.nth(count - 2)).to_be_focused()
    assert len(shares(page, "original")) == len(shares(page, "replaced")) > 7
    assert shares(page, "changed") == []
    row = page.locator("#here tbody tr").first
    name = row.locator("a").inner_text()
    before = float(row.locator("td").nth(1).inner_text())
    row.hover()
    expect(page.locator(".strip .hot").first).to_be_visible()
    changed = page.locator("#here tr.changed")
    row.get_by_role("slider").press("End")
    expect(changed.locator("output")).to_have_text(re.compile(".4"))
    scaled = changed.locator("td").nth(1).inner_text()
    assert [float(value) for value in scaled.split(" → ")] == pytest.approx([before, 4 * before], rel=0.01)
    quadruple = shares(page, "changed")
    assert quadruple != shares(page, "replaced")
    changed.get_by_role("slider").press("Home")
    expect(changed.locator("output")).to_have_text(re.compile(".0"))
    expect(changed.locator("a")).to_have_text(name)
    expect(changed.locator("td").nth(1)).to_have_text(f"{before:g} → 0")
    expect(changed.get_by_role("slider")).to_be_focused()
    assert shares(page, "changed") not in (shares(page, "replaced"), quadruple)
    assert f"scale={name}%3A0" in page.url
    page.reload()
    expect(page.locator("#here tr.changed a")).to_have_text(name)
    page.get_by_role("button", name="Reset all").click()
    expect(page.locator("#next th")).to_have_text(["Token", "original", "replaced"])


def test_mistakes_are_told_on_the_page(browser, served):
    """The console has the answer's status, so this page may say something there."""
    page = browser.new_page()
    go(page, served, "prompt")
    page.get_by_label("Prompt").fill("ab " * 40)
    page.get_by_label("Prompt").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("tokens; wanted 1 to 15")
    page.goto(f"{served}#/feature/9/9")
    expect(page.get_by_role("alert")).to_contain_text("no feature 9 of layer 9")
    page.goto(f"{served}#/nowhere")
    expect(page.get_by_role("alert")).to_contain_text("There is no page #/nowhere")
    page.close()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_has_the_readers_colours_and_a_narrow_window_needs_no_scrolling_sideways(browser, served, scheme):
    page = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
    for place in ("", "features", "feature/0/0", f"prompt?text={TEXT.replace(' ', '+')}"):
        go(page, served, place)
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
        )
        assert max(red, green, blue) < 60 if scheme == "dark" else min(red, green, blue) > 200
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), place
    page.close()


def test_static_pages_have_no_prompt(page, hosted):
    go(page, hosted)
    expect(page.get_by_role("link", name="Prompt")).to_be_hidden()
    go(page, hosted, "feature/0/0")
    assert page.get_by_text("change it in a prompt").count() == 0
