"""Runs passes in order, with the verifier between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from e2pass.errors import E2PassError, PassError
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.verify import verify
from e2pass.program import Program

OnPass = Callable[[Pass, PassResult, float], None]


@dataclass(frozen=True)
class PassManager:
    """A pipeline.

    Attributes:
        passes: In the order they run.
        on_pass: Called after each pass with the pass, its result and the seconds it took.
    """

    passes: Sequence[Pass]
    on_pass: OnPass | None = None

    def run(self, program: Program) -> Program:
        """Run every pass: requires, run, ensures, verify.

        Raises:
            PassError: Naming the pass that failed and the passes before it.
            E2PassError: Unchanged, where a pass refuses the user's input.
        """
        done: list[str] = []
        for item in self.passes:
            started = time.perf_counter()
            try:
                item.requires(program)
                result = item.run(program)
                if not isinstance(result, PassResult):
                    raise PassError(f"{item.name} returned a {type(result).__name__}; a pass returns a PassResult")
                program = result.program
                program.facts |= item.establishes
                program.diagnostics.extend(result.diagnostics)
                program.note_origins(item.name)
                item.ensures(program)
                verify(program)
            except PassError as error:
                raise type(error)(f"pass {item.name} (after {', '.join(done) or 'no other'}): {error}") from error
            except E2PassError:
                raise
            except Exception as error:
                raise PassError(
                    f"pass {item.name} (after {', '.join(done) or 'no other'}) failed: {type(error).__name__}: {error}"
                ) from error
            done.append(item.name)
            if self.on_pass is not None:
                self.on_pass(item, result, time.perf_counter() - started)
        return program
