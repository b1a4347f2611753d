"""From the results table to answers: loading, statistics, figures and a report."""

from analysis.load import TableError, load

__all__ = ["TableError", "load"]
