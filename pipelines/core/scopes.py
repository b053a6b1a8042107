"""What a credential of the prediction service may do; light enough for the command line to name at once."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """One word per kind of request."""

    PREDICT = "predict"
    EXPLAIN = "explain"
    FEEDBACK = "feedback"
    MODEL = "model"
    METRICS = "metrics"
