"""The README's performance table, from the evidence under benchmarks/results.

    python -m benchmarks.readme_table           # rewrites the part of README.md between its two marks
    python -m benchmarks.readme_table --check   # exits with 1 if that would change it

One row per operator, kind of call and dtype: over all shapes and layouts of the run, the range of the floor divided by
our time, and of the time of eager PyTorch and of the best baseline divided by ours. On a GPU the floor begins with a
launch, the caches are cold, and all but eager PyTorch and what torch.compile makes runs in CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcu_ops.bench.runner import LAUNCH_SECONDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def evidence() -> list[Path]:
    """The bench results that are in the repository, by machine."""
    return sorted(RESULTS.glob("*/bench.json"))


def _range(values: list[float], unit: str) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    scale = 100 if unit == "%" else 1
    text = [f"{value * scale:.0f}" if unit == "%" else f"{value:.2f}" for value in (low, high)]
    return f"{text[0]} {unit}" if text[0] == text[1] else f"{text[0]}–{text[1]} {unit}"


def _rows(results: list[dict[str, Any]]) -> Iterator[list[str]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in (r for r in results if r.get("cache") != "warm" or r["device"] == "cpu"):
        groups.setdefault((result["op"], result["kind"], result["dtype"]), []).append(result)
    for (op, kind, dtype), cases in groups.items():
        share: list[float] = []
        eager: list[float] = []
        best: list[float] = []
        for case in cases:
            times = {c["name"]: c["median_s"] for c in case["candidates"] if c.get("median_s") is not None}
            ours = times.pop("rcu_ops", None)
            ours = times.pop("graphed", ours)
            for name in ("unfused", "cuda", "triton"):  # ours too
                times.pop(name, None)
            if ours is None:
                continue
            share.append((case["floor_s"] + (LAUNCH_SECONDS if case["device"] != "cpu" else 0)) / ours)
            eager += [seconds / ours for name, seconds in times.items() if name in ("eager", "eager loop")]
            best += [min(times.values()) / ours] if times else []
        yield [f"{op}: {kind}", dtype, str(len(cases)), _range(share, "%"), _range(eager, "×"), _range(best, "×")]


def table(path: Path) -> str:
    """One run as Markdown, with its machine, versions and commit."""
    data = json.loads(path.read_text(encoding="utf-8"))
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = f"{machine['cpu']}, {machine['threads']} threads" if machine["device"] == "cpu" else machine["gpu"]
    lines = [
        f"{where} ({versions}; commit {machine['commit'][:10]}; {data['tier']} tier; "
        f"[{path.relative_to(ROOT).as_posix()}]({path.relative_to(ROOT).as_posix()})):",
        "",
        "| operator: call | dtype | cases | of the floor | eager / ours | best baseline / ours |",
        "| --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in _rows(data["results"])),
    ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    """``readme`` with the part between the marks made anew. Raises ValueError where there are no marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected a part between {BEGIN} and {END}")
    return before + begin + "\n" + "\n\n".join(map(table, evidence())) + "\n" + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    try:
        text = updated(readme)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        return int(text != readme)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
