"""PDFs made by hand, of pages that share what they can."""

from __future__ import annotations

import zlib


def written(objects: list[bytes]) -> bytes:
    """A file of these objects, numbered from 1; the first one is its catalogue."""
    body, places = b"%PDF-1.4\n", []
    parts = [body]
    at = len(body)
    for number, one in enumerate(objects, 1):
        places.append(at)
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (number, one))
        at += len(parts[-1])
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    trailer = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, at)
    return b"".join([*parts, b"xref\n0 %d\n0000000000 65535 f \n" % size, table, trailer])


def stream(content: bytes, more: bytes = b"") -> bytes:
    packed = zlib.compress(content)
    return b"<< /Length %d /Filter /FlateDecode %s >>\nstream\n%s\nendstream" % (len(packed), more, packed)


def sharing(pages: int, content: bytes, *, forms: list[bytes] | None = None, to_unicode: bytes = b"") -> bytes:
    """Pages that all have the same content, font, and forms `/X0`, `/X1`, …, each of which may use the others."""
    forms = forms or []
    named = b" ".join(b"/X%d %d 0 R" % (at, 7 + at) for at in range(len(forms)))
    page = b"<< /Type /Page /Parent 2 0 R /Contents 5 0 R >>"
    first = 7 + len(forms)
    kids = b" ".join(b"%d 0 R" % (first + at) for at in range(pages))
    form = b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources 3 0 R"
    return written([
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d /MediaBox [0 0 612 792] /Resources 3 0 R >>" % (kids, pages),
        b"<< /Font << /F1 4 0 R >> /XObject << %s >> >>" % named,
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica %s >>" % (b"/ToUnicode 6 0 R" if to_unicode else b""),
        stream(content),
        stream(to_unicode),
        *[stream(one, form) for one in forms],
        *[page] * pages,
    ])  # fmt: skip
