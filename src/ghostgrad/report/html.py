"""A report as a page on its own: nothing is loaded from elsewhere, and what the user wrote is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from ghostgrad.errors import MissingDependencyError
from ghostgrad.report import charts
from ghostgrad.report.numbers import at_most, shown
from ghostgrad.report.view import EFFECTS, RELATIONS, VERDICTS, headline, sections, statement


def to_html(data: Mapping[str, Any]) -> str:
    """The page.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingDependencyError(
            "jinja2 is not installed, so no page can be made; pip install 'ghostgrad[report]', or use to_markdown()."
        ) from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("ghostgrad.report").joinpath("page.html").read_text("utf-8")
    row = headline(data)
    figures = [
        (
            Markup(charts.line_chart(data["figures"]["epsilon"], title="Epsilon over the releases")),
            f"Epsilon over the releases, at delta {shown(data['epsilon'][0]['delta'])}.",
        ),
        (
            Markup(charts.line_chart(data["figures"]["trade_off"], title="Trade-off curve", diagonal=True)),
            "The least miss rate of any membership attack. Dashed: guessing.",
        ),
    ]
    return environment.from_string(source).render(
        title=data["title"],
        verdict=VERDICTS[data["holds"]],
        holds=data["holds"],
        findings=[(EFFECTS[f["effect"]], f["effect"], f["statement"]) for f in data["findings"]],
        statement=statement(data),
        figures=figures,
        key_facts=[
            ("epsilon at most", "unknown" if row is None else at_most(row["upper"])),
            ("delta", shown(data["epsilon"][0]["delta"])),
            ("true positives at 0.1 % false", at_most(data["attacks"]["true_positives"][0]["upper"])
             if data["attacks"]["true_positives"] else "unknown"),
            ("optimizer steps", shown(data["releases"]["steps"])),
        ],
        relation=RELATIONS[data["neighbouring"]],
        sections=sections(data),
        version=data["version"],
    )  # fmt: skip
