"""Keeps freed memory for what is allocated next.

A daemon allocates and frees a buffer of a chunk's size thousands of times a round. The C library gives the
end of its heap back as soon as a few chunks are free, and the system hands out zeroed pages again for the
next: several times the work of filling the buffer. What is kept is a bound on that, not on what is in use.
"""

import ctypes

KEPT_BYTES = 8 << 20
"""So much at the end of the heap stays; a larger allocation is given back at once."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory; one without `mallopt` does as it likes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, KEPT_BYTES)
