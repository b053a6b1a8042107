"""Prepares one server before its services start: databases, a bucket, keys, log-ins; what is there stays as it is.

`compose.yaml` runs this in the image perch-server each time that the services come up, with the secrets in its
environment.  A password of a database that was changed there is changed in PostgreSQL, too; that of `postgres` is not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Name of a database to the account that owns it.
DATABASES = {"perch": "perch", "tuning": "perch", "mlflow": "mlflow", "airflow": "airflow"}
BUCKET = "perch"
USERS = ("admin", "scientist", "approver")


def prepare_databases(url: str, passwords: Mapping[str, str]) -> None:
    """Each account with its password and databases of its own, which nobody else may enter.

    Args:
        url: of any database, as the superuser.
        passwords: by account.
    """
    import psycopg
    from psycopg import sql

    with psycopg.connect(url, autocommit=True) as connection:
        for account, password in passwords.items():
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (account,)).fetchone()
            statement = "ALTER ROLE {} LOGIN PASSWORD {}" if known else "CREATE ROLE {} LOGIN PASSWORD {}"
            connection.execute(sql.SQL(statement).format(sql.Identifier(account), sql.Literal(password)))
        for database, owner in DATABASES.items():
            name = sql.Identifier(database)
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, sql.Identifier(owner)))
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))


def prepare_bucket(endpoint: str, region: str) -> None:
    """The bucket for releases, predictions and MLflow's artifacts; credentials are those that boto3 finds."""
    import boto3
    from botocore.config import Config

    store = boto3.client(
        "s3", endpoint_url=endpoint, region_name=region, config=Config(s3={"addressing_style": "path"})
    )
    if BUCKET not in {known["Name"] for known in store.list_buckets()["Buckets"]}:
        store.create_bucket(Bucket=BUCKET)


def prepare_keys(private: Path, trusted: Path, api_keys: Path) -> None:
    """The key that signs releases, its public half where the services look for it, and a file of API keys.

    Args:
        private: file of the key.
        trusted: folder of public keys.
        api_keys: file that `perch api-keys add --file` adds to.
    """
    from pipelines.core.api_keys import ApiKeyFile, write_keys
    from pipelines.release.keys import create_key
    from pipelines.settings import Settings

    if not private.is_file():
        create_key(Settings(home=private.parent.parent), private.stem)
    shutil.copyfile(private.with_suffix(".pub"), trusted / f"{private.stem}.pub")
    if not api_keys.is_file():
        write_keys(api_keys, ApiKeyFile())


def write_logins(file: Path, passwords: Mapping[str, str]) -> None:
    """Airflow's log-ins; it wants to write the file itself, so it can be no read-only secret."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(passwords) + "\n", encoding="utf-8")
    draft.rename(file)


def migrate() -> None:
    """The tables of Perch and of Airflow; MLflow makes its own."""
    for command in (["perch", "db", "upgrade"], ["airflow", "db", "migrate"]):
        subprocess.run(command, check=True)


def main(environment: Mapping[str, str]) -> None:
    """All of it, each step said."""
    accounts = sorted(set(DATABASES.values()))
    passwords = {account: environment[f"{account.upper()}_DATABASE_PASSWORD"] for account in accounts}
    for title, step in (
        ("databases", lambda: prepare_databases(environment["POSTGRES_URL"], passwords)),
        ("bucket", lambda: prepare_bucket(environment["PERCH_S3_ENDPOINT_URL"], environment["PERCH_S3_REGION"])),
        (
            "keys",
            lambda: prepare_keys(
                Path(environment["PERCH_SIGNING_KEY"]),
                Path(environment["PERCH_SERVING_PUBLIC_KEYS"]),
                Path(environment["PERCH_SERVING_API_KEYS_FILE"]),
            ),
        ),
        (
            "log-ins",
            lambda: write_logins(
                Path(environment["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]),
                {user: environment[f"AIRFLOW_{user.upper()}_PASSWORD"] for user in USERS},
            ),
        ),
        ("tables", migrate),
    ):
        step()
        sys.stdout.write(f"{title} ready\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(os.environ)
