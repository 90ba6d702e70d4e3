"""Tabletop tasks, one family a file."""
