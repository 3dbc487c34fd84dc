"""A bar of bytes on the terminal, if tqdm is there to draw it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(total: int, shown: bool | None) -> Iterator[Callable[[int], Any]]:
    """A function to be called with the number of bytes done.

    Args:
      total: bytes in all.
      shown: whether to draw a bar; None draws one on a terminal.
    """
    try:
        import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or shown is False:
        yield lambda num_bytes: None
        return
    disable = None if shown is None else False
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=disable) as bar:
        yield bar.update
