"""Ports that are free, found on this machine."""

from __future__ import annotations

import socket

from pipelines.core.free_ports import any_free_port, is_free


def test_is_free__somebody_listens__is_not_until_he_ends() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", port := any_free_port()))
        server.listen()
        assert not is_free(port)
    assert is_free(port)
