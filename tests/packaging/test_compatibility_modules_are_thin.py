"""The modules that stand where users of Opacus look only pass names on: nothing can differ between two places."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import ghostgrad

SOURCE = Path(ghostgrad.__file__).parent
PACKAGES = ("accountants", "optimizers", "utils", "validators", "grad_sample")
THIN = [
    SOURCE / "data_loader.py",
    SOURCE / "privacy_engine.py",
    *(path for package in PACKAGES for path in sorted((SOURCE / package).rglob("*.py"))),
]
PLACES = {
    "ghostgrad": ["BatchMemoryManager", "DPDataLoader", "DPOptimizer", "ModuleValidator", "PrivacyEngine"],
    "ghostgrad.privacy_engine": ["PrivacyEngine"],
    "ghostgrad.accountants": [
        "GaussianAccountant",
        "IAccountant",
        "PRVAccountant",
        "RDPAccountant",
        "create_accountant",
        "register_accountant",
    ],
    "ghostgrad.accountants.utils": ["get_noise_multiplier"],
    "ghostgrad.data_loader": ["DPDataLoader"],
    "ghostgrad.optimizers": ["DPOptimizer"],
    "ghostgrad.optimizers.optimizer": ["DPOptimizer"],
    "ghostgrad.utils.batch_memory_manager": ["BatchMemoryManager"],
    "ghostgrad.validators": ["ModuleValidator"],
    "ghostgrad.validators.module_validator": ["ModuleValidator"],
    "ghostgrad.validators.errors": ["ShouldReplaceModuleError", "UnsupportedModuleError"],
    "ghostgrad.grad_sample": ["add_rule"],
    "ghostgrad.layers": ["DPGRU", "DPLSTM", "DPRNN"],
    "ghostgrad.schedulers": ["ExponentialGradClip", "ExponentialNoise", "LambdaGradClip", "LambdaNoise", "StepNoise"],
}


def is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_list_of_names(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"


@pytest.mark.parametrize("path", THIN, ids=lambda path: str(path.relative_to(SOURCE)))
def test_they_hold_imports_and_nothing_else(path):
    for statement in ast.parse(path.read_text()).body:
        assert isinstance(statement, ast.ImportFrom) or is_docstring(statement) or is_list_of_names(statement)


@pytest.mark.parametrize(("place", "names"), PLACES.items(), ids=PLACES)
def test_names_are_where_they_are_looked_for(place, names):
    module = importlib.import_module(place)
    assert [name for name in names if not hasattr(module, name)] == []


def test_one_name_is_one_object_wherever_it_is_imported_from():
    from ghostgrad.memory import BatchMemoryManager
    from ghostgrad.optimizer import DPOptimizer
    from ghostgrad.utils import batch_memory_manager

    assert batch_memory_manager.BatchMemoryManager is BatchMemoryManager is ghostgrad.BatchMemoryManager
    assert ghostgrad.DPOptimizer is DPOptimizer
