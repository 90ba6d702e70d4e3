"""Blocks that policies share."""
