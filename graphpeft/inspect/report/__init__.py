"""A report on a model in one HTML file: collect its data, and render the page."""

from __future__ import annotations

from graphpeft.inspect.report.page import render as render
