"""Make the pictures of docs/browse.md: python docs/images/make.py RUN FEATURE PROMPT CHANGED

FEATURE is opened, 1.253 for feature 253 of layer 1; CHANGED is turned off in the prompt.
Needs a Chromium, playwright and Pillow.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PORT, HERE = 8765, Path(__file__).parent
URL = f"http://127.0.0.1:{PORT}/"
SIZE = {"width": 1200, "height": 860}


def main(run: str, feature: str, prompt: str, changed: str) -> None:
    """Serve the run's page and take the pictures."""
    server = subprocess.Popen([sys.executable, "-m", "clt.cli", "browse", run, "--port", str(PORT)])
    try:
        wait_until_served(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            light = browser.new_page(viewport=SIZE, device_scale_factor=1.25)
            dark = browser.new_page(viewport=SIZE, device_scale_factor=1.25, color_scheme="dark")
            place = "feature/" + feature.replace(".", "/")
            take(light, "", "#scatter", "overview")
            take(light, "features?sort=-max_activation", "tbody tr", "table")
            take(light, place, ".example", "feature")
            take(dark, place, ".example", "feature-dark")
            take(light, "prompt?" + urlencode({"text": prompt, "scale": f"{changed}:0"}), "#next", "prompt")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_until_served(server: subprocess.Popen[bytes]) -> None:
    """Raises OSError when it ends instead."""
    while True:
        try:
            with urlopen(URL):
                return
        except OSError:
            if server.poll() is not None:
                raise
            time.sleep(0.2)


def take(page: Page, place: str, shown: str, name: str) -> None:
    """One picture, when the element `shown` is there."""
    page.goto(f"{URL}#/{place}")
    page.locator(shown).first.wait_for(timeout=60_000)
    image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").save(HERE / f"{name}.webp", quality=72, method=6)
    print(f"{name}.webp: {(HERE / f'{name}.webp').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
