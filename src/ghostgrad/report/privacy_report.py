"""`PrivacyReport`: one JSON document, and everything that is rendered from it. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostgrad.accounting import Ledger
from ghostgrad.errors import ConfigurationError
from ghostgrad.report import _schema
from ghostgrad.report.findings import find, verdict

FORMAT = "ghostgrad-privacy-report"
VERSION = 1


@dataclass(frozen=True)
class PrivacyReport:
    """What was released about private records, and what that means. Made by ``engine.report()``; cannot be changed.

    The document is its JSON (`schema.json` in this package is its JSON Schema); HTML, Markdown, LaTeX and the deployment
    record are rendered from it. What the user wrote, and names of modules, are escaped there.

    Nothing in it depends on private records beyond what was released with noise, unless it was asked for with
    ``not_private=True``; it then stands in a part of its own, under a warning.

    >>> from ghostgrad import PrivacyEngine
    >>> report = PrivacyEngine().report()
    >>> report.holds, report.data["findings"][0]["code"]
    ('yes', 'nothing-released')
    >>> PrivacyReport.from_json(report.to_json()) == report
    True
    """

    text: str
    """The JSON document."""

    def __repr__(self) -> str:
        return f"PrivacyReport(holds={self.holds!r}, {len(self.text)} characters)"

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PrivacyReport:
        """A report from plain data of the schema.

        Raises:
            ConfigurationError: not of the schema, or it says that a guarantee holds that by its own facts does not.
        """
        _check(data)
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigurationError(
                f"the report holds half a character ({error.reason}); it was not written by us."
            ) from None
        return cls(text)

    @classmethod
    def from_json(cls, text: str) -> PrivacyReport:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: no JSON, another format or version, a form that is not the schema's, or a report that says
                that a guarantee holds that by its own facts does not.

        >>> PrivacyReport.from_json("{}")
        Traceback (most recent call last):
        ...
        ghostgrad.errors.ConfigurationError: format=None is not 'ghostgrad-privacy-report'; pass what to_json() returned.
        """
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigurationError(f"the report is not JSON ({error}); was the file cut short?") from error
        return cls.from_data(data)

    @property
    def data(self) -> dict[str, Any]:
        """The document as plain data; a copy."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def holds(self) -> str:
        """``"yes"``, ``"no"``, or ``"unknown"`` where it rests on what the user stated."""
        return str(self.data["holds"])

    # ------------------------------------------------------------------ rendering

    def to_json(self) -> str:
        """The document itself."""
        return self.text

    def to_markdown(self) -> str:
        """A block for a model card."""
        from ghostgrad.report.markdown import to_markdown

        return to_markdown(self.data)

    def to_html(self) -> str:
        """A page on its own: styles and figures are in it, and nothing is loaded from elsewhere.

        Raises:
            MissingDependencyError: jinja2 is not installed.
        """
        from ghostgrad.report.html import to_html

        return to_html(self.data)

    def to_latex(self) -> str:
        """One line for a paper."""
        from ghostgrad.report.latex import to_latex

        return to_latex(self.data)

    def to_deployment_record(self) -> str:
        """A draft of a record for OpenDP's Deployments Registry, as JSON (which is YAML too).

        The field names are those of the registry's schema as of 2026 (``basic``, ``dp_variant``, ``privacy_loss``,
        ``deployment_model``, ``implementation``, ``administrative``). What a training does not know (name, curators, region,
        date) is ``"unknown"`` and is to be filled in before the record is sent.
        """
        from ghostgrad.report.registry import to_deployment_record

        return to_deployment_record(self.data)

    def save(self, path: str | Path) -> None:
        """Write the form that the suffix names: ``.json``, ``.md``, ``.html``, ``.tex``, or ``.yaml`` (deployment record).

        The file is written beside and renamed, so that an old one is whole or replaced.

        Raises:
            ConfigurationError: another suffix.
        """
        forms = {
            ".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html, ".tex": self.to_latex,
            ".yaml": self.to_deployment_record, ".yml": self.to_deployment_record,
        }  # fmt: skip
        target = Path(path)
        if target.suffix not in forms:
            raise ConfigurationError(f"path={str(path)!r} ends in {target.suffix!r}; use one of {', '.join(forms)}.")
        text = forms[target.suffix]()
        beside = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(data: Any) -> None:
    found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
    if found != FORMAT:
        raise ConfigurationError(f"format={found!r} is not {FORMAT!r}; pass what to_json() returned.")
    if data.get("version") != VERSION or isinstance(data.get("version"), (bool, float)):
        raise ConfigurationError(
            f"report version={data.get('version')!r} is not {VERSION}, the one this release reads; read it with the version of "
            f"ghostgrad that wrote it."
        )
    _schema.validate(data)
    if isinstance(data["ledger"], dict):
        Ledger.from_state_dict(data["ledger"])
    said = {(finding["code"], finding["effect"]) for finding in data["findings"]}
    due = [(finding["code"], finding["effect"]) for finding in find(data)]
    missing = [f"{code} ({effect})" for code, effect in due if effect != "other" and (code, effect) not in said]
    if missing or data["holds"] != verdict(data["findings"]):
        raise ConfigurationError(
            f"the report says holds={data['holds']!r} with the findings {sorted(code for code, _ in said)}, but by its own facts "
            f"it should say {missing or verdict(data['findings'])}; it was changed by hand. Make it again with engine.report()."
        )
