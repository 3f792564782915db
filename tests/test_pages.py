"""Pages in a real browser: the heat-map under pointer and keyboard, both schemes, a phone, no request, no barrier."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import DEV, PLAN, make
from test_report import HOSTILE, long_run

from opsd.health.log import FILE as LOG
from opsd.health.traces import files_in, read_traces, write_rollouts
from opsd.report.build import report_of
from opsd.report.live import HOST, LiveReport, make_server
from opsd.report.run import read_run

playwright = pytest.importorskip("playwright.sync_api", reason="pages are tested with Playwright, which is missing")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run, one of whose rollouts is hostile text."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    make(folder, evaluation={**PLAN, "selection": DEV, "every": 2}, max_steps=3, logging_steps=1).train()
    rollouts = list(read_traces(folder, alternatives=True))
    rollouts[0] = replace(rollouts[0], prompt=HOSTILE, context=HOSTILE, tokens=[HOSTILE] * len(rollouts[0].tokens))
    (path,) = [path for _, _, path in files_in(folder / "traces")]
    write_rollouts(path, [(rollout, {}) for rollout in rollouts])
    (folder / "report.html").write_text(report_of(read_run(folder)), "utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page, and what went wrong on it: errors on its console, and requests to anywhere else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), list[str]()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto(f"file://{report}")
    yield page, wrong
    assert wrong == []
    context.close()


def test_pointing_at_a_token_shows_both_sides(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    tokens = page.locator("#tokens .tok")
    tokens.nth(2).hover()
    detail = page.locator("#detail")
    assert "token 3 of" in detail.inner_text()
    assert detail.locator("table").count() == 2 and detail.locator("tbody tr").count() == 10
    assert "rank" in detail.inner_text()
    page.mouse.move(0, 0)  # the chosen token comes back
    chosen = page.locator('#tokens [aria-pressed="true"]')
    number = tokens.evaluate_all("(all) => all.findIndex((each) => each.ariaPressed === 'true')") + 1
    assert chosen.count() == 1 and f"token {number} of" in detail.inner_text()


def test_tokens_are_reached_by_keyboard(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    page.locator("#filter").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("tok")
    page.keyboard.press("Home")
    assert "token 1 of" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in page.locator("#detail").inner_text()
    assert page.evaluate("document.activeElement.ariaPressed") == "true"  # the focus moves with it
    page.keyboard.press("Tab")  # one stop for all tokens
    assert not page.evaluate("document.activeElement.className").startswith("tok")


def test_steps_and_rollouts_are_switched(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    before = page.locator("#tokens").inner_text()
    page.locator("#first").select_option("3")
    page.locator("#second").select_option("2")
    after = page.locator("#tokens").inner_text()
    assert after != before
    page.locator("#previous").click()
    assert (page.locator("#first").input_value(), page.locator("#second").input_value()) == ("3", "1")
    page.locator("#worst").click()
    worst = page.evaluate(
        "Math.max(...JSON.parse(document.getElementById('data').textContent).rollouts.flatMap((r) => r.nats))"
    )
    assert f"{worst:.3f} nats" in page.locator("#detail").inner_text()


def test_the_filter_leaves_the_tokens_that_carry_the_divergence(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    coloured = "(all) => all.filter((each) => getComputedStyle(each).backgroundColor !== 'rgba(0, 0, 0, 0)').length"
    tokens = page.locator("#tokens .tok")
    page.locator("#filter").check()
    page.wait_for_timeout(400)  # colours fade
    assert tokens.evaluate_all(coloured) == page.locator("#tokens .heavy").count() < tokens.count()


def test_hostile_text_stays_text(opened: tuple[Any, list[str]]) -> None:
    page, _ = opened
    page.locator("#first").select_option("1")
    page.locator("#second").select_option("1")
    shown = page.locator("#tokens .tok").first.text_content()
    assert shown == "<script>alert(1)</script></textarea>\\x1b[31m\\u202eevil &amp; 😀"
    assert page.locator("#context").text_content() == shown
    assert page.evaluate("document.querySelectorAll('script').length") == 2


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: Any, report: Path, tmp_path: Path) -> None:
    """Were a text ever to become markup, it still would not run."""
    html = report.read_text("utf-8").replace("</main>", "<script>document.title = 'taken over'</script></main>")
    (tmp_path / "page.html").write_text(html, "utf-8")
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'page.html'}")
    assert page.title() != "taken over" and page.locator("#tokens .tok").count() > 0
    page.close()


def test_a_live_page_loads_itself_again(browser: Any, report: Path) -> None:
    served = LiveReport(report.parent)
    server = make_server(served, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://{HOST}:{server.server_address[1]}/{served.key}/")
    before = page.locator("body").get_attribute("data-version")
    with (report.parent / LOG).open("a") as log:
        log.write('{"step": 4, "divergence": 0.5}\n')
    page.locator(f'body:not([data-version="{before}"])').wait_for(timeout=20_000)
    server.shutdown()
    server.server_close()
    for _ in range(40):
        page.wait_for_timeout(500)
        if page.title().startswith("(no longer served)"):
            break
    else:
        pytest.fail("the page did not notice that it is no longer served")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_there_is_no_barrier_and_nothing_overflows(browser: Any, report: Path, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"file://{report}")
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.evaluate(
        "document.querySelectorAll('.tok').forEach((e, i, all) => e.style.setProperty('--n', i / (all.length - 1)))"
    )
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_the_page_of_a_long_run_opens_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(report_of(long_run()), "utf-8")
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'report.html'}")
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 2000 and page.locator("#tokens .tok").count() == 40
    page.close()
