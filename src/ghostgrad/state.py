"""The state of an engine as plain values and tensors, and how a training goes on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ghostgrad import _forms as forms
from ghostgrad.accounting import Ledger
from ghostgrad.distributed import inner_module, local
from ghostgrad.errors import CheckpointError, ConfigurationError, choose
from ghostgrad.fingerprint import differences, fingerprint
from ghostgrad.inheritance import missing_from, place_in, releases_made
from ghostgrad.journal import digest
from ghostgrad.keys import RunKey
from ghostgrad.ledger import LedgerFile
from ghostgrad.noise import GeneratorGaussian
from ghostgrad.provenance import Provenance, is_provenance
from ghostgrad.random_states import GLOBAL_STATES
from ghostgrad.session import Session
from ghostgrad.spending import Budget
from ghostgrad.spent import Spent, new_run

FORMAT, VERSION = "ghostgrad-engine", 2


class Holder(Protocol):
    """What of an engine goes into its state."""

    secure_mode: bool
    _key: RunKey
    _sessions: list[Session]
    _opened: int
    _guarantees: list[str]
    _budget: Budget | None
    _spent: Spent
    _ledger: LedgerFile | None
    _writes_ledger: bool


# ---------------------------------------------------------------------- saving


def state_of(engine: Holder, *, keep_key: bool) -> dict[str, Any]:
    """Everything of an engine that a training needs to go on.

    Raises:
        PrivacyError: in the middle of a batch.
    """
    spent = engine._spent
    return {
        "format": FORMAT,
        "version": VERSION,
        "key": engine._key.secret.hex() if keep_key else None,
        "mark": engine._key.mark,
        "seeded": engine._key.seeded,
        "run": spent.run,
        "steps": spent.steps,
        "spans": [list(span) for span in spent.spans],
        "accountant": spent.accountant.ledger.state_dict(),
        "opened": engine._opened,
        "guarantees": list(engine._guarantees),
        "made": [[*training, how.plain(), count] for training, (how, count) in spent.made.items()],
        "ledger": place_in(engine._ledger),
        "plan": _engine_plan(engine),
        "trainings": [_training(session, secrets=keep_key) for session in engine._sessions],
    }


def _engine_plan(engine: Holder) -> dict[str, Any]:
    budget = engine._budget
    return {
        "secure_mode": engine.secure_mode,
        "budget": None if budget is None else [budget.target_epsilon, budget.target_delta],
    }


def _training(session: Session, *, secrets: bool) -> dict[str, Any]:
    optimizer, loader, total = session.optimizer, session.loader, session.optimizer.total
    sigma = optimizer.noise_multiplier
    return {
        "number": session.plan.number,
        "rank": session.plan.topology.rank,
        "plan": fingerprint(session.plan, steps=optimizer.steps),
        "steps": optimizer.steps,
        "noise_step": optimizer.noise_step,
        "noise_multiplier": None if callable(sigma) else float(sigma),
        "max_grad_norm": optimizer.max_grad_norm,
        "expected_batch_size": float(optimizer.expected_batch_size),
        "noise": session.plan.noise.state_dict() if secrets or _is_keyed(session) else {},
        "spending": optimizer.spending.state_dict(),
        "sum": total.state_dict(_names(session), secrets=secrets),
        "loader": None if loader is None else loader.where(consumed=total.consumed, secrets=secrets),
        "parameters": digest(session.parameters),
    }


def _is_keyed(session: Session) -> bool:
    """Whether the noise is a function of the key, so that its state holds no secret."""
    return "course" in session.plan.noise.state_dict()


def _names(session: Session) -> dict[nn.Parameter, str]:
    return {p: name for name, p in inner_module(session.module).named_parameters()}


# ---------------------------------------------------------------------- what a state looks like

_DELIVERY = forms.row(forms.is_count, forms.is_count, forms.is_int, forms.is_bool, forms.is_int)
_PLACE = forms.row(*[forms.is_count] * 3)
_PAIR = forms.row(forms.is_int, forms.is_int)
_FEED = {
    "logical_batch": forms.is_int, "records": forms.is_count, "last": forms.is_bool, "epoch": forms.is_int,
    "step": forms.is_int, "place": _PLACE, "delivered": forms.is_count, "empty_batches": [_PAIR],
    "all_empty": forms.is_bool, "opened": forms.is_count,
}  # fmt: skip
_PASS = {
    "epoch": forms.is_count, "limit": forms.optional(forms.is_count), "random": forms.is_hex,
    "generators": [forms.is_hex], "place": _PLACE, "fetch": forms.optional(GLOBAL_STATES),
}  # fmt: skip
_LOADER = {"epoch": forms.is_count, "pass": forms.optional(_PASS), "feed": _FEED, "generators": [forms.is_hex]}
_SUM = {
    "sums": forms.named(forms.is_tensor), "statistic": forms.is_number, "rows": [_PAIR],
    "last": forms.optional(_DELIVERY), "logical_batches": [forms.is_int], "epochs": [forms.is_int],
    "trained_epochs": [forms.is_int], "not_finite": forms.is_count, "marks": forms.row(*[forms.is_int] * 3),
}  # fmt: skip
_NOISE = forms.either({"course": forms.is_hex}, {"generator": forms.is_hex}, {})
_TRAINING = {
    "number": forms.is_count, "rank": forms.is_count, "plan": forms.is_table, "steps": forms.is_count,
    "noise_step": forms.is_count,
    "noise_multiplier": forms.optional(forms.is_number),
    "max_grad_norm": forms.either(forms.is_number, [forms.is_number]), "expected_batch_size": forms.is_number,
    "noise": _NOISE, "spending": [forms.row(forms.is_int, forms.is_number)], "sum": _SUM,
    "loader": forms.optional(_LOADER), "parameters": forms.is_hex,
}  # fmt: skip
_STATE = {
    "format": forms.is_text, "version": forms.is_int, "key": forms.optional(forms.is_key), "mark": forms.is_hex,
    "seeded": forms.is_bool, "run": forms.is_text, "steps": forms.is_count,
    "spans": [forms.row(forms.is_text, forms.is_count, forms.is_count)], "accountant": forms.is_table,
    "opened": forms.is_count, "guarantees": [forms.is_text],
    "made": [forms.row(forms.is_text, forms.is_count, is_provenance, forms.is_count)],
    "ledger": forms.optional({"id": forms.is_text, "lines": forms.is_positive, "head": forms.is_text}),
    "plan": {"secure_mode": forms.is_bool, "budget": forms.optional(forms.row(forms.is_number, forms.is_number))},
    "trainings": [_TRAINING],
}  # fmt: skip
_WHICH_RECORDS = ("sampler", "steps_per_epoch", "num_records", "records", "accumulation_steps")
_NOTHING = {"sums": {}, "statistic": 0.0, "rows": [], "last": None, "logical_batches": [], "epochs": []}
"""What is in the sum of a logical batch that is begun again."""

FACTS = (
    "secure_mode", "budget", "ledger", "max_grad_norm", "noise_multiplier", "sample_rate", "expected_batch_size", "clipping",
    "grad_sample_mode", "rules", "batch_first", "loss_reduction", "noise", "optimizer", "parameters", "ranks", "torch",
    *_WHICH_RECORDS,
)  # fmt: skip
"""The names of what can differ."""


# ---------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Resumption:
    """A state that was held to an engine: `apply` changes the engine and does not fail.

    Attributes:
        differ: for each training, what is not as it was saved, and was acknowledged.
        key: to go on with, in this process.
        exact: it is the key of the state, so that the training is the uninterrupted one bit for bit.
    """

    engine: Holder
    state: Mapping[str, Any]
    ledger: Ledger
    differ: Sequence[Mapping[str, str]]
    key: RunKey
    exact: bool

    def made(self) -> dict[int, dict[int, str]]:
        """By the ledger file, what was released; where it was after the state was saved, it will be again, the same."""
        return releases_made(self.engine._ledger, self.state["run"]) if self.exact else {}

    def run(self) -> str:
        """The name of the run that goes on, or of a new one."""
        return str(self.state["run"]) if self.exact else new_run()

    def apply(self, key: RunKey, run: str, made: Mapping[int, Mapping[int, str]]) -> None:
        """Take the state over, with the key and the run that all ranks go on with, and what that run has released."""
        engine, saved, spent = self.engine, self.state, self.engine._spent
        engine._key = key
        engine._opened = max(engine._opened, saved["opened"])
        engine._guarantees += [sentence for sentence in saved["guarantees"] if sentence not in engine._guarantees]
        how = {(run, number): (Provenance(**told), count) for run, number, told, count in saved["made"]}
        spent.merge(self.ledger, [(run, releases, steps) for run, releases, steps in saved["spans"]], how)
        spent.continue_run(run)
        for session, training, differ in zip(engine._sessions, saved["trainings"], self.differ, strict=True):
            session.rekey(key)
            session.optimizer.journal.made = dict(made.get(training["number"], {}))
            self._restore(session, training, differ)

    def _restore(self, session: Session, training: Mapping[str, Any], differ: Mapping[str, str]) -> None:
        optimizer, loader = session.optimizer, session.loader
        optimizer.zero_grad()
        optimizer.steps = training["steps"]
        # Torch's schedulers warn if they step first, as they do where a checkpoint was saved at the end of a pass.
        optimizer._opt_called = training["steps"] > 0  # type: ignore[attr-defined]
        if not callable(optimizer.noise_multiplier) and "noise_multiplier" not in differ:
            optimizer.noise_multiplier = training["noise_multiplier"]
        if "expected_batch_size" not in differ:
            optimizer.expected_batch_size = training["expected_batch_size"]
        if not {"max_grad_norm", "clipping", "parameters"} & set(differ):
            optimizer.clip_function.rebound(training["max_grad_norm"])
        optimizer.spending.load_state_dict(training["spending"])
        partial = training["sum"] if self.exact else {**training["sum"], **_NOTHING}
        optimizer.total.load_state_dict(partial, {name: p for p, name in _names(session).items()})
        if self.exact:
            optimizer.noise_step = training["noise_step"]
            optimizer.journal.begins_with = training["parameters"]
            session.plan.noise.load_state_dict(training["noise"])
        else:
            optimizer.noise_step = max(optimizer.noise_step, training["noise_step"])
        if loader is not None:
            other = any(name in differ for name in _WHICH_RECORDS)
            place = {**training["loader"], "pass": None} if other else training["loader"]
            loader.go_on_from(place, draws_anew=not self.exact)


def checked(engine: Holder, saved: Any, *, fresh_key: bool, acknowledge: Collection[str]) -> Resumption:
    """Hold a state to the engine that is to go on from it; changes nothing.

    Raises:
        CheckpointError: it is damaged, of another version, or of another plan.
        ConfigurationError: the engine has not made as many trainings private, or an acknowledged name is not known.
    """
    of_this_kind = repr((FORMAT, VERSION))
    if not isinstance(saved, Mapping) or repr((saved.get("format"), saved.get("version"))) != of_this_kind:
        raise CheckpointError(
            f"this is not an engine's state of version {VERSION}; pass what engine.state_dict() of this version returned."
        )
    forms.require(saved, _STATE)
    trainings, sessions = saved["trainings"], engine._sessions
    if len(trainings) != len(sessions):
        raise ConfigurationError(
            f"the state has {len(trainings)} private trainings and this engine {len(sessions)}. Call make_private as in the run "
            f"that was saved, then load."
        )
    differ = [
        differences(
            {**saved["plan"], **training["plan"]},
            {**_engine_plan(engine), **fingerprint(session.plan, steps=training["steps"])},
        )
        for session, training in zip(sessions, trainings, strict=True)
    ]
    # Only rank 0 holds the file; where it differs there, no rank goes on.
    lost = missing_from(engine._ledger, saved["ledger"]) if engine._ledger or not engine._writes_ledger else None
    differ = [{**one, **({"ledger": lost} if lost else {})} for one in differ]
    _refuse({name: words for one in differ for name, words in one.items()}, acknowledge)
    for session, training, one in zip(sessions, trainings, differ, strict=True):
        _check_training(session, training, one)
    stored = None if saved["key"] is None else RunKey(bytes.fromhex(saved["key"]), seeded=saved["seeded"])
    own = engine._key if engine._key.mark == saved["mark"] else None
    released = any(session.optimizer.noise_step for session in sessions)
    known = stored or own
    exact = known is not None and all(training["noise"] for training in trainings)
    exact = exact and all(
        one["number"] == session.plan.number for session, one in zip(sessions, trainings, strict=True)
    )
    exact = exact and not (fresh_key or any(differ) or released)
    if exact:
        _check_rank(sessions, trainings)
    _check_generators(sessions, trainings, exact=exact, released=released)
    key = known if exact and known else _new_key(engine, differ, used=own is not None or released)
    return Resumption(engine, saved, _ledger(saved), differ, key, exact)


def _refuse(differ: Mapping[str, str], acknowledge: Collection[str]) -> None:
    if isinstance(acknowledge, str):
        raise ConfigurationError(f"acknowledge={acknowledge!r} must be a list of names, as [{acknowledge!r}].")
    for name in acknowledge:
        choose("acknowledge", name, FACTS)
    left = {name: words for name, words in differ.items() if name not in acknowledge}
    if left:
        listed = "; ".join(f"{name} ({words})" for name, words in left.items())
        raise CheckpointError(
            f"the checkpoint is of another plan: {listed}. Its noise must not be drawn again for other sums. Make the training "
            f"private as it was when it was saved, or go on under the new plan, with a new key and nothing forgotten: "
            f"acknowledge={sorted(left)}."
        )


def _check_training(session: Session, training: Mapping[str, Any], differ: Mapping[str, str]) -> None:
    """What the forms do not say, and what has to fit the module."""
    if (training["loader"] is None) != (session.loader is None):
        raise CheckpointError("the state has a loader where the training has none, or the other way round.")
    if session.loader is not None:
        session.loader.check_where(training["loader"])
    constant = not callable(session.optimizer.noise_multiplier)
    if constant != (training["noise_multiplier"] is not None) and "noise_multiplier" not in differ:
        raise CheckpointError("the state has a noise_multiplier where a schedule gives it, or none where it is needed.")
    bound = training["max_grad_norm"]
    several = isinstance(bound, (list, tuple))
    bounds = list(bound) if isinstance(bound, (list, tuple)) else [bound]
    own = session.optimizer.max_grad_norm
    if not {"max_grad_norm", "clipping", "parameters"} & set(differ) and (
        several != isinstance(own, list) or len(bounds) != len(own if isinstance(own, list) else [own])
    ):
        raise CheckpointError(
            f"max_grad_norm in the state does not fit {session.optimizer.clip_function.name} clipping."
        )
    if min([*bounds, training["expected_batch_size"]], default=0) <= 0 or (training["noise_multiplier"] or 0) < 0:
        raise CheckpointError(
            "a clip bound, batch size or noise multiplier in the state is out of range: it is damaged."
        )
    parameters = {name: p for p, name in _names(session).items()}
    for name, part in training["sum"]["sums"].items():
        wide = torch.float64 if name in parameters and parameters[name].dtype == torch.float64 else torch.float32
        if name not in parameters or part.shape != local(parameters[name]).shape or part.dtype != wide:
            raise CheckpointError(f"the partial sum of {name!r:.80} does not fit the module: the state is damaged.")


def _check_rank(sessions: Sequence[Session], trainings: Sequence[Mapping[str, Any]]) -> None:
    """The share of a draw, the sum so far and the generators of the loader are those of one rank."""
    for session, training in zip(sessions, trainings, strict=True):
        own, size = session.plan.topology.rank, session.plan.topology.size
        if training["rank"] != own:
            raise CheckpointError(
                f"the state is that of rank {training['rank']}, and was given to rank {own} of {size}: the sums of the ranks "
                f"would be others than in the run that was saved, under the same noise. Save engine.state_dict() of each rank, "
                f"and give each its own (engine.save_checkpoint does so), or resume all of them with fresh_key=True."
            )


def _check_generators(
    sessions: Sequence[Session], trainings: Sequence[Mapping[str, Any]], *, exact: bool, released: bool
) -> None:
    for session, training in zip(sessions, trainings, strict=True):
        noise = session.plan.noise
        if exact and set(training["noise"]) != set(noise.state_dict()):
            raise CheckpointError("the noise in the state comes from another source than in this training.")
        if not isinstance(noise, GeneratorGaussian) or released:
            continue
        if not exact:
            raise CheckpointError(
                "this training draws its noise from a noise_generator, and nothing says that it does not draw what it drew in "
                "the run that was saved. Resume with the state that has the generator's (keep_key=True), or leave "
                "noise_generator out, with acknowledge=['noise']."
            )
        noise.check_state(training["noise"])


def _ledger(saved: Mapping[str, Any]) -> Ledger:
    try:
        ledger = Ledger.from_state_dict(saved["accountant"])
    except (ConfigurationError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the ledger in the state cannot be read: {error!s:.300}") from error
    spans = saved["spans"]
    if sum(span[1] for span in spans) != ledger.steps or sum(span[2] for span in spans) != saved["steps"]:
        raise CheckpointError("the state's runs do not add up to its ledger: a part of what was spent is missing.")
    return ledger


def _new_key(engine: Holder, differ: Sequence[Mapping[str, str]], *, used: bool) -> RunKey:
    """A key under which nothing was drawn; of a seeded engine one that the seed determines."""
    own = engine._key
    if not used:
        return own
    if not own.seeded:
        return RunKey.from_os()
    words = repr([sorted(one.items()) for one in differ])
    return RunKey(own.derive(f"branch {words}", engine._spent.steps), seeded=True)
