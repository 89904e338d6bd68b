"""What importing the kernels takes."""

import subprocess
import sys

PROBE = """
import sys, torch
before = set(sys.modules)
import fedoap.kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted(name for name in sys.modules if name.startswith("fedoap") and not name.startswith("fedoap.kernels")))
print("triton" in sys.modules and "triton" not in before)
"""


def test_importing_the_kernels_loads_torch_and_the_standard_library_alone() -> None:
    output = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout

    assert output.splitlines() == ["fedoap", "fedoap", "False"]
