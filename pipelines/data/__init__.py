"""From a source's files to validated arrays."""
