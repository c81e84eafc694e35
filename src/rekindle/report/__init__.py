"""Plans for people to read. Imports no torch."""

from rekindle.report.fold import Row, rows_of
from rekindle.report.plans import describe_plan

__all__ = ["Row", "describe_plan", "rows_of"]
