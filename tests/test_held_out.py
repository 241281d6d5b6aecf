"""A checkpoint chosen by the loss of held-out documents at plain positions beyond the window."""

import json
import re

import pytest
import torch
from conftest import TARGET, WINDOW
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from cream_peft import CREAMTrainer, cli
from cream_peft.model.record import Record, adapter_sha256
from cream_peft.train.checkpoints import CheckpointError
from cream_peft.train.rows import DataError

CHOICE = {
    "max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "save_total_limit": 2, "per_device_eval_batch_size": 1, "load_best_model_at_end": True, "eval_length": 2 * WINDOW,
    "learning_rate": 3e-2, "lr_scheduler_type": "constant",
}  # fmt: skip
BEST = 2


class WorsensAfterBest(TrainerCallback):
    """From the third step on the adapter is pushed ever further away from what it has learnt."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step > BEST:
            torch.manual_seed(state.global_step)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data += 0.3 * state.global_step * torch.randn_like(parameter)


@pytest.fixture
def repeated():
    """Documents of three windows that repeat a few tokens, which a step or two teaches."""
    return Dataset.from_dict({"input_ids": [[5 + (start + place) % 7 for place in range(3 * WINDOW)]
                                            for start in range(24)]})  # fmt: skip


@pytest.fixture
def make_chooser(repeated, make_model, make_config, tiny_tokenizer, lora):
    def make(callbacks=(), held_out=None, **changes):
        return CREAMTrainer(
            model=make_model(), args=make_config(**(CHOICE | changes)), train_dataset=repeated.select(range(20)),
            eval_dataset=repeated.select(held_out or range(20, 24)), processing_class=tiny_tokenizer,
            peft_config=lora(), callbacks=[WorsensAfterBest(), *callbacks],
        )  # fmt: skip

    return make


def same(one, other):
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_adapter_is_that_of_the_lowest_held_out_loss_at_plain_positions_beyond_the_window(make_chooser, tmp_path):
    trainer = make_chooser()
    assert next(iter(trainer.get_eval_dataloader()))["position_ids"].tolist() == [list(range(2 * WINDOW))]
    trainer.train()
    trainer.save_model()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert min(losses, key=losses.get) == BEST and losses[5] > losses[BEST] + 0.2
    run = tmp_path / "run"
    # Rotation keeps the best one, however old.
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{BEST}", "checkpoint-5"}
    assert same(run, run / f"checkpoint-{BEST}") and not same(run, run / "checkpoint-5")
    record = Record.read(run, "run")
    assert (record.best.step, record.best.metric, record.best.eval_length) == (BEST, "eval_loss", 2 * WINDOW)
    assert record.best.value == pytest.approx(losses[BEST]) and record.steps == 5
    assert record.adapter_sha256 == adapter_sha256(run / f"checkpoint-{BEST}")
    card = (run / "README.md").read_text()
    assert f"The weights are those of step {BEST}, the best on held-out documents of up to 128 tokens" in card
    # A checkpoint is what it was at its own step.
    assert json.loads((run / "checkpoint-5" / "cream.json").read_text())["best"] is None
    assert "those of step" not in (run / "checkpoint-5" / "README.md").read_text()


def test_without_the_choice_the_worse_last_step_is_taken(make_chooser, tmp_path):
    trainer = make_chooser(load_best_model_at_end=False)
    trainer.train()
    trainer.save_model()
    assert same(tmp_path / "run", tmp_path / "run" / "checkpoint-5")
    assert Record.read(tmp_path / "run", "run").best is None


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_resumed_run_takes_the_best_step_of_before_it_was_killed(make_chooser, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        make_chooser([StopsAt(4)]).train()
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{BEST}", "checkpoint-4"}
    trainer = make_chooser()
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    assert trainer.state.best_global_step == BEST and same(run, run / f"checkpoint-{BEST}")
    assert Record.read(run, "run").best.step == BEST


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_length": 3 * WINDOW}, "eval_length=128, now 192"),
        ({"metric_for_best_model": "eval_mean_token_accuracy"}, "metric_for_best_model=loss, now mean_token_accuracy"),
        ({"eval_dataset": range(19, 23)}, "other held-out documents (4 rows, sha256 "),
        ({"eval_dataset": range(20, 22)}, "other held-out documents (4 rows, sha256 "),
        ({"eval_dataset": range(20, 24), "metric_for_best_model": "eval_loss"}, None),
        ({"eval_dataset": range(19, 23), "load_best_model_at_end": False}, None),
    ],
)
def test_losses_that_cannot_be_compared_choose_no_checkpoint(changes, said, make_chooser, repeated):
    make_chooser(max_steps=2).train()
    held_out = changes.pop("eval_dataset", None)
    resumed = make_chooser(max_steps=3, held_out=held_out, **changes)
    if said is None:
        assert resumed.train(resume_from_checkpoint=True).global_step == 3
        return
    with pytest.raises(CheckpointError, match=f"was trained with {re.escape(said)}"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("mode", "lengths"), [("join", [124, 124]), ("shrink", [62] * 4)])
def test_short_documents_held_out_are_joined_to_eval_length_as_those_for_training_to_the_window(
    mode, lengths, make_model, make_config, tiny_tokenizer, lora
):
    short = Dataset.from_dict({"input_ids": [list(range(1, 63))] * 4})
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(short_documents=mode, eval_length=2 * WINDOW, target_length=TARGET),
        train_dataset=short, eval_dataset=short, processing_class=tiny_tokenizer, peft_config=lora(),
    )  # fmt: skip
    rows = trainer.eval_dataset
    fed = [trainer.data_collator([row])["input_ids"].shape[1] for row in rows]
    assert fed == lengths
    assert trainer.data_collator([rows[0]])["position_ids"][0].tolist() == list(range(fed[0]))


def test_predict_reads_what_it_is_handed_as_evaluate_does(make_chooser):
    trainer = make_chooser(loss_type="nll")
    documents = Dataset.from_dict({"input_ids": [[5 + place % 7 for place in range(3 * WINDOW)]] * 2})
    read = trainer.predict(documents)
    assert read.metrics["test_loss"] == pytest.approx(trainer.evaluate(documents)["eval_loss"])
    tokens = torch.tensor(documents["input_ids"])[:, : 2 * WINDOW]
    with torch.no_grad():
        logits = trainer.model(tokens).logits
    assert torch.allclose(torch.tensor(read.predictions), logits, atol=1e-4)


def test_a_held_out_document_without_a_label_to_score_does_not_count_as_a_loss_of_0(
    make_model, make_config, tiny_tokenizer, lora, caplog
):
    tokens = list(range(1, 2 * WINDOW))

    def trainer(labels):
        held_out = Dataset.from_dict({"input_ids": [tokens] * len(labels), "labels": labels})
        return CREAMTrainer(
            model=make_model(), args=make_config(eval_strategy="steps"), train_dataset=held_out, eval_dataset=held_out,
            processing_class=tiny_tokenizer, peft_config=lora(),
        )  # fmt: skip

    late = [-100] * WINDOW + tokens[WINDOW:]
    lower, mixed = trainer([tokens] * 2), trainer([tokens, tokens, late])
    assert (
        mixed.evaluate()["eval_loss"] == pytest.approx(lower.evaluate()["eval_loss"]) and len(mixed.eval_dataset) == 2
    )
    assert "1 of 3 held-out documents have no label within eval_length=64 and are left out" in caplog.text
    with pytest.raises(
        DataError, match=r"2 of 2 held-out documents have no label within eval_length=64\. These are too many"
    ):
        trainer([late] * 2)


def test_held_out_documents_are_evaluated_before_the_first_step_without_an_eval_strategy(tmp_path, capsys):
    asked = ["--eval_on_start", "true", "--held_out_documents", "4", "--max_steps", "1", "--output_dir", str(tmp_path)]
    assert cli.main(["train", *asked]) == 0
    assert "eval_strategy is no" not in capsys.readouterr().err
    first, *_ = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert first["step"] == 0 and "eval_loss" in first


@pytest.mark.parametrize(
    "asked",
    [
        ["--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "5", "--eval_on_start", "true"],
        ["--eval_strategy", "steps", "--eval_steps", "0.5", "--max_steps", "5"],
        ["--eval_strategy", "epoch", "--max_steps", "-1", "--num_train_epochs", "2"],
        ["--eval_strategy", "epoch", "--max_steps", "4"],
    ],
    ids=["every two steps and at the start", "every half run", "every epoch", "every epoch of so many steps"],
)
def test_train_says_how_often_what_is_held_out_is_read_and_what_that_costs(tmp_path, capsys, monkeypatch, asked):
    loop, losses = CREAMTrainer.evaluation_loop, []
    monkeypatch.setattr(CREAMTrainer, "evaluation_loop", lambda *args, **keys: losses.append(1) or loop(*args, **keys))
    batch = ["--max_documents", "28", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    held_out = ["--held_out_documents", "4", "--eval_length", "512", "--save_strategy", "no"]
    assert cli.main(["train", *batch, *held_out, *asked, "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    cost = re.search(r"held out: 4 documents of ([\d,]+) tokens, read (\d+) times, which by plan takes (\d+)%", said)
    assert int(cost[2]) == len(losses) > 0
    # A document is 256 tokens, and read forward alone, where training keeps, recomputes and differentiates.
    assert cost[1] == "1,024"
    fed = int(re.search(r"([\d,]+) tokens will be fed", said)[1].replace(",", ""))
    assert 0.2 < int(cost[3]) / 100 / (len(losses) * 1024 / fed) < 0.5
