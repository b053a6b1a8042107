"""Makes release units: a Bento around one model, the same bytes for the same inputs, signed, kept in one store."""
