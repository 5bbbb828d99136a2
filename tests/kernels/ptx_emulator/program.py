"""Reads PTX, as Triton and LLVM write it, into instructions with operands, places of shared memory and source lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

REGISTERS = {"pred": "bool", "b16": "uint16", "b32": "uint32", "b64": "uint64", "f32": "uint32", "f64": "uint64"}
"""Class of a register -> dtype of the array that holds it; floats are kept as their bits."""

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8}
STATIC_NAME = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")


@dataclass(frozen=True)
class Address:
    """[base + offset]; base: a register, or the name of a parameter or of shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    parts: its opcode, split at the dots. operands: registers and special registers by name, immediates as int (floats
    as their bits), addresses, and vectors as tuples of these; None for `_`. guard: the predicate register, with
    whether the instruction runs where it is False. used: bytes of a load that matter (LLVM's used_bytes_mask), None
    for all. source: file and line of the kernel.
    """

    parts: tuple[str, ...]
    operands: tuple[object, ...]
    guard: tuple[str, bool] | None
    used: int | None
    source: str
    text: str

    @property
    def type(self) -> str:
        return self.parts[-1]

    @property
    def memory(self) -> str | None:
        """The memory that it reads or writes, "global" or "shared" (also what copies from the one to the other)."""
        if self.parts[0] in ("ldmatrix", "stmatrix"):
            return "shared"
        if self.parts[0] not in ("ld", "st", "atom", "cp"):
            return None
        spaces = [part.partition("::")[0] for part in self.parts]
        return next((space for space in ("shared", "global") if space in spaces), None)

    def bytes(self) -> int:
        """Bytes that a load or store of one thread moves."""
        vector = next((int(part[1:]) for part in self.parts if re.fullmatch(r"v[248]", part)), 1)
        return vector * WIDTHS[self.type[1:]]


@dataclass
class Program:
    """A kernel: instructions, where its labels are, its registers, parameters and static shared memory.

    parameters: name -> its position. static: name -> (alignment, bytes) of shared memory. dynamic: the name of the
    shared memory whose size the launch gives, None without any.
    """

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    static: dict[str, tuple[int, int]] = field(default_factory=dict)
    dynamic: str | None = None

    def register_class(self, name: str) -> str | None:
        """Dtype of a register; LLVM declares `%r<196>` for %r0 to %r195."""
        if name in self.registers:
            return self.registers[name]
        return self.registers.get(name.rstrip("0123456789"))

    def loops(self) -> list[range]:
        """Places of the innermost loops: from where a branch leads back to, up to the branch itself."""
        branches = [(place, i.operands[0]) for place, i in enumerate(self.instructions) if i.parts[0] == "bra"]
        loops = {range(self.labels[to], place + 1) for place, to in branches if self.labels[to] <= place}
        inner = [a for a in loops if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in loops)]
        return sorted(inner, key=lambda loop: loop.start)


def parse(text: str) -> Program:
    """The one kernel of a PTX module, or a bare list of statements such as inline assembly.

    Raises ValueError for what it cannot read.
    """
    program = Program()
    text = re.sub(r"//[^\n]*", "", text)
    files = dict(re.findall(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", text, re.M))
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{\n(.*?)^\}", text, re.S | re.M)
    if entry:
        for i, name in enumerate(re.findall(r"(\w+_param_\d+)\b", entry.group(1))):
            program.parameters[name] = i
        dynamic = re.search(r"\.extern\s+" + STATIC_NAME.pattern, text)
        program.dynamic = dynamic.group(2) if dynamic else None
        text = entry.group(3)
    _Body(program, files).read(text)
    return program


class _Body:
    """Statements of a kernel; names declared between braces are local to them."""

    def __init__(self, program: Program, files: dict[str, str]):
        self.program, self.files, self.source, self.used = program, files, "", None
        self.scopes: list[dict[str, str]] = []
        self.count = 0

    def read(self, text: str) -> None:
        statement, vector = "", 0
        # .loc and labels end without a semicolon.
        text = re.sub(r"^\s*(\.loc[^\n]*)$", r"\1;", text, flags=re.M)
        text = re.sub(r"^\s*(\$?\w+:)\s*$", r"\1;", text, flags=re.M)
        for character in text:
            if character == "{" and not statement.strip():
                self.scopes.append({})
            elif character == "}" and not statement.strip() and not vector:
                self.scopes.pop()
            elif character == ";" and not vector:
                if statement.strip():
                    self.statement(" ".join(statement.split()))
                statement = ""
            else:
                vector += (character == "{") - (character == "}")
                statement += character
        if statement.strip():
            raise ValueError(f"unfinished statement: {statement.strip()}")

    def statement(self, text: str) -> None:
        program = self.program
        if text.endswith(":"):
            program.labels[text[:-1]] = len(program.instructions)
        elif text.startswith(".loc"):
            _, number, line, *_ = text.split()
            if line != "0":  # 0: LLVM's mark for code that belongs to no line
                self.source = f"{self.files.get(number, '').rsplit('/', 1)[-1]}:{line}"
        elif text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                name = self.declare(re.sub(r"<\d+>", "", name.strip()))
                program.registers[name] = REGISTERS[re.sub("^[us]", "b", kind[1:])]
        elif shared := STATIC_NAME.match(text):
            name = self.declare(shared.group(2))
            program.static[name] = int(shared.group(1)), int(shared.group(3))
        elif text.startswith(".pragma"):
            mask = re.search(r"used_bytes_mask (\w+)", text)
            self.used = int(mask.group(1), 0) if mask else None
        elif text.startswith("."):
            raise ValueError(f"unknown directive: {text}")
        else:
            program.instructions.append(self.instruction(text))
            self.used = None

    def declare(self, name: str) -> str:
        if not self.scopes:
            return name
        self.count += 1
        self.scopes[-1][name] = f"{name}'{self.count}"
        return self.scopes[-1][name]

    def instruction(self, text: str) -> Instruction:
        guard, rest = None, text
        if text.startswith("@"):
            predicate, rest = text[1:].split(None, 1)
            guard = self.resolve(predicate.lstrip("!")), predicate.startswith("!")
        opcode, _, operands = rest.partition(" ")
        split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
        parsed = tuple(self.operand(part.strip()) for part in split)
        return Instruction(tuple(opcode.split(".")), parsed, guard, self.used, self.source, text)

    def operand(self, text: str) -> object:
        if text.startswith("{"):
            return tuple(self.operand(part.strip()) for part in text[1:-1].split(","))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").replace("+-", "-").partition("+")
            if not offset and "-" in base:
                base, _, offset = base.partition("-")
                offset = "-" + offset
            return Address(self.resolve(base), int(offset or "0", 0))
        if text == "_":
            return None
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        return self.resolve(text)

    def resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)
