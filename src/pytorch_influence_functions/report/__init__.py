"""The report: one HTML page to look through scores. Nothing here computes an influence."""

from .decisions import Decision as Decision
from .decisions import Decisions as Decisions
from .decisions import read_decisions as read_decisions
from .page import Report as Report
from .page import write_report as write_report

__all__ = ["Decision", "Decisions", "Report", "read_decisions", "write_report"]
