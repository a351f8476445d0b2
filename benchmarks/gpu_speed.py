"""Everything that is to be measured on a GPU, within ten minutes, and its page.

    python benchmarks/gpu_speed.py --out gpu.json              # on a machine with a GPU
    python benchmarks/gpu_speed.py --write gpu.json            # its tables into docs/speed.md
    python benchmarks/gpu_speed.py --out try.json --device cpu --tiny    # tries the script out

The parts run one after the other, each in a process of its own with a time limit, in this order:
per-example gradients and plain training passes in float32 and bfloat16; retrainings in a stack and
one at a time; AirRep's encoder and LoGra at the shapes of the paper; the tests of
`tests/test_cuda.py` in what is left of `--budget` seconds. Results are written after each part, so
that a part that fails or runs out of time costs only itself.

`--tiny` takes toy models and few examples. Such results are refused by docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "speed.md"
MARKS = re.compile(
    r"(<!-- gpu: written by benchmarks/gpu_speed.py -->\n).*?(<!-- end of gpu -->)", re.S
)
LEAST = 10.0  # seconds: with less left, a part is not begun
PASSES = r"^tdabench, projected|^forward and backward|^the same"
OURS, PLAIN = "tdabench, projected to 16 x 16", "forward and backward, transformers' own loss"
Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One process: `limit` in seconds, the arguments of `script`, and others for toy models."""

    title: str
    limit: float
    script: str
    arguments: str
    tiny: str

    def command(self, device: str, tiny: bool, result: Path) -> list[str]:
        if self.script == "pytest":
            return [sys.executable, "-m", "pytest", *self.arguments.split()]
        arguments = (self.tiny if tiny else self.arguments).split()
        return [
            sys.executable, str(HERE / self.script), *arguments,
            "--device", device, "--json", str(result),
        ]  # fmt: skip


def gradients(shape: str, dtype: str, examples: int, limit: float) -> Part:
    same = f"--tables gradients --dtype {dtype} --rows {PASSES.replace(' ', '.')}"
    toy = "pocket" if shape == "pocket" else "tiny"
    return Part(
        f"{shape}, {dtype}",
        limit,
        "gradient_speed.py",
        f"{same} --shape {shape} --examples {examples} --tokens-a-batch 8192 --rounds 5",
        f"{same} --shape {toy} --examples 4 --join 2 --rounds 1",
    )


PARTS = {
    "gradients": gradients("pocket", "float32", 2000, 60),
    "gradients-float32": gradients("qwen2-0.5b", "float32", 128, 100),
    "gradients-bfloat16": gradients("qwen2-0.5b", "bfloat16", 192, 100),
    "stacked": Part(
        "retrainings of pocket's smooth", 180, "truth_speed.py",
        "--rows process,stack --target smooth --stack 24 --units 49",
        "--rows process,stack --tiny --stack 3 --units 7",
    ),
    "paper-bfloat16": Part(
        "bfloat16, batches of 128", 60, "paper_cost.py",
        "--examples 128 --rounds 5 --dtype bfloat16",
        "--examples 2 --tokens 8 --dtype bfloat16 --tiny",
    ),
    "paper-float32": Part(
        "float32, batches of 64", 60, "paper_cost.py",
        "--examples 64 --rounds 3", "--examples 2 --tokens 8 --tiny",
    ),
    "tests": Part(
        "tests/test_cuda.py", 600, "pytest", "-vv -p no:cacheprovider tests/test_cuda.py", ""
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file of results; run the parts")
    parser.add_argument("--write", type=Path, help="file of results; write them into the page")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all parts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy models, to try the script out")
    args = parser.parse_args()
    if (args.out is None) == (args.write is None):
        parser.error("give either --out or --write")
    if args.out:
        failed = measure(args.out, args.parts, args.device, args.tiny, args.budget)
        sys.exit(1 if failed else 0)
    results = json.loads(args.write.read_text(encoding="utf-8"))
    if results["tiny"] and args.page.resolve() == PAGE:
        sys.exit(f"{args.write} was made with --tiny: these are not results")
    text = args.page.read_text(encoding="utf-8")
    if not MARKS.search(text):
        sys.exit(f"{args.page} has no marks")
    body = "\n".join(page(results)) + "\n"
    args.page.write_text(MARKS.sub(lambda m: m[1] + body + m[2], text), encoding="utf-8")


# --------------------------------------------------------------------------- measuring


def measure(out: Path, parts: Sequence[str], device: str, tiny: bool, budget: float) -> list[str]:
    """Runs the parts and writes `out` after each; returns the names of those that failed."""
    results: Results = {"device": device, "tiny": tiny, "machine": machine(device), "parts": {}}
    began = time.monotonic()
    for name in parts:
        left = budget - (time.monotonic() - began)
        part = PARTS[name]
        if left < LEAST:
            found: Results = {"status": "not begun: the time was up"}
        else:
            print(f"--- {name}, at most {min(left, part.limit):.0f} s", file=sys.stderr, flush=True)
            found = run(part, device, tiny, min(left, part.limit))
        results["parts"][name] = {"title": part.title, **found}
        written = out.with_suffix(".part")
        written.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(written, out)
    return [n for n, p in results["parts"].items() if p["status"] != "ok"]


def run(part: Part, device: str, tiny: bool, limit: float) -> Results:
    """Runs one part; its output goes to stderr. Returns status, seconds and result."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = part.command(device, tiny, result)
        began = time.monotonic()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # and whatever it started
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()
        took = time.monotonic() - began
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text, file=sys.stderr, flush=True)
        status = "ok"
        if code is None:
            status = f"stopped after {took:.0f} s"
        elif code:
            last = [line for line in text.splitlines() if line.strip()][-1:]
            status = f"failed ({code}): {(last or [''])[0][:200]}"
        found: Results = {"status": status, "seconds": round(took, 1)}
        if part.script == "pytest":
            found["result"] = outcomes(text)
        elif result.exists():
            found["result"] = json.loads(result.read_text(encoding="utf-8"))
        return found


def outcomes(text: str) -> Results:
    """Counts pytest's verbose lines by outcome, and names the tests that failed."""
    lines = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    counts = {k: sum(o == k for _, o in lines) for k in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [name.partition("::")[2] for name, o in lines if o in ("FAILED", "ERROR")]
    return {**{k.lower(): n for k, n in counts.items()}, "names": failed}


def machine(device: str) -> Results:
    """Describes the device, processor cores and packages, read in a process of its own."""
    code = (
        "import json, os, sys, torch, transformers\n"
        "gpu = torch.cuda.get_device_name(sys.argv[1]) if sys.argv[1].startswith('cuda') else ''\n"
        "print(json.dumps({'gpu': gpu, 'cores': len(os.sched_getaffinity(0)),"
        " 'torch': torch.__version__, 'transformers': transformers.__version__}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, device], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"no device {device}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return {**json.loads(done.stdout), "date": time.strftime("%Y-%m-%d")}


# --------------------------------------------------------------------------- the page


def page(results: Results) -> list[str]:
    """Returns the lines between the marks: tables, aims, and what did not run to its end."""
    m, parts = results["machine"], results["parts"]
    where = m["gpu"] or "CPU"
    toy = " **Toy models, to try the script out: no results.**" if results["tiny"] else ""
    lines = [
        f"{where}, {m['cores']} processor cores, torch {m['torch']}, transformers "
        f"{m['transformers']}, {m['date']}, one run.{toy}",
        "",
    ]
    lines += gradient_table([parts[n] for n in parts if n.startswith("gradients")])
    lines += stacked_table(parts.get("stacked", {}))
    lines += paper_table([parts[n] for n in parts if n.startswith("paper")])
    if tests := parts.get("tests", {}).get("result"):
        failed = f" ({', '.join(f'`{n}`' for n in tests['names'])})" if tests["names"] else ""
        lines += [
            f"`tests/test_cuda.py`: {tests['passed']} passed, {tests['failed'] + tests['error']} "
            f"failed{failed}, {tests['skipped']} skipped.",
            "",
        ]
    short = [f"{n}: {p['status']}" for n, p in parts.items() if p["status"] != "ok"]
    if short:
        lines += [f"Not to the end: {'; '.join(short)}.", ""]
    return lines[:-1]


def gradient_table(parts: list[Results]) -> list[str]:
    parts = [p for p in parts if "result" in p]
    if not parts:
        return []
    of = [p["result"]["gradients"] for p in parts]
    heads = [f"{p['title']}: examples/s | speed-up of tdabench" for p in parts]
    lines = [
        f"| per-example gradients | {' | '.join(heads)} |",
        f"|-|{'--:|--:|' * len(parts)}",
    ]
    for name in of[0]:
        cells = []
        for rates in of:
            ours, rate = rates.get(OURS), rates.get(name)
            if not rate:
                cells += ["out of memory", ""]
                continue
            cells += [f"{rate:,.0f}", f"{ours / rate:.2f}" if ours and name != OURS else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [
        f"{p['title']} {r[OURS] / r[PLAIN]:.2f}"
        for p, r in zip(parts, of)
        if r.get(OURS) and r.get(PLAIN)
    ]
    return [*lines, "", f"Aim: 1.2 times a plain pass. Measured: {'; '.join(ratios)}.", ""]


def stacked_table(part: Results) -> list[str]:
    rows = part.get("result")
    if not rows:
        return []
    first = next(iter(rows.values()))["seconds"]
    lines = [f"| {part['title']} | s each | times as fast | difference |", "|-|--:|--:|--:|"]
    lines += [
        f"| {name} | {r['seconds']:.3g} | {first / r['seconds']:.2f} | {r['difference']:.0e} |"
        for name, r in rows.items()
    ]
    last = first / list(rows.values())[-1]["seconds"]
    return [*lines, "", f"Aim: a stack 10 times as fast. Measured: {last:.1f}.", ""]


def paper_table(parts: list[Results]) -> list[str]:
    parts = [p for p in parts if "result" in p]
    if not parts:
        return []
    of = [p["result"] for p in parts]
    heads = [f"{p['title']}: ms/example | times AirRep's" for p in parts]
    lines = [f"| shapes of the paper | {' | '.join(heads)} |", f"|-|{'--:|--:|' * len(parts)}"]
    for name in of[0]:
        cells = []
        for rows in of:
            least = next(iter(rows.values()))["seconds"]
            spent = rows[name]["seconds"]
            cells += [f"{1e3 * spent:.3g}", f"{spent / least:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "The paper reports about 80.", ""]


if __name__ == "__main__":
    main()
