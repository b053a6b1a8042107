"""Registered models, their runs, and the ledger."""
