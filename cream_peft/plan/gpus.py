"""The GPUs that a plan is made for: what they hold, and how fast they are."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """GiB that torch reports to a process, and dense 16-bit TFLOP/s of the tensor cores, adding up in fp32."""

    gib: float
    tflops: float
    share: float | None = None
    """Of that peak which training reaches, where it was measured on this card."""


# GeForce: 4 x cores x boost clock of NVIDIA's whitepapers and specifications. Others: the makers' data sheets, halved
# where they count sparsity; the V100's are those of the PCIe card, the H100's of SXM. LLaMA-Factory published the
# speed of QLoRA on an A100 (tests/test_plan.py). Memory: as drivers report it, or a little less.
PUBLISHED = 0.4
GPUS = {
    "RTX 3060 8GB": GPU(7.6, 25.5),
    "RTX 3060 Ti 8GB": GPU(7.6, 32.4),
    "RTX 3070 8GB": GPU(7.6, 40.6),
    "RTX 3070 Ti 8GB": GPU(7.6, 43.5),
    "RTX 4060 8GB": GPU(7.6, 30.2),
    "RTX 4060 Laptop 8GB": GPU(7.6, 23.2),
    "RTX 4060 Ti 8GB": GPU(7.6, 44.1),
    "RTX 5050 8GB": GPU(7.6, 26.3),
    "RTX 5060 8GB": GPU(7.6, 38.4),
    "RTX 5060 Ti 8GB": GPU(7.6, 47.4),
    "RTX 3080 10GB": GPU(9.6, 59.5),
    "RTX 3060 12GB": GPU(11.7, 25.5),
    "RTX 3080 12GB": GPU(11.7, 61.3),
    "RTX 3080 Ti 12GB": GPU(11.7, 68.2),
    "RTX 4070 12GB": GPU(11.7, 58.3),
    "RTX 4070 SUPER 12GB": GPU(11.7, 71.0),
    "RTX 4070 Ti 12GB": GPU(11.7, 80.2),
    "RTX 5070 12GB": GPU(11.5, 61.7),
    "T4 16GB": GPU(14.6, 65.0),
    "V100 16GB": GPU(15.7, 112.0),
    "RTX 4060 Ti 16GB": GPU(15.6, 44.1),
    "RTX 4070 Ti SUPER 16GB": GPU(15.6, 88.2),
    "RTX 4080 16GB": GPU(15.6, 97.5),
    "RTX 4080 SUPER 16GB": GPU(15.6, 104.4),
    "RTX 4090 Laptop 16GB": GPU(15.6, 66.0),
    "RTX 5060 Ti 16GB": GPU(15.4, 47.4),
    "RTX 5070 Ti 16GB": GPU(15.4, 87.9),
    "RTX 5080 16GB": GPU(15.4, 112.6),
    "A10 24GB": GPU(22.0, 125.0),
    "L4 24GB": GPU(22.0, 121.0),
    "RTX 3090 24GB": GPU(23.6, 71.0),
    "RTX 3090 Ti 24GB": GPU(23.6, 80.0),
    "RTX 4090 24GB": GPU(23.6, 165.2),
    "RTX 5090 Laptop 24GB": GPU(23.4, 63.6),
    "RX 7900 XTX 24GB": GPU(23.9, 122.8),
    "RTX 5090 32GB": GPU(31.4, 209.5),
    "R9700 32GB": GPU(31.8, 191.0),
    "V100 32GB": GPU(31.7, 112.0),
    "A100 40GB": GPU(39.4, 312.0, PUBLISHED),
    "L40S 48GB": GPU(44.4, 362.0),
    "RTX A6000 48GB": GPU(47.4, 154.8),
    "A100 80GB": GPU(79.1, 312.0, PUBLISHED),
    "H100 PCIe 80GB": GPU(79.1, 756.0),
    "H100 80GB": GPU(79.1, 989.0),
    "RTX PRO 6000 96GB": GPU(94.9, 503.8),
    "H200 141GB": GPU(139.7, 989.0),
}
SHOWN = ("RTX 4060 8GB", "RTX 3060 12GB", "RTX 4070 12GB", "T4 16GB", "RTX 4060 Ti 16GB", "RTX 4080 16GB", "L4 24GB")
SHOWN += ("RTX 3090 24GB", "RTX 4090 24GB", "RTX 5090 32GB", "A100 40GB", "A100 80GB", "H100 80GB")
"""Those of a plan for which none is named."""
# Larger than any GPU: a bare number above it is a model's (4090).
MOST_GIB = 400
# What a driver's name says beside (NVIDIA H100 80GB HBM3, A100-SXM4-80GB). The H100 PCIe is a card of its own.
BESIDE = r"nvidia|geforce|tesla|\bgpu|sxm\d*|hbm\d*e?|(?<=[av]100-)pcie|(?<=a100 80gb )pcie"
BESIDE += r"|amd|radeon|ai pro|blackwell workstation edition"


def find_gpu(text: str, gib: float | None = None) -> str | None:
    """The name in GPUS that `text` means, as people write it or as its driver does; None if it is not there. Of several
    that with the memory nearest to `gib`.

    Raises:
        ValueError: if it can be several, and their memory is not known.
    """
    # Its memory may be left out (A100 is then two GPUs), or its unit, or RTX.
    plain = {name: re.sub(BESIDE, "", name.lower()) for name in (*GPUS, text)}
    words = {name: re.findall(r"[a-z]+|\d+", plain[name]) for name in plain}
    names = {gpu: (words[gpu], words[gpu][:-1], words[gpu][:-2]) for gpu in GPUS}
    meant = (words[text], ["rtx", *words[text]], ["rx", *words[text]])
    matches = [gpu for gpu in GPUS if any(each in names[gpu] for each in meant)]
    if gib is not None:
        matches = sorted(matches, key=lambda gpu: abs(GPUS[gpu].gib - gib))[:1]
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
        allowed = f"give its memory in GB or GiB (8GB, 7.6GiB), or a name such as {', '.join(SHOWN)}"
        raise ValueError(f"GPU {text!r} is not known: {allowed}")
    return GPUS[name].gib
