"""Memory estimates against what real modules, real saved tensors and a real optimizer step allocate (CPU, seconds)."""

import inspect
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import Adam8bit
from conftest import estimate, estimate_evaluation, estimate_validation
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)
from trl.kernels import chunked_logprob
from trl.models.activation_offloading import OffloadActivations
from trl.trainer import utils as trl_utils

from cream_peft import CREAMTrainer
from cream_peft.families import far_parameters
from cream_peft.model import kv_cache
from cream_peft.model.base import EMBEDDED_CONFIGS, GIB, embedded_config
from cream_peft.model.kv_cache import new_cache
from cream_peft.plan import memory
from cream_peft.plan.layers import linear_parameters
from cream_peft.plan.memory import (
    ATTENTION,
    CUDA_CONTEXT_GIB,
    LM_HEAD_TILE,
    parameter_count,
)

ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TOKENS = 512
LLAMA2 = "meta-llama/Llama-2-7b-hf"


def small(config_class=LlamaConfig, **changes):
    fields = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": TOKENS,
    }
    if config_class is Qwen3Config:
        fields["head_dim"] = 64
    return config_class(**(fields | changes))


def trainable(folder, config, *, four_bit=True, targets=ATTENTION, checkpointing=True, dropout=0.0):
    """The stack of a recipe on a CPU: NF4 or bf16 base, fp32 LoRA of rank 16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kwargs = {"quantization_config": quantization} if four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    model = get_peft_model(model, LoraConfig(r=16, lora_dropout=dropout, target_modules=list(targets)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # Trainer asks for it with checkpointing only; without it the first layer would keep less than the others.
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors alive that were made under this mode, and their maximum."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def _freed(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            owned = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            if storage._cdata not in self.sizes and storage._cdata not in owned:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result


@pytest.fixture(autouse=True)
def one_thread():
    # Matrices this small only wait for one another's threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda_autocast(monkeypatch):
    # Under CUDA's autocast PEFT leaves the input of a 4-bit LoRA as it is. It asks torch.is_autocast_enabled(), which
    # knows of CUDA only: on a CPU it makes a copy for each target that a GPU does not make.
    ask = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: ask(*device) if device else True)


def backbone(model, tokens=TOKENS):
    ids = torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]
    with torch.autocast("cpu", torch.bfloat16):
        decoder = model.get_base_model().model
        mask = torch.ones_like(ids)
        return decoder(ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state


def saved_bytes(model):
    """Bytes that autograd keeps for the decoder's backward pass, without parameters and buffers."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in owned:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backbone(model)
    del hidden
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def backward_peak(model):
    """The most bytes at a time in a backward pass of the decoder, its output and that one's gradient aside."""
    with LiveBytes() as live:
        hidden = backbone(model)
        gradient = torch.zeros_like(hidden)
        live.peak = live.now
        hidden.backward(gradient)
    return live.peak - hidden.nbytes - gradient.nbytes


def bytes_of(terms, *names):
    return sum(terms[name] for name in names) * GIB


FINAL_NORM = 4 * TOKENS * 256  # counted among the logits


# Parameters


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"head_dim": 32}),
        (MistralConfig, {"num_key_value_heads": 2}),
        (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 128}),
        (Qwen3Config, {"attention_bias": True}),
        (Phi3Config, {"pad_token_id": 0}),  # fused linears
        (Starcoder2Config, {"num_key_value_heads": 2}),  # a feed-forward of two linears, all with a bias
        (Olmo2Config, {"num_key_value_heads": 2, "pad_token_id": 0}),  # other norms
    ],
)
def test_parameters_are_counted_as_the_real_model_has_them(config_class, changes):
    config = small(config_class, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    linears = [one.weight.numel() for one in model.model.modules() if isinstance(one, torch.nn.Linear)]
    assert linear_parameters(config) == sum(linears)


@pytest.mark.parametrize(
    ("model_id", "parameters", "window"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 4096),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, 4096),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320, 4096),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248, 131_072),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131_072),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552, 32_768),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360, 32_768),
        ("Qwen/Qwen3-8B", 8_190_735_360, 40_960),
        # Of the text decoder alone.
        ("Qwen/Qwen3.5-0.8B", 752_393_024, 262_144),
        ("Qwen/Qwen3.5-9B", 8_953_803_264, 262_144),
        ("google/gemma-3-270m", 268_098_176, 32_768),
        ("google/gemma-3-4b-it", 3_880_263_168, 131_072),
        ("unsloth/gpt-oss-20b-BF16", 20_914_757_184, 131_072),
    ],
)
def test_embedded_configs_have_the_published_parameter_counts(model_id, parameters, window):
    config = embedded_config(model_id)
    assert parameter_count(config) == parameters and config.max_position_embeddings == window
    far_parameters(config)["rope_theta"] = 0.0
    assert far_parameters(embedded_config(model_id))["rope_theta"] > 0  # a copy, not the table


def test_a_base_that_is_not_embedded_has_no_config():
    assert embedded_config("gpt2") is None and len(EMBEDDED_CONFIGS) == 14
    assert embedded_config("mistralai/Mistral-7B-v0.3").sliding_window is None


# Every weight trained


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 512, "intermediate_size": 1408}, {"num_hidden_layers": 4}])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_every_weight_takes_what_is_planned(dtype, checkpointing, changes):
    config = small(**changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.get_base_model = lambda: model
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    peak = backward_peak(model)
    terms = estimate(
        config, context_length=TOKENS, use_peft=False, load_in_4bit=False, dtype=str(dtype).removeprefix("torch."),
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    parameters = sum(p.nbytes for p in model.parameters())
    assert bytes_of(terms, "weights", "embeddings_and_head") == pytest.approx(parameters)
    assert bytes_of(terms, "gradients") == pytest.approx(sum(p.grad.nbytes for p in model.parameters()))
    assert terms["adapter"] == terms["quantization"] == 0
    last_norm = 22 * TOKENS * config.hidden_size
    expected = bytes_of(terms, "checkpoints", "weight_copies") + max(bytes_of(terms, "recomputation"), last_norm)
    assert expected == pytest.approx(peak, rel=0.1)


# What is resident


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize(
    ("config_class", "targets"), [(LlamaConfig, ATTENTION), (Qwen2Config, ALL_LINEAR), (Qwen3Config, ("q_proj",))]
)
def test_resident_terms_are_the_bytes_of_a_model_after_one_optimizer_step(tmp_path, config_class, targets, four_bit):
    config = small(config_class, num_key_value_heads=2, tie_word_embeddings=config_class is Qwen2Config)
    model = trainable(tmp_path, config, four_bit=four_bit, targets=targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    backbone(model, 64).float().square().sum().backward()
    optimizer.step()

    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    measured = {"weights": 0, "adapter": 0, "gradients": 0}
    measured["embeddings_and_head"] = sum(weight.nbytes for weight in embeddings)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if parameter.requires_grad:
            measured["adapter"] += parameter.nbytes
            measured["gradients"] += parameter.grad.nbytes
        elif parameter not in embeddings:
            measured["weights"] += parameter.nbytes
        if state is not None:
            tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            measured["weights"] += sum(tensor.nbytes for tensor in tensors)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    measured["optimizer"] = sum(tensor.nbytes for tensor in moments)

    terms = estimate(config, context_length=64, load_in_4bit=four_bit, target_modules=targets)
    for name, size in measured.items():
        assert bytes_of(terms, name) == pytest.approx(size, rel=1e-4), name


def test_double_quantization_costs_what_qlora_says():
    # QLoRA, section 3: 8 / 64 + 32 / (64 * 256) = 0.127 bits a parameter beside the 4.
    config = embedded_config(LLAMA2)
    terms = estimate(config, context_length=4096)
    linear = config.num_hidden_layers * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert 8 * bytes_of(terms, "weights") / linear == pytest.approx(4.127, abs=0.002)


@pytest.mark.parametrize(
    ("optimizer_class", "optim"), [(torch.optim.AdamW, "adamw_torch"), (Adam8bit, "paged_adamw_8bit")]
)
def test_the_optimizer_keeps_what_a_real_step_of_it_keeps(optimizer_class, optim):
    # A LoRA of rank 16 on one layer of 512 features.
    config = small(hidden_size=512, num_hidden_layers=1)
    shapes = [(16, 512), (512, 16)] * 4
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optimizer_class(parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tables = {value.data_ptr(): value for state in optimizer.state.values() for key, value in state.items()
              if isinstance(value, torch.Tensor) and not key.startswith("qmap") and value.numel() > 1}  # fmt: skip
    measured = sum(value.nbytes for value in tables.values())
    assert bytes_of(estimate(config, context_length=64, optim=optim), "optimizer") == pytest.approx(measured, rel=0.01)


def test_the_embeddings_if_they_are_trained_keep_their_optimizer_state_in_fp32():
    config, settings = small(), {"context_length": 64, "use_peft": False, "load_in_4bit": False}
    embeddings = config.vocab_size * config.hidden_size
    low = estimate(config, optim="paged_adamw_8bit", **settings)
    rest = parameter_count(config) - embeddings
    assert bytes_of(low, "optimizer") == pytest.approx(8 * embeddings + (2 + 8 / 256) * rest)
    assert bytes_of(estimate(config, **settings), "optimizer") == 8 * parameter_count(config)


def test_an_optimizer_that_is_not_known_counts_as_adam_in_fp32():
    config, settings = embedded_config(LLAMA2), {"context_length": 4096}
    full = estimate(config, optim="adamw_torch", **settings)["optimizer"]
    assert estimate(config, optim="sgd", **settings)["optimizer"] == 0 < full
    assert estimate(config, optim="some_new_one", **settings)["optimizer"] == full


# What a step needs on top


@pytest.mark.parametrize(
    ("config_class", "changes", "settings"),
    [
        (LlamaConfig, {}, {}),
        (LlamaConfig, {"num_key_value_heads": 1}, {}),
        (Qwen3Config, {"num_key_value_heads": 2}, {}),
        (LlamaConfig, {}, {"targets": ALL_LINEAR}),
        (LlamaConfig, {}, {"targets": ("q_proj", "v_proj")}),
        (LlamaConfig, {}, {"four_bit": False}),
        (LlamaConfig, {}, {"four_bit": False, "targets": ALL_LINEAR}),
    ],
)
def test_activations_are_the_tensors_that_autograd_keeps(tmp_path, cuda_autocast, config_class, changes, settings):
    config = small(config_class, **changes)
    asked = {
        "context_length": TOKENS,
        "lora_dropout": 0.0,
        "load_in_4bit": settings.get("four_bit", True),
        "target_modules": settings.get("targets", ATTENTION),
    }
    terms = estimate(config, gradient_checkpointing=False, **asked)
    measured = saved_bytes(trainable(tmp_path, config, checkpointing=False, **settings)) - FINAL_NORM
    assert bytes_of(terms, "checkpoints") == pytest.approx(measured, rel=0.03)

    checkpointed = estimate(config, gradient_checkpointing=True, **asked)
    measured_checkpointed = saved_bytes(trainable(tmp_path, config, **settings)) - FINAL_NORM
    assert bytes_of(checkpointed, "checkpoints") == pytest.approx(measured_checkpointed, rel=0.05)
    assert measured_checkpointed < measured / 10


def test_a_4_bit_base_holds_its_largest_weight_dequantized():
    config = small(hidden_size=512, intermediate_size=2048, vocab_size=32)
    weight = torch.randn(2048, 512, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    with LiveBytes() as live:
        dequantize_4bit(packed, state)
    four, sixteen = (estimate(config, context_length=64, load_in_4bit=four_bit) for four_bit in (True, False))
    assert bytes_of(four, "quantization") == pytest.approx(live.peak, rel=0.01)
    assert sixteen["quantization"] == 0


def test_dropout_makes_a_copy_of_the_input_for_every_target(tmp_path, cuda_autocast):
    config, settings = small(), {"context_length": TOKENS, "gradient_checkpointing": False}
    with_dropout, without = (
        bytes_of(estimate(config, lora_dropout=rate, **settings), "checkpoints") for rate in (0.05, 0.0)
    )
    measured = saved_bytes(trainable(tmp_path, config, checkpointing=False, dropout=0.05)) - FINAL_NORM
    masks = config.num_hidden_layers * 4 * TOKENS * config.hidden_size  # two bytes each on a CPU, one on a GPU
    assert with_dropout == pytest.approx(measured - masks, rel=0.03)
    assert without < 0.8 * with_dropout


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
def test_the_peak_of_the_backward_pass_is_within_a_tenth(tmp_path, cuda_autocast, checkpointing, targets):
    config = small()
    model = trainable(tmp_path, config, checkpointing=checkpointing, targets=targets)
    backbone(model).backward(torch.zeros(1, TOKENS, 256, dtype=torch.bfloat16))  # makes the gradients
    peak = backward_peak(model)
    terms = estimate(
        config,
        context_length=TOKENS,
        lora_dropout=0.0,
        target_modules=targets,
        gradient_checkpointing=checkpointing,
    )
    last_norm = 22 * TOKENS * config.hidden_size  # bytes; its backward pass is the peak where nothing is recomputed
    expected = bytes_of(terms, "checkpoints") + max(bytes_of(terms, "recomputation", "quantization"), last_norm)
    assert expected == pytest.approx(peak, rel=0.08)
    long = estimate(embedded_config(LLAMA2), context_length=65_536)
    assert bytes_of(long, "logits") == 22 * 65_536 * 4096


def test_the_head_is_computed_in_the_tiles_that_trl_uses():
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE) == LM_HEAD_TILE
    config = embedded_config("meta-llama/Llama-3.1-8B")
    chunked = bytes_of(estimate(config, context_length=4096), "logits")
    assert chunked == 2 * 4096 * 32_768 + 12 * 4096 * config.hidden_size
    assert chunked < 4096 * config.vocab_size * 2  # less than the bf16 logits alone


def test_the_fused_head_keeps_hidden_states_and_no_logits(tmp_path):
    config = small(vocab_size=8192, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.requires_grad_(False)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.randint(0, 8192, (1, TOKENS))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(ids, labels=ids, fused_lm_head=True)
    weight = model.lm_head.weight.untyped_storage()._cdata
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    sizes.pop(weight, None)
    hidden_states = 2 * TOKENS * config.hidden_size
    assert hidden_states * 0.9 < sum(sizes.values()) < hidden_states * 1.2 < TOKENS * config.vocab_size * 2


def test_the_total_counts_the_larger_of_two_things_that_are_never_there_together():
    for length in (256, 4096):
        terms = estimate(embedded_config(LLAMA2), context_length=length)
        layer, head = terms["recomputation"] + terms["quantization"], terms["logits"]
        others = sum(terms.values()) - terms["total"] - layer - head
        assert terms["total"] == pytest.approx(others + max(layer, head))
        assert terms["cuda_context"] == CUDA_CONTEXT_GIB


def test_llama_2_7b_at_4096_takes_between_5_and_8_gib():
    assert 5 < estimate(embedded_config(LLAMA2), context_length=4096)["total"] < 8
    assert estimate(embedded_config(LLAMA2), context_length=4096, load_in_4bit=False)["total"] > 13
    assert estimate(embedded_config(LLAMA2), context_length=4096, gradient_checkpointing=False)["total"] > 20


def test_tokens_count_however_they_are_batched():
    config = embedded_config(LLAMA2)
    wide = estimate(config, context_length=2048, per_device_train_batch_size=2)
    assert wide == estimate(config, context_length=4096)


def test_offloaded_checkpoints_leave_as_many_layer_inputs_as_trl_keeps_at_hand(tmp_path):
    at_hand = inspect.signature(OffloadActivations.__init__).parameters["max_fwd_stash_size"].default
    config = small(num_hidden_layers=at_hand + 3)
    kept = saved_bytes(trainable(tmp_path, config)) - FINAL_NORM
    here, there = (estimate(config, context_length=TOKENS, activation_offloading=offload) for offload in (False, True))
    assert bytes_of(here, "checkpoints") == pytest.approx(kept, rel=0.05)
    assert bytes_of(there, "checkpoints") == pytest.approx(kept * at_hand / config.num_hidden_layers, rel=0.05)
    assert {name for name in here if here[name] != there[name]} == {"checkpoints", "total"}
    shallow = small(num_hidden_layers=2)
    few = (estimate(shallow, context_length=TOKENS, activation_offloading=offload) for offload in (False, True))
    assert next(few) == next(few)


def test_memory_low_trains_llama_2_7b_in_less_than_5_gib_of_tensors():
    terms = estimate(embedded_config(LLAMA2), context_length=4096, activation_offloading=True, optim="paged_adamw_8bit")
    assert terms["total"] - terms["cuda_context"] < 5.0


# Evaluation


def cache_bytes(cache):
    """Bytes of a cache's tensors, those inside a quantized one included."""
    parts = [list(vars(layer).values()) for layer in cache.layers]
    tensors = [value for value in tree_leaves(parts) if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


@pytest.mark.parametrize("kind", ["default", "quantized"])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_a_cache_has_the_bytes_of_a_real_one(kind, config_class):
    if kind == "quantized":
        pytest.importorskip("hqq")
    config = small(config_class, num_key_value_heads=2)
    cache = new_cache(config, kind)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, 2, TOKENS, 64, dtype=torch.bfloat16), layer)
    planned = bytes_of(estimate_evaluation(config, length=TOKENS, kv_cache=kind), "kv_cache")
    assert planned == cache_bytes(cache)
    sixteen = 2 * 2 * config.num_hidden_layers * 2 * 64 * TOKENS
    assert planned == (sixteen if kind == "default" else 0.3125 * sixteen)


@pytest.mark.parametrize(
    ("kind", "heads", "settings"),
    [
        ("default", 4, {}),
        ("default", 2, {}),
        ("default", 1, {"targets": ALL_LINEAR}),
        ("default", 4, {"four_bit": False}),
        ("quantized", 4, {}),
        ("quantized", 2, {"targets": ALL_LINEAR}),
    ],
)
@pytest.mark.parametrize(("length", "chunk"), [(1536, 256), (1024, 512)])
def test_the_peak_of_reading_a_document_is_within_a_tenth(tmp_path, monkeypatch, kind, heads, settings, length, chunk):
    if kind == "quantized":
        # HQQ's solver takes fp16 on CUDA, fp32 elsewhere.
        monkeypatch.setattr(pytest.importorskip("hqq.core.optimize"), "float32", torch.float16)
    config = small(num_key_value_heads=heads)
    model = trainable(tmp_path, config, checkpointing=False, **settings).eval()
    ids = torch.randint(0, 2048, (1, length), generator=torch.Generator().manual_seed(0))
    mask, cache = torch.ones_like(ids), new_cache(config, kind)
    with torch.no_grad(), LiveBytes() as live:
        for start in range(0, length, chunk):
            end = start + chunk
            model(ids[:, start:end], mask[:, :end], past_key_values=cache, use_cache=True, logits_to_keep=1)
    asked = {"load_in_4bit": settings.get("four_bit", True), "target_modules": settings.get("targets", ATTENTION)}
    terms = estimate_evaluation(config, length=length, kv_cache=kind, chunk_length=chunk, **asked)
    linear = bytes_of(terms, "activations", "quantization")
    planned = bytes_of(terms, "kv_cache") + max(bytes_of(terms, "attention"), linear)
    assert planned == pytest.approx(live.peak, rel=0.08)
    resident = bytes_of(terms, "weights", "embeddings_and_head", "adapter", "logits", "cuda_context")
    assert bytes_of(terms, "total") == pytest.approx(resident + planned)


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
def test_the_peak_of_a_held_out_document_is_within_a_tenth(tmp_path, cuda_autocast, targets, four_bit):
    config, tokens = small(num_key_value_heads=2), 2048
    model = trainable(tmp_path, config, checkpointing=False, targets=targets, four_bit=four_bit).eval()
    with torch.no_grad(), LiveBytes() as live:
        backbone(model, tokens)
    asked = {"load_in_4bit": four_bit, "target_modules": targets}
    terms = estimate_validation(config, eval_length=tokens, **asked)
    assert bytes_of(terms, "activations", "quantization") == pytest.approx(live.peak, rel=0.08)
    assert terms == estimate_validation(config, eval_length=tokens // 4, per_device_eval_batch_size=4, **asked)
    assert "gradients" not in terms and "checkpoints" not in terms


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"intermediate_size": 2048}])
def test_the_peak_of_a_held_out_document_is_within_a_tenth_where_every_weight_is_trained(changes):
    config, tokens = small(**changes), 2048
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_base_model = lambda: model
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), LiveBytes() as live:
            backbone(model, tokens)
    finally:
        torch.set_autocast_cache_enabled(True)
    terms = estimate_validation(config, eval_length=tokens, use_peft=False, load_in_4bit=False)
    assert bytes_of(terms, "activations") == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_computes_a_held_out_loss_without_the_logits_of_all_its_tokens(
    tmp_path, cuda_autocast, monkeypatch, make_config, tiny_tokenizer, lora, smoothing
):
    tokens, tile = 2048, (128, 512)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", tile[0])
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", tile[1])
    monkeypatch.setattr(memory, "LM_HEAD_TILE", tile)
    config = small(vocab_size=16_384, hidden_size=128, intermediate_size=256, num_key_value_heads=2)
    rows = Dataset.from_dict({"input_ids": [torch.arange(tokens).tolist()] * 2})
    settings = {"bf16": True, "use_cpu": True, "target_length": tokens, "eval_length": tokens}
    trainer = CREAMTrainer(
        model=AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        args=make_config(**settings, per_device_eval_batch_size=1, label_smoothing_factor=smoothing),
        train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer, peft_config=lora(r=16),
    )  # fmt: skip
    with LiveBytes() as live:
        trainer.evaluate()
    logits = 2 * tokens * config.vocab_size
    if smoothing:
        # The control: a loss for which TRL makes them.
        assert live.peak > logits
        return
    terms = estimate_validation(config, eval_length=tokens, load_in_4bit=False)
    planned = max(bytes_of(terms, "activations"), bytes_of(terms, "logits"))
    # At this size token ids and statistics are a sixth.
    assert planned < live.peak < 1.2 * planned < logits / 8


def test_the_caches_order_themselves_at_long_lengths_and_4_bits_save_the_same_everywhere():
    config = embedded_config(LLAMA2)
    totals = [estimate_evaluation(config, length=32_768, kv_cache=kind)["total"] for kind in kv_cache.KV_CACHES]
    assert totals == sorted(totals, reverse=True) and totals[0] > 16 + 3.6
    whole = estimate_evaluation(config, length=32_768, load_in_4bit=False)
    assert whole["total"] - totals[0] == pytest.approx(whole["weights"] - 3.11, abs=0.1)


# Refusals


def test_what_cannot_be_estimated_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'gpt2' cannot be estimated, its config has no intermediate_size"):
        estimate(GPT2Config(), context_length=512)
    with pytest.raises(ValueError, match=r"'olmoe' cannot be estimated, its config has num_local_experts"):
        parameter_count(OlmoeConfig())
    own = type("OwnConfig", (LlamaConfig,), {"model_type": "own"})  # of a base with code of its own
    with pytest.raises(ValueError, match=r"'own' cannot be estimated: transformers has no decoder of that type$"):
        parameter_count(own())
    with pytest.raises(ValueError, match=r"unknown target module 'c_attn': use all-linear, or some of q_proj"):
        estimate(small(), context_length=512, target_modules=("q_proj", "c_attn"))
    with pytest.raises(ValueError, match=r"unknown target module 'q_proj': use all-linear, or some of o_proj, q"):
        estimate(small(Phi3Config, pad_token_id=0), context_length=512)


def test_target_modules_may_be_a_single_name_or_all_linear():
    config = small()
    every = estimate(config, context_length=512, target_modules="all-linear")
    assert every == estimate(config, context_length=512, target_modules=ALL_LINEAR)
    one = estimate(config, context_length=512, target_modules="q_proj")
    assert one == estimate(config, context_length=512, target_modules=["q_proj"])
    assert one["adapter"] < every["adapter"]
