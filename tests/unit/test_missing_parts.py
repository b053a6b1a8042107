"""A part that CI should have installed is missed loudly there, and skipped over elsewhere."""

import pytest

from tests.missing_parts import miss


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_miss__with_and_without_ci__fails_or_skips(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="PostgreSQL is not installed: apt install it"):
        miss("PostgreSQL is not installed", "apt install it")
