"""The shared browser check notices each fault of a page."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser import Seen

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
PHONE = '<meta name="viewport" content="width=device-width, initial-scale=1">'
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 40" width="100"><text y="20" font-size="{}">a</text></svg>'


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Path]:
    """`page(body)`: writes a page with this body."""

    def write(body: str, head: str = PHONE) -> Path:
        path = tmp_path / "page.html"
        path.write_text(
            f'<!DOCTYPE html><html lang="en"><meta charset="utf-8">{head}<link rel="icon" href="data:,">{body}</html>'
        )
        return path

    return write


def test_a_page_that_is_as_it_should_be_is_opened(page: Callable[..., Path], check_page: Callable[[Path], Seen]) -> None:
    link = '<a href="https://example.org">elsewhere</a>'
    inside = '<div style="overflow-x: auto"><p style="width: 900px">wide</p></div>'
    seen = check_page(page(f'{link}{inside}<img src="{PIXEL}" alt="a pixel">{DRAWING.format(10)}'))
    assert (seen.pictures, seen.figures, seen.width) == (1, 1, 1280)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<img src="http://192.0.2.1/a.png" alt="">', r"is not self-contained, it names \['http://192.0.2.1/a.png'\]"),
        ('<script src="plot.js"></script>', "it names .*plot.js"),
        ("<style>p { background: url(paper.png) }</style>", "it names .*paper.png"),
        ('<style>@import "style.css";</style>', "it names .*style.css"),
        ('<p style="background: url(paper.png)">', "it names .*paper.png"),
        ('<script>fetch("http://192.0.2.1/")</script>', r"asks for \['http://192.0.2.1/'\]"),
        ('<script>new Image().src = "a.png"</script>', r"asks for \['file:///.*/a.png'\]"),
        ('<script>console.error("no such", 7)</script>', "the console says .*no such 7"),
        ("<script>missing()</script>", "the console says .*missing is not defined"),
        ('<img src="data:image/png;base64,AAAA" alt="a mouse">', r"pictures that are not drawn: \['a mouse'\]"),
        ('<img src="data:image/png;base64,AAAA" alt="a mouse" loading="lazy" hidden>', "a mouse"),
        ('<p style="width: 700px">wide</p>', r"page.html \(phone\) is 7\d\d pixels wide"),
        (DRAWING.format(5), r"\(desk\): letters of 5.0 pixels"),
    ],
)
def test_what_is_wrong_with_a_page_is_noticed(
    page: Callable[..., Path], check_page: Callable[[Path], Seen], body: str, said: str
) -> None:
    with pytest.raises(AssertionError, match=said):
        check_page(page(body))


def test_a_page_that_is_not_made_for_telephones_is_noticed(
    page: Callable[..., Path], check_page: Callable[[Path], Seen]
) -> None:
    with pytest.raises(AssertionError, match=r"\(phone\) is 980 pixels wide"):
        check_page(page("<p>small</p>", head=""))
