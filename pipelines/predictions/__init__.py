"""Kept predictions: finding, querying and explaining what the service said."""
