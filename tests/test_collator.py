import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from cream_peft import CREAMTrainer
from cream_peft.positions import POSITION_STRATEGIES, options_of
from cream_peft.train.collator import DRAWS_PER_ROW, EVALUATION_ROW, ROW_COLUMN, CREAMDataCollator


def collator(**changes):
    settings = {"pad_token_id": 0, "context_length": 64, "target_length": 512, "seed": 3}
    return CREAMDataCollator(**(settings | changes))


def rows(count=12, tokens=200):
    ids = np.arange(1, tokens + 1)
    return [{"input_ids": ids, ROW_COLUMN: row} for row in range(count)]


def draws(batches):
    return torch.cat([batch["position_ids"] for batch in batches])


@pytest.mark.parametrize("strategy", POSITION_STRATEGIES)
def test_tokens_and_labels_are_gathered_together_and_the_mask_is_always_there(strategy):
    example = {"input_ids": np.arange(1, 201), "labels": np.arange(1001, 1201), ROW_COLUMN: 5}
    batch = collator(position_strategy=strategy)([example])
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert all(tensor.shape == (1, 64) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert torch.equal(batch["labels"], batch["input_ids"] + 1000)
    assert batch["attention_mask"].all()


def test_masks_come_from_lengths_so_a_pad_token_inside_a_document_stays_visible():
    ids = np.array([1, 0, 2, 0, 3])  # 0 is the pad token, and the end token of the documents
    batch = collator(pad_token_id=0)([{"input_ids": ids, ROW_COLUMN: 0}, {"input_ids": np.arange(1, 9), ROW_COLUMN: 1}])
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]
    assert batch["labels"][0].tolist() == [1, 0, 2, 0, 3, -100, -100, -100]
    made_from_ids = batch["input_ids"] != 0  # control: what a mask made from ids would hide
    assert made_from_ids[0].sum() == 3


@pytest.mark.parametrize("strategy", ["cream", "pose", "contiguous"])
def test_position_0_occurs_once_in_every_row_padding_included(strategy):
    """Flash attention splits a row wherever its smallest position comes again."""
    examples = [{"input_ids": np.arange(1, size), ROW_COLUMN: size} for size in (5, 40, 300)]
    positions = collator(position_strategy=strategy, pad_to_multiple_of=16)(examples)["position_ids"]
    assert positions.shape[1] % 16 == 0
    assert ((positions == 0).sum(1) == 1).all()
    assert (positions.diff(dim=1) > 0).all()


def test_evaluation_documents_get_plain_positions_and_training_documents_do_not():
    document = {"input_ids": np.arange(1, 201)}
    plain = collator(eval_length=50)([{**document, ROW_COLUMN: EVALUATION_ROW}])
    assert torch.equal(plain["position_ids"][0], torch.arange(50))
    assert torch.equal(plain["input_ids"][0], torch.arange(1, 51))
    drawn = collator(eval_length=50)([{**document, ROW_COLUMN: 0}])  # control: the row number makes the difference
    assert drawn["position_ids"].max() == 511


def test_outside_creamtrainer_the_collator_refuses_what_it_cannot_draw(make_model, make_documents, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(make_model(), arguments, data_collator=collator(), train_dataset=make_documents(4))
    with pytest.raises(ValueError, match=r"no document_row.*use CREAMTrainer"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_the_same_whatever_the_workers_and_follow_the_epoch(workers):
    collate = collator()
    loader = DataLoader(rows(), batch_size=3, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    found = []
    for epoch in (0, 1, 0):
        collate.set_epoch(epoch)
        found.append(draws(loader))
    reference = collator()
    for epoch, drawn in zip((0, 1, 0), found, strict=True):
        reference.set_epoch(epoch)
        assert torch.equal(drawn, draws([reference([row]) for row in rows()]))
    assert not torch.equal(found[0], found[1])  # control: epochs differ


def test_draws_do_not_depend_on_global_random_state():
    np.random.seed(0)
    first = draws([collator()(rows())])
    np.random.seed(1)
    assert torch.equal(first, draws([collator()(rows())]))
    assert not torch.equal(first, draws([collator(seed=4)(rows())]))


def test_a_draw_without_labels_is_drawn_again_and_counted():
    labels = np.full(400, -100)
    labels[150:200] = 7  # only some places of the middle segment see it
    examples = [{"input_ids": np.arange(400), "labels": labels, ROW_COLUMN: row} for row in range(60)]
    collate = collator()
    batch = collate(examples)
    assert collate.redrawn() > 0
    labelled = (batch["labels"][:, 1:] != -100).any(1)
    assert int((~labelled).sum()) == collate.unlabelled()
    drawn_once = [
        labels[POSITION_STRATEGIES["cream"](400, 64, 512, np.random.default_rng([3, 0, row]))[0]] for row in range(60)
    ]
    assert sum((row == -100).all() for row in drawn_once) > int((~labelled).sum())  # control: without drawing again


def test_a_document_without_any_label_ends_after_a_bounded_number_of_draws():
    collate = collator()
    collate([{"input_ids": np.arange(200), "labels": np.full(200, -100), ROW_COLUMN: 0}])
    assert (collate.redrawn(), collate.unlabelled()) == (DRAWS_PER_ROW, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"contiguous_share": 0.5},
        {"position_strategy": "contiguous"},
        {"position_strategy": "segments"},
        {"position_strategy": "pose", "contiguous_text": True},
    ],
)
@pytest.mark.parametrize("label", [1, 2, 63, 64, 350, 690, 699])
def test_labels_beyond_the_first_tokens_are_fed_and_the_share_of_plain_positions_stays(settings, label):
    labels = np.full(700, -100)
    labels[label : label + 10] = 5
    collate = collator(**settings)
    batch = collate([{"input_ids": np.arange(700), "labels": labels, ROW_COLUMN: row} for row in range(400)])
    labelled = (batch["labels"][:, 1:] != -100).any(1)
    plain = (batch["position_ids"] == torch.arange(64)).all(1)
    assert labelled[plain].all() and (labelled.all() or "contiguous_share" in settings)
    if "contiguous_share" in settings:
        assert stats.binomtest(int(plain.sum()), 400, 0.5).pvalue > 1e-3
    of_plain = batch["input_ids"][plain]
    assert (of_plain.diff(dim=1) == 1).all()


def test_redraws_in_worker_processes_are_counted_too():
    labels = np.full(200, -100)
    examples = [{"input_ids": np.arange(200), "labels": labels, ROW_COLUMN: row} for row in range(8)]
    collate = collator()
    list(DataLoader(examples, batch_size=2, collate_fn=collate, num_workers=2))
    assert collate.unlabelled() == 8


@pytest.mark.parametrize("strategy", ["cream", "pose", "randpos", "segments"])
def test_a_share_of_the_draws_is_contiguous(strategy):
    settings = {"position_strategy": strategy}
    if strategy == "segments":
        settings["strategy_options"] = {"segment_length": 4}  # the default's would leave many of 64 tokens in one

    def plain(**share):
        batch = collator(**settings, **share)(rows(2000))
        numbers = torch.arange(64)
        return ((batch["position_ids"] == numbers) & (batch["input_ids"] == numbers + 1)).all(1)

    assert stats.binomtest(int(plain(contiguous_share=0.3).sum()), 2000, 0.3).pvalue > 1e-3
    assert plain(contiguous_share=1.0).all() and plain().sum() < 5


@pytest.mark.parametrize("strategy", ["cream", "pose"])
def test_contiguous_text_has_the_strategys_positions_and_the_first_tokens(strategy):
    batch, crops = (collator(position_strategy=strategy, contiguous_text=text)(rows(50)) for text in (True, False))
    assert torch.equal(batch["position_ids"], crops["position_ids"])
    assert (batch["input_ids"] == torch.arange(1, 65)).all()
    assert (crops["input_ids"] != torch.arange(1, 65)).any()  # control


def test_the_options_of_a_strategy_reach_it():
    def most_segments(**changes):
        return int((collator(**changes)(rows(50))["position_ids"].diff(dim=1) > 1).sum(1).max()) + 1

    assert most_segments(position_strategy="pose") == 2
    assert most_segments(position_strategy="pose", strategy_options={"chunks": 5}) == 5


@pytest.mark.parametrize("strategy", POSITION_STRATEGIES)
def test_a_growing_target_rises_from_the_window_by_whole_steps(strategy):
    collate = collator(position_strategy=strategy, target_growth=0.5)
    assert collate.current_target() == 512  # outside of training
    collate.set_progress(step=0, steps=8, batches_per_step=2)
    targets, highest = [], []
    for _ in range(16):
        targets.append(collate.current_target())
        # Evaluation comes between the batches and does not count.
        collate([{"input_ids": np.arange(100), ROW_COLUMN: EVALUATION_ROW}])
        highest.append(int(collate(rows(40))["position_ids"].max()))
    rising = [64, 64 + 112, 64 + 224, 64 + 336]
    assert targets == [target for target in rising + 4 * [512] for _ in range(2)]
    assert all(last < target for last, target in zip(highest, targets, strict=True))
    if strategy != "contiguous":
        assert all(last > 0.75 * target for last, target in zip(highest, targets, strict=True))
    collate.set_progress(step=3, steps=8, batches_per_step=2)
    assert collate.current_target() == 400


@pytest.mark.parametrize("options", [{}, {"max_steps": -1, "num_train_epochs": 3}])
def test_the_trainer_lets_the_target_grow_over_its_steps(
    options, make_model, make_documents, make_config, tiny_tokenizer, lora
):
    class Noting(CREAMDataCollator):
        targets = ()

        def __call__(self, examples):
            if examples[0][ROW_COLUMN] != EVALUATION_ROW:
                self.targets += (self.current_target(),)
            return super().__call__(examples)

    # Three batches of documents are a step of two and, at the end of each epoch, a step of one.
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(**(settings | options), target_growth=1.0),
        data_collator=(noting := Noting(0, context_length=64, target_length=512, target_growth=1.0)),
        train_dataset=make_documents(12), eval_dataset=make_documents(4), processing_class=tiny_tokenizer,
        peft_config=lora(),
    )  # fmt: skip
    trainer.check_positions = lambda: None
    trainer.train()
    by_step = [64 + 448 * step // 6 for step in range(6)]
    assert trainer.state.global_step == 6
    assert noting.targets == tuple(by_step[step] for step in (0, 0, 1, 2, 2, 3, 4, 4, 5))


def test_every_option_of_a_strategy_is_a_key_and_another_strategys_is_refused(make_config):
    values = {"sigma": 2.0, "chunks": 3, "segment_length": 9}
    assert values.keys() == {name for strategy in POSITION_STRATEGIES for name in options_of(strategy)}
    for strategy, (name, value) in ((s, one) for s in POSITION_STRATEGIES for one in values.items()):
        if name in options_of(strategy):
            config = make_config(position_strategy=strategy, **{name: value})
            assert config.strategy_options() == {name: value}
        else:
            with pytest.raises(ValueError, match=f"{name}={value} goes with position_strategy=.*, got {strategy}"):
                make_config(position_strategy=strategy, **{name: value})


def test_positions_are_checked_on_a_draw_that_jumps(make_model, make_documents, make_config, tiny_tokenizer, lora):
    trainer = CREAMTrainer(
        model=make_model(), args=make_config(contiguous_share=0.8, target_growth=0.5),
        train_dataset=make_documents(12), processing_class=tiny_tokenizer, peft_config=lora(),
    )  # fmt: skip
    drawn, collate = [], trainer.data_collator
    trainer.data_collator = lambda examples: drawn.append(collate(examples)) or drawn[-1]
    trainer.check_positions()
    assert (drawn[-1]["position_ids"].diff() > 1).any()
    assert not (drawn[0]["position_ids"].diff() > 1).any()  # control
