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


def find_card(text: str) -> str | None:
    """The card in CARDS that `text` names; None if it is not there.

    Raises:
        ValueError: if it can be several.
    """
    # Its memory may be left out (A100 is then two cards), or its unit.
    plain = {name: re.sub("nvidia|geforce|tesla", "", name.lower()) for name in (*CARDS, text)}
    words = {name: re.findall(r"[a-z]+|\d+", plain[name]) for name in plain}
    matches = [card for card in CARDS if words[text] in (words[card], words[card][:-1], words[card][:-2])]
    if len(matches) > 1:
        raise ValueError(f"GPU {text!r} can be {' or '.join(matches)}: say which")
    return matches[0] if matches else None


def parse_gpu(text: str) -> float:
    """GiB of a card by its name ("RTX 4090") or by its memory ("8GB"; GB is read as GiB, as on the box)."""
    amount = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gi?b?)?\s*", text, re.IGNORECASE)
    if amount and float(amount[1]) > 0:
        return float(amount[1])
    card = find_card(text)
    if card is None:
        raise ValueError(f"GPU {text!r} is not known: give its memory (8GB), or one of {', '.join(CARDS)}")
    return CARDS[card]
