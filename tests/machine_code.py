"""Reads what a compiler made of the register tile, the innermost loop of every product on the CPU."""

import re
import subprocess
from typing import NamedTuple

_TILE = re.compile(r"hydravit::(\w+)::\(anonymous namespace\)::compute<(\d+), 2, (true|false)>")
_ADDRESS_AND_TEXT = re.compile(r"^\s*([0-9a-f]+):\s+(.*)", re.M)
_JUMP = re.compile(r"(?:j|b\.|cb)\w+\s.*?\b([0-9a-f]+) <")


class Loop(NamedTuple):
    """The loop over K of the largest tile of one instruction set.

    Attributes:
        along: whether the left operand is contiguous along K.
        products: its vector multiply-adds.
        on_stack: the instructions that read or write the stack.
    """

    isa: str
    rows: int
    along: bool
    products: int
    on_stack: list[str]


def register_tiles(binary, objdump="objdump"):
    """The loops of the largest tiles in a library or program, by ``(isa, along)``."""
    command = [objdump, "--disassemble", "--no-show-raw-insn", "--demangle", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for function in text.split("\n\n"):
        name = _TILE.search(function.partition(":\n")[0])
        if name is None:
            continue
        isa, rows, along = name[1], int(name[2]), name[3] == "true"
        best = found.get((isa, along))
        if best is None or rows > best.rows:
            found[isa, along] = max(
                (
                    Loop(isa, rows, along, sum(map(_is_product, body)), [line for line in body if _on_stack(line)])
                    for body in _loops(function)
                ),
                key=lambda loop: loop.products,
            )
    return found


def _loops(function):
    """The instructions of every piece of code that ends with a jump to its beginning."""
    lines = [(int(address, 16), text) for address, text in _ADDRESS_AND_TEXT.findall(function)]
    places = {address: place for place, (address, _) in enumerate(lines)}
    for place, (address, text) in enumerate(lines):
        jump = _JUMP.match(text)
        start = places.get(int(jump[1], 16)) if jump and int(jump[1], 16) <= address else None
        if start is not None:
            yield [text for _, text in lines[start : place + 1]]


def _is_product(line):
    return line.startswith(("vfmadd", "fmla"))


def _on_stack(line):
    return bool(re.search(r"%[re]?[sb]p\b|\[sp|\[x29", line))
