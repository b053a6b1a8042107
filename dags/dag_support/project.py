"""The project that the DAGs belong to, read once per parse of a DAG file."""

from __future__ import annotations

from pathlib import Path

PROJECT_DIR = Path(__file__).parents[2]
