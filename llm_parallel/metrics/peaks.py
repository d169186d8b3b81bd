"""Peak rates of known GPUs, which MFU divides by."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense matrix-multiply peaks in TFLOP/s with 16-bit inputs and fp32 accumulation, from the makers' data sheets (which
# print twice that for structured sparsity). The first pattern that matches CUDA's name of the device counts.
_DATA_SHEETS: tuple[tuple[str, float, str], ...] = (
    (r"\bGB[23]00\b", 2500.0, "bf16"),
    (r"\bB[23]00\b", 2250.0, "bf16"),
    (r"\bH[12]00 NVL\b", 835.5, "bf16"),
    (r"\bH[18]00 PCIe\b", 756.0, "bf16"),
    (r"\bGH200\b|\bH100\b|\bH200\b|\bH800\b", 989.4, "bf16"),
    (r"\bH20\b", 148.0, "bf16"),
    (r"\bA[18]00\b", 312.0, "bf16"),
    (r"\bA40\b", 149.7, "bf16"),
    (r"\bA30\b", 165.0, "bf16"),
    (r"\bA10\b", 125.0, "bf16"),
    (r"\bRTX A6000\b", 154.8, "bf16"),
    (r"\bRTX 6000 Ada\b", 364.2, "bf16"),
    (r"\bL40S\b", 362.05, "bf16"),
    (r"\bL40\b", 181.05, "bf16"),
    (r"\bL4\b", 121.0, "bf16"),
    (r"\bRTX 5090\b", 209.5, "bf16"),
    (r"\bRTX 4090\b", 165.2, "bf16"),
    (r"\bRTX 3090\b", 71.0, "bf16"),
    (r"\bV100S\b", 130.0, "fp16"),
    (r"\bV100\S*PCIE\b", 112.0, "fp16"),
    (r"\bV100\b", 125.0, "fp16"),
    (r"\bT4\b", 65.0, "fp16"),
    (r"\bMI3[02][05]X\b", 1307.4, "bf16"),
    (r"\bMI250X\b", 383.0, "bf16"),
)


@dataclass(frozen=True)
class Peak:
    """The peak that MFU divides by: dense TFLOP/s of one device, or None, and where the figure comes from."""

    tflops: float | None
    source: str

    def describe(self) -> str:
        """The peak as text, for the first lines of a run."""
        return f"peak {self.tflops:g} TFLOP/s, {self.source}" if self.tflops else f"n/a, {self.source}"


def find_peak(device_name: str, override_tflops: float | None = None) -> Peak:
    """The peak of ``device_name`` as ``torch.cuda.get_device_name`` spells it, or ``log.peak_tflops`` where given.

    A CPU has none: what its cores can do depends on clock, width and neighbours. Nor has a MIG slice, whose name is
    that of the whole GPU with an ending.
    """
    if override_tflops:
        return Peak(override_tflops, "log.peak_tflops")
    if "MIG" not in device_name:
        for pattern, tflops, dtype in _DATA_SHEETS:
            if re.search(pattern, device_name, re.IGNORECASE):
                return Peak(tflops, f"dense {dtype} of {device_name}'s data sheet")
    return Peak(None, f"no data-sheet peak known for {device_name}; set log.peak_tflops to get one")
