"""What is in tables on disk, in whatever format, and what differs between two."""

from jaxembed.inspection.describing import describe
from jaxembed.inspection.difference import TableDifference, difference
from jaxembed.inspection.lookups import LookupDifference, lookup_difference
from jaxembed.inspection.opening import Inspected, open_any
from jaxembed.inspection.page import html_report
from jaxembed.inspection.statistics import TableStats, table_stats

__all__ = [
    "Inspected",
    "LookupDifference",
    "TableDifference",
    "TableStats",
    "describe",
    "difference",
    "html_report",
    "lookup_difference",
    "open_any",
    "table_stats",
]
