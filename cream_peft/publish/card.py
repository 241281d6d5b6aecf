"""The model card of an adapter or of a merged model, from what the run recorded and from what was measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evals.results import mean_by
from ..evals.table import of_task, tasks_in
from ..model.record import adapter_sha256
from ..tiny import TINY_ID

BODY = """# {title}

{what} that extends {base} from {window:,} to {target:,} tokens. It was trained at {context} tokens per example with
{strategy} positions (CREAM, [arXiv 2406.07138](https://arxiv.org/abs/2406.07138)) and {scaling}.

{usage}

## Measured

{measured}

## Training

{training}

The recipe:

```yaml
{recipe}
```

Versions: {versions}.

## Limits

{limits}
"""

ADAPTER_USAGE = """## Load it

The base must be loaded with its RoPE scaled. A plain PEFT load does not do that, and fails silently: short prompts
look right, long ones do not.

```python
from cream_peft import load_adapter

model, tokenizer = load_adapter("{name}")  # load_in_4bit=False for a 16-bit base
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""

ELSEWHERE = """
Without this package, with the scaled config that lies in `base_config/`:

```python
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("{name}", subfolder="base_config")
model = AutoModelForCausalLM.from_pretrained("{name}", config=config)
```

Serve it with vLLM (not run here):

```bash
{vllm}
```

For llama.cpp and everything else that wants one model, merge it into the 16-bit base:

```bash
cream-peft merge --adapter {name} --output merged
python convert_hf_to_gguf.py merged --outfile model.gguf  # a script of llama.cpp's repository
{gguf}```
"""

MERGED_USAGE = """## Load it

Base and adapter in one, RoPE scaling included:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Serve it with vLLM (not run here): `vllm serve {name} --max-model-len {target}`. For llama.cpp:

```bash
python convert_hf_to_gguf.py FOLDER --outfile model.gguf  # a script of llama.cpp's repository
{gguf}```
"""

LINEAR_GGUF = """# linear scaling: say the length, or llama-server stops at the base's window
gguf-set-metadata model.gguf llama.context_length {target} --force
"""


def is_own(result: dict[str, Any], folder: Path, description: dict[str, Any]) -> bool:
    """Whether results were measured on the adapter in `folder`, or on the one that a merged model is made of."""
    found = result["settings"].get("adapter_sha256")
    return found is not None and found == (description.get("adapter_sha256") or adapter_sha256(folder))


def _table(results: dict[str, dict[str, Any]], task: str) -> list[str]:
    """Markdown: a row a model, a column a length."""
    cells = of_task(results, task)
    lengths = sorted({cell["length"] for found in cells.values() for cell in found})
    metric = next(cell["metric"] for found in cells.values() for cell in found)
    lines = [f"{task}: {metric} by length in tokens", ""]
    lines += [f"| | {' | '.join(f'{length:,}' for length in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    for label, found in cells.items():
        values = mean_by(found, "length")
        row = " | ".join(f"{values[length]:.2f}" if length in values else "not run" for length in lengths)
        lines.append(f"| {label.replace('|', '/')} | {row} |")
    return lines


def _measured(results: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> str:
    if not own:
        return "Nothing was measured yet."
    lines: list[str] = []
    for task in tasks_in(results):
        lines += [*_table(results, task), ""]
        lines += [f"![{task} by length and by depth](results/{task}.png)", ""]
    one = next(iter(own.values()))
    settings, lengths = one["settings"], sorted({cell["length"] for cell in one["cells"]})
    asked = sorted({sum(cell["samples"] for cell in one["cells"] if cell["length"] == length) for length in lengths})
    samples = f"{asked[0]:,}" if len(asked) == 1 else f"{asked[0]:,} to {asked[-1]:,}"
    lines.append(
        f"Samples a length: {samples}; seed {one['seed']}; {settings.get('machine', 'machine?')}. "
        "Every number with its settings lies in `results/*.json`, as `cream-peft evaluate` wrote it."
    )
    return "\n".join(lines)


def _eval_results(own: dict[str, dict[str, Any]]) -> list[EvalResult]:
    """What was measured on this adapter, for the metadata's model-index."""
    found = []
    for task in tasks_in(own):
        for cells in filter(None, of_task(own, task).values()):
            for length, value in mean_by(cells, "length").items():
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=task,
                        dataset_name=f"{task}, {length:,} tokens",
                        # Results of one data set and configuration are taken for one.
                        dataset_config=f"{length} tokens",
                        metric_type=cells[0]["metric"],
                        metric_value=round(value, 4),
                    )
                )
    return found


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""


def vllm_command(folder: Path, description: dict[str, Any], name: str) -> str:
    """The vLLM line that serves the adapter on its base, the RoPE scaled as in training."""
    config = json.loads((folder / "base_config" / "config.json").read_text(encoding="utf-8"))
    overrides = {key: config[key] for key in ("max_position_embeddings", "rope_parameters")}
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    refused = [field for field in ("modules_to_save", "use_dora") if adapter.get(field)]
    if refused:
        served = f"vllm serve merged --max-model-len {description['target_length']}"
        return f"# vLLM takes no adapter with {refused[0]}: merge it, see below\n{served}"
    wanted = adapter["r"]
    rank = next((rank for rank in VLLM_RANKS if rank >= wanted), wanted)
    return " \\\n  ".join(
        [
            f"vllm serve {shlex.quote(description['base_model'])}",
            f"--hf-overrides {shlex.quote(json.dumps(overrides))}",
            f"--max-model-len {description['target_length']}",
            f"--enable-lora --max-lora-rank {rank} --lora-modules {name.split('/')[-1]}={name}",
        ]
    )


def _training(description: dict[str, Any]) -> str:
    seconds, peak = description.get("seconds"), description.get("peak_gib")
    started = description.get("first_step") or 0
    took = "time not recorded" if seconds is None else f"{seconds:,.0f} s"
    took += f" since step {started}, where it was resumed" if started and seconds is not None else ""
    memory = "not recorded (no GPU)" if peak is None else f"{peak:.2f} GiB"
    base = "4-bit (NF4)" if description.get("load_in_4bit") else "unquantized"
    return (
        f"{description['steps']} steps on a base held {base}, seed {description['seed']}, on "
        f"{description['machine']}: {took}; peak memory {memory}."
    )


def _limits(description: dict[str, Any], own: dict[str, dict[str, Any]]) -> str:
    lines = [f"- The target of {description['target_length']:,} tokens is what was trained for, not a promise."]
    measured = [cell["length"] for result in own.values() for cell in result["cells"]]
    if measured:
        lines.append(f"- Measured up to {max(measured):,} tokens, with synthetic tasks. Nothing else is known of it.")
    else:
        lines.append("- Whether it uses its long context was not measured.")
    if description.get("load_in_4bit"):
        lines.append("- It was trained on the 4-bit base; on a 16-bit base the outputs differ slightly.")
    lines.append("- The base's licence, its biases and its limits hold for it too.")
    return "\n".join(lines)


def _metadata(description: dict[str, Any], own: dict[str, dict[str, Any]], title: str) -> ModelCardData:
    merged, dataset = description.get("merged"), str((description["recipe"] or {}).get("dataset_name") or "")
    base = description["base_model"]
    return ModelCardData(
        # A local folder's name and the embedded model are nowhere on the Hub.
        base_model=None if base == TINY_ID or description.get("base_is_local") else base,
        base_model_relation=None if base == TINY_ID else "finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["cream", "long-context"] + ([] if merged else ["lora"]),
        license=description.get("license"),
        # What is left of a local path has no owner before it.
        datasets=[dataset] if dataset.count("/") == 1 else None,
        model_name=title if own else None,
        eval_results=_eval_results(own) or None,
    )


def render_card(
    folder: Path,
    description: dict[str, Any],
    repo: str | None = None,
    results: dict[str, dict[str, Any]] | None = None,
) -> str:
    """The card's text for the adapter (or merged model) in `folder`.

    Args:
        folder: holds adapter_config.json and base_config/.
        description: what cream.json says.
        repo: the Hub id that it will have.
        results: label -> what `cream-peft evaluate` wrote. Nothing of it goes on the card unless some was measured on
            this very adapter: results of an earlier training do not speak for it.
    """
    positions, scaling, base = description["positions"], description["rope_scaling_type"], description["base_model"]
    name = repo or "this-repository-or-folder"
    title = repo or f"{base.split('/')[-1]}-{positions['strategy']}-{description['target_length']}"
    title = title.split("/")[-1]
    results = results or {}
    own = {label: result for label, result in results.items() if is_own(result, folder, description)}
    gguf = LINEAR_GGUF.format(target=description["target_length"]) if scaling == "linear" else ""
    if description.get("merged"):
        usage = MERGED_USAGE.format(name=name, target=description["target_length"], gguf=gguf)
    else:
        usage = ADAPTER_USAGE.format(name=name)
        # The embedded model comes with this package, and nothing else finds it.
        usage += (
            ELSEWHERE.format(name=name, vllm=vllm_command(folder, description, name), gguf=gguf)
            if base != TINY_ID
            else ""
        )
    body = BODY.format(
        title=title,
        what="A merged model" if description.get("merged") else "A LoRA adapter",
        base=base,
        window=description["pretrained_window"],
        target=description["target_length"],
        context=positions.get("context_length", "?"),
        strategy=positions["strategy"],
        scaling=f"{scaling} RoPE scaling" if scaling else "no RoPE scaling",
        usage=usage.strip(),
        measured=_measured(results, own),
        training=_training(description),
        recipe=yaml.safe_dump(description["recipe"] or {"recipe": "not recorded"}, sort_keys=False).strip(),
        versions=", ".join(f"{key} {value}" for key, value in description["versions"].items()),
        limits=_limits(description, own),
    )
    return f"---\n{_metadata(description, own, title).to_yaml()}\n---\n\n{body}"


def write_card(
    folder: str | Path,
    description: dict[str, Any],
    repo: str | None = None,
    results: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write README.md, the model card, into an adapter's folder."""
    ModelCard(render_card(Path(folder), description, repo, results)).save(Path(folder) / "README.md")
