"""Links between the pages, as GitHub shows them; of the site's own Sphinx warns."""

import pytest

from tests.helpers.markdown import ROOT, list_anchors, list_links

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("examples/README.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_have_a_target(page):
    for link in list_links(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert target.resolve().is_relative_to(ROOT), link
        assert not anchor or anchor in list_anchors(target.read_text()), link


def test_anchors():
    text = "# A page\n## `run_job`, and more\n```sh\n# no heading\n```\n## Same\n## Same\n"
    assert list_anchors(text) == ["a-page", "run_job-and-more", "same", "same-1"]
