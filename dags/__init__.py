"""Schedules, retries, forms and notices.  No machine learning happens here."""
