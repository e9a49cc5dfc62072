"""Cards: how much memory they have, and how much of it a predicted peak takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lab.errors import LabError, nearest
from lab.memory.workload import Workload, before_ampere

GIB = 2**30

CONTEXT_BYTES = round(0.7 * GIB)
"""What CUDA takes beside torch's allocator: context, loaded kernels. An assumption, not measured by this lab.

25 out-of-memory reports on GitHub say what the process held, what was allocated and what reserved. The difference is 0.12
GiB on a T4, 0.2 to 0.4 on an A10, A4000 or V100, 0.42 to 0.51 on an RTX 4090, L40 or L40S, 0.6 on an RTX 5090, 0.66 on an
H100; five held 1 to 4 GiB more, for other libraries or several cards. The highest of the others, rounded up, errs on the
side of "does not fit".
"""

RESERVED_SHARE = 0.03
"""What torch holds beyond what is allocated at the peak: blocks that are cut too small. A share of the peak.

An assumption too: in the same reports, written when the card was full and the cache had been given back, half show at
most 2.2 %, three quarters 4.3 %, one 40 %. Most are of batches of many shapes; those of one shape, which is what is priced,
waste less.
"""

DRIVER_SHARE = 0.02
"""What a card of G GiB lacks of them once its driver has started: 1 % (A100, H100) to 2.5 % (RTX, 16 GB); taken off
where a card is known by its size alone. Cards with error correction in their memory lack up to 8 %: name those (--gpu)."""

CLOSED_FORM_ERROR = 0.03
"""How far the closed form may be from the simulation; added where it alone decides whether something fits."""


@dataclass(frozen=True)
class Gpu:
    """A card. `total_bytes` is what the driver gives to programs: `torch.cuda.get_device_properties(0).total_memory`."""

    name: str
    total_bytes: int
    family: str


def _gpus(family: str, **gib: float) -> list[Gpu]:
    return [Gpu(name.replace("_", "-"), int(size * GIB), family) for name, size in gib.items()]


# As torch's out-of-memory messages on GitHub give it ("GPU 0 has a total capacity of ..."), the lowest found under Linux
# rounded down; for the A40, A6000, L4 and B200 none was found, and the share that cards like them lose is taken.
GPUS = {
    gpu.name: gpu
    for gpu in (
        *_gpus("Volta", V100_16GB=15.77, V100_32GB=31.73),
        *_gpus("Turing", T4=14.56),
        *_gpus("Ampere", RTX_3060=11.74, RTX_3090=23.66, A10=21.98, A10G=21.98, A30=23.52, A40=44.3, A6000=47.4),
        *_gpus("Ampere", A100_40GB=39.38, A100_80GB=79.14),
        *_gpus("Ada", RTX_4060_Ti_16GB=15.6, RTX_4080=15.6, RTX_4090=23.52, RTX_6000_Ada=44.42),
        *_gpus("Ada", L4=21.9, L40=44.39, L40S=44.39),
        *_gpus("Hopper", H100_80GB=79.1, H100_NVL_94GB=93.0, H200_141GB=139.71),
        *_gpus("Blackwell", RTX_5090=31.35, B200_180GB=178.0),
    )
}
"""The cards by name."""

_MAKER = re.compile(r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|hbm\d?e?|[^a-z0-9]")


def find_gpu(name: str) -> Gpu:
    """A card of the table, by its name in any case, with or without its maker's words (`NVIDIA A100-SXM4-80GB`).

    Raises:
        LabError: there is none, or there are several; the message names the nearest.
    """
    short = {_MAKER.sub("", known.lower()): gpu for known, gpu in GPUS.items()}
    asked = _MAKER.sub("", name.lower())
    found = [gpu for known, gpu in short.items() if known == asked] or [
        gpu for known, gpu in short.items() if asked and known.startswith(asked) and known[len(asked) :].endswith("gb")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise LabError(f"gpu: '{name}' may be {' or '.join(gpu.name for gpu in found)}. Name one of them.")
    guess = nearest(asked, short)
    hint = f"Did you mean '{short[guess].name}'? " if guess else ""
    raise LabError(f"unknown gpu '{name}'. {hint}Known: {', '.join(GPUS)}; for another give its size: --vram GIB.")


def card_bytes(workload: Workload) -> int | None:
    """Memory of the workload's card as programs see it, in bytes; None if it names none.

    A size given beside a name can only lower it, as a part of a card does.
    """
    size = None if workload.vram_gib is None else int(workload.vram_gib * GIB)
    if workload.gpu:
        total = find_gpu(workload.gpu).total_bytes
        return total if size is None else min(total, size)
    return None if size is None else int(size * (1 - DRIVER_SHARE))


def cautions(workload: Workload) -> list[str]:
    """What the price leaves out, and where the card cannot do well what is priced."""
    found = []
    if workload.config.get("model_type") == "gemma3":
        found.append(
            "of gemma3 the language model alone is priced; AutoModelForCausalLM loads the vision tower too, whose weights "
            "(0.8 GiB in bf16, of the models from 4B to 27B) and adapters come on top"
        )
    if workload.gpu and before_ampere(workload) and "bf16" in (workload.dtype, workload.amp):
        gpu = find_gpu(workload.gpu)
        caution = f"{gpu.name} ({gpu.family}) has no arithmetic in bf16; torch emulates it, slowly; fp16 is fast there"
        if workload.attended_by == "sdpa" and (workload.amp or workload.dtype) == "bf16" and not workload.inference:
            caution += ", and has a fused attention, where that in bf16 takes memory with the square of the length"
        found.append(caution)
    return found


def usable_bytes(total_bytes: int, quick: bool = False) -> int:
    """The highest predicted peak that a card of so many bytes takes; the prediction is of the closed form if `quick`."""
    return int((total_bytes - CONTEXT_BYTES) / (1 + slack(quick)))


def shown_bytes(peak_bytes: int, quick: bool = False) -> int:
    """What the card shows (nvidia-smi) at a predicted peak: that, what torch reserves beyond it, and the context."""
    return peak_bytes + math.ceil(slack(quick) * peak_bytes) + CONTEXT_BYTES


def slack(quick: bool) -> float:
    """What is added to a predicted peak, as a share of it."""
    return RESERVED_SHARE + (CLOSED_FORM_ERROR if quick else 0)


# Arithmetic -----------------------------------------------------------------------------------------------------

PEAKS = {
    "H200": 989.4,  # NVIDIA H200 data sheet: 1,979 with sparsity, which is twice the dense
    "H100 80GB": 989.4,  # SXM5: NVIDIA H100 architecture white paper, table 2
    "H100 PCIE": 756.0,  # NVIDIA H100 PCIe product brief: 1,513 with sparsity
    "A100": 312.0,  # NVIDIA A100 architecture white paper, table 1
    "A10": 125.0,  # NVIDIA A10 data sheet
    "L40S": 362.0,  # NVIDIA L40S data sheet: 733 with sparsity, 362.05 dense
    "L4": 121.0,  # NVIDIA L4 data sheet: 242 with sparsity
    "RTX 4090": 165.2,  # NVIDIA Ada white paper, appendix A: bf16 with fp32 accumulation
    "RTX 3090": 71.0,  # NVIDIA GA102 white paper, appendix A: bf16 with fp32 accumulation
    "T4": 65.0,  # NVIDIA T4 data sheet: fp16; it has no bf16
    "V100 SXM2": 125.0,  # NVIDIA V100 data sheet: fp16; it has no bf16
}
"""TFLOP/s of dense matrix products in 16 bits by tensor cores, by the words of a card's name."""

_OTHER = {"MIG", "NVL", "TI", "D", "LAPTOP", "SUPER", "MOBILE"}
"""Words that make another card of a name, or a part of one."""


def peak_flops(name: str) -> float | None:
    """Operations a second that a card can do at most in 16 bits, by the name that torch or this module gives it.

    None for a card whose peak is not in the table: then no share of it can be told.
    """
    words = set(re.split(r"[^A-Z0-9]+", name.upper()))
    if words & _OTHER:
        return None
    found = [peak for known, peak in PEAKS.items() if set(known.split()) <= words]
    return found[0] * 1e12 if len(found) == 1 else None
