"""Parses an XLA GPU program; counts the bytes and operations of its kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all add-dependency opt-barrier "
    "partition-id replica-id async-done copy-done conditional while".split()
)
"""Opcodes that launch no kernel of their own."""
PARTS = ("dynamic-slice", "slice", "gather")
"""Opcodes that read only the returned part of their first operand."""
MOVES = frozenset("parameter constant bitcast copy transpose reshape tuple".split())
"""Opcodes of a fusion that only moves arrays."""


class Instruction(NamedTuple):
    """A line of a computation; ``shape`` and ``attributes`` are in XLA's notation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, role: str) -> str | None:
        """Return the computation called in a role (``body``, ``calls``, …), or None."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def target(self) -> str:
        """The target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """Number of iterations of a loop, or None if only the device knows it."""
        found = re.search(r'known_trip_count":\s*\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """One launch of a fusion, a library call or a copy.

    Attributes:
        name: XLA's name of the instruction.
        moves: Whether it only copies or transposes.
        bytes: Bytes read and written, if nothing comes from a cache.
        flops: Operations of matrix products and convolutions, without elementwise ones.
    """

    name: str
    moves: bool
    bytes: int
    flops: int


class Module:
    """The computations of a program.

    Attributes:
        entry: The name of the computation that runs first.
    """

    def __init__(self, text: str) -> None:
        """Parse the text of a program, ``compiled.as_text()``."""
        self.entry, self._computations = "", dict[str, Computation]()
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                if head := COMPUTATION.match(line):
                    current = self._computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                operands = re.split(r"\)(?:, [a-z_]+=|$)", rest)[0]
                names = tuple(re.findall(r"%([\w.\-]+)", operands))
                current[name] = Instruction(name, shape, opcode, names, rest, bool(root))

    def __getitem__(self, name: str | None) -> Computation:
        """Return a computation, {} for an unknown name or None."""
        return self._computations.get(name or "", {})

    def kernels(self, name: str | None) -> Iterator[Kernel]:
        """Yield the kernels of a computation, without those of its loops and branches."""
        computation = self[name]
        for instruction in computation.values():
            if instruction.opcode in ("call", "async-start"):
                inner = instruction.called("to_apply") or instruction.called("calls")
                yield from self.kernels(inner)
            elif instruction.opcode not in FREE:
                yield self._kernel(instruction, computation)

    def loops(self, name: str | None) -> Iterator[Instruction]:
        """Yield the outermost loops of a computation."""
        for instruction in self[name].values():
            if instruction.opcode == "call":
                yield from self.loops(instruction.called("to_apply"))
            elif instruction.opcode == "while":
                yield instruction

    def _kernel(self, instruction: Instruction, computation: Computation) -> Kernel:
        inner = self[instruction.called("calls")]
        operands = [computation[name].shape for name in instruction.operands]
        if instruction.opcode == "fusion":
            parameters = {  # by their numbers
                x.attributes.partition(")")[0]: x for x in inner.values() if x.opcode == "parameter"
            }
            read = sum(_read(parameters[str(i)], inner) for i in range(len(operands)))
            written = sum(_written(x, inner) for x in inner.values() if x.root)
            moves = {x.opcode for x in inner.values()} <= MOVES
            return Kernel(instruction.name, moves, read + written, self._flops(inner))
        result = instruction.shape
        if instruction.target.startswith("__cu"):  # the rest is scratch memory
            result = _first(result)
        moved = sum(map(nbytes, operands)) + nbytes(result)
        copies = instruction.opcode in ("copy", "copy-start", "transpose")
        return Kernel(instruction.name, copies, moved, _products(instruction, computation))

    def _flops(self, computation: Computation) -> int:
        return sum(
            _products(x, computation) + self._flops(self[x.called("calls")])
            for x in computation.values()
        )


def nbytes(shape: str) -> int:
    """Return the bytes of an array or a tuple of arrays.

    Example:
        >>> nbytes("f32[2,3]{1,0}"), nbytes("(bf16[4], pred[])"), nbytes("token[]")
        (24, 9, 0)
    """
    total = 0
    for dtype, dims in ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)
        bits = int(width[0]) if width else 8 * (dtype == "pred")
        total += -(-bits * math.prod(_ints(dims)) // 8)
    return total


def _read(value: Instruction, computation: Computation) -> int:
    """Return the bytes that a fusion reads of a parameter: only the slices if it slices it."""
    whole, total = nbytes(value.shape), 0
    for user in computation.values():
        if value.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user, computation)
        elif user.opcode in PARTS and user.operands[0] == value.name:
            total += nbytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
            return whole  # an in-place update reads nothing of its first operand
    return min(total, whole)


def _written(value: Instruction, computation: Computation) -> int:
    """Return the bytes that a fusion writes: only the update if it updates in place."""
    if value.opcode == "tuple":
        return sum(_written(computation[name], computation) for name in value.operands)
    if value.opcode == "bitcast":
        return _written(computation[value.operands[0]], computation)
    if value.opcode == "dynamic-update-slice":
        return nbytes(computation[value.operands[1]].shape)
    return nbytes(value.shape)


def _products(instruction: Instruction, computation: Computation) -> int:
    """Return the flops of a matrix product or convolution: two per multiplication."""
    opcode, target = instruction.opcode, instruction.target
    result = _first(instruction.shape)
    shapes = [_first(computation[x].shape) for x in instruction.operands if x in computation]
    if opcode == "dot" or target.startswith("__cublas"):
        contracted = re.search(
            r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes
        )
        left = _dims(shapes[0])
        axes = _ints(contracted[1].replace('"', "")) if contracted else [len(left) - 1]
        return 2 * math.prod(_dims(result)) * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if labels is None:
        return 0
    if "BackwardFilter" in target:
        outputs, kernel = shapes[1], result
    elif "BackwardInput" in target:
        outputs, kernel = shapes[:2]
    else:
        outputs, kernel = result, shapes[1]
    dims = _dims(kernel)
    return 2 * math.prod(_dims(outputs)) * math.prod(dims) // dims[labels[1].index("o")]


def _first(shape: str) -> str:
    found = ARRAY.search(shape)
    return found[0] if found else ""


def _dims(shape: str) -> list[int]:
    found = ARRAY.search(shape)
    return _ints(found[2]) if found else []


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
