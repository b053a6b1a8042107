"""Moments as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def format_minute(moment: datetime) -> str:
    """A moment with a zone, in UTC and to the minute: `2026-11-24 09:00 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
