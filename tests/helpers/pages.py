"""A parser of HTML pages that checks their structure."""

from html.parser import HTMLParser
from pathlib import Path

VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}
ACTIVE_TAGS = {"script", "link", "iframe", "object", "embed", "base", "form"}
EVIL_CAPTION = "<script>alert(1)</script> {{7*7}} <img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Checks that the tags of a page are nested, and collects tags, text and table cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open_tags: list[str] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags, f"</{tag}> closes nothing"
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] != "style":
            self.texts.append(data)
        if "td" in self.open_tags:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        """The visible text with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element with a tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of each element with a class."""
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def check_self_contained(path: Path) -> Page:
    """Check that a page has no scripts and no external resources, and that its ids and links are valid."""
    page, raw = Page(path), path.read_text(encoding="utf-8")
    assert not {tag for tag, _ in page.tags} & ACTIVE_TAGS
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    assert "--series-0" in raw, "the stylesheet is missing"
    assert "url(http" not in raw
    assert "@import" not in raw
    policies = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for tag in ("a", "use") for attributes in page.attributes(tag)]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(attributes.get("alt") for attributes in page.attributes("img"))
    return page


def check_escaped(path: Path) -> None:
    """Check that a page shows `EVIL_CAPTION` as text."""
    page, raw = Page(path), path.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}" in page.text
    assert "<script" not in raw
    assert "onerror=alert(2)>" not in raw
