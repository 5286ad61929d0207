"""The report: one HTML page to look through scores. Nothing here computes an influence."""

from .page import Report as Report
from .page import write_report as write_report

__all__ = ["Report", "write_report"]
