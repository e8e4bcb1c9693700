"""How XLA compiles for tests: hundreds of programs that run for a millisecond, and would take minutes to optimise.

Nothing here may import JAX, which reads the flags once.
"""

import importlib.metadata

_JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
# One LLVM module for a program, not one for each of 32 parts of it; and fusions as they are written by XLA's older
# emitters, which take a third of the time of the newer ones. Those alone are in jaxlib from 0.11 on, and there an
# unknown flag ends the process.
_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(("--xla_cpu_use_fusion_emitters=false",) if _JAXLIB < (0, 11) else ()),
)


def flags(devices: int = 1) -> str:
    """XLA_FLAGS for a process with so many simulated devices."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *_FLAGS))
