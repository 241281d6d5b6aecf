import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.chat_template_utils import get_training_chat_template

from cream_peft import CREAMTrainer
from cream_peft.train.data import DataError, load_documents, prepare_columns, to_messages, training_chat_template

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


@pytest.fixture
def byte_tokenizer():
    """One token a byte, so that what carries a label can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_sharegpt_turns_become_messages():
    messages = to_messages([{"from": "gpt", "value": "Hello!"}, {"from": "system", "value": "x"}, *CONVERSATION])
    assert messages == []  # a system turn in the middle
    messages = to_messages([{"from": "gpt", "value": "Hello!"}, *CONVERSATION, {"from": "human", "value": "Why?"}])
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"] == "Lear."
    assert to_messages([*CONVERSATION[:2], *CONVERSATION[:1]]) == to_messages(CONVERSATION[:2])
    for broken in ([], CONVERSATION[:1], [CONVERSATION[0]] + CONVERSATION[:2], [{"from": "robot", "value": "x"}],
                   [{"from": "human", "value": " "}, CONVERSATION[1]]):  # fmt: skip
        assert to_messages(broken) == []


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
    ids = prepare_columns(Dataset.from_dict({"input_ids": [[1]], "attention_mask": [[1]], "labels": [[1]]}), "d",
                          tiny_tokenizer)  # fmt: skip
    assert sorted(ids.column_names) == ["input_ids", "labels"]
    texts = prepare_columns(Dataset.from_dict({"text": ["a"], "meta": [1]}), "d", tiny_tokenizer)
    assert texts.column_names == ["text"]
    with pytest.raises(DataError, match=r"columns body, meta.*input_ids, messages, conversations"):
        prepare_columns(Dataset.from_dict({"body": ["a"], "meta": [1]}), "d", tiny_tokenizer)
    chats = Dataset.from_dict({"conversations": [CONVERSATION, CONVERSATION[:1]], "id": [1, 2]})
    with pytest.raises(DataError, match="no chat template"):
        prepare_columns(chats, "d", byte_tokenizer)
    byte_tokenizer.chat_template = LLAMA_2
    assert len(prepare_columns(chats, "d", byte_tokenizer)) == 1
    with pytest.raises(DataError, match="none of the 1 conversations"):
        prepare_columns(chats.select([1]), "d", byte_tokenizer)


def test_our_llama_2_template_is_used_only_where_it_renders_the_same(byte_tokenizer):
    byte_tokenizer.chat_template = LLAMA_2
    assert "generation" in training_chat_template(byte_tokenizer)
    with pytest.raises(ValueError):
        get_training_chat_template(byte_tokenizer)  # control: TRL has none for Llama-2
    byte_tokenizer.chat_template = LLAMA_2.replace("[INST] ", "[INST]")
    assert training_chat_template(byte_tokenizer) is None
    byte_tokenizer.chat_template = None
    assert training_chat_template(byte_tokenizer) is None


def test_smollm2_has_a_training_template_that_marks_what_the_assistant_says(byte_tokenizer):
    byte_tokenizer.chat_template = SMOLLM2
    template = training_chat_template(byte_tokenizer)
    with pytest.raises(ValueError):
        get_training_chat_template(byte_tokenizer)  # control: TRL has none for SmolLM2
    options = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
    found = byte_tokenizer.apply_chat_template(to_messages(CONVERSATION), **options)
    marked = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert byte_tokenizer.decode(marked) == "Lear.<|im_end|>Storm.<|im_end|>"


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


def test_a_single_file_has_no_other_split_to_evaluate_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}')
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "saved"):
        assert len(load_documents(str(tmp_path / name))) == 1
        with pytest.raises(DataError, match=r"no split 'test'.*held_out_documents"):
            load_documents(str(tmp_path / name), "test")
