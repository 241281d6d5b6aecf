"""The model card of an adapter or of a merged model, from what the run recorded and from what was measured."""

from __future__ import annotations

import logging
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..evals.results import Results, mean_by, tasks_in
from ..model.record import Record, adapter_sha256
from ..tiny import TINY_ID
from .serving import ServingError, gguf_architecture, llama_cpp_command, vllm_command

logger = logging.getLogger(__name__)

CARD = "README.md"
TEMPLATE = Path(__file__).parent / "card.md.jinja"
BEGIN = "<!-- cream-peft: begin. Up to the end this is written anew at each save and push; text outside of it stays -->"
END = "<!-- cream-peft: end -->"
OURS = re.compile(
    r"<!-- cream-peft: begin.*?<!-- cream-peft: end -->|"
    r"# [^\n]*\n\nA (?:LoRA adapter|merged model|fully trained model) that extends .*?its limits hold for it too\.",
    re.DOTALL,
)
"""Our part of a card; the second, that of cards from before it was marked."""
PAPERS = {
    "cream": ("CREAM", "2406.07138"),
    "pose": ("PoSE", "2309.10400"),
    "randpos": ("randomised positions", "2305.16843"),
    "segments": ("LongRecipe", "2409.00509"),
}
"""Position strategy -> what its paper calls it, and the paper's number at arXiv."""
OUR_FIELDS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "datasets", "model-index")
OUR_TAGS = ("base_model:", "trackio")
"""How tags of ours begin that may be of an earlier training."""


def is_own(result: Results, folder: Path, record: Record) -> bool:
    """Whether results were measured on the adapter in `folder`, or on the one that a merged model is made of."""
    found = result.settings.adapter_sha256
    return found is not None and found == (record.adapter_sha256 or adapter_sha256(folder))


def _table(results: Mapping[str, Results], task: str) -> dict[str, Any]:
    """A row for each model, a column for each length."""
    means = {label: mean_by(result.of_task(task), "length") for label, result in results.items()}
    lengths = sorted({length for values in means.values() for length in values})
    metric = next(cell.metric for result in results.values() for cell in result.of_task(task))
    rows = {
        label: [f"{values[length]:.2f}" if length in values else "not run" for length in lengths]
        for label, values in means.items()
        if values
    }
    return {"task": task, "metric": metric, "lengths": [f"{length:,}" for length in lengths], "rows": rows.items()}


def _samples(result: Results) -> str:
    """How much each task asked at each length, of perplexity the tokens scored; with what seed and where."""
    told = []
    for task in tasks_in({"": result}):
        cells = result.of_task(task)
        lengths = {cell.length for cell in cells}
        asked = sorted({sum(cell.samples for cell in cells if cell.length == length) for length in lengths})
        unit = "tokens" if cells[0].metric == "perplexity" else "questions"
        told.append(f"{task} {' to '.join(f'{count:,}' for count in dict.fromkeys((asked[0], asked[-1])))} {unit}")
    return f"{', '.join(told)}; seed {result.seed}; {result.settings.machine or 'machine not recorded'}"


def _asked(results: Mapping[str, Results]) -> dict[str, str]:
    """What models were asked: their labels -> `_samples`, and the options in which they differ; one entry where all is
    the same."""
    labels: dict[str, list[str]] = defaultdict(list)
    measured = {label: result for label, result in results.items() if result.cells}
    how: dict[str, dict[str, str]] = {}
    for task in tasks_in(measured):
        own = {label: one.settings.options.get(task, {}) for label, one in measured.items() if one.of_task(task)}
        for key in dict.fromkeys(key for options in own.values() for key in options):
            # Of a text's digest the beginning tells it apart.
            how[f"{task} {key}"] = {label: str(options.get(key, "default"))[:16] for label, options in own.items()}
    for key in ("load_in_4bit", "dtype"):
        how[key] = {label: str(getattr(one.settings, key)) for label, one in measured.items()}
    differing = {key: values for key, values in how.items() if len(set(values.values())) > 1}
    for label, result in measured.items():
        told = [f"{key} {values[label]}" for key, values in differing.items() if label in values]
        labels["; ".join([_samples(result), *told])].append(label)
    return {", ".join(names): told for told, names in labels.items()}


def _eval_results(own: Mapping[str, Results]) -> list[EvalResult]:
    """What was measured on this adapter, for the metadata's model-index."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"{task}, {length:,} tokens",
            # Results of one data set and configuration are taken for one.
            dataset_config=f"{length} tokens" + (f", {label}" if len(own) > 1 else ""),
            metric_type=result.of_task(task)[0].metric,
            metric_value=round(value, 4),
        )
        for task in tasks_in(own)
        for label, result in own.items()
        for length, value in mean_by(result.of_task(task), "length").items()
    ]


def _source(strategy: str) -> str:
    """The paper of a strategy, in brackets; nothing of plain positions and of strategies of one's own."""
    if strategy not in PAPERS:
        return ""
    name, number = PAPERS[strategy]
    return f" ({name}, [arXiv {number}](https://arxiv.org/abs/{number}))"


def trackio_page(record: Record) -> str | None:
    """The Space with the curves of the training, where its recipe names one."""
    space = str(record.recipe.get("trackio_static_space_id") or record.recipe.get("trackio_space_id") or "")
    was_used = "trackio" in (record.recipe.get("report_to") or ()) and space.count("/") == 1
    return f"https://huggingface.co/spaces/{space}" if was_used else None


def metadata(record: Record, own: Mapping[str, Results] | None = None, title: str = "") -> ModelCardData:
    """The head of the card; with `own`, results by label that were measured on this very adapter, their model-index."""
    own, space = own or {}, trackio_page(record)
    # A local folder's name and the embedded model are nowhere on the Hub.
    base = None if record.base_model == TINY_ID or record.base_is_local else record.base_model
    relation, dataset = "finetune" if record.merged else "adapter", str(record.recipe.get("dataset_name") or "")
    tags = [
        *(["cream"] if record.positions.strategy == "cream" else []),
        "long-context",
        "trl",
        "sft",
        "transformers",
    ] + ([] if record.merged else ["lora"])
    tags += [f"base_model:{relation}:{base}"] if base else []
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="transformers" if record.merged else "peft",
        pipeline_tag="text-generation",
        tags=tags + (["trackio", f"trackio:{space}"] if space else []),
        license=record.license,
        # What is left of a local path has no owner before it.
        datasets=[dataset] if dataset.count("/") == 1 else None,
        model_name=title if own else None,
        eval_results=_eval_results(own) or None,
    )


@dataclass
class Kept:
    """What of earlier cards a person wrote: metadata, and text above and below our part."""

    fields: dict[str, Any] = field(default_factory=dict)
    above: str = ""
    below: str = ""

    def add(self, card: str, where: str, ours: tuple[str, ...] = OUR_FIELDS) -> None:
        """Take over what is in `card` and not here yet, but for the fields that are `ours`. A log line says `where` a
        card was that somebody else wrote."""
        card = card.replace("\r\n", "\n")
        head = REGEX_YAML_BLOCK.match(card)
        text = card[head.end() :] if head else card
        try:
            fields = yaml.safe_load(head[2]) if head else None
        except yaml.YAMLError:
            fields = None
        if isinstance(fields, dict):
            tags = [tag for tag in fields.get("tags") or [] if tag != "cream" and not str(tag).startswith(OUR_TAGS)]
            fields = {key: value for key, value in fields.items() if key not in ours}
            self.fields = fields | self.fields | {"tags": list(dict.fromkeys([*self.fields.get("tags", []), *tags]))}
        above, *rest = OURS.split(text)
        below = "\n\n".join(part.strip() for part in rest)
        if not rest:
            above, below = "", text
            if text.strip():
                logger.info("%s was not written by cream-peft: its text stays, below ours", where)
        self.above, self.below = _joined(self.above, above), _joined(self.below, below)


def _joined(text: str, more: str) -> str:
    return text if more.strip() in text else f"{text}\n\n{more.strip()}".strip()


def write_card(
    folder: Path,
    record: Record,
    repo: str | None = None,
    results: Mapping[str, Results] | None = None,
    on_hub: str = "",
    revision: str | None = None,
) -> None:
    """Write README.md, the model card, into the folder of an adapter or a merged model. What a person wrote on the card
    that is there, outside of our part of it, stays.

    Args:
        folder: holds adapter_config.json and base_config/.
        repo: the Hub id that it will have.
        results: label -> what `cream-peft evaluate` wrote. The card shows them only if some were measured on this very
            adapter: results of an earlier training do not speak for it.
        on_hub: the card that is on the Hub, from which the same is kept.
        revision: the branch that it is on; None is the one that loads by itself.
    """
    kept, file = Kept(), folder / CARD
    kept.add(on_hub, f"{CARD} of {repo}")
    # The licence there is that of an earlier training, perhaps of another base.
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    kept.add(text, CARD, (*OUR_FIELDS, "license"))
    base, results = record.base_model, results or {}
    title = (repo or f"{base.split('/')[-1]}-{record.positions.strategy}-{record.target_length}").split("/")[-1]
    # Not everything that reads an adapter takes a branch of it; a folder all do.
    branch = revision if revision != "main" else None
    name = title if branch else repo or "this-repository-or-folder"
    own = {label: result for label, result in results.items() if result.cells and is_own(result, folder, record)}
    head = metadata(record, own, title)
    head.tags = list(dict.fromkeys([*(head.tags or []), *kept.fields.pop("tags", [])]))
    for key, value in kept.fields.items():
        if head.get(key) is None:
            head[key] = value
    # The embedded model comes with this package, and nothing else finds it.
    is_served, llama_cpp = not record.merged and base != TINY_ID, ""
    with suppress(ServingError):
        llama_cpp = llama_cpp_command(folder, record) if is_served else ""
    card = ModelCard.from_template(
        head,
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        above=kept.above,
        below=kept.below,
        record=record,
        source=_source(record.positions.strategy),
        measured=", ".join(tasks_in(own)),
        commas="{:,}".format,
        repo=repo,
        branch=shlex.quote(branch) if branch else None,
        name=name,
        title=title,
        embedded=base == TINY_ID,
        vllm=vllm_command(folder, record, name) if is_served else "",
        architecture=gguf_architecture(folder),
        llama_cpp=llama_cpp,
        space=trackio_page(record),
        tables=[_table(results, task) for task in tasks_in(results)] if own else [],
        asked=_asked(results) if own else {},
        other_bits=[
            label for label, one in own.items() if one.settings.load_in_4bit not in (None, record.load_in_4bit)
        ],
        longest=max((cell.length for result in own.values() for cell in result.cells), default=None),
        recipe=yaml.safe_dump(record.recipe or {"recipe": "not recorded"}, sort_keys=False).strip(),
    )
    card.save(file)
