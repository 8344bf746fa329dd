"""What the peer's scripts run on: the processor, or PyTorch's GPU (`--device cuda`).

On a GPU work is waited for before a clock is read, memory is what tensors take there (`torch.cuda.max_memory_allocated`), and
attention in bf16 is flash attention and nothing else. `python device.py` says what the GPU is, or why there is none.
"""
import gc

import torch

import quiet


def add_flag(parser):
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def chosen(name):
    """The device; leaves with a line where PyTorch has no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise SystemExit(f"torch {torch.__version__}, built for {built}, finds no GPU")
    return torch.device(name)


def flash_alone():
    """Other forms of attention are refused from here on, on any thread."""
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def waited(device, work):
    """The work, done when it returns."""
    if device.type == "cpu":
        return work

    def run():
        work()
        torch.cuda.synchronize()

    return run


def start_of_memory(device):
    """Forgets the peak; what is in use now, in bytes."""
    if device.type == "cpu":
        return quiet.start_of_memory()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device):
    """The most since then, in bytes."""
    return quiet.status("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()


def described(device):
    """As ours says it."""
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{torch.cuda.current_device()} ({torch.cuda.get_device_name()}, compute capability {major}.{minor})"


if __name__ == "__main__":
    print(described(chosen("cuda")))
