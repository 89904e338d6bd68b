"""`[data]` of `fed.toml`: what the network sees of an image, and how much of it at once."""

from typing import Annotated

from pydantic import Field

from fedoap.fields import Fraction, Frozen


class DataConfig(Frozen):
    """What every site does with an image before the network sees it."""

    size: tuple[int, ...] = (128, 128)
    """Voxels of a prepared case, one number for each spatial dimension."""
    patch: tuple[int, ...] | None = None
    """Voxels that the network sees at once, as many numbers; the whole case where not given."""
    lesion_share: Fraction = 0.33
    """Share of the training patches that are centred on a voxel of a lesion; the others may lie anywhere."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of its length that a window of a prediction has in common with the next one."""
    augment: bool = True

    @property
    def seen(self) -> tuple[int, ...]:
        """Voxels that the network sees at once."""
        return self.patch or self.size

    def check(self, dimensions: int, depth: int) -> None:
        """Return if a network of these dimensions that halves its input `depth` times can work with this.

        Raises:
            ValueError: naming the key that it cannot.
        """
        for key, numbers in (("data.size", self.size), ("data.patch", self.patch)):
            if numbers is None:
                continue
            if len(numbers) != dimensions:
                raise ValueError(f"{key} is {numbers}, but network.dimensions is {dimensions}")
            if any(n <= 0 or n % 2**depth for n in numbers):
                raise ValueError(
                    f"{key} is {numbers}, but each number must be a multiple of 2**network.depth = {2**depth}"
                )
        if self.patch is not None and any(n > whole for n, whole in zip(self.patch, self.size, strict=True)):
            raise ValueError(f"data.patch is {self.patch}, but must fit into data.size = {self.size}")
