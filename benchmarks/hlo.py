"""Reads a compiled program's HLO text: what it exchanges, and where it copies or re-lays whole arrays."""

import dataclasses
import re
from collections.abc import Iterator

_ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
#: Instructions that give an array without writing one, or that update it in place.
_NO_COPY = ("parameter", "get-tuple-element", "bitcast", "scatter", "dynamic-update-slice")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `shape` and `rest`, its operands and attributes, are text."""

    computation: str
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ", 1)[0])

    @property
    def calls(self) -> str | None:
        """The computation that a fusion runs."""
        found = re.search(r"\bcalls=%?([\w.-]+)", self.rest)
        return found and found[1]


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions of a module, in its order."""
    computation = ""
    # Comments number the parts of long tuples.
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if found := _COMPUTATION.match(line):
            computation = found[1]
        elif found := _INSTRUCTION.match(line):
            yield Instruction(computation, *found.groups())


def exchanged_bytes(text: str) -> dict[str, int]:
    """Bytes that one device takes part with in each kind of collective: the larger of operands and result.

    A loop counts once: the exchanges' rounds after the first are only taken by batches that need them.
    """
    every = list(instructions(text))
    shapes = {(i.computation, i.name): i.shape for i in every}
    fused = {i.calls for i in every if i.calls}
    total: dict[str, int] = {}
    seen = set()
    for i in every:
        opcode = i.opcode.removesuffix("-start")
        if opcode not in _COLLECTIVES:
            continue
        if i.computation in fused:
            # One that runs beside compute stands in every fusion that it runs beside, with one origin.
            origin = (opcode, _ARRAY.findall(i.shape)[0][:2], i.rest.split("metadata=", 1)[-1].split("}", 1)[0])
            if origin in seen:
                continue
            seen.add(origin)
        given = sum(size_of(shapes.get((i.computation, name), "")) for name in i.operands)
        # The result of a start holds its operands, too.
        result = size_of(i.shape) - (given if i.opcode.endswith("-start") else 0)
        total[opcode] = total.get(opcode, 0) + max(given, result)
    return total


def whole_copies(text: str, shapes: set[tuple[int, ...]]) -> list[Instruction]:
    """Instructions that write a whole array of one of these shapes, or give it another layout.

    Scatters in place, kernels that update their operands, loops and what passes arrays on do not count; arguments
    of another layout than that of the parameters do.
    """
    every = list(instructions(text))
    roots = {i.computation: i for i in every}  # the last instruction of a computation is its root
    fused = {i.calls for i in every if i.calls}
    found = []
    for i in every:
        if i.computation in fused or not _is_whole(i.shape, shapes):
            continue
        root = i
        while root.opcode == "fusion" and root.calls in roots:
            root = roots[root.calls]
        # A SparseCore's program is a call of its own.
        passed_on = i.opcode == "call-start" or i.opcode.endswith(("while", "tuple", "conditional", "-done"))
        if root.opcode == "custom-call" and _is_in_place(root, shapes):
            continue
        if root.opcode not in _NO_COPY and not passed_on:
            found.append(i)
    return found


def size_of(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0
    for kind, dims, _ in _ARRAY.findall(shape):
        size = _ITEM_BYTES.get(kind, 4)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        total += size
    return total


def _is_in_place(call: Instruction, shapes: set[tuple[int, ...]]) -> bool:
    """Whether every whole array that a custom call gives is one of its operands."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", call.rest)
    aliased = re.findall(r"\{(\d*)\}: \(", found[1]) if found else []
    results = [m[0] for m in re.finditer(_ARRAY, call.shape)]
    return all(
        # The only result of a call has no number.
        str(i) in aliased or (len(results) == 1 and "" in aliased)
        for i, result in enumerate(results)
        if _is_whole(result, shapes)
    )


def _is_whole(shape: str, shapes: set[tuple[int, ...]]) -> bool:
    dims = [tuple(int(d) for d in filter(None, dims.split(","))) for _, dims, _ in _ARRAY.findall(shape)]
    # Any order of the dimensions: a transposed table is a copy too.
    return any(sorted(d) == sorted(s) for d in dims for s in shapes)
