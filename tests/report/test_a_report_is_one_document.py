"""One JSON document of one schema: read back it is the same, and what is not one is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostgrad import PrivacyEngine, PrivacyReport
from ghostgrad.accounting import Opaque
from ghostgrad.errors import ConfigurationError, MissingDependencyError
from ghostgrad.report._schema import schema, validate
from ghostgrad.report.view import lines

Train = Callable[..., PrivacyEngine]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["inf", "unknown", "void"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def example() -> dict[str, Any]:
    """A report with something in every place; made once."""
    engine = PrivacyEngine()
    engine.accountant.step(noise_multiplier=2.0, sample_rate=1.0, steps=3)
    engine.accountant.record(Opaque(0.1, 1e-9))
    data = engine.report(deltas=[1e-5], title="T", statements={"metrics": "none"}, not_private=True).data
    data["budget"] = {"epsilon": 3.0, "delta": 1e-5}
    return data


EXAMPLE = example()


def places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a document."""
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [path, *(found for name, value in inner for found in places(value, (*path, name)))]


def replaced(path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(EXAMPLE)
    holder = data
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    return data


def test_what_was_written_is_read_back(train: Train, tmp_path: Path) -> None:
    report = train(clipping="per_layer").report(title="É <b> | $x$", not_private=True)
    assert PrivacyReport.from_json(report.to_json()) == report
    assert PrivacyReport.from_data(report.data) == report
    report.save(tmp_path / "a.json")
    assert PrivacyReport.from_json((tmp_path / "a.json").read_text("utf-8")) == report
    json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def test_a_report_cannot_be_changed(train: Train) -> None:
    report = train().report()
    report.data["holds"] = "no"
    assert report.holds == "yes"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.text = ""  # type: ignore[misc]


def test_every_form_is_saved_by_its_suffix_and_no_part_file_is_left(train: Train, tmp_path: Path) -> None:
    report = train().report()
    for suffix, form in (
        (".json", report.to_json), (".md", report.to_markdown), (".html", report.to_html), (".tex", report.to_latex),
        (".yaml", report.to_deployment_record),
    ):  # fmt: skip
        report.save(tmp_path / f"report{suffix}")
        assert (tmp_path / f"report{suffix}").read_text("utf-8") == form()
    assert len(list(tmp_path.iterdir())) == 5
    with pytest.raises(ConfigurationError, match=r"'\.docx'"):
        report.save(tmp_path / "report.docx")
    with pytest.raises(OSError, match="no-such-folder"):
        report.save(tmp_path / "no-such-folder" / "report.json")


def test_the_schema_asks_for_everything_that_it_names() -> None:
    """So that no part is optional, and no part goes unchecked."""

    def walk(form: Any) -> None:
        if isinstance(form, dict) and "properties" in form:
            assert form["additionalProperties"] is False
            assert sorted(form["required"]) == sorted(form["properties"])
        for part in form.values() if isinstance(form, dict) else form if isinstance(form, list) else ():
            walk(part)

    walk(schema())


def test_every_place_is_held_to_the_schema() -> None:
    """Something else at any place is found, also inside the ledger, which has a reader of its own."""
    for path in places(EXAMPLE):
        with pytest.raises(ConfigurationError):
            PrivacyReport.from_data(replaced(path, {"no": "such"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[]", "list"),
        ("{}", "format=None"),
        ("NaN", "NaN is no JSON number"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({**EXAMPLE, "version": 2}), "version=2"),
        (json.dumps({**EXAMPLE, "version": True}), "version=True"),
        (json.dumps({**EXAMPLE, "version": 1.0}), "version=1.0"),
        (json.dumps({**EXAMPLE, "extra": 1}), "'extra'"),
        (json.dumps({**EXAMPLE, "title": "\ud800"}), "half a character"),
        (json.dumps(EXAMPLE)[:-3], "cut short"),
        (json.dumps(replaced(("epsilon", 0, "upper"), "huge")).replace('"huge"', "1e999"), r"epsilon\[0\].upper"),
        (json.dumps(replaced(("releases", "count"), 10**30)), "a huge integer"),
        (json.dumps(replaced(("epsilon", 0, "upper"), -1.0)), r"epsilon\[0\].upper"),
        (json.dumps(replaced(("epsilon",), [])), "report.epsilon"),
        (json.dumps(replaced(("ledger",), "known")), "report.ledger"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        PrivacyReport.from_json(text)


@pytest.mark.parametrize("value", [b"{}", None, 3])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError):
        PrivacyReport.from_json(value)


@pytest.mark.parametrize(
    "change",
    [
        {"holds": "yes"},
        {"holds": "yes", "findings": []},
        {"holds": "no"},
        {"findings": [{"code": "fine", "effect": "other", "statement": "All is well."}], "holds": "yes"},
        {"findings": [{**finding, "effect": "other"} for finding in EXAMPLE["findings"]], "holds": "yes"},
    ],
)
def test_a_verdict_that_the_facts_deny_is_refused(change: dict[str, Any]) -> None:
    assert EXAMPLE["holds"] == "unknown"
    with pytest.raises(ConfigurationError, match="changed by hand"):
        PrivacyReport.from_data({**EXAMPLE, **change})


@settings(deadline=None)
@given(st.text() | st.binary() | JSON.map(lambda value: json.dumps(value)))
def test_any_text_is_read_or_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError):
        PrivacyReport.from_json(text)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(places(EXAMPLE)), JSON)
def test_any_change_is_refused_or_can_be_rendered(path: tuple[Any, ...], value: Any) -> None:
    try:
        report = PrivacyReport.from_json(json.dumps(replaced(path, value)))
    except ConfigurationError:
        return
    assert PrivacyReport.from_json(report.to_json()) == report
    for text in (report.to_html(), report.to_markdown(), report.to_latex(), report.to_deployment_record()):
        text.encode()
    assert lines(report.data)


@pytest.mark.parametrize(
    ("value", "form", "holds"),
    [
        (1, {"type": "integer"}, True),
        (True, {"type": "integer"}, False),
        (1.0, {"type": "integer"}, False),
        (math.inf, {"type": "number"}, False),
        (1, {"const": True}, False),
        ("b", {"enum": ["a"]}, False),
        ([1, "x"], {"type": "array", "items": {"type": "integer"}}, False),
        ([], {"type": "array", "minItems": 1}, False),
        ("abc", {"type": "string", "maxLength": 2}, False),
        ("unknown", {"anyOf": [{"type": "number"}, {"const": "unknown"}]}, True),
        (2, {"type": "number", "maximum": 1}, False),
    ],
)
def test_the_reader_of_schemas(value: Any, form: dict[str, Any], holds: bool) -> None:
    if holds:
        validate(value, form)
    else:
        with pytest.raises(ConfigurationError):
            validate(value, form)


def test_a_page_without_jinja2_says_what_to_install(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"ghostgrad\[report\]"):
        train().report().to_html()
