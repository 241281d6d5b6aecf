import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from cream_peft.positions import POSITION_STRATEGIES
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


def test_redraws_in_worker_processes_are_counted_too():
    labels = np.full(200, -100)
    examples = [{"input_ids": np.arange(200), "labels": labels, ROW_COLUMN: row} for row in range(8)]
    collate = collator()
    list(DataLoader(examples, batch_size=2, collate_fn=collate, num_workers=2))
    assert collate.unlabelled() == 8
