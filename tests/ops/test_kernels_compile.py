"""Every Triton kernel compiles for sm_80 and sm_90, whatever GPU is here, and fits in a block.

``python tests/compile_ahead.py [--full]`` prints registers, shared memory and spills.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
# Bytes of shared memory that a block can have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# A thread has 255 registers and a multiprocessor 65,536.
REGISTERS = 65536


def compile_ahead(*arguments):
    """In a process of its own: here Triton may be in its interpreter, which cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, TESTS / "compile_ahead.py", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_fit(compiled):
    for each in compiled:
        assert each["shared"] <= SHARED_MEMORY[each["target"]], each
        assert each["registers"] * each["warps"] * 32 <= REGISTERS, each


def names_of_kernels():
    sources = [path.read_text() for path in (TESTS.parent / "kernels").rglob("*.py")]
    return {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}


def test_some_kernels_compile_for_hopper():
    compiled = compile_ahead("--target", "90", "--only", "retrieve M=20", "attention tree")
    kernels = {each["kernel"] for each in compiled}
    assert kernels >= {"retrieve_fwd_kernel", "prefix_attention_bwd_keys_kernel"}
    assert_fit(compiled)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_in_every_configuration():
    compiled = compile_ahead("--full")
    assert {each["kernel"] for each in compiled} == names_of_kernels()
    assert_fit(compiled)
    # Bytes a thread; the widest heads and float32 spill a few values, the main cases none.
    main = [each for each in compiled if each["case"] in ("attention vision", "attention short")]
    assert main
    assert not [each for each in main if each["spilled"]]
