"""Pure functions and contracts.  Nothing here starts a process, opens a connection or imports a heavy library."""
