"""From records to understanding: boards, exports, plots and the browser report.

Everything shown is computed from records; nothing here scores or trains. This package loads
neither torch nor scipy until a comparison has to be computed, so a cached board prints at once.
"""
