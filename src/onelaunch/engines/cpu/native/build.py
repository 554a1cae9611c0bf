"""Makes the program's object code: Numba for types and control flow, LLVM once over the whole.

Run as `python -m onelaunch.engines.cpu.native.build PROGRAM DESTINATION`: a process of its own, as
the compiler holds the interpreter's lock for seconds.
"""

from __future__ import annotations

import os
import sys

from onelaunch.engines.cpu.layout import SYMBOL
from onelaunch.engines.cpu.program import GENERATION, TRAINING


def build(options: dict[str, object], program: str = GENERATION) -> bytes:
    """A program's object code for these options (see `program.options`). Numba reads its settings
    from the environment when it is imported: call this in a process that has not imported it."""
    # Numba optimizes each function for itself, then all again: here only the whole is, at the end.
    os.environ["NUMBA_OPT"] = "0"
    os.environ["ONELAUNCH_LANES"] = str(options["lanes"])
    os.environ["ONELAUNCH_REGISTERS"] = str(options["registers"])
    import llvmlite.binding as llvm
    from numba.core import types

    if program == TRAINING:
        from onelaunch.engines.cpu.native.training.entry import entry
    else:
        from onelaunch.engines.cpu.native.entry import entry

    entry.compile((types.int64,) * 4)
    result = entry.overloads[(types.int64,) * 4]
    module = llvm.parse_assembly(
        result.library.get_llvm_str() + _wrapper(result.fndesc.llvm_func_name)
    )
    for value in [*module.functions, *module.global_variables]:
        if not value.is_declaration and value.name != SYMBOL:
            value.linkage = "internal"
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(
        cpu=str(options["cpu"]),
        features=str(options["features"]),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )
    # training's loops are vectors as written
    tuning = llvm.create_pipeline_tuning_options(2 if program == TRAINING else 3)
    tuning.loop_vectorization = program == GENERATION
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    module.verify()
    return bytes(machine.emit_object(module))


def _wrapper(name: str) -> str:
    """Numba's calling convention, a result pointer and a status, as a plain C function. Nothing
    here raises: the status is not looked at."""
    return f"""
define i64 @{SYMBOL}(i64 %operation, i64 %state, i64 %a, i64 %b) {{
  %result = alloca i64
  %error = alloca ptr
  %status = call i32 @"{name}"(
    ptr %result, ptr %error, i64 %operation, i64 %state, i64 %a, i64 %b)
  %value = load i64, ptr %result
  ret i64 %value
}}
"""


def main() -> None:
    """In the child process: build for this processor, deliver."""
    from onelaunch.compilation.child import deliver, lower_priority
    from onelaunch.engines.cpu.program import options

    if sys.argv[-2] == GENERATION:  # a slower form answers meanwhile; training waits
        lower_priority()
    deliver(sys.argv[-1], build(options(), sys.argv[-2]))


if __name__ == "__main__":
    main()
