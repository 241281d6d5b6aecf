"""Run by hand: does transformers 4.57 read the published config of each family as transformers 5 runs it?

    pip install --no-deps --target DIR transformers==4.57.6 'huggingface_hub<1' 'tokenizers<0.23'
    python tests/check_transformers_4.py DIR --json tests/measured/transformers-4.json

A tiny random model of each family and scaling is saved as `cream-peft merge` saves one. transformers 4 loads it in the
usual way, in a process of its own, and must have the same logits at distances beyond the window. The control is the
same folder without the RoPE keys that only transformers 4 reads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4.57"), transformers.__version__
transformers.logging.set_verbosity_error()
positions, found = torch.tensor(json.loads(sys.argv[1]))[None], {"version": transformers.__version__}
for folder in sys.argv[2:]:
    tokens = torch.load(f"{folder}/tokens.pt")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        logits = model(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
    found[folder] = (logits - torch.load(f"{folder}/logits.pt")).abs().max().item()
print(json.dumps(found))
"""


def save(folder: Path, model, config, tokens, logits, keys: bool) -> str:
    """A folder as merging leaves it, with or without the keys of transformers 4."""
    import torch

    from cream_peft.rope import published_config

    model.save_pretrained(folder)
    content = published_config(config)
    if not keys:
        content = {key: value for key, value in content.items() if key not in ROPE_KEYS}
    (folder / "config.json").write_text(json.dumps(content))
    torch.save(tokens, folder / "tokens.pt")
    torch.save(logits, folder / "logits.pt")
    return str(folder)


def main() -> None:
    """Print the largest difference of a logit, by family and scaling, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", help="where transformers 4 was installed")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    import torch
    import transformers
    from families import built, tiny
    from test_families import FAR, PAIRS, TARGET

    from cream_peft.families import family_of
    from cream_peft.rope import scaled_config

    rows, folders = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for family, scaling in PAIRS:
            config = scaled_config(tiny(family), TARGET, scaling)
            if not family_of(config.model_type).in_transformers_4:
                continue
            model = built(config)
            tokens = torch.randint(3, 385, (1, len(FAR)), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                mask = torch.ones_like(tokens)
                logits = model(
                    tokens, position_ids=torch.tensor(FAR)[None], attention_mask=mask, use_cache=False
                ).logits
            rows[f"{family} {scaling}"] = pair = {"largest_logit": logits.abs().max().item()}
            for name, keys in (("difference", True), ("control", False)):
                folder = Path(root) / f"{family}-{scaling}-{name}"
                folders[save(folder, model, config, tokens, logits, keys)] = (pair, name)
        environment = os.environ | {"PYTHONPATH": options.site}
        command = [sys.executable, "-c", READ, json.dumps(FAR), *folders]
        found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        versions = {"transformers 4": found.pop("version"), "transformers 5": transformers.__version__}
        for folder, difference in found.items():
            pair, name = folders[folder]
            pair[name] = difference
    for name, pair in rows.items():
        print(name, pair)
    Path(options.json).write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
