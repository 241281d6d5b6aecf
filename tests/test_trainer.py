"""What the stack does silently, and that CREAMTrainer does not let it: one test a trap, with the trap as control."""

import copy
import inspect
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TARGET
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.masking_utils import create_causal_mask
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import cream_peft
from cream_peft import CREAMConfig, CREAMTrainer, load_adapter, rope
from cream_peft.model.base import keep_4bit_trainable_on_cpu, quantization_config
from cream_peft.model.record import AdapterError, Record, is_adapter, model_sha256
from cream_peft.publish.serving import ServingError, llama_cpp_command, vllm_command
from cream_peft.tiny import TINY_ID, base_folder
from cream_peft.train.collator import EVALUATION_ROW, ROW_COLUMN, CREAMDataCollator
from cream_peft.train.config import default_learning_rate
from cream_peft.train.output import refuse_output
from cream_peft.train.preflight import PositionError
from cream_peft.train.recipe import RecipeError, parse_recipe
from cream_peft.train.run import run_recipe
from cream_peft.train.watch import TrainingError


@pytest.fixture
def make_trainer(make_model, make_documents, make_config, tiny_tokenizer, lora):
    def make(model=None, documents=None, peft_config="default", cls=CREAMTrainer, eval_dataset=None, **changes):
        return cls(
            model=model if model is not None else make_model(),
            args=make_config(**changes),
            train_dataset=documents if documents is not None else make_documents(),
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            peft_config=lora() if peft_config == "default" else peft_config,
        )

    return make


def record_positions(model):
    """The position_ids that the rotary embedding is given, call by call."""
    seen = []
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1]).clone()), with_kwargs=True
            )
    return seen


# Attention


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_crosses_the_segments_only_where_a_mask_is_passed(make_model, implementation):
    model = make_model(attn_implementation=implementation).eval()
    ids = torch.arange(1, 31)[None]
    positions = torch.cat([torch.arange(10), torch.arange(200, 210), torch.arange(500, 510)])[None]
    causal = torch.full((30, 30), -math.inf).triu(1)[None, None]
    with torch.no_grad():
        by_hand = model(input_ids=ids, position_ids=positions, attention_mask=causal, use_cache=False).logits
        masked = model(
            input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
        unmasked = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (masked - by_hand).abs().max() < 1e-4
    assert (unmasked - by_hand).abs().max() > 1e-2  # control: jumps are taken for packed documents


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(make_trainer, reentrant):
    found = []
    for kwargs in (None, {"use_reentrant": reentrant}):
        trainer = make_trainer(gradient_checkpointing=kwargs is not None, gradient_checkpointing_kwargs=kwargs)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        found.append((loss, [p.grad for p in trainer.model.parameters() if p.grad is not None]))
    (loss, gradients), (loss_checkpointed, gradients_checkpointed) = found
    assert torch.equal(loss, loss_checkpointed) and len(gradients) == len(gradients_checkpointed) > 0
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, gradients_checkpointed, strict=True))


# The check before the first step


def test_training_is_refused_when_the_mask_is_missing(make_trainer):
    trainer = make_trainer()
    trainer.check_positions()  # control: as built, it passes
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "attention_mask"}
    # TRL's loss needs one of both to count tokens; position_ids are there, so it does not notice.
    with pytest.raises(PositionError, match="attention does not cross"):
        trainer.train()


def test_training_is_refused_when_positions_are_dropped_or_replaced(make_trainer):
    trainer = make_trainer()
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "position_ids"}
    with pytest.raises(PositionError, match="emits no position_ids"):
        trainer.train()
    trainer.data_collator = collate
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: {**prepare(inputs), "position_ids": inputs["position_ids"] * 0 + 1}
    with pytest.raises(PositionError, match="do not reach"):
        trainer.train()


def test_the_check_leaves_no_trace(make_trainer):
    def train(checked):
        trainer = make_trainer(peft_config="default", seed=5)
        if not checked:
            trainer.check_positions = lambda: None
        state = torch.get_rng_state()
        trainer.train()
        return state, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    (_, with_check), (_, without) = train(True), train(False)
    assert all(torch.equal(with_check[name], without[name]) for name in without)


# TRL


def test_trl_drops_a_position_ids_column_and_ours_come_from_the_collator(make_trainer, make_documents, make_model,
                                                                          tiny_tokenizer, tmp_path):  # fmt: skip
    documents = make_documents(positions_marker=[0] * 24).rename_column("positions_marker", "position_ids")
    theirs = SFTTrainer(
        model=make_model(),
        args=SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        train_dataset=documents,
        processing_class=_with_end_token(tiny_tokenizer),
    )
    assert "position_ids" not in next(iter(theirs.get_train_dataloader()))  # control
    batch = next(iter(make_trainer(documents=documents).get_train_dataloader()))
    assert batch["position_ids"].max() == 511


def _with_end_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<s>"
    return tokenizer


def test_whole_documents_reach_the_sampler(make_trainer, make_documents):
    assert SFTConfig("unused", bf16=False, use_cpu=True).max_length == 1024  # control: where TRL would cut
    trainer = make_trainer(documents=make_documents(8, tokens=1500), target_length=2048)
    assert {len(row["input_ids"]) for row in trainer.train_dataset} == {1500}
    assert trainer.args.max_length == 2048
    longer = make_trainer(documents=make_documents(8, tokens=1500), target_length=1024)
    assert {len(row["input_ids"]) for row in longer.train_dataset} == {1024}


def test_evaluation_runs_at_plain_positions_and_training_does_not(make_trainer, make_documents):
    trainer = make_trainer(eval_dataset=make_documents(8))
    seen = record_positions(trainer.model)
    trainer.evaluate()
    assert seen and all(torch.equal(row, torch.arange(64)) for call in seen for row in call)
    trainer.evaluate(trainer.train_dataset)  # its rows carry numbers: they must not turn into draws
    assert all(torch.equal(row, torch.arange(64)) for call in seen for row in call)
    seen.clear()
    trainer.train()
    assert max(int(call.max()) for call in seen) == 511  # control


def test_an_evaluation_set_called_train_is_not_the_training_set(make_trainer, make_documents):
    trainer = make_trainer(eval_dataset={"train": make_documents(8), "other": make_documents(8)})
    assert ROW_COLUMN in trainer.train_dataset.column_names
    assert set(trainer.eval_dataset["train"][ROW_COLUMN][:].tolist()) == {EVALUATION_ROW}
    seen = record_positions(trainer.model)
    trainer.evaluate()
    assert all(torch.equal(row, torch.arange(64)) for call in seen for row in call)


def test_the_row_number_survives_the_removal_of_unused_columns(make_trainer, make_documents):
    trainer = make_trainer(documents=make_documents(8, note=["x"] * 8))
    trainer._set_signature_columns_if_needed()
    kept = trainer._remove_unused_columns(trainer.train_dataset).column_names
    assert ROW_COLUMN in kept and "note" not in kept
    trainer._signature_columns = None
    SFTTrainer._set_signature_columns_if_needed(trainer)
    assert ROW_COLUMN not in trainer._signature_columns  # control: TRL alone would drop it


def test_draws_are_a_function_of_seed_epoch_and_row_through_the_trainer(make_trainer):
    def positions(**changes):
        trainer = make_trainer(max_steps=12, **changes)
        seen = record_positions(trainer.model)
        trainer.check_positions = lambda: None
        trainer.train()
        return torch.cat(seen)

    two_epochs = positions()
    assert torch.equal(two_epochs, positions(dataloader_num_workers=2, dataloader_persistent_workers=True))
    assert not torch.equal(two_epochs[:24].sort(0).values, two_epochs[24:48].sort(0).values)


@pytest.mark.parametrize(
    "name, value",
    [
        ("packing", True),
        ("eval_packing", True),
        ("padding_free", True),
        ("dataset_kwargs", {"skip_prepare_dataset": True}),
        ("max_length", 1024),
    ],
)
def test_options_that_undo_positions_are_refused_by_name(make_config, name, value):
    with pytest.raises(ValueError, match=name if name != "dataset_kwargs" else "skip_prepare_dataset"):
        make_config(**{name: value})


def test_the_loss_is_trls_own_and_equals_cross_entropy_over_the_draw(make_trainer):
    # Ours adds the gradient of self-distillation, which is off (test_distillation.py), and hands on to TRL's.
    trainer = make_trainer()
    assert trainer.args.distillation_weight == 0
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    model = trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"], use_cache=False,
        ).logits  # fmt: skip
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(loss, expected, atol=1e-5)


def test_on_a_cpu_only_positions_with_a_label_go_through_the_head_and_nothing_else_changes(make_trainer, monkeypatch):
    # Long questions, short answers: TRL projects the questions too where it has no Triton.
    documents = Dataset.from_dict({
        "input_ids": [[index % 300 + token for token in range(1, 60)] for index in range(4)],
        "completion_mask": [[0] * 55 + [1] * 4] * 4,
    })  # fmt: skip
    trainer = make_trainer(documents=documents, completion_only_loss=True)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert labels == 16
    projected = []

    class Watched(trl_utils._ChunkedLogProbFunction):
        @staticmethod
        def forward(ctx, hidden, *args):
            projected.append(len(hidden))
            return trl_utils_function.forward(ctx, hidden, *args)

    trl_utils_function = trl_utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Watched)

    def gradients(compute_loss):
        trainer.model.zero_grad()
        loss = compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(labels))
        loss.backward()
        return loss, [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]

    ours, control = gradients(trainer.compute_loss), gradients(partial(SFTTrainer.compute_loss, trainer))
    assert projected == [labels, batch["labels"][:, 1:].numel()]
    torch.testing.assert_close(ours, control)
    assert not trl_utils._use_triton(torch.device("cpu"))  # elsewhere TRL does as it did


def test_the_private_hooks_of_trl_that_are_overridden_still_have_their_shape():
    names = list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
    assert names == ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"]
    assert list(inspect.signature(SFTTrainer._set_signature_columns_if_needed).parameters) == ["self"]
    assert list(inspect.signature(SFTTrainer._save).parameters) == ["self", "output_dir", "state_dict"]
    assert list(inspect.signature(create_causal_mask).parameters)[:3] == ["config", "inputs_embeds", "attention_mask"]


def test_a_missing_pad_token_becomes_the_end_token_and_nothing_is_resized(make_trainer, make_model, tiny_tokenizer):
    tiny_tokenizer.pad_token, tiny_tokenizer.eos_token = None, "v00"
    model = make_model()
    trainer = make_trainer(model=model)
    assert trainer.processing_class.pad_token == "v00"
    assert trainer.data_collator.pad_token_id == tiny_tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] == 385


# RoPE and 4-bit


def test_a_model_object_is_scaled_by_the_trainer_and_a_name_is_too(make_trainer, make_model, tmp_path, tiny_tokenizer):
    model = make_model()
    before = model.model.rotary_emb.inv_freq.clone()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=model)
    expected = rope.scaled_config(make_model().config, 512, "ntk")
    rope.check_scaling(trainer.model, expected)
    assert not torch.equal(before, model.model.rotary_emb.inv_freq)  # control
    named = make_trainer(model=str(tmp_path / "base"))
    rope.check_scaling(named.model, expected)
    again = make_trainer(model=make_trainer(model=model, peft_config=None).model)
    rope.check_scaling(again.model, expected)  # scaled once, however often it is handed over


def quantized(make_model, tmp_path, **changes):
    from transformers import AutoModelForCausalLM

    make_model(**changes).save_pretrained(tmp_path / "quantizable")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantizable", quantization_config=quantization_config(torch.float32), dtype=torch.float32
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"target_modules": ["q_proj", "k_prj"]},
            r"target_modules: .* no module 'k_prj' \(did you mean 'k_proj'\?\)",
        ),
        ({"target_modules": ["q_proj", "proj"]}, "lora_target_modules: the base has no module 'proj'"),
        (
            {"modules_to_save": ["norm", "imput_layernorm"]},
            r"no module 'imput_layernorm' \(did you mean 'input_l",
        ),
    ],
)
def test_a_module_that_the_base_has_not_is_refused(make_trainer, lora, changes, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(peft_config=lora(**changes))


def test_norms_are_not_trained_in_fp32_before_layers_that_cannot_take_it(make_trainer, make_model, lora):
    norms = lora(modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"=\['norm'\] trains in float32 .* in bfloat16, .* dtype to float32 on a CPU"):
        make_trainer(model=make_model().to(torch.bfloat16), peft_config=norms)
    make_trainer(peft_config=norms, max_steps=1).train()
    # Under mixed precision it can, also where positions are checked, before transformers has put it on.
    make_trainer(model=make_model().to(torch.bfloat16), peft_config=norms, bf16=True, use_cpu=True, max_steps=1).train()


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (None, r"inv_freq is torch\.bfloat16"),
        ("DeepSpeed", "rounded RoPE: install deepspeed>="),
        ("FSDP", "version to 2"),
    ],
)
def test_frequencies_that_are_rounded_after_construction_stop_training_before_its_first_step(
    by, said, make_trainer, monkeypatch
):
    trainer = make_trainer()
    # As a launcher's wrapper may.
    rotary = trainer.model.get_base_model().model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16)
    monkeypatch.setattr(CREAMConfig, "sharded_by", by)
    with pytest.raises(rope.RopeError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("held_out", [False, True])
def test_several_processes_are_refused_a_stream_which_each_would_number_anew(
    held_out, make_trainer, make_documents, monkeypatch
):
    monkeypatch.setattr(CREAMConfig, "world_size", 2)
    stream = make_documents().to_iterable_dataset()
    sets = {"eval_dataset": {"far": stream}} if held_out else {"documents": stream}
    with pytest.raises(ValueError, match="a streamed data set cannot go with 2 processes"):
        make_trainer(**sets, max_steps=1)


@pytest.mark.parametrize("is_whole", [False, True])
def test_whole_weights_are_refused_under_deepspeed_which_leaves_none_whole(is_whole, make_trainer, lora, monkeypatch):
    monkeypatch.setattr(CREAMConfig, "sharded_by", "DeepSpeed")
    if not is_whole:
        assert make_trainer()
        return
    with pytest.raises(ValueError, match="use_peft=false cannot go with DeepSpeed"):
        make_trainer(peft_config=None)


def test_adapters_on_a_4bit_base_stay_in_fp32(make_trainer, make_model, tmp_path, tiny_tokenizer, lora, make_documents):
    trainer = make_trainer(model=quantized(make_model, tmp_path))
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert trainable and all(p.dtype == torch.float32 for p in trainable)
    theirs = SFTTrainer(
        model=quantized(make_model, tmp_path),
        args=SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        train_dataset=make_documents(),
        processing_class=_with_end_token(tiny_tokenizer),
        peft_config=lora(),
    )
    assert {p.dtype for p in theirs.model.parameters() if p.requires_grad} == {torch.bfloat16}  # control


def test_an_adapter_handed_over_keeps_every_bit(make_trainer, make_model, tmp_path, lora):
    model = get_peft_model(quantized(make_model, tmp_path), lora())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model=model, peft_config=None)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    rounded = [p.to(torch.bfloat16).float() for p in before.values()]  # control: what TRL's cast would leave
    assert any(not torch.equal(a, b) for a, b in zip(rounded, before.values(), strict=True))


def first_gradient(trainer):
    trainer.model.train().zero_grad()
    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]])).backward()
    gradients = [p.grad for name, p in trainer.model.named_parameters() if "layers.0" in name and "lora_B" in name]
    return torch.cat([gradient.flatten() for gradient in gradients])


def has_packed_product():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags


def test_4bit_training_on_a_cpu_survives_an_evaluation(make_trainer, make_model, make_documents, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    trainer = make_trainer(model=quantized(make_model, tmp_path, **sizes), eval_dataset=make_documents(8))
    before = first_gradient(trainer)
    trainer.evaluate()
    assert torch.equal(before, first_gradient(trainer))


@pytest.mark.skipif(not has_packed_product(), reason="this processor has no AVX512-BF16, where the trap lies")
def test_control_without_the_switch_an_evaluation_cuts_the_gradient(make_trainer, make_model, make_documents, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    trainer = make_trainer(model=quantized(make_model, tmp_path, **sizes), eval_dataset=make_documents(8))
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    before = first_gradient(trainer)
    trainer.evaluate()
    assert first_gradient(trainer).norm() < 0.5 * before.norm()
    keep_4bit_trainable_on_cpu(trainer.model)


def test_what_the_window_of_a_linearly_scaled_base_is_taken_for_is_said(make_trainer, make_model, caplog):
    for parameters, count in (({"rope_type": "default"}, 0), ({"rope_type": "linear", "factor": 4.0}, 1)):
        model = make_model(rope_parameters=parameters | {"rope_theta": 10_000.0})
        trainer = make_trainer(model=model, rope_scaling_type="ntk")
        assert trainer.pretrained_window == 64
        assert caplog.text.count("64, is taken for all that it reads. If that is 256, set it") == count


@pytest.mark.parametrize(("scaling", "target", "is_said"), [(None, 512, True), ("yarn", 512, False), (None, 64, False)])
def test_a_target_beyond_the_window_without_scaling_is_doubted(
    scaling, target, is_said, make_trainer, make_model, caplog
):
    make_trainer(model=make_model(), rope_scaling_type=scaling, target_length=target, context_length=32)
    assert (
        "rope_scaling_type is none and target_length=512 is beyond the base's window of 64" in caplog.text
    ) is is_said


# Short documents and what is left behind


def test_short_documents_are_shrunk_skipped_or_joined(make_trainer):
    rows = Dataset.from_dict({"input_ids": [[size] * size for size in (20, 30, 100, 40, 10, 14, 200, 64, 10)]})
    shrunk = make_trainer(documents=rows)
    assert [len(row["input_ids"]) for row in shrunk.train_dataset] == [20, 30, 100, 40, 10, 14, 200, 64, 10]
    skipped = make_trainer(documents=rows, short_documents="skip")
    assert [len(row["input_ids"]) for row in skipped.train_dataset] == [100, 200, 64]
    joined = make_trainer(documents=rows, short_documents="join")
    # Whole, and none in a window with a part of another: a crop would take away what an answer refers to.
    assert [len(row["input_ids"]) for row in joined.train_dataset] == [50, 100, 64, 200, 64, 10]
    assert list(dict.fromkeys(joined.train_dataset[2]["input_ids"])) == [40, 10, 14]
    batch = next(iter(shrunk.get_train_dataloader()))
    assert all(int(row[mask.bool()][-1]) == 511 for row, mask in zip(batch["position_ids"], batch["attention_mask"],
                                                                     strict=True))  # fmt: skip


def test_what_training_leaves_says_how_the_base_was_scaled_and_nothing_private(make_trainer, make_model, tmp_path):
    import json

    base = tmp_path / "private-folder" / "my-base"
    make_model().save_pretrained(base)
    trainer = make_trainer(model=str(base), hub_token="hf_secret", save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json", "base_config/config.json",
                 "cream.json", "README.md"):  # fmt: skip
        assert (folder / name).is_file() and (folder / "checkpoint-2" / name).is_file(), name
    description = json.loads((folder / "cream.json").read_text())
    assert description["target_length"] == 512 and description["pretrained_window"] == 64
    assert description["positions"]["strategy"] == "cream" and description["steps"] == 2
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-base"
    # base_folder.txt is for this machine.
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "base_folder.txt"]
    content = b"".join(path.read_bytes() for path in files if path.suffix != ".pt")
    assert b"hf_secret" not in content and b"private-folder" not in content
    assert rope.load_base_config(folder).max_position_embeddings == 512


def test_a_collator_of_the_users_own_is_taken_if_it_draws_as_the_config_says(
    make_model, make_documents, make_config, tiny_tokenizer, lora
):
    class Counting(CREAMDataCollator):
        batches = 0

        def __call__(self, examples):
            self.batches += 1
            return super().__call__(examples)

    def make(collator):
        return CREAMTrainer(
            model=make_model(), args=make_config(), data_collator=collator, train_dataset=make_documents(),
            processing_class=tiny_tokenizer, peft_config=lora(),
        )  # fmt: skip

    trainer = make(own := Counting(0, context_length=64, target_length=512, seed=9))
    assert trainer.data_collator is own and own.seed == 9
    # What is left out is the config's.
    left_out = make(CREAMDataCollator(0, context_length=64, target_length=512)).data_collator
    assert (left_out.seed, left_out.eval_length) == (0, 64)
    assert math.isfinite(trainer.train().training_loss) and own.batches
    for wrong in ({"context_length": 32}, {"target_length": 1024}, {"position_strategy": "pose"}, {"eval_length": 32}):
        with pytest.raises(ValueError, match=f"data_collator has {next(iter(wrong))}=.*make them equal"):
            make(CREAMDataCollator(0, **({"context_length": 64, "target_length": 512} | wrong)))
    with pytest.raises(ValueError, match="DataCollatorForLanguageModeling draws no CREAM positions"):
        make(DataCollatorForLanguageModeling(pad_token_id=0))


@pytest.mark.parametrize(
    "changes, weight, said",
    [
        ({"bias": "all"}, 1.0, "bias=all, which changes the base"),
        ({"init_lora_weights": "pissa"}, 1.0, "init_lora_weights=pissa, which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, 0.0, "the loaded adapter would not be the trained one"),
        ({"init_lora_weights": "eva"}, 0.0, "the loaded adapter would not be the trained one"),
    ],
)
def test_an_adapter_that_changes_its_base_is_refused_where_that_is_needed(make_trainer, lora, changes, weight, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(peft_config=lora(**changes), distillation_weight=weight)


@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "orthogonal"},
                {"init_lora_weights": "gaussian"}, {"bias": "all"}]
)  # fmt: skip
def test_an_adapter_is_loaded_as_it_was_trained_however_it_begins(make_trainer, lora, changes):
    trainer = make_trainer(TINY_ID, peft_config=lora(**changes))
    trainer.train()
    trainer.save_model()
    loaded, _ = load_adapter(trainer.args.output_dir, load_in_4bit=False)
    ids = torch.arange(1, 301)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (trainer.model.eval(), loaded.eval())]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_an_adapter_that_is_not_called_default_is_refused_before_it_is_trained(make_trainer, make_model, lora):
    with pytest.raises(ValueError, match="the model's adapter is called 'long'"):
        make_trainer(get_peft_model(make_model(), lora(), adapter_name="long"), peft_config=None)


def test_an_adapter_that_nothing_serves_is_saved_all_the_same(make_trainer):
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    trainer = make_trainer(TINY_ID, peft_config=config)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    record = Record.read(folder, "")
    assert record.steps == 2 and (folder / "README.md").is_file()
    assert "takes LoRA adapters alone, and this one is IA3" in vllm_command(folder, record, "a/b")
    with pytest.raises(ServingError, match="takes LoRA adapters alone, and this one is IA3"):
        llama_cpp_command(folder, record)


def test_saving_elsewhere_replaces_nothing_that_no_run_wrote(make_trainer, tmp_path):
    base = Path(shutil.copytree(base_folder(), tmp_path / "base"))
    trainer = make_trainer(str(base))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    for folder in (base, tmp_path / "other"):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="choose another"):
            trainer.save_model(str(folder))
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for _ in range(2):
        trainer.save_model(str(tmp_path / "new"))
    assert is_adapter(tmp_path / "new")


@pytest.mark.parametrize("with_adapter", [True, False])
def test_a_base_whose_every_weight_is_trained_is_loaded_in_fp32(make_trainer, lora, monkeypatch, with_adapter):
    read = []

    def loaded(name, **options):
        read.append(options.get("dtype"))
        raise OSError("no GPU here")

    monkeypatch.setattr("cream_peft.train.trainer.load_base", loaded)
    with pytest.raises(OSError, match="no GPU here"):
        make_trainer(TINY_ID, peft_config=lora() if with_adapter else None)
    assert read == [None if with_adapter else torch.float32]


def test_a_loss_of_the_users_own_is_told_how_many_labels_there_are(
    make_model, make_documents, make_config, tiny_tokenizer, lora
):
    counts = []

    def loss(outputs, labels, num_items_in_batch):
        counts.append(int(num_items_in_batch))
        found = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return found * labels[:, 1:].numel() / num_items_in_batch

    trainer = CREAMTrainer(
        model=make_model(), args=make_config(), train_dataset=make_documents(), processing_class=tiny_tokenizer,
        peft_config=lora(), compute_loss_func=loss,
    )  # fmt: skip
    assert math.isfinite(trainer.train().training_loss)
    assert len(counts) > 2 and min(counts) > 0


def test_a_processor_is_refused_for_its_tokenizer(make_model, make_config, make_documents, lora):
    class Processor(ProcessorMixin):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match="pass its tokenizer"):
        CREAMTrainer(
            model=make_model(), args=make_config(), train_dataset=make_documents(), peft_config=lora(),
            processing_class=Processor(),
        )  # fmt: skip


def test_tokens_that_are_padding_or_outside_of_the_mask_carry_no_labels(make_trainer, make_documents):
    rows = make_documents(8, tokens=100)["input_ids"]
    padded = Dataset.from_dict({
        "input_ids": [row[:20] + [0] * 80 for row in rows], "attention_mask": [[1] * 20 + [0] * 80] * 8,
    })  # fmt: skip
    stream = padded.to_iterable_dataset()
    for documents in (padded, stream):
        (first, *_) = make_trainer(documents=documents).train_dataset
        assert list(first["input_ids"]) == rows[0][:20] == list(first["labels"])
    masked = Dataset.from_dict({"input_ids": rows, "completion_mask": [[0] * 90 + [1] * 10] * 8})
    for asked, labels in ((None, 10), (False, 100)):
        trainer = make_trainer(documents=masked, completion_only_loss=asked)
        assert sum(label != -100 for label in trainer.train_dataset[0]["labels"]) == labels


def test_the_training_set_handed_over_for_evaluation_is_evaluated_at_plain_positions(make_trainer, make_documents):
    documents = make_documents(8)
    trainer = make_trainer(documents=documents, eval_dataset=documents)
    seen = record_positions(trainer.model)
    trainer.evaluate()
    trainer.evaluate(documents)
    assert seen and all(torch.equal(row, torch.arange(64)) for call in seen for row in call)


def test_a_streamed_set_gets_new_draws_in_every_pass_and_refuses_workers(make_trainer, make_documents):
    def positions(**changes):
        trainer = make_trainer(documents=make_documents(8).to_iterable_dataset(), max_steps=4, **changes)
        trainer.check_positions = lambda: None
        seen = record_positions(trainer.model)
        trainer.train()
        return torch.cat(seen)

    drawn = positions()
    assert torch.equal(drawn, positions())
    assert drawn.shape == (16, 64) and not torch.equal(drawn[:8], drawn[8:])
    with pytest.raises(ValueError, match="dataloader_num_workers=2 cannot go with a streamed"):
        positions(dataloader_num_workers=2)


# Runs that lead to nothing


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_last_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    compute = trainer.compute_loss

    def poisoned(*args, **kwargs):
        result = compute(*args, **kwargs)
        return result * float("nan") if trainer.state.global_step == 2 and trainer.model.training else result

    trainer.compute_loss = poisoned
    with pytest.raises(TrainingError, match=r"gradients of step 3 are not finite.*learning_rate \(0.01\)"):
        trainer.train()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (folder / "cream.json").exists()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)


def test_training_that_changes_no_weight_is_no_training(make_trainer):
    class NoRate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    trainer = make_trainer(max_steps=1)
    trainer.add_callback(NoRate())
    with pytest.raises(TrainingError, match=r"changed no weight.*learning_rate \(0.01\)"):
        trainer.train()
    make_trainer(max_steps=1, warmup_steps=5).train()  # control; a warm-up would leave its only step without a rate


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(make_trainer):
    trainer = make_trainer(max_steps=1)

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            next(p for p in model.parameters() if p.requires_grad).data.fill_(math.inf)

    trainer.add_callback(Poison())
    with pytest.raises(TrainingError, match="trained weights are not finite"):
        trainer.train()


# The user's config


def test_the_config_stays_as_it_was_and_serves_for_another_base(
    make_model, make_documents, tiny_tokenizer, lora, tmp_path
):
    config = CREAMConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    before = copy.copy(config)
    lengths = []
    for window in (64, 128):
        trainer = CREAMTrainer(
            model=make_model(max_position_embeddings=window), args=config, train_dataset=make_documents(),
            processing_class=tiny_tokenizer, peft_config=lora(),
        )  # fmt: skip
        lengths.append((trainer.args.context_length, trainer.args.target_length))
    assert lengths == [(64, 512), (128, 1024)]
    assert config == before
    assert replace(config, position_strategy="pose", learning_rate=1e-3).learning_rate == 1e-3


def test_left_open_the_rate_is_that_of_the_bases_size(make_trainer, make_model):
    assert make_trainer(learning_rate=None).args.learning_rate == default_learning_rate(64) == 5.1e-3
    assert default_learning_rate(4096) == 2e-4
    assert make_trainer(learning_rate=None, peft_config=None).args.learning_rate == pytest.approx(5.1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantization_config": quantization_config(torch.float32)}, "quantization_config goes with a model's name"),
        ({"model": "adapter"}, "peft_config goes with a base"),
        ({"model": "frozen", "peft_config": None}, "adapter is frozen.*is_trainable=True"),
        ({"model": TINY_ID, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "a base in 8 bits"),
        ({"bf16_full_eval": True, "use_cpu": True}, "bf16_full_eval=true rounds RoPE's frequencies"),
        ({"fp16_full_eval": True}, "fp16_full_eval=true rounds"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=4)}, "peft_config=PROMPT_TUNING puts tokens of its own"),
    ],
)
def test_arguments_that_exclude_one_another_are_refused_at_construction(
    given, message, make_model, make_documents, make_config, tiny_tokenizer, lora
):
    settings = {"model": make_model(), "peft_config": lora()} | given
    args = make_config(
        **{key: settings.pop(key) for key in given if key in ("use_cpu", "bf16_full_eval", "fp16_full_eval")}
    )
    if settings["model"] in ("adapter", "frozen"):
        adapter = get_peft_model(make_model(), lora())
        adapter.requires_grad_(settings["model"] != "frozen")
        settings["model"] = adapter
    with pytest.raises(ValueError, match=message):
        CREAMTrainer(args=args, train_dataset=make_documents(), processing_class=tiny_tokenizer, **settings)


def test_several_held_out_sets_need_a_metric_of_one_before_anything_is_trained(make_trainer, make_documents):
    sets = {name: make_documents(2) for name in ("near", "far")}
    best = dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | {"load_best_model_at_end": True}
    best |= {"eval_steps": 1, "save_steps": 1}
    with pytest.raises(ValueError, match="set metric_for_best_model to the loss of one, of eval_near_loss, eval_far_"):
        make_trainer(eval_dataset=sets, **best)
    trainer = make_trainer(eval_dataset=sets, metric_for_best_model="eval_far_loss", **best)
    trainer.train()
    assert trainer.best.metric == "eval_far_loss"


def changed(model, how):
    if how == "merged":
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).merge_and_unload()
    if how == "tokens added":
        model.resize_token_embeddings(400)
    return model.to(torch.bfloat16) if how == "another dtype" else model


@pytest.mark.parametrize("how", ["merged", "tokens added", "another dtype", "as it is"])
def test_a_base_that_was_changed_in_memory_is_refused_since_the_adapter_would_name_another(how, make_trainer, tmp_path):
    base = changed(AutoModelForCausalLM.from_pretrained(base_folder()), how)
    if how in ("another dtype", "as it is"):
        assert make_trainer(base)
        return
    with pytest.raises(
        ValueError, match=r"the model's model\.\S+ has other values than the files of .* save_pretrained"
    ):
        make_trainer(base)
    # As a base of its own it can be named; where every weight is trained nothing is.
    base.save_pretrained(tmp_path / "base")
    assert make_trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) and make_trainer(
        base, peft_config=None
    )


def test_an_adapter_that_was_trained_elsewhere_is_said_to_tell_nothing_of_its_scaling(
    make_trainer, make_model, lora, caplog
):
    model = get_peft_model(make_model(), lora())
    make_trainer(model, peft_config=None)
    assert "is trained already" not in caplog.text
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    make_trainer(model, peft_config=None)
    assert "the model's adapter is trained already, and nothing says with which RoPE scaling" in caplog.text


def test_each_set_says_for_itself_that_its_completions_alone_count(make_trainer, make_documents):
    tokens, mask = list(range(1, 33)), [0] * 24 + [1] * 8
    masked = Dataset.from_dict({"input_ids": [tokens] * 4, "completion_mask": [mask] * 4})
    for sets in ((masked, make_documents(4)), (make_documents(4), masked)):
        trainer = make_trainer(documents=sets[0], eval_dataset=sets[1])
        for found, given in zip((trainer.train_dataset, trainer.eval_dataset), sets, strict=True):
            labels = found[0]["labels"].tolist()
            assert ([label != -100 for label in labels] == [bool(one) for one in mask]) is (given is masked)
    every = make_trainer(documents=make_documents(4), eval_dataset=masked, completion_only_loss=False)
    assert -100 not in every.eval_dataset[0]["labels"]


def test_a_model_that_was_made_in_memory_does_not_name_the_current_folder_as_its_base(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "base_folder.txt").exists()
    with pytest.raises(AdapterError, match="say where it lies with base_model"):
        load_adapter(tmp_path / "saved", load_in_4bit=False)


def test_the_tokenizer_does_not_warn_of_what_the_model_is_about_to_read(make_trainer):
    tokenizer = make_trainer().processing_class
    assert tokenizer.model_max_length == TARGET


def test_help_and_dir_show_what_there_is():
    assert set(cream_peft.__all__) <= set(dir(cream_peft))
    assert {"cream", "pose", "POSITION_STRATEGIES"} <= set(cream_peft.__all__)
    assert "position_strategy: How positions are drawn" in CREAMConfig.__doc__


# Every weight trained


def test_every_weight_is_trained_saved_and_resumed_as_a_whole_model(make_trainer, make_model, tmp_path):
    trainer = make_trainer(peft_config=None, save_strategy="steps", save_steps=1, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    record = Record.read(folder, "run")
    assert record.full and record.merged and record.dtype == "float32" and record.target_length == 512
    assert not is_adapter(folder) and record.adapter_sha256 == model_sha256(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert loaded.config.max_position_embeddings == 512
    assert torch.equal(loaded.model.rotary_emb.inv_freq, trainer.model.model.rotary_emb.inv_freq)
    before = dict(make_model().named_parameters())
    assert not any(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    resumed = make_trainer(peft_config=None, learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert all(torch.equal(p, resumed.model.get_parameter(n)) for n, p in trainer.model.named_parameters())


# A second stage


def test_an_adapter_is_trained_further_to_a_longer_target(adapter, make_documents, make_config, tmp_path):
    model, tokenizer = load_adapter(adapter, is_trainable=True, load_in_4bit=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert before and all("lora" in name for name in before)
    lengths = {"context_length": 256, "target_length": 4096}
    with pytest.raises(ValueError, match="rope_scaling_type=yarn, and the adapter was trained with ntk"):
        CREAMTrainer(model=model, args=make_config(rope_scaling_type="yarn"), train_dataset=make_documents())
    trainer = CREAMTrainer(
        model=model, args=make_config(**lengths), train_dataset=make_documents(tokens=300), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    record = Record.read(tmp_path / "run", "run")
    # The window is that of the base, not the first target, to which the model's config had been scaled.
    assert (record.pretrained_window, record.target_length, record.positions.factor) == (256, 4096, 16.0)
    earlier = Record.read(adapter, "adapter")
    assert [stage["adapter_sha256"] for stage in record.stages] == [earlier.adapter_sha256]
    assert record.stages[0]["target_length"] == 2048 and record.stages[0]["steps"] == 2
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    loaded, _ = load_adapter(tmp_path / "run", load_in_4bit=False)
    ids = torch.arange(300)[None] % 385
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_a_model_loaded_with_the_saved_base_config_has_the_bases_window(adapter, make_documents, make_config):
    config = AutoConfig.from_pretrained(adapter, subfolder="base_config")
    base = AutoModelForCausalLM.from_pretrained(base_folder(), config=config)
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    args = make_config(context_length=None, target_length=2048)
    trainer = CREAMTrainer(model=model, args=args, train_dataset=make_documents())
    assert (trainer.pretrained_window, trainer.args.context_length) == (256, 256)
    assert rope.pretrained_window(config) == 2048  # control: what its config says


def test_a_second_stage_has_the_tokenizer_and_the_chat_template_of_the_first(
    adapter, make_documents, make_config, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template, tokenizer.eos_token = "{{ messages }}", ".07"
    tokenizer.save_pretrained(adapter)
    model, _ = load_adapter(adapter, is_trainable=True, load_in_4bit=False)
    args = make_config(context_length=256, target_length=2048)
    in_python = CREAMTrainer(model=model, args=args, train_dataset=make_documents(tokens=300))
    arguments = ["--adapter_name_or_path", str(adapter), "--max_steps", "1", "--output_dir", str(tmp_path / "second")]
    arguments += ["--dataset_name", "cream-peft-tiny", "--context_length", "128", "--gradient_accumulation_steps", "1"]
    run_recipe(parse_recipe(arguments))
    for found in (in_python.processing_class, AutoTokenizer.from_pretrained(tmp_path / "second")):
        assert (found.chat_template, found.eos_token) == ("{{ messages }}", ".07")


def test_a_window_that_is_the_whole_target_is_said_to_leave_nothing_to_draw(
    make_model, make_config, make_documents, tiny_tokenizer, lora, caplog
):
    for lengths, said in (((64, 64), 1), ((32, 64), 0), ((64, 512), 0)):
        caplog.clear()
        config = make_config(context_length=lengths[0], target_length=lengths[1])
        own = {"train_dataset": make_documents(), "processing_class": tiny_tokenizer, "peft_config": lora()}
        CREAMTrainer(make_model(), config, **own)
        assert len([line for line in caplog.messages if "no other positions to draw" in line]) == said


def test_a_recipe_trains_an_adapter_further(adapter, tmp_path):
    arguments = ["--adapter_name_or_path", str(adapter), "--max_steps", "1", "--output_dir", str(tmp_path / "second")]
    arguments += ["--dataset_name", "cream-peft-tiny", "--per_device_train_batch_size", "2", "--context_length", "128"]
    run_recipe(parse_recipe([*arguments, "--gradient_accumulation_steps", "1"]))
    record, earlier = (Record.read(folder, "x") for folder in (tmp_path / "second", adapter))
    assert (record.rope_scaling_type, record.target_length) == (earlier.rope_scaling_type, earlier.target_length)
    assert record.stages == [earlier.as_stage()]
    with pytest.raises(RecipeError, match="lora_r cannot go with adapter_name_or_path"):
        run_recipe(parse_recipe([*arguments, "--lora_r", "8"]))
    with pytest.raises(RecipeError, match=r"output_dir=.* is adapter_name_or_path, which would be overwritten"):
        run_recipe(parse_recipe([*arguments, "--output_dir", str(adapter)]))
    with pytest.raises(ValueError, match="target_length=1024, and the adapter reached 2048"):
        run_recipe(parse_recipe([*arguments, "--target_length", "1024"]))


def test_a_run_does_not_take_the_place_of_its_base_or_of_a_model_that_no_run_wrote(
    make_model, make_config, make_documents, tiny_tokenizer, tmp_path
):
    base, weights, elsewhere, plain = (tmp_path / name for name in ("base", "weights", "elsewhere", "plain"))
    make_model().save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    shutil.copytree(base, weights)
    (weights / "config.json").unlink()
    # As TRL's own trainer leaves it.
    shutil.copytree(base, plain / "checkpoint-100")
    before = {path: path.read_bytes() for folder in (base, weights, plain) for path in folder.rglob("*.*")}
    words = [
        "--max_steps",
        "1",
        "--target_length",
        "1024",
        "--dataset_name",
        TINY_ID,
        "--model_name_or_path",
        str(base),
    ]
    link = tmp_path / "link"
    link.symlink_to(base)
    for folder, line in (
        (base, "is the base"),
        (link, "is the base"),
        (weights, "holds model.safetensors, which no run"),
        (plain, "holds checkpoint-100, which no run"),
    ):
        with pytest.raises(ValueError, match=f"output_dir={folder} {line}.*: choose another"):
            run_recipe(parse_recipe([*words, "--output_dir", str(folder)]))
        with pytest.raises(ValueError, match=f"output_dir={folder} {line}.*: choose another"):
            CREAMTrainer(str(base), make_config(output_dir=str(folder)), train_dataset=make_documents())
    # A run's own folder is overwritten, killed or not, and whatever else lies in a new one stays.
    for name in ("cream.json", ".saving", "checkpoint-2/cream.json", "checkpoint-2/.saving"):
        shutil.copytree(weights, elsewhere / name)
        (elsewhere / name / name).mkdir(parents=True)
        refuse_output(elsewhere / name, str(base))
    (tmp_path / "killed/checkpoint-2").mkdir(parents=True)
    refuse_output(tmp_path / "killed", str(base))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/template.jinja").touch()
    refuse_output(tmp_path / "new", str(base))
    assert {path: path.read_bytes() for path in before} == before
