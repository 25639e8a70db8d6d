"""The page in a browser: a real server, headless Chromium; by hand with -m slow.

    pip install -r requirements-demo.txt playwright     # and Debian's package chromium, or any other
    DEMO_WEIGHTS=runs/llamagen-mini-cca DEMO_PICTURE=demo.png pytest -m slow tests/scripts/test_demo_page.py

DEMO_PICTURE: where a picture of the page goes; DEMO_WEIGHTS: the CCA weights of llamagen-mini that it shows
(default: some that a single step of training makes).
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, command_line, environment, run
from PIL import Image

from cca.sampling.grid import draw_grid
from models.zoo import FASHION_CLASSES

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="pip install -r requirements-demo.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
MODEL, WAYS = "llamagen-mini", ("base", "guided", "cca")
PATIENCE = 120_000  # milliseconds, for a busy machine


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A path as a user may have it; in HTML it would be markup."""
    if given := os.environ.get("DEMO_WEIGHTS"):
        return given
    folder = tmp_path_factory.mktemp("run") / "<b>a run"
    codes = tmp_path_factory.mktemp("codes") / "codes"
    data = ["--model", MODEL, "--data", ROOT / "assets/fashion-mnist-test-10k.npz"]
    run("-m", "scripts.extract_codes", *data, "--output", codes)
    training = ["--codes", codes, "--max-steps", 1, "--lr", 0.01, "--warmup", 0]
    run("train_llamagen_cca.py", "--model", MODEL, *training, "--output", folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(weights, tmp_path_factory):
    """A server of its own, which ends when it is told to and leaves nothing."""
    temporary = tmp_path_factory.mktemp("temporary")
    arguments = ["-m", "scripts.demo", "--model", MODEL, "--weights", weights, "--port", 0]
    with (
        open(temporary.parent / "errors", "w+") as errors,
        subprocess.Popen(
            command_line(arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment(TMPDIR=str(temporary), PYTHONUNBUFFERED="1"),
        ) as server,
    ):  # fmt: skip
        try:
            line = next((line for line in server.stdout if line.startswith("http://127.0.0.1:")), "")
            assert line, Path(errors.name).read_text()
            yield line.split()[0]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
        assert Path(errors.name).read_text() == "" and not list(temporary.iterdir())


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, url):
    """Opens tabs, which may ask the server alone, and may not complain."""
    contexts, foreign, complaints = [], [], []

    def tab():
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: foreign.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.locator("#sample").wait_for()
        return page

    yield tab
    for context in contexts:
        context.close()
    assert [address for address in foreign if not address.startswith((url, "data:", "blob:"))] == []
    assert complaints == []


def fill(page, name, value):
    page.locator(f"#{name}").locator("input[type=number], textarea, input[type=text]").first.fill(value)


def commands_of(page):
    return page.locator("#commands .cm-content").inner_text().splitlines()


def wait_for_commands(page, text):
    page.locator("#commands .cm-content").get_by_text(text).first.wait_for()


def widths(page):
    """Of the pictures as the browser has decoded them; 0 for one that did not load."""
    pictures = [page.locator(f"#picture-{way} img") for way in WAYS]
    return [
        picture.evaluate("async image => { await image.decode(); return image.naturalWidth }")
        for picture in pictures
    ]


def picture_bytes(page, way):
    with urllib.request.urlopen(page.locator(f"#picture-{way} img").get_attribute("src")) as answer:
        return answer.read()


def test_sample_look_and_download(tab, weights, tmp_path):
    page = tab()
    assert Path(weights).name in page.locator("#facts").inner_text()
    assert re.search(r"CCA: .*, SHA-256 [0-9a-f]{12}", page.locator("#facts").inner_text())
    page.locator("#sample").click()
    wait_for_commands(page, "cca.npz")
    assert widths(page) == [5 * 98] * 3
    for way in WAYS:
        assert "s per image (tokens" in page.locator(f"#caption-{way}").inner_text()
    if target := os.environ.get("DEMO_PICTURE"):
        page.wait_for_timeout(1000)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        Image.open(tmp_path / "page.png").convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target)
    loaded = {}
    for name in ("picture", "commands"):
        with page.expect_download() as download:
            page.locator(f"#get-{name}").click()
        loaded[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(loaded[name])
    assert Image.open(loaded["picture"]).width > 3 * 5 * 98
    lines = loaded["commands"].read_text().splitlines()
    assert lines == commands_of(page) and len(lines) == 3
    python, *arguments, output = shlex.split(lines[2])
    assert (python, arguments[0], output) == ("python", "sample.py", "cca.npz")
    run(*arguments, tmp_path / output)
    with np.load(tmp_path / "cca.npz") as samples:
        captions = [FASHION_CLASSES[label] for label in samples["arr_1"]]
        expected = draw_grid(samples["arr_0"], 5, captions)
    shown = Image.open(io.BytesIO(picture_bytes(page, "cca")))
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))


def test_a_class_is_found_by_its_name(tab):
    page = tab()
    page.locator("#classes input").fill("sneak")
    page.get_by_role("option", name="Sneaker (7)").click()
    fill(page, "num-samples", "4")
    page.locator("#sample").click()
    wait_for_commands(page, "--classes 7 --num-samples 4")
    assert widths(page) == [2 * 98] * 3


def test_what_is_wrong_is_said_on_the_page(tab):
    page = tab()
    message = page.locator("#status .message")
    for name, value, said, right in (
        ("seed", "-3", "Seed: -3 must be at least 0", "4"),
        ("top-k", "2.5", "Top-k: '2.5' is not an integer", "0"),
    ):
        fill(page, name, value)
        page.locator("#sample").click()
        message.get_by_text(said).wait_for()
        assert "Traceback" not in page.content()
        fill(page, name, right)
    page.locator("#sample").click()
    wait_for_commands(page, "--seed 4 ")
    assert message.count() == 0


def test_the_server_checks_whatever_the_widgets_allow(tab):
    """A request that was changed on its way."""
    page = tab()

    def change(route):
        body = route.request.post_data_json
        body["data"][1] = 1_000_000
        route.continue_(post_data=json.dumps(body))

    page.route("**/queue/join*", change)
    page.locator("#sample").click()
    page.locator("#status .message").get_by_text("Images: 1000000 must be at most 64 here").wait_for()


def test_two_tabs_one_after_the_other(tab):
    pages = [tab(), tab()]
    for seed, page in enumerate(pages, 21):
        fill(page, "seed", str(seed))
        fill(page, "num-samples", "64")
    for page in pages:
        page.locator("#sample").click()
    first, second = pages
    second.locator("#status").get_by_text(re.compile("queue")).first.wait_for()
    second.locator("#picture-base img").wait_for()
    assert "--seed 21 " in "\n".join(commands_of(first))  # it was finished before the second began
    wait_for_commands(second, "--seed 22 ")
    assert widths(first) == widths(second) == [8 * 98] * 3
    assert picture_bytes(first, "cca") != picture_bytes(second, "cca")
