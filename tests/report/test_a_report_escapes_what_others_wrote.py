"""Names of modules and words of users are text in every form, never markup; and a page loads nothing."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ghostgrad import PrivacyEngine, PrivacyReport
from ghostgrad.report.markdown import escape

Train = Callable[..., PrivacyEngine]

EVIL = (
    "</style><script>alert(1)</script> | [x](http://evil.example) $\\input{/etc/passwd}$ _a_ **b** "
    "`c`\n# d\n<img src=x> \u2028e"
)


class Page(html.parser.HTMLParser):
    """Which elements and addresses a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]
        self.ids += [value or "" for name, value in attrs if name == "id"]


@pytest.fixture
def report(train: Train) -> PrivacyReport:
    class Named(nn.Sequential):
        pass

    Named.__name__ = "<script>Named|$x$"
    module = Named()
    module.add_module("<b>a|b$</b>", nn.Linear(4, 3))
    return train(module=module).report(title=EVIL, privacy_unit=EVIL, statements={"metrics": EVIL}, not_private=True)


def test_html_has_the_same_elements_whatever_was_written(report: PrivacyReport, train: Train) -> None:
    plain = train(module=nn.Sequential(nn.Linear(4, 3))).report(title="t", privacy_unit="u", not_private=True)
    pages = []
    for one in (report, plain):
        page = Page()
        page.feed(one.to_html())
        pages.append(page)
        assert page.addresses == page.ids == []
        assert "script" not in page.elements
        assert "img" not in page.elements
    assert pages[0].elements == pages[1].elements
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report.to_html()


def test_a_page_loads_nothing_from_elsewhere(train: Train) -> None:
    page = train().report().to_html()
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert "default-src 'none'" in page
    assert page.count("<svg") == 2
    for part in ("prefers-color-scheme: dark", "@media print", 'lang="en"', "<title>"):
        assert part in page


def test_markdown_keeps_rows_cells_and_headings(report: PrivacyReport, train: Train) -> None:
    plain = train(module=nn.Sequential(nn.Linear(4, 3))).report(title="t", privacy_unit="u", not_private=True)
    shapes = []
    for one in (report, plain):
        text = one.to_markdown()
        shapes.append([(line[:2], len(re.findall(r"(?<!\\)\|", line))) for line in text.splitlines()])
        assert "<" not in text
        assert not re.search(r"(?<!\\)[`$]", text)
        assert "://" not in text
    assert shapes[0] == shapes[1]


def test_escaped_markdown_has_no_bare_specials() -> None:
    escaped = escape(EVIL)
    assert not re.search(r"(?<!\\)[*_`|$\[\]]", escaped)
    assert "\n" not in escaped
    assert "\u2028" not in escaped


def test_latex_is_one_line_without_commands_of_others(report: PrivacyReport) -> None:
    text = report.to_latex()
    assert text.count("\n") == 1
    assert "\u2028" not in text
    assert "\\input" not in text
    commands = set(re.findall(r"\\[a-zA-Z]+", text))
    assert commands <= {"\\textbf", "\\textbackslash", "\\textless", "\\textgreater", "\\textasciitilde"}
    assert len(re.findall(r"(?<!\\)\$", text)) == 2


def test_the_deployment_record_is_json_with_the_registry_s_fields(report: PrivacyReport, train: Train) -> None:
    record = json.loads(report.to_deployment_record())
    assert record["deployment"]["privacy_loss"]["privacy_unit"] == EVIL
    clean = json.loads(train().report(deltas=[1e-5], title="A model").to_deployment_record())
    assert set(clean) == {"url_slug", "deployment"}
    deployment = clean["deployment"]
    assert set(deployment) == {
        "basic", "dp_variant", "privacy_loss", "deployment_model", "implementation", "administrative"
    }  # fmt: skip
    assert set(deployment["basic"]) == {
        "name", "data_curators", "description", "intended_use", "data_product_type", "data_product_region", "publication_date"
    }  # fmt: skip
    parameters = deployment["privacy_loss"]["privacy_parameters"]
    assert parameters["delta"] == 1e-5
    assert parameters["epsilon"] == pytest.approx(train().get_epsilon(1e-5, accountant="pld"), rel=1e-6)
    assert deployment["administrative"]["status"] == "Draft"
    assert torch.__version__.split("+")[0] in deployment["implementation"]["mechanisms"]
