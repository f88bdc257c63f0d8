"""Triton kernels of rcu_ops, one module per op, installed as ``rcu_ops.triton_kernels``.

Nothing here is imported by ``import rcu_ops``: an op loads its kernels at the first call that runs on the ``triton``
backend.
"""
