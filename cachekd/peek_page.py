"""`cachekd peek` as one HTML page to click through. It stands alone, and trusts nothing that it shows."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

from cachekd.cache import Manifest
from cachekd.peek import PeekedSample
from cachekd.plots import page_environment

_TEMPLATES = files("cachekd") / "templates"


def peek_page(
    name: str, manifest: Manifest, samples: Sequence[PeekedSample], images: Sequence[Sequence[str]]
) -> str:
    """The page's HTML.

    Keys, texts and tokens come from data sets and caches of others. They are in the page as JSON that cannot
    end its element, the script puts them in as text, and the page's policy lets no other script run and
    nothing be fetched.

    Args:
        name: the cache's.
        images: of each sample, as data URIs.
    """
    data = [
        {**sample.model_dump(), "sources": list(sources)}
        for sample, sources in zip(samples, images, strict=True)
    ]
    script, style = (_TEMPLATES.joinpath(f"peek.{kind}").read_text("utf-8") for kind in ("js", "css"))
    return (
        page_environment()
        .get_template("peek.html.jinja")
        .render(
            name=name,
            manifest=manifest,
            data=embedded_json(data),
            script=script,
            style=style,
            script_hash=_policy_hash(script),
            style_hash=_policy_hash(style),
        )
    )


def embedded_json(value: object) -> str:
    """JSON that may stand in a <script> element: no character in it means anything to HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy_hash(content: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
