"""Progress: of what takes hours a bar on a terminal; elsewhere, as in the log of a batch system, a line a minute.

Of what takes minutes, a bar on a terminal alone.
"""

import sys
from typing import Any

from tqdm import tqdm

_LINE = "{desc}: {n_fmt} of {total_fmt} images [{elapsed}, {remaining} left, {rate_fmt}]\n"


def passing_bar(what: str, total: int | None, unit: str, shown: bool) -> Any:
    """A bar for calls of seconds to minutes: on a terminal, from one second on, and gone at the end.

    Args:
        what: is done.
        total: how much, in units; None if that is not known yet.
        unit: of the work.
        shown: False tells nothing.
    """
    disable = None if shown else True  # None: on a terminal only
    return tqdm(total=total, desc=what, unit=unit, delay=1, leave=False, disable=disable)


def progress_bar(what: str, total: int, done: int = 0, shown: bool = True) -> Any:
    """A context with `update(images)`; what takes less than a second, or a minute where there is no terminal, is not
    told.

    Args:
        what: is done.
        total: images in all.
        done: images of these that need no time any more.
        shown: False tells nothing.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit="image",
        disable=not shown,
        delay=1 if terminal else 60,
        mininterval=0.1 if terminal else 60,
        bar_format=None if terminal else _LINE,
        dynamic_ncols=True,
    )
