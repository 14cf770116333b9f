"""`PrivacyEngine`: turns the user's model, optimizer and loader into private ones. Wiring only."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ghostgrad import checking, checkpoint, setup, state
from ghostgrad.accounting import Accountant, Ledger, create_accountant, get_noise_multiplier
from ghostgrad.accounting.base import fresh
from ghostgrad.audit import AuditResult, audit_training
from ghostgrad.audit.records import Score
from ghostgrad.clipping import ClipFunction, Mode, trainable
from ghostgrad.distributed import Topology, current
from ghostgrad.errors import ConfigurationError, PrivacyError, choose
from ghostgrad.explanation import Explanation, explain
from ghostgrad.inheritance import open_ledger
from ghostgrad.journal import Journal
from ghostgrad.keys import RunKey
from ghostgrad.noise import GeneratorGaussian, KeyedGaussian, NoiseMechanism
from ghostgrad.random_states import set_global_states
from ghostgrad.recording.criterion import check_criterion, watched
from ghostgrad.report import PrivacyReport
from ghostgrad.report.making import DEFAULT_DELTAS, make_report
from ghostgrad.report.training import seen_of_records, training_facts
from ghostgrad.schedulers import Schedule, value_at
from ghostgrad.session import Session, SessionPlan
from ghostgrad.spending import Budget
from ghostgrad.spent import Spent
from ghostgrad.validation import ModuleValidator

GradSampleMode = Literal["auto", "hooks", "functorch", "ghost", "bk"]
LossReduction = Literal["mean", "sum"]


class PrivacyEngine:
    """Makes a training loop differentially private; the loop stays as it is.

    Every step of the optimizer that `make_private` returns releases a sum of per-record gradients, each clipped to norm at
    most ``max_grad_norm``, plus Gaussian noise of standard deviation ``noise_multiplier * max_grad_norm``, and reports to
    the accountant. Guarantee: the trained parameters are (`get_epsilon(delta)`, delta)-differentially private. Neighbouring
    datasets differ by adding or removing one record (with ``poisson_sampling=False``: by blanking one record). What cannot
    be shown to be bounded raises instead. Not covered: choosing hyper-parameters on the data, and metrics that you publish.

    Args:
        accountant: ``"rdp"`` or another registered name, or an accountant object.
        secure_mode: draw the noise from a cryptographic generator keyed by the operating system, in a form that is safe
            against floating-point attacks. Needs ``pip install ghostgrad[secure]``. Default False.
        seed: makes sampling and noise reproducible, for tests and comparisons: whoever knows it can subtract the noise.
            Default None takes a fresh key from the operating system.
        ledger: a file in which every step is written down, and synced, before the parameters change; a file that is there is
            continued, and what it says was spent counts. ``python -m ghostgrad.ledger FILE`` verifies it. With several ranks
            rank 0 writes. Default None.

    Raises:
        ConfigurationError: unknown accountant, or a seed with ``secure_mode``.
        LedgerError: the ledger file is in use, was tampered with, or cannot be written.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.randn(64, 8), torch.randint(2, (64,)))
    >>> model = torch.nn.Linear(8, 2)
    >>> engine = PrivacyEngine(seed=0)
    >>> model, optimizer, loader = engine.make_private(
    ...     module=model,
    ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(data, batch_size=16),
    ...     noise_multiplier=1.1,
    ...     max_grad_norm=1.0,
    ... )
    >>> for x, y in loader:
    ...     loss = torch.nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> engine.steps
    4
    >>> engine.get_epsilon(delta=1e-5) < 6
    True
    """

    def __init__(
        self,
        accountant: str | Accountant = "rdp",
        secure_mode: bool = False,
        seed: int | None = None,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        setup.check_flags(secure_mode=secure_mode)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigurationError(f"seed={seed!r} must be an integer, or None.")
        if secure_mode and seed is not None:
            raise ConfigurationError(
                f"seed={seed} with secure_mode=True: noise that a seed determines is not secret. Leave the seed out."
            )
        self._accountant = create_accountant(accountant)
        self._spent = Spent(self._accountant)
        self.secure_mode = secure_mode
        self._key = RunKey.from_os() if seed is None else RunKey.from_seed(seed)
        self._seed_mark = b"" if seed is None else self._key.derive("mark")
        self._shared = False
        self._sessions: list[Session] = []
        self._opened = 0
        self._guarantees: list[str] = []
        self._budget: Budget | None = None
        self._ended: list[dict[str, Any]] = []
        self._writes_ledger = ledger is not None
        self._ledger = None
        if ledger is not None:
            self._ledger, self._guarantees = open_ledger(ledger, self._spent, current())
        self._inherited = self._spent.accountant.ledger.steps if self._writes_ledger else 0

    def __getstate__(self) -> dict[str, Any]:
        """Not to be copied or pickled (it would be sent to another process that way): both would draw the same noise.

        Raises:
            PrivacyError: always.
        """
        raise PrivacyError(
            "a PrivacyEngine is not copied or pickled: both would add the same noise to different sums, and neither would know "
            "what the other released. Build one where it is needed; engine.state_dict() is for going on later."
        )

    # ------------------------------------------------------------------ making private

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any] | None,
        noise_multiplier: Schedule,
        max_grad_norm: Schedule | Sequence[float],
        criterion: Callable[..., Any] | None = None,
        batch_first: bool = True,
        loss_reduction: LossReduction = "mean",
        poisson_sampling: bool = True,
        clipping: str | ClipFunction = "flat",
        grad_sample_mode: GradSampleMode = "auto",
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        accumulation_steps: int = 1,
        noise_generator: torch.Generator | None = None,
        max_memory: int | None = None,
    ) -> tuple[Any, ...]:
        """Return the module (the same object), a `DPOptimizer` and a `DPDataLoader`.

        Args:
            module: called as a whole in the loop: ``module(x)``; treats records one by one.
            optimizer: has the module's trainable parameters. Its own ``step`` raises from now on, until `detach`.
            data_loader: map-style, sampled sequentially or at random. None if you sample by yourself; then
                ``sample_rate`` and ``expected_batch_size`` say how, and the accounting trusts them.
            noise_multiplier: noise standard deviation divided by the sensitivity, >= 0; or a function of the step.
            max_grad_norm: C, the L2 norm to which each record's gradient is clipped, in units of the gradient of the
                record's own loss; a list with per-layer clipping; or a function of the step.
            criterion: optional. It is returned, to be used as before, and shown to be the mean (sum) of the records'
                losses by evaluating it on them one by one: on its first batch, and later where its graph does not say.
            batch_first: whether dimension 0 of the module's inputs and outputs is the batch; else dimension 1.
            loss_reduction: whether the loss is the mean or the sum of the records' losses. With ``"sum"`` the noisy sum is
                not divided by the expected batch size.
            poisson_sampling: draw every batch by independent coin flips, which the accounting rewards. False keeps the
                loader's own batches, without amplification.
            clipping: ``"flat"``, ``"per_layer"``, ``"automatic"``, ``"adaptive"``, or a clip function.
            grad_sample_mode: ``"hooks"``, ``"ghost"``, ``"bk"``, ``"functorch"``; ``"auto"`` is the one-pass ``"bk"``, and
                ``"ghost"`` for a model that `fully_shard` split. They differ in cost, not in result.
            sample_rate: probability of each record for one logical batch; default ``batch_size / n``.
            expected_batch_size: divisor of a mean loss; default ``sample_rate * n``, a float.
            accumulation_steps: loader batches that make up one logical batch.
            noise_generator: draw the noise from this generator instead of from the engine's key.
            max_memory: bytes that ``"bk"`` may keep in a backward until the clip factors are known, beyond what autograd's graph
                holds. Weights beyond it take a second backward. Default None: no limit, and the graph is let go.

        Returns:
            ``(module, optimizer, data_loader)``, or ``(module, optimizer, criterion, data_loader)`` with a criterion.

        Raises:
            ConfigurationError: an argument cannot be used.
            UnsupportedModuleError: a module has no exact per-sample gradient.
            PrivacyError: a module mixes records. After any error all arguments are as they were.
        """
        topology = self._ranks()
        with topology.together():
            layout = setup.topology_of(module, topology)
            shards = setup.shards_of(module, layout)
            mode = _mode(grad_sample_mode, split=shards is not None)
            choose("loss_reduction", loss_reduction, ("mean", "sum"))
            setup.check_flags(batch_first=batch_first, poisson_sampling=poisson_sampling)
            setup.check_numbers(sample_rate=sample_rate, expected_batch_size=expected_batch_size)
            sigma = setup.check_noise_multiplier(noise_multiplier)
            setup.check_ranks(data_loader, topology)
            setup.check_module(module)
            setup.check_max_memory(max_memory, mode, module)
            setup.check_optimizer(optimizer, module)
            if criterion is not None:
                check_criterion(criterion, loss_reduction)
            key = RunKey(self._key.derive("session", self._opened), seeded=self._key.seeded)
            setup.check_noise_generator(noise_generator, module)
            noise = self._noise(key, noise_generator)
            setup.check_sampling(data_loader, poisson_sampling)
            share = layout.size > 1 and layout.shares_records
            loader = setup.private_loader(
                data_loader, key, poisson_sampling, sample_rate, accumulation_steps, distributed=share
            )
            rate, size = setup.public_sizes(loader, sample_rate, expected_batch_size, accumulation_steps)
            schedule, bound = None, max_grad_norm
            if callable(bound):
                schedule, bound = bound, value_at(bound, 0, "max_grad_norm")
            count = len(trainable(optimizer.param_groups))
            function = setup.clip_function(
                clipping, bound, parameters=count, expected_batch_size=size, noise_multiplier=sigma
            )
            plan = SessionPlan(
                module, optimizer, loader, function, mode, noise, noise_multiplier, rate, size, batch_first,
                loss_reduction, schedule, layout, shards, max_memory, self._opened,
            )  # fmt: skip
        topology.agree({"the seed of the engine": self._seed_mark, **plan.facts()})
        # Everything was checked; from here on things change.
        session = Session(plan, self.accountant, self._budget, self._journal(plan))
        self._sessions.append(session)
        self._opened += 1
        if plan.spending.guarantee not in self._guarantees:
            self._guarantees.append(plan.spending.guarantee)
        if criterion is None:
            return module, session.optimizer, loader
        criterion, unwatch = watched(criterion, loss_reduction, batch_first=batch_first)
        session.at_close.append(unwatch)
        return module, session.optimizer, criterion, loader

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any] | None,
        target_epsilon: float,
        target_delta: float,
        max_grad_norm: Schedule | Sequence[float],
        epochs: float | None = None,
        total_steps: int | None = None,
        criterion: Callable[..., Any] | None = None,
        batch_first: bool = True,
        loss_reduction: LossReduction = "mean",
        poisson_sampling: bool = True,
        clipping: str | ClipFunction = "flat",
        grad_sample_mode: GradSampleMode = "auto",
        sample_rate: float | None = None,
        expected_batch_size: float | None = None,
        accumulation_steps: int = 1,
        noise_generator: torch.Generator | None = None,
        max_memory: int | None = None,
        keep_budget: bool = True,
    ) -> tuple[Any, ...]:
        """As `make_private`, with the least noise for which the whole training stays within ``target_epsilon``.

        The budget is then kept: a step that would pass ``target_epsilon`` at ``target_delta`` raises `BudgetExhausted`
        before it touches the parameters.

        Args:
            target_epsilon, target_delta: the budget of the whole training.
            epochs: passes over the loader that are planned; or
            total_steps: logical steps that are planned. Exactly one of the two.
            keep_budget: False lets the training go on past the budget. Default True.

        All further arguments are as in `make_private`.

        Raises:
            ConfigurationError: also when no noise reaches the target.

        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(100, 8), torch.randint(2, (100,)))
        >>> model = torch.nn.Linear(8, 2)
        >>> engine = PrivacyEngine()
        >>> model, optimizer, loader = engine.make_private_with_epsilon(
        ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     data_loader=DataLoader(data, batch_size=10), target_epsilon=3.0, target_delta=1e-3, epochs=5,
        ...     max_grad_norm=1.0)
        >>> 0.5 < optimizer.noise_multiplier < 2.0
        True
        """
        with self._ranks().together():
            if len(self.accountant) > self._inherited:
                raise ConfigurationError(
                    f"this engine has already spent {len(self.accountant)} releases; a target for a new training needs a new "
                    f"PrivacyEngine."
                )
            setup.check_flags(keep_budget=keep_budget)
            setup.check_numbers(
                target_epsilon=target_epsilon, target_delta=target_delta, epochs=epochs, total_steps=total_steps,
                sample_rate=sample_rate, expected_batch_size=expected_batch_size,
            )  # fmt: skip
            budget = Budget(self.accountant, target_epsilon, target_delta)
            # A rehearsal with a throw-away key: only the public rate and length of the loader matter.
            rehearsal = setup.private_loader(
                data_loader, RunKey.from_seed(0), poisson_sampling, sample_rate, accumulation_steps
            )
            rate, _ = setup.public_sizes(rehearsal, sample_rate, expected_batch_size, accumulation_steps)
            rate, releases = setup.planned_releases(rehearsal, rate, epochs=epochs, total_steps=total_steps)
            # A resumed training is planned as it was at first; what its ledger file says was spent counts in the budget.
            unspent = fresh(self.accountant)
            unspent.ledger = Ledger()
            noise_multiplier = get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=rate,
                steps=releases,
                accountant=unspent,
            )
        result = self.make_private(
            module=module, optimizer=optimizer, data_loader=data_loader, noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm, criterion=criterion, batch_first=batch_first, loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling, clipping=clipping, grad_sample_mode=grad_sample_mode,
            sample_rate=sample_rate, expected_batch_size=expected_batch_size, accumulation_steps=accumulation_steps,
            noise_generator=noise_generator, max_memory=max_memory,
        )  # fmt: skip
        if keep_budget:
            self._budget = self._sessions[-1].optimizer.budget = budget
        return result

    def _ranks(self) -> Topology:
        """The ranks that train together now; from the first call on they have one key, and their run has one name."""
        topology = current()
        if not self._shared:
            self._key, self._shared = topology.share_key(self._key), topology.size > 1
            self._spent.run = topology.collect(self._spent.run)[0]
        return topology

    def _journal(self, plan: SessionPlan) -> Journal:
        return Journal(
            self._spent, self._ledger, plan.topology, number=plan.number,
            provenance=plan.provenance(self._key, secure=self.secure_mode),
            settings={"max_grad_norm": plan.bound, "clipping": plan.function.name, "sample_rate": plan.sample_rate},
            watched=self._writes_ledger,
        )  # fmt: skip

    def _noise(self, key: RunKey, generator: torch.Generator | None) -> NoiseMechanism:
        if generator is None:
            return KeyedGaussian(key, secure=self.secure_mode)
        if self.secure_mode:
            raise ConfigurationError(
                "noise_generator with secure_mode=True: a torch generator is not cryptographic. Leave one of them out."
            )
        return GeneratorGaussian(generator)

    # ------------------------------------------------------------------ reading

    def get_epsilon(self, delta: float, accountant: str | None = None) -> float:
        """Epsilon of everything released so far at ``delta``, >= 0.

        Args:
            delta: in (0, 1); well below ``1 / n``.
            accountant: read the same ledger with another accountant (``"pld"``, ...). Default the engine's own.

        Raises:
            ConfigurationError: delta outside (0, 1), unknown accountant.
        """
        if accountant is None:
            return self.accountant.get_epsilon(delta)
        other = create_accountant(accountant)
        other.ledger = self.accountant.ledger
        return other.get_epsilon(delta)

    @property
    def accountant(self) -> Accountant:
        """What was released so far. It cannot be replaced: private optimizers report to it."""
        return self._accountant

    @property
    def ledger_head(self) -> str | None:
        """The hash of the last line of the ledger file: kept elsewhere, it shows later whether lines were cut off."""
        return None if self._ledger is None else self._ledger.head

    @property
    def steps(self) -> int:
        """Logical steps made so far."""
        return self._spent.steps

    @property
    def grad_sample_mode(self) -> str:
        """The clipper in use: ``"hooks"``, ``"ghost"``, ``"bk"`` or ``"functorch"``; ``"none"`` before `make_private`."""
        return ", ".join(sorted({session.mode.value for session in self._sessions})) or "none"

    @property
    def guarantee(self) -> str:
        """For which neighbouring datasets, under which sampling, epsilon holds."""
        if not self._guarantees:
            return "nothing was made private yet"
        said = "; and ".join(self._guarantees)
        return f"{said}; epsilon counts replacing one" if self.accountant.neighbouring == "replace-one" else said

    @property
    def not_finite(self) -> int:
        """Records dropped so far because their gradient was not finite. Not private: for your eyes, not for a report."""
        return sum(session.optimizer.total.not_finite for session in self._sessions)

    def explain(self) -> Explanation:
        """What is done for each module: rule, route of the norms, parameters, and what is kept. Print it.

        Routes depend on shapes, so they are known for the modules that a batch has gone through.
        """
        return explain([(s.module, s.recorder, s.mode, s.optimizer) for s in self._sessions])

    def report(
        self,
        deltas: Sequence[float] = DEFAULT_DELTAS,
        *,
        privacy_unit: str = "one record of the dataset",
        title: str = "",
        statements: Mapping[str, str] | None = None,
        not_private: bool = False,
    ) -> PrivacyReport:
        """What was released so far and what that means, to be published: JSON, HTML, Markdown, LaTeX, a deployment record.

        Formal guarantee: nothing in it depends on private records beyond what was released with noise; it costs no privacy.
        What voids the guarantee (no noise, a seed, an infinite epsilon) is said first.

        Args:
            deltas: the main one first, each in (0, 1). Default 1e-5, 1e-6 and 1e-8.
            privacy_unit: whose data one record is, in your words.
            title: of the page.
            statements: what you say about what epsilon does not count, by name: ``"hyper_parameters"``, ``"metrics"``,
                ``"preprocessing"``, ``"starting_weights"``, ``"other_trainings"``, ``"groups"``, ``"dataset_size"``,
                ``"floating_point"``. Default ``"unknown"``.
            not_private: also put in what depends on private records (how many were not finite, which routes the norms took),
                under a warning. Such a report must not be published. Default False.

        Raises:
            ConfigurationError: an argument is none of these.

        >>> report = PrivacyEngine().report(deltas=[1e-5], title="Nothing yet")
        >>> report.to_latex()[:54]
        'The training is $(0, 10^{-5})$-differentially private '
        """
        setup.check_flags(not_private=not_private)
        return make_report(
            accountant=self.accountant,
            trainings=[*self._ended, *map(training_facts, self._sessions)],
            steps=self.steps,
            made=self._spent.provenance,
            guarantee=self.guarantee,
            budget=None if self._budget is None else (self._budget.target_epsilon, self._budget.target_delta),
            deltas=deltas,
            privacy_unit=privacy_unit,
            title=title,
            statements=statements,
            not_private=seen_of_records(self.explain(), self.not_finite) if not_private else None,
        )

    def check(
        self,
        batch: Any,
        loss_fn: checking.LossFunction,
        *,
        module: nn.Module | None = None,
        batch_first: bool | None = None,
        loss_reduction: LossReduction | None = None,
        max_grad_norm: float | None = None,
        verbose: bool = True,
    ) -> checking.CheckReport:
        """Hold a model and a loss to the loop over single records: every clipper, and whether records touch each other.

        Everything runs on copies of the module, with dropout left out (so that a record has one gradient). Nothing is
        changed: parameters, buffers, gradients, random states, the sum of a step that is under way and the ledger stay, and
        nothing is released. The report is about private records; do not publish it.

        It finds batch statistics, losses that are normalised over the batch (counted tokens, class weights) or compare records,
        weights that are used where nobody can clip them, records that are not finite, and registered rules that are wrong.

        Args:
            batch: two or more records: tensors in tuples, lists, mappings or dataclasses, as `loss_fn` takes them.
            loss_fn: ``loss_fn(module, batch)`` is the scalar loss, as in the loop, of the module that it is *given*.
            module: default the private module of this engine; any other, also before `make_private`.
            batch_first, loss_reduction: as in `make_private`; default those of the private module, else True and ``"mean"``.
            max_grad_norm: C of the comparison; default the middle of the records' gradient norms.
            verbose: print the report. Default True.

        Returns:
            A `CheckReport`: ``report.holds``, ``report.findings``, and a table as ``str(report)``.

        Raises:
            ConfigurationError: no module, fewer than two records, or a ``loss_fn`` that does not use what it is given.

        >>> model = torch.nn.Linear(4, 2)
        >>> batch = torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
        >>> report = PrivacyEngine().check(
        ...     batch, lambda module, batch: torch.nn.functional.cross_entropy(module(batch[0]), batch[1]), module=model,
        ...     verbose=False)
        >>> report.holds
        True
        """
        session = next((s for s in self._sessions if module is None or s.module is module), None)
        if module is None and (session is None or len(self._sessions) > 1):
            raise ConfigurationError(
                f"this engine has {len(self._sessions)} private modules; say which module to check with module=."
            )
        setup.check_flags(verbose=verbose)
        first, reduction = (
            (True, "mean") if session is None else (session.recorder.batch_first, session.recorder.loss_reduction)
        )
        report = checking.check(
            module if session is None else session.module,
            batch,
            loss_fn,
            batch_first=first if batch_first is None else batch_first,
            loss_reduction=reduction if loss_reduction is None else loss_reduction,
            max_grad_norm=max_grad_norm,
        )
        if verbose:
            print(report)
        return report

    def audit(
        self,
        train: Callable[[PrivacyEngine, Dataset[Any]], Score],
        dataset: Dataset[Any],
        canaries: Sequence[Any],
        *,
        delta: float,
        runs: int = 1,
        guesses: int | Sequence[int] | None = None,
        threshold: float | None = None,
        confidence: float = 0.95,
        seed: int | None = None,
    ) -> AuditResult:
        """Attack a whole training of yours: put canaries into its data by coins, train, and guess the coins.

        Every run is a training of its own with a fresh engine like this one (same accountant and secure mode), which spends what
        it spends on the records; this engine and its ledger are left alone. Several canaries are judged by the one-run bound of
        Steinke, Nasr and Jagielski (2023), which holds whatever they do to each other, over any number of runs; a single canary
        in many runs by error rates (Clopper and Pearson), which show more for each coin and cost a training each.

        Args:
            train: ``train(engine, dataset)`` is your loop, with ``engine.make_private`` in it, on a new model. It returns a
                score: a function from a record to a number, higher for records that look trained on, for example
                ``ghostgrad.audit.loss_score(model, loss)``.
            dataset: the real records.
            canaries: records that are not in the dataset and not copies from it (`ghostgrad.audit.OneRun` says why).
            delta: where epsilon is reported. The verdict looks at every delta.
            runs: trainings. Default 1.
            guesses: how many coins are guessed; see `ghostgrad.audit.OneRun.result`.
            threshold: with one canary and many runs, the score above which it is guessed in. Default None chooses it on the first
                half of the runs and counts on the second.
            confidence: if the claim is true, the verdict is "contradicted" with probability at most ``1 - confidence``.
            seed: makes coins, sampling and noise of all runs reproducible, for tests. Default None.

        Returns:
            An `AuditResult`. It says itself what it does not show, and what of it may be published.

        Raises:
            ConfigurationError: an argument cannot be used, or the training was without Poisson sampling or made no step.

        >>> from torch.utils.data import TensorDataset
        >>> from ghostgrad.audit import loss_score
        >>> def train(engine, dataset):
        ...     model = torch.nn.Linear(4, 1)
        ...     model, optimizer, loader = engine.make_private(
        ...         module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...         data_loader=DataLoader(dataset, batch_size=8), noise_multiplier=1.0, max_grad_norm=1.0)
        ...     for x, y in loader:
        ...         (model(x) - y).pow(2).mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...     return loss_score(model, lambda model, record: (model(record[0]) - record[1]).pow(2).sum())
        >>> data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        >>> canaries = [(torch.randn(4), torch.randn(1)) for _ in range(20)]
        >>> PrivacyEngine().audit(train, data, canaries, delta=1e-3, confidence=0.999).verdict
        'consistent'
        """

        def like_this(seed: int | None) -> PrivacyEngine:
            accountant = fresh(self.accountant)
            accountant.ledger = Ledger()
            return PrivacyEngine(accountant, secure_mode=self.secure_mode, seed=seed)

        return audit_training(
            like_this, train, dataset, canaries, delta=delta, runs=runs, guesses=guesses, threshold=threshold,
            confidence=confidence, seed=seed,
        )  # fmt: skip

    # ------------------------------------------------------------------ stopping and going on

    def state_dict(self, *, keep_key: bool = True) -> dict[str, Any]:
        """Everything but the model and the optimizer, for checkpoints of your own; `save_checkpoint` saves all together.

        Plain values and tensors: ``torch.load(weights_only=True)`` reads them. It has what was spent, the place in the pass and
        in the logical batch, the sum so far, schedules and adaptive clipping, the plan, and the key.

        **The key is secret.** With it and the released parameters anyone can subtract the noise; and a sum in the middle of a
        logical batch has no noise yet. Keep the state as you keep the data. With ``keep_key=False`` nothing secret is in it:
        a resumed training then draws new batches and new noise, and begins an unfinished logical batch again.

        On several ranks each has a state of its own, and goes on from that.

        Args:
            keep_key: save the key and what only it needs, so that a resumed training is the uninterrupted one bit for bit.

        Raises:
            PrivacyError: a batch of the loader went through a backward in part.
        """
        setup.check_flags(keep_key=keep_key)
        return state.state_of(self, keep_key=keep_key)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, fresh_key: bool = False, acknowledge: Collection[str] = ()
    ) -> None:
        """Go on from what `state_dict` returned; call `make_private` first, as in the training that was saved.

        With the key in the state, and nothing released by this engine yet, the training goes on bit for bit: what was released
        after the state was saved is released again, the same. That needs the same data, code and machine. Where something is
        known to differ the key is not used again. What differs is an error, or named in ``acknowledge``; then, as with
        ``fresh_key=True``, batches and noise are drawn from a new key and nothing that was spent is forgotten.

        Args:
            state_dict: from this version of ghostgrad.
            fresh_key: do not use the key in the state.
            acknowledge: the parts of the plan that may differ, by the names that the error gives.

        Raises:
            CheckpointError: damaged, or of another plan; nothing was changed.
            ConfigurationError: another number of private trainings.
        """
        setup.check_flags(fresh_key=fresh_key)
        topology = self._ranks()
        with topology.together():
            resumption = state.checked(self, state_dict, fresh_key=fresh_key, acknowledge=acknowledge)
        topology.agree({"the state that is loaded": (resumption.state["mark"], resumption.exact)})
        run, made = topology.collect((resumption.run(), resumption.made()))[0]
        resumption.apply(topology.share_key(resumption.key), run, made)

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        module: nn.Module,
        optimizer: checkpoint.Stateful,
        extra: Mapping[str, checkpoint.Stateful] | None = None,
        keep_key: bool = True,
    ) -> None:
        """Save all that this training needs to go on, in one file, at any point of the loop.

        The file is written whole or not at all, with a checksum, readable by its owner alone (mode 0600). It has the module,
        the optimizer, what is in ``extra``, the global random states (dropout), and `state_dict`.

        **By default it holds the key and, between logical steps, a sum without noise: it is as secret as the data.** To publish
        or hand on a model, save the module alone, or use ``keep_key=False``.

        On several ranks every rank calls this, and rank 0 writes what all of them need.

        Args:
            path: of the file; one that is there is replaced.
            module, optimizer: what `make_private` returned.
            extra: by name, anything else with ``state_dict`` and ``load_state_dict``: learning-rate schedulers, averages.
            keep_key: as in `state_dict`.

        Raises:
            CheckpointError: it could not be written; an old one is as it was.
            ConfigurationError: a state that could not be loaded again.
        """
        setup.check_flags(keep_key=keep_key)
        topology = self._ranks()
        with topology.together():
            content = checkpoint.gather(module, optimizer, extra or {})
            own = checkpoint.of_this_rank(self.state_dict(keep_key=keep_key))
        topology.agree({})
        ranks = topology.bring(own)
        with topology.together():
            if topology.rank == 0:
                checkpoint.write(path, {**content, "ranks": ranks})
        topology.agree({})

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        module: nn.Module,
        optimizer: checkpoint.Stateful,
        extra: Mapping[str, checkpoint.Stateful] | None = None,
        fresh_key: bool = False,
        acknowledge: Collection[str] = (),
    ) -> None:
        """Go on from what `save_checkpoint` wrote; call `make_private` first, as in the run that was saved.

        Then iterate over the loader as before: it goes on in the middle of the pass, ``loader.completed_passes`` says which one
        it is. When the training is the uninterrupted one bit for bit, and what a difference leads to, is said at
        `load_state_dict`. All is checked before anything is changed.

        Args:
            path: of the file.
            module, optimizer, extra: as for `save_checkpoint`, in their first state.
            fresh_key, acknowledge: as for `load_state_dict`.

        Raises:
            CheckpointError: damaged, or of another plan; nothing was changed.
            ConfigurationError: another number of private trainings.
        """
        setup.check_flags(fresh_key=fresh_key)
        topology = self._ranks()
        with topology.together():
            content = checkpoint.read(path)
            checkpoint.check(content, module, optimizer, extra or {})
            own = checkpoint.part_of(content, topology.rank)
            state.checked(self, own["engine"], fresh_key=fresh_key, acknowledge=acknowledge)
            checkpoint.restore(content, module, optimizer, extra or {})
        topology.agree({})
        self.load_state_dict(own["engine"], fresh_key=fresh_key, acknowledge=acknowledge)
        if topology.rank < len(content["ranks"]):
            set_global_states(own["random"])

    def __repr__(self) -> str:
        return (
            f"PrivacyEngine(accountant={self.accountant.mechanism!r}, secure_mode={self.secure_mode}, "
            f"grad_sample_mode={self.grad_sample_mode!r}, steps={self.steps})"
        )

    # ------------------------------------------------------------------ modules

    @staticmethod
    def validate(
        module: nn.Module, optimizer: Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> None:
        """Raise what `make_private` would raise for these, and change nothing."""
        setup.shards_of(module, setup.topology_of(module, current()))
        setup.check_module(module)
        if optimizer is not None:
            setup.check_optimizer(optimizer, module)
        if data_loader is not None:
            setup.private_loader(data_loader, RunKey.from_seed(0), True, None, 1)

    @classmethod
    def is_compatible(
        cls, module: nn.Module, optimizer: Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> bool:
        """Whether `validate` passes.

        >>> PrivacyEngine.is_compatible(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
        False
        """
        try:
            cls.validate(module, optimizer, data_loader)
        except setup.REFUSALS:
            return False
        return True

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """A copy in which what mixes records is replaced (`ModuleValidator.fix`): BatchNorm becomes GroupNorm.

        >>> type(PrivacyEngine.get_compatible_module(torch.nn.BatchNorm2d(32))).__name__
        'GroupNorm'
        """
        return ModuleValidator.fix_and_validate(module)

    def detach(self) -> None:
        """End private training: hooks go, the original optimizers step again. What was spent stays spent."""
        for session in self._sessions:
            self._ended.append(training_facts(session))
            session.close()
        self._sessions.clear()


def _mode(grad_sample_mode: str, *, split: bool) -> Mode:
    choose("grad_sample_mode", grad_sample_mode, ("auto", *(mode.value for mode in Mode)))
    if grad_sample_mode == "auto":
        return Mode.GHOST if split else Mode.BK  # who splits a model has no room to keep what one pass keeps
    return Mode(grad_sample_mode)
