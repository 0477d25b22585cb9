"""Triton kernels, one module an op; installed as ``lamp_fast.kernels``.

A module here is imported only inside a dispatched function, so ``import lamp_fast`` never needs
Triton.
"""
