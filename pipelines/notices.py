"""Sends a notice to people by whatever Apprise reaches (Slack, e-mail, …), or to the log where nothing is set."""

from __future__ import annotations

import logging

from pipelines.settings import get_settings

_log = logging.getLogger(__name__)


def send_notice(title: str, body: str) -> bool:
    """Send a notice to every URL in PERCH_NOTICE_URLS; True when all took it.

    A notice that does not arrive is logged in full and never fails the work it tells of.
    """
    urls = get_settings().notice_urls.split()
    if not urls:
        _log.warning("notice (PERCH_NOTICE_URLS is empty): %s\n%s", title, body)
        return True
    import apprise

    sender = apprise.Apprise()
    accepted = [sender.add(url) for url in urls]
    sent = all(accepted) and bool(sender.notify(title=title, body=body))
    if not sent:
        # The URLs hold tokens: name how many there are, never which.
        _log.error("notice did not reach all of %d PERCH_NOTICE_URLS: %s\n%s", len(urls), title, body)
    return sent
