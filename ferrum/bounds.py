"""Bounds on YAML that somebody else wrote: aliases can say in a few lines what has no end when it is written out."""

from __future__ import annotations

from typing import Final

import yaml

#: Values of a file, aliases written out.
MOST_VALUES: Final = 200_000
#: Lists and mappings within each other.
DEEPEST: Final = 64

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def unbounded(text: str) -> str | None:
    """Why a text is too much to be read as YAML; `None` for one that is not, or that is no YAML."""
    #: How many values each open collection has so far, and each anchor in all.
    counts, anchors = [0], dict[str, int]()
    names: list[str | None] = []
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                counts.append(1)
                names.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                count = counts.pop()
                if (name := names.pop()) is not None:
                    anchors[name] = count
                counts[-1] += count
            elif isinstance(event, yaml.AliasEvent):
                counts[-1] += anchors.get(str(event.anchor), 1)
            elif isinstance(event, yaml.ScalarEvent):
                counts[-1] += 1
            if len(counts) > DEEPEST:
                return f"is nested deeper than {DEEPEST} levels"
            if counts[-1] > MOST_VALUES:
                return f"holds more than {MOST_VALUES} values, aliases written out"
    except (yaml.YAMLError, ValueError):
        # Whoever reads it says what is wrong.
        return None
    return None
