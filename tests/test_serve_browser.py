"""The chat page in a real browser: it streams an answer and shows what this request measured."""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Running, serving, tiny_artifact
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from owl_deploy.serve import server
from owl_deploy.serve.routes import Service, application

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed")]

# A page of the same origin that uses the chat page in a frame as a person would, and writes down what it sees.
DRIVER = """<!doctype html><meta charset="utf-8">
<iframe id="frame" src="/" style="width: {width}px; height: 700px; border: 0"></iframe>
<script>
const wait = (claim) => new Promise((resolve) => {{
  const timer = setInterval(() => {{ if (claim()) {{ clearInterval(timer); resolve(); }} }}, 20);
}});
const frame = document.getElementById("frame");
frame.addEventListener("load", async () => {{
  const page = frame.contentDocument, lengths = new Set();
  const answers = () => [...page.querySelectorAll(".turn.assistant")];
  const ask = async (text) => {{
    const n = answers().length;
    page.getElementById("prompt").value = text;
    page.getElementById("send").click();
    await wait(() => {{
      const turn = answers()[n];
      if (turn) lengths.add(turn.querySelector(".text").textContent.length);
      return turn && page.getElementById("stop").hidden;
    }});
  }};
  await wait(() => page.getElementById("mode").textContent !== "One moment …");
  page.getElementById("temperature").value = "0";
  page.getElementById("max-tokens").value = "{max_tokens}";
  const texts = {texts};
  for (const text of texts) await ask(text);
  const seen = {{
    model: page.getElementById("model").textContent,
    mode: page.getElementById("mode").textContent,
    turns: [...page.querySelectorAll(".turn")].map((turn) => turn.querySelector(".text").textContent),
    figures: answers().map((turn) => turn.querySelector(".figures").textContent),
    n_lengths: lengths.size,
    asks_for_key: !page.getElementById("key-label").hidden,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    owned: frame.contentWindow.owned === true,
  }};
  await fetch("/seen", {{ method: "POST", body: JSON.stringify(seen) }});
}});
</script>"""


@dataclasses.dataclass
class Driver:
    """What the driving page is filled in with, and what it saw. Time is real: virtual time would outrun answers."""

    texts: str = '["hi"]'
    seen: queue.Queue[dict[str, Any]] = dataclasses.field(default_factory=queue.Queue)

    def browse(self, running: Running, folder: Path) -> dict[str, Any]:
        """Open the driving page; returns what it saw."""
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", f"{running.url}/driver"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                return self.seen.get(timeout=60)
            finally:
                browser.terminate()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Serve the driving page too, at /driver, and take its report at /seen."""
    driver = Driver()

    def with_driver(service: Service) -> ASGIApp:
        app = application(service)

        async def routed(scope: Scope, receive: Receive, send: Send) -> None:
            answer: ASGIApp = app
            if scope["path"] == "/driver":
                answer = HTMLResponse(DRIVER.format(width=390, max_tokens=30, texts=driver.texts))
            elif scope["path"] == "/seen":
                driver.seen.put(await Request(scope, receive).json())
                answer = Response()
            await answer(scope, receive, send)

        return routed

    monkeypatch.setattr(server, "application", with_driver)
    return driver


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("browser"))


def test_page_holds_a_conversation_and_shows_its_speed(artifact: Path, driver: Driver, tmp_path: Path) -> None:
    driver.texts = '["hi", "and <b>you</b>"]'
    with serving(artifact) as running:
        found = driver.browse(running, tmp_path)
        messages: Any = [{"role": "user", "content": "hi"}]
        turns = [messages[0]["content"]]
        for text in ("and <b>you</b>", ""):
            answer = running.client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=30, temperature=0
            ).choices[0]
            messages += [{"role": "assistant", "content": answer.message.content}, {"role": "user", "content": text}]
            turns += [answer.message.content or "", text]
    assert found["model"] == "tiny"
    assert found["turns"] == turns[:-1]
    assert found["n_lengths"] > 1
    for figures in found["figures"]:
        assert "tokens/s, first token after " in figures
        assert " ms, " in figures
    assert found["overflow"] <= 0
    assert not found["asks_for_key"]


def test_page_goes_on_with_text_where_there_is_no_template(driver: Driver, tmp_path: Path) -> None:
    with serving(tiny_artifact(tmp_path, template=None)) as running:
        found = driver.browse(running, tmp_path)
        answer = running.client.completions.create(model="tiny", prompt="hi", max_tokens=30, temperature=0)
    assert "no chat template" in found["mode"]
    assert found["turns"] == ["hi", answer.choices[0].text]


def test_page_shows_text_of_the_model_as_text(driver: Driver, tmp_path: Path) -> None:
    attack = "<img src=x onerror='window.owned = true'>"
    refusing = "{{ raise_exception(messages[0].content) }}"
    driver.texts = json.dumps([attack])
    with serving(tiny_artifact(tmp_path, template=refusing)) as running:
        found = driver.browse(running, tmp_path)
    assert attack in found["figures"][0]
    assert found["turns"][0] == attack
    assert found["owned"] is False


def test_page_asks_for_the_key(artifact: Path, driver: Driver, tmp_path: Path) -> None:
    driver.texts = "[]"
    with serving(artifact, environment={"OWL_DEPLOY_API_KEY": "s3cret"}) as running:
        found = driver.browse(running, tmp_path)
    assert found["asks_for_key"]
    assert "API key" in found["mode"]
