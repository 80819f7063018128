"""Pages of HTML, as a reader and a browser have them."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects what a reader sees, its tables, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html = text
        self.seen, self.fetched, self.rows, self._hidden = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href") and value[:1] != "#"]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if tag in ("style", "metadata", "title"):
            self._hidden = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._hidden = "" if tag == self._hidden else self._hidden
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        if self._hidden:
            return
        self.seen.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    def row(self, first: str) -> list[str]:
        """The table's line that begins with this."""
        return next(row for row in self.rows if row and row[0] == first)

    def plot(self, title: str) -> str:
        """The SVG with this title."""
        return next(svg for name, svg in self.plots if name == title)

    @property
    def plots(self) -> list[tuple[str, str]]:
        return re.findall(r"<figcaption><b>(.*?)</b>.*?(<svg.*?</svg>)", self.html, flags=re.DOTALL)
