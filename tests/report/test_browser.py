"""The page in a real Chromium: it draws without an error, filters, turns dark, fits a phone, runs nothing planted."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.report_page import PLANTED, write_run
from reasoner.report.write import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[dev]'")

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver, as `make test` does"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
# Over a copy, as reading a page's own canvases back makes the browser warn of it.
DRAWN = """
const copy = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const drawn = (canvas) => {
  [copy.canvas.width, copy.canvas.height] = [canvas.width, canvas.height];
  copy.drawImage(canvas, 0, 0);
  return copy.getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 === 3 && value > 0);
};
return [...document.querySelectorAll('canvas')].map(drawn);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 1,000 steps with hostile texts in it, and its comparison with a short one."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "long", steps=1000, prompts=4, completions=4, words=200, planted=PLANTED)
    write_run(folder / "short", steps=20, prompts=4, completions=4, words=20, problems=200)
    both = [folder / "long", folder / "short"]
    found = {"one": folder / "one.html", "two": folder / "two.html"}
    write_report(both[:1], found["one"])
    write_report(both, found["two"])
    return found


def show(browser, page: Path, *, width: int = 1200, dark: bool = False) -> None:
    """Open the page and see that every chart is drawn and the console is silent."""
    phone = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    wait(lambda: (found := browser.execute_script(DRAWN)) and all(found))
    assert browser.get_log("browser") == []


def wait(ready: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < until, "it did not come about in 20 s"
        time.sleep(0.05)


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )


def put(browser, selector: str, value: str) -> None:
    browser.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "for (const name of ['input', 'change']) e.dispatchEvent(new Event(name, {bubbles: true}))",
        *(selector, value),
    )


def test_it_tells_the_gain_and_draws_every_curve(browser, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    assert "raised held-out accuracy" in texts(browser, "h1")[0]
    titles = [title for title in texts(browser, ".chart h3 span:first-child") if title]
    asked = ["Held-out accuracy", "Reward", "Solved share", "Completion length", "Cut share", "Entropy", "Memory"]
    asked += ["KL to the reference", "Engine and trainer", "Gradient norm", "Tokens a second"]
    assert set(asked) <= set(titles)
    assert len(browser.execute_script(DRAWN)) >= len(asked)


def test_pointing_at_a_chart_reads_that_step_in_all(browser, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    before = texts(browser, "#curves .chart h3 b")
    browser.execute_script(
        "const over = document.querySelector('#curves .u-over'); const box = over.getBoundingClientRect();"
        "for (const name of ['mouseenter', 'mousemove']) over.dispatchEvent(new MouseEvent(name, {bubbles: true,"
        "clientX: box.left + box.width / 2, clientY: box.top + 20}))"
    )
    wait(lambda: texts(browser, "#curves .chart h3 b") != before)
    said = {text.split("step ")[1].split("0.")[0] for text in texts(browser, "#curves .chart h3 b") if "step " in text}
    assert len(texts(browser, "#curves .chart h3 b i")) > 8 and said


def test_planted_markup_is_text(browser, pages: dict[str, Path]) -> None:
    for page in pages.values():
        show(browser, page)
        assert PLANTED in texts(browser, "#completions .text")[1]
        put(browser, "#word", "onerror")
        assert (
            browser.execute_script("return document.images.length + document.querySelectorAll('body script').length")
            == 3
        )
        assert "planted" not in browser.execute_script("return document.title.replace(arguments[0], '')", PLANTED)


def test_filters_choose_completions(browser, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    (everything,) = texts(browser, "#found")
    put(browser, "#step", "1000")
    assert all(text.startswith("step 1000") for text in texts(browser, "#completions .meta"))
    put(browser, "#high", "0.5")
    assert all("reward 0" in text for text in texts(browser, "#completions .meta"))
    put(browser, "#low", "0.4")
    assert texts(browser, "#found")[0].startswith("0 of")
    for selector in ("#step", "#high", "#low"):
        put(browser, selector, "")
    assert texts(browser, "#found") == [everything]
    put(browser, "#order", "low")
    assert "reward 0" in texts(browser, "#completions .meta")[0]
    put(browser, "#word", "onerror")
    assert texts(browser, "#found")[0].startswith("1 of")


def test_early_beside_late_and_problems_lost(browser, pages: dict[str, Path]) -> None:
    show(browser, pages["one"])
    browser.execute_script("document.querySelectorAll('#completions .tabs button')[1].click()")
    sides = texts(browser, "#completions .sides h4")
    assert sides[0].startswith("Early, step ") and sides[1].startswith("Late, step ")
    assert "wrong" in texts(browser, "#problems .sides h4")[0] and "right" in texts(browser, "#problems .sides h4")[1]
    browser.execute_script("document.querySelectorAll('#problems .tabs button')[1].click()")
    assert "right" in texts(browser, "#problems .sides h4")[0] and "wrong" in texts(browser, "#problems .sides h4")[1]


def test_dark_by_the_system_and_by_the_button(browser, pages: dict[str, Path]) -> None:
    def brightness() -> int:
        return browser.execute_script(
            "return parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
        )

    show(browser, pages["one"], dark=True)
    assert brightness() < 50
    browser.execute_script("document.querySelector('#theme').click()")
    assert brightness() > 200
    assert all(browser.execute_script(DRAWN)) and browser.get_log("browser") == []


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_phone_needs_no_scrolling_to_the_side(browser, pages: dict[str, Path], name: str) -> None:
    show(browser, pages[name], width=360)
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    wait(lambda: browser.execute_script("return document.querySelectorAll('details > div').length >= 3"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


def test_a_comparison_speaks_of_both_runs(browser, pages: dict[str, Path]) -> None:
    show(browser, pages["two"])
    names = texts(browser, "#curves .legend span")
    assert [name.split("/")[-1] for name in names] == ["long", "short"]
    assert texts(browser, "#against table.plain th") == ["setting", *names]
    put(browser, "#completions select", "1")
    wait(lambda: "from 20 of its 20 steps" in texts(browser, "#completions .lead")[0])
