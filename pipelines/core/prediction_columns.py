"""The columns of kept predictions and feedback, in their order; docs/reference/predictions.md says what they mean.

Columns are only ever added, at the end, so that old files stay readable.
"""

from __future__ import annotations

# name -> type in DuckDB's words
PREDICTION_COLUMNS = {
    "prediction_id": "VARCHAR",
    "time": "TIMESTAMP WITH TIME ZONE",
    "request_id": "VARCHAR",
    "model": "VARCHAR",
    "model_version": "VARCHAR",
    "onnx_sha256": "VARCHAR",
    "endpoint": "VARCHAR",
    "label": "VARCHAR",
    "confidence": "FLOAT",
    "probabilities": "MAP(VARCHAR, FLOAT)",
    "image_sha256": "VARCHAR",
    "format": "VARCHAR",
    "mode": "VARCHAR",
    "width_px": "INTEGER",
    "height_px": "INTEGER",
    "n_bytes": "BIGINT",
    "caller": "VARCHAR",
    "duration_ms": "FLOAT",
    "origin": "VARCHAR",
}

FEEDBACK_COLUMNS = {
    "prediction_id": "VARCHAR",
    "true_label": "VARCHAR",
    "time": "TIMESTAMP WITH TIME ZONE",
    "caller": "VARCHAR",
    "request_id": "VARCHAR",
}
