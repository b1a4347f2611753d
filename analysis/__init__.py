"""From the results table to answers: loading, statistics, figures and a report."""

from analysis.compare import compare_grids
from analysis.load import TableError, load_results
from analysis.paired import compare_selections
from analysis.paper import paper_table, published
from analysis.requests import load_requests
from analysis.retention import retention, worst_retained
from analysis.statistics import summarize, with_mean_accuracy
from analysis.wide import wide

__all__ = [
    "TableError",
    "compare_grids",
    "compare_selections",
    "load_requests",
    "load_results",
    "paper_table",
    "published",
    "retention",
    "summarize",
    "wide",
    "with_mean_accuracy",
    "worst_retained",
]
