"""Takes the pictures of `screenshots/` from a Space that is running.

libra demo --port 7860
python take_screenshots.py http://127.0.0.1:7860
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).resolve().parent / "screenshots"
DESKTOP, PHONE = {"width": 1200, "height": 960}, {"width": 390, "height": 844}
VIEWS: list[tuple[str, str, Any, Any]] = [
    ("chat_light", "Chat", DESKTOP, "light"),
    ("codes_dark", "Codes", DESKTOP, "dark"),
    ("imagine_light", "Imagine", DESKTOP, "light"),
    ("look_inside_dark", "Look inside", DESKTOP, "dark"),
    ("chat_phone", "Chat", PHONE, "dark"),
    ("look_inside_phone", "Look inside", PHONE, "light"),
]
COLORS = 128
"""Of a picture's palette; keeps the files small."""


def main(address: str) -> None:
    """Writes a PNG for every view."""
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, tab, size, scheme in VIEWS:
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            page.goto(address)
            page.locator("#conversation").get_by_text("airplane", exact=True).wait_for()
            page.get_by_role("tab", name=tab, exact=True).click()
            page.wait_for_timeout(2500)  # images and fonts settle
            file = FOLDER / f"{name}.png"
            page.screenshot(path=file)
            with Image.open(file) as image:
                image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)
            page.context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
