"""What a check found, as rows and as text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

_WIDTH = 88


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: what should hold.
        holds: whether it does.
        found: what was seen, in short.
        reason: why it does not hold and what to do, where more can be said.
    """

    what: str
    holds: bool
    found: str
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The findings of ``engine.check``; ``str()`` is a table. It is about private records: for your eyes, not for a report.

    Attributes:
        headline: what was checked.
        findings: in the order of the table.
        modes: by clipper, how far its clipped sum is from that of the single-record loop, relative to it; None where it refused.

    >>> print(CheckReport("2 records", (Finding("bk is exact", True, "off by 0.0e+00"),), {"bk": 0.0}))
    2 records: everything holds
      yes  bk is exact  off by 0.0e+00
    """

    headline: str
    findings: tuple[Finding, ...]
    modes: dict[str, float | None]

    @property
    def holds(self) -> bool:
        """Whether everything does."""
        return all(finding.holds for finding in self.findings)

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        failed = sum(not finding.holds for finding in self.findings)
        verdict = f"{failed} of {len(self.findings)} do not hold" if failed else "everything holds"
        width = max((len(finding.what) for finding in self.findings), default=0)
        rows = [f"  {'yes' if f.holds else 'NO ':3}  {f.what.ljust(width)}  {f.found}".rstrip() for f in self.findings]
        reasons = dict.fromkeys(finding.reason for finding in self.findings if finding.reason)
        texts = [
            textwrap.fill(reason, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
            for reason in reasons
        ]
        return "\n".join([f"{self.headline}: {verdict}", *rows, *texts])
