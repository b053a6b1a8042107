"""What a test does whose other half is not on this machine: fail where CI should have installed it, else skip."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def miss(part: str, remedy: str) -> NoReturn:
    """Skip the test on a person's machine; fail it in CI, where a skip would hide that nothing is tested.

    Args:
        part: what is missing, as a sentence.
        remedy: what brings it.
    """
    text = f"{part}: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(f"{text} (not skipped, as CI is set)", pytrace=False)
    pytest.skip(text)
