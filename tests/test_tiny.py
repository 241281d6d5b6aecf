"""The embedded tiny model: its documents, its measurement, its checkpoint and how that is made."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from cream_peft.tiny import base_folder
from cream_peft.tiny import documents as task

making = load_script("recipes/cream-peft-tiny/make_base.py")
needs_base = pytest.mark.skipif(not (base_folder() / "config.json").exists(), reason="the checkpoint is not made yet")


def is_key(token: int) -> bool:
    return task.FIRST_KEY <= token < task.FIRST_VALUE


def is_filler(token: int) -> bool:
    return task.FIRST_FILLER <= token < task.FIRST_KEY


def check_structure(input_ids: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Reads a document without `echo` cell by cell; returns how many records and how many re-asked keys it has."""
    known: dict[int, int] = {}
    records = asked = 0
    assert input_ids[0] == task.BEGIN
    for cell, cell_labels in zip(input_ids.reshape(-1, 4)[1:], labels.reshape(-1, 4)[1:], strict=True):
        rest = list(range(4))
        keys = [place for place in rest if is_key(cell[place])]
        assert len(keys) <= 1
        if keys:
            (place,) = keys
            key, value = int(cell[place]), int(cell[place + 1])
            assert task.FIRST_VALUE <= value < task.VOCABULARY_SIZE
            expected = value if key in known else task.IGNORED
            assert cell_labels[place + 1] == expected
            assert known.setdefault(key, value) == value
            asked += expected != task.IGNORED
            records += 1
            rest = [other for other in rest if other not in (place, place + 1)]
            assert cell_labels[place] == task.IGNORED
        assert all(is_filler(cell[place]) and cell_labels[place] == task.IGNORED for place in rest)
    return records, asked


class Stub(torch.nn.Module):
    """Reads each document and answers its last 64 tokens right where `rule(depth)` holds, else with `<s>`."""

    device = torch.device("cpu")

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, input_ids, attention_mask, position_ids, use_cache, logits_to_keep):
        length = input_ids.shape[1]
        assert attention_mask.all() and not use_cache and not self.training
        assert (position_ids == torch.arange(length)).all()
        logits = torch.zeros(*input_ids.shape, task.VOCABULARY_SIZE)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(length - logits_to_keep, length):
                if is_key(ids[place]):
                    stated = ids.index(ids[place])
                    logits[row, place, ids[stated + 1] if self.rule(stated / length) else task.BEGIN] = 1.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_a_training_document_labels_exactly_the_values_of_keys_asked_again():
    rng = np.random.default_rng(0)
    for num_tokens in (64, 256, 2048):
        records, asked = check_structure(*task.training_document(rng, num_tokens))
        assert records == num_tokens // 4 - 1
        assert asked > 0.2 * records


def test_density_and_the_share_of_new_keys_are_respected():
    counts = []
    rng = np.random.default_rng(1)
    for _ in range(40):
        counts.append(check_structure(*task.training_document(rng, 512, density=0.4, new_key_share=0.3)))
    records, asked = np.sum(counts, axis=0)
    assert records / (40 * 127) == pytest.approx(0.4, abs=0.03)
    assert asked / records == pytest.approx(0.7, abs=0.04)


def test_a_document_with_more_records_than_keys_asks_known_keys_again():
    records, asked = check_structure(
        *task.training_document(np.random.default_rng(2), 8192, density=1.0, new_key_share=1.0)
    )
    assert (records, records - asked) == (2047, task.NUM_KEYS)


def test_an_echo_repeats_the_key_after_its_value_and_is_labelled():
    input_ids, labels = task.training_document(np.random.default_rng(3), 256, echo=True)
    keys = [place for place, token in enumerate(input_ids) if is_key(token)]
    assert len(keys) == 2 * 63
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        assert second == first + 2
        assert labels[second] == input_ids[second] == input_ids[first]


def test_a_length_that_is_not_a_multiple_of_the_cell_is_cut():
    input_ids, labels = task.training_document(np.random.default_rng(4), 255)
    assert input_ids.shape == labels.shape == (255,)
    assert input_ids.dtype == labels.dtype == np.int64


def test_training_rows_are_reproducible_columns():
    rows = task.training_rows(3, 64, seed=5, density=0.5)
    again = task.training_rows(3, 64, seed=5, density=0.5)
    assert set(rows) == {"input_ids", "labels"}
    np.testing.assert_array_equal(rows["input_ids"], again["input_ids"])
    assert not np.array_equal(rows["input_ids"][0], rows["input_ids"][1])


@pytest.mark.parametrize(("num_tokens", "queries"), [(256, 16), (2048, 16), (8192, 16), (64, 4)])
def test_an_evaluation_document_asks_stated_keys_a_cell_each_at_its_end(num_tokens, queries):
    rng = np.random.default_rng(6)
    input_ids, query_positions, answers, depths = task.evaluation_document(rng, num_tokens, queries=queries)
    assert input_ids.shape == (num_tokens,)
    assert len(set(input_ids[query_positions])) == queries
    assert (query_positions // 4 == np.arange(num_tokens // 4 - queries, num_tokens // 4)).all()
    np.testing.assert_array_equal(input_ids[query_positions + 1], answers)
    for query, answer, depth in zip(query_positions, answers, depths, strict=True):
        stated = np.flatnonzero(input_ids[: num_tokens - 4 * queries] == input_ids[query])
        assert stated.size == 1
        assert input_ids[stated[0] + 1] == answer
        assert depth == stated[0] / num_tokens


def test_the_asked_records_of_a_long_document_lie_in_every_decile_of_depth():
    *_, depths = task.evaluation_document(np.random.default_rng(7), 2048)
    assert set((depths * 10).astype(int)) == set(range(10))


@pytest.mark.parametrize(("num_tokens", "queries", "least"), [(224, 16, 228), (257, 16, 228), (56, 4, 60)])
def test_a_length_that_cannot_hold_the_questions_is_refused(num_tokens, queries, least):
    with pytest.raises(ValueError, match=f"at least {least}"):
        task.evaluation_document(np.random.default_rng(8), num_tokens, queries=queries)
    task.evaluation_document(np.random.default_rng(8), least, queries=queries)


@pytest.mark.parametrize(("rule", "accuracy"), [(lambda depth: True, 1.0), (lambda depth: False, 0.0)])
def test_a_model_that_is_always_right_scores_one_and_always_wrong_zero(rule, accuracy):
    result = task.evaluate_recall(Stub(rule), 256, 5, seed=9, batch_size=2)
    assert result["depth"].shape == result["correct"].shape == (80,)
    assert result["correct"].mean() == accuracy


def test_a_model_that_knows_only_the_first_tenth_is_right_there_and_nowhere_else():
    model = Stub(lambda depth: depth < 0.1).train()
    result = task.evaluate_recall(model, 2048, 3, seed=10)
    np.testing.assert_array_equal(result["correct"], result["depth"] < 0.1)
    assert 0 < result["correct"].mean() < 0.3
    assert model.training


def test_the_tokenizer_gives_back_the_ids_it_wrote(tmp_path):
    making.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    everything = list(range(task.VOCABULARY_SIZE))
    assert tokenizer(tokenizer.decode(everything)).input_ids == everything
    assert tokenizer.convert_ids_to_tokens([0, 1, 65, 321]) == ["<s>", ".00", "k000", "v00"]
    assert tokenizer.bos_token_id == task.BEGIN


def test_make_base_leaves_a_loadable_folder_and_the_same_seed_the_same_weights(tmp_path):
    weights = []
    for name in ("first", "second"):
        making.make_base(tmp_path / name, seed=3, steps=2, minimum_recall=0.0, documents=2)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    origin = json.loads((tmp_path / "first" / "origin.json").read_text())
    assert (origin["seed"], origin["steps"]) == (3, 2)
    assert str(tmp_path) not in json.dumps(origin)


def test_make_base_refuses_a_model_that_did_not_learn(tmp_path):
    with pytest.raises(RuntimeError, match="try another seed"):
        making.make_base(tmp_path / "base", seed=3, steps=1, documents=2)
    assert not (tmp_path / "base").exists()


def test_an_initialisation_that_stalls_is_followed_by_another_and_the_attempts_are_bounded(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        making, "pretrain", lambda seed, steps: seeds.append(seed) or (("model", 210) if seed > 2000 else None)
    )
    assert making.pretrain_until_learnt(7) == ("model", {"attempts": 3, "echo_steps": 210})
    assert seeds == [7, 1007, 2007]
    monkeypatch.setattr(making, "pretrain", lambda seed, steps: None)
    with pytest.raises(RuntimeError, match="did not begin"):
        making.pretrain_until_learnt(7)


@needs_base
def test_the_shipped_base_recalls_inside_its_window_and_fails_beyond():
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    assert model.config.max_position_embeddings == 256
    assert task.evaluate_recall(model, 256, 16, seed=11)["correct"].mean() >= 0.95
    assert task.evaluate_recall(model, 2048, 8, seed=11)["correct"].mean() < 0.35


@needs_base
def test_the_shipped_checkpoint_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in base_folder().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "origin.json"} <= set(files)
    assert sum(files.values()) < 3 * 2**20
    assert AutoTokenizer.from_pretrained(base_folder()).get_vocab() == making.make_tokenizer().get_vocab()
