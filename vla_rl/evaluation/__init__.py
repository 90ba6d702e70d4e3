"""Evaluation, statistics, comparison, the report."""
