"""The field's benchmarks as one word: `cream-peft lm-eval --preset short`, `longbench` or `ruler`.

Here are lm-eval's tasks of each, their shots, what they need, and data sets from folders instead of the Hub.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

from .prompts import encode

INSTALL = "pip install 'lm-eval[longbench,ruler]<0.5'"
NLTK_TABLE = "tokenizers/punkt_tab"


class HarnessError(ValueError):
    """lm-eval or its data is not there, or what was asked of it does not exist or does not fit the model."""


@dataclass(frozen=True)
class Preset:
    """Tasks of lm-eval, measured one after the other."""

    tasks: Mapping[str, tuple[int | None, str]]
    """Task -> its shots (None: those of lm-eval), and the metric of which the mean is taken ("": a mean a length)."""
    data: tuple[str, ...]
    """Data sets of the Hub; what ends in .json is a file from elsewhere."""
    modules: tuple[str, ...] = ()
    """What must be installed beside lm-eval."""


SCORE = (None, "score,none")
LONGBENCH = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum")
LONGBENCH += ("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p")
WITHOUT_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
"""Of LongBench, what is asked without the chat form."""
RULER = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
RULER += (
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
PRESETS = {
    # bigai-nlco/CREAM, scripts/eval_benchmark.sh
    "short": Preset(
        {
            "boolq": (0, "acc,none"),
            "piqa": (0, "acc,none"),
            "winogrande": (0, "acc,none"),
            "truthfulqa_mc2": (0, "acc,none"),
            "hellaswag": (10, "acc_norm,none"),
            "arc_challenge": (25, "acc_norm,none"),
        },
        ("aps/super_glue", "baber/piqa", "allenai/winogrande", "truthfulqa/truthful_qa", "Rowan/hellaswag")
        + ("allenai/ai2_arc",),
    ),
    "longbench": Preset(
        {f"longbench_{name}": SCORE for name in LONGBENCH},
        ("Xnhyacinth/LongBench",),
        ("jieba", "fuzzywuzzy", "rouge"),
    ),
    "ruler": Preset(
        dict.fromkeys(RULER, (None, "")),
        ("baber/paul_graham_essays", "dev-v2.0.json", "hotpot_dev_distractor_v1.json"),
        ("wonderwords", "nltk"),
    ),
}
RULER_FIRST = 4096
"""The shortest length of the RULER paper."""
LONGBENCH_CUTS = {4096: 3500, 32_768: 31_500}
"""Tokens of a prompt by the model's reach; with what is above from bigai-nlco/CREAM, src/evaluation/longbench."""
LONGBENCH_ROOM = 596
"""Tokens left for the answer and the chat form at any other reach, as at 4,096."""


def check_needs(preset: str | None, data_dir: str | None) -> None:
    """Raise a HarnessError that names what the preset needs and is not here."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise HarnessError(f"--data_dir {data_dir}: no such folder")
    if preset is None:
        return
    needs = PRESETS[preset]
    if missing := [module for module in needs.modules if find_spec(module) is None]:
        raise HarnessError(f"--preset {preset} needs {', '.join(missing)}: {INSTALL}")
    if data_dir and (absent := [name for name in needs.data if not Path(data_dir, name).exists()]):
        raise HarnessError(f"--data_dir {data_dir} lacks {', '.join(absent)}, which --preset {preset} reads")
    if "nltk" in needs.modules:
        import nltk

        if data_dir:
            nltk.data.path.insert(0, str(Path(data_dir, "nltk_data")))
        try:
            nltk.data.find(NLTK_TABLE)
        except LookupError:
            raise HarnessError(
                f"--preset {preset} needs nltk's table punkt_tab: `python -m nltk.downloader punkt_tab` fetches it; "
                f"with --data_dir DIR it may lie in DIR/nltk_data/{NLTK_TABLE}"
            ) from None


@contextmanager
def local_data(data_dir: str | None) -> Generator[None]:
    """Inside, lm-eval's tasks read the data sets that have a folder OWNER/NAME in `data_dir` from there.

    It is a clone of the Hub's repository, or holds files SPLIT.jsonl or .parquet, in a folder a configuration if there
    are several. The tasks name data sets in their YAML files and in code; they have these two calls in common.
    """
    if data_dir is None:
        yield
        return
    import datasets
    import requests

    load_dataset, get = datasets.load_dataset, requests.get

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        folder = Path(data_dir, path)
        if not folder.is_dir():
            return load_dataset(path, name, **options)
        if (folder / "README.md").is_file():
            return load_dataset(str(folder), name, **options)
        inside = folder / name if name else folder
        files = {file.stem: str(file) for file in sorted(inside.glob("*")) if file.suffix in (".jsonl", ".parquet")}
        if not files:
            raise HarnessError(f"{inside} holds no data: put files such as test.jsonl or test.parquet there")
        kind = "parquet" if next(iter(files.values())).endswith(".parquet") else "json"
        return load_dataset(kind, data_files=files, **options)

    def open_file(url: str, **options: Any) -> requests.Response:
        file = Path(data_dir, url.rsplit("/", 1)[-1])
        if not file.is_file():
            return get(url, **options)
        answer = requests.Response()
        answer.status_code, answer.raw = 200, file.open("rb")
        return answer

    with mock.patch.object(datasets, "load_dataset", load), mock.patch.object(requests, "get", open_file):
        yield


def longbench_cut(reach: int) -> int:
    """Tokens that a prompt of LongBench may have, for a model that reads `reach` tokens."""
    most = LONGBENCH_CUTS.get(reach, reach - LONGBENCH_ROOM)
    if most < LONGBENCH_ROOM:
        raise HarnessError(f"LongBench's answers take up to 512 tokens, which leaves too few of {reach:,} for a prompt")
    return most


def cut_in_the_middle(text: Callable[[Any], str], tokenizer: Any, most: int) -> Callable[[Any], str]:
    """`text`, of which prompts of more than `most` tokens keep the first and the last half of that."""

    def cut(doc: Any, *options: Any) -> str:
        whole = text(doc, *options)
        tokens = encode(tokenizer, whole, add_special_tokens=True)
        if len(tokens) <= most:
            return whole
        ends = tokens[: most // 2], tokens[-(most // 2) :]
        return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends)

    return cut


def preset_means(result: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> mean over the preset's tasks, once all of them have it. RULER's metrics are lengths."""
    preset = PRESETS.get(result.get("cream_peft", {}).get("asked", {}).get("preset") or "")
    values = defaultdict(list)
    for task, (_, metric) in preset.tasks.items() if preset else ():
        for key, value in result["results"].get(task, {}).items():
            length = key.partition(",")[0]
            # RULER gives -1 for the lengths that were not asked.
            if key == metric or (not metric and length.isdigit() and value != -1):
                values[length if not metric else "score"].append(value)
    return {name: fmean(found) for name, found in values.items() if preset and len(found) == len(preset.tasks)}
