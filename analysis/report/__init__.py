"""The report: one HTML page, its verdict and its findings."""

from analysis.report.build import write_report
from analysis.report.findings import cross_findings
from analysis.report.verdict import verdict_lines, write_verdicts

__all__ = ["cross_findings", "verdict_lines", "write_report", "write_verdicts"]
