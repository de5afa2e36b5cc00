"""The machine that computes: its processor, GPU, threads and versions."""

import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PEER_LIBRARIES = ("captum", "auto_LiRPA")  # the peers of the benchmark


def environment(device: str = "cpu") -> dict[str, Any]:
    """Facts that make figures comparable: the machine, its GPU if that is used, the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": {name: version(name) for name in PEER_LIBRARIES if importlib.util.find_spec(name)},
        **({"gpu": torch.cuda.get_device_name(device)} if device != "cpu" else {}),
    }


def machine_in_words(device: torch.device) -> str:
    """One line for the card of a trained network."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {name}, {threads}, torch {torch.__version__}"


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 numbers in hardware.

    Emulation is slower than float32.
    """
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
