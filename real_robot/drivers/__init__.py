"""One driver a file; each is an optional dependency."""
