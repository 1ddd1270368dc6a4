"""The page of ``fedpt serve``, used in a real browser: Debian's chromium, driven by Playwright."""

import json
import re
import shutil
import urllib.request
from contextlib import contextmanager

import pytest
from serving import make_run, serving

from fedpt_flwr.runs import replace_link

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with Playwright: pip install playwright"
)
expect = sync_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in chromium, which is not installed"),
]

MODELS = ("proxy", "large", "tuned")
REFUSED = r"Failed to load resource"
"""What chromium itself writes to the console for a response that is an error."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def service(run):
    with serving(run, "--poll-s", "0.2") as service:
        yield service


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, service, *, at="", wrong="", script="", **context):
    """A page of the service. It may ask no other host, and write no error to the console but what ``wrong`` matches."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
    context.set_default_timeout(20_000)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(f"uncaught: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    if script:
        page.add_init_script(script)
    page.goto(service.url + "/" + at)
    expect(page.locator("#facts")).to_contain_text("version", timeout=20_000)
    yield page
    context.close()
    assert [text for text in said if not (wrong and re.search(wrong, text))] == []
    assert [url for url in asked if not url.startswith(service.url)] == []


@pytest.fixture
def page(browser, service):
    with opened(browser, service) as page:
        yield page


def card(page, model, part=""):
    return page.locator(f".card.{model} {part}".strip())


def answer(page, model):
    """The text of an answer as it would be copied: without what is only drawn."""
    return card(page, model, ".answer").evaluate("node => node.textContent")


def wait_until_answered(page, models=MODELS):
    for model in models:
        expect(card(page, model, ".answer")).to_have_attribute("aria-busy", "false", timeout=30_000)
        expect(card(page, model, ".answer")).not_to_have_class(re.compile("old"))


def ask(page, prompt):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Control+Enter")
    wait_until_answered(page)


def api(service, path, **body):
    request = urllib.request.Request(
        service.url + path, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def completion(service, prompt, model, **settings):
    """The only choice, by the API, as the page asks for it unless ``settings`` say otherwise."""
    longest = api(service, "/info")["max_tokens"]
    body = {"prompt": prompt, "model": model, "temperature": 0, "max_tokens": longest} | settings
    return api(service, "/v1/completions", **body)["choices"][0]


def example(service, number=0):
    return api(service, "/info")["examples"][number]


def stream(*chunks, ended=True):
    """Chunks as the service would send them."""
    events = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
    return "".join(events) + ("data: [DONE]\n\n" if ended else "")


def chunk(text, *details):
    return {"choices": [{"index": 0, "text": text, "finish_reason": None} | ({"fedpt": details} if details else {})]}


def detail(token, *, changed=True):
    return {
        "token": token, "id": 7, "probability": 0.75, "large_probability": 0.0625, "large_token": "\n other",
        "large_token_probability": 0.5, "changed": changed,
    }  # fmt: skip


def give(page, model, body="", **response):
    """Let a model's answer be this, in place of the service's."""
    kind = {"status": 200, "content_type": "text/event-stream; charset=utf-8", "body": body} | response

    def handle(route):
        route.fulfill(**kind) if route.request.post_data_json["model"] == model else route.fallback()

    page.route("**/v1/completions", handle)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_typed_prompt_is_answered_by_three_models_as_the_api_answers(page, service):
    prompt = example(service)["prompt"]
    page.locator("#prompt").press_sequentially(prompt)
    page.click("#start")
    wait_until_answered(page)
    for model in MODELS:
        assert answer(page, model) == completion(service, prompt, model)["text"]
        expect(card(page, model, ".speed")).to_have_text(
            re.compile(r"^first token after \d+\.\d\d s · \d+ tokens · [\d.]+ tokens/s")
        )
    assert answer(page, "proxy") != answer(page, "large")


def test_marked_tokens_are_those_that_large_would_not_say(page, service):
    prompt = example(service)["prompt"]
    ask(page, prompt)
    changed = [token for token in completion(service, prompt, "proxy", details=True)["fedpt"] if token["changed"]]
    marks = page.locator(".changed")
    assert changed
    assert marks.count() == len(changed)
    assert "underline" in marks.first.evaluate("node => getComputedStyle(node).textDecorationLine")
    expect(card(page, "proxy", ".marks")).to_contain_text(f"{len(changed)} of ")


def test_alpha_zero_makes_the_proxy_large_and_asks_the_proxy_alone(page, service):
    ask(page, example(service)["prompt"])
    assert page.locator(".changed").count() > 0
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    page.fill("#alpha-number", "0")
    expect(page.locator(".changed")).to_have_count(0)
    wait_until_answered(page)
    assert answer(page, "proxy") == answer(page, "large")
    assert [(body["model"], body["alpha"]) for body in asked] == [("proxy", 0)]
    page.click("#alpha-reset")
    expect(page.locator(".changed")).not_to_have_count(0)


def test_slider_moves_by_keys_and_the_last_place_counts(page, service):
    prompt = example(service)["prompt"]
    ask(page, prompt)
    page.focus("#alpha")
    with page.expect_request(lambda request: request.method == "POST" and request.post_data_json.get("alpha") == 0.5):
        for _ in range(10):
            page.keyboard.press("ArrowLeft")
        assert page.input_value("#alpha-number") == "0.5"
    expect(page).to_have_url(re.compile("alpha=0.5"))
    wait_until_answered(page)
    assert answer(page, "proxy") == completion(service, prompt, "proxy", alpha=0.5)["text"]


def test_temperature_and_seed_reach_the_models(page, service):
    prompt = example(service)["prompt"]
    page.fill("#temperature-number", "1.3")
    page.fill("#seed", "11")
    page.fill("#max_tokens", "9")
    ask(page, prompt)
    for model in MODELS:
        expected = completion(service, prompt, model, temperature=1.3, seed=11, max_tokens=9)
        assert answer(page, model) == expected["text"]


def test_page_asks_for_pieces_and_shows_them_as_they_come(browser, service):
    # The page's own fetch gets a stream that the test feeds: what is there must be shown before there is more.
    feed = """
        window.feeds = [];
        const original = window.fetch;
        window.fetch = async (url, options) => {
          if (!options?.body) return original(url, options);
          const body = new ReadableStream({ start: (feed) => window.feeds.push(feed) });
          return new Response(body, { headers: { "Content-Type": "text/event-stream" } });
        };
        window.send = (number, text) => window.feeds[number].enqueue(new TextEncoder().encode(text));
    """
    with opened(browser, service, script=feed) as page:
        page.fill("#prompt", "a")
        page.click("#start")
        page.evaluate("text => send(0, text)", stream(chunk("one"), ended=False))
        expect(card(page, "proxy", ".answer")).to_have_text("one")
        expect(card(page, "large", ".answer")).to_have_text("")
        page.fill("#alpha-number", "0.5")
        expect(card(page, "proxy", ".answer")).to_have_class(re.compile("old"))
        page.evaluate("text => send(3, text)", stream(chunk("tw"), ended=False))
        expect(card(page, "proxy", ".answer")).to_have_text("tw")
        page.evaluate("text => send(0, text)", stream(chunk(" late"), ended=False))  # the older stream goes on
        page.evaluate("text => send(3, text)", stream(chunk("o")))
        expect(card(page, "proxy", ".answer")).to_have_attribute("aria-busy", "false")
        assert answer(page, "proxy") == "two"
        expect(page.locator("#stop")).to_have_attribute("aria-disabled", "false")  # large and tuned still write
        for number in (1, 2):
            page.evaluate("([number, text]) => send(number, text)", [number, stream(chunk("three"))])
        expect(page.locator("#announcement")).to_have_text(
            "proxy: two. each token is what large alone would say large: three. tuned: three."
        )
        expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true")


def test_stream_may_be_cut_anywhere(page):
    text = ": ping\n\n" + stream(chunk("é 漢 🎉 <b>")).replace("\n\n", "\r\n\r\n", 1)
    texts = page.evaluate(
        """async (text) => {
          const bytes = new TextEncoder().encode(text), texts = [];
          for (let size = 1; size < 40; size++) {
            const stream = new ReadableStream({ start(feed) {
              for (let at = 0; at < bytes.length; at += size) feed.enqueue(bytes.slice(at, at + size));
              feed.close();
            } });
            for await (const event of events(stream)) texts.push(event.choices[0].text);
          }
          return texts;
        }""",
        text,
    )
    assert texts == ["é 漢 🎉 <b>"] * 39


def test_tokens_wait_for_text_that_comes_later(page):
    half = [detail("�"), detail("�", changed=False)]
    give(
        page,
        "proxy",
        stream(
            chunk("", detail("ab", changed=False)),
            chunk("", half[0]),
            chunk("abé", half[1]),
            chunk("\n", detail("\n")),
            chunk("", detail("</s>")),
        ),
    )
    ask(page, "a")
    assert answer(page, "proxy") == "abé\n"
    marks = page.locator(".changed")
    assert marks.all_text_contents() == ["é", "\n", ""]
    assert [mark.get_attribute("data-shown") for mark in marks.all()] == [None, "⏎", "∎"]


def test_text_of_a_model_is_never_html(page):
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    give(page, "proxy", stream(chunk(text, detail(text))))
    give(page, "large", stream(chunk(text)))
    ask(page, "a")
    page.locator(".changed").hover()
    assert answer(page, "proxy") == answer(page, "large") == text
    expect(page.locator("#popover")).to_contain_text(text)
    assert page.locator("img, .card b").count() == 0


# --- marked tokens ----------------------------------------------------------------------------------------------------


def test_marked_token_says_by_pointer_what_large_would_have_said(page):
    give(page, "proxy", stream(chunk("x", detail("x", changed=False)), chunk(" say", detail(" say"))))
    ask(page, "a")
    popover = page.locator("#popover")
    expect(popover).to_be_hidden()
    page.locator(".changed").hover()
    lines = [line.text_content() for line in popover.locator("p").all()]
    assert lines == ["proxy says ␣say75.0 %", "large gives it ␣say6.3 %", "large alone would say ⏎␣other50.0 %"]
    popover.hover()
    page.wait_for_timeout(400)
    expect(popover).to_be_visible()
    page.mouse.move(5, 5)
    expect(popover).to_be_hidden()


def test_marked_tokens_are_reached_by_keys(page, service):
    prompt = example(service)["prompt"]
    ask(page, prompt)
    changed = [token for token in completion(service, prompt, "proxy", details=True)["fedpt"] if token["changed"]]
    popover = page.locator("#popover")
    page.focus("#plausibility-number")
    for key, token in (("Tab", changed[0]), ("ArrowRight", changed[1]), ("End", changed[-1]), ("Home", changed[0])):
        page.keyboard.press(key)
        expect(page.locator(".changed.open")).to_be_focused()
        expect(page.locator(".changed.open")).to_have_attribute("aria-describedby", "popover")
        of_proxy, _, of_large = (share.removesuffix(" %") for share in popover.locator(".share").all_text_contents())
        assert float(of_proxy) == pytest.approx(100 * token["probability"], abs=0.051)
        assert float(of_large) == pytest.approx(100 * token["large_token_probability"], abs=0.051)
    page.keyboard.press("Escape")
    expect(popover).to_be_hidden()


# --- examples, settings, memory ---------------------------------------------------------------------------------------


def test_example_brings_its_right_answer_until_the_prompt_is_edited(page, service):
    page.select_option("#example", "1")
    assert page.input_value("#prompt") == example(service, 1)["prompt"]
    expect(page.locator("#right")).to_have_text(f"Right answer: {example(service, 1)['answer'].strip()}")
    page.locator("#prompt").press("End")
    page.keyboard.type("x")
    expect(page.locator("#right")).to_be_hidden()
    assert page.input_value("#example") == ""


def test_answer_that_is_the_right_one_is_said_to_be(page, service):
    give(page, "tuned", stream(chunk(example(service)["answer"])))
    page.select_option("#example", "0")
    page.click("#start")
    wait_until_answered(page)
    expect(card(page, "tuned", ".verdict")).to_have_text("✓ the right answer")


def test_empty_prompt_cannot_be_run_and_the_page_says_why(page):
    start = page.locator("#start")
    expect(start).to_have_attribute("aria-disabled", "true")
    expect(page.locator("#reason")).to_have_text("Write a prompt or choose an example first.")
    asked = []
    page.on("request", lambda request: asked.append(request) if request.method == "POST" else None)
    start.click(force=True)
    page.press("#prompt", "Control+Enter")
    page.fill("#prompt", "a")
    expect(start).to_have_attribute("aria-disabled", "false")
    assert asked == []


def test_number_that_does_not_fit_is_refused_and_gives_way(page):
    page.fill("#prompt", "a")
    page.locator("#max_tokens").fill("0")
    expect(page.locator("#reason")).to_have_text("Longest answer takes a whole number from 1.")
    expect(page.locator("#start")).to_have_attribute("aria-disabled", "true")
    page.focus("#prompt")
    expect(page.locator("#start")).to_have_attribute("aria-disabled", "false")
    assert int(page.input_value("#max_tokens")) > 0


def test_reload_keeps_prompt_and_settings(page):
    page.fill("#prompt", "two\nlines é & = # +\n")
    page.fill("#alpha-number", "-0.35")
    page.fill("#plausibility-number", "0.2")
    page.fill("#temperature-number", "0.7")
    page.fill("#seed", "-5")
    expect(page).to_have_url(re.compile("seed=-5"))
    page.reload()
    expect(page.locator("#facts")).to_contain_text("version")
    assert page.input_value("#prompt") == "two\nlines é & = # +\n"
    numbers = [
        page.input_value(name) for name in ("#alpha-number", "#plausibility-number", "#temperature-number", "#seed")
    ]
    assert numbers == ["-0.35", "0.2", "0.7", "-5"]


def test_what_the_address_holds_is_checked(browser, service):
    with opened(browser, service, at="#prompt=a&alpha=NaN&temperature=9&seed=1.5&max_tokens=-1&plausibility=1") as page:
        info = api(service, "/info")
        assert page.input_value("#prompt") == "a"
        assert float(page.input_value("#alpha-number")) == info["alpha"]
        assert float(page.input_value("#plausibility-number")) == info["plausibility"]
        assert page.input_value("#temperature-number") == page.input_value("#seed") == "0"
        assert int(page.input_value("#max_tokens")) == info["max_tokens"]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_refusal_is_a_sentence_in_its_card_and_the_others_go_on(browser, service):
    with opened(browser, service, wrong=REFUSED) as page:
        give(page, "large", json.dumps({}), status=429, headers={"retry-after": "3"}, content_type="application/json")
        give(page, "tuned", "<html>", status=502, content_type="text/html")
        ask(page, example(service)["prompt"])
        expect(card(page, "large", ".error")).to_have_text("The service is busy: try again in 3 s.")
        expect(card(page, "tuned", ".error")).to_have_text("The service failed (HTTP 502).")
        expect(card(page, "proxy", ".error")).to_be_hidden()
        assert answer(page, "proxy")


def test_prompt_that_is_too_long_is_refused_in_the_services_words(browser, service):
    with opened(browser, service, wrong=REFUSED) as page:
        ask(page, "a prompt " * 2000)
        for model in MODELS:
            expect(card(page, model, ".error")).to_contain_text("The service refused this. It says: ")
            expect(card(page, model, ".error")).to_contain_text("context")


def test_answer_that_breaks_off_stays_and_says_so(page):
    give(page, "large", stream(chunk("half"), ended=False))
    give(page, "tuned", stream(chunk("half"), {"error": {"message": "too late"}}))
    ask(page, "a")
    assert answer(page, "large") == answer(page, "tuned") == "half"
    expect(card(page, "large", ".error")).to_contain_text("The answer broke off")
    expect(card(page, "tuned", ".error")).to_contain_text("too late")


def test_stopped_answer_stays(page, service):
    page.fill("#temperature-number", "2")
    page.fill("#max_tokens", "400")
    page.fill("#prompt", example(service)["prompt"])
    page.click("#start")
    expect(card(page, "proxy", ".answer")).not_to_have_text("")
    page.click("#stop")
    wait_until_answered(page)
    assert answer(page, "proxy")
    expect(page.locator(".speed", has_text="stopped")).not_to_have_count(0)  # one may have ended by itself before
    expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true")


def test_service_that_is_gone_is_said_in_the_cards_and_above(run, browser):
    with serving(run) as service, opened(browser, service, wrong=REFUSED) as page:
        ask(page, example(service)["prompt"])
        service.process.kill()
        service.process.wait()
        ask(page, "a")
        for model in MODELS:
            expect(card(page, model, ".error")).to_have_text("The service cannot be reached. Is it still running?")
        expect(page.locator("#trouble")).to_contain_text("The service cannot be reached.", timeout=15_000)


def test_browser_that_was_asked_for_the_key_sends_it_along(run, browser):
    given = {"username": "me", "password": "open sesame"}
    with (
        serving(run, "--api-key", "open sesame") as service,
        opened(browser, service, http_credentials=given) as page,
    ):
        ask(page, "a")
        for model in MODELS:
            expect(card(page, model, ".error")).to_be_hidden()


# --- a new round ------------------------------------------------------------------------------------------------------


def test_new_version_is_named_in_the_header_and_old_answers_say_theirs(run, browser):
    with serving(run, "--poll-s", "0.1") as service, opened(browser, service) as page:
        expect(page.locator("#facts")).to_contain_text("round 3")
        ask(page, example(service)["prompt"])
        before = api(service, "/info")["version"]
        replace_link(run / "proxy", "rounds/0002/proxy")
        try:
            expect(page.locator("#notice")).to_contain_text("round 2 (before: round 3)", timeout=20_000)
            expect(page.locator("#facts")).to_contain_text("round 2")
            expect(card(page, "proxy", ".version")).to_have_text(f"answered by version {before}")
            ask(page, example(service)["prompt"])
            expect(card(page, "proxy", ".version")).to_have_text("")
        finally:
            replace_link(run / "proxy", "rounds/0003/proxy")


# --- looks ------------------------------------------------------------------------------------------------------------


def brightness(page):
    colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_colours_follow_the_system_until_the_reader_chooses(browser, service):
    with opened(browser, service, color_scheme="dark") as page:
        assert brightness(page) < 200
        page.click("#theme")
        assert brightness(page) > 600
        page.reload()
        assert brightness(page) > 600
    with opened(browser, service, color_scheme="light") as page:
        assert brightness(page) > 600


def test_page_works_where_nothing_may_be_stored(browser, service):
    forbid = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    with opened(browser, service, script=forbid) as page:
        page.click("#theme")
        assert brightness(page) < 200
        ask(page, "a")


def test_phone_has_no_sideways_scroll_and_a_tap_opens_a_token(browser, service):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with opened(browser, service, **phone) as page:
        give(page, "large", stream(chunk("unbroken" * 40)))
        ask(page, example(service)["prompt"])
        mark = page.locator(".changed").last
        mark.tap()
        box = page.locator("#popover").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        tops = [card(page, model).bounding_box()["y"] for model in MODELS]
        assert tops == sorted(set(tops))  # one below the other
        card(page, "tuned", "h2").tap()
        expect(page.locator("#popover")).to_be_hidden()


def test_everything_that_can_be_set_has_a_name(page):
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea, button")]
            .filter((node) => !node.labels?.length && !node.ariaLabel && !node.textContent).map((node) => node.id)"""
    )
    assert unnamed == []
