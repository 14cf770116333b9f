"""A report as a draft for OpenDP's Deployments Registry.

Field names and enumerated values are those of ``schemas/deployments-schema.yaml`` of the registry's data repository
(opendp/deployments-registry-data, commit 057e5d8, 2026). What is not known from a training is ``"unknown"``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ghostgrad.report.numbers import UNKNOWN, shown
from ghostgrad.report.view import RELATIONS, headline, statement


def to_deployment_record(data: Mapping[str, Any]) -> str:
    """The record as JSON text. Where the guarantee does not hold there are no parameters, and the details say why."""
    deployment = {
        "basic": {
            "name": data["title"] or UNKNOWN,
            "data_curators": [{"data_curator_name": UNKNOWN, "data_curator_type": UNKNOWN}],
            "description": UNKNOWN,
            "intended_use": UNKNOWN,
            "data_product_type": "Machine learning model",
            "data_product_region": UNKNOWN,
            "publication_date": UNKNOWN,
        },
        "dp_variant": {
            "variant_name": "Approximate DP",
            "data_domain": UNKNOWN,
            "unprotected_quantities": "The number of records is treated as public. "
            + " ".join(f"{part['what'].replace('_', ' ')}: {part['stated']}." for part in data["not_covered"]),
        },
        "privacy_loss": _privacy_loss(data),
        "deployment_model": {
            "model_name": "Central",
            "trust_assumptions": "Whoever trains sees the records; whoever receives parameters, of any step, is an adversary.",
            "release_type": "One release",
            "data_source_type": "Static",
            "access_type": "Non-interactive",
        },
        "implementation": _implementation(data),
        "administrative": {"status": "Draft", "registry_authors": [UNKNOWN], "tier": 3},
    }
    return json.dumps({"url_slug": UNKNOWN, "deployment": deployment}, indent=2, ensure_ascii=False) + "\n"


def _privacy_loss(data: Mapping[str, Any]) -> dict[str, Any]:
    row = headline(data)
    doubts = " ".join(finding["statement"] for finding in data["findings"])
    loss: dict[str, Any] = {
        "privacy_unit": data["privacy_unit"],
        "privacy_unit_details": f"Adjacent datasets differ by {RELATIONS[data['neighbouring']]}. {data['guarantee']}.",
    }
    if data["holds"] != "no" and row is not None and not isinstance(row["upper"], str):
        loss["privacy_parameters"] = {"epsilon": row["upper"], "delta": row["delta"]}
    loss["privacy_parameters_details"] = f"{doubts} {statement(data)}".strip()
    return loss


def _implementation(data: Mapping[str, Any]) -> dict[str, str]:
    stated = {part["what"]: part["stated"] for part in data["not_covered"]}
    kinds = "; ".join(
        f"{t['clipping']} clipping to {shown(t['max_grad_norm'])}, {t['noise']['source']} noise of multiplier "
        f"{shown(t['noise_multiplier'])}, sampling {t['sampling']['assumed']} at rate {shown(t['sample_rate'], 6)}, "
        f"{t['steps']} steps"
        for t in data["trainings"]
    )
    versions = ", ".join(f"{part['name']} {part['version']}" for part in data["libraries"])
    return {
        "preprocessing_and_hyperparameter_tuning": f"Pre-processing: {stated.get('preprocessing', UNKNOWN)}. Hyper-parameters: "
        f"{stated.get('hyper_parameters', UNKNOWN)}. Neither is counted in epsilon.",
        "mechanisms": f"Differentially private stochastic gradient descent: {kinds or UNKNOWN}. Versions: {versions}.",
        "composition": f"All releases of the ledger together, by the accountants pld, rdp and {data['accountant']}.",
        "post_processing": "The optimizer works on noisy gradients only.",
        "justification": UNKNOWN,
    }
