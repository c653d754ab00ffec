"""What people give (names, captions, licences) as text of a Markdown page: it stays text."""

import html
import re


def escape(text: object) -> str:
    """Text on one line that no Markdown, HTML or table of a page takes for its own."""
    escaped = re.sub(r"([\\`*_~\[\]|])", r"\\\1", html.escape(str(text), quote=False))
    return re.sub(r"[ \t\r\n]+", " ", escaped)


def code(text: object) -> str:
    """Text as a code span on one line, whatever backticks it has itself; not for tables."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"
