"""The report of a comparison: one HTML file, CSV, and figures for papers."""

from recipes.report.export import results_csv
from recipes.report.page import write_report
from recipes.report.runs import read_runs
from recipes.report.static import write_figures

__all__ = ["read_runs", "results_csv", "write_figures", "write_report"]
