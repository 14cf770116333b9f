"""The zoo: are public architectures, unmodified, trained exactly?

For every architecture and every mode the private step without noise is compared with the textbook step, in which records
go through the model one by one. Prints a table and the totals, and writes docs/supported-models.md.

    python benchmarks/zoo.py                    all that are installed (pip install transformers timm torchvision)
    python benchmarks/zoo.py --only swin        those with "swin" in their name; writes no page

Where Opacus 1.6.0 is installed too, its step is held to the same textbook.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from architectures import Architecture, all_architectures, installed  # noqa: E402
from architectures.peer import opacus_step  # noqa: E402
from architectures.single_record import Reference, difference, private_step, reference  # noqa: E402
from architectures.single_record import difference_with_dropout as dropout_difference  # noqa: E402

from ghostgrad.errors import GhostgradError  # noqa: E402

MODES = ("hooks", "ghost", "bk")
OURS = (*MODES, "dropout")
PEERS = ("Opacus hooks", "Opacus ghost") if installed("opacus") else ()
COLUMNS = (*OURS, *PEERS)


@dataclass(frozen=True)
class Outcome:
    """What one mode did with one architecture: ``"exact"``, ``"refused"``, ``"wrong"`` or ``"crash"``, and why."""

    verdict: str
    reason: str = ""


def try_column(architecture: Architecture, truth: Reference, column: str) -> Outcome:
    """One private step in a mode, or with dropout, or by Opacus."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if column in PEERS:
                return _try_peer(architecture, truth, column)
            if column == "dropout":
                wrong = dropout_difference(architecture, truth)
            else:
                wrong = difference(private_step(architecture, truth, column), truth.gradients)
    except GhostgradError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # anything else is a fault of the library
        return Outcome("crash", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Outcome("wrong", wrong) if wrong else Outcome("exact")


def _try_peer(architecture: Architecture, truth: Reference, column: str) -> Outcome:
    """Whatever it raises counts as a refusal: nothing was trained."""
    try:
        found = opacus_step(architecture, truth, column.removeprefix("Opacus "))
    except Exception:
        return Outcome("refused")
    return Outcome("wrong" if difference(found, truth.gradients) else "exact")


def try_columns(architecture: Architecture) -> dict[str, Outcome]:
    """One private step in every column; a model that cannot be built or run on one record is a fault of the zoo."""
    try:
        truth = reference(architecture)
    except Exception as error:
        return dict.fromkeys(COLUMNS, Outcome("crash", f"no reference: {type(error).__name__}: {error}"))
    return {column: try_column(architecture, truth, column) for column in COLUMNS}


def run(architectures: list[Architecture]) -> dict[Architecture, dict[str, Outcome]]:
    """Try every mode, printing each row when it is known."""
    print(f"{'architecture':46}" + "".join(f"{column:>{_width(column)}}" for column in COLUMNS) + "     s")
    rows = {}
    for architecture in architectures:
        start = time.perf_counter()
        outcomes = try_columns(architecture)
        rows[architecture] = outcomes
        verdicts = "".join(f"{outcome.verdict:>{_width(column)}}" for column, outcome in outcomes.items())
        print(f"{architecture.name:46}{verdicts} {time.perf_counter() - start:5.1f}", flush=True)
        for reason in dict.fromkeys(outcome.reason for outcome in outcomes.values() if outcome.reason):
            print(f"    {reason}", flush=True)
    return rows


def _width(column: str) -> int:
    return max(9, len(column) + 2)


def totals(rows: dict[Architecture, dict[str, Outcome]]) -> list[str]:
    """One line a column."""
    lines = []
    for mode in COLUMNS:
        count = Counter(outcomes[mode].verdict for outcomes in rows.values())
        share = 100 * count["exact"] / max(1, len(rows))
        others = ", ".join(f"{count[verdict]} {verdict}" for verdict in ("refused", "wrong", "crash"))
        lines.append(f"{mode}: {count['exact']} of {len(rows)} exact ({share:.0f} %), {others}")
    return lines


_OPACUS = (
    "*Opacus*: version 1.6.0 on the same model, batch and bound, held to the same textbook. *Refused* is any error it raises.",
)


def page(rows: dict[Architecture, dict[str, Outcome]]) -> str:
    """The supported-models page."""
    lines = [
        "# Supported models",
        "",
        "Written by `python benchmarks/zoo.py`. Every model is built small, with random weights and without dropout; batch",
        "normalisation was replaced by `ModuleValidator.fix`, or put in eval mode. One private",
        "step without noise, with a bound that clips half of the records, is compared with the step that sends records",
        "through the model one by one. *Exact*: float32, within 2e-4 of the update's norm. *Refused*: an error says why, and",
        "nothing was trained. *Dropout*: the same model with dropout and a bound that no record reaches, against plain",
        "autograd under the same random masks.",
        *(_OPACUS if PEERS else ()),
        "",
        *[f"* {line}" for line in totals(rows)],
        "",
        "A model that is not listed is treated in the same way: nothing here depends on its class.",
    ]
    for library in dict.fromkeys(architecture.library for architecture in rows):
        own = {architecture: outcomes for architecture, outcomes in rows.items() if architecture.library == library}
        lines += [
            "",
            f"## {library}",
            "",
            "| model | " + " | ".join(COLUMNS) + " | why not |",
            "|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        for architecture, outcomes in own.items():
            reasons = list(dict.fromkeys(outcome.reason for outcome in outcomes.values() if outcome.reason))
            verdicts = " | ".join(outcome.verdict for outcome in outcomes.values())
            why = "; ".join(reasons).replace("|", "\\|")
            lines.append(f"| {architecture.name} | {verdicts} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="only architectures with this in their name or library; writes no page"
    )
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "supported-models.md", help="where the page is written"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    wanted = options.only.lower()
    chosen = [a for a in all_architectures() if wanted in a.name.lower() or wanted in a.library.lower()]
    rows = run(chosen)
    print("\n".join(totals(rows)))
    if not wanted:
        options.page.write_text(page(rows))
        print(f"written: {options.page}")
    return int(any(outcomes[column].verdict in ("wrong", "crash") for outcomes in rows.values() for column in OURS))


if __name__ == "__main__":
    raise SystemExit(main())
