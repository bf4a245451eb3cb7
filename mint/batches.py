"""Which texts go through a model together. Knows nothing but their lengths."""

from collections.abc import Iterator, Sequence


def alike(lengths: Sequence[int], tokens: int, most: int | None = None) -> Iterator[list[int]]:
    """Indices in batches, like lengths together, shortest first.

    tokens: padded tokens of a batch (a single longer text is a batch of its own). most: texts of a batch; None: any number.
    Depends on nothing but the lengths, so that two models are asked in the same way.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == most or (len(batch) + 1) * lengths[i] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
