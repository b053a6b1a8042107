"""The `perch` command."""
