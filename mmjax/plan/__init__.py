"""What a run needs and how fast it can be on chips that are not here: the real compiler asked, nothing run."""

import os

# Tuning takes the GPU; untuned, Triton knows no tiles for some products, which cuBLAS does as well.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def set_environment() -> None:
    """For compilers without their chips: before JAX's first use, in a process that does nothing else."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}  # any will do
    # Programs from a cache are told apart by their named scopes too, by which work is counted.
    os.environ["JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED}"
