"""Brings MLflow's database to the schema of this image's MLflow, one pod at a time.

MLflow's server makes the tables of an empty database itself, but of two that begin at once one fails; and it refuses
what an older MLflow has left.
"""

import os
import sys

from sqlalchemy import text

LOCK = 0x6D6C666C6F77  # "mlflow"; nobody else locks in this database


def main(url):
    """Upgrade the PostgreSQL database behind an URL of SQLAlchemy, or find that nothing is to be done."""
    from alembic.util import CommandError
    from mlflow import __version__, db
    from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry

    engine = create_sqlalchemy_engine_with_retry(url)
    # A transaction's lock holds behind a pooler, too, where the next statement may be another session's.
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        before = _revision(engine)
        try:
            db.upgrade.callback(url)
        except CommandError as error:
            sys.exit(
                f"MLflow's database is not one that MLflow {__version__} knows: {error}\n"
                "  what to do: images with the newer MLflow that was here, or the database's backup from before it"
            )
        after = _revision(engine)
    engine.dispose()
    print(f"schema {after}, as it was" if before == after else f"schema {before or 'none'} -> {after}", flush=True)


def _revision(engine):
    from alembic.migration import MigrationContext

    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


if __name__ == "__main__":
    main(os.environ["MLFLOW_BACKEND_STORE_URI"])
