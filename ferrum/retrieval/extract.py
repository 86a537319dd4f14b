"""The text of PDF and HTML, by libraries of the extra `ferrum[documents]`."""

from __future__ import annotations

import io
import logging
import re
from typing import TYPE_CHECKING, Any, Final

from ferrum.errors import InputError
from ferrum.retrieval.documents import Original, clean

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from pypdf import PageObject
    from pypdf.generic import DictionaryObject, EncodedStreamObject

PDF: Final = frozenset({".pdf"})

#: What of a page is not what it is about.
_BESIDE: Final = (
    "script", "style", "noscript", "template", "svg", "nav", "aside", "iframe",
    # A form may be around all of a page; what one fills in is beside the matter.
    "button", "datalist", "label", "select", "textarea",
)  # fmt: skip

#: What tells a page, or a part of one, from a text that mentions a tag: what ends, or begins as only HTML does.
_HTML: Final = re.compile(
    r"<!doctype\b|</[a-z][\w-]*\s*>|<(?:html|head|body|p|br|hr|li|h[1-6]|meta)\b[^<>]*>", re.IGNORECASE
)
#: What a whole page has, and a part of one has not.
_WHOLE: Final = re.compile(r"<!doctype\b|<(?:html|body)\b", re.IGNORECASE)

#: What begins, and all that ends it; a tag, a processing instruction and what else begins with `<` ends with `>`.
_ENDS: Final = (
    ("<!--", re.compile(r"--!?\s*>")),
    ("<![", re.compile(r"\]\s*(?:\]\s*)?>")),
    ("<", re.compile(">")),
)
#: Blanks that mean no more than a few, even where they count.
_BLANKS: Final = re.compile(r"\s{64,}")
#: Characters of a page.
_LARGEST_PAGE: Final = 8_000_000
#: Tags within tags.
_DEEPEST: Final = 300

#: Bytes that the pages of a PDF may come to, interpreted: of any, for each byte of the file, and at most. pypdf takes
#: 1 to 4 µs a byte.
_ANY_PDF: Final = 2_000_000
_PER_BYTE: Final = 16
_LARGEST_PDF: Final = 256_000_000
#: Bytes that the use of a stream or of a font comes to, besides its own.
_A_USE: Final = 500
#: How a font's map of characters says that one follows another, and the characters that there are.
_RANGE: Final = re.compile(rb"<([0-9A-Fa-f]{1,8})>\s*<([0-9A-Fa-f]{1,8})>\s*[<\[]")
_LONGEST_RANGE: Final = 0x110000
#: Entries of a font that are counted, and how far down: a font may lead to the whole file.
_MOST_ENTRIES: Final = 200_000
_DEEPEST_IN_FONT: Final = 4

#: The first line of XHTML.
_XML: Final = re.compile(r"\A\s*<\?xml\b[^>]*>")


def pages(original: Original, content: bytes) -> list[str]:
    """The text of each page of a PDF, `content`. Raises `InputError` for one that cannot be read or has no text."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise _missing(original, "PDF") from None
    # Of what is odd in a file that can be read all the same, nobody has to know.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{original.name!r} needs a password: save it without one first")
        effort = _Effort(original, len(content))
        texts = [clean(effort.text(page)) for page in reader.pages]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise InputError(
            f"{original.name!r} cannot be read as PDF: {str(error)[:200] or type(error).__name__}"
        ) from error
    if not any(text.strip() for text in texts):
        raise InputError(f"{original.name!r} has no text, only pictures of it: recognise its text (OCR) first")
    return texts


class _Effort:
    """The cost of reading a PDF's pages, in bytes of what is interpreted.

    Pages share streams, forms and fonts, which are interpreted anew at each use: 100 kB of a file can stand for a
    gigabyte. So each use counts, and their sum may grow with the file, not faster.
    """

    def __init__(self, original: Original, size: int) -> None:
        self._original = original
        self._most = min(_ANY_PDF + _PER_BYTE * size, _LARGEST_PDF)
        self._spent = 0
        #: By identity, with what keeps that from being another's.
        self._fonts: dict[int, tuple[object, int]] = {}

    def text(self, page: PageObject) -> str:
        """The text of a page. Raises `InputError` where it, or all so far, costs too much."""
        interpret_form = page.extract_xform_text

        def form(xform: EncodedStreamObject, *options: Any, **named: Any) -> str:
            self._spend(xform, xform)
            # pypdf goes on after an error in a form, and so to the next one.
            return interpret_form(xform, *options, **named) if self._spent <= self._most else ""

        page.extract_xform_text = form  # type: ignore[method-assign]
        self._spend(page, page.get("/Contents"))
        self._check()
        text = page.extract_text()
        self._check()
        return text

    def _check(self) -> None:
        if self._spent > self._most:
            raise InputError(
                f"{self._original.name!r} is too much to read as PDF: its pages come to more than "
                f"{self._most // 1_000_000} MB, as they use the same content many times; print it to a new PDF, or "
                "split it"
            )

    def _spend(self, owner: DictionaryObject, content: Any) -> None:
        content = _resolved(content)
        for stream in content if isinstance(content, list) else [content]:
            self._spent += _length(stream)
        resources = _resolved(owner.get_inherited("/Resources", None))
        fonts = _resolved(resources.get("/Font")) if isinstance(resources, dict) else None
        if isinstance(fonts, dict):
            if id(fonts) not in self._fonts:
                self._fonts[id(fonts)] = fonts, sum(map(_font, fonts.values()))
            self._spent += self._fonts[id(fonts)][1]


def _font(font: Any) -> int:
    """The cost of a font for one use of it, by what pypdf reads: its map of characters, and widths."""
    font, entries = _resolved(font), _A_USE
    if not isinstance(font, dict):
        return entries
    to_unicode = _resolved(font.get("/ToUnicode"))
    entries += _length(to_unicode)
    if hasattr(to_unicode, "get_data"):
        spans = (int(last, 16) - int(first, 16) for first, last in _RANGE.findall(to_unicode.get_data()))
        entries += sum(span for span in spans if 0 < span <= _LONGEST_RANGE)
    return entries + _entries(font)


def _entries(value: Any) -> int:
    """So many entries has a value with all that is in it, up to a bound; of a stream, its dictionary."""
    found, left = 0, [(value, 0)]
    while left and found < _MOST_ENTRIES:
        one, depth = left.pop()
        one = _resolved(one)
        if isinstance(one, list | dict):
            found += len(one)
            inner = one.values() if isinstance(one, dict) else one
            left += [(each, depth + 1) for each in inner] if depth < _DEEPEST_IN_FONT else []
    return found


def _length(stream: Any) -> int:
    """The decoded length of a stream, and something for the use itself."""
    stream = _resolved(stream)
    return _A_USE + (len(stream.get_data()) if hasattr(stream, "get_data") else 0)


def _resolved(value: Any) -> Any:
    return value.get_object() if hasattr(value, "get_object") else value


def is_html(text: str) -> bool:
    """Whether it is more than a plain text that speaks of HTML; nothing at all is an empty page."""
    return not text.strip() or _HTML.search(text) is not None


def markdown(original: Original) -> str:
    """An HTML page as Markdown, without scripts, menus and what else is beside the matter.

    Raises `InputError` for one that has no text.
    """
    try:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter
    except ImportError:
        raise _missing(original, "HTML") from None
    source = original.text
    if len(source) > _LARGEST_PAGE:
        raise InputError(f"{original.name!r} is larger than {_LARGEST_PAGE} characters, too large a page: split it")
    converter = MarkdownConverter(heading_style="atx", strip=["img", "a"])
    try:
        page = BeautifulSoup(_closed(_XML.sub("", source)), "html.parser")
        _check_depth(page, original)
        title = _without_beside(page)
        # In a part of a page, there is nothing around the matter.
        matter = _matter(page) if _WHOLE.search(source) else [page]
        text = "\n\n".join(clean(converter.convert_soup(one)).strip() for one in matter)
    except RecursionError as error:
        raise InputError(f"{original.name!r} is nested too deeply to be read as HTML") from error
    if not text.strip():
        raise InputError(
            f"{original.name!r} has no text: where a script writes it, save the page as a browser shows it"
        )
    if title and not any(one.name == "h1" or one.find("h1") for one in matter):
        text = f"# {title}\n\n{text}"
    return re.sub(r"\n{3,}", "\n\n", text)


def _closed(source: str) -> str:
    """A page in which nothing begins that never ends: the parser would look for each end up to the end of the page."""
    for opening, closing in _ENDS:
        end = 0
        for found in closing.finditer(source):
            end = found.end()
        source = source[:end] + source[end:].replace(opening, f"&lt;{opening[1:]}")
    return _BLANKS.sub(lambda found: "\n\n" if "\n" in found[0] else " ", source)


def _check_depth(page: BeautifulSoup, original: Original) -> None:
    depths = {id(page): 0}
    for tag in page(True):
        depth = depths[id(tag)] = depths[id(tag.parent)] + 1
        if depth > _DEEPEST:
            raise InputError(f"{original.name!r} is nested too deeply to be read as HTML")


def _without_beside(page: BeautifulSoup) -> str:
    """Take out of a page what is beside the matter; what the page is called, in one line."""
    for beside in page(_BESIDE):
        beside.decompose()
    named = page.find("title") or page.find("h1")
    title = " ".join(clean(named.get_text(" ")).split()) if named else ""
    for beside in page("title"):
        beside.decompose()
    # Those of an article belong to it; others are of the site.
    for beside in page(["header", "footer"]):
        if not beside.decomposed and not beside.find_parent(["article", "main", "section"]):
            beside.decompose()
    return title


def _matter(page: BeautifulSoup) -> list[Tag]:
    """What the page says is its main part, else all of its articles, else everything."""
    for kind in ("main", "article"):
        if found := [one for one in page(kind) if not one.find_parent(kind)]:
            return found
    return [page.body or page]


def _missing(original: Original, kind: str) -> InputError:
    return InputError(f"{original.name!r}: to read {kind}, type: pip install 'ferrum[documents]'")
