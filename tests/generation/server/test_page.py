"""The page in a real browser: a chat, its figures, an end by the user, an error."""

import base64

import pytest

from tests.generation.server.browser import browsing
from tests.generation.server.serving import BYTES, GatedEngine, serving

pytestmark = pytest.mark.extended
HELLO = BYTES.encode("Hi <b>there</b>!", bos=False)


def send(page, text):
    page.run(f"$('text').value = {text!r}; $('form').requestSubmit()")


def answers(page):
    return page.run("[...document.querySelectorAll('.message span')].map(e => e.textContent)")


def test_a_chat_in_a_browser(tmp_path):
    engine = GatedEngine(HELLO, open_=True)
    with serving(engine) as client, browsing(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{client.port}/")
        page.until("$('model').textContent === 'tiny'")
        page.until("$('figures').textContent.includes('0 of 4 running')")
        assert page.run("$('engine').textContent") == "scripted, one call for many tokens"
        page.run("$('tokens').value = 16")
        send(page, "Hello <i>you</i>")
        page.until("!running && messages.length === 2")
        assert answers(page) == ["Hello <i>you</i>", "Hi <b>there</b>!"]
        page.until("/tokens\\/s/.test($('figures').textContent)")

        engine.open = False
        send(page, "Again")
        page.until("running")
        engine.gate.release(3)
        page.until("document.querySelectorAll('.message')[3].textContent.endsWith('Hi ')")
        page.until("$('send').textContent === 'Stop'")
        page.run("$('form').requestSubmit()")
        page.until("!running && $('send').textContent === 'Send'")
        with engine.left:
            assert engine.left.wait_for(lambda: engine.cancelled, 60)

        send(page, "x" * 300)
        error = page.until("(document.querySelector('.error span') || {}).textContent")
        assert "exceeds the available context size" in error
        # the message is taken back, to be mended
        assert page.run("[messages.length, $('text').value.length]") == [4, 300]
        picture = page.call("Page.captureScreenshot")["data"]
        (tmp_path / "page.png").write_bytes(base64.b64decode(picture))
        page.run("$('reset').click()")
        assert answers(page) == []
        # the refusal above is logged as a failed resource
        errors = [
            failure.get("entry", {"level": "error", "source": ""}) for failure in page.failures
        ]
        errors = [entry for entry in errors if entry["level"] == "error"]
        assert [entry for entry in errors if entry["source"] != "network"] == []
