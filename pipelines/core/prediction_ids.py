"""Prediction ids: ULIDs, which are unique without coordination and sort by the time they were made.

Source: the ULID specification, https://github.com/ulid/spec: 48 bits of milliseconds since 1970 and 80 random bits,
as 26 characters of Crockford's base 32.  Ids of one millisecond have no order among themselves: counting upwards, as
the specification allows, would let a client guess its neighbour's id.
"""

from __future__ import annotations

import os
import time
from base64 import b32encode
from datetime import UTC, datetime, timedelta

ID_LENGTH = 26

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_FROM_RFC_4648 = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", _DIGITS.encode())
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]  # ten bits at a time
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def new_prediction_id() -> str:
    """A new id for the present moment: 26 characters, about two microseconds."""
    return _encode(time.time_ns() // 1_000_000, os.urandom(10))


def first_id_at(moment: datetime) -> str:
    """The smallest id that can be made at a moment (with a time zone): a bound for searches by time.

    Raises:
        ValueError: the moment lies before 1970.
    """
    milliseconds = (moment - _EPOCH) // timedelta(milliseconds=1)
    if milliseconds < 0:
        raise ValueError(f"{moment} lies before 1970")
    return _encode(milliseconds, bytes(10))


def time_of(prediction_id: str) -> datetime:
    """When an id was made, UTC, to the millisecond.

    Raises:
        ValueError: it is not an id: not 26 characters of Crockford's base 32, or beyond the year 9999.
    """
    if len(prediction_id) != ID_LENGTH:
        raise ValueError(f"a prediction id has {ID_LENGTH} characters, not {len(prediction_id)}")
    milliseconds = 0
    for position, digit in enumerate(prediction_id):
        value = _VALUES.get(digit)
        if value is None:
            raise ValueError(f"a prediction id holds digits and capitals without I, L, O and U, not {digit!r}")
        if position < 10:
            milliseconds = milliseconds * 32 + value
    try:
        return _EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        raise ValueError("the time in the prediction id is out of range") from None


def _encode(milliseconds: int, random: bytes) -> str:
    moment = (
        _PAIRS[milliseconds >> 40]
        + _PAIRS[milliseconds >> 30 & 1023]
        + _PAIRS[milliseconds >> 20 & 1023]
        + _PAIRS[milliseconds >> 10 & 1023]
        + _PAIRS[milliseconds & 1023]
    )
    return moment + b32encode(random).translate(_FROM_RFC_4648).decode("ascii")
