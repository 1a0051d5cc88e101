"""Sets up torch in a process: threads, and arithmetic that gives the same bits on the same kind of device."""

import os

from g2rpo_ray.messages import one_line


def set_up_torch(deterministic: bool, threads: int | None = None, backward: bool = False) -> None:
    """Called by each actor before it loads a model.

    float32 is float32 in any case: cuDNN would round the inputs of convolutions to TF32.

    Args:
        deterministic: have cuBLAS, cuDNN and torch's kernels, as far as they can, give the same bits each time.
        threads: of the CPU; None: as many as torch takes.
        backward: raise for an operation that cannot. Without a backward pass torch warns of it only: there attention is
            deterministic anyway, and a reward of a user's own must not fail.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    # attention's backward pass looks for the strict mode alone
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic and not backward)
    # a debugging aid that costs a pass over memory; torch declares no type of it
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cuda_fault() -> str:
    """Why torch cannot use the GPUs that this machine is said to have, in one line; "" if it can."""
    import torch

    if not torch.cuda.device_count():
        return "torch finds no GPU, although Ray has some"
    try:
        torch.zeros(1, device="cuda")
    except Exception as error:  # of the driver, of a broken device, of a torch that is built without CUDA
        needs = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}"
        return f"{one_line(error)} ({needs}; 580 or newer for CUDA 13): update the driver, or install another torch"
    return ""
