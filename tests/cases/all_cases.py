"""Every layer case."""

from __future__ import annotations

import composition_cases
import convolution_cases
import embedding_cases
import generic_cases
import linear_cases
import normalisation_cases

_FAMILIES = (
    linear_cases, convolution_cases, embedding_cases, normalisation_cases, generic_cases, composition_cases,
)  # fmt: skip

ALL = [case for family in _FAMILIES for case in family.CASES]

BY_NAME = {case.name: case for case in ALL}
assert len(BY_NAME) == len(ALL), "names of cases must differ"
