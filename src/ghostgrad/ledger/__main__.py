"""``python -m ghostgrad.ledger run.jsonl``: verify a ledger file and print epsilon, without importing torch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from ghostgrad.accounting import create_accountant
from ghostgrad.errors import GhostgradError, LedgerError
from ghostgrad.ledger.reading import LedgerText, read_ledger


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ghostgrad.ledger", description="Verify a ledger file; print epsilon."
    )
    parser.add_argument("file", nargs="+", help="the ledger file; several copies are also held to each other")
    parser.add_argument("--delta", type=float, default=1e-5, help="default 1e-5; take it well below 1 / records")
    parser.add_argument("--accountant", default="rdp", help="rdp (default), pld or gdp")
    parser.add_argument("--head", help="a hash that the file had once: shows whether lines were cut off since")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _check_copies(names: Sequence[str], texts: Sequence[LedgerText]) -> None:
    longest = max(texts, key=lambda text: len(text.hashes))
    for name, text in zip(names, texts, strict=True):
        if text.identity != longest.identity:
            raise LedgerError(f"{name} and the others are not copies of one file.")
        pairs = zip(text.hashes, longest.hashes, strict=False)
        fork = next((number for number, (one, other) in enumerate(pairs, 1) if one != other), None)
        if fork is not None:
            raise LedgerError(f"{name}: a copy was continued apart from line {fork} on: forked.", fork)


def _answer(text: LedgerText, name: str, delta: float, method: str) -> dict[str, Any]:
    accountant = create_accountant(method)
    accountant.ledger = text.ledger
    epsilon = accountant.get_epsilon(delta)
    return {
        "file": name,
        "holds": True,
        "epsilon": epsilon if math.isfinite(epsilon) else "inf",
        "delta": delta,
        "accountant": method,
        "relation": "; and ".join(text.guarantees) or text.relation,
        "releases": accountant.ledger.steps,
        "steps": sum(entry.steps for entry in text.entries),
        "runs": len({entry.run for entry in text.entries}),
        "lines": len(text.hashes),
        "head": text.head,
        "cut_bytes": text.cut,
    }


def _in_words(answer: dict[str, Any]) -> str:
    lines = [
        f"{answer['file']}: {answer['lines']} lines, one chain, head {answer['head']}",
        f"{answer['steps']} logical steps, {answer['releases']} releases, {answer['runs']} run(s); {answer['relation']}",
        f"epsilon = {answer['epsilon']} at delta = {answer['delta']} ({answer['accountant']})",
    ]
    if answer["cut_bytes"]:
        lines.append(
            f"the last line was cut short by a crash ({answer['cut_bytes']} bytes): its step was not made, and it is not counted"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where the file holds, 1 where it does not, 2 where the question cannot be answered."""
    parsed = _parser().parse_args(arguments)
    try:
        texts = [read_ledger(name, head=parsed.head) for name in parsed.file]
        _check_copies(parsed.file, texts)
        name, text = max(zip(parsed.file, texts, strict=True), key=lambda pair: len(pair[1].hashes))
        answer = _answer(text, name, parsed.delta, parsed.accountant)
    except LedgerError as error:
        print(json.dumps({"holds": False, "line": error.line, "problem": str(error)}) if parsed.json else f"{error}")
        return 1
    except GhostgradError as error:
        print(f"python -m ghostgrad.ledger: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer, indent=2, allow_nan=False) if parsed.json else _in_words(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
