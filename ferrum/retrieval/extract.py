"""The text of PDF and HTML, by libraries of the extra `ferrum[documents]`."""

from __future__ import annotations

import io
import logging
import re
from typing import Final

from ferrum.errors import InputError
from ferrum.retrieval.documents import Original, clean

PDF: Final = frozenset({".pdf"})
HTML: Final = frozenset({".html", ".htm", ".xhtml"})

#: What of a page is not what it is about.
_BESIDE: Final = (
    "script",
    "style",
    "noscript",
    "template",
    "svg",
    "nav",
    "header",
    "footer",
    "aside",
    "form",
    "iframe",
)


def pages(original: Original) -> list[str]:
    """The text of each page of a PDF. Raises `InputError` for one that cannot be read or has no text."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise _missing(original, "PDF") from None
    # Of what is odd in a file that can be read all the same, nobody has to know.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = PdfReader(io.BytesIO(_bytes(original)))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{original.name!r} needs a password: save it without one first")
        texts = [clean(page.extract_text()) for page in reader.pages]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise InputError(
            f"{original.name!r} cannot be read as PDF: {str(error)[:200] or type(error).__name__}"
        ) from error
    if not any(text.strip() for text in texts):
        raise InputError(f"{original.name!r} has no text, only pictures of it: recognise its text (OCR) first")
    return texts


def markdown(original: Original) -> str:
    """An HTML page as Markdown, without scripts, menus and what else is beside the matter."""
    try:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter
    except ImportError:
        raise _missing(original, "HTML") from None
    try:
        page = BeautifulSoup(_bytes(original), "html.parser")
        for beside in page(_BESIDE):
            beside.decompose()
        matter = page.find("main") or page.find("article") or page.body or page
        text = clean(MarkdownConverter(heading_style="atx", strip=["img", "a"]).convert_soup(matter))
    except RecursionError as error:
        raise InputError(f"{original.name!r} is nested too deeply to be read as HTML") from error
    return re.sub(r"\n{3,}", "\n\n", text)


def _bytes(original: Original) -> bytes:
    return original.content.encode("utf-8", "replace") if isinstance(original.content, str) else original.content


def _missing(original: Original, kind: str) -> InputError:
    return InputError(f"{original.name!r}: to read {kind}, type: pip install 'ferrum[documents]'")
