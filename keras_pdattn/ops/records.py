"""Records of what a call is about, changed at little cost."""


def replace(record, **changes):
    """`dataclasses.replace` at a fifth of its cost, for records that check nothing when made.

    On a short sequence, run eagerly, records take as long as what is computed.
    """
    changed = object.__new__(type(record))
    vars(changed).update(vars(record), **changes)
    return changed
