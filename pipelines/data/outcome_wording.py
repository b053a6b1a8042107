"""Puts what Great Expectations expected and saw into words, for a terminal and for a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

_MANY = 10  # values that are counted rather than listed


def describe_observed(column_name: str, result: Mapping[str, Any], table: pd.DataFrame) -> str:
    """What was seen, in words: what breaks the limit where something does, else what the column holds.

    Args:
        column_name: of the column that was looked at; empty for the table as a whole.
        result: Great Expectations' `result` of the expectation, as JSON.
        table: that was held against it; of a single row, the value itself is what was seen.
    """
    column = table.get(column_name)
    if len(table) == 1 and column is not None:
        return "not known" if pd.isna(column.iloc[0]) else describe_value(column.iloc[0])
    if result.get("unexpected_count") and "element_count" in result:
        checked = result["element_count"] - result["missing_count"]
        return f"{result['unexpected_count']} of {checked} rows: {_examples(result)}"
    details = result.get("details") or {}
    mismatched = details.get("mismatched") if isinstance(details, Mapping) else None
    if mismatched:
        return "; ".join(f"{kind} {describe_value(names)}" for kind, names in sorted(mismatched.items()))
    if result.get("partial_missing_list") or result.get("partial_unexpected_list"):
        parts = [("missing", result.get("partial_missing_list")), ("unexpected", result.get("partial_unexpected_list"))]
        return "; ".join(f"{kind} {describe_value(sorted(values, key=str))}" for kind, values in parts if values)
    observed = result.get("observed_value")
    if observed is not None:
        many = isinstance(observed, list) and len(observed) > _MANY
        return f"{len(observed)} of them" if many else describe_value(observed)
    return _range(column) if column is not None else ""


def _examples(result: Mapping[str, Any]) -> str:
    values = list(dict.fromkeys(describe_value(value) for value in result.get("partial_unexpected_list", [])))
    rows = result.get("partial_unexpected_index_list") or []
    keys = [str(row["key"]) for row in rows if isinstance(row, Mapping) and "key" in row]
    return ", ".join(values) + (f" (e.g. {', '.join(keys)})" if keys else "")


def _range(column: pd.Series[Any]) -> str:
    """A column in a few words: its range where it holds numbers, its commonest values otherwise."""
    known = column.dropna()
    if known.empty:
        return "all empty"
    if pd.api.types.is_numeric_dtype(known) and not pd.api.types.is_bool_dtype(known):
        low, high = describe_value(known.min()), describe_value(known.max())
        return low if low == high else f"{low} to {high}"
    distinct = known.nunique()
    if distinct > _MANY:
        return f"{distinct} different values"
    counts = known.value_counts()
    return ", ".join(f"{describe_value(value)} ({counts[value]})" for value in sorted(counts.index, key=str))


def describe_value(value: object) -> str:
    """A value as a reader wants it: numbers with four digits, whole ones without a point, lists without brackets."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {describe_value(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(describe_value(each) for each in value)
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
    return str(value)


def describe_limit(type_: str, kwargs: Mapping[str, Any]) -> str:
    """An expectation's arguments in words, e.g. `8 to 4096, for at least 99 % of the rows`."""
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    values = kwargs.get("value_set", kwargs.get("column_set"))
    if low is not None and low == high:
        text = f"exactly {describe_value(low)}"
    elif low is not None and high is not None:
        text = f"{describe_value(low)} to {describe_value(high)}"
    elif low is not None:
        text = f"{'more than' if kwargs.get('strict_min') else 'at least'} {describe_value(low)}"
    elif high is not None:
        text = f"{'less than' if kwargs.get('strict_max') else 'at most'} {describe_value(high)}"
    elif values is not None:
        if type_.endswith("contain_set") or kwargs.get("exact_match") is False:
            quantifier = "all of"
        else:
            quantifier = "only" if type_.endswith("in_set") else "exactly"
        text = f"{quantifier} {describe_value(values)}"
    else:
        rest = [describe_value(value) for name, value in sorted(kwargs.items()) if name not in ("column", "mostly")]
        text = " ".join([re.sub(r"^expect_(column_values|column|table)_(to_)?", "", type_).replace("_", " "), *rest])
    mostly = kwargs.get("mostly", 1)
    return text if mostly == 1 else f"{text}, for at least {describe_value(100 * float(mostly))} % of the rows"
