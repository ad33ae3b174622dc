"""HTML pages, taken apart."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The text of a page, and its tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.words, self.tags, self.is_code = [], [], False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())
        self.kinds = [kind for _, found in self.tags for kind in found.get("class", "").split()]
        # The members of which there are tiles, in order.
        self.members = [a["title"].partition("/")[2] for tag, a in self.tags if tag == "figure"]

    def handle_starttag(self, tag, attrs):
        self.is_code = tag in ("script", "style")
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.is_code = False

    def handle_data(self, data):
        if not self.is_code:
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)
