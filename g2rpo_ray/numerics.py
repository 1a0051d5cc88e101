"""Sets up torch in a process: threads, float32 precision and deterministic kernels."""

import os

from g2rpo_ray.messages import one_line


def set_up_torch(deterministic: bool, threads: int | None = None, backward: bool = False) -> None:
    """Set up torch; each actor calls it before it loads a model. TF32 is always off.

    Args:
        deterministic: use deterministic kernels of cuBLAS, cuDNN and torch where there are any.
        threads: number of CPU threads; None: torch's default.
        backward: the process runs backward passes: raise for an operation without a deterministic kernel. Otherwise
            torch only warns: attention's forward pass is deterministic, and a user's own reward must not fail.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    # attention's backward pass is deterministic in strict mode only
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic and not backward)
    # a debugging aid that costs a pass over memory; torch's stubs omit it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cuda_fault() -> str:
    """Why torch cannot use the GPUs that Ray reports on this machine, in one line; "" if it can."""
    import torch

    if not torch.cuda.device_count():
        return "torch finds no GPU, although Ray has some"
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:  # of the driver, of a broken device, of a torch that is built without CUDA
        needs = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
        return f"{one_line(error)} ({needs}; 580 or newer for CUDA 13): update the driver, or install another torch"
    return ""
