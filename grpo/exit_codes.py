"""How a command may end, and what it tells the shell."""

from __future__ import annotations

from typing import Literal

Status = Literal["completed", "failed", "interrupted"]
EXIT_CODES: dict[Status, int] = {"completed": 0, "failed": 1, "interrupted": 130}  # 128 + SIGINT, as shells have it
