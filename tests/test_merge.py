import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from killing import killed
from measure_merge import GIB, make_base
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cream_peft import CREAMTrainer, load_adapter
from cream_peft.locks import LockedError
from cream_peft.model.record import AdapterError, adapter_sha256
from cream_peft.publish import merge
from cream_peft.publish.merge import MergeError, merge_adapter
from cream_peft.publish.output import in_place_of, refuse_output
from cream_peft.publish.serving import gguf_architecture
from cream_peft.train import output as train_output

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def adapted(tmp_path, make_model, make_documents, make_config, lora, tiny_tokenizer):
    """Saves a small base and trains an adapter of it for two steps; the folders of both."""

    def make(scaling="ntk", dtype=torch.float32, base=(), **settings):
        model = make_model(**dict(base)).to(dtype)
        model.save_pretrained(tmp_path / "base")
        trainer = CREAMTrainer(
            model=str(tmp_path / "base"),
            args=make_config(rope_scaling_type=scaling, learning_rate=5e-2),
            train_dataset=make_documents(8),
            processing_class=tiny_tokenizer,
            peft_config=lora(**settings),
        )
        trainer.train()
        trainer.save_model()
        return tmp_path / "run", str(tmp_path / "base")

    return make


def logits(model, tokens=400):
    ids = torch.arange(tokens)[None] % 385
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def error(found, wanted):
    """The largest difference of logits, in units of their spread."""
    return ((found - wanted).abs().max() / wanted.std()).item()


def stored(folder):
    """Every tensor in a folder's files, and how many files there are."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, len(files)


@pytest.mark.parametrize(
    "scaling, settings",
    [
        ("yarn", {}),
        ("ntk", {"use_rslora": True, "alpha_pattern": {"q_proj": 32}}),
        ("linear", {"use_dora": True}),
        ("yarn", {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}}),
        ("linear", {"target_modules": [*ATTENTION, "embed_tokens"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    ],
    ids=["plain", "rslora", "dora", "all-linear", "embeddings-and-head"],
)
def test_a_merge_has_the_logits_of_its_adapter_far_beyond_the_window(adapted, tmp_path, scaling, settings):
    folder, base = adapted(scaling, base={"attention_bias": True}, **settings)
    summary = merge_adapter(folder, tmp_path / "merged", base_model=base, max_shard_size="60KB")
    wanted, _ = load_adapter(folder, base_model=base, load_in_4bit=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert error(logits(merged), logits(wanted)) < 1e-4
    with wanted.disable_adapter():
        assert error(logits(merged), logits(wanted)) > 0.1  # control: the adapter matters
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", config=AutoConfig.from_pretrained(base))
    assert error(logits(unscaled), logits(wanted)) > 0.01  # control: the scaling matters

    tensors, files = stored(tmp_path / "merged")
    assert summary.shards == files > 3
    assert summary.parameters == sum(map(torch.numel, tensors.values())) == merged.num_parameters()
    assert summary.bytes == 4 * summary.parameters and summary.dtype == "float32"
    embeddings = "modules_to_save" in settings
    assert summary.merged_layers == 2 * (7 if settings.get("target_modules") == "all-linear" else 4) + embeddings
    assert summary.replaced_tensors == 3 * embeddings


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_a_bfloat16_base_stays_bfloat16_and_is_merged_in_fp32(adapted, tmp_path, settings):
    folder, base = adapted("yarn", dtype=torch.bfloat16, **settings)
    assert merge_adapter(folder, tmp_path / "merged", base_model=base).dtype == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16 and merged.model.rotary_emb.inv_freq.dtype == torch.float32
    exact, _ = load_adapter(folder, base_model=base, load_in_4bit=False, dtype="float32")
    name = "model.layers.1.self_attn.v_proj"
    rounded = exact.merge_and_unload().get_submodule(name).weight.to(torch.bfloat16)
    assert torch.equal(merged.get_submodule(name).weight, rounded)
    assert error(logits(merged.float()), logits(exact)) < 0.1


def test_the_dtype_asked_for_is_that_of_every_weight_and_of_the_config(adapted, tmp_path):
    folder, base = adapted()
    merge_adapter(folder, tmp_path / "merged", base_model=base, dtype="float16")
    assert {tensor.dtype for tensor in stored(tmp_path / "merged")[0].values()} == {torch.float16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert json.loads((tmp_path / "merged" / "cream.json").read_text())["dtype"] == "float16"
    wanted, _ = load_adapter(folder, base_model=base, load_in_4bit=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    assert error(logits(merged), logits(wanted)) < 0.02
    with pytest.raises(MergeError, match="dtype is 'int8': choose one of bfloat16, float16, float32"):
        merge_adapter(folder, tmp_path / "merged", base_model=base, dtype="int8")


def test_a_base_with_tied_embeddings_stays_tied(adapted, tmp_path):
    folder, base = adapted(base={"tie_word_embeddings": True})
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    assert "lm_head.weight" not in stored(tmp_path / "merged")[0]
    wanted, _ = load_adapter(folder, base_model=base, load_in_4bit=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert error(logits(merged), logits(wanted)) < 1e-4
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_every_runtime_finds_the_scaling_and_nobody_finds_a_local_path(adapted, tmp_path):
    folder, base = adapted("yarn")
    generation = {"max_length": 64, "eos_token_id": 7, "do_sample": True}
    (Path(base) / "generation_config.json").write_text(json.dumps(generation))
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["max_position_embeddings"] == 512
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written == generation | {"max_length": 512}
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["model_max_length"] == 512
    word = AutoTokenizer.from_pretrained(folder).decode([42])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(word)["input_ids"] == [42]
    note = json.loads((tmp_path / "merged" / "cream.json").read_text())
    made_of = {"merged": True, "dtype": "float32", "adapter_sha256": adapter_sha256(folder)}
    assert note == json.loads((folder / "cream.json").read_text()) | made_of
    texts = [path for path in (tmp_path / "merged").iterdir() if path.suffix != ".safetensors"]
    assert len(texts) == 6 and not any(str(tmp_path) in path.read_text() for path in texts)


def test_special_tokens_and_the_chat_template_come_along_under_names_that_transformers_4_knows(adapted, tmp_path):
    folder, base = adapted()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in settings and settings["additional_special_tokens"] == ["<s>", "</s>"]
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == tokenizer.chat_template and merged.model_max_length == 4096
    assert merged.all_special_tokens == tokenizer.all_special_tokens


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["save_file", "_describe"])
def test_a_merge_killed_half_way_leaves_nothing_that_loads_and_an_earlier_one_as_it_was(
    adapted, tmp_path, monkeypatch, moment
):
    folder, base = adapted()
    merged = tmp_path / "merged"
    merge_adapter(folder, merged, base_model=base, dtype="float16")
    before, calls = stored(merged)[0], []

    def kill(*arguments, **keywords):
        calls.append(arguments)
        if moment == "_describe" or len(calls) == 3:
            raise Killed
        save_file(*arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(merge, moment, kill)
        for output in (merged, tmp_path / "new"):
            calls.clear()
            with pytest.raises(Killed):
                merge_adapter(folder, output, base_model=base, max_shard_size="60KB")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]
        after = stored(merged)[0]
        assert all(torch.equal(after[name], before[name]) for name in before)
        calls.clear()
        patched.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)  # what SIGKILL leaves
        with pytest.raises(Killed):
            merge_adapter(folder, tmp_path / "new", base_model=base, max_shard_size="60KB")
    assert not (tmp_path / "new").exists() and list((tmp_path / ".new.part").glob("model-*"))
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / ".new.part")
    merge_adapter(folder, tmp_path / "new", base_model=base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert not (tmp_path / ".new.part").exists()


def test_an_earlier_merge_is_replaced_and_anything_else_is_left_alone(adapted, tmp_path):
    folder, base = adapted()
    (tmp_path / "merged").mkdir()
    merge_adapter(folder, tmp_path / "merged", base_model=base, max_shard_size="60KB")
    merge_adapter(folder, tmp_path / "merged", base_model=base, dtype="bfloat16")
    assert stored(tmp_path / "merged")[1] == 1 and not (tmp_path / "merged" / merge.INDEX).exists()
    for taken in (folder, base):
        before = sorted(Path(taken).iterdir())
        with pytest.raises(MergeError, match=r"neither empty nor an earlier merge: choose another output_dir"):
            merge_adapter(folder, taken, base_model=base)
        assert sorted(Path(taken).iterdir()) == before


def test_an_earlier_merge_is_replaced_with_a_line_and_what_no_merge_wrote_is_refused(adapted, tmp_path, caplog):
    caplog.set_level("INFO", logger="cream_peft")
    folder, base = adapted()
    merged = tmp_path / "merged"
    merge_adapter(folder, merged, base_model=base)
    assert "was replaced" not in caplog.text
    with (merged / "README.md").open("a") as card:
        card.write("\n\nA line of mine.\n")
    merge_adapter(folder, merged, base_model=base, dtype="float16")
    assert f"the earlier merge in {merged} was replaced" in caplog.text
    assert (merged / "README.md").read_text().count("A line of mine.") == 1
    for name in ("model.gguf", "results/mine.json", "checkpoint-1/model.safetensors"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("mine")
        with pytest.raises(MergeError, match=f"is an earlier merge, but no merge wrote {name}: move it out"):
            merge_adapter(folder, merged, base_model=base)
        assert stored(merged)[0] and (merged / name).read_text() == "mine"
        (merged / name).unlink()
    # Nor is a run written over a merge, or a merge over a model whose every weight was trained.
    with pytest.raises(ValueError, match=r"holds config.json, which no run wrote and a run would replace"):
        train_output.refuse_output(merged, "base")
    record = json.loads((merged / "cream.json").read_text())
    (merged / "cream.json").write_text(json.dumps(record | {"full": True}))
    train_output.refuse_output(merged, "base")
    with pytest.raises(MergeError, match="neither empty nor an earlier merge"):
        merge_adapter(folder, merged, base_model=base)
    (merged / "cream.json").write_text("[]")
    with pytest.raises(MergeError, match="neither empty nor an earlier merge"):
        merge_adapter(folder, merged, base_model=base)


def kill_at(number):
    """From here on the process gets SIGKILL before its renaming or removal of this number."""
    steps = itertools.count()

    def stopping(real):
        def step(*arguments, **keywords):
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return step

    os.rename, os.unlink, os.rmdir = map(stopping, (os.rename, os.unlink, os.rmdir))


def test_a_kill_before_any_step_of_taking_its_place_leaves_the_old_merge_or_the_new_one(tmp_path):
    output, kinds = tmp_path / "merged", ("old", "new")

    def write(kind):
        with in_place_of(output) as scratch:
            for name in ("config.json", "cream.json", "model.safetensors"):
                (scratch / name).write_text(json.dumps({"merged": True, "kind": kind}))

    def found():
        return {json.loads(path.read_text())["kind"] for path in output.iterdir()}

    for number in range(100):
        shutil.rmtree(output, ignore_errors=True)
        write("old")
        child = os.fork()
        if child == 0:
            kill_at(number)
            write("new")
            os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not output.exists() or found() in [{kind} for kind in kinds]
        refuse_output(output)  # as the next merge does
        assert found() in ([{kind} for kind in kinds] if was_killed else [{"new"}])
        write("new")
        assert found() == {"new"} and [path.name for path in tmp_path.iterdir()] == ["merged"]
        if not was_killed:
            break
    assert number == 7  # two renames, and the removal of three files, their folder and the lock


def test_a_second_merge_into_one_folder_is_refused_and_disturbs_nothing(tmp_path):
    output, program = (
        tmp_path / "merged",
        (
            "import sys, pathlib; sys.path[:] = {path!r}\nfrom cream_peft.publish.output import in_place_of\n"
            "with in_place_of(pathlib.Path({output!r})) as scratch:\n"
            "    (scratch / 'config.json').write_text('first'); print(flush=True); input()\n"
        ),
    )
    command = [sys.executable, "-c", program.format(path=sys.path, output=str(output))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with pytest.raises(LockedError, match=f"{output}: another merge is writing there"):
            refuse_output(output)
        with pytest.raises(LockedError, match="another merge"), in_place_of(output):
            pass
        first.communicate(b"\n")
    assert (output / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


SOME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.update({"stray.lora_A.weight": torch.ones(2)}), r"stray.lora_A.weight .* no place"),
        (lambda tensors: tensors.pop(SOME), f"{SOME} .* is missing"),
        (lambda tensors: tensors.update({SOME: tensors[SOME][:1]}), f"{SOME} .* another shape"),
        (
            lambda tensors: tensors[SOME].fill_(float("nan")),
            f"cannot be merged: {SOME} holds values that are not finite",
        ),
        (
            lambda tensors: [tensor.fill_(1e38) for tensor in tensors.values()],
            "_proj.weight cannot be merged: NaNs",
        ),
        (lambda tensors: tensors[SOME].fill_(1e7), "q_proj.weight holds values beyond float16"),
    ],
    ids=["surplus", "missing", "shape", "nan", "infinite", "overflow"],
)
def test_a_tensor_of_the_adapter_that_cannot_be_used_is_named(adapted, tmp_path, change, message):
    folder, base = adapted()
    edit(folder / "adapter_model.safetensors", change)
    with pytest.raises((AdapterError, MergeError), match=message):
        merge_adapter(folder, tmp_path / "merged", base_model=base, dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    (folder / "adapter_model.safetensors").write_bytes(b"half of it")
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors of .* is missing or damaged"):
        merge_adapter(folder, tmp_path / "merged", base_model=base)


@pytest.mark.parametrize(
    "base, settings, message",
    [
        ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, "lm_head.weight is adapted, .* ties"),
        ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, "embed_tokens.weight .* ties"),
        ({"attention_bias": True}, {"bias": "lora_only"}, "_proj.base_layer.bias is of a kind that cannot be merged"),
        ({"attention_bias": True}, {"lora_bias": True}, "lora_B.bias is of a kind that cannot be merged"),
        ({}, {"trainable_token_indices": [3, 4]}, "trainable_tokens.* of a kind that cannot be merged"),
        ({}, {"init_lora_weights": "olora"}, "not LoRA alone .*init_lora_weights 'olora'"),
    ],
    ids=["tied-head", "tied-embeddings", "bias", "lora_bias", "tokens", "olora"],
)
def test_what_cannot_be_merged_is_named_and_never_dropped(adapted, tmp_path, base, settings, message):
    folder, name = adapted(base=base, **settings)
    with pytest.raises(MergeError, match=message):
        merge_adapter(folder, tmp_path / "merged", base_model=name)


def test_a_base_that_cannot_be_merged_into_is_named(adapted, tmp_path):
    folder, base = adapted()
    merge_adapter(folder, tmp_path / "sharded", base_model=base, max_shard_size="60KB")  # control: it can
    weights = Path(base) / "model.safetensors"

    def refused(message, kind=MergeError, **settings):
        with pytest.raises(kind, match=message):
            merge_adapter(folder, tmp_path / "merged", base_model=base, **settings)

    name = "model.layers.1.self_attn.k_proj.weight"
    edit(weights, lambda tensors: tensors.pop(name))
    refused(f"{name} is adapted, but not in the base's files")
    edit(weights, lambda tensors: tensors["model.embed_tokens.weight"].mul_(-1))
    refused("other weights than the base", AdapterError)
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("model.safetensors is missing or damaged")
    weights.unlink()
    refused("holds no model.safetensors")
    shutil.copy(tmp_path / "sharded" / merge.INDEX, base)
    refused("model-00001-of-.* is missing or damaged")
    config = Path(base) / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    refused("is quantized already .* use the 16-bit model", AdapterError)


def test_too_small_a_disk_is_said_before_anything_is_written(adapted, tmp_path, monkeypatch):
    folder, base = adapted()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    monkeypatch.setattr(merge, "save_file", None)
    with pytest.raises(MergeError, match=r"has 0.0 GiB free and the model takes"):
        merge_adapter(folder, tmp_path / "merged", base_model=base)


def test_of_a_hub_repository_only_one_copy_of_the_weights_is_downloaded(adapted, tmp_path, monkeypatch):
    folder, base = adapted()
    for other in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "README.md"):
        (Path(base) / other).parent.mkdir(exist_ok=True)
        (Path(base) / other).touch()
    fetched = []

    def snapshot(name, *, allow_patterns, ignore_patterns, **options):
        files = [str(path.relative_to(base)) for path in Path(base).rglob("*") if path.is_file()]
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert (name, options) == ("owner/base", {"token": "hf_x", "revision": "abc"})
        return base

    adapter = merge.open_adapter(folder, base_model=base)
    adapter.base_name = "owner/base"
    adapter.base_options = {"token": "hf_x", "revision": "abc", "trust_remote_code": True}
    monkeypatch.setattr(merge, "open_adapter", lambda *arguments, **keywords: adapter)
    monkeypatch.setattr(merge, "snapshot_download", snapshot)
    merge_adapter(folder, tmp_path / "merged")
    assert sorted(fetched) == ["generation_config.json", "model.safetensors"]


def test_the_frequencies_in_the_files_of_old_llamas_are_left_out(adapted, tmp_path):
    folder, base = adapted()
    stray = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    edit(Path(base) / "model.safetensors", lambda tensors: tensors.update(stray))
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    assert not any("inv_freq" in name for name in stored(tmp_path / "merged")[0])


MEASURE = """
import json, pathlib, sys
from measure_merge import measure_here
folder = pathlib.Path(sys.argv[1])
print(json.dumps([measure_here(name, folder, "20MB") for name in ("merge_adapter", "merge_and_unload")]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
# DoRA takes a norm of each merged weight, in fp32.
@pytest.mark.parametrize(
    "lora, share", [({}, 0.6), pytest.param({"use_dora": True}, 0.8, marks=pytest.mark.slow)], ids=["plain", "dora"]
)
def test_a_merge_takes_far_less_memory_than_the_model_has(tmp_path, lora, share):
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=8
    )
    size = make_base(tmp_path, config, torch.float16, max_shard_size="1GB", **lora) / GIB
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", MEASURE, tmp_path]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, timeout=300)
    ours, plain = json.loads(done.stdout)
    assert ours["peak_gib"] - ours["start_gib"] < share * size
    assert plain["peak_gib"] - ours["start_gib"] > size  # control: where the whole model is loaded


def test_the_sentencepiece_model_of_the_base_comes_along(adapted, tmp_path):
    folder, base = adapted()
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"sentencepiece")
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"sentencepiece"


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [9, 7], "do_sample": True}])
def test_the_end_token_that_was_trained_ends_generation(adapted, tmp_path, generation):
    folder, base = adapted()
    (Path(base) / "generation_config.json").unlink()
    if generation:
        (Path(base) / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(8)
    tokenizer.save_pretrained(folder)
    merge_adapter(folder, tmp_path / "merged", base_model=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before = generation["eos_token_id"] if generation else [2]
    for model in (merged, load_adapter(folder, base_model=base, load_in_4bit=False)[0]):
        assert model.generation_config.eos_token_id == [*before, 8]


def test_the_card_of_a_linear_merge_says_how_llama_cpp_learns_the_length(adapted, tmp_path):
    for scaling, wanted in (("linear", True), ("yarn", False)):
        folder, base = adapted(scaling)
        merge_adapter(folder, tmp_path / "merged", base_model=base)
        card = (tmp_path / "merged" / "README.md").read_text()
        assert "A merged model" in card and "convert_hf_to_gguf.py" in card
        assert ("gguf-set-metadata model.gguf llama.context_length 512 --force" in card) == wanted


@pytest.mark.parametrize("family, key", [("mistral", "llama"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3")])
def test_the_key_of_the_length_in_a_gguf_is_that_of_the_model_s_family(tmp_path, family, key):
    for place in (tmp_path, tmp_path / "base_config"):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps({"model_type": family}))
        assert gguf_architecture(tmp_path) == key
        (place / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.slow
def test_a_merge_killed_at_random_moments_loses_nothing_and_is_completed_by_the_next(adapted, tmp_path):
    folder, base = adapted()
    merged, part, earlier, kills = tmp_path / "merged", tmp_path / ".merged.part", "float16", 0

    def whole():
        """The one dtype of the weights, the config and the record, once nothing is missing or left over."""
        tensors, files = stored(merged)
        index = json.loads((merged / merge.INDEX).read_text())["weight_map"]
        assert tensors.keys() == index.keys() and files == len(set(index.values())) > 3
        said = {json.loads((merged / name).read_text())["dtype"] for name in ("config.json", "cream.json")}
        (dtype,) = said | {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        return dtype

    def work(dtype):
        merge_adapter(folder, merged, base_model=base, dtype=dtype, max_shard_size="60KB")

    work(earlier)
    moments = random.Random(8)
    for dtype in ("float32", "bfloat16", "float16", "float32", "bfloat16"):
        files = moments.randint(1, 12)
        kills += killed(partial(work, dtype), lambda files=files: part.exists() and len(os.listdir(part)) >= files)
        refuse_output(merged)
        assert whole() in (earlier, dtype)
        work(dtype)
        assert whole() == dtype and sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]
        earlier = dtype
    assert kills >= 3
