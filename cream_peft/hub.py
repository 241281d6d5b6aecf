"""The model card of an adapter, from what the run recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

BODY = """# {title}

A LoRA adapter that extends {base} from {window:,} to {target:,} tokens. It was trained at {context} tokens per
example with {strategy} positions (CREAM, [arXiv 2406.07138](https://arxiv.org/abs/2406.07138)) and
{scaling}.

## Load it

The base must be loaded with its RoPE scaled; a plain PEFT load does not do that and fails silently.

```python
from cream_peft import load_adapter

model, tokenizer = load_adapter("{load_name}")
```

Without this package, with the scaled config that lies in `base_config/`:

```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("{load_name}", subfolder="base_config")
model = AutoModelForCausalLM.from_pretrained("{load_name}", config=config)
```

## Measured

Nothing was measured yet.

## Training

{steps} steps, seed {seed}. The recipe:

```yaml
{recipe}
```

Versions: {versions}.
"""


def render_card(description: dict[str, Any], repo: str | None = None) -> str:
    """The card's text from what cream.json records; `repo` is the Hub id that it will have."""
    positions, scaling = description["positions"], description["rope_scaling_type"]
    name = description["base_model"]
    data = ModelCardData(
        base_model=name, library_name="peft", pipeline_tag="text-generation", tags=["cream", "long-context", "lora"]
    )
    body = BODY.format(
        title=(repo or f"{name.split('/')[-1]}-{positions['strategy']}-{description['target_length']}").split("/")[-1],
        base=name,
        window=description["pretrained_window"],
        target=description["target_length"],
        context=positions.get("context_length", "?"),
        strategy=positions["strategy"],
        scaling=f"{scaling} RoPE scaling" if scaling else "no RoPE scaling",
        load_name=repo or "this-repository-or-folder",
        steps=description["steps"],
        seed=description["seed"],
        recipe=yaml.safe_dump(description["recipe"] or {"recipe": "not recorded"}, sort_keys=False).strip(),
        versions=", ".join(f"{key} {value}" for key, value in description["versions"].items()),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def write_card(folder: str | Path, description: dict[str, Any], repo: str | None = None) -> None:
    """Write README.md, the model card, into an adapter's folder."""
    ModelCard(render_card(description, repo)).save(Path(folder) / "README.md")
