"""The long-context tasks: known answers through the real code, the originals' words, and memory that stays bounded."""

import functools
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.utils import is_hqq_available

from cream_peft import cli
from cream_peft.evals import answers as generation
from cream_peft.evals import tasks
from cream_peft.evals.kv_retrieval import PAPER_POSITIONS
from cream_peft.evals.longchat_lines import drawn_lines
from cream_peft.evals.needle import NEEDLE, split_sentences
from cream_peft.evals.perplexity import perplexity, windows
from cream_peft.evals.prompts import (
    WORDS,
    Case,
    Prompt,
    TaskError,
    Writer,
    contains_all,
    dump_prompts,
    first_integer,
    prompt_rng,
)
from cream_peft.evals.results import Results
from cream_peft.evals.rows import evaluate
from cream_peft.evals.tasks import TASKS as ALL_TASKS
from cream_peft.evals.tasks import Task
from cream_peft.model.base import load_base
from cream_peft.model.kv_cache import new_cache
from cream_peft.tiny import TINY_ID

CHAT = (
    "<s>{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is not false %} <think>{% endif %}{% endif %}"
)
SPREAD = {name: task for name, task in ALL_TASKS.items() if getattr(task, "grade", None) is contains_all}
"""The tasks whose answer is a list, found all over the text."""
TASKS = {name: task for name, task in ALL_TASKS.items() if isinstance(task, Task) and name not in SPREAD}
PROMPTS = ("kv_retrieval", "longchat_lines", "needle", "passkey")
kv_retrieval, needle, passkey = TASKS["kv_retrieval"], TASKS["needle"], TASKS["passkey"]
ENDS = re.compile(r"(?:Corresponding value:|REGISTER_CONTENT> is|\nAnswer:|The pass key is)(.*)", re.DOTALL)
"""How the prompts end: what follows is a reply."""
QUESTIONS = {
    "kv_retrieval": (r'Key: "(.*)"', r'"{}": "(.*?)"'),
    "longchat_lines": (r"in line (\S+)\?", r"line {}: REGISTER_CONTENT is <(\d+)>"),
    "needle": (r"magic number of (\w+)\?", r"magic number of {} is (\d+)\."),
    "multikey_needle": (r"magic number of (\w+)\?", r"magic number of {} is (\d+)\."),
    "passkey": (r"(pass key)\?", r"The {} is (\d+)\."),
}
"""What each question asks for, and where its answer stands: read out of the prompt as a model would have to."""


def bytes_tokenizer(chat_template=None):
    """One token a byte, <s> before every text."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    "name, end",
    [
        ("gptoss", "<|start|>assistant<|channel|>final<|message|>"),
        ("deepseek_r1_distill", "<think>\n\n</think>\n\n"),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n"),
        ("llama3_1", "<|end_header_id|>\n\n"),
    ],
)
def test_an_answer_begins_where_the_template_puts_it_and_never_with_thoughts(name, end):
    template = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    tokenizer = bytes_tokenizer(template.read_text(encoding="utf-8"))
    prompt = prompt_of("passkey", Writer(tokenizer), 4096, 0.5)
    assert prompt.text.endswith(end)
    for said, reply in zip(("The pass key is ", ""), prompt.replies, strict=True):
        before, answer = map(tokenizer.decode, reply)
        assert (before.strip(), answer.strip()) == (said.strip(), prompt.answer)


def test_a_template_that_refuses_a_plain_question_is_refused_with_the_remedy():
    tokenizer = bytes_tokenizer("{{ raise_exception('a system turn must come first') }}")
    with pytest.raises(TaskError, match=r"\(a system turn must come first\): use --style plain"):
        prompt_of("passkey", Writer(tokenizer), 4096, 0.5)


def prompt_of(task, writer, length, depth, index=0, seed=0, *, answer_tokens=None, depths=(), **options):
    asked = ALL_TASKS[task]
    usual = asked.answer_tokens if writer.style == "plain" else asked.sentence_tokens or asked.answer_tokens
    room = answer_tokens or usual
    return ALL_TASKS[task].prompt(writer, Case(length, depth, index, seed, room, depths), **options)


class Reader:
    """A model whose answers are known: right where `knows` says so of the answer's place in the prompt."""

    def __init__(self, tokenizer, task, knows=lambda place: True, reply=" {}\nand on it goes"):
        self.tokenizer, self.question, self.knows, self.reply = tokenizer, QUESTIONS[task], knows, reply
        self.device, self.config, self.fed, self.read = "cpu", None, [], []
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def __call__(self, input_ids, attention_mask, past_key_values, logits_to_keep, **others):
        self.read[past_key_values.get_seq_length() :] = input_ids[0].tolist()
        assert attention_mask.shape == (1, len(self.read)) and attention_mask.all()
        past_key_values.update(*torch.zeros(2, 1, 1, input_ids.shape[1], 1), 0)
        logits = torch.zeros(1, logits_to_keep, len(self.tokenizer))
        text = self.tokenizer.decode(self.read, skip_special_tokens=True)
        asked = list(re.finditer(self.question[0], text))
        end = ENDS.search(text, asked[-1].end()) if asked else None
        if end:
            answered = len(self.tokenizer(end.group(1), add_special_tokens=False)["input_ids"])
            if not answered:
                self.fed.append(len(self.read))
            found = re.search(self.question[1].format(re.escape(asked[-1].group(1))), text)
            answer = found.group(1) if self.knows(found.start() / end.start(1)) else "7"
            reply = self.tokenizer(self.reply.format(answer), add_special_tokens=False)["input_ids"]
            if answered < len(reply):
                logits[0, -1, reply[answered]] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.setattr(generation, "new_cache", lambda *arguments: DynamicCache())  # a Reader has no config


@pytest.fixture
def tokenizer():
    return bytes_tokenizer()


@pytest.fixture
def llama(make_model, tokenizer):
    def make(**changes):
        # Large weights, so that what is attended to, and from how far, decides the answer.
        settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "initializer_range": 0.3}
        return make_model(**(settings | changes)).eval()

    return make


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "knows, expected",
    [
        (lambda place: True, [1.0, 1.0, 1.0]),
        (lambda place: False, [0.0, 0.0, 0.0]),
        (lambda place: not 0.4 < place < 0.7, [1.0, 0.0, 1.0]),
    ],
    ids=["always right", "always wrong", "only at the ends"],
)
def test_accuracy_by_depth_has_the_known_answer(reading, tokenizer, task, knows, expected):
    model = Reader(tokenizer, task, knows)
    cells = list(TASKS[task](model, tokenizer, 3000, 5, 0, depths=[0.0, 0.5, 1.0]))
    assert [cell["value"] for cell in cells] == expected
    assert [cell["depth"] for cell in cells] == [0.0, 0.5, 1.0]
    for cell in cells:
        assert cell["metric"] == "accuracy" and cell["samples"] == 5 and cell["correct"].count("1") == 5 * cell["value"]
        assert 2800 < cell["tokens"] < 3000
    assert len(model.fed) == 15 and max(model.fed) < 3000


def test_an_answer_is_graded_by_its_first_line_and_its_first_number(reading, tokenizer):
    for reply, right in [("\n\n {}", 1.0), (" 12 or {}", 0.0), (" it is {}, not 12", 1.0), (" none\n{}", 0.0)]:
        model = Reader(tokenizer, "passkey", reply=reply)
        cells = passkey(model, tokenizer, 1000, 2, 0, depths=[0.5], answer_tokens=30)
        assert next(cells)["value"] == right, reply
    assert not first_integer("none", "5") and not first_integer("50", "5") and first_integer("is <00005>.", "5")


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_with_the_depths_that_are_missing(reading, tokenizer, task):
    def run(**options):
        return list(TASKS[task](Reader(tokenizer, task, lambda place: place < 0.5), tokenizer, 2000, 3, 0, **options))

    whole = run(depths=[0.2, 0.5, 0.9])
    assert run(depths=[0.2, 0.5, 0.9], done={0.2, 0.9}) == whole[1:2]
    assert run(depths=[0.2, 0.5], done={0.2, 0.5}) == []
    first = TASKS[task](Reader(tokenizer, task), tokenizer, 2000, 3, 0)
    assert next(first)["samples"] == 3  # a cell comes as soon as it is measured


@pytest.mark.parametrize("task", PROMPTS)
@pytest.mark.parametrize("style", ["plain", "chat", "vicuna"])
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(task, style):
    tokenizer = bytes_tokenizer(CHAT)
    writer = Writer(tokenizer, style)
    unit = {"kv_retrieval": 81, "longchat_lines": 60, "needle": 110, "passkey": 90}[task]
    for length in (1000, 2000, 4321, 20_000):
        prompt = prompt_of(task, writer, length, 0.5, answer_tokens=40)
        assert length - 40 - unit < len(prompt.tokens) <= length - 40
        assert prompt.tokens == tokenizer(prompt.text, add_special_tokens=style != "chat")["input_ids"]
        assert prompt.tokens.count(tokenizer.bos_token_id) == 1 and prompt.answer in prompt.text
    with pytest.raises(TaskError, match=r"length 60 is too short for 1 \w+: they take .* of at least") as error:
        prompt_of(task, writer, 60, 0.5, answer_tokens=40)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [name for name in ALL_TASKS if isinstance(ALL_TASKS[name], Task)])
@pytest.mark.parametrize("style", ["plain", "chat", "vicuna"])
def test_there_is_room_for_a_right_reply_in_any_form(task, style):
    asked = ALL_TASKS[task]
    room = asked.answer_tokens if style == "plain" else asked.sentence_tokens or asked.answer_tokens
    tokenizer = bytes_tokenizer(CHAT)
    for said, answer in prompt_of(
        task, Writer(tokenizer, style), 20_000, 0.5, answer_tokens=300, depths=(0.5,)
    ).replies:
        reply = tokenizer.decode(said + answer).strip()
        # A word is a token in any vocabulary, roughly; of what is drawn every character may be one.
        pieces = re.findall(r" ?[A-Z]?[a-z]{3,}(?![0-9])|\S", reply)
        assert len(pieces) <= room, (reply, len(pieces))


@pytest.mark.parametrize("task", PROMPTS)
def test_a_prompt_is_a_pure_function_of_seed_length_depth_and_index(tokenizer, task):
    def text(*place):
        return prompt_of(task, Writer(tokenizer), *place).text

    usual = text(1500, 0.5, 3, 7)
    text(1500, 0.5, 2, 7)
    torch.manual_seed(1)
    assert text(1500, 0.5, 3, 7) == usual
    for place in [(1600, 0.5, 3, 7), (1500, 0.9, 3, 7), (1500, 0.5, 4, 7), (1500, 0.5, 3, 8)]:
        assert text(*place) != usual


@pytest.mark.parametrize("task", PROMPTS)
def test_the_answer_stands_at_its_depth(tokenizer, task):
    for depth in (0.0, 0.3, 1.0):
        prompt = prompt_of(task, Writer(tokenizer), 8000, depth)
        asked = re.findall(QUESTIONS[task][0], prompt.text)[-1]
        found = re.search(QUESTIONS[task][1].format(asked), prompt.text)
        assert found.group(1) == prompt.answer
        assert found.start() / len(prompt.text) == pytest.approx(depth, abs=0.08)


def test_the_kv_prompt_is_lost_in_the_middles(tokenizer):
    prompt = prompt_of("kv_retrieval", Writer(tokenizer), 4000, 0.5, 0, 0, keys=3)
    pairs = re.findall(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"', prompt.text)
    (first, one), (second, two), (third, three) = pairs
    assert prompt.text == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        f'{{"{first}": "{one}",\n "{second}": "{two}",\n "{third}": "{three}"}}\n\n'
        f'Key: "{second}"\nCorresponding value:'
    )
    assert prompt.answer == two and len({first, second, third}) == 3
    assert json.loads(re.search(r"{.*}", prompt.text, re.DOTALL).group()) == dict(pairs)


def test_the_key_stands_before_the_json_too_if_asked_to(tokenizer):
    usual, aware = (
        prompt_of("kv_retrieval", Writer(tokenizer), 4000, 0.5, 0, 0, keys=3, query_aware=both)
        for both in (False, True)
    )
    key = re.findall('Key: "(.*)"', usual.text)
    first, rest = usual.text.split("\n\n", 1)
    assert len(key) == 1 and aware.text == f'{first}\n\nKey: "{key[0]}"\n\n{rest}' and aware.answer == usual.answer


def test_the_lines_prompt_is_longevals(tokenizer):
    prompt = prompt_of("longchat_lines", Writer(tokenizer), 4000, 1.0, 0, 0, lines=2)
    (first, one), (second, two) = re.findall(r"line ([a-z]+-[a-z]+): REGISTER_CONTENT is <(\d+)>\n", prompt.text)
    assert prompt.text == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        f"line {first}: REGISTER_CONTENT is <{one}>\nline {second}: REGISTER_CONTENT is <{two}>\n"
        f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {second}? I need the number."
        f" Line <{second}>: <REGISTER_CONTENT> is"
    )
    assert prompt.answer == two
    chat = prompt_of("longchat_lines", Writer(tokenizer, "vicuna"), 4000, 1.0, 0, 0, lines=2).text
    assert chat.startswith("A chat between a curious user and an artificial intelligence assistant. The assistant ")
    assert "user's questions. USER: Below is a record" in chat and chat.endswith("I need the number. ASSISTANT:")
    names = [name for name, _ in drawn_lines(prompt_rng("longchat_lines", 0))(13_000)]
    assert len(set(names)) == 13_000 > len(WORDS["adjectives"]) * len(WORDS["nouns"])


def solved(task, text):
    """The answer to a prompt of a spread task, found in its text in another way than it was made."""
    if task == "common_words":
        counts = Counter(re.findall(r"\d+\. (\S+)", text))
        often = sorted(counts.values())
        assert often[-10] == often[-1] > 4 * often[-11]
        return {word for word, _ in counts.most_common(10)}
    if task == "frequent_words":
        counts = Counter(text.split("coded words. ")[1].split("\nQuestion")[0].split()).most_common(5)
        assert counts[0][0] == "..." and counts[3][1] > counts[4][1]  # no tie
        return {word for word, _ in counts[1:4]}
    if task == "variable_tracking":
        held = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text))
        return {name for name in held if re.search(r"the value (\d+) in", text).group(1) in chain(held, name)}
    cities = re.findall(r"[A-Z]\w+", text.rsplit("magic numbers of ", 1)[1].split("?")[0])
    return {number for city in cities for number in re.findall(rf"magic numbers? of {city} is (\d+)\.", text)}


def chain(held, name):
    while name in held:
        name = held[name]
    return [name]


@pytest.mark.parametrize("task", SPREAD)
def test_what_is_spread_over_a_text_is_what_a_list_is_asked_of(tokenizer, task):
    writer, texts = Writer(tokenizer), set()
    for length in (2000, 9000, 20_000):
        for index in range(2):
            prompt = prompt_of(task, writer, length, 1.0, index, answer_tokens=130)
            assert solved(task, prompt.text) == set(prompt.answer.split(", "))
            assert len(prompt.answer.split(", ")) == {"multi": 4, "varia": 5, "commo": 10, "frequ": 3}[task[:5]]
            assert length - 130 - 150 < len(prompt.tokens) <= length - 130
            assert prompt_of(task, writer, length, 1.0, index, answer_tokens=130) == prompt
            texts.add(prompt.text)
    assert len(texts) == 6
    places = [prompt.text.index(item) / len(prompt.text) for item in prompt.answer.split(", ")]
    assert max(places) < 0.99 and (task in ("common_words", "frequent_words") or max(places) - min(places) > 0.2)
    with pytest.raises(TaskError, match=r"length 200 is too short for 1 \w+: they take"):
        prompt_of(task, writer, 200, 1.0)


@pytest.mark.parametrize("task", SPREAD)
def test_a_list_is_right_if_nothing_of_it_is_missing(monkeypatch, tokenizer, task):
    def answers(lacking, joined):
        def reply(model, tokenizer, prompts, one_line, **settings):
            assert not one_line  # an item a line is a list too
            for prompt in prompts:
                yield joined.join(sorted(solved(task, prompt.text))[lacking:]), [0.5]

        monkeypatch.setattr(tasks, "scored_answers", reply)
        return list(SPREAD[task](None, tokenizer, 3000, 3, 0))

    (cell,) = answers(0, "\n- ")
    assert cell["value"] == 1.0 and cell["depth"] == 1.0 and cell["correct"] == "111"
    assert answers(1, ", ")[0]["value"] == 0.0 and answers(0, "")[0]["value"] == 0.0
    assert list(SPREAD[task](None, tokenizer, 3000, 3, 0, done={1.0})) == []


def test_the_passkey_prompt_is_landmark_attentions(tokenizer):
    prompt = prompt_of("passkey", Writer(tokenizer), 700, 0.5, 0, 0)
    idle = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    before, after = " ".join([idle] * 2), " ".join([idle] * 2)
    assert prompt.extra == {"repeats": 4}
    assert prompt.text == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        f"about the important information there.\n{before}\nThe pass key is {prompt.answer}. Remember it. "
        f"{prompt.answer} is the pass key.\n{after}\nWhat is the pass key? The pass key is"
    )
    assert 1 <= int(prompt.answer) <= 50_000


def test_a_chat_model_is_asked_in_its_template_without_a_lead_or_a_think():
    prompt = prompt_of("passkey", Writer(bytes_tokenizer(CHAT)), 900, 0.5, 0, 0)
    assert prompt.text.startswith("<s>[user] There is") and prompt.text.endswith("What is the pass key?\n[assistant]")
    with pytest.raises(TaskError, match="use style=plain"):
        Writer(bytes_tokenizer(), "chat")
    with pytest.raises(TaskError, match="use one of auto, chat, plain, vicuna"):
        Writer(bytes_tokenizer(), "base")


@pytest.mark.parametrize("keys, length", [(75, 8000), (140, 16_000)])
def test_the_papers_keys_are_asked_at_the_papers_places(reading, tokenizer, keys, length):
    cells = kv_retrieval(Reader(tokenizer, "kv_retrieval"), tokenizer, length, 1, 0, keys=keys)
    depths = [cell["depth"] for cell in cells]
    places = [
        prompt_of("kv_retrieval", Writer(tokenizer), length, depth, 0, 0, keys=keys).extra["position"]
        for depth in depths
    ]
    assert tuple(places) == PAPER_POSITIONS[keys]
    with pytest.raises(TaskError, match=f"length 4,000 is too short for {keys} keys"):
        prompt_of("kv_retrieval", Writer(tokenizer), 4000, 0.5, 0, 0, keys=keys)


@pytest.mark.parametrize("option", [{"samples": 0}, {"chunk_length": 0}, {"depths": [1.5]}])
def test_options_out_of_range_are_refused(tokenizer, option):
    settings = {"samples": 1, "depths": [0.5]} | option
    with pytest.raises(TaskError, match="at least 1, and depths between 0 and 1"):
        next(passkey(None, tokenizer, 1000, seed=0, **settings))


def test_a_text_that_ends_in_blanks_is_a_haystack_from_wherever_it_begins(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("One. Two. Three. \n\n")
    prompts = [
        prompt_of("needle", Writer(tokenizer), 600, depth, index, sentences=split_sentences(tmp_path / "text.txt"))
        for index in range(20)
        for depth in (0.0, 0.5, 1.0)
    ]
    # The answer has 50 tokens.
    assert all(540 < len(prompt.tokens) <= 550 for prompt in prompts)


def test_the_haystack_is_the_users_own_if_given(reading, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("One ship came. Two left!\n\nNo more? ", encoding="utf-8")
    (tmp_path / "b.md").write_text("The end.", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    sentences = split_sentences(tmp_path)
    assert "".join(sentences) == "One ship came. Two left!\n\nNo more? The end." and len(sentences) == 5
    prompt = prompt_of("needle", Writer(tokenizer), 1000, 0.5, 0, 0, sentences=sentences)
    assert prompt.text.count("One ship came.") > 10
    cells = needle(Reader(tokenizer, "needle"), tokenizer, 1000, 1, 0, depths=[0.5], haystack=tmp_path / "a.txt")
    assert next(cells)["value"] == 1.0
    (tmp_path / "marked.txt").write_text("One. Two.", encoding="utf-8-sig")
    assert split_sentences(tmp_path / "marked.txt") == ["One.", " Two."]
    (tmp_path / "wide.txt").write_text("One. Two.", encoding="utf-16-le")
    for path, text in [(name, "no text that can be read") for name in ("none.txt", "c.bin", "wide.txt")]:
        with pytest.raises(TaskError, match=text):
            split_sentences(tmp_path / path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match="holds no text"):
        split_sentences(tmp_path / "empty")
    with pytest.raises(TaskError, match="no place for the answer"):
        next(needle(None, tokenizer, 1000, 1, 0, needle="Nothing to see."))


def test_every_city_of_a_multikey_text_has_a_number_of_its_own_at_its_depth(tokenizer):
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts = [prompt_of("multikey_needle", Writer(tokenizer), 6000, depth, 0, 0, depths=depths) for depth in depths]
    texts = {prompt.text.split("\n\nWhat is")[0] for prompt in prompts}
    assert len(texts) == 1  # the same text for every depth
    found = dict(re.findall(r"magic number of (\w+) is (\d+)\.", texts.pop()))
    asked = [re.search(r"What is the special magic number of (\w+)\?", prompt.text).group(1) for prompt in prompts]
    assert list(found) == asked and len(set(found.values())) == 5
    assert [found[city] for city in asked] == [prompt.answer for prompt in prompts]
    for depth, prompt in zip(depths, prompts, strict=True):
        assert prompt.text.index(prompt.answer) / len(prompt.text) == pytest.approx(depth, abs=0.04)
    other = prompt_of("multikey_needle", Writer(tokenizer), 6000, 0.5, 1, 0, depths=depths)
    assert other.text != prompts[2].text
    with pytest.raises(TaskError, match="32 cities"):
        next(TASKS["multikey_needle"](None, tokenizer, 6000, 1, 0, depths=[place / 40 for place in range(33)]))


def test_a_multikey_text_is_read_once(llama, tokenizer):
    model, rows = llama(), []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[1]))
    settings = {"depths": [0.1, 0.5, 0.9], "answer_tokens": 6, "chunk_length": 256}
    cells = list(TASKS["multikey_needle"](model, tokenizer, 1500, 1, 0, **settings))
    hook.remove()
    assert len(cells) == 3 and cells[0]["tokens"] > 1300 and sum(rows) < 2200


def test_the_embedded_haystack_has_no_number_but_the_needles(tokenizer):
    text = prompt_of("needle", Writer(tokenizer), 60_000, 0.5, 0, 0).text
    assert len(re.findall(r"\d+", text)) == 1 and "{" not in text
    found = re.findall(r"[^.!?\n]+[.!?]", text)
    assert len(WORDS["sentences"]) >= 60 and len(set(found)) > 0.7 * len(found) > 400
    assert NEEDLE.split("{")[0] in text


@pytest.mark.parametrize("task", [*TASKS.values(), *SPREAD.values(), functools.partial(perplexity, text=["some text"])])
def test_a_model_that_reads_no_text_is_refused(tiny_tokenizer, task):
    # The embedded model has a form of its own for these two.
    if task not in (kv_retrieval, needle):
        with pytest.raises(TaskError, match="does not read text"):
            next(task(None, tiny_tokenizer, 1000, 1, 0))
    silent = bytes_tokenizer()
    silent.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    with pytest.raises(TaskError, match=r"does not read text|is more than the text holds"):
        next(task(None, silent, 1000, 1, 0))


def test_prompts_are_dumped_as_json_lines(tokenizer, tmp_path):
    prompts = [prompt_of("kv_retrieval", Writer(tokenizer), 1000, depth, 0, 0) for depth in (0.0, 1.0)]
    dump_prompts(prompts, tmp_path / "prompts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [prompt.text for prompt in prompts]
    assert set(rows[0]) == {"text", "answer", "depth", "tokens", "keys", "position"}
    assert rows[1]["depth"] == 1.0 and rows[1]["tokens"] == len(prompts[1].tokens)


def greedy(model, prompt, count):
    """The plainest greedy answer: the whole sequence through the model for every token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def answer_to(model, tokenizer, prompt, kv_cache="default", **settings):
    """The answer to one prompt that nothing is read of yet."""
    return generation.greedy_answer(model, tokenizer, prompt, new_cache(model.config, kv_cache), **settings)


def asked(tokens, said, answer):
    return Prompt("", tokens, "", [(said, answer)], 0.5, {})


def random_prompts(*lengths, highest=250):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, highest, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scaling", [None, "yarn"])
def test_chunked_prefill_answers_as_the_whole_forward_does(llama, tokenizer, attention, scaling):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if scaling:
        rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    model = llama(attn_implementation=attention, rope_parameters=rope)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    prompts = random_prompts(5, 90, 70, 64)
    expected = [tokenizer.decode(greedy(model, prompt, 8)).strip() for prompt in prompts]
    for chunk_length in (16, 64, 1024):
        settings = {"answer_tokens": 8, "chunk_length": chunk_length}
        assert [answer_to(model, tokenizer, prompt, **settings) for prompt in prompts] == expected
    numbers, shifts, forward = [], [0], model.model.forward

    def watched(*arguments, **options):
        assert options["attention_mask"].all()
        numbers.extend(options["position_ids"][0].tolist())
        options["position_ids"] = options["position_ids"] * shifts[-1] if shifts[-1] else options["position_ids"]
        return forward(*arguments, **options)

    model.model.forward = watched
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answer_to(model, tokenizer, prompt, answer_tokens=8, chunk_length=16) == answer
        assert numbers == list(range(len(prompt) + 7))
        numbers.clear()
    shifts.append(3)
    moved = [answer_to(model, tokenizer, prompt, answer_tokens=8) for prompt in prompts]
    assert moved != expected  # control: the positions matter


def test_one_read_of_a_shared_document_answers_as_one_read_each(llama, tokenizer):
    model = llama()
    options = {"depths": [0.1, 0.5, 0.9], "chunk_length": 128, "answer_tokens": 12}
    rows = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[1]))
    writer, words = Writer(tokenizer), tokenizer(" 17", add_special_tokens=False)["input_ids"]
    prompts = [prompt_of("kv_retrieval", writer, 1200, depth, answer_tokens=12).tokens for depth in options["depths"]]
    settings = {"answer_tokens": 12, "chunk_length": 128}
    apart = [answer_to(model, tokenizer, prompt, **settings) for prompt in prompts]
    fed_apart = sum(rows)
    rows.clear()

    def read_once():
        together = [asked(prompt, [], words) for prompt in prompts]
        return [reply for reply, _ in generation.scored_answers(model, tokenizer, together, **settings)]

    assert read_once() == apart
    assert sum(rows) < 0.5 * fed_apart
    hook.remove()
    once = list(kv_retrieval(model, tokenizer, 1200, 2, 0, **options))
    assert once == list(replace(kv_retrieval, shared_document=False)(model, tokenizer, 1200, 2, 0, **options))
    if is_hqq_available():
        settings["kv_cache"] = "quantized"
        assert read_once()[0] == answer_to(model, tokenizer, prompts[0], **settings)


@pytest.mark.parametrize("template, blank", [(None, ""), (CHAT, " "), (CHAT.replace("] {{", "]{{"), "")])
@pytest.mark.parametrize("task", ["kv_retrieval", "needle"])
def test_the_loss_of_the_right_answer_is_that_of_a_plain_forward(llama, task, template, blank):
    model, tokenizer = llama(), bytes_tokenizer(template)
    said = {"kv_retrieval": 'The value of "{}" is "', "needle": "The special magic number of {} is "}[task]
    options = {"depths": [0.1, 0.9], "chunk_length": 128}
    cells = list(TASKS[task](model, tokenizer, 1200, 2, 0, **options))
    for cell in cells:
        for index, loss in enumerate(cell["answer_loss"]):
            prompt = prompt_of(task, Writer(tokenizer), 1200, cell["depth"], index)
            asked = re.findall(QUESTIONS[task][0], prompt.text)[-1]
            # A base model's answer follows its lead at once; a chat model's stands in a sentence.
            forms = [blank + said.format(asked), blank] if template else [" "]
            assert [[tokenizer.decode(part) for part in reply] for reply in prompt.replies] == [
                [before, prompt.answer] for before in forms
            ]
            losses = []
            for before, answer in prompt.replies:
                ids = torch.tensor([prompt.tokens + before + answer])
                with torch.no_grad():
                    logits = model(ids).logits[0, -len(answer) - 1 : -1]
                losses.append(functional.cross_entropy(logits, ids[0, -len(answer) :]).item())
            # Of the form that the model finds likelier: no form that it was trained to answer in is marked wrong.
            assert loss == pytest.approx(min(losses), abs=1e-3) and len(set(losses)) == len(forms)
            # And, of a chat model, of the answer alone.
            alone = cell["alone_loss"][index] if template else loss
            assert alone == pytest.approx(losses[-1], abs=1e-3) and ("alone_loss" in cell) == bool(template)
    assert len({loss for cell in cells for loss in cell["answer_loss"]}) == 4  # control: it is each question's own


def test_rows_for_pandas_hold_a_number_or_a_word_in_every_column(llama):
    rows = evaluate(llama(), bytes_tokenizer(CHAT), ["needle"], [1200], samples=2, depths=[0.1, 0.9])
    assert len(rows) == 2 and all(row["alone_loss"] >= row["answer_loss"] > 0 for row in rows)
    assert all(isinstance(value, int | float | str) for row in rows for value in row.values())


def test_a_penalty_that_a_checkpoint_brings_is_not_applied(llama, tokenizer):
    model, (prompt,) = llama(), random_prompts(40)
    usual = answer_to(model, tokenizer, prompt, answer_tokens=10)
    model.generation_config.repetition_penalty = 50.0
    assert answer_to(model, tokenizer, prompt, answer_tokens=10) == usual
    ids = torch.tensor([prompt])
    penalised = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(penalised[0, 40:], skip_special_tokens=True).strip() != usual  # control


def test_a_reply_ends_at_the_end_token_or_after_its_first_line(llama, tokenizer):
    model, (prompt,) = llama(), random_prompts(30)
    tokens = []
    script = iter([tokenizer("\n 42\n13")["input_ids"][1:], [*tokenizer(" 42")["input_ids"][1:], 1, 50, 51]])

    def say(one_line):
        said = iter(next(script))

        def head(module, arguments, output):
            tokens.append(next(said, 60))
            return functional.one_hot(torch.tensor([[tokens[-1]]]), output.shape[-1]).float()

        hook = model.lm_head.register_forward_hook(head)
        found = answer_to(model, tokenizer, prompt, answer_tokens=20, one_line=one_line)
        hook.remove()
        return found

    assert say(True) == "42" and len(tokens) == 5
    tokens.clear()
    assert say(False) == "42" and len(tokens) == 4


def test_adapters_on_a_4_bit_base_are_read_through(lora, tiny_tokenizer):
    model = get_peft_model(load_base(TINY_ID, load_in_4bit=True), lora(init_lora_weights=False)).eval()
    prompt = random_prompts(150, highest=380)[0]
    with model.disable_adapter():
        plain = greedy(model, prompt, 6)
    expected = greedy(model, prompt, 6)
    assert expected != plain  # control: the adapter matters
    found = answer_to(model, tiny_tokenizer, prompt, answer_tokens=6, chunk_length=64)
    assert found == tiny_tokenizer.decode(expected, skip_special_tokens=True).strip()


class Peak(TorchDispatchMode):
    """The most elements that any one tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_logits_are_made_for_a_whole_prompt(make_model, tokenizer):
    vocabulary, length, chunk_length = 4000, 1024, 128
    model = make_model(vocab_size=vocabulary, max_position_embeddings=4096, attn_implementation="sdpa").eval()
    rows, fed = [], []
    model.lm_head.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[:-1].numel()))
    model.model.layers[0].register_forward_pre_hook(lambda module, given: fed.append(given[0].shape[1]))
    prompt = random_prompts(length)[0]
    with Peak() as answering:
        answer_to(model, tokenizer, prompt, answer_tokens=2, chunk_length=chunk_length)
    assert set(rows) == {1} and max(fed) == chunk_length
    fed.clear()
    twice = [asked(prompt, [], [5, 6, 7])] * 2
    list(generation.scored_answers(model, tokenizer, twice, answer_tokens=1, chunk_length=99))
    # The document once; for each question the rows of its answer, and one to generate from.
    assert set(rows) == {1, 3} and sum(fed) == length - 1 + 2 * (3 + 1) and max(fed) == 99
    rows.clear()
    with Peak() as scoring:
        text = [tokenizer.decode(random_prompts(length)[0], skip_special_tokens=True)]
        cell = next(perplexity(model, tokenizer, length, 1, 0, text=text, chunk_length=chunk_length))
    assert max(rows) == chunk_length and cell["samples"] >= length
    with Peak() as naive:
        model(input_ids=torch.tensor([prompt]))
    whole = length * vocabulary
    assert naive.elements >= whole  # control: what the bound is there to catch
    assert answering.elements < whole / 4 and scoring.elements <= whole / 4


def test_every_token_is_scored_once_in_full_windows():
    cases = [(100, 32, 16, 1), (100, 32, 5, 0), (33, 32, 31, 1), (32, 32, 16, 0), (50, 32, 31, 1)]
    for count, length, stride, start in cases:
        scored, sizes = [], []
        for begin, end, new in windows(count, length, stride, start):
            scored += range(end - new, end)
            sizes.append(end - begin + start)
            assert begin == 0 or end - new - begin + start == length - stride
        assert scored == list(range(1 - start, count))
        assert max(sizes) == min(length, count + start) and all(size == length for size in sizes[:-1])


def nats_of(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    return functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()


@pytest.mark.parametrize("rows", [7, 256])
def test_perplexity_is_that_of_a_plain_forward_over_each_window(monkeypatch, llama, tokenizer, rows):
    monkeypatch.setattr(sys.modules["cream_peft.evals.perplexity"], "ROWS", rows)
    model = llama()
    text = tokenizer.decode(random_prompts(200, highest=90)[0])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 200

    def measured(length, **options):
        (cell,) = perplexity(model, tokenizer, length, 1, 0, text=[text], chunk_length=24, **options)
        assert cell["metric"] == "perplexity" and cell["depth"] == 1.0 and cell["samples"] == 200
        return cell["value"]

    whole = nats_of(model, [0, *ids])
    whole = whole[:199] + nats_of(model, [0, *ids[199:]])
    assert measured(200, stride=199) == pytest.approx(math.exp(sum(whole) / 200), rel=1e-5)
    slid = nats_of(model, [0, *ids[:63]])
    for end in range(79, 200, 16):
        slid += nats_of(model, [0, *ids[end - 63 : end]])[-16:]
    slid += nats_of(model, [0, *ids[144:200]])[-(200 - len(slid)) :]
    assert len(slid) == 200
    assert measured(64, stride=16) == pytest.approx(math.exp(sum(slid) / 200), rel=1e-5)
    assert measured(64, stride=16) != pytest.approx(measured(200, stride=199), rel=1e-2)
    tokenizer.bos_token = None  # as Qwen: no token before the first, which then is not scored
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    (cell,) = perplexity(model, tokenizer, 200, 1, 0, text=[text], chunk_length=24)
    assert cell["samples"] == 199 and cell["value"] == pytest.approx(math.exp(sum(nats_of(model, ids)) / 199), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(llama, tokenizer, tmp_path):
    model = llama()
    model.lm_head.weight.data.zero_()
    (tmp_path / "text.txt").write_text("to be or not to be " * 20, encoding="utf-8")
    (cell,) = perplexity(model, tokenizer, 64, 1, 0, text=tmp_path / "text.txt")
    assert cell["value"] == pytest.approx(len(tokenizer)) and cell["samples"] == 380
    assert list(perplexity(model, tokenizer, 64, 1, 0, text=tmp_path / "text.txt", done={1.0})) == []


def test_models_of_other_windows_are_scored_on_the_same_documents(llama, tokenizer, tmp_path, capsys):
    for window in (64, 256):
        llama(max_position_embeddings=window).save_pretrained(tmp_path / str(window))
        tokenizer.save_pretrained(tmp_path / str(window))
    (tmp_path / "texts").mkdir()
    for name, count in (("a", 700), ("b", 3000)):
        (tmp_path / "texts" / f"{name}.txt").write_text(name * count, encoding="utf-8")
    models = [str(tmp_path / "64"), str(tmp_path / "256")]
    line = [
        "--tasks",
        "perplexity",
        "--text",
        str(tmp_path / "texts"),
        "--output_dir",
        str(tmp_path / "found"),
        "--no_4bit",
    ]
    assert cli.main(["evaluate", *line, "--compare", *models]) == 0
    short, long = (Results.read(tmp_path / "found" / f"{window}.json") for window in (64, 256))
    shared = {cell.length for cell in short.cells} & {cell.length for cell in long.cells}
    values = [{cell.length: cell.value for cell in one.cells if cell.length in shared} for one in (short, long)]
    assert shared == {256, 512} and values[0] == pytest.approx(values[1])
    # The same name is not the same text, nor the same model.
    capsys.readouterr()
    (tmp_path / "texts" / "b.txt").write_text("c" * 3000, encoding="utf-8")
    assert cli.main(["evaluate", *line, "--compare", *models]) == 2
    assert "was measured with other settings, text_sha256 of perplexity" in capsys.readouterr().err
    (tmp_path / "texts" / "b.txt").write_text("b" * 3000, encoding="utf-8")
    assert cli.main(["evaluate", *line, "--compare", *models]) == 0
    llama(seed=1, max_position_embeddings=64).save_pretrained(tmp_path / "64")
    assert cli.main(["evaluate", *line, "--compare", *models]) == 2
    assert "was measured with other settings, base_sha256" in capsys.readouterr().err


def test_models_that_read_other_tokens_are_not_compared_one_by_one(llama, tmp_path, capsys):
    forms = {"plain": None, "again": None, "chat": CHAT}
    for name, template in forms.items():
        llama().save_pretrained(tmp_path / name)
        bytes_tokenizer(template).save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("to be or not to be " * 99, encoding="utf-8")
    line = ["evaluate", "--tasks", "longchat_lines", "perplexity", "--text", str(tmp_path / "text.txt"), "--no_4bit"]
    line += ["--lengths", "800", "--samples", "4", "--compare", *(str(tmp_path / name) for name in forms)]

    def found(folder, *options):
        written = tmp_path / f"{folder}.json"
        assert cli.main([*line, "--output_dir", str(tmp_path / folder), "--json", str(written), *options]) == 0
        pairs = [(one["task"], one["model"]) for one in json.loads(written.read_text())["comparisons"]]
        return pairs, capsys.readouterr().out

    pairs, told = found("auto")
    assert pairs == [("longchat_lines", "again")]
    # Documents are read without a template.
    assert "Not compared one by one with plain: chat, which" in told and "chat has a perplexity of " in told
    pairs, told = found("asked", "--style", "plain")
    assert pairs == [("longchat_lines", "again"), ("longchat_lines", "chat")] and "Not compared" not in told
    # Another tokenizer.
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens(["to be"])
    llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    pairs, told = found("other")
    assert pairs == [("longchat_lines", "again")] and "chat has a perplexity of " not in told
    assert told.count("Not compared one by one with plain: chat, which") == 2


def test_perplexity_is_measured_at_its_length_or_refused(llama, tokenizer):
    model, texts = llama(), ["a" * 100, "b" * 300, "c" * 50]
    counts = {}
    for least in (None, 300):
        (cell,) = perplexity(model, tokenizer, 64, 9, 0, text=texts, min_tokens=least)
        counts[least] = cell["samples"]
    assert counts == {None: 400, 300: 300}
    assert next(perplexity(model, tokenizer, 64, 9, 0, text=texts, max_tokens=80))["samples"] == 160
    for options, line in [
        ({"length": 301, "text": texts}, "length 301 is more than the text holds: its longest document has 300 tokens"),
        ({"length": 64}, "set text to a file"),
        ({"length": 64, "text": texts, "stride": 64}, "stride=64 must be between 1 and 63"),
    ]:
        with pytest.raises(TaskError, match=line):
            next(perplexity(model, tokenizer, options.pop("length"), 1, 0, **options))


def test_the_papers_figures_agree_with_their_printed_means():
    import cream_peft.evals

    folder = cream_peft.evals.__path__[0]
    with open(f"{folder}/paper.json", encoding="utf-8") as file:
        paper = json.load(file)
    lines, keys = paper["longchat_lines"], paper["kv_retrieval"]
    assert len(lines["lengths"]) == 17 and lines["lengths"][-1] == 32_000
    tables = [lines, keys["75"], keys["140"]]
    off = []
    for table in tables:
        for name, mean in table["mean"].items():
            row = table["accuracy"][name]
            assert len(row) == len(table.get("lengths", table.get("positions")))
            off += [name] if abs(sum(row) / len(row) - mean) > 6e-4 else []
    assert off == ["cream-ntk"]  # the paper's own slip: 29.9 is printed, the row gives 31.0
    assert {int(count): tuple(keys[count]["positions"]) for count in ("75", "140")} == PAPER_POSITIONS
