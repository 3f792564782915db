"""Takes the pictures of a report that the documents show.

Run:     python benchmarks/screenshots.py RUN      after `make demo`: the run that it names
Writes:  docs/images/report.png and docs/images/tokens.png
Needs:   Chromium, and Playwright (pip install -e '.[dev]')
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import sync_playwright  # noqa: E402

from opsd.cli import main as opsd  # noqa: E402

IMAGES = ROOT / "docs" / "images"


def main() -> None:
    """Write the report of a run and take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the output folder of a run")
    run = parser.parse_args().run
    IMAGES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "report.html"
        if status := opsd(["report", run, "-o", str(page_file)]):
            raise SystemExit(status)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1160, "height": 900}, color_scheme="light")
        page.goto(f"file://{page_file}")
        page.screenshot(path=IMAGES / "report.png")
        page.emulate_media(color_scheme="dark")
        page.click("#worst")
        page.wait_for_timeout(400)  # colours fade
        page.locator("section:has(#heatmap)").screenshot(path=IMAGES / "tokens.png")
        browser.close()


if __name__ == "__main__":
    main()
