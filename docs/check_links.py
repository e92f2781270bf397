"""Whether every link, picture and anchor of the built site leads somewhere: ``python docs/check_links.py``.

Looks at the pages in ``docs/_build/html`` alone; addresses of other sites are counted, not visited.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parent / "_build/html"
GENERATED = {"genindex.html", "search.html", "py-modindex.html"}


class Page(HTMLParser):
    """What a page refers to, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.pictures_without_text = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note addresses and anchors."""
        found = dict(attrs)
        for name in ("id", "name"):
            if found.get(name):
                self.anchors.add(str(found[name]))
        address = found.get("src" if tag in ("img", "script") else "href")
        if tag in ("a", "img", "link", "script") and address:
            self.links.append(address)
        if tag == "img" and found.get("alt") is None:
            self.pictures_without_text += 1


def main() -> int:
    """Print what is broken; the exit code is 1 if anything is."""
    pages = {path: Page(path.read_text()) for path in sorted(SITE.rglob("*.html"))}
    broken, outside = [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside.add(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(SITE)}: {link} does not exist")
            elif (
                parts.fragment
                and target in pages
                and path.name not in GENERATED
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                broken.append(f"{path.relative_to(SITE)}: {link} has no such anchor")
    print("\n".join(broken))
    count = sum(len(page.links) for page in pages.values())
    print(f"{len(pages)} pages, {count} links; {len(outside)} addresses of other sites were not visited")
    if not pages:
        print("no pages: run `make docs`")
    return int(bool(broken) or not pages)


if __name__ == "__main__":
    sys.exit(main())
