"""What is on a page: its tags, its words, and what a browser would load; and text that is no markup."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script></textarea>\x1b[31m\u202eevil &amp; 😀"


class Outline(HTMLParser):
    """The tags, headings and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []  # addresses that a browser would load
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loads = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "poster")]
        self.outside += [value for value in loads if not value.startswith(("#", "data:"))]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())
