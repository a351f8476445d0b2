"""Results that travel: submissions, repositories of them, their site, and results in Python.

`layout` reads a results repository, `pack` writes submissions into one, `check` recomputes and
re-measures them, `site` makes the static leaderboard, `table` gives results to Python, and `cite`
writes citations and model cards. See docs/results.md.
"""
