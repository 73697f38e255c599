"""Several sets of images in one run, which shows them in turn: subjects, and images of their classes."""

from pathlib import Path

from sdtune.data.sources import Images


class Mixture:
    """Sets of images. A stream shows them in turn, so each has the same share of its samples, whatever its size.

    Args:
        parts: the first ``subjects`` of them show what is to be learnt, the others are images of its classes.
    """

    def __init__(self, *parts: Images, subjects: int = 1):
        self.parts, self.subjects, self.paired = parts, subjects, dict[str, Images]()
        self.rows = [row for part in parts for row in part.rows]
        self.ignored = [name for part in parts for name in part.ignored]
        self.skipped = [bad for part in parts for bad in part.skipped]
        self.notes = [note for part in parts for note in part.notes]
        self.fingerprint = "".join(part.fingerprint for part in parts)

    @property
    def sizes(self) -> list[int]:
        """Images of each part."""
        return [len(part.rows) for part in self.parts]

    def read(self, index: int) -> Path | bytes:
        """The file of an image, or its bytes."""
        part, own = self._find(index)
        return part.read(own)

    def mask(self, index: int) -> Path | bytes | None:
        """The file of the mask of an image, or its bytes."""
        part, own = self._find(index)
        return part.mask(own)

    def _find(self, index: int) -> tuple[Images, int]:
        for part in self.parts:
            if index < len(part.rows):
                return part, index
            index -= len(part.rows)
        raise IndexError("no part has such an image")
