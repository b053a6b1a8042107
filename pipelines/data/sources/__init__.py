"""The places images come from; `open_source` picks the one that a location means."""
