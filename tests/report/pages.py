"""What a test wants to know of a page: its elements, whether they nest, what they refer to."""

from html.parser import HTMLParser

VOID = {"meta", "img", "wbr", "path"}  # `path` closes itself, and closes nothing


class Page(HTMLParser):
    """Raises AssertionError where elements do not nest."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def check_self_contained(page: Page) -> None:
    """No network, one script, no handler in an attribute, and the policy that forbids all that."""
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert len(page.all("script")) == 1
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            assert key not in ("srcset", "srcdoc", "action", "xlink:href"), (tag, key)
            assert key != "src" or (value or "").startswith("data:image/png;base64,")
            assert key != "href" or (value or "").startswith("#block-")
            assert "url(" not in (value or "") or key == "content"
