"""Every planted fault is contradicted by an audit, and a correct training by none.

Each fault of ``_faults.py`` is planted in the library, and each attack of ``_attacks.py`` is run on it through the public API.
``--write`` puts the table and the figure into ``docs/audit.md`` and ``docs/audit/``; ``--short`` takes as many trials as the
tests do.

    python benchmarks/audit_faults.py [--only "sigma halved"] [--short] [--write]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from _attacks import ATTACKS, CONFIDENCE
from _faults import FAULTS

from ghostgrad.audit import AuditResult

PAGE = Path(__file__).resolve().parent.parent / "docs" / "audit.md"
FIGURES = PAGE.with_suffix("")
BEGIN, END = "<!-- found by benchmarks/audit_faults.py -->", "<!-- end -->"
NOT_PLAYED = {
    # Without Poisson sampling a pass over five records in place of four has another number of steps.
    ("batches not drawn by Poisson", "blank record"),
    ("batches not drawn by Poisson", "long record"),
    ("batches not drawn by Poisson", "one run, every release"),
}
ALSO_CAUGHT_BY = {
    "sigma halved": "test_the_released_noise_has_standard_deviation_sigma_times_c",
    "no noise on one parameter": "test_every_trainable_parameter_is_noised_in_every_step",
    "divided by the drawn batch size": "test_a_step_divides_by_the_true_expected_batch_size",
    "rows clipped, not records": "test_folded_rows_are_clipped_by_record",
    "batches not drawn by Poisson": "test_batches_of_a_fixed_size_are_noticed",
    "noise again after a resume": "test_no_noise_is_drawn_twice",
}
"""The test that shows the same without statistics."""

Found = dict[str, dict[str, AuditResult]]
"""By fault and attack."""


def attack_all(faults: list[str], *, short: bool, seed: int = 0) -> Found:
    """Run every attack on every fault."""
    found: Found = {}
    for fault in faults:
        found[fault] = {}
        for name, attack in ATTACKS.items():
            if (fault, name) in NOT_PLAYED:
                continue
            with FAULTS[fault]():
                found[fault][name] = attack.run(seed, attack.short if short else attack.long)
            print(f"{fault}, {name}: {str(found[fault][name]).splitlines()[0]}", flush=True)
    return found


def verdicts(found: Found) -> str:
    """A row for each fault, a column for each attack."""
    rows = [["planted fault", *ATTACKS], ["---"] * (len(ATTACKS) + 1)]
    for fault, results in found.items():
        cells = [_verdict(results[name]) if name in results else "not played" for name in ATTACKS]
        rows.append([fault, *cells])
    return _table(rows)


def _verdict(result: AuditResult) -> str:
    return "**contradicted**" if result.contradicted else "consistent"


def strongest(found: Found) -> str:
    """For each fault the attack that shows most, with its numbers, and the test that needs no statistics."""
    rows = [["planted fault", "attack", "delta", "epsilon shown", "epsilon claimed", "also caught by the test"]]
    rows.append(["---"] * len(rows[0]))
    for fault, results in found.items():
        if fault == "none":
            continue
        name = max(results, key=lambda name: results[name].witness.lower - results[name].witness.claimed)
        at = results[name].witness
        numbers = [f"{at.delta:g}", f"> {at.lower:.2f}", f"<= {at.claimed:.2f}"]
        rows.append([fault, name if results[name].contradicted else "none", *numbers, f"`{ALSO_CAUGHT_BY[fault]}`"])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(found: Found, path: Path) -> None:
    """How far each attack passes the claim, at the delta where that is most; no bar where it does not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "audit"  # the same figure from the same numbers
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.8 / len(ATTACKS)
    for i, name in enumerate(ATTACKS):
        heights = [_excess(results.get(name)) for results in found.values()]
        axes.bar([x + i * width for x in range(len(found))], heights, width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(found))], [textwrap.fill(name, 14) for name in found])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 3, 10, 30], labels=["0", "1", "3", "10", "30"])
    axes.set(ylim=(0, 100), ylabel="epsilon shown beyond epsilon claimed")
    axes.legend(fontsize="small", ncols=4, loc="upper left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _excess(result: AuditResult | None) -> float:
    return result.witness.lower - result.witness.claimed if result is not None and result.contradicted else 0.0


def write(found: Found) -> None:
    """Replace what stands between the marks on the page, and the figure."""
    draw(found, FIGURES / "faults.svg")
    page = PAGE.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n\n{verdicts(found)}\n\n{strongest(found)}\n\n{page[end:]}")


def main() -> None:
    """Attack, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--short", action="store_true", help="as many trials as the tests")
    parser.add_argument("--write", action="store_true", help="update docs/audit.md and its figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = attack_all(options.only, short=options.short)
    print(f"\nconfidence {CONFIDENCE} for each audit\n\n{verdicts(found)}\n\n{strongest(found)}")
    missed = [fault for fault, results in found.items() if not any(r.contradicted for r in results.values())]
    wrong = [name for name, result in found.get("none", {}).items() if result.contradicted]
    if options.write:
        write(found)
    if wrong or set(missed) - {"none"}:
        raise SystemExit(f"not caught: {missed}; contradicted without a fault: {wrong}")


if __name__ == "__main__":
    main()
