"""A report as one HTML file: what is collected from a model, and the page that shows it."""

from __future__ import annotations

from graphpeft.inspect.report.page import render as render
