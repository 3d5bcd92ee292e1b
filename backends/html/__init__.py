"""Self-contained HTML pages: no network, everything a page needs is in it.

A :class:`Fragment` is a piece of a page with the styles and scripts it needs; :func:`page` puts fragments together,
each asset once. :func:`cost_fragment` is the cost report as such a piece, for any page that wants its charts.
"""

from __future__ import annotations

from e2pass.backends.html.cost import cost_fragment, to_html
from e2pass.backends.html.page import Asset, Fragment, asset, environment, page

__all__ = ["Asset", "Fragment", "asset", "cost_fragment", "environment", "page", "to_html"]
