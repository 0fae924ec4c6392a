"""The offline report as Chromium shows it. `make test-browser`; without Chromium these fail."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import reported
from chromium import Browser

from rlhf.registry import Registry
from rlhf.report import page

pytestmark = pytest.mark.browser

OPEN_PLOTS = "[...document.querySelectorAll('.plot')].filter((p) => p.offsetParent)"
# How many pixels of a plot's canvases are coloured (axes are grey), and how many like a run.
INK = """((place, rgb) => {
  let all = 0, run = 0;
  const look = (node) => {
    for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) look(child);
    if (node.tagName !== 'CANVAS' || !node.width) return;
    const data = node.getContext('2d').getImageData(0, 0, node.width, node.height).data;
    for (let i = 0; i < data.length; i += 4) {
      const [r, g, b, alpha] = data.slice(i, i + 4);
      all += alpha > 100 && Math.max(r, g, b) - Math.min(r, g, b) > 40;
      run += rgb.every((value, k) => Math.abs([r, g, b][k] - value) < 12) && alpha > 150;
    }
  };
  look(place);
  return [all, run];
})"""
TOOLTIPS = """(() => {
  const found = [];
  const look = (node) => {
    if (String(node.className).includes('bk-Tooltip')) {
      const all = [...(node.shadowRoot ?? node).querySelectorAll('*')];
      found.push(all.filter((e) => e.tagName !== 'STYLE' && !e.children.length)
        .map((e) => e.textContent.trim()).join(' ').replaceAll(/\\s+/g, ' '));
    }
    for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) look(child);
  };
  look(document.body);
  return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    registry = Registry(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        reported.build(registry)
    asked = {
        "several": ["ppo/a", "ppo/b", "ppo/open"],
        "one": ["ppo/a"],
        "open": ["ppo/open"],
        "rm": ["rm/demo"],
        "sft": ["sft/demo"],
    }
    for name, references in asked.items():
        page.write(registry, references, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in asked}


def opened(browser: Browser, path: Path, width: int = 1280, **screen: bool) -> None:
    browser.screen(width, 844 if width < 500 else 900, **screen)
    browser.open(path)
    browser.wait(f"{OPEN_PLOTS}.every((p) => p.dataset.drawn)")
    time.sleep(0.3)  # Bokeh paints in the next frame


def test_the_lines_of_a_warning_stay_lines(browser: Browser, tmp_path: Path):
    registry = Registry(tmp_path / "runs")
    why = "the score fell\nLikely causes:\n- the steps are too large"
    reported.publish(registry, "ppo/x", stopped=why)
    page.write(registry, ["ppo/x"], tmp_path / "x.html")
    opened(browser, tmp_path / "x.html")
    shown = browser.run("document.querySelector('li.warning').innerText")
    assert shown == f"ppo/x stopped by a guard: {why}"


@pytest.mark.parametrize("name", ["several", "one", "open", "rm", "sft"])
def test_every_plot_is_drawn_and_nothing_is_asked_for(browser: Browser, pages, name: str):
    opened(browser, pages[name])
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    browser.wait("[...document.querySelectorAll('.plot')].every((p) => p.dataset.drawn)")
    time.sleep(0.3)
    count = browser.run("document.querySelectorAll('.plot').length")
    assert count >= 3
    for n in range(count):
        place = f"document.querySelectorAll('.plot')[{n}]"
        key, drawn = browser.run(f"[{place}.dataset.panel, {place}.dataset.drawn]")
        assert drawn == "yes", key
        assert browser.run(f"{INK}({place}, [0, 0, 0])")[0] > 100, f"{key} is blank"
    assert browser.errors == []
    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [pages[name].as_uri()]


def test_no_text_of_a_model_runs(browser: Browser, pages):
    opened(browser, pages["several"])
    assert browser.run("window.pwned === undefined")
    assert browser.run("document.querySelectorAll('img, script:not([type])').length") == 2
    assert browser.run("document.body.textContent.includes('onerror=window.pwned')")
    # And were it markup, the policy would stop it.
    browser.run(
        "(() => { const div = document.createElement('div'); document.body.append(div);"
        "div.innerHTML = '<img src=x onerror=\"window.pwned = 3\">'; })()"
    )
    time.sleep(0.3)
    assert browser.run("window.pwned === undefined")


def test_a_run_is_switched_off_and_on(browser: Browser, pages):
    opened(browser, pages["several"])
    box = "document.querySelectorAll('.switches input')"
    assert browser.run(f"{box}.length") == 3
    plot = f"{OPEN_PLOTS}[1]"  # objective/kl, where ppo/b lies apart
    red = [int(curve, 16) for curve in ("d6", "40", "4a")]

    def of_b() -> int:
        time.sleep(0.3)
        return browser.run(f"{INK}({plot}, {red})")[1]

    assert of_b() > 100
    browser.run(f"{box}[1].click()")
    assert of_b() == 0
    assert browser.run("document.getElementById('shown').textContent") == "2 of 3"
    hidden = "[...document.querySelectorAll('[data-run]')].filter((e) => e.hidden).length"
    assert browser.run(hidden) >= 12  # its samples as well
    browser.run("document.querySelector('[data-all=\"0\"]').click()")
    assert browser.run("document.getElementById('shown').textContent") == "0 of 3"
    browser.run("document.querySelector('[data-all=\"1\"]').click()")
    assert of_b() > 100
    assert browser.run(hidden) == 0
    assert browser.errors == []


def test_the_nearest_point_is_told(browser: Browser, pages):
    opened(browser, pages["several"])
    plot = "document.querySelector('[data-panel=\"ppo-0\"]')"
    browser.run(f"{plot}.scrollIntoView({{block: 'center'}})")
    # The page's own scales say where the points of this plot lie in the window.
    script = f"""(() => {{
      const model = Bokeh.documents.find((d) => d.roots()[0].renderers.length
        && d.get_model_by_name('points').data.run.length > 300
        && d.get_model_by_name('y_axis').axis_label === 'score');
      const points = model.get_model_by_name('points').data;
      const xr = model.get_model_by_name('x_range'), yr = model.get_model_by_name('y_range');
      let frame = null;
      const look = (node) => {{
        if (String(node.className).includes('bk-CartesianFrame')) frame = node;
        for (const c of [...(node.shadowRoot?.children ?? []), ...node.children]) look(c);
      }};
      look({plot});
      const box = frame.getBoundingClientRect();
      const place = (i) => [
        box.x + (points.x[i] - xr.start) / (xr.end - xr.start) * box.width,
        box.y + (yr.end - points.y[i]) / (yr.end - yr.start) * box.height,
      ];
      return [30, 100, 200, 300].map((i) => [...place(i), points.run[i], points.step[i]]);
    }})()"""
    for x, y, run, step in browser.run(script):
        expected = f"run: {run} step: {step} "
        end = time.monotonic() + 10
        while not any(expected in text for text in browser.run(TOOLTIPS)):
            assert time.monotonic() < end, (expected, browser.run(TOOLTIPS))
            for shift in (1, 0):  # a hand moves on, and plots are painted in between
                browser.move(x + shift, y)
                time.sleep(0.05)
    assert browser.errors == []


def test_samples_are_searched_and_sorted(browser: Browser, pages):
    opened(browser, pages["several"])
    samples = "document.querySelector('#answers')"
    shown = f"[...{samples}.querySelectorAll('.item')].filter((i) => !i.hidden)"

    def search(text: str) -> int:
        browser.run(
            f"(() => {{ const box = {samples}.querySelector('input[type=search]');"
            f"box.value = {text!r}; box.dispatchEvent(new Event('input')); }})()"
        )
        return browser.run(f"{shown}.length")

    assert search("") == 12
    assert search("THING number 7") == 1
    assert browser.run(f"{samples}.querySelector('output').textContent") == "1 of 1 shown"
    assert search("seed dear") == 12
    assert search("nowhere") == 0
    assert search("") == 12

    def sort(key: str, *, up: bool) -> list[float]:
        browser.run(
            f"(() => {{ const by = {samples}.querySelector('select'); by.value = {key!r};"
            f"{samples}.querySelector('.up').checked = {str(up).lower()};"
            "by.dispatchEvent(new Event('change')); })()"
        )
        return browser.run(f"{shown}.map((i) => Number(i.dataset[{key!r}]))")

    for key in ("gain", "goldgain", "score", "gold", "length"):
        down = sort(key, up=False)
        assert down == sorted(down, reverse=True)
        assert len(set(down)) > 1
        assert sort(key, up=True) == sorted(down)
    assert sort("place", up=False) == list(range(12))


def test_long_lists_are_shown_in_parts(browser: Browser, tmp_path: Path):
    registry = Registry(tmp_path / "runs")
    reported.publish(registry, "ppo/x", samples=reported.samples(0, 50))
    page.write(registry, ["ppo/x"], tmp_path / "r.html")
    opened(browser, tmp_path / "r.html")
    shown = "[...document.querySelectorAll('.item')].filter((i) => !i.hidden).length"
    button = "document.querySelector('.list > button')"
    for count in (20, 40, 50):
        assert browser.run(shown) == count
        assert browser.run("document.querySelector('output').textContent") == f"{count} of 50 shown"
        assert browser.run(f"{button}.hidden") == (count == 50)
        browser.run(f"{button}.click()")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["several", "one"])
def test_it_fits_the_screen(browser: Browser, pages, name: str, width: int, dark: bool):
    opened(browser, pages[name], width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = f"""[...document.querySelectorAll('main *:not(.wide *)')]
      .filter((e) => e.getBoundingClientRect().right > {width} + 1)
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []
    back = "getComputedStyle(document.body).backgroundColor"
    assert browser.run(back) == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert browser.errors == []


def test_it_is_printed_light_and_whole(browser: Browser, pages, tmp_path: Path):
    opened(browser, pages["several"], dark=True)
    browser.pdf(tmp_path / "report.pdf")
    held = (tmp_path / "report.pdf").read_bytes()
    assert held.startswith(b"%PDF")
    pages_in_it = held.count(b"/Type /Page\n") or held.count(b"/Type /Page ")
    assert 3 <= pages_in_it <= 40
    browser.screen(794, 1123, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_picture_is_what_the_window_shows(browser: Browser, pages, tmp_path: Path):
    """Of the tests' own means: a PNG of the asked size, which is not of one colour."""
    opened(browser, pages["one"], 390)
    browser.picture(tmp_path / "one.png")
    held = (tmp_path / "one.png").read_bytes()
    assert struct.unpack(">II", held[16:24]) == (390, 844)
    assert len(zlib.compress(held)) > 5000
