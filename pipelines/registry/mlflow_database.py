"""Makes MLflow's SQLite database whole or not at all.

MLflow creates it by a hundred migrations, each on its own: a kill among them leaves a database that neither MLflow nor
its server ever opens again, and two processes that begin at once trip over each other.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pipelines.registry.mlflow_import import import_mlflow


def ensure_database(file: Path) -> None:
    """Create MLflow's database where there is none; call it before anything else of MLflow opens it.

    Args:
        file: of the SQLite database.
    """
    if file.exists():
        return
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".creating-") as folder:
        draft = Path(folder) / file.name
        SqlAlchemyStore(f"sqlite:///{draft}", default_artifact_root="mlflow-artifacts:/").engine.dispose()
        try:
            os.link(draft, file)  # unlike a rename, it never replaces what another process has begun to use
        except FileExistsError:
            return
