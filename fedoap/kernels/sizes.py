"""Whole numbers for hosts; Triton's functions of these names take microseconds a call outside of kernels."""


def cdiv(count: int, size: int) -> int:
    """Return how many blocks of a size hold so many.

    >>> cdiv(0, 4), cdiv(8, 4), cdiv(9, 4)
    (0, 2, 3)
    """
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Return the least power of two that is no less than a positive count.

    >>> [next_power_of_2(count) for count in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (count - 1).bit_length()
