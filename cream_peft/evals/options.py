"""The options of `cream-peft evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.kv_cache import KV_CACHES, PREFILL_CHUNK, refuse_unusable
from ..terminal import CommandParser, did_you_mean
from .prompts import STYLES, TEXT_SUFFIXES
from .tasks import TASKS, option_names

COMPARED = "adapter folder or Hub id, or a base; BASE+ntk (linear, yarn) scales its RoPE; LABEL=MODEL names it"


@dataclass(frozen=True)
class EvaluateOptions:
    """What `cream-peft evaluate` measures, and how; its help says what each option means."""

    compare: list[str]
    tasks: list[str]
    samples: int
    seed: int
    output_dir: str
    lengths: list[int] | None = None
    """Tokens; None: doubling from the window to the target."""
    target_length: int | None = None
    base_model: str | None = None
    load_in_4bit: bool = True
    dtype: str | None = None
    """Of what is not quantized; None: bfloat16 on a GPU that has it, float32 on a CPU."""
    kv_cache: str = "auto"
    overwrite: bool = False
    depths: list[float] | None = None
    """This option and those below are of single tasks; None: the task's default."""
    keys: int | None = None
    query_aware: bool | None = None
    lines: int | None = None
    haystack: str | None = None
    text: str | None = None
    stride: int | None = None
    max_tokens: int | None = None
    style: str | None = None
    chunk_length: int | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r}{did_you_mean(task, TASKS)}: use one of {', '.join(TASKS)}")
        for name, values in (("samples", [self.samples]), ("lengths", self.lengths or [])):
            if min(values, default=1) < 1:
                raise ValueError(f"--{name} {min(values)} must be at least 1")
        for depth in self.depths or []:
            if not 0 <= depth <= 1:
                raise ValueError(f"--depths {depth:g} must lie between 0 (start) and 1 (end)")
        if self.kv_cache != "auto":
            refuse_unusable(self.kv_cache)
        if "perplexity" in self.tasks and self.text is None:
            raise ValueError("task perplexity has no text: set --text to a file, or to a folder of .txt and .md files")
        for name, path in (("text", self.text), ("haystack", self.haystack)):
            is_path = name == "haystack" or Path(str(path)).suffix.lower() in TEXT_SUFFIXES
            if path is not None and is_path and not Path(path).expanduser().exists():
                raise ValueError(f"--{name} {path}: no such file or folder")
        for name in option_names():
            takers = [task for task in TASKS if name in TASKS[task].options]
            if getattr(self, name) is not None and not set(takers) & set(self.tasks):
                raise ValueError(f"--{name} is for {', '.join(takers)}, and --tasks has {', '.join(self.tasks)}")

    def of_task(self, task: str) -> dict[str, Any]:
        """What was set of the options that the task takes."""
        mine = {name: getattr(self, name) for name in TASKS[task].options}
        return {name: value for name, value in mine.items() if value is not None}


def add_options(parser: CommandParser) -> None:
    """Add to the command's parser what its user may set."""
    compared = f"{COMPARED} in the table"
    parser.option("compare", compared, "adapter", nargs="+", default=["cream-peft-tiny"], metavar="MODEL")
    parser.option("tasks", f"of {', '.join(TASKS)}", nargs="+", default=["kv_retrieval", "needle"])
    parser.option(
        "lengths",
        "tokens; default: doubling up to the target from the window, or from the context_length within it",
        nargs="+",
        type=int,
    )
    parser.option("target_length", "tokens that bases are scaled to; default: the adapters', or 8 windows", type=int)
    parser.option("samples", "questions at each length and depth; of perplexity: documents", type=int, default=32)
    parser.option("seed", "seed of the prompts", type=int, default=1000)
    parser.option("threshold", "accuracy that is enough", type=float, default=0.85)
    parser.option("depths", "where the answer stands, 0 to 1; default: the task's", nargs="+", type=float)
    parser.option("keys", "kv_retrieval: so many keys, as the paper's 75 and 140", type=int)
    parser.option("query_aware", "kv_retrieval: name the key before the JSON too", action="store_true", default=None)
    parser.option("lines", "longchat_lines: so many lines", type=int)
    parser.option("haystack", "needles: text file or folder to hide them in", metavar="PATH")
    parser.option("text", "perplexity: text file, folder of such, or a data set", metavar="PATH_OR_ID")
    parser.option("text_config", "configuration of that data set")
    parser.option("text_split", "split of that data set", default="test")
    parser.option("stride", "perplexity: tokens between windows; default: half the length", type=int)
    parser.option("max_tokens", "perplexity: tokens read of each document; default: all", type=int)
    parser.option("style", "form of the prompt; default: chat where there is a template", choices=STYLES)
    dtypes = ("bfloat16", "float16", "float32")
    parser.option("dtype", "of what is not quantized; default: float32 on a CPU, else bfloat16", choices=dtypes)
    parser.option("chunk_length", f"tokens read at once; default: {PREFILL_CHUNK}", type=int)
    caches = ["auto", *KV_CACHES]
    parser.option("kv_cache", "auto: 16-bit where it fits, else quantized", choices=caches, default="auto")
    parser.option("dump-prompts", "write the prompts, measure nothing", metavar="DIR")
    parser.option("output_dir", "folder of the results", default="runs/evaluate")
    parser.option("overwrite", "replace results measured with other settings", action="store_true")
    parser.option("details", "also print accuracy by depth, intervals, differences", action="store_true")
    parser.option("paper", "print what the paper reports for the same tasks", action="store_true")
