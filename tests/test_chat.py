import io
import os
import random
import signal

import pytest
import torch
from conftest import TARGET, WINDOW
from tokenizers.models import WordLevel

from cream_peft import CREAMTrainer, cli
from cream_peft.chat import Chat, ChatError, ChatSettings, end_tokens, load_chat, read_document, talk
from cream_peft.model.base import load_base
from cream_peft.tiny import TINY_ID
from cream_peft.tiny.documents import vocabulary

TEMPLATE = (
    "{% for m in messages %}{{ {'system': '.01 ', 'user': '.02 ', 'assistant': '.03 '}[m.role] + m.content + ' <s> ' }}"
    "{% endfor %}{% if add_generation_prompt %}.03 {% endif %}"
)
DOCUMENT = " ".join(random.Random(0).choices(vocabulary()[1:], k=200))
QUESTIONS = ["k001 k002", "k003", "k004 v05 k006"]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """The embedded one with a chat template, reading words that it does not know as a filler."""
    vocab = {word: index for index, word in enumerate(vocabulary())}
    tiny_tokenizer.backend_tokenizer.model = WordLevel(vocab, unk_token=".00")
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_tokenizer


@pytest.fixture
def make_chat(make_model, tokenizer):
    def make(template=TEMPLATE, document=DOCUMENT, max_new_tokens=12, **settings):
        tokenizer.chat_template = template
        model = make_model(max_position_embeddings=TARGET, attn_implementation="sdpa", eos_token_id=None)
        settings = ChatSettings(document=document, max_new_tokens=max_new_tokens, **settings)
        return Chat(model, tokenizer, WINDOW, TARGET, settings)

    return make


def silent(text):
    pass


def answers_of(chat, questions=QUESTIONS):
    return [chat.ask(question, silent) for question in questions]


def watch(chat):
    """Lengths of what the model reads and of the logits it computes, one entry a step."""
    read, logits = [], []
    chat.model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[-1]))
    chat.model.get_output_embeddings().register_forward_hook(lambda _, __, output: logits.append(output.shape[-2]))
    return read, logits


class FreshEachTurn(Chat):
    def _take_cache(self, ids):
        self._cache, self._cached = None, []
        return super()._take_cache(ids)


def test_a_kept_cache_gives_the_answers_of_a_fresh_one_and_reads_only_what_is_new(make_chat):
    kept, fresh = make_chat(), make_chat()
    fresh.__class__ = FreshEachTurn
    read, read_by_fresh = watch(kept)[0], watch(fresh)[0]
    for turn, question in enumerate(QUESTIONS):
        cached = len(kept._cached)
        assert kept.ask(question, silent) == fresh.ask(question, silent)
        total = len(kept._cached)  # the prompt and all but the last token of the answer
        assert sum(read) == total - cached and sum(read_by_fresh) == total
        assert turn == 0 or sum(read) < 40 < len(DOCUMENT.split()) < sum(read_by_fresh)
        read.clear(), read_by_fresh.clear()


def test_after_a_reset_the_document_is_not_read_again(make_chat):
    chat, fresh = make_chat(), make_chat()
    answers_of(chat)
    read, _ = watch(chat)
    chat.messages = []
    assert chat.ask("k007", silent) == fresh.ask("k007", silent)
    assert 0 < sum(read) < 40


def test_a_document_read_in_chunks_gives_the_answers_of_one_read_whole(make_chat, monkeypatch):
    whole, chunked = make_chat(), make_chat()
    read_whole, _ = watch(whole)
    expected = answers_of(whole)
    monkeypatch.setattr("cream_peft.chat.PREFILL_CHUNK", 7)
    read, _ = watch(chunked)
    assert answers_of(chunked) == expected
    assert max(read) == 7 and max(read_whole) > 200 and sum(read) == sum(read_whole)


def test_logits_are_computed_of_one_token_at_a_time(make_chat):
    chat = make_chat()
    read, logits = watch(chat)
    chat.ask("k001", silent)
    assert max(read) > 200 and set(logits) == {1}


def test_an_answer_is_written_as_it_comes(make_chat):
    pieces = []
    answer = make_chat().ask("k001", pieces.append)
    assert "".join(pieces) == answer.strip() and len(pieces) > 5 and len(answer.split()) == 12


def interrupt_by_error(pieces):
    if len(pieces) == 4:
        raise KeyboardInterrupt


def interrupt_by_signal(pieces):
    if len(pieces) == 4:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("interrupt", [interrupt_by_error, interrupt_by_signal])
def test_ctrl_c_ends_the_answer_only_and_what_came_stays_in_the_conversation(make_chat, interrupt):
    chat, fresh, uninterrupted, pieces = make_chat(), make_chat(), make_chat(), []
    handler = signal.getsignal(signal.SIGINT)

    def write(text):
        pieces.append(text)
        interrupt(pieces)

    answer = chat.ask("k001", write)
    assert 4 <= len(answer.split()) < 7 and uninterrupted.ask("k001", silent).startswith(answer)
    assert signal.getsignal(signal.SIGINT) is handler
    fresh.messages = list(chat.messages)
    assert [message["content"] for message in fresh.messages] == ["k001", answer]
    read, _ = watch(chat)
    assert chat.ask("k002", silent) == fresh.ask("k002", silent)
    # A signal waits for the end of a step, an error elsewhere leaves a cache that is not to be trusted.
    assert (sum(read) < 40) is (interrupt is interrupt_by_signal)


def test_ctrl_c_in_mid_step_leaves_no_half_filled_cache(make_chat):
    chat, fresh = make_chat(), make_chat()
    chat.ask("k001", silent)
    fresh.messages = list(chat.messages)
    layer = chat.model.model.layers[1]

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)

    hook = layer.register_forward_pre_hook(press)  # layer 0 has its keys already
    assert chat.ask("k002", silent) == "" and chat.messages == fresh.messages
    hook.remove()
    assert chat.ask("k003", silent) == fresh.ask("k003", silent)


def test_what_does_not_fit_is_refused_before_the_model_runs(make_chat):
    with pytest.raises(
        ChatError, match=r"^508 tokens and an answer of up to 12 exceed the 512 .*shorter document or .*_tokens$"
    ):
        make_chat(document=" ".join(["k001"] * 497))
    chat = make_chat(document=" ".join(["k001"] * 440))
    chat.ask("k002", silent)
    before, (read, _) = list(chat.messages), watch(chat)
    with pytest.raises(ChatError, match=r"exceed the 512 .*, or start over with /reset$"):
        chat.ask(" ".join(["k003"] * 40), silent)
    assert not read and chat.messages == before


def test_the_longest_conversation_that_fits_is_answered_without_a_warning(make_chat, caplog):
    chat = make_chat(document=" ".join(["k001"] * 300))
    room = TARGET - 12 - chat.tokens
    assert len(chat.ask(" ".join(["k002"] * room), silent).split()) == 12
    assert not caplog.records  # the tokenizer would say that more than the base's window cannot be read
    chat.messages = []
    with pytest.raises(ChatError, match="501 tokens"):
        chat.ask(" ".join(["k002"] * (room + 1)), silent)


def test_an_answer_ends_where_the_template_ends_a_turn(make_chat, tokenizer):
    chat = make_chat()
    assert tokenizer.eos_token is None and end_tokens(chat.model, tokenizer) == [0]
    without = make_chat(template=TEMPLATE.replace("<s>", ""))
    for each in (chat, without):
        each.model.generation_config.suppress_tokens = list(range(1, 385))  # `<s>` is all it can say
    read, _ = watch(chat)
    assert chat.ask("k001", silent) == "" and len(read) == 2
    read, _ = watch(without)
    without.ask("k001", silent)
    assert len(read) == 1 + 12  # control


def test_document_and_system_message_go_where_the_template_wants_them(make_chat, tokenizer):
    chat = make_chat(system="k009")
    text = tokenizer.decode(chat._ids([{"role": "user", "content": "k001"}]))
    assert text.startswith(".01 k009 <s> .02 ") and text.endswith(f"{DOCUMENT} k001 <s> .03")


def test_a_template_that_could_think_is_asked_as_evaluate_asks_it(make_chat, tokenizer):
    chat = make_chat()
    question, before = [{"role": "user", "content": "k001"}], chat._ids([{"role": "user", "content": "k001"}])
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}k100{% endif %}"
    assert chat._ids(question) == before


def test_without_a_chat_template_the_text_is_continued_and_that_is_said_once(make_chat, tokenizer):
    chat, written = make_chat(template=None), []
    read, _ = watch(chat)
    talk(chat, ["k001\n", "k002\n"], written.append)
    first, second = (message["content"] for message in chat.messages[1::2])
    assert "".join(written).count("no chat template") == 1
    assert tokenizer.decode(chat._ids(chat.messages)) == f"{DOCUMENT} k001{first} k002{second}"
    assert len(first.split()) == 12 and sum(read) == len(chat._cached) == chat.tokens - 1
    with pytest.raises(ChatError, match="--system needs a chat template"):
        make_chat(template=None, system="k001")


def test_the_bases_own_generation_settings_do_not_apply(make_chat, make_model, tokenizer):
    model = make_model(max_position_embeddings=TARGET, attn_implementation="sdpa", eos_token_id=None)
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 9.0, True
    model.generation_config.temperature, model.generation_config.eos_token_id = 5.0, 384
    other = Chat(model, tokenizer, WINDOW, TARGET, ChatSettings(DOCUMENT, max_new_tokens=12))
    assert answers_of(other) == answers_of(make_chat()) and other.model.generation_config.eos_token_id == [0, 384]


def test_a_temperature_draws(make_chat):
    def answers(chat):
        return {chat.ask("k001", silent) for chat.messages in ([], [], [])}

    assert len(answers(make_chat(temperature=2.0))) == 3 and len(answers(make_chat())) == 1


def test_talk_takes_lines_and_commands_and_goes_on_after_an_error(make_chat):
    chat, expected, written = make_chat(), make_chat(), []
    lines = ["k001", "", "/tokens", " ".join(["k003"] * 500), "/reset", "k002 ", "/exit", "k003"]
    talk(chat, (line + "\n" for line in lines), written.append)
    text = "".join(written)
    assert f"{expected.tokens} tokens in the context; the model was extended from 64 to 512" in text
    first, second = expected.ask("k001", silent), make_chat().ask("k002", silent)
    assert text.count("error: ") == 1 and f"{first.strip()}\n{expected.tokens} tokens in the context" in text
    assert text.endswith(f"{second.strip()}\n") and [message["content"] for message in chat.messages] == [
        "k002",
        second,
    ]


@pytest.mark.parametrize(
    ("lines", "code"),
    [("k001\n", 0), ("k001 " * 500 + "\nk002\n", 2), ("/tokes\n", 2)],
    ids=["control", "long", "typo"],
)
def test_lines_of_a_pipe_that_were_refused_are_in_the_exit_code(make_chat, monkeypatch, capsys, lines, code):
    monkeypatch.setattr("cream_peft.chat.load_chat", lambda *arguments, **options: make_chat())
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert cli.main(["chat", "--adapter", "any"]) == code
    assert capsys.readouterr().err == ("error: 1 of the lines got no answer (see above)\n" if code else "")


def test_ctrl_c_at_the_prompt_ends_the_talk(make_chat):
    def lines():
        yield "k001"
        raise KeyboardInterrupt

    chat = make_chat()
    talk(chat, lines(), silent)
    assert len(chat.messages) == 2


def test_a_text_that_the_tokenizer_refuses_is_one_line(make_chat, tokenizer):
    chat = make_chat(document="")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ChatError, match="refuses this conversation: no such role"):
        chat.ask("k001", silent)


@pytest.mark.parametrize(
    "content, reason",
    [(None, "no such document"), (b"\xff\xfe\x80", "not UTF-8"), (b"a\0b", "not UTF-8"), (b" \n", "empty")],
)
def test_a_document_that_is_no_text_is_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "paper.pdf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChatError, match=reason) as error:
        read_document(path)
    assert str(path) in str(error.value)
    with pytest.raises(ChatError, match=f"{tmp_path} is a folder"):
        read_document(tmp_path)
    path.write_text("\ufeffText.\n", encoding="utf-8")
    assert read_document(path) == "Text."  # control


def test_settings_that_cannot_be_had_are_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("cream_peft.model.kv_cache.is_hqq_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, reason in [
        ({"kv_cache": "quantized"}, "pip install hqq"),
        ({"kv_cache": "offloaded"}, "default, quantized$"),
        ({"kv_cache": "small"}, "default, quantized$"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "at least 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            ChatSettings(**settings)


def bytes_of(content):
    """Bytes of all tensors in nested dicts and sequences."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(bytes_of, parts))


def cache_bytes(chat):
    return sum(bytes_of(vars(layer)) for layer in chat._cache.layers)


def test_a_quantized_cache_is_smaller_and_cut_back_like_any_other(make_chat):
    pytest.importorskip("hqq")
    quantized, default = make_chat(kv_cache="quantized", max_new_tokens=1), make_chat(max_new_tokens=1)
    for chat in (quantized, default):
        chat.ask("k001", silent)
    assert cache_bytes(quantized) < 0.6 * cache_bytes(default)  # the last tokens, up to 127, wait in 16 bits
    read, _ = watch(quantized)
    quantized.ask("k002", silent)
    assert 0 < sum(read) < 40
    quantized.messages = []
    read.clear()
    quantized.ask("k003", silent)
    assert 0 < sum(read) < 40


def test_a_trained_4_bit_adapter_is_loaded_with_its_lengths_and_answers_as_it_was_left(
    tmp_path, make_documents, make_config, lora, tiny_tokenizer
):
    trainer = CREAMTrainer(
        model=load_base(TINY_ID),
        args=make_config(context_length=256, target_length=2048, learning_rate=5e-2),
        train_dataset=make_documents(8, tokens=256),
        processing_class=tiny_tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    loaded = load_chat(tmp_path / "run", ChatSettings(" ".join([DOCUMENT] * 3), max_new_tokens=12))
    assert loaded.status() == "600 tokens in the context; the model was extended from 256 to 2,048"
    answers = answers_of(loaded)
    ids = loaded._ids([{"role": "user", "content": QUESTIONS[0]}])
    expected = trainer.model.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert tiny_tokenizer.decode(expected[0, len(ids) :]) == answers[0].strip()
    kept = load_chat(tmp_path / "run", ChatSettings(" ".join([DOCUMENT] * 3), max_new_tokens=12))
    kept.__class__ = FreshEachTurn
    assert answers_of(kept) == answers and len(set(answers)) > 1
