"""From the results table to answers: loading, statistics, figures and a report."""

from analysis.load import TableError, load
from analysis.paired import compare
from analysis.paper import paper_table, published
from analysis.requests import load_requests
from analysis.statistics import summarize, with_mean_accuracy
from analysis.wide import wide

__all__ = [
    "TableError",
    "compare",
    "load",
    "load_requests",
    "paper_table",
    "published",
    "summarize",
    "wide",
    "with_mean_accuracy",
]
