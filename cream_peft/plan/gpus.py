"""The GPUs that a plan is made for: what they hold, and how fast they are."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """GiB that torch reports to a process, and dense 16-bit TFLOP/s of the tensor cores, adding up in fp32."""

    gib: float
    tflops: float


# GeForce: NVIDIA's whitepapers on GA102, Ada and Blackwell and the specifications, where TFLOP/s are twice the fp32
# rate; T4, L4, A100 and H100 (SXM): NVIDIA's data sheets, halved where they count sparsity.
GPUS = {
    "RTX 4060 8GB": GPU(7.6, 30.2),
    "RTX 3060 12GB": GPU(11.7, 25.5),
    "RTX 4070 12GB": GPU(11.7, 58.3),
    "T4 16GB": GPU(14.6, 65.0),
    "RTX 4060 Ti 16GB": GPU(15.6, 44.1),
    "RTX 4080 16GB": GPU(15.6, 97.5),
    "L4 24GB": GPU(22.0, 121.0),
    "RTX 3090 24GB": GPU(23.6, 71.0),
    "RTX 4090 24GB": GPU(23.6, 165.2),
    "RTX 5090 32GB": GPU(31.4, 209.5),
    "A100 40GB": GPU(39.4, 312.0),
    "A100 80GB": GPU(79.1, 312.0),
    "H100 80GB": GPU(79.1, 989.0),
}
# Larger than any GPU: a bare number above it is a model's (4090).
MOST_GIB = 400
# What a driver's name says beside (NVIDIA H100 80GB HBM3, A100-SXM4-80GB). The H100 PCIe is slower than the one above.
BESIDE = r"nvidia|geforce|tesla|sxm\d*|hbm\d*e?|(?<=a100-)pcie|(?<=a100 80gb )pcie"


def find_gpu(text: str) -> str | None:
    """The name in GPUS that `text` means, as people write it or as its driver does; None if it is not there.

    Raises:
        ValueError: if it can be several.
    """
    # Its memory may be left out (A100 is then two GPUs), or its unit, or RTX.
    plain = {name: re.sub(BESIDE, "", name.lower()) for name in (*GPUS, text)}
    words = {name: re.findall(r"[a-z]+|\d+", plain[name]) for name in plain}
    names = {gpu: (words[gpu], words[gpu][:-1], words[gpu][:-2]) for gpu in GPUS}
    matches = [gpu for gpu in GPUS if words[text] in names[gpu] or ["rtx", *words[text]] in names[gpu]]
    if len(matches) > 1:
        raise ValueError(f"GPU {text!r} can be {' or '.join(matches)}: say which")
    return matches[0] if matches else None


def parse_gpu(text: str) -> float:
    """GiB of a GPU by its name ("RTX 4090") or by its memory: "8GB" is what the smallest GPU with that on its box
    reports, "8GiB" and "8" are taken as they are."""
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gi|gib)?\s*", text, re.IGNORECASE)
    if amount and 0 < float(amount[1]) <= MOST_GIB:
        size, unit = float(amount[1]), (amount[2] or "").lower()
        reported = [gpu.gib for name, gpu in GPUS.items() if name.endswith(f" {size:g}GB")]
        return min(reported, default=size) if unit in ("g", "gb") else size
    name = find_gpu(text)
    if name is None:
        allowed = f"give its memory in GB or GiB (8GB, 7.6GiB), or one of {', '.join(GPUS)}"
        raise ValueError(f"GPU {text!r} is not known: {allowed}")
    return GPUS[name].gib
