"""The words of a report: one view of the document, which Markdown and HTML lay out. Nothing is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghostgrad.report.numbers import at_least, at_most, nearly, shown

Data = Mapping[str, Any]

RELATIONS = {
    "add-or-remove-one": "adding or removing one privacy unit",
    "replace-one": "replacing one privacy unit",
    "zero-out": "blanking one privacy unit, which keeps its place",
}
VERDICTS = {
    "yes": "The guarantee holds as stated.",
    "no": "The guarantee does not hold.",
    "unknown": "The guarantee rests on what the library could not see.",
}
_CLAIMS = {
    "yes": "The trained parameters are",
    "no": "If it were not for that, the trained parameters would be",
    "unknown": "If what is assumed is true, the trained parameters are",
}
_ANSWERS = {True: "yes", False: "no", "unknown": "unknown"}
EFFECTS = {"void": "Does not hold", "assumed": "Assumed", "other": "Note"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; ``numeric`` says which columns are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """A title, facts as (name, value), a table, and a remark under them."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    table: Table | None = None
    remark: str = ""
    private: bool = False


def headline(data: Data) -> dict[str, Any] | None:
    """The row of epsilon that is quoted: the least upper bound of our own accountants at the first delta."""
    main = data["epsilon"][0]["delta"]
    rows = [row for row in data["epsilon"] if row["accountant"] in ("pld", "rdp") and row["delta"] == main]
    known = [row for row in rows if row["upper"] != "unknown" and row["bound"]]
    return min(known, key=lambda row: float(row["upper"]), default=None)


def statement(data: Data) -> str:
    """The guarantee in a sentence, and whether it is one."""
    row, delta = headline(data), shown(data["epsilon"][0]["delta"])
    if row is None:
        return f"Epsilon at delta {delta} is unknown."
    if row["upper"] == "inf":
        return f"No finite epsilon can be claimed at delta {delta}."
    claim = (
        f"({at_most(row['upper'])}, {delta})-differentially private with respect to {RELATIONS[data['neighbouring']]} "
        f"(by the {row['accountant']} accountant)."
    )
    return f"{_CLAIMS[data['holds']]} {claim}"


def sections(data: Data) -> list[Section]:
    """Everything but the verdict, the findings and the figures, in order."""
    private = [] if data["not_private"] is None else _not_private(data["not_private"])
    trainings = [
        part for number, training in enumerate(data["trainings"]) for part in _training(data, number, training)
    ]
    return [*private, _unit(data), _epsilon(data), _attacks(data), _releases(data), *_made(data), *trainings,
            _not_covered(data), _libraries(data)]  # fmt: skip


def _unit(data: Data) -> Section:
    return Section(
        "What is protected",
        (
            ("privacy unit", data["privacy_unit"]),
            ("neighbouring datasets", f"differ by {RELATIONS[data['neighbouring']]}"),
            ("sampling", data["guarantee"]),
        ),
    )


def _epsilon(data: Data) -> Section:
    rows = tuple(
        (
            shown(row["delta"]),
            row["accountant"] if row["bound"] else f"{row['accountant']} (approximation)",
            at_least(row["lower"]),
            at_most(row["upper"]) if row["bound"] else nearly(row["upper"]),
            row["method"],
        )
        for row in data["epsilon"]
    )
    table = Table(("delta", "accountant", "epsilon at least", "epsilon at most", "method"), rows, (2, 3))
    return Section(
        "Epsilon",
        table=table,
        remark="Upper bounds are rounded up. An approximation can be below the truth and is no claim; it is here to compare with "
        "papers.",
    )


def _attacks(data: Data) -> Section:
    found = data["attacks"]
    rows = [("Membership: true minus false positive rate", "any attack", at_most(found["membership_advantage"]))]
    rows += [
        (
            "Membership: true positive rate",
            f"at {_percent(part['false_positives'])} false positives",
            at_most(part["upper"]),
        )
        for part in found["true_positives"]
    ]
    rows += [
        (
            "Belief that a record was in",
            f"from a prior of {_percent(part['prior'])}, but for {shown(part['failure'])} of trainings",
            at_most(part["upper"]),
        )
        for part in found["posterior"]
    ]
    rows += [
        (
            "Reconstruction of a record",
            f"guessed right with {shown(part['baseline'])} without the model",
            at_most(part["upper"]),
        )
        for part in found["reconstruction"]
    ]
    return Section(
        "What an attacker can reach",
        table=Table(("attack", "where", "probability at most"), tuple(rows), (2,)),
        remark=f"By the {found['accountant']} accountant, for an attacker who sees all released parameters and knows "
        "everything but one privacy unit. True positives: Dong, Roth and Su (2022), proposition 6. Reconstruction: Balle, "
        "Cherubin and Hayes (2022); Hayes, Mahloujifar and Balle (2023); Kaissis, Hayes, Ziller and Rueckert (2023).",
    )


def _percent(rate: Any) -> str:
    return f"{shown(100 * rate)} %" if not isinstance(rate, str) else rate


def _releases(data: Data) -> Section:
    found, budget = data["releases"], data["budget"]
    least, largest = shown(found["least_noise_multiplier"]), shown(found["largest_noise_multiplier"])
    facts = [
        ("optimizer steps", shown(found["steps"])),
        ("releases in the ledger", f"{shown(found['count'])}, in {shown(found['phases'])} phase(s)"),
        ("noise multiplier of a release", least if least == largest else f"{least} to {largest}"),
        ("accountant of the training", data["accountant"]),
        (
            "budget",
            "none was kept"
            if budget is None
            else f"epsilon {shown(budget['epsilon'])} at delta {shown(budget['delta'])}, kept",
        ),
    ]
    facts += [(f"recorded by hand: {part['kind']}", shown(part["count"])) for part in found["by_hand"]]
    return Section("Releases", tuple(facts))


def _made(data: Data) -> list[Section]:
    """Where the trainings below do not say it of all releases."""
    made, steps = data["releases"]["made"], sum(training["steps"] for training in data["trainings"])
    if len(made) < 2 and steps == data["releases"]["steps"]:
        return []
    rows = tuple(
        (shown(m["releases"]), m["sampler"], m["noise"], _ANSWERS[m["secure"]], _ANSWERS[m["seeded"]], m["guarantee"])
        for m in made
    )
    table = Table(("releases", "batches", "noise source", "secure noise", "seeded", "guarantee"), rows, (0,))
    return [
        Section(
            "How the releases were made",
            table=table,
            remark="As the engine, its checkpoint and its ledger file have it.",
        )
    ]


def _training(data: Data, number: int, training: Data) -> list[Section]:
    several = len(data["trainings"]) > 1
    title = f"Training {number + 1}: {training['model']}" if several else "Mechanism"
    rows = tuple((m["path"] or "(root)", m["type"], m["rule"], shown(m["parameters"])) for m in training["modules"])
    table = Table(("module", "type", "rule", "trainable parameters"), rows, (3,))
    plan = f"Per-layer plan{f' of training {number + 1}' if several else ''}"
    remark = "Which route a norm takes follows the shapes of the records that came, so it is not in a report to be published."
    return [Section(title, (*_mechanism(training), *_sampling(training))), Section(plan, table=table, remark=remark)]


def _mechanism(training: Data) -> tuple[tuple[str, str], ...]:
    varies = " (of the last step; it varied)"
    noise = training["noise"]
    return (
        ("model, optimizer", f"{training['model']}, {training['optimizer']}"),
        ("trainable parameters", shown(training["trainable_parameters"])),
        ("noise multiplier (sigma)", shown(training["noise_multiplier"]) + varies * training["noise_multiplier_varies"]),
        ("of which for the gradients", shown(training["gradient_noise_multiplier"])),
        ("clipping", training["clipping"]),
        ("max_grad_norm (C)", shown(training["max_grad_norm"]) + varies * training["max_grad_norm_varies"]),
        ("sensitivity", shown(training["sensitivity"])),
        ("also released", "; ".join(training["also_released"]) or "nothing"),
        ("clipper", training["clipper"]),
        ("noise source", noise["source"]),
        ("secure noise", _ANSWERS[noise["secure"]]),
        ("seeded", "yes: known to whoever knows the seed" if noise["seeded"] is True else _ANSWERS[noise["seeded"]]),
        ("processes", shown(training["ranks"])),
    )  # fmt: skip


def _sampling(training: Data) -> tuple[tuple[str, str], ...]:
    sampling = training["sampling"]
    return (
        ("expected batch size", f"{shown(training['expected_batch_size'], 6)} ({training['loss_reduction']} of losses)"),
        ("sample rate", shown(training["sample_rate"], 6)),
        ("steps", shown(training["steps"])),
        ("sampling, assumed by the accounting", sampling["assumed"]),
        ("sampling, observed", sampling["observed"]),
        ("draws handed out, passes begun", f"{shown(sampling['draws'])}, {shown(sampling['passes'])}"),
        ("which guarantees", sampling["guarantee"]),
    )  # fmt: skip


def _not_private(found: Data) -> list[Section]:
    rows = tuple(
        (m["path"], m["type"], m["rule"], m["route"], shown(m["parameters"]), m["kept"]) for m in found["modules"]
    )
    return [
        Section(
            "Not private: do not publish",
            (("records dropped as not finite", shown(found["not_finite_records"])),),
            Table(
                ("module", "type", "rule", "norms", "trainable parameters", "kept until the factors are known"),
                rows,
                (4,),
            ),
            found["warning"],
            private=True,
        )
    ]


def _not_covered(data: Data) -> Section:
    rows = tuple((part["what"].replace("_", " "), part["why"], part["stated"]) for part in data["not_covered"])
    return Section("What epsilon does not count", table=Table(("what", "why", "what the user states"), rows))


def _libraries(data: Data) -> Section:
    return Section("Versions", tuple((part["name"], part["version"]) for part in data["libraries"]))


def lines(data: Data) -> Sequence[str]:
    """The report for a terminal."""
    found = [data["title"]] if data["title"] else []
    found += [
        VERDICTS[data["holds"]],
        *(f"  {EFFECTS[f['effect']]} ({f['code']}): {f['statement']}" for f in data["findings"]),
    ]
    found += [statement(data)]
    for section in sections(data):
        found += ["", section.title.upper()]
        width = max((len(name) for name, _ in section.facts), default=0)
        found += [f"  {name:<{width}}  {text}" for name, text in section.facts]
        if section.table is not None:
            found += _grid(section.table)
        found += [f"  {section.remark}"] if section.remark else []
    return found


def _grid(table: Table) -> list[str]:
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    return [
        f"  {'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))}".rstrip() for row in rows
    ]
