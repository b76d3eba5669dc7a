"""The code of README.md, and what a test can do with each of its commands."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

RUN = "<!-- test: run -->"  # above a block: the test executes it as it stands


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    code: str
    run: bool

    def commands(self) -> list[str]:
        """The commands of a shell block, comments dropped and continued lines joined."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = (shlex.split(line, comments=True) for line in lines)
        return [shlex.join(line) for line in words if line]


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text."""
    pattern = rf"^({re.escape(RUN)}\n+)?```(\w*)\n(.*?)^```$"
    found = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], match[1] is not None) for match in found]


def read(path: Path) -> list[Block]:
    """The blocks of a file; none when there is no such file (a test of its own says so)."""
    return blocks(path.read_text(encoding="utf-8")) if path.exists() else []
