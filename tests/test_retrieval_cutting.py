"""How documents are cut: nothing is lost, every piece says truly where it is from, and none is too long."""

from __future__ import annotations

import codecs
import hashlib
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pdfs import sharing

from ferrum.errors import InputError
from ferrum.retrieval.cutting import cut
from ferrum.retrieval.documents import Original
from ferrum.retrieval.store import Chunk

SUFFIXES = [".md", ".py", ".go", ".txt"]

_LINES = st.sampled_from(
    [
        "# Title", "## Part", "### Part ###", "#", "####### no", "Under", "=====", "---", "```", "~~~ sh", "", "  ",
        "def f(a):", "    return 1", "class A:", "    def m(self):", "        x = '''", "@decorated", "# why",
        "func main() {", "}", "type T struct {", "// about it", "a; b; c", "def x(): pass; y = 1", "if True: def",
        "A sentence. Another one! And a third? " * 4, "word " * 60, "x" * 300, "文字がつづく。" * 30, "\x0c", "\u2028",
    ]
)  # fmt: skip
_TEXTS = st.lists(_LINES | st.text(max_size=80), max_size=40).map("\n".join) | st.text(max_size=500)


def pieces(text: str | bytes, name: str = "a.md", max_chars: int = 1000) -> list[Chunk]:
    return cut(Original(name, text), max_chars)


@given(text=_TEXTS, suffix=st.sampled_from(SUFFIXES), max_chars=st.integers(100, 400))
@example("a" * 1000, ".txt", 100)
@example("\n\n  indented\n\n", ".md", 1000)
@example("def f(): pass\ndef g(): pass", ".py", 1000)
def test_nothing_is_lost_nothing_is_too_long_and_positions_are_right(text: str, suffix: str, max_chars: int) -> None:
    original = Original(f"a{suffix}", text)
    text = original.text
    lines = text.split("\n")
    start, end = 0, 0
    for chunk in cut(original, max_chars):
        assert chunk.text.strip()
        assert len(chunk.text) <= max_chars
        assert chunk.subject.endswith(chunk.text)
        assert chunk.digest == hashlib.sha256(chunk.subject.encode()).hexdigest()
        line, end_line = chunk.position["line"], chunk.position["end_line"]
        assert isinstance(line, int)
        assert isinstance(end_line, int)
        within = "\n".join(lines[line - 1 : end_line])
        assert chunk.text in within
        assert lines[line - 1] in within
        # The furthest place where it can be without leaving anything but blanks out.
        gap = len(text[end:]) - len(text[end:].lstrip())
        at = text.rfind(chunk.text, start, end + gap + len(chunk.text))
        blanks = len(chunk.text) - len(chunk.text.lstrip())
        assert at >= 0, (text[start : end + 50], chunk.text)
        assert at <= end + gap <= at + max(blanks, len(chunk.text))
        start, end = at, at + len(chunk.text)
    assert not text[end:].strip()


@given(text=_TEXTS, suffix=st.sampled_from(SUFFIXES))
def test_a_text_is_cut_the_same_way_each_time(text: str, suffix: str) -> None:
    assert pieces(text, f"a{suffix}") == pieces(text, f"a{suffix}")


def test_markdown_is_cut_at_its_headings_and_keeps_their_path() -> None:
    long = "Some words about it. " * 20
    text = f"# Guide\n\nIntroduction. {long}\n\n## Install\n\n{long}\n\n### On Linux\n\n{long}\n\n## Use\n\n{long}\n"
    cut = pieces(text, max_chars=1000)
    assert [chunk.position["heading"] for chunk in cut] == [
        "Guide",
        "Guide > Install",
        "Guide > Install > On Linux",
        "Guide > Use",
    ]
    assert [chunk.position["line"] for chunk in cut] == [1, 5, 9, 13]
    # What is embedded also says what it is a part of.
    assert cut[2].subject.startswith("Guide > Install\n### On Linux")
    assert "Guide" not in cut[2].text


def test_what_looks_like_a_heading_and_is_none_does_not_cut() -> None:
    text = (
        "---\ntitle: no heading\n---\n"
        "Title\n=====\n"
        "```sh\n# a comment\n```\n"
        "- item\n---\n"
        "> quote\n---\n"
        "    # code\n"
        "#hashtag\n"
        "~~~\n## fenced\n```\n~~~\n"
        "Second\n---\nEnd.\n" + "word " * 40
    )
    headings = [chunk.position.get("heading") for chunk in pieces(text, max_chars=100)]
    assert set(headings) == {None, "Title", "Title > Second"}


def test_small_parts_stay_together_under_the_heading_that_they_share() -> None:
    text = "# Words\n\n## One\n\nA.\n\n## Two\n\nB.\n\n## Three\n\n" + "Long. " * 100
    first, *_ = pieces(text, max_chars=300)
    assert first.text == "# Words\n\n## One\n\nA.\n\n## Two\n\nB."
    assert first.position == {"line": 1, "end_line": 9, "heading": "Words"}


def test_python_is_cut_at_definitions_with_their_decorators_and_comments() -> None:
    text = (
        '"""About."""\nimport os\n\n# Why.\n@cached\ndef f(a):\n    return a\n\n\nclass A:\n    """Docs."""\n\n'
        "    def m(self):\n        return 'x'\n\n    async def n(self):\n" + "        call()\n" * 30
    )
    cut = pieces(text, "a.py", max_chars=200)
    named = {str(chunk.position.get("name")): chunk for chunk in reversed(cut)}
    assert list(reversed(named)) == ["None", "f", "A", "A.m", "A.n"]
    assert named["f"].text.startswith("# Why.\n@cached\ndef f(a):")
    assert (named["f"].position["line"], named["f"].position["end_line"]) == (4, 7)
    assert named["A.m"].text == "    def m(self):\n        return 'x'"
    assert named["A.m"].subject.startswith("A.m\n")
    # A class that is short enough stays whole.
    assert [chunk.position.get("name") for chunk in pieces("class B:\n    def m(self): ...\n", "b.py")] == ["B"]


@pytest.mark.parametrize(
    "broken",
    ["def (", "x = '''", "\ufeffdef f(): pass", "(" * 5000 + ")" * 5000, "class A:\n\tdef m(self): 1\n        2"],
)
def test_python_that_is_none_is_cut_all_the_same(broken: str) -> None:
    assert "".join(chunk.text for chunk in pieces(broken, "a.py", max_chars=20_000)) == broken


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("a.go", "package p\n\n// Adds.\nfunc Add(a int) int {\n}\n\nfunc (s *S) Get() {\n}\n", ["", "Add", "Get"]),
        ("a.ts", "x\n\nexport async function f() {\n}\nconst g = (a) => {\n}\nexport class C {\n}\n", ["", *"fgC"]),
        ("a.rs", "use x;\n\n/// Doc\npub(crate) fn f() {\n}\n\nimpl<T> Foo for Bar {\n}\n", ["", "f", "Foo"]),
        ("A.java", "package a;\n\n@Deprecated\npublic final class A {\n}\n\ninterface B {\n}\n", ["", "A", "B"]),
        ("a.c", "#include <x.h>\nint y;\n\nstatic int add(int a,\n    int b)\n{\n  if (a) {}\n}\n", ["", "add"]),
        ("a.sql", "select 1;\n\nCREATE OR REPLACE VIEW v AS\nselect 2;\ncreate table t (a int);\n", ["", "v", "t"]),
        ("a.sh", "set -e\n\ngreet() {\n  echo\n}\nif x; then\nfi\n", ["", "greet"]),
        ("a.rb", "require 'x'\n\nmodule M\nend\n\ndef f(a)\nend\n", ["", "M", "f"]),
    ],
)  # fmt: skip
def test_other_languages_are_cut_where_definitions_begin(name: str, text: str, names: list[str]) -> None:
    cut = pieces(text, name)
    assert [chunk.position.get("name", "") for chunk in cut] == names
    assert "\n".join(chunk.text for chunk in cut).split() == text.split()


def test_a_long_line_of_code_is_read_in_no_time() -> None:
    assert pieces("a<b " * 200_000, "a.js")


def test_text_is_cut_between_paragraphs_else_lines_else_sentences_else_words() -> None:
    paragraphs = "\n\n".join(f"Paragraph {number} says a little something." for number in range(9))
    for chunk in pieces(paragraphs, "a.txt", max_chars=150):
        assert re.fullmatch(r"Paragraph \d .*something\.", chunk.text, re.S)
    lines = "\n".join(f"line {number} of a list that is long" for number in range(20))
    for chunk in pieces(lines, "a.txt", max_chars=150):
        assert re.fullmatch(r"line \d+ .*long", chunk.text, re.S)
    sentences = "This is a sentence of some words. " * 20
    for chunk in pieces(sentences, "a.txt", max_chars=150):
        assert re.fullmatch(r"(This|some|words\.|of) .*words\.", chunk.text)
    first, second = pieces("word " * 40, "a.txt", max_chars=150)[:2]
    assert {*first.text.split(), *second.text.split()} == {"word"}


def test_a_paragraph_that_is_cut_in_two_overlaps_by_whole_words() -> None:
    text = " ".join(f"w{number}" for number in range(100))
    first, second, *_ = pieces(text, "a.txt", max_chars=100)
    shared = second.text.split()[: second.text.split().index(first.text.split()[-1]) + 1]
    assert first.text.endswith(" ".join(shared))
    assert 0 < len(" ".join(shared)) <= 10


def test_pieces_that_say_the_same_have_the_same_digest_wherever_they_are() -> None:
    (one,), (other,) = pieces("# A\n\ntext", "a.md"), pieces("\n\n# A\n\ntext\n", "b.md")
    assert one.digest == other.digest
    assert one.position != other.position


# PDF and HTML.


def pdf(*pages: str) -> bytes:
    """A PDF by hand, with a line of text on each page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    body, places = "%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{one}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF"
    return f"{body}xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def test_pdf_is_read_page_by_page() -> None:
    cut = pieces(pdf("On the first page", "", "On the third page"), "a.pdf")
    assert [(chunk.text, chunk.position) for chunk in cut] == [
        ("On the first page", {"page": 1}),
        ("On the third page", {"page": 3}),
    ]


@pytest.mark.parametrize("content", [b"", b"no pdf at all", pdf("cut off")[:300], b"%PDF-1.4\n\0\0\0"])
def test_what_is_no_pdf_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^'a\.pdf' "):
        pieces(content, "a.pdf")


def test_a_pdf_of_pictures_says_that_it_has_no_text() -> None:
    with pytest.raises(InputError, match=r"'a\.pdf' has no text, only pictures"):
        pieces(pdf("", ""), "a.pdf")


def test_pages_of_a_pdf_may_share_a_letterhead() -> None:
    cut = pieces(sharing(50, b"/X0 Do", forms=[b"BT /F1 12 Tf 72 720 Td (Our address) Tj ET"]), "a.pdf")
    assert [(chunk.text, chunk.position) for chunk in cut] == [("Our address", {"page": page}) for page in range(1, 51)]


#: Drawing, which is quick to go over, and a font that says nothing at length.
_LONG = b"q Q " * 100_000


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(sharing(9, _LONG), id="content"),
        pytest.param(sharing(1, b"/X0 Do " * 9, forms=[_LONG]), id="a form"),
        pytest.param(sharing(9, b"/X0 Do", forms=[b"/X%d Do " % at * 2 for at in range(1, 30)]), id="forms in forms"),
        pytest.param(sharing(9, b"BT (a) Tj ET", to_unicode=b"%" + b"x" * 400_000), id="a font"),
    ],
)
def test_a_pdf_that_comes_to_far_more_than_its_file_is_refused(content: bytes) -> None:
    with pytest.raises(
        InputError, match=r"^'a\.pdf' is too much to read as PDF: its pages come to more than 2 MB.*split"
    ):
        pieces(content, "a.pdf")


def test_a_pdf_with_a_password_says_so() -> None:
    import io

    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf("secret"))))
    writer.encrypt("hunter2", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    with pytest.raises(InputError, match="needs a password"):
        pieces(out.getvalue(), "a.pdf")


def test_html_is_read_without_scripts_and_menus_and_cut_at_its_headings() -> None:
    html = (
        "<html><head><title>T</title><style>p {}</style></head><body><nav>Home</nav><main><h1>Guide</h1><p>Hello "
        "<a href='x'>there</a>.</p><script>alert(1)</script><h2>Install</h2><pre><code>pip install x</code></pre>"
        f"<p>{'Words. ' * 60}</p></main><footer>2026</footer></body></html>"
    )
    cut = pieces(html, "a.html", max_chars=300)
    said = "\n".join(chunk.text for chunk in cut)
    assert "Hello there." in said
    assert "pip install x" in said
    for beside in ("alert", "Home", "2026", "p {}"):
        assert beside not in said
    assert cut[-1].position == {"heading": "Guide > Install"}


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<article><header><h1>Title</h1></header><p>Text.</p></article>", "# Title\n\nText."),
        ("<body><main><header><h1>Title</h1></header><p>Text.</p></main></body>", "# Title\n\nText."),
        ("<head><title>The\npage</title></head><body><h2>Part</h2>Text.</body>", "# The page\n\n## Part\n\nText."),
        ("<title>Site</title><body><main><h1>Page</h1>Text.</main></body>", "# Page\n\nText."),
        ("<body><header><h1>Page</h1><p>Menu</p></header><p>Text.</p></body>", "# Page\n\nText."),
        ("<title>Page</title><body><pre># no title</pre></body>", "# Page\n\n```\n# no title\n```"),
        ("<body><article>One.</article><aside>Ad.</aside><article>Two.</article></body>", "One.\n\nTwo."),
        ("<body><article>One.<article>In it.</article></article></body>", "One.\nIn it."),
        ("<html><body><form><h1>T</h1><p>Text.</p><button>Go</button></form></body></html>", "# T\n\nText."),
        ("Before it.\n\nA <main> is the main part, and <article> one.", None),
        ("Before it. <main>The main part.</main>", "Before it. The main part."),
        ("no tags\n\nat all", None),
        ("<meta charset=latin-1><p>Grüße</p>", "Grüße"),
    ],
)  # fmt: skip
def test_nothing_that_a_page_is_about_is_lost(html: str, text: str | None) -> None:
    said = "\n".join(chunk.text for chunk in pieces(html, "a.html"))
    # Markdown does not care for how many blanks there are.
    assert said.split() == (html if text is None else text).split()


@pytest.mark.parametrize("html", ["<p", "<", "<!--", "<p>" * 3000 + "deep"])
def test_odd_html_is_read_or_refused_in_words(html: str) -> None:
    try:
        pieces(html, "a.htm")
    except InputError as error:
        assert re.search(r"nested too deeply|has no text", str(error))  # noqa: PT017


@pytest.mark.parametrize("html", ["", " ", "<html><body><script>write()</script></body></html>", "<body><img></body>"])
def test_a_page_without_any_text_says_so(html: str) -> None:
    with pytest.raises(
        InputError, match=r"'a\.html' has no text: where a script writes it, save the page as a browser"
    ):
        pieces(html, "a.html")


def test_what_is_given_as_text_is_no_pdf_whatever_it_is_called() -> None:
    (chunk,) = pieces("What the report says.", "https://example.org/report.pdf")
    assert (chunk.text, chunk.position) == ("What the report says.", {"line": 1, "end_line": 1})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", codecs.BOM_UTF8 + "Grüße".encode()),
        ("a.txt", codecs.BOM_UTF16_LE + "Grüße".encode("utf-16-le")),
        ("a.md", codecs.BOM_UTF16_BE + "Grüße".encode("utf-16-be")),
        ("a.txt", codecs.BOM_UTF32_LE + "Grüße".encode("utf-32-le")),
        ("a.txt", codecs.BOM_UTF32_BE + "Grüße".encode("utf-32-be")),
        ("a.py", "# -*- coding: latin-1 -*-\n'Grüße'".encode("latin-1")),
        ("a.py", "#!/usr/bin/env python\n# vim: set fileencoding=cp1251 :\n'Grüße Привет'".encode("cp1251", "ignore")),
        ("a.py", "# -*- coding: latin-1-unix -*-\n'Grüße'".encode("latin-1")),
        ("a.html", codecs.BOM_UTF16_LE + "<p>Grüße</p>".encode("utf-16-le")),
        ("a.html", "<meta charset=latin-1><p>„Grüße“</p>".encode("cp1252")),
        ("a.html", b'<meta http-equiv=x content="text/html; charset=UTF-16"><p>Gr\xc3\xbc\xc3\x9fe</p>'),
        ("a.xhtml", '<?xml version="1.0" encoding="iso-8859-15"?><p>Grüße</p>'.encode("iso-8859-15")),
    ],
)  # fmt: skip
def test_text_is_read_in_the_encoding_that_it_says(name: str, content: bytes) -> None:
    said = " ".join(chunk.text for chunk in pieces(content, name))
    assert "Grüße" in said or "Привет" in said
    assert "\ufffd" not in said
    assert "\ufeff" not in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "Grüße".encode("latin-1"), "is not UTF-8: convert it first, as with iconv -f LATIN1 -t UTF-8"),
        ("a.html", "<p>Grüße</p>".encode("latin-1"), "is not UTF-8: convert it first"),
        ("a.py", "'Grüße'".encode("latin-1"), "is not UTF-8: convert it first"),
        ("a.py", b"# coding: nonsense\nx", "is not UTF-8, and not the nonsense that it says it is: convert it"),
        ("a.py", b"# coding: rot13\nx", "not the rot13 that it says it is"),
        ("a.txt", codecs.BOM_UTF16_LE + b"abc", "not the utf-16-le that it says it is"),
        ("a.md", "# coding: latin-1\nGrüße".encode("latin-1"), "is not UTF-8: convert it first"),
        ("a.txt", "Grüße".encode("utf-16-le"), "is no text"),
    ],
)  # fmt: skip
def test_text_in_who_knows_what_encoding_is_refused_and_not_mangled(name: str, content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        pieces(content, name)


@pytest.mark.parametrize(("name", "module", "kind"), [("a.pdf", "pypdf", "PDF"), ("a.html", "markdownify", "HTML")])
def test_without_the_extra_that_reads_a_file_it_is_said_what_to_type(
    name: str, module: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"'{name}': to read {kind}, type: pip install 'ferrum\[documents\]'"):
        pieces(b"", name)
