"""A browser, for the pages that are clicked through."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; CI sets CACHEKD_REQUIRE_CHROMIUM, so that there the tests cannot be left out."""
    required = os.environ.get("CACHEKD_REQUIRE_CHROMIUM") == "1"
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not required:
        pytest.importorskip("playwright", reason="playwright is not installed")
        if program is None:
            pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    quiet = ["background-networking", "component-update", "sync"]
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=arguments)
        yield opened
        opened.close()
