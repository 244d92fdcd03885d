"""Records of what a call is about, changed at little cost."""

import dataclasses

_PACKAGE = __name__.partition(".")[0]


def replace(record, **changes):
    """`dataclasses.replace` at half of its cost, as records of this package check nothing.

    On a short sequence, run eagerly, records take as long as what is computed. Those of a user's
    own class may do more when they are made.
    """
    if type(record).__module__.partition(".")[0] != _PACKAGE:
        return dataclasses.replace(record, **changes)
    changed = object.__new__(type(record))
    vars(changed).update(vars(record), **changes)
    return changed
