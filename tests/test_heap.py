import subprocess
import sys

import pytest

CHURN = """
import resource, sys
from fedoap.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def churn(rounds):
    for _ in range(rounds):
        chunks = [bytearray(1 << 20) for _ in range(4)]
        del chunks
churn(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHURN, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_freed_chunks_are_used_again_without_new_pages() -> None:
    """Planted bug: the threshold of trimming left as it is."""
    assert faults("kept") < 1000 < faults("given back")
