"""``python -m ghostgrad``: questions that can be answered before and after training, without importing torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ghostgrad.errors import GhostgradError


@dataclass(frozen=True)
class Command:
    """One subcommand: its arguments, what it prints, and its exit status. Imports belong inside the functions, to stay fast."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[str, int]]


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, required=True, help="records in the dataset")
    parser.add_argument("--batch-size", type=int, required=True, help="expected (logical) batch size")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float, help="passes over the dataset")
    length.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--delta", type=float, required=True, help="failure probability, well below 1 / n")
    parser.add_argument("--accountant", default="pld", help="pld (default), rdp or gdp")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--epsilon", type=float, required=True, help="the epsilon to stay within")


def _add_epsilon(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--noise-multiplier", type=float, required=True, help="noise / max_grad_norm")


def _plan(arguments: argparse.Namespace, epsilon: float | None, noise_multiplier: float | None) -> tuple[str, int]:
    from ghostgrad.accounting.planning import make_plan

    plan = make_plan(
        dataset_size=arguments.n,
        batch_size=arguments.batch_size,
        delta=arguments.delta,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        epochs=arguments.epochs,
        steps=arguments.steps,
        accountant=arguments.accountant,
    )
    return (json.dumps(plan.to_json(), indent=2, allow_nan=False) if arguments.json else str(plan)), 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    show = actions.add_parser("show", help="the report as text")
    show.add_argument("report", help="a report's JSON file")
    diff = actions.add_parser("diff", help="what differs between two reports; exit status 1 if anything does")
    diff.add_argument("report", help="a report's JSON file")
    diff.add_argument("other", help="another")
    check = actions.add_parser(
        "check", help="exit status 1, with the reasons, unless the guarantee holds and is as asked"
    )
    check.add_argument("report", help="a report's JSON file")
    check.add_argument("--max-epsilon", type=float, required=True, help="the largest epsilon that passes")
    check.add_argument("--delta", type=float, help="where epsilon is read; default the report's first")
    check.add_argument("--accountant", default="pld", help="pld (default) or rdp")
    check.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CODE",
        help="an assumption that may stand, such as user-sampled",
    )


def _report(arguments: argparse.Namespace) -> tuple[str, int]:
    from ghostgrad.report import commands

    if arguments.action == "show":
        return commands.show(arguments.report), 0
    if arguments.action == "diff":
        changes = commands.diff(arguments.report, arguments.other)
        return "\n".join(changes) or "the reports say the same", int(bool(changes))
    failures, passed = commands.check(
        arguments.report,
        max_epsilon=arguments.max_epsilon,
        delta=arguments.delta,
        accountant=arguments.accountant,
        accept=arguments.accept,
    )
    return "\n".join(f"failed: {reason}" for reason in failures) or f"passed: {passed}", int(bool(failures))


COMMANDS: dict[str, Command] = {
    "plan": Command("the noise for an epsilon", _add_plan, lambda a: _plan(a, a.epsilon, None)),
    "epsilon": Command("the epsilon of a noise", _add_epsilon, lambda a: _plan(a, None, a.noise_multiplier)),
    "report": Command("show, compare and check privacy reports", _add_report, _report),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its status: 0, 1 for a "no", or 2 where the arguments cannot be used (said on standard error)."""
    parser = argparse.ArgumentParser(prog="python -m ghostgrad", description="Differentially private training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.summary, description=command.summary))
    parsed = parser.parse_args(arguments)
    try:
        text, status = COMMANDS[parsed.command].run(parsed)
        print(text)
    except GhostgradError as error:
        print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
