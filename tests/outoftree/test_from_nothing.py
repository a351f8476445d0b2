"""The road of a newcomer: the script, and the tutorial as it is printed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TUTORIAL = HERE.parents[1] / "docs/tutorial-first-method.md"

pytestmark = pytest.mark.slow


def run(command, env, cwd):
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def uninstall(env):
    run(["pip", "uninstall", "-qy", "tdabench-demo"], env, HERE)


def test_the_script_goes_from_nothing_to_the_board(new_sandbox, sources, tiny_suite_file, tmp_path):
    env = new_sandbox("pip")  # no command tdabench until pip has installed it
    env |= {
        "TDABENCH": str(sources),
        "PIP_OPTIONS": "--quiet --no-deps --no-build-isolation",
        "RUN_OPTIONS": f"--suite {tiny_suite_file} --out board",
    }
    out = run(["sh", str(HERE / "first_method.sh")], env, tmp_path)
    assert "25 passed" in out
    cells = [json.loads(p.read_text()) for p in (tmp_path / "board/cells").glob("*.json")]
    assert {c["method"]["name"]: c["status"] for c in cells} == {"demo": "ok", "tfidf": "ok"}
    assert all(-1 <= c["metrics"][c["primary"]]["value"] <= 1 for c in cells)
    # What ran is what was installed, not this repository.
    where = run(["python", "-c", "import tdabench; print(tdabench.__file__)"], env, tmp_path)
    assert where.startswith(env["VIRTUAL_ENV"])


def test_the_tutorial_works_as_printed(sandbox, tiny_suite_file, tmp_path):
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", TUTORIAL.read_text(), re.M | re.S)
    assert [kind for kind, _ in blocks].count("python") == 1
    package = tmp_path / "tdabench-demo/src/tdabench_demo/__init__.py"
    outputs = []
    for kind, text in blocks:
        if kind == "python":
            before = package.read_text()
            assert len(before.splitlines()) < 40
            package.write_text(text)
            continue
        # The board of the tutorial takes a minute; a tiny suite shows the same.
        text = text.replace("tdabench run", f"tdabench run --suite {tiny_suite_file}")
        outputs.append(run(["sh", "-euc", text], sandbox, tmp_path))
    assert "25 passed" in outputs[1]
    assert "25 passed" in outputs[3]
    assert re.search(r"\d+ passed", outputs[-1])
    methods = [
        json.loads(p.read_text())["method"] for p in (tmp_path / "runs").glob("*/cells/*.json")
    ]
    # The edited method was measured anew, its old cell did not pass for it.
    newest = [m for m in methods if m["name"] == "demo" and m["version"] == 2]
    assert newest
    assert newest[-1]["params"]["width"] == 2048
    uninstall(sandbox)
