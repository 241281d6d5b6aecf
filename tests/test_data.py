import json
import re
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils
from trl.chat_template_utils import get_training_chat_template

from cream_peft import CREAMTrainer, cli
from cream_peft.train import data, tokenised
from cream_peft.train.data import load_data, prepare_columns
from cream_peft.train.files import load_documents
from cream_peft.train.messages import TEXT_OF_A_CALL, pair_of, to_messages
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.rows import DataError, RowError, find_problems
from cream_peft.train.templates import answer_spans, is_marked, parts_not_written, with_answer_masks
from cream_peft.train.tokenised import fit_short_documents

# The chat template of meta-llama/Llama-2-7b-chat-hf in other words: same output, no generation marks.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = '<<SYS>>\\n' + "
    "messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "((sys if loop.index0 == 0 else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# SmolLM2-135M-Instruct's in other words.
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONVERSATION = [
    {"from": "human", "value": "Which king?"},
    {"from": "gpt", "value": "Lear."},
    {"from": "human", "value": "And then?"},
    {"from": "gpt", "value": "Storm."},
]


def test_sharegpt_turns_become_messages():
    messages = to_messages([{"from": "gpt", "value": "Hello!"}, *CONVERSATION, {"from": "human", "value": "Why?"}])
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"] == "Lear."
    assert to_messages([*CONVERSATION[:2], *CONVERSATION[:1]]) == to_messages(CONVERSATION[:2])
    assert to_messages(CONVERSATION, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    parts = [CONVERSATION[0], {"role": "assistant", "content": [{"type": "text", "text": "Le"}, {"text": "ar."}]}]
    assert to_messages(parts) == to_messages(CONVERSATION[:2])


def test_tool_calls_and_their_answers_stay():
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": None}}}
    turns = [
        {"role": "user", "content": "1 + 1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_calls": None, "name": "sum"},
        {"role": "assistant", "content": "It is 2.", "tool_calls": None},
    ]
    messages = to_messages(turns)
    assert [turn["role"] for turn in messages] == ["user", "assistant", "tool", "assistant"]
    # The null is Arrow's: no caller wrote it.
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert messages[0] == {"role": "user", "content": "1 + 1?"} and messages[2]["name"] == "sum"
    assert to_messages([*turns[:2], {**turns[2], "content": ""}, turns[3]])[2]["content"] == ""
    # A log that ends at the tool's result, or at the next question, teaches the call.
    for end in (turns[:3], [*turns[:3], turns[2]], [*turns[:3], turns[0]]):
        assert to_messages(end) == messages[:2]


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize(
    ("written", "meant"),
    [('{"city": "Rome"}', {"city": "Rome"}), ({"city": "Rome"}, {"city": "Rome"}), ("", {}), ("null", {}), (None, {})],
)
def test_arguments_of_a_tool_call_as_json_text_are_read(written, meant, is_flat):
    function = {"name": "look", "arguments": written}
    turn = {"role": "assistant", "content": "", "tool_calls": [function if is_flat else {"function": function}]}
    (call,) = to_messages([CONVERSATION[0], turn])[-1]["tool_calls"]
    assert call.get("function", call)["arguments"] == meant


USER, ANSWER = CONVERSATION[:2]
WRONG_TURNS = [
    (None, "holds no turn"),
    ([], "holds no turn"),
    ([None, ANSWER], "no mapping of role and content"),
    (["hello"], "no mapping of role and content"),
    ([USER], "no turn of the assistant answers"),
    ([ANSWER], "no turn of the assistant answers"),
    ([USER, USER, ANSWER], "turns out of order: user after user"),
    ([USER, ANSWER, ANSWER], "turns out of order: assistant after assistant"),
    ([USER, {"role": "system", "content": "x"}, ANSWER], "turns out of order: system after user"),
    ([USER, ANSWER, {"role": "system", "content": "x"}], "turns out of order: system after assistant"),
    ([{"from": "robot", "value": "x"}, ANSWER], "unknown role 'robot'"),
    ([{"role": None, "content": "x"}, ANSWER], "unknown role None"),
    ([{"role": 3, "content": "x"}, ANSWER], "unknown role 3"),
    ([{"role": "user", "content": " "}, ANSWER], "an empty user turn"),
    ([{"role": "user", "content": None}, ANSWER], "a turn of the user without content"),
    ([USER, {"role": "assistant", "text": "x"}], "a turn of the assistant without content"),
    ([{"from": "human", "value": ""}, ANSWER], "an empty user turn"),
    ([USER, {"role": "assistant", "content": ""}], "an empty assistant turn"),
    ([{"role": "user", "content": 7}, ANSWER], "the content of a turn is int, not text"),
    ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ANSWER], "holds image content"),
    ([USER, {**ANSWER, "weight": 0}], "a turn has a weight"),
    ([USER, {**ANSWER, "train": False}], "a turn has a train"),
    ([USER, {**ANSWER, "loss": False}], "a turn has a loss"),
    ([USER, {**ANSWER, "tool_calls": ["look"]}], "a tool call is no mapping"),
    ([USER, {**ANSWER, "tool_calls": [{"function": {"arguments": "Rome"}}]}], "arguments of a tool call are no JSON"),
]


def test_an_empty_system_turn_is_none():
    assert to_messages([{"role": "system", "content": " "}, USER, ANSWER]) == to_messages([USER, ANSWER])
    assert to_messages([{"role": "system", "content": ""}, USER, ANSWER], "Be brief.")[0]["content"] == "Be brief."


@pytest.mark.parametrize(("turns", "reason"), WRONG_TURNS)
def test_a_conversation_that_cannot_be_one_says_why(turns, reason):
    with pytest.raises(RowError, match=reason):
        to_messages(turns)


def test_files_folders_and_saved_data_sets_are_loaded(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "long.txt").write_text("line one\nline two\n")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        assert load_documents(str(tmp_path / name))["text"][:] == ["one", "two"], name
    assert load_documents(str(tmp_path / "long.txt"))["text"][0].startswith("line one\nline two")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(json.dumps(rows[0]))
    assert load_documents(str(tmp_path / "folder"))["text"][:] == ["one"]
    with pytest.raises(DataError, match="no split 'test'"):
        load_documents(str(tmp_path / "saved"), "test")
    with pytest.raises(DataError, match="no such file"):
        load_documents(str(tmp_path / "absent.jsonl"))


def test_columns_are_recognised_and_others_named(tiny_tokenizer, byte_tokenizer):
    tokenised = Dataset.from_dict({"input_ids": [[1, 2]], "attention_mask": [[1, 1]], "labels": [[1, 2]]})
    ids = prepare_columns(tokenised, "d", tiny_tokenizer)
    assert sorted(ids.column_names) == ["input_ids", "labels"]
    texts = prepare_columns(Dataset.from_dict({"text": ["a"], "meta": [1]}), "d", byte_tokenizer)
    assert texts.column_names == ["text"]
    with pytest.raises(DataError, match=r"columns body, meta.*input_ids, messages, conversations"):
        prepare_columns(Dataset.from_dict({"body": ["a"], "meta": [1]}), "d", tiny_tokenizer)
    chats = Dataset.from_dict({"conversations": [CONVERSATION, CONVERSATION[:1]], "id": [1, 2]})
    with pytest.raises(DataError, match="no chat template"):
        prepare_columns(chats, "d", byte_tokenizer)
    byte_tokenizer.chat_template = LLAMA_2
    assert len(prepare_columns(chats, "d", byte_tokenizer)) == 1
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used: no turn of the assistant.*the first is row 1"):
        prepare_columns(chats.select([1]), "d", byte_tokenizer)


FAMILIES = Path(chat_template_utils.__file__).parent / "chat_templates"


def marked(tokenizer, rows, completion_only=False):
    """The text of the tokens that are marked as answers, of each row."""
    return [
        tokenizer.decode([token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask])
        for row in with_answer_masks(Dataset.from_list(rows), tokenizer, completion_only)
    ]


@pytest.mark.parametrize("system", [None, " Be brief. "])
@pytest.mark.parametrize(
    "name", ["llama3", "cohere", "gemma3", "lfm2", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"]
)
def test_answers_are_found_where_trls_training_templates_have_them(name, system, byte_tokenizer):
    turns = to_messages([*CONVERSATION[:3], {"from": "gpt", "value": "Stürm!\nA <storm>."}], system=system)
    byte_tokenizer.chat_template = (FAMILIES / f"{name}.jinja").read_text()
    (ours,) = marked(byte_tokenizer, [{"messages": turns}])
    found = byte_tokenizer.apply_chat_template(
        turns, chat_template=(FAMILIES / f"{name}_training.jinja").read_text(), return_assistant_tokens_mask=True,
        return_dict=True,
    )  # fmt: skip
    theirs = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    # Theirs have the line break too that follows the end token.
    assert ours == re.sub(r"(>)\n(?=Stürm|$)", r"\1", byte_tokenizer.decode(theirs))
    assert "Lear." in ours and "<storm>." in ours and "Which" not in ours


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("llama-2", " Lear. </s> Storm. </s>"),
        ("smollm2", "Lear.<|im_end|>Storm.<|im_end|>"),
        ("llama3_1", "Lear.<|eot_id|>Storm.<|eot_id|>"),
    ],
)
def test_templates_that_trl_does_not_know_need_no_marks(template, said, byte_tokenizer):
    byte_tokenizer.chat_template = {
        "llama-2": LLAMA_2,
        "smollm2": SMOLLM2,
        "llama3_1": (FAMILIES / "llama3_1.jinja").read_text(),
    }[template]
    with pytest.raises(ValueError):
        get_training_chat_template(byte_tokenizer)  # control
    assert not is_marked(byte_tokenizer)
    chat = to_messages(CONVERSATION)
    assert marked(byte_tokenizer, [{"messages": chat}]) == [said]
    pair = [{"prompt": chat[:3], "completion": chat[3:]}]
    first, last = marked(byte_tokenizer, [{"messages": chat[:2]}]) + marked(byte_tokenizer, pair, True)
    assert marked(byte_tokenizer, pair) == [said] == [first + last] and "Storm" in last


# As Mistral's of 2024: the system message goes into the last turn, if that is a question.
INTO_THE_LAST = """{% set said = messages[0].content if messages[0].role == 'system' %}
{%- for turn in messages if turn.role != 'system' %}
{%- if turn.role == 'user' %}[INST]{{ said + '\n\n' if loop.last and said }}{{ turn.content }}[/INST]
{%- else %} {{ turn.content }}</s>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("is_pair", [False, True])
def test_a_system_message_that_is_not_written_before_answers_is_told_and_the_answers_are_found(
    is_pair, byte_tokenizer, caplog
):
    byte_tokenizer.chat_template = INTO_THE_LAST
    data._warn_of_unseen.cache_clear()
    chat = to_messages(CONVERSATION, system="Be brief.")
    asked = byte_tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert "Be brief." in asked and "Be brief." not in byte_tokenizer.apply_chat_template(chat, tokenize=False)
    row = {"prompt": chat[:4], "completion": chat[4:]} if is_pair else {"messages": chat}
    rows = prepare_columns(Dataset.from_list([row] * 2), "d", byte_tokenizer, find_answers=True)
    assert caplog.text.count("the chat template does not write system, which rows hold") == 1
    said = [" Storm.</s>"] if is_pair else [" Lear.</s> Storm.</s>"]
    assert marked(byte_tokenizer, rows.to_list(), completion_only=is_pair) == said * 2


def test_blanks_of_an_answer_are_marked_where_the_tokenizer_gives_them_no_width(byte_tokenizer):
    byte_tokenizer.chat_template = SMOLLM2
    byte_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [CONVERSATION[0], {"from": "gpt", "value": "a b\n\n  c é"}]
    assert marked(byte_tokenizer, [{"messages": to_messages(turns)}]) == ["a b\n\n  c é<|im_end|>"]


def test_a_template_that_ends_the_whole_with_a_token_of_its_own_has_its_answers_found(byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}"
    )
    said = marked(byte_tokenizer, [{"messages": to_messages(CONVERSATION)}])[0].replace("<|endoftext|>", "")
    # Up to what the next turn begins with, one byte being a token here.
    assert said.replace("<|end|><|", "<|end|>") == "Lear.<|end|>Storm.<|end|>"


def test_sets_that_bring_masks_or_are_only_evaluated_need_no_chats(byte_tokenizer, make_model, make_config, lora):
    byte_tokenizer.chat_template = SMOLLM2
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2, "assistant_masks": [[0, 0, 1, 1]] * 2})
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(assistant_only_loss=True), processing_class=byte_tokenizer,
        train_dataset=masked, eval_dataset=Dataset.from_dict({"text": ["One? 1"] * 2}), peft_config=lora(),
    )  # fmt: skip
    assert trainer.train_dataset[0]["labels"].tolist() == [-100, -100, 7, 8]
    assert -100 not in trainer.eval_dataset[0]["labels"]


def test_of_several_templates_none_is_probed_since_tools_take_another(byte_tokenizer):
    byte_tokenizer.chat_template = {"default": SMOLLM2, "tool_use": WRITES_ALL}
    assert parts_not_written(byte_tokenizer) == set()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_pair", [False, True])
def test_answers_are_all_that_carries_labels_in_any_form(
    is_pair, is_stream, byte_tokenizer, make_model, make_config, lora
):
    byte_tokenizer.chat_template = SMOLLM2
    chat = to_messages(CONVERSATION)
    rows = Dataset.from_list([{"prompt": chat[:3], "completion": chat[3:]} if is_pair else {"messages": chat}] * 4)
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(assistant_only_loss=True, max_steps=1), processing_class=byte_tokenizer,
        train_dataset=rows.to_iterable_dataset() if is_stream else rows, peft_config=lora(),
    )  # fmt: skip
    row = next(iter(trainer.train_dataset))
    assert byte_tokenizer.decode(row["input_ids"][row["labels"] != -100]) == (
        "Storm.<|im_end|>" if is_pair else "Lear.<|im_end|>Storm.<|im_end|>"
    )
    # As TRL leaves them: a run that it has marked the answers of is told by these columns.
    assert is_stream or set(rows.column_names) < set(trainer.train_dataset.column_names)
    trainer.train()


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + SMOLLM2


@pytest.mark.parametrize("find_answers", [False, True])
@pytest.mark.parametrize("form", ["messages", "pairs", "stream"])
def test_a_row_that_the_template_refuses_is_left_out_with_its_reason(form, find_answers, byte_tokenizer, caplog):
    byte_tokenizer.chat_template = REFUSES
    chats = [to_messages(CONVERSATION, system=system) for system in ("Be brief.", None, None)]
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} if form == "pairs" else {"messages": chat} for chat in chats]
    data_set = Dataset.from_list(rows)
    data_set = data_set.to_iterable_dataset() if form == "stream" else data_set
    assert len(list(prepare_columns(data_set, "d", byte_tokenizer, find_answers=find_answers))) == 2
    assert "the chat template refuses it (no system here) (1, the first is row 1)" in caplog.text


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"tools": "no json"}, "its tools are no JSON"),
        ({"tools": '{"type": "function"}'}, "its tools are no list"),
        ({"chat_template_kwargs": "[1]"}, "its chat_template_kwargs are no mapping"),
        ({"tools": ""}, None),
        ({"tools": "[]"}, None),
        ({"chat_template_kwargs": '{"enable_thinking": false}'}, None),
    ],
)
def test_what_stands_beside_the_turns_is_read_or_leaves_its_row_out(beside, reason, byte_tokenizer, caplog):
    byte_tokenizer.chat_template = WRITES_ALL.replace("{{ tools", "{{ enable_thinking }}{{ tools")
    rows = [{"messages": CONVERSATION, **dict.fromkeys(beside), **some} for some in (beside, {}, {})]
    found = prepare_columns(Dataset.from_list(rows), "d", byte_tokenizer, find_answers=True)
    assert len(found) == (2 if reason else 3) and (not reason or f"{reason} (1, the first is row 1)" in caplog.text)
    if "enable_thinking" in str(beside):
        text = byte_tokenizer.decode(with_answer_masks(found, byte_tokenizer, False)[0]["input_ids"])
        assert text.startswith("False")


def test_the_words_beside_a_tool_call_that_the_template_leaves_out_are_told(byte_tokenizer, caplog):
    byte_tokenizer.chat_template = (FAMILIES / "llama3_1.jinja").read_text()
    data._warn_of_unseen.cache_clear()
    silent, said = of_a_tool(), of_a_tool()
    said[1] = said[1] | {"content": "Let me look."}
    for chat, told in ((silent, 0), (said, 1)):
        rows = prepare_columns(Dataset.from_list([{"messages": chat}] * 2), "d", byte_tokenizer)
        assert len(rows) == 2
        assert caplog.text.count("does not write text beside a tool call, which rows hold") == told


def test_thoughts_are_read_under_each_of_their_names_and_a_blank_one_is_none():
    def thought(**more):
        return to_messages([CONVERSATION[0], CONVERSATION[1] | more])[1].get("reasoning_content")

    assert thought(reasoning="Who?") == thought(reasoning_content="Who?", reasoning="Other.") == "Who?"
    assert thought(reasoning=" ") is None is thought(reasoning_content=" \n")
    with pytest.raises(RowError, match="a turn has a function_call, which is OpenAI's old form of tool_calls"):
        thought(function_call={"name": "look", "arguments": "{}"})


@pytest.mark.parametrize(
    ("prompt", "said"), [(1, "user"), (0, "system"), (2, "user")], ids=["a system message", "nothing", "an answer"]
)
def test_a_completion_that_another_begins_than_the_assistant_is_refused_for_that(prompt, said):
    chat = to_messages(CONVERSATION, system="Be brief.")
    chat = chat if prompt < 2 else chat[1:]
    with pytest.raises(RowError, match=f"its completion begins with a turn of {said}, not of" if prompt else "empty"):
        pair_of(chat[:prompt], chat[prompt:])


def test_tools_that_are_written_before_the_last_question_hide_no_earlier_answer(byte_tokenizer):
    # As Mistral's of 2024.
    byte_tokenizer.chat_template = """{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}
    {%- for turn in messages %}{% if turn.role == 'user' %}{{ '[TOOLS]' ~ tools if tools and turn == asked[-1] }}
    {%- raw %}[INST]{% endraw %}{{ turn.content }}[/INST]{% else %} {{ turn.content }}</s>{% endif %}{% endfor %}"""
    tools = [{"type": "function", "function": {"name": "look"}}]
    chat = to_messages(CONVERSATION)
    assert marked(byte_tokenizer, [{"messages": chat, "tools": tools}]) == [" Lear.</s> Storm.</s>"]
    # Which of two that are the same it is, is not known.
    same = [turn if turn["role"] == "user" else turn | {"content": "Yes."} for turn in chat]
    with pytest.raises(RowError, match="otherwise once turns follow"):
        answer_spans(byte_tokenizer, same, tools=tools)


def test_a_system_message_that_a_question_quotes_is_still_known_to_be_unseen(byte_tokenizer):
    byte_tokenizer.chat_template = INTO_THE_LAST
    chat = to_messages([{"from": "human", "value": "Is Math hard?"}, CONVERSATION[1]], system="Math")
    assert marked(byte_tokenizer, [{"messages": chat}]) == [" Lear.</s>"]


def test_tool_calls_are_answers_too_and_tools_are_not(byte_tokenizer):
    byte_tokenizer.chat_template = (FAMILIES / "llama3_1.jinja").read_text()
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]
    for given in (tools, json.dumps(tools)):
        (found,) = marked(byte_tokenizer, [{"messages": to_messages(of_a_tool()), "tools": given}])
        assert '"name": "look"' in found and "It rains.<|eot_id|>" in found
        assert "Looks." not in found and "Rain." not in found


def test_rows_whose_answers_the_template_writes_otherwise_later_are_left_out(byte_tokenizer, caplog):
    # It takes the thoughts of all answers but the last away.
    byte_tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>"
        "{{ turn.content if loop.last else turn.content.split('|')[-1] }}</s>{% endfor %}"
    )
    thought = [{**turn, "value": f"Hm|{turn['value']}"} if turn["from"] == "gpt" else turn for turn in CONVERSATION]
    rows = Dataset.from_list([{"conversations": one} for one in (thought, CONVERSATION, thought[:2])])
    assert len(prepare_columns(rows, "d", byte_tokenizer, find_answers=True)) == 2
    assert "an answer otherwise once turns follow: assistant_only_loss needs a chat_template_path" in caplog.text
    assert len(prepare_columns(rows, "d", byte_tokenizer)) == 3


def test_a_loss_on_answers_alone_is_refused_for_text(byte_tokenizer, make_model, make_config, lora):
    byte_tokenizer.chat_template = SMOLLM2
    for row in ({"text": "One? 1"}, {"prompt": "One?", "completion": "1"}):
        with pytest.raises(DataError, match="assistant_only_loss=true is for conversations"):
            CREAMTrainer(
                model=make_model(), args=make_config(assistant_only_loss=True), processing_class=byte_tokenizer,
                train_dataset=Dataset.from_list([row] * 2), peft_config=lora(),
            )  # fmt: skip


def test_only_assistant_tokens_and_their_end_of_turn_carry_labels(
    byte_tokenizer, make_model, make_config, lora, tmp_path
):
    byte_tokenizer.chat_template = LLAMA_2
    chats = Dataset.from_dict({"conversations": [CONVERSATION] * 4})
    documents = prepare_columns(chats, "d", byte_tokenizer)
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(assistant_only_loss=True), train_dataset=documents,
        eval_dataset=documents, processing_class=byte_tokenizer, peft_config=lora(),
    )  # fmt: skip
    row = trainer.train_dataset[0]
    labelled = row["input_ids"][row["labels"] != -100]
    assert byte_tokenizer.decode(labelled) == " Lear. </s> Storm. </s>"
    assert byte_tokenizer.decode(row["input_ids"]).startswith("<s>[INST] Which king? [/INST] Lear. </s><s>[INST]")
    # What is served, and saved beside the adapter, is the model's own template.
    assert byte_tokenizer.chat_template == LLAMA_2
    trainer.evaluate(documents)
    trainer.train()
    trainer.save_model()
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")
    assert saved.chat_template == LLAMA_2


def test_a_template_of_ones_own_is_trained_with_and_stays_the_tokenizers(
    byte_tokenizer, make_model, make_config, lora, tmp_path
):
    byte_tokenizer.chat_template = LLAMA_2
    ours = "{% for turn in messages %}{{ turn.role }}: {% generation %}{{ turn.content }}</s>{% endgeneration %}"
    ours += "{% endfor %}"
    (tmp_path / "own.jinja").write_text(ours)

    def make(path):
        settings = {"assistant_only_loss": True, "chat_template_path": str(path)}
        documents = prepare_columns(Dataset.from_dict({"conversations": [CONVERSATION] * 4}), "d", byte_tokenizer)
        return CREAMTrainer(
            model=make_model(), args=make_config(**settings), train_dataset=documents, processing_class=byte_tokenizer,
            peft_config=lora(),
        )  # fmt: skip

    trainer = make(tmp_path / "own.jinja")
    assert byte_tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("user: Which king?")
    assert byte_tokenizer.chat_template == ours
    assert trainer.chat_template is None  # the tokenizer's own, also for what is evaluated later
    trainer.save_model()
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "run").chat_template == ours
    with pytest.raises(DataError, match=r"no such \.jinja file"):
        make("HuggingFaceTB/SmolLM2-135M-Instruct")  # TRL would add its tokens to the embeddings


def test_texts_are_tokenised_whole_and_end_with_the_end_token(byte_tokenizer, make_model, make_config, lora):
    documents = prepare_columns(Dataset.from_dict({"text": ["long " * 60, "short"]}), "d", byte_tokenizer)
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(), train_dataset=documents, processing_class=byte_tokenizer,
        peft_config=lora(),
    )  # fmt: skip
    assert sorted(len(row["input_ids"]) for row in trainer.train_dataset) == [6, 301]
    assert all(row["input_ids"][-1] == 1 for row in trainer.train_dataset)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_set_without_documents_is_refused(is_stream, byte_tokenizer, make_model, make_config, lora):
    nothing = Dataset.from_dict({"text": []})
    with pytest.raises(ValueError, match="train_dataset is empty: it must hold documents, a row each"):
        CREAMTrainer(
            model=make_model(), args=make_config(max_steps=1), processing_class=byte_tokenizer, peft_config=lora(),
            train_dataset=IterableDataset.from_generator(lambda: iter(())) if is_stream else nothing,
        )  # fmt: skip


def test_a_single_file_has_no_other_split_to_evaluate_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}')
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "saved"):
        assert len(load_documents(str(tmp_path / name))) == 1
        with pytest.raises(DataError, match=r"no split 'test'.*held_out_documents"):
            load_documents(str(tmp_path / name), "test")


GOOD_IDS, VOCABULARY = [1, 2, 3], 385
WRONG_ROWS = [
    ({"text": None}, {"text": "one"}, "text is null"),
    ({"text": " \n"}, {"text": "one"}, "text is empty"),
    ({"text": "o\0n\0e\0"}, {"text": "one"}, "text holds NUL, so it is not UTF-8"),
    ({"input_ids": None}, {"input_ids": GOOD_IDS}, "input_ids is null or empty"),
    ({"input_ids": []}, {"input_ids": GOOD_IDS}, "input_ids is null or empty"),
    ({"input_ids": [7]}, {"input_ids": GOOD_IDS}, "one token"),
    ({"input_ids": [1, None, 3]}, {"input_ids": GOOD_IDS}, "a token id outside the vocabulary of 385"),
    ({"input_ids": [1, 385]}, {"input_ids": GOOD_IDS}, "a token id outside the vocabulary of 385"),
    ({"input_ids": [1, -1]}, {"input_ids": GOOD_IDS}, "a token id outside the vocabulary of 385"),
    *(
        ({"input_ids": GOOD_IDS, "labels": labels}, {"input_ids": GOOD_IDS, "labels": GOOD_IDS}, reason)
        for labels, reason in (
            ([1, 2], "labels and input_ids differ in length"),
            ([1, 2, 3, 4], "labels and input_ids differ in length"),
            (None, "no labels, and other rows have them"),
            ([1, 2, 400], "a label outside the vocabulary"),
            ([1, 2, -7], "a label outside the vocabulary"),
            ([-100, -100, -100], "no token has a label"),
            ([1, -100, -100], "no token has a label"),
        )
    ),
    ({"input_ids": GOOD_IDS, "completion_mask": [0, 0, 0]}, {"input_ids": GOOD_IDS, "completion_mask": [0, 1, 1]},
     "completion_mask is 0 throughout"),
    ({"input_ids": GOOD_IDS, "assistant_masks": [0, 1]}, {"input_ids": GOOD_IDS, "assistant_masks": [0, 1, 1]},
     "assistant_masks and input_ids differ in length"),
    ({"prompt": "", "completion": "x"}, {"prompt": "a", "completion": "b"}, "an empty prompt"),
    ({"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}, "an empty completion"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "good", "reason"), WRONG_ROWS)
def test_a_row_that_cannot_be_trained_on_is_left_out_and_counted(wrong, good, reason, byte_tokenizer, caplog):
    def prepare(rows, stream=False):
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if stream else dataset
        return prepare_columns(dataset, "d", byte_tokenizer, vocab_size=VOCABULARY)

    kept = prepare([good, good, wrong])
    assert list(kept) == [good, good]
    assert f"d: 1 of 3 rows cannot be used: {reason}" in caplog.text and "the first is row 3" in caplog.text
    assert list(prepare([good, good, wrong], stream=True)) == [good, good]
    with pytest.raises(DataError, match=f"2 of 3 rows cannot be used: {reason}.*nothing was trained"):
        prepare([wrong, good, wrong])


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("input_ids", [[1.0, 2.0]], "lists of float64"),
        ("input_ids", [[[1, 2]]], "lists of lists"),
        ("input_ids", ["1 2"], "string"),
        ("labels", [[1.5, 2.5]], "lists of float64"),
        ("messages", ["hello"], "string"),
        ("conversations", [3], "int64"),
        ("text", [3], "int64"),
        ("text", [["a"]], "values of another kind"),
    ],
)
def test_a_column_of_another_type_is_refused_by_name(column, values, found, byte_tokenizer):
    byte_tokenizer.chat_template = LLAMA_2
    columns = {column: values} | ({"input_ids": [[1, 2]]} if column == "labels" else {})
    with pytest.raises(DataError, match=f"d: the column {column} must hold .* {found} were found"):
        prepare_columns(Dataset.from_dict(columns), "d", byte_tokenizer)


def test_text_for_a_tokenizer_that_cannot_read_it_is_refused(
    tiny_tokenizer, byte_tokenizer, make_model, make_config, lora
):
    texts = Dataset.from_dict({"text": ["Once upon a time"]})
    # First what no setting mends.
    with pytest.raises(DataError, match=r"the tokenizer cannot read.*give token ids in input_ids"):
        CREAMTrainer(
            model=make_model(), args=make_config(), train_dataset=texts, processing_class=tiny_tokenizer,
            peft_config=lora(),
        )  # fmt: skip
    byte_tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end token.*eos_token"):
        prepare_columns(texts, "d", byte_tokenizer)


def test_what_stands_beside_the_turns_is_kept(byte_tokenizer):
    byte_tokenizer.chat_template = LLAMA_2
    columns = {"conversations": [CONVERSATION], "system": ["Be brief."], "tools": ["[]"], "id": [1]}
    prepared = prepare_columns(Dataset.from_dict(columns), "d", byte_tokenizer)
    assert sorted(prepared.column_names) == ["messages", "tools"]
    assert prepared[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    pairs = {"prompt": [[{"role": "user", "content": "One?"}]], "completion": [[{"role": "assistant", "content": "1"}]]}
    assert prepare_columns(Dataset.from_dict(pairs), "d", byte_tokenizer)[0]["completion"][0]["content"] == "1"


WRITES_ALL = """{{ tools | tojson }}{% for turn in messages %}<{{ turn.role }}>{{ turn.thinking }}{{ turn.content }}
{%- for call in turn.tool_calls %}{{ call | tojson }}{% endfor %}</s>{% endfor %}"""


def test_what_a_chat_template_leaves_out_is_found(byte_tokenizer):
    written = {}
    for name in ("qwen3", "qwen2_5", "llama3", "phi3", "gptoss", "llama3_1"):
        byte_tokenizer.chat_template = (FAMILIES / f"{name}.jinja").read_text()
        written[name] = parts_not_written(byte_tokenizer)
    thoughts = {"thinking", "reasoning_content"}
    assert written["qwen3"] == written["gptoss"] == set() and written["qwen2_5"] == thoughts
    assert written["llama3_1"] == {*thoughts, TEXT_OF_A_CALL}
    assert written["llama3"] == {*thoughts, "tools", "tool_calls"} and written["phi3"] == {*written["llama3"], "tool"}


def of_a_tool(end: int = 4) -> list[dict]:
    call = {"type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}
    turns = [{"role": "user", "content": "And in Rome?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return [*turns, {"role": "tool", "content": "Rain."}, {"role": "assistant", "content": "It rains."}][:end]


@pytest.mark.parametrize("form", ["messages", "pairs", "stream"])
@pytest.mark.parametrize("end", [4, 3, 2], ids=["answered", "cut at the result", "cut at the call"])
def test_tool_calls_that_the_template_does_not_write_are_left_out_and_counted(form, end, byte_tokenizer, caplog):
    byte_tokenizer.chat_template = SMOLLM2
    chats = [of_a_tool(end), CONVERSATION, CONVERSATION]
    rows = Dataset.from_list([{"messages": chat} for chat in chats])
    if form == "pairs":
        rows = Dataset.from_list([{"prompt": chat[:1], "completion": chat[1:]} for chat in chats])
    data_set = rows.to_iterable_dataset() if form == "stream" else rows
    found = list(prepare_columns(data_set, "d", byte_tokenizer))
    assert len(found) == 2 and "tool_calls" not in str(found)
    assert "it holds a tool call, which the chat template does not write (1, the first is row 1)" in caplog.text
    # Or the model would learn to say nothing.
    assert "<|im_start|>assistant\n<|im_end|>" in byte_tokenizer.apply_chat_template(
        to_messages(chats[0]), tokenize=False
    )
    byte_tokenizer.chat_template = WRITES_ALL
    assert len(list(prepare_columns(data_set, "d", byte_tokenizer))) == 3


def test_a_tools_result_that_the_template_does_not_write_is_left_out(byte_tokenizer, caplog):
    byte_tokenizer.chat_template = WRITES_ALL.replace("{{ turn.content }}", "{{ turn.content if turn.role != 'tool' }}")
    rows = Dataset.from_list([{"messages": chat} for chat in (of_a_tool(), of_a_tool(2), CONVERSATION)])
    assert len(prepare_columns(rows, "d", byte_tokenizer)) == 2
    assert "it holds a tool's result, which the chat template does not write" in caplog.text


def test_thoughts_and_tools_that_the_template_does_not_write_are_told_once(byte_tokenizer, caplog):
    byte_tokenizer.chat_template = SMOLLM2
    data._warn_of_unseen.cache_clear()
    thought = [CONVERSATION[0], {"from": "gpt", "value": "Lear.", "thinking": "Who was it?"}]
    rows = Dataset.from_list([{"conversations": thought, "tools": '[{"name": "look"}]'}] * 2)
    prepared = prepare_columns(rows, "d", byte_tokenizer)
    assert len(prepare_columns(prepared, "train_dataset", byte_tokenizer)) == 2
    assert caplog.text.count("the chat template does not write thinking, tools, which rows hold") == 1
    caplog.clear()
    data._warn_of_unseen.cache_clear()
    prepare_columns(Dataset.from_list([{"conversations": CONVERSATION, "tools": None}] * 2), "d", byte_tokenizer)
    assert not caplog.text


def test_a_template_after_whose_answers_nothing_says_that_they_end_is_refused(byte_tokenizer):
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="never learn to stop: set chat_template_path"):
        prepare_columns(Dataset.from_dict({"conversations": [CONVERSATION]}), "d", byte_tokenizer)


def test_documents_without_a_label_left_are_refused_not_a_stop_iteration(make_model, make_config, tiny_tokenizer, lora):
    # The first label lies beyond target_length, where TRL cuts.
    rows = {"input_ids": [[1] * 600], "labels": [[-100] * 550 + [1] * 50]}
    with pytest.raises(DataError, match="1 of 1 training documents have no label within target_length=512"):
        CREAMTrainer(
            model=make_model(), args=make_config(), train_dataset=Dataset.from_dict(rows),
            processing_class=tiny_tokenizer, peft_config=lora(),
        )  # fmt: skip


def test_documents_that_lose_all_labels_to_the_cut_are_counted(make_model, make_config, tiny_tokenizer, lora, caplog):
    rows = {"input_ids": [[1] * 600] * 4, "labels": [[-100] * 550 + [1] * 50, *[[1] * 600] * 3]}
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(), train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer, peft_config=lora(),
    )  # fmt: skip
    assert len(trainer.train_dataset) == 3
    assert "1 of 4 training documents have no label within target_length=512 and are left out" in caplog.text


def test_a_row_brings_its_own_keys_and_no_others_to_the_template(byte_tokenizer, tmp_path):
    def row(arguments, tools, **more):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [CONVERSATION[0], {"from": "gpt", "value": "", "tool_calls": [call]}]
        turns += [{"from": "tool", "value": "2"}, {"from": "gpt", "value": "It is 2.", "thinking": "Let me see."}]
        return {"conversations": turns, "tools": tools, **more}

    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}, {"name": "g", "parameters": {"y": {"enum": [1]}}}]
    rows = [row({"a": 1}, tools[:1], chat_template_kwargs=None), row({"b": [{"c": 2}]}, tools[1:]), row({}, None)]
    rows[1]["chat_template_kwargs"] = {"deep": True}
    # Each mapping has the keys of all, as null.
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    byte_tokenizer.chat_template = WRITES_ALL
    loaded = load_documents(str(tmp_path / "rows.parquet"))
    assert loaded[0]["conversations"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}  # control
    for prepared in (
        prepare_columns(loaded, "d", byte_tokenizer),
        list(prepare_columns(loaded.to_iterable_dataset(), "d", byte_tokenizer)),
    ):
        found = [prepared[index] for index in range(3)]
        calls = [one["messages"][1]["tool_calls"][0]["function"]["arguments"] for one in found]
        assert calls == [{"a": 1}, {"b": [{"c": 2}]}, {}]
        assert [one["tools"] for one in found] == [tools[:1], tools[1:], None]
        assert [one["chat_template_kwargs"] for one in found] == [{}, {"deep": True}, {}]
        beside = [set(turn) - {"role", "content"} for turn in found[0]["messages"]]
        assert beside == [set(), {"tool_calls"}, set(), {"thinking"}]


@pytest.mark.parametrize("name", ["training-manual.txt", "deeper/test-report.txt"])
def test_a_file_whose_name_looks_like_a_split_does_not_take_the_place_of_a_folder(plays, name):
    files = len(load_documents(str(plays)))
    (plays / name).write_text("A manual.")
    split = "train" if "train" in name else "test"
    with pytest.raises(
        DataError, match=rf"{Path(name).name} looks like the split '{split}', and {files} files look like none"
    ):
        load_documents(str(plays))
    assert len(load_documents(f"{plays}/**/*.txt")) == files + 1
    (plays / "notes.md").write_text("Of another kind.")
    for path in plays.rglob("*.txt"):
        path.rename(path.with_name("test.txt"))
    with pytest.raises(DataError, match=r"no split 'train'; by the names of its files it has test. A pattern such as"):
        load_documents(str(plays))


def test_a_folder_that_is_named_as_a_split_is_not_taken_for_it(tmp_path, monkeypatch, byte_tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"text": split}) * 1)
    recipe = parse_recipe(["--dataset_name", "data", "--dataset_test_split", "test", "--output_dir", "run"])
    assert [documents[0]["text"] for documents in load_data(recipe, byte_tokenizer, 300)] == ["train", "test"]


def test_a_hundred_thousand_rows_are_looked_at_in_about_a_second():
    turns = [{"role": role, "content": "hello world " * 10} for role in ("user", "assistant") * 2]
    chats = Dataset.from_dict({"messages": [turns] * 100_000})
    start = time.process_time()
    problems = find_problems(chats, "messages", lambda row: to_messages(row["messages"]), VOCABULARY)
    assert len(problems) == 100_000 and not any(problems)
    # On a machine that does other work beside.
    assert time.process_time() - start < 3


@pytest.fixture
def plays(tmp_path):
    folder = tmp_path / "plays"
    (folder / "deeper").mkdir(parents=True)
    for name, text in (("hamlet", "Who's there?\nNay, answer me."), ("lear", "Nothing.\n"), ("deeper/empty", "  \n")):
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_text_file_is_a_document_however_it_is_named(plays, byte_tokenizer, caplog):
    hamlet = "Who's there?\nNay, answer me."
    assert load_documents(str(plays / "hamlet.txt"))["text"][:] == [hamlet]
    for name in (plays, f"{plays}/**/*.txt"):
        documents = load_documents(str(name))
        assert sorted(documents["text"]) == ["  \n", "Nothing.\n", hamlet], name
        kept = prepare_columns(documents, str(name), byte_tokenizer)
        assert sorted(kept["text"]) == ["Nothing.\n", hamlet]
        assert "text is empty (1, the first is empty.txt)" in caplog.text
        caplog.clear()
    assert len(load_dataset("text", data_dir=str(plays), split="train")) == 4  # control: a line a document


def test_a_folder_of_several_kinds_is_read_whole(plays, byte_tokenizer, caplog):
    (plays / "more.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "", "id": 2}\n')
    documents = load_documents(str(plays))
    assert len(documents) == 5 and documents.column_names == ["text"]
    prepare_columns(documents, str(plays), byte_tokenizer)
    assert "2 of 5 rows cannot be used: text is empty (2, the first is row 2 of more.jsonl)" in caplog.text
    (plays / "ids.jsonl").write_text('{"input_ids": [1, 2]}')
    (plays / "more.jsonl").unlink()
    with pytest.raises(DataError, match="mixes files that have no column in common"):
        load_documents(str(plays))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_beside_jsonl_is_read_or_one_line_says_what_to_do(plays, streaming):
    (plays / "more.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"text": pa.array(["b"], pa.large_string())}), plays / "other.parquet")
    documents = load_documents(str(plays), streaming=streaming)
    assert {"a", "b", "Nothing.\n"} <= {row["text"] for row in documents}
    pq.write_table(pa.table({"text": pa.array([[1]])}), plays / "other.parquet")
    with pytest.raises(DataError, match=r"hold other kinds of values .*: give each kind a folder of its own"):
        load_documents(str(plays))


def test_the_mark_before_a_text_of_windows_is_none_of_it(tmp_path):
    (tmp_path / "a.txt").write_text("Hello.\r\n", encoding="utf-8-sig", newline="")
    assert load_documents(str(tmp_path / "a.txt"))["text"][:] in (["Hello.\r\n"], ["Hello.\n"])


def test_a_folder_with_the_configuration_of_a_hub_data_set_is_loaded_as_one(tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "held"}')
    (tmp_path / "fed.jsonl").write_text('{"text": "fed"}')
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: fed.jsonl\n---\nText."
    )
    assert load_documents(str(tmp_path))["text"][:] == ["fed"]


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda f: None, "absent/*.txt", "matches no file"),
        (lambda f: (f / "empty").mkdir(), "empty", "holds no data files"),
        (lambda f: (f / "a.csv").write_text("x"), "a.csv", "unknown file type '.csv'"),
        (lambda f: (f / "a.txt").touch(), "a.txt", "is empty"),
        (lambda f: (f / "a.jsonl").write_text("not json"), "a.jsonl", "cannot be read as json"),
    ],
)
def test_files_that_cannot_be_documents_are_refused(make, name, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        load_documents(str(tmp_path / name))


def test_what_was_prepared_is_not_written_again(byte_tokenizer, monkeypatch):
    byte_tokenizer.chat_template = LLAMA_2
    chats = Dataset.from_dict({"conversations": [CONVERSATION, CONVERSATION[:2]], "tools": ["[]", "[]"]})
    prepared = prepare_columns(chats, "d", byte_tokenizer)
    monkeypatch.setattr(Dataset, "map", None)
    again = prepare_columns(prepared, "d", byte_tokenizer)
    assert again.column_names == ["messages", "tools"] and list(again["messages"]) == list(prepared["messages"])
    with pytest.raises(TypeError):
        prepare_columns(chats, "d", byte_tokenizer)  # control: these have to be


def test_what_another_version_of_the_package_made_is_not_taken_from_the_cache(byte_tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "documents.jsonl"
    file.write_text('{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}\n' * 2)

    def joined(prepare):
        return len(fit_short_documents(prepare(load_dataset("json", data_files=str(file), split="train")), "join", 9))

    def prepared(documents):
        return prepare_columns(documents, "d", byte_tokenizer)

    def alone(batch, context_length):
        return batch

    assert joined(prepared) == joined(lambda documents: documents) == 1
    alone.__module__, alone.__qualname__ = tokenised._join.__module__, tokenised._join.__qualname__
    monkeypatch.setattr(tokenised, "_join", alone)
    # The control: datasets takes the two functions for one.
    assert joined(lambda documents: documents) == 1
    package = tmp_path / "train"
    shutil.copytree(Path(data.__file__).parent, package)
    monkeypatch.setattr(data, "__file__", str(package / "data.py"))
    data._version.cache_clear()
    assert joined(prepared) == 1
    (package / "rows.py").write_text("# Another version.")
    data._version.cache_clear()
    assert joined(prepared) == 2
    data._version.cache_clear()


@pytest.mark.parametrize(
    ("labels", "fed", "count"),
    [([-100] * 40 + [7] * 60, 64, 2), ([-100] * 40 + [7] * 60, 100, 0), ([7] * 100, 64, 0)],
    ids=["answers alone", "whole", "every token"],
)
def test_examples_whose_answers_may_lose_what_they_refer_to_are_counted(labels, fed, count, tmp_path, capsys):
    file = tmp_path / "documents.jsonl"
    rows = [{"input_ids": [7] * len(one), "labels": one} for one in (labels, labels[:50] + labels[-14:], labels)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["--context_length", str(fed), "--max_steps", "1", "--per_device_train_batch_size", "1"]
    assert cli.main(["train", "--dataset_name", str(file), *run, "--output_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert (f"{count} of 3 training documents are longer than context_length={fed} and" in said) is (count > 0)
    assert ("are read in part" in said) is (count > 0)


@pytest.mark.parametrize("eval_length", [None, 256, 512])
@pytest.mark.parametrize("is_chat", [True, False])
def test_held_out_answers_beyond_eval_length_are_told_in_python_too(
    eval_length, is_chat, make_model, make_config, byte_tokenizer, lora, caplog
):
    byte_tokenizer.chat_template = SMOLLM2
    turns = [{"role": "user", "content": "One? " * 64}, {"role": "assistant", "content": "1"}]
    rows = Dataset.from_list([{"messages": turns} if is_chat else {"text": "One? " * 64}] * 2)
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(eval_strategy="steps", eval_length=eval_length), train_dataset=rows,
        eval_dataset=rows.select([1, 0]), processing_class=byte_tokenizer, peft_config=lora(),
    )  # fmt: skip
    assert 256 < len(trainer.train_dataset[0]["input_ids"]) < 512
    told = f"2 of 2 held-out documents are longer than eval_length={eval_length or 64} and are read in part: an answer"
    assert (told in caplog.text) is (is_chat and eval_length != 512)
    assert ("2 of 2 training documents are longer than context_length=64" in caplog.text) is is_chat


@pytest.mark.parametrize(("target", "end"), [(1024, ""), (256, ", but 2 that were cut at target_length=256")])
def test_conversations_beyond_the_target_are_said_to_end_there(
    target, end, byte_tokenizer, caplog, make_model, make_config, lora
):
    byte_tokenizer.chat_template = SMOLLM2
    turns = [{"role": "user", "content": "One? " * 64}, {"role": "assistant", "content": "1"}]
    CREAMTrainer(
        model=make_model(), args=make_config(target_length=target), processing_class=byte_tokenizer, peft_config=lora(),
        train_dataset=Dataset.from_list([{"messages": turns}] * 2),
    )  # fmt: skip
    said = "context_length=64 and are read in part: an answer may lose what it refers to; a larger one reads them whole"
    assert f"{said}{end}\n" in caplog.text
