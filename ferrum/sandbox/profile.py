"""Our filter of system calls in the words of podman and docker: the JSON of `--security-opt seccomp=FILE`.

It is read off the very instructions that the kernel gets elsewhere (`seccomp.py`), so there is one list. That JSON can
only say which calls are allowed, each with some bits of its arguments; so "none of these values" becomes all the ways
to begin a number that none of them begins with.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import product

from pydantic import JsonValue

from ferrum.sandbox import seccomp
from ferrum.sandbox.seccomp import ALLOW, Block

_MACHINES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_WORD = 0xFFFFFFFF

#: Where in its arguments, which bits, and what they are.
Bits = tuple[int, int, int]


def profile(machine: str) -> dict[str, JsonValue]:
    """The profile for a machine; what it does not name does not exist there."""
    names = seccomp.names(machine)
    allowed: list[str] = []
    refused: list[str] = []
    checked: list[JsonValue] = []
    for number, block in seccomp.rules(machine).items():
        if len(block) > 1:
            checked += [_entry([names[number]], bits) for bits in ways(block)]
        else:
            (allowed if block[0].k == ALLOW else refused).append(names[number])
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [_MACHINES[machine]],
        "syscalls": [
            _entry(sorted(allowed), ()),
            {"names": [*sorted(refused)], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
            *checked,
        ],
    }


def ways(block: Block) -> Iterator[tuple[Bits, ...]]:
    """Every way through the instructions that ends with "allowed": what the arguments have to be for it."""
    for same, different in _paths(block, 0, 0, {}, {}):
        free = [word for word in different if word not in same]
        for choice in product(*(_none_of(word, different[word]) for word in free)):
            yield (*((word, mask, value) for word, (mask, value) in same.items()), *choice)


def _paths(
    block: Block, at: int, word: int, same: dict[int, tuple[int, int]], different: dict[int, list[int]]
) -> Iterator[tuple[dict[int, tuple[int, int]], dict[int, list[int]]]]:
    step = block[at]
    if step.code == seccomp.RETURN:
        if step.k == ALLOW:
            yield same, different
    elif step.code == seccomp.LOAD:
        yield from _paths(block, at + 1, step.k, same, different)
    elif step.code == seccomp.JUMP_EQUAL:
        yield from _paths(block, at + 1 + step.true, word, {**same, word: (_WORD, step.k)}, different)
        others = {**different, word: [*different.get(word, ()), step.k]}
        yield from _paths(block, at + 1 + step.false, word, same, others)
    else:
        assert step.code == seccomp.JUMP_ANY_BIT
        mask, value = same.get(word, (0, 0))
        none = {**same, word: (mask | step.k, value)}
        yield from _paths(block, at + 1 + step.false, word, none, different)
        having = list(_paths(block, at + 1 + step.true, word, {}, {}))
        if having:
            # Having one bit can be said, having any of several cannot.
            assert step.k.bit_count() == 1
            one = {**same, word: (mask | step.k, value | step.k)}
            yield from _paths(block, at + 1 + step.true, word, one, different)


def _none_of(word: int, values: list[int], bit: int = 31, begun: int = 0) -> Iterator[Bits]:
    """All numbers of 32 bits but these, as the bits that they begin with."""
    if not values:
        yield word, (_WORD << (bit + 1)) & _WORD, begun
    elif bit >= 0:
        for one in (0, 1):
            rest = [value for value in values if (value >> bit) & 1 == one]
            yield from _none_of(word, rest, bit - 1, begun | one << bit)


def _entry(names: list[str], bits: tuple[Bits, ...]) -> JsonValue:
    entry: dict[str, JsonValue] = {"names": [*names], "action": "SCMP_ACT_ALLOW"}
    arguments: dict[int, tuple[int, int]] = {}
    for offset, mask, value in bits:
        # An argument has two words, the lower one first.
        index, shift = (offset - 16) // 8, (offset - 16) % 8 * 8
        before = arguments.get(index, (0, 0))
        arguments[index] = (before[0] | mask << shift, before[1] | value << shift)
    if arguments:
        entry["args"] = [
            {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
            for index, (mask, value) in sorted(arguments.items())
        ]
    return entry
