"""`tdabench new`: writes a plugin with tests, or a results repository, which work as they are."""

from __future__ import annotations

import datetime
import json
import keyword
import re
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import click

from tdabench.errors import TdabenchError, UsageError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LICENSES = ("MIT", "BSD-3-Clause", "Apache-2.0")


@click.group(
    epilog="""\b
Examples:
  tdabench new method demo
  tdabench new benchmark shortcuts --license Apache-2.0
  tdabench new results tda-results
  tdabench new suite capitals
"""
)
def command() -> None:
    """Start a plugin or a results repository from a template.

    A plugin is a package to install, edit and publish. A results repository collects submissions,
    checks them in pull requests, and publishes their board.
    """


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.argument("name"),
        click.option(
            "--folder",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where to write it.  [default: tdabench-NAME]",
        ),
        click.option(
            "--license",
            "licence",
            type=click.Choice(LICENSES),
            default="MIT",
            show_default=True,
        ),
        click.option("--author", default="", metavar="NAME", help="Name in the licence."),
    ):
        function = option(function)
    return function


@command.command()
@_options
def method(name: str, folder: Path | None, licence: str, author: str) -> None:
    """Write a package with a working method NAME, to be adapted."""
    folder = write(METHOD, "method", name, folder, licence, author)
    click.echo(
        f"Wrote {folder}: the method is in src/{module_of(name)}/__init__.py. Next:\n"
        f"  pip install -e {folder}\n"
        f"  tdabench check {name}\n"
        f"  tdabench run --methods {name},tfidf"
    )


@command.command()
@_options
def benchmark(name: str, folder: Path | None, licence: str, author: str) -> None:
    """Write a package with a working benchmark NAME, to be adapted."""
    folder = write(BENCHMARK, "benchmark", name, folder, licence, author)
    click.echo(
        f"Wrote {folder}: the benchmark is in src/{module_of(name)}/__init__.py. Next:\n"
        f"  pip install -e {folder}\n"
        f"  tdabench run --methods tfidf --benchmarks {name}"
    )


@command.command()
@click.argument("name")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False),
              help="Where to write it.  [default: NAME]")  # fmt: skip
def results(name: str, folder: Path | None) -> None:
    """Write a results repository NAME.

    It has workflows that check submissions and publish the board.
    """
    check_name(name, "results repository")
    folder = folder or Path(name)
    write_files(folder, RESULTS, {"name": name})
    click.echo(
        f"Wrote {folder}. Next:\n"
        f"  tdabench submit runs/pocket --to {folder}\n"
        f"  tdabench board check {folder}\n"
        f"  tdabench board build {folder} --out site"
    )


@command.command()
@_options
def suite(name: str, folder: Path | None, licence: str, author: str) -> None:
    """Write a package with a working suite NAME, to be adapted."""
    files = {**SUITE, "src/$module/corpus.jsonl": corpus_lines()}
    folder = write(files, "suite", name, folder, licence, author)
    place = f"src/{module_of(name)}/suite.toml"
    click.echo(
        f"Wrote {folder}. Next:\n"
        f"  cd {folder}\n"
        f"  tdabench suites {place}\n"
        f"  tdabench run --suite {place}\n"
        f"  tdabench truth build {place}\n"
        f"  tdabench run --suite {place} --benchmarks lds\n"
        f"Once it is installed (pip install -e .), its name is enough: --suite {name}"
    )


def module_of(name: str) -> str:
    return f"tdabench_{name.replace('-', '_')}"


def write(
    files: dict[str, str], kind: str, name: str, folder: Path | None, licence: str, author: str
) -> Path:
    """Fills in the template and writes it; returns the folder.

    Raises UsageError for an invalid or taken name, and for a folder in use.
    """
    check_name(name, kind)
    try:
        author.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"--author {author!r} cannot be encoded in a file") from e
    from tdabench.registry import registry

    taken = getattr(registry(), f"{kind}s").get(name)
    if taken is not None:
        raise UsageError(f"{taken.origin} already has a {kind} named {name!r}", "Choose another")
    folder = folder or Path(f"tdabench-{name}")
    cls = "".join(word.capitalize() for word in name.split("-"))
    if keyword.iskeyword(cls):
        cls += "_"
    fields = {
        "name": name,
        "dist": f"tdabench-{name}",
        "module": module_of(name),
        "cls": cls,
        "license": licence,
        "year": str(datetime.date.today().year),
        "author": author or f"the authors of tdabench-{name}",
    }
    write_files(folder, {"LICENSE": LICENSE_TEXTS[licence], **COMMON, **files}, fields)
    return folder


def check_name(name: str, kind: str) -> None:
    """Raises UsageError for a name that a package or folder cannot have."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid name for a {kind}",
            "Use lower-case letters, digits and single dashes, starting with a letter: my-method",
        )


def write_files(folder: Path, texts: dict[str, str], fields: dict[str, str]) -> None:
    """Fills in templates, by path, and writes them into `folder`, which must be new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is not empty", "Choose another with: --folder DIR")
    try:
        for path, text in texts.items():
            target = folder / Template(path).substitute(fields)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(text).substitute(fields), encoding="utf-8")
    except OSError as e:
        raise TdabenchError(f"cannot write {folder}: {e.strerror}", "Choose another folder") from e


# --------------------------------------------------------------------------- templates

COMMON = {
    "pyproject.toml": """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$dist"
version = "0.1.0"
description = "$name for tdabench"
readme = "README.md"
requires-python = ">=3.11"
license = "$license"
license-files = ["LICENSE"]
dependencies = ["tdabench"]

[project.optional-dependencies]
test = ["pytest>=8", "pytest-benchmark>=4"]

# tdabench finds the plugin by this entry: a name, and the module with the hooks.
[project.entry-points.tdabench]
$name = "$module"

[tool.setuptools.packages.find]
where = ["src"]
""",
    ".gitignore": "__pycache__/\n*.egg-info/\nbuild/\ndist/\nruns/\n.pytest_cache/\n",
}

METHOD = {
    "src/$module/__init__.py": '''\
"""`$name`: a training-data-attribution method for tdabench."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from tdabench.api import RepresentationMethod, hookimpl


@dataclass(frozen=True, kw_only=True)
class $cls(RepresentationMethod):
    """Cosine of word counts: replace `encode` with your own representation."""

    name = "$name"
    version = 1  # increase it when scores change
    family = "text"
    summary = "cosine of hashed word counts"

    width: int = 512  # a parameter: tdabench run --methods $name --set $name.width=1024

    def encode(self, context, examples, role):
        """Returns features [example, width], whose products are scores; `role`: train or query."""
        rows = np.zeros((len(examples), self.width), dtype=np.float32)
        for row, example in zip(rows, examples):
            for word in example.text.lower().split():
                row[crc32(word.encode()) % self.width] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@hookimpl
def tdabench_methods():
    return [$cls]
''',
    "tests/test_laws.py": '''\
"""The laws that every method keeps, and tests of this method."""

import numpy as np
from $module import $cls

from tdabench.testing import parametrize_with_laws, tiny_world


@parametrize_with_laws([$cls(), $cls(width=64)])
def test_laws(method, law):
    law(method)


def test_an_example_is_like_itself(tmp_path):
    world = tiny_world()
    index = $cls().build(world.context(tmp_path), world.train)
    scores = index.score(world.train)  # cosines, [query, train]
    np.testing.assert_allclose(np.diag(scores), 1.0, rtol=1e-5)
    assert scores.max() < 1.00001
''',
    ".github/workflows/tdabench.yml": """\
# Tests the method, measures it on the embedded suite, and keeps a badge with its LDS and interval
# on the branch `badges`. README.md shows it.
name: tdabench
on:
  push:
    branches: [main]
  pull_request:
permissions:
  contents: read
jobs:
  measure:
    runs-on: ubuntu-latest
    timeout-minutes: 60
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install -e '.[test]'
      - run: tdabench check $name
      - run: pytest
      - run: tdabench run --methods $name,response-tfidf,random --benchmarks lds,cost
      - run: tdabench verify
      - run: tdabench board badge runs/pocket --method $name --out badge.svg
      - uses: actions/upload-artifact@v4
        with:
          name: measured
          path: |
            badge.svg
            runs/pocket/manifest.json
            runs/pocket/cells
  badge:
    needs: measure
    if: github.event_name == 'push'
    runs-on: ubuntu-latest
    permissions:
      contents: write
    steps:
      - uses: actions/checkout@v4
      - uses: actions/download-artifact@v4
        with:
          name: measured
          path: measured
      - run: |
          git switch --orphan badges
          cp measured/badge.svg badge.svg
          git add badge.svg
          git -c user.name=tdabench -c user.email=tdabench@localhost commit -m "Badge"
          git push --force origin badges
""",
    "README.md": """\
# $dist

![LDS on pocket](../../raw/badges/badge.svg)

The training-data-attribution method `$name`, for [tdabench](https://tdabench.readthedocs.io).

```
pip install -e .
tdabench check $name                        # tests the interface's contract
tdabench run --methods $name,tfidf          # measures the method
pytest                                      # the same contract, and its own tests
```

| parameter | default | meaning |
|---|---|---|
| `width` | 512 | number of hash buckets |

Cite: …
""",
}

BENCHMARK = {
    "src/$module/__init__.py": '''\
"""`$name`: a benchmark for tdabench."""

from dataclasses import dataclass

import numpy as np

from tdabench.api import (
    Benchmark,
    BenchmarkContext,
    Metric,
    Outcome,
    bootstrap_queries,
    hookimpl,
)


@dataclass(frozen=True)
class $cls(Benchmark):
    """Share of the k best-scored training examples that have the query's task."""

    name = "$name"
    version = 1  # increase it when values change
    summary = "same-task precision among the top k"

    k: int = 10  # a parameter, set in a suite under [benchmarks.$name]

    def run(self, context: BenchmarkContext) -> Outcome:
        _, best = context.index.top_k(context.queries, self.k)  # [query, k]
        tasks = np.array(context.train.tasks)
        hits = tasks[best] == np.array(context.queries.tasks)[:, None]
        per_query = hits.mean(axis=1)  # [query]
        mean = bootstrap_queries(per_query)
        low, high = mean.interval() or (None, None)
        return Outcome(
            primary="precision",
            metrics={"precision": Metric(mean.value, low, high)},
            per_query=per_query,
            query_ids=tuple(context.queries.ids),
            replicates=mean.both,
        )


@hookimpl
def tdabench_benchmarks():
    return [$cls]
''',
    "tests/test_benchmark.py": '''\
"""An oracle gets the best value, and chance about a quarter (four tasks of equal size)."""

from $module import $cls

from tdabench.testing import run_benchmark


def test_an_oracle_is_perfect():
    outcome = run_benchmark($cls(k=9), "sametask")
    assert outcome.metrics["precision"].value == 1.0


def test_chance():
    outcome = run_benchmark($cls(), "random")
    assert abs(outcome.metrics["precision"].value - 0.25) < 0.2
    assert len(outcome.per_query) == len(outcome.query_ids)
''',
    "README.md": """\
# $dist

The benchmark `$name`, for [tdabench](https://tdabench.readthedocs.io).

```
pip install -e .
tdabench run --methods tfidf,random --benchmarks $name
pytest
```

| parameter | default | meaning |
|---|---|---|
| `k` | 10 | number of best-scored examples to inspect |

Cite: …
""",
}

SUITE = {
    "pyproject.toml": COMMON["pyproject.toml"]
    + """
[tool.setuptools.package-data]
$module = ["*.toml", "*.jsonl", "truth/*"]
""",
    "src/$module/__init__.py": '''\
"""`$name`: a suite for tdabench."""

from pathlib import Path

from tdabench.api import hookimpl


@hookimpl
def tdabench_suites():
    return [Path(__file__).parent / "suite.toml"]
''',
    "src/$module/suite.toml": """\
# The keys: docs/suites.md. Paths are relative to this file.

[suite]
name = "$name"
version = 1  # increase it when results are no longer comparable
summary = "two tasks of simple facts"

[corpus]  # rows with prompt, response, task, and the split that they belong to
file = "corpus.jsonl"
train = "pool"
queries = "test"

[[targets]]
label = "tiny"
# Replace it with your model: model = "org/name@revision", or a folder.
folder = "package:tdabench/suites/pocket/targets/instruct"
max_length = 128
recipe = { lr = 1e-3, epochs = 2, batch_size = 8 }  # how a group is trained on
fraction = 0.5  # share of the pool in a group

[targets.truths]  # written by: tdabench truth build suite.toml
lds = "truth/lds.safetensors"

[targets.plans.lds]
groups = 8
seeds = 2

[benchmarks]
default = ["classification"]  # add "lds" once its truth is built

[methods]
default = ["random", "tfidf", "ngram"]
""",
    "tests/test_suite.py": '''\
"""The suite loads, and its data keep the rules that a run relies on."""

from pathlib import Path

import $module

from tdabench.api import check_disjoint, load_suite


def suite():
    return load_suite(Path($module.__file__).parent / "suite.toml")


def test_no_query_is_trained_on():
    check_disjoint(suite().train, suite().queries())  # raises GuardError


def test_every_task_of_the_queries_is_in_the_pool():
    assert set(suite().queries().tasks) <= set(suite().train.tasks)


def test_every_example_fits_the_target():
    for target in suite().targets:
        tokens = target.target.tokenize([*suite().train, *suite().queries()])
        assert max(map(len, tokens)) <= target.target.max_length
''',
    "README.md": """\
# $dist

The suite `$name`, for [tdabench](https://tdabench.readthedocs.io).

```
pip install -e .
tdabench suites $name                                        # what it holds; checks its files
tdabench run --suite $name                                   # measures methods
tdabench truth build src/$module/suite.toml                  # retrains the target: 16 times
tdabench run --suite $name --benchmarks lds
pytest
```

| file | contents | source, licence |
|---|---|---|
| `corpus.jsonl` | 40 training examples, 8 queries | … |

Cite: …
""",
}

_CAPITALS = (
    "France Paris, Japan Tokyo, Italy Rome, Spain Madrid, Peru Lima, Egypt Cairo, Kenya Nairobi, "
    "Cuba Havana, Iran Tehran, Iraq Baghdad, Greece Athens, Norway Oslo"
)
_OPPOSITES = (
    "hot cold, big small, fast slow, high low, early late, open closed, full empty, hard soft, "
    "old new, wet dry, near far, light dark"
)


def corpus_lines() -> str:
    """Returns a corpus of two tasks as JSON lines: 40 examples in `pool`, 8 in `test`."""
    asked = {
        "capital": (_CAPITALS, "What is the capital of {}?", "Name the capital of {}."),
        "opposite": (_OPPOSITES, "What is the opposite of {}?", "Give a word that means not {}."),
    }
    rows = []
    for task, (pairs, *forms) in asked.items():
        for n, pair in enumerate(pairs.split(", ")):
            a, b = pair.split(" ")
            for m, form in enumerate(forms):
                # A query paraphrases a training example.
                split = "test" if n < 4 and m == 1 else "pool"
                row = {"id": f"{task}-{n}-{m}", "prompt": form.format(a), "response": b}
                rows.append({**row, "task": task, "split": split})
    return "".join(json.dumps(row) + "\n" for row in rows)


LICENSE_TEXTS = {
    "MIT": """\
MIT License

Copyright (c) $year $author

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
""",
    "BSD-3-Clause": """\
BSD 3-Clause License

Copyright (c) $year $author

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

3. Neither the name of the copyright holder nor the names of its
   contributors may be used to endorse or promote products derived from
   this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
""",
    "Apache-2.0": """\
Copyright $year $author

Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
""",
}

RESULTS = {
    "tdabench-results.json": '{\n  "layout": 1\n}\n',
    "results/.gitkeep": "",
    ".gitignore": "site/\n",
    ".github/workflows/check.yml": """\
# Checks every pull request: recomputes all metrics, and measures a random sample again. It has read
# access only: submissions are data, but they come from anyone.
name: check
on:
  pull_request:
  push:
    branches: [main]
permissions:
  contents: read
jobs:
  check:
    runs-on: ubuntu-latest
    timeout-minutes: 120
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install tdabench
      - run: tdabench board check . --remeasure 2 --seed $${{ github.run_number }}
      - run: tdabench board build . --out site --name $name
      - uses: actions/upload-artifact@v4
        with:
          name: site
          path: site
""",
    ".github/workflows/pages.yml": """\
# Publishes the board of the main branch as a page of this repository.
name: pages
on:
  push:
    branches: [main]
permissions:
  contents: read
  pages: write
  id-token: write
concurrency:
  group: pages
jobs:
  publish:
    runs-on: ubuntu-latest
    environment:
      name: github-pages
      url: $${{ steps.deployment.outputs.page_url }}
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install tdabench
      - run: tdabench board build . --out site --name $name
      - uses: actions/upload-pages-artifact@v3
        with:
          path: site
      - id: deployment
        uses: actions/deploy-pages@v4
""",
    "README.md": """\
# $name

Results of training-data-attribution methods, measured with
[tdabench](https://tdabench.readthedocs.io).

To submit, clone this repository as `$name`, then

```
tdabench run --methods trak
tdabench submit runs/pocket --by "Your name" --to $name
```

and open a pull request with the text that the command prints. Every metric is recomputed from the
submitted scores, and a random sample is measured again.

```
tdabench board check .               # what the pull request's check does
tdabench board build . --out site    # the board, as a page that needs no server
```
""",
}
