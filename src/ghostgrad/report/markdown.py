"""A report as a Markdown block for a model card."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from ghostgrad.report.view import EFFECTS, VERDICTS, Section, Table, sections, statement

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$>-])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no links, one line.

    >>> escape("<b>*x*</b> | http://a.b")
    '&lt;b&gt;\\\\*x\\\\*&lt;/b&gt; \\\\| http&#58;//a.b'
    """
    flat = _CONTROL.sub(" ", text)
    marked = html.escape(_SPECIAL.sub(r"\\\1", flat), quote=False).replace(r"\&gt;", "&gt;")
    return marked.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def to_markdown(data: Mapping[str, Any]) -> str:
    """The whole report; what voids the guarantee comes first."""
    title = f": {escape(data['title'])}" if data["title"] else ""
    parts = [f"## Differential privacy{title}", f"**{VERDICTS[data['holds']]}**"]
    if data["findings"]:
        parts.append("\n".join(f"* **{EFFECTS[f['effect']]}.** {escape(f['statement'])}" for f in data["findings"]))
    parts.append(escape(statement(data)))
    return "\n\n".join([*parts, *(part for section in sections(data) for part in _section(section))]) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"### {escape(section.title)}"]
    remark = [escape(section.remark)] if section.remark else []
    parts += [f"**{remark.pop()}**"] if section.private and remark else []
    if section.facts:
        parts.append(_table(Table(("fact", "value"), section.facts)))
    if section.table is not None and section.table.rows:
        parts.append(_table(section.table))
    return parts + remark


def _table(table: Table) -> str:
    rules = ["---:" if column in table.numeric else "---" for column in range(len(table.header))]
    rows = [[escape(cell) for cell in row] for row in (table.header, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rules, *rows[1:]])
