#!/bin/sh
# From nothing to a row on the board, with no edit in between. In an empty environment:
#     sh first_method.sh
# TDABENCH names what to install (a folder, a wheel), PIP_OPTIONS and RUN_OPTIONS are passed on.
set -eu
pip install ${PIP_OPTIONS:-} "${TDABENCH:-tdabench}"
tdabench new method demo
pip install ${PIP_OPTIONS:-} -e tdabench-demo
tdabench check demo
tdabench run --methods demo,tfidf ${RUN_OPTIONS:-}
