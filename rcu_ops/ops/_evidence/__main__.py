"""Writes the text of benchmarks/results/UNVERIFIED.md: a file of its own, since rcu_ops.ops imports the table."""

from rcu_ops.ops._evidence import render

print(render(), end="")
