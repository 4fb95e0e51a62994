"""Pages as tests read them: elements with their texts, tables, pictures."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

EMPTY = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements in their order: tag, attributes, text with that of what is inside."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in EMPTY:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, text):
        for element in self._open:
            element["text"] += text

    def all(self, tag, **attributes):
        named = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and all(e.get(n) == value for n, value in named.items())]

    def texts(self, tag, **attributes):
        return [" ".join(element["text"].split()) for element in self.all(tag, **attributes)]

    def table(self, caption):
        """Rows by their first cell, each a dictionary by heading."""
        tags = [e for e in self.elements if e["tag"] in ("caption", "tr", "th", "td")]
        start = next(i for i, e in enumerate(tags) if e["tag"] == "caption" and e["text"] == caption)
        rows = []
        for element in tags[start + 1 :]:
            if element["tag"] == "caption":
                break
            if element["tag"] == "tr":
                rows.append([])
            else:
                rows[-1].append(element["text"])
        headings, *body = rows
        return {row[0]: dict(zip(headings[1:], row[1:], strict=True)) for row in body}

    def pictures(self):
        """By their alternative texts."""
        found = {}
        for element in self.all("img"):
            head, _, content = element["src"].partition(",")
            assert head == "data:image/png;base64" and element["alt"]
            found[element["alt"]] = Image.open(io.BytesIO(base64.b64decode(content)))
        return found
