"""Alembic's environment for Perch's own tables: `perch db upgrade`, and each first use of a database, run it."""
