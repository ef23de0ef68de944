"""The table of operations: which torch functions are sites, and how to call them.

Every spelling of an operation is one entry: functional, method, in place; modules end up in one of these.
`interpret` turns an intercepted call into an `Operation`.
"""

from typing import Any

from attrbox.engine.operations import elementwise, products, reductions
from attrbox.engine.operations.operation import Function, Operation, Reader

_TABLE: dict[Function, Reader] = {
    function: reader
    for readers in (elementwise.READERS, reductions.READERS, products.READERS)
    for reader, spellings in readers.items()
    for function in spellings
}


def interpret(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The operation behind an intercepted call, or None if it is not in the table or touches no activation."""
    reader = _TABLE.get(function)
    return None if reader is None else reader(function, args, kwargs)
