"""What people are to read: plans, and what takes long. Imports no torch."""

from rekindle.report.fold import Row, rows_of
from rekindle.report.plans import describe_plan
from rekindle.report.progress import planning, telling

__all__ = ["Row", "describe_plan", "planning", "rows_of", "telling"]
