"""The GPUs that a plan is made for: what they hold, and how fast they are."""

import re

# A little below the name: the total capacity that torch reports to a process.
CARDS: dict[str, float] = {
    "RTX 4060 8GB": 7.6,
    "RTX 3060 12GB": 11.7,
    "RTX 4070 12GB": 11.7,
    "T4 16GB": 14.6,
    "RTX 4060 Ti 16GB": 15.6,
    "RTX 4080 16GB": 15.6,
    "L4 24GB": 22.0,
    "RTX 3090 24GB": 23.6,
    "RTX 4090 24GB": 23.6,
    "RTX 5090 32GB": 31.4,
    "A100 40GB": 39.4,
    "A100 80GB": 79.1,
    "H100 80GB": 79.1,
}

# Dense 16-bit TFLOP/s of the tensor cores, adding up in fp32. GeForce: NVIDIA's whitepapers on GA102, Ada and Blackwell
# and the cards' specifications, where it is twice the fp32 rate; T4, L4, A100 and H100 (SXM): NVIDIA's data sheets,
# halved where they count sparsity.
TFLOPS = {
    "RTX 4060 8GB": 30.2,
    "RTX 3060 12GB": 25.5,
    "RTX 4070 12GB": 58.3,
    "T4 16GB": 65.0,
    "RTX 4060 Ti 16GB": 44.1,
    "RTX 4080 16GB": 97.5,
    "L4 24GB": 121.0,
    "RTX 3090 24GB": 71.0,
    "RTX 4090 24GB": 165.2,
    "RTX 5090 32GB": 209.5,
    "A100 40GB": 312.0,
    "A100 80GB": 312.0,
    "H100 80GB": 989.0,
}

# Larger than any card: a bare number above it is a model's (4090).
MOST_GIB = 400
# What a driver's name says beside (NVIDIA H100 80GB HBM3, A100-SXM4-80GB). The H100 PCIe is slower than the one above.
BESIDE = r"nvidia|geforce|tesla|sxm\d*|hbm\d*e?|(?<=a100-)pcie|(?<=a100 80gb )pcie"


def find_card(text: str) -> str | None:
    """The card in CARDS that `text` names, as people do or as its driver does; None if it is not there.

    Raises:
        ValueError: if it can be several.
    """
    # Its memory may be left out (A100 is then two cards), or its unit, or RTX.
    plain = {name: re.sub(BESIDE, "", name.lower()) for name in (*CARDS, text)}
    words = {name: re.findall(r"[a-z]+|\d+", plain[name]) for name in plain}
    names = {card: (words[card], words[card][:-1], words[card][:-2]) for card in CARDS}
    matches = [card for card in CARDS if words[text] in names[card] or ["rtx", *words[text]] in names[card]]
    if len(matches) > 1:
        raise ValueError(f"GPU {text!r} can be {' or '.join(matches)}: say which")
    return matches[0] if matches else None


def parse_gpu(text: str) -> float:
    """GiB of a card by its name ("RTX 4090") or by its memory: "8GB" is what the smallest card with that on its box
    reports, "8GiB" and "8" are taken as they are."""
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gi|gib)?\s*", text, re.IGNORECASE)
    if amount and 0 < float(amount[1]) <= MOST_GIB:
        size, unit = float(amount[1]), (amount[2] or "").lower()
        reported = [gib for card, gib in CARDS.items() if card.endswith(f" {size:g}GB")]
        return min(reported, default=size) if unit in ("g", "gb") else size
    card = find_card(text)
    if card is None:
        allowed = f"give its memory in GB or GiB (8GB, 7.6GiB), or one of {', '.join(CARDS)}"
        raise ValueError(f"GPU {text!r} is not known: {allowed}")
    return CARDS[card]
