"""Results for people: pages and figures as text, which need no plotting library.

``write_report`` makes the page of one run, ``write_comparison`` that of several.
"""

from mcsharp_sdk.report.comparison import write_comparison
from mcsharp_sdk.report.page import write_report

__all__ = ["write_comparison", "write_report"]
