"""Collecting chunked experience."""
