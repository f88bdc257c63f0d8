"""Benchmarks: every operator against its floor, eager PyTorch, ``torch.compile`` and hand-written library loops.

A benchmark is a :class:`~rcu_ops.bench.case.Case`: inputs, the exact result, and candidates that compute it.  Every
candidate is checked against the exact result before it is timed.  To add an operator, write a module with a function
``cases(tier, device)`` and enter it in :data:`rcu_ops.bench.suite.OPERATORS`; timing, checks, table, JSON and pictures
come from the shared modules.

``rcu-ops bench`` runs the suite with interleaved repeats; ``pytest benchmarks`` runs the quick tier under
pytest-benchmark.
"""
