"""Keeps freed memory for what is allocated next.

A daemon allocates and frees a buffer of a chunk's size thousands of times a round. The C library returns the
end of its heap to the system as soon as a few chunks are free, and gets zeroed pages back for the next one:
several times the work of filling the buffer. The bound below is on free memory, not on memory in use.
"""

import ctypes

KEPT_BYTES = 8 << 20
"""How much free memory stays at the end of the heap; a larger allocation is given back as soon as it is freed."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory; one without `mallopt` does as it likes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
