"""Boards, exports, plots and the HTML report, computed from records.

Nothing here scores or trains. This package loads neither torch nor scipy until a comparison has to
be computed, so a cached board prints immediately.
"""
