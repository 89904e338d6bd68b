"""Mends the interpreter before any kernel runs in it."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels/interpreter runs only where TRITON_INTERPRET is 1 from the start")

import interpreter_mending

interpreter_mending.mend()
