#!/bin/sh
# From nothing to a row on the board, with no edit in between. RUN_OPTIONS may name a suite.
set -eu
tdabench new method demo
pip install --no-build-isolation --no-deps -e tdabench-demo
tdabench check demo
tdabench run --methods demo,tfidf ${RUN_OPTIONS:-}
