"""Counts kernels, launches and host waits of a compiled training run and predicts its time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.gpu_programs.hlo import Instruction, Kernel, Module
from experiments.gpu_programs.targets import GPU

HOST_CALLBACK = re.compile(r"callback|SendTo|RecvFrom|Infeed|Outfeed", re.IGNORECASE)
LARGE = 1_000_000
"""Smallest large array, in bytes."""


class Body(NamedTuple):
    """One iteration of a loop, without a separately counted inner loop.

    Attributes:
        kernels: One per fusion, library call and copy of XLA's program, although a library may
            launch several kernels per call.
        launches: Number of launches by the host: graphs (command buffers), and kernels outside
            graphs.
        waits: How often the host waits for the device: once for each branch, callback and
            evaluated condition of a loop of unknown length. The body of such a loop is assumed to
            run once, which evaluates its condition twice.
    """

    kernels: tuple[Kernel, ...]
    launches: int
    waits: int

    @property
    def bytes(self) -> int:
        """Bytes read and written, if nothing comes from a cache."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """Operations of matrix products and convolutions."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def large_copies(self) -> int:
        """Number of kernels that only move a large array; moving reads and writes it."""
        return sum(kernel.moves and kernel.bytes >= 2 * LARGE for kernel in self.kernels)

    def seconds(self, gpu: GPU, launch: float = 4e-6, kernel: float = 2e-6) -> float:
        """Return the predicted time, see :func:`predict`."""
        times = (x.bytes / gpu.bandwidth + x.flops / gpu.flops for x in self.kernels)
        return max(self.launches * launch, sum(max(kernel, time) for time in times))


class Program(NamedTuple):
    """A compiled training run.

    Attributes:
        local_steps: S, the number of local steps in a round.
        step: One local step.
        round: The rest of a round: data and server step.
        peak: Bytes of arguments, results and temporary arrays; donated ones count once.
    """

    local_steps: int
    step: Body
    round: Body
    peak: int


def inspect(compiled: Any, thunks: str = "") -> Program:
    """Count what a compiled training run does in a local step and in the rest of a round.

    Among the loops with a known number of iterations, the loop over local steps has the most
    kernels in its body; the host runs it without waiting. In a loop of unknown length, the host
    asks the device before each iteration whether to continue.

    Args:
        compiled: A compiled function: any object with ``as_text`` and ``memory_analysis``.
        thunks: From :func:`compile_for`. Without it the graphs are unknown, and each kernel counts
            as one launch.

    Raises:
        ValueError: If no loop has a known number of iterations.
    """
    module = Module(compiled.as_text())
    found = list(_loops(module, module.entry))
    known = [(around, loop) for around, loop in found if loop.trips is not None]
    if not known:
        raise ValueError("the program must have a loop of known length, the one over local steps")

    def count(pair: Any) -> int:
        return len(list(module.kernels(pair[1].called("body"))))

    around, loop = max(known, key=count)
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    body = loop.called("body")
    step = _body(module, body, None)
    whole = _body(module, module.entry if around is None else around.called("body"), body)
    if around is not None and around.trips is None:  # add its own condition
        condition = tuple(module.kernels(around.called("condition")))
        whole = Body(whole.kernels + condition, whole.launches + len(condition), whole.waits + 1)
    if launches := _launches(thunks, len(step.kernels)):
        step, whole = (
            x._replace(launches=count) for x, count in zip((step, whole), launches, strict=True)
        )
    return Program(loop.trips or 0, step, whole, peak)


def predict(program: Program, gpu: GPU, local_steps: int, wait: float = 20e-6) -> float:
    """Return the predicted seconds of a run of ``local_steps`` local steps.

    ``rounds · (S · t(step) + t(round) + waits · 20 µs)``, where ``t`` of a body is the longer of
    ``launches · 4 µs`` (the host) and the sum over its kernels of
    ``max(2 µs, bytes / bandwidth + flops / rate)`` (the device, one kernel after another).

    None of these assumptions was measured:

    - The host runs ahead of the device except when it waits.
    - Launching a graph is as fast as launching a kernel.
    - No byte comes from a cache, although the arrays of a small batch would fit into 50 MB of it.
    - Every kernel takes at least 2 µs.
    - Matrix products reach ``gpu.flops``.
    """
    a_round = program.local_steps * program.step.seconds(gpu) + program.round.seconds(gpu)
    return local_steps / program.local_steps * (a_round + program.round.waits * wait)


def _loops(
    module: Module, name: str | None, around: Instruction | None = None
) -> Iterator[tuple[Instruction | None, Instruction]]:
    """Yield pairs of each loop's enclosing loop (or None) and the loop itself."""
    for loop in module.loops(name):
        yield around, loop
        yield from _loops(module, loop.called("body"), loop)


def _body(module: Module, name: str | None, left_out: str | None) -> Body:
    """Return a computation with each loop run once, except the loop with body ``left_out``."""
    kernels, waits = tuple(module.kernels(name)), 0
    for instruction in module[name].values():
        call = instruction.opcode.startswith("custom-call") and instruction.target
        waits += instruction.opcode in ("conditional", "infeed", "outfeed", "recv-done")
        waits += bool(call and HOST_CALLBACK.search(call))
    for loop in module.loops(name):
        if loop.called("body") == left_out:
            continue
        inner = _body(module, loop.called("body"), None)
        kernels += inner.kernels
        waits += inner.waits
        if loop.trips is None:
            kernels += tuple(module.kernels(loop.called("condition")))
            waits += 2
    return Body(kernels, len(kernels), waits)


class _Thunk(NamedTuple):
    """A line of XLA's list of thunks, and the lines nested under it."""

    kind: str
    condition: bool
    under: list[Any]

    def launches(self) -> int:
        if self.kind == "kCommandBuffer" or not self.under:
            return 1
        return sum(thunk.launches() for thunk in self.under)

    def kernels(self) -> int:
        """Return the number of kernels in its body, without inner loops."""
        inner = (x for x in self.under if x.kind != "kWhile" and not x.condition)
        return sum(x.kernels() for x in inner) if self.under else 1


def _launches(thunks: str, kernels: int) -> tuple[int, int] | None:
    """Return the launches of the loop body nearest to ``kernels`` kernels, and of the rest."""
    stack, condition = [_Thunk("", False, [])], False
    around: list[tuple[_Thunk, _Thunk]] = []
    for line in thunks.splitlines():
        if found := re.match(r"\s*(condition|body):", line):
            condition = found[1] == "condition"
        elif found := re.match(r"( *)\d+: (k\w+)", line):
            del stack[len(found[1]) // 4 + 1 :]
            thunk = _Thunk(found[2], condition, [])
            stack[-1].under.append(thunk)
            if thunk.kind == "kWhile":
                around.append((stack[-1], thunk))
            stack.append(thunk)
    if not around:
        return None
    outer, loop = min(around, key=lambda pair: abs(pair[1].kernels() - kernels))
    step = sum(thunk.launches() for thunk in loop.under if not thunk.condition)
    return step, sum(thunk.launches() for thunk in outer.under if thunk is not loop)
