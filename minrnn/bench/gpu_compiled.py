"""What do compilers make of the GPU's kernels? Registers, memory and instructions, without a GPU.

What is compiled is what a launch would compile: the same arguments, specialised as Triton does it
for tensors of these sizes, but of the device "meta".
"""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from minrnn.bench.scan import RECURRENCES
from minrnn.ops.gpu import kernels
from minrnn.ops.gpu.kernels import Device, Launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what stands between h0 and the layout
OPTIONS = {"scan": (), "mingru": ("g",), "minlstm": ("g", True)}
# through time; over chunks of it, and then through each: which launch of a call it is
PLANS = {"steps": 0, "totals": 0, "chunks": 1}
# multiprocessors that are never filled
MANY = 1 << 20
# (B, T, D): sizes are multiples of 16 and of all blocks, as those of large models are
SHAPE = (64, 4096, 1024)


class Limits(NamedTuple):
    """Of a multiprocessor: CUDA C++ Programming Guide, technical specifications."""

    registers: int
    warps: int
    programs: int
    shared: int
    """bytes"""
    reserved: int
    """bytes of it that the system keeps for each program: tuning guides of Ampere and Hopper"""


TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LIMITS = {
    "sm_75": Limits(65536, 32, 16, 64 << 10, 0),
    "sm_80": Limits(65536, 64, 32, 164 << 10, 1024),
    "sm_90": Limits(65536, 64, 32, 228 << 10, 1024),
}
# registers are handed out to warps 256 at a time, from one of the four parts of a multiprocessor
REGISTER_UNIT, SHARED_UNIT, PARTS = 256, 128, 4
# to and from global memory, of NVIDIA's and AMD's instructions; those of four elements of 2 and of
# 4 bytes
_GLOBAL = r"(LDG|STG|LDGSTS)\.|(global|buffer|flat)_(load|store)_"
_WIDE = {
    2: rf"({_GLOBAL})(.*\.)?(64|dwordx2)",
    4: rf"({_GLOBAL})(.*\.)?(128|dwordx4)",
}


class Case(NamedTuple):
    """Which kernel."""

    name: str
    is_backward: bool
    plan: str
    dtype: str

    @property
    def title(self) -> str:
        """As a table says it."""
        return f"{self.name} {'backward' if self.is_backward else 'forward'}"


def cases(dtypes: tuple[str, ...]) -> Iterator[Case]:
    """Every kernel: forward and backward, through time and over chunks of it."""
    for name in RECURRENCES:
        for is_backward in (False, True):
            for plan in PLANS:
                yield from (Case(name, is_backward, plan, dtype) for dtype in dtypes)


def launch_of(case: Case, shape: tuple[int, int, int], where: str, like: Device) -> Launch:
    """The launch of a case on zeros of that shape, with h0, on the torch device `where`.

    A GPU without multiprocessors is filled: it goes through time.
    """
    B, T, D = shape

    def gate() -> Tensor:
        return torch.zeros(B, T, D, dtype=DTYPES[case.dtype], device=where)

    def state() -> Tensor:
        return torch.zeros(B, D, device=where)

    gates = [gate() for _ in range(3 if case.name == "minlstm" else 2)]
    like = like._replace(multiprocessors=0) if case.plan == "steps" else like
    plan = kernels.plan_of(B, T, D, DTYPES[case.dtype], False, like)
    rest = (OPTIONS[case.name], (None, None, False), plan)
    if not case.is_backward:
        launches = kernels.forward_launches(case.name, gates, state(), gate(), state(), *rest)
        return launches[PLANS[case.plan]]
    saved = gates[:1] if case.name == "scan" else gates
    given = (gate(), state(), saved, state(), gate())
    launches = kernels.backward_launches(case.name, *given, gates, state(), *rest)
    return launches[PLANS[case.plan]]


@dataclass(frozen=True)
class Compiled:
    """A kernel as it came out of a compiler."""

    case: Case
    target: str
    registers: int
    """of a thread"""
    spills: int
    """bytes of a thread: stores and loads of registers that there were too few of"""
    stack: int
    """bytes of a thread"""
    shared: int
    """bytes of a program"""
    instructions: dict[str, int]
    """how many of each"""
    issued: int = 0
    """instructions of a warp for a step"""
    programs: int = 0
    """at a time on a multiprocessor"""
    text: str = ""
    """what was read"""
    form: str = ""
    """Triton's own, before it knows of a target"""

    @property
    def occupancy(self) -> float:
        """Warps, one in each program, at a time over those that a multiprocessor can have."""
        return self.programs / LIMITS[self.target].warps

    @property
    def wide(self) -> int:
        """Loads and stores of four elements a thread."""
        return self.count(_WIDE[DTYPES[self.case.dtype].itemsize])

    @property
    def narrow(self) -> int:
        """Those of fewer bytes than that."""
        widths = [_WIDE[size] for size in _WIDE if size >= DTYPES[self.case.dtype].itemsize]
        return self.count(_GLOBAL) - sum(map(self.count, widths))

    def count(self, pattern: str) -> int:
        """The instructions whose name begins as `pattern` says."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compiled(case: Case, target: str) -> Compiled:
    """Compile for a target, and read what is said about it."""
    asm, metadata, said = _compile(case, target)
    shared = metadata.shared
    if TARGETS[target].backend == "hip":
        return Compiled(case, target, shared=shared, **read_amdgcn(asm["amdgcn"]))
    sass = _disassemble(asm["cubin"])
    found = read_report(said)
    return Compiled(
        case,
        target,
        **found,
        shared=shared,
        instructions=dict(Counter(name for _, name, _ in read_sass(sass))),
        issued=issued(sass),
        programs=resident(LIMITS[target], found["registers"], shared),
        text=sass,
        form=asm["ttir"],
    )


def _compile(case: Case, target: str) -> tuple[Any, Any, str]:
    """As `JITFunction.run` does it: what came out of each stage, its metadata, what ptxas said."""
    like = Device(MANY, TARGETS[target].warp_size)
    launch = launch_of(case, SHAPE, "meta", like)
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, _ = binder(*launch.args, **kernels.OPTIONS)
    options, *signature = kernel._pack_args(backend, kernels.OPTIONS, bound, specialized, None)
    source = ASTSource(kernel, *signature)
    said = io.StringIO()
    # ptxas says nothing about a kernel that was compiled before: a new cache each time
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(said),
    ):
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        found = triton.compile(source, target=TARGETS[target], options=options.__dict__)
        asm = dict(found.asm)
    return asm, found.metadata, said.getvalue()


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_report(said: str) -> dict[str, int]:
    """Registers, spills and stack from what `ptxas -v` says, over all functions.

    Example:
        >>> read_report('''ptxas info    : Function properties for forward
        ...     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
        ... ptxas info    : Used 55 registers, used 1 barriers''')
        {'registers': 55, 'spills': 20, 'stack': 16}
    """
    used = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    if not used or not frames:
        raise ValueError(f"ptxas did not report registers and stack, but {said[:200]!r}")
    return {
        "registers": max(used),
        "spills": sum(int(stores) + int(loads) for _, stores, loads in frames),
        "stack": sum(int(stack) for stack, _, _ in frames),
    }


def read_sass(sass: str) -> list[tuple[int, str, str]]:
    """Address, name and operands of each instruction of what `cuobjdump -sass` says.

    Padding is left out: NOP, and the jump to itself behind the end.
    """
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    found = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, sass)]
    return [
        (at, name, rest)
        for at, name, rest in found
        if name != "NOP" and not (name == "BRA" and _aim(rest) == at)
    ]


def _aim(operands: str) -> int | None:
    found = re.search(r"0x([0-9a-f]+)\s*$", operands.strip().rstrip("`()"))
    return int(found.group(1), 16) if found else None


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop: from where a jump back leads to the jump."""
    found = read_sass(sass)
    # behind the last one are pieces that were moved out of the way, and jump back into it
    end = max((at for at, name, _ in found if name == "EXIT"), default=0)
    jumps = [(_aim(rest), at) for at, name, rest in found if name.startswith("BRA") and at < end]
    return [
        [name for at, name, _ in found if first <= at <= last]
        for first, last in jumps
        if first is not None and first < last
    ]


def issued(sass: str) -> int:
    """The instructions of a warp for a step: of the loop that stores, or of the longest."""
    found = loops(sass)
    stores = [body for body in found if any(name.startswith("STG") for name in body)]
    return max(map(len, stores or found))


def read_amdgcn(assembly: str) -> dict[str, Any]:
    """Registers, spills and scratch from the metadata, and the instructions."""

    def metadata(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    names = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\s", assembly, re.MULTILINE)
    return {
        "registers": metadata("vgpr_count"),
        # scalar registers are spilled to lanes of vector registers, not to memory
        "spills": metadata("vgpr_spill_count"),
        "stack": metadata("private_segment_fixed_size"),
        "instructions": dict(Counter(names)),
        "text": assembly,
    }


def resident(limits: Limits, registers: int, shared: int) -> int:
    """Programs of one warp at a time on a multiprocessor: by registers, shared memory and number.

    Example:
        >>> resident(LIMITS["sm_80"], 82, 14336)       # 15 KiB of 164 each
        10
    """
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = limits.registers // PARTS // of_warp * PARTS
    of_program = -(-(shared + limits.reserved) // SHARED_UNIT) * SHARED_UNIT
    by_shared = limits.shared // of_program if of_program else limits.programs
    return min(by_registers, by_shared, limits.warps, limits.programs)
