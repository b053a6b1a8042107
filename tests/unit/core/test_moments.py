from datetime import datetime, timedelta, timezone

from pipelines.core.moments import format_minute


def test_format_minute__moment_of_another_zone__is_given_in_utc() -> None:
    in_india = datetime(2026, 11, 24, 1, 30, 59, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert format_minute(in_india) == "2026-11-23 20:00 UTC"
