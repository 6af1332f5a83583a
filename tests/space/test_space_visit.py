"""Visits to the Space in a real browser. What the browser complains of, and any request to elsewhere, is a failure."""

import base64
import re
import threading
import time

import pytest
from playwright.sync_api import expect

from tests.space.conftest import NO_WARNINGS, REPOSITORY

pytestmark = NO_WARNINGS

SAMPLES = REPOSITORY / "samples"
PATIENCE = 120_000
"""Milliseconds to wait for what must come; machines may be busy."""


PASTE = """
(box, image) => {
  const bytes = Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
  box.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
}
"""


class Visitor:
    """A browser window of its own, with all that went wrong in it."""

    def __init__(self, browser, space, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._see(request.url, space))
        self.page.goto(space)
        self.page.locator("#conversation").get_by_text("airplane", exact=True).wait_for()

    def _hear(self, message):
        if message.type in ("warning", "error"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _see(self, url, space):
        if not url.startswith((space, "data:", "blob:")):
            self.complaints.append(f"request to {url}")

    def open_tab(self, name):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def ask(self, text, image=None):
        if image is not None:
            self.page.locator("#message input[type=file]").set_input_files(str(image))
            self.page.locator("#message .thumbnail-item, #message img").first.wait_for()
        box = self.page.locator("#message textarea")
        box.fill(text)
        box.press("Enter")

    def paste(self, image):
        """Pastes an image into the chat, as the browser does after Ctrl+V."""
        self.page.locator("#message textarea").evaluate(PASTE, base64.b64encode(image.read_bytes()).decode())
        self.page.locator("#message .thumbnail-item, #message img").first.wait_for()

    def clear(self):
        self.page.get_by_label("Clear", exact=True).first.click()
        self.answers().first.wait_for(state="detached")
        self.page.locator("#message textarea:enabled").wait_for()

    def answers(self):
        return self.page.locator("#conversation [data-testid=bot]")

    def wait_for_text(self, number, text):
        """Waits until an answer is `text`; says what it is if it is something else."""
        expect(self.answers().nth(number)).to_have_text(text, timeout=PATIENCE)

    def wait_for_answer(self, number):
        self.answers().nth(number).wait_for()
        return self.answers().nth(number)


@pytest.fixture
def visit(browser, space):
    visitors = []

    def come(**options):
        visitors.append(Visitor(browser, space, **options))
        return visitors[-1]

    yield come
    complaints = [complaint for visitor in visitors for complaint in visitor.complaints]
    for visitor in visitors:
        visitor.context.close()
    assert not complaints


def test_ask_about_an_upload_retry_undo_and_clear(visit):
    me = visit()
    assert me.answers().count() == 2  # the worked example
    me.clear()
    me.ask("What is in the image?", SAMPLES / "horse.png")
    me.wait_for_text(0, "horse")
    me.page.get_by_role("button", name="Retry").click()  # as soon as the answer is there
    me.page.wait_for_timeout(1000)
    me.page.locator("#message textarea:enabled").wait_for()
    me.wait_for_text(0, "horse")
    me.page.get_by_role("button", name="Undo").click()
    me.answers().first.wait_for(state="detached")
    expect(me.page.locator("#message textarea")).to_have_value("What is in the image?", timeout=PATIENCE)


def test_a_question_taken_back_at_once_stays_in_the_box(visit):
    me = visit()
    me.clear()
    for question in ("How many objects are there?", "What is in the image?"):
        me.ask(question)
        me.page.get_by_role("button", name="Undo").click()  # as soon as it is there
        me.answers().first.wait_for(state="detached")
        me.page.wait_for_timeout(1500)  # what follows an answer takes less
        expect(me.page.locator("#message textarea")).to_have_value(question)


def test_clearing_stops_the_answer_that_is_being_written(visit, monkeypatch):
    closed = threading.Event()
    read = []  # before the question after, by the model

    def remember(text, files, history, *options):
        read.extend(history)
        yield from ask(text, files, history, *options)

    def talk(*_):
        try:
            for words in range(1, 1000):
                yield " ".join(["word"] * words)
                time.sleep(0.05)
        finally:
            closed.set()

    import chat_tab

    ask = chat_tab.ask
    me = visit()
    me.clear()
    monkeypatch.setattr(chat_tab, "ask", talk)
    me.ask("Tell me all.")
    me.wait_for_answer(0).get_by_text("word word word").wait_for()
    me.clear()
    assert closed.wait(timeout=PATIENCE / 1000)
    monkeypatch.setattr(chat_tab, "ask", remember)
    me.ask("What is in the image?", SAMPLES / "horse.png")
    me.wait_for_text(0, "horse")
    assert me.answers().count() == 1
    assert not read
    assert me.page.locator("#conversation").get_by_text("word").count() == 0


def test_an_image_is_pasted(visit):
    me = visit()
    me.clear()
    me.paste(SAMPLES / "horse.png")
    me.ask("What is in the image?")
    me.wait_for_text(0, "horse")


def test_wrong_file_is_explained_and_the_chat_goes_on(visit, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    me = visit()
    me.ask("What is in the image?", tmp_path / "broken.png")
    me.page.get_by_text("broken.png is not an image").wait_for()
    me.clear()
    me.ask("What is in the image?", SAMPLES / "horse.png")
    me.wait_for_text(0, "horse")


def test_two_visitors_at_once_see_their_own_answers(visit):
    one, other = visit(), visit(viewport={"width": 390, "height": 844}, color_scheme="dark")
    one.clear()
    other.clear()
    one.ask("What is in the image?", SAMPLES / "horse.png")
    other.ask("What is in the image?", SAMPLES / "airplane.png")
    one.wait_for_text(0, "horse")
    other.wait_for_text(0, "airplane")
    assert other.page.locator("#conversation").get_by_text("horse").count() == 0


def test_every_tab_shows_what_it_promises(visit):
    me = visit()
    me.open_tab("Codes")
    shown = me.page.locator("#tokenizer-shown")
    before = shown.inner_html()
    slider = me.page.get_by_role("slider", name="Patches to hide")
    slider.focus()
    slider.press("End")  # the keyboard is enough
    shown.get_by_text("63 of 64 patches hidden").wait_for()
    assert shown.inner_html() != before
    me.open_tab("Imagine")
    me.page.get_by_role("button", name="Complete", exact=True).click()
    me.page.locator("#completed").get_by_text("6 of 8 rows given, 0 written").wait_for()  # it comes row by row
    me.page.locator("#completed").get_by_text("6 of 8 rows given, 2 written").wait_for()
    me.open_tab("Look inside")
    me.page.locator("#attention-words").get_by_text("airplane").click()
    me.page.locator("#attention-maps img[alt*='Layer 1, airplane']").wait_for()
    images = me.page.locator("img").all()
    assert all((image.get_attribute("alt") or "").strip() for image in images)


def test_drawing_is_watched_and_stopped(visit):
    me = visit()
    me.open_tab("Imagine")
    me.page.get_by_role("tab", name="Draw a caption").click()
    drawn = me.page.locator("#drawn")
    me.page.locator("#draw-caption input, #draw-caption textarea").press("Enter")
    drawn.get_by_text(re.compile("[1-7] of 8 rows written")).wait_for()
    me.page.get_by_role("button", name="Stop", exact=True).last.click()
    generating = [thread for thread in threading.enumerate() if thread.name == "generate"]
    for thread in generating:
        thread.join(timeout=PATIENCE / 1000)
        assert not thread.is_alive()
    assert "8 of 8 rows" not in drawn.inner_text()


def test_everything_fits_on_a_phone(visit):
    me = visit(viewport={"width": 390, "height": 844})
    for tab in ("Chat", "Codes", "Imagine", "Look inside"):
        me.open_tab(tab)
        assert me.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
