"""The web page of experiments.serve: what it may do, and, in a headless Chromium where there is one, what a user does with it."""

import asyncio
import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import time

import pytest

from tests.experiments import scripted_engine
from tests.experiments.test_serve_parts import listening
from tests.scripted_answers import ONE, TOOLS

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def test_the_page_needs_nothing_from_elsewhere_and_no_key():
    """A browser is told to run its own script alone, and to let no other page hold it."""
    tokenizer = scripted_engine.tokenizer()
    with listening(tokenizer, make=lambda: scripted_engine.Scripted(tokenizer, ["x"]), keys=("k" * 16,)) as (port, _):
        status, headers, text = get(port, "/")
        assert status == 200 and get(port, "/v1/models")[0] == 401 and get(port, "/metrics")[0] == 401
    policy = headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html; charset=utf-8" and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/=]{44}'", policy)) == 2
    assert not re.search(r"https?:|//\w|innerHTML|insertAdjacentHTML|document\.write|\son\w+=\"|style=\"", text)


class Browser:
    """A tab of a headless Chromium, by its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.number, self.wrong = socket, 0, []

    async def send(self, method, **params):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            found = await self.socket.receive_json(timeout=60)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            if found.get("method") == "Runtime.exceptionThrown":
                self.wrong.append(found["params"]["exceptionDetails"])
            entry = found["params"]["entry"] if found.get("method") == "Log.entryAdded" else {"level": "verbose"}
            if entry["level"] != "verbose" and entry["source"] != "network":
                self.wrong.append(entry)

    async def run(self, script):
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script, most_s=60):
        """Waits until a script's value, which may be an element, is one."""
        end = time.monotonic() + most_s
        while not (value := await self.run(f"((x) => x instanceof Node || x)({script})")):
            assert time.monotonic() < end, (script, await self.run("document.body.innerText"))
            await asyncio.sleep(0.05)
        return value

    async def type(self, text, enter=True):
        """Types into what has the focus."""
        await self.send("Input.insertText", text=text)
        if enter:
            for kind in ("keyDown", "keyUp"):
                await self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    async def click(self, selector):
        place = await self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    async def screenshot(self, path):
        path.write_bytes(base64.b64decode((await self.send("Page.captureScreenshot"))["data"]))


@contextlib.asynccontextmanager
async def opened(url, folder):
    """A Browser on a page."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1100,800"]
    process = subprocess.Popen([CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        port, end = folder / "DevToolsActivePort", time.monotonic() + 90
        while not port.exists() or not port.read_text().strip():
            assert process.poll() is None and time.monotonic() < end, "Chromium does not start"
            await asyncio.sleep(0.1)
        root = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{root}/json/new?about:blank") as answer:
                address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=1 << 26) as socket:
                browser = Browser(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await browser.send(f"{domain}.enable")
                await browser.send("Page.navigate", url=url)
                yield browser
    finally:
        process.kill()
        process.wait()


THOUGHT = "<think>\nFirst I think about it, <i>quietly</i>.\n</think>\n\n<b>Hello</b> & bye 你好\n<script>window.bad = 1</script>"
LAST = "document.querySelector('#turns').lastElementChild"


async def use(browser, engine, tokenizer, tmp_path):
    await browser.until("document.getElementById('name')?.textContent === 'm'")
    # A message, by the keyboard; its answer has reasoning, folded, and tags that stay text.
    await browser.type("Say hello")
    await browser.until(f"{LAST}.querySelector('.note')")
    assert await browser.run(f"{LAST}.querySelector('.content').textContent") == THOUGHT.partition("</think>\n\n")[2]
    assert await browser.run(f"[{LAST}.querySelectorAll('b, i, script').length, window.bad ?? null]") == [0, None]
    thinking = "document.querySelector('.thinking')"
    assert await browser.run(f"{thinking}.open") is False and (await browser.run(f"{thinking}.firstChild.textContent")).startswith(
        "Thought for"
    )
    await browser.click(".thinking summary")
    assert await browser.run(f"[{thinking}.open, {thinking}.lastChild.textContent]") == [True, "First I think about it, <i>quietly</i>."]
    # Settings, tools, and a call whose result the user gives.
    await browser.click("#show")
    for name, value in (("temperature", "0.5"), ("top_k", "7"), ("seed", "3"), ("system", "Be kind."), ("tools", json.dumps(TOOLS))):
        await browser.run(f"document.getElementById('{name}').focus()")
        await browser.type(value, enter=False)
    await browser.run("document.getElementById('say').focus()")
    await browser.type("The weather?")
    await browser.until(f"{LAST}.querySelector('.call button')")
    assert await browser.run(f"{LAST}.querySelector('.call b').textContent") == "weather"
    assert json.loads(await browser.run(f"{LAST}.querySelector('.call pre').textContent")) == {"city": "Oslo"}
    asked = engine.asked[1]
    assert (asked.temperature, asked.top_k, asked.seed) == (0.5, 7, 3)
    assert tokenizer.decode(asked.prompt).partition("<|im_start|>")[2].startswith("system\nBe kind.")
    await browser.run(f"{LAST}.querySelector('.call textarea').focus()")
    await browser.type("Sunny", enter=False)
    await browser.screenshot(tmp_path / "call.png")
    await browser.click(".call button")
    await browser.until(f"{LAST}.querySelector('.note') && {LAST}.querySelector('.content')")
    prompt = tokenizer.decode(engine.asked[2].prompt)
    assert re.search(r"<\|im_start\|>tool\nSunnycall_[0-9a-f]{24}<\|im_end\|>", prompt) and "First I think" in prompt
    # An answer that is stopped, an error of the server, and a new chat.
    await browser.run("document.getElementById('say').focus()")
    await browser.type("On and on")
    await browser.until(f"{LAST}.querySelector('.content')?.textContent.length > 20")
    await browser.screenshot(tmp_path / "stream.png")
    await browser.click("#stop")
    await browser.until(f"{LAST}.querySelector('.note')?.textContent === 'stopped' && !document.getElementById('send').hidden")
    await browser.run("document.getElementById('max_tokens').value = '99999999'; document.getElementById('say').focus()")
    await browser.type("Too much")
    assert "max_tokens=99999999 must be at most" in await browser.until(f"{LAST}.querySelector('.error')?.textContent")
    await browser.click("#new")
    assert await browser.run("document.getElementById('turns').children.length") == 0
    names = await browser.run("performance.getEntriesByType('resource').map((e) => new URL(e.name).origin)")
    assert set(names) == {await browser.run("location.origin")} and browser.wrong == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_user_chats_in_a_browser(tmp_path):
    """With screenshots in the test's folder, to look at."""
    tokenizer, engines = scripted_engine.tokenizer(), []

    def make():
        engines.append(scripted_engine.Scripted(tokenizer, [THOUGHT, f"Let me look.\n{ONE}", "It is sunny.", "word " * 4000], 0.01))
        return engines[0]

    async def go(port):
        async with opened(f"http://127.0.0.1:{port}/", tmp_path / "browser") as browser:
            await use(browser, engines[0], tokenizer, tmp_path)

    (tmp_path / "browser").mkdir()
    with listening(tokenizer, hosts=("127.0.0.1",), make=make) as (port, _):
        asyncio.run(go(port))
