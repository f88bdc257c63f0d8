from __future__ import annotations

import json

import pytest

from benchmarks import readme_table


def test_the_readme_holds_the_evidence():
    readme = (readme_table.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_table.updated(readme) == readme, "run python -m benchmarks.readme_table"


def test_the_evidence_names_a_commit():
    for path in readme_table.evidence():
        commit = json.loads(path.read_text(encoding="utf-8"))["machine"]["commit"]
        assert len(commit) == 40, f"{path}: measured at {commit}, expected a commit without changes"


def test_a_row_holds_the_ranges(tmp_path, monkeypatch):
    def case(ours, eager, loop):
        candidates = [
            {"name": "rcu_ops", "median_s": ours},
            {"name": "unfused", "median_s": 0.1},
            {"name": "cuda", "median_s": 0.1},
            {"name": "eager", "median_s": eager},
            {"name": "library loop", "median_s": loop},
            {"name": "compile", "left_out": "not asked for"},
        ]
        return {
            "op": "op",
            "kind": "forward",
            "dtype": "fp32",
            "device": "cpu",
            "cache": "warm",
            "floor_s": 1.0,
            "candidates": candidates,
        }

    machine = {"cpu": "C", "threads": 2, "device": "cpu", "versions": {"torch": "2"}, "commit": "0123456789abcdef"}
    data = {"machine": machine, "tier": "quick", "results": [case(2.0, 6.0, 3.0), case(4.0, 5.0, None)]}
    folder = tmp_path / "benchmarks" / "results" / "c"
    folder.mkdir(parents=True)
    (folder / "bench.json").write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(readme_table, "ROOT", tmp_path)
    monkeypatch.setattr(readme_table, "RESULTS", folder.parent)
    text = readme_table.updated(f"a {readme_table.BEGIN} old {readme_table.END} b")
    assert "| op: forward | fp32 | 2 | 25–50 % | 1.25–3.00 × | 1.25–1.50 × |" in text
    assert "C, 2 threads (torch 2; commit 0123456789; quick tier;" in text
    assert "old" not in text
    cold, warm = (
        case(2.0, 6.0, 3.0) | {"device": "cuda", "cache": "cold", "floor_s": 1.0 - 2e-6},
        case(1.0, 9.0, 9.0) | {"device": "cuda"},
    )
    cold["candidates"].append({"name": "graphed", "median_s": 1.0})
    machine |= {"device": "cuda", "gpu": "G"}
    (folder / "bench.json").write_text(json.dumps(data | {"results": [cold, warm]}), encoding="utf-8")
    on_gpu = readme_table.updated(f"a {readme_table.BEGIN} old {readme_table.END} b")
    assert "| op: forward | fp32 | 1 | 100 % | 6.00 × | 3.00 × |" in on_gpu
    assert "\nG (torch 2;" in on_gpu
    assert text.startswith("a ")
    assert text.endswith(" b")
    with pytest.raises(ValueError, match="expected a part between"):
        readme_table.updated("no marks")
