"""What only a CUDA GPU shows; left out where there is none. tests/gpu/measure.py measures memory and speed there."""

import pytest
import torch

from cream_peft import load_adapter
from cream_peft.train.recipe import parse_recipe
from cream_peft.train.run import run_recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")


def test_a_run_in_4_bits_with_offloaded_checkpoints_loads_back_with_equal_logits(tmp_path):
    arguments = ["--max_steps", "2", "--memory", "low", "--gradient_checkpointing", "true", "--save_strategy", "no"]
    run_recipe(parse_recipe([*arguments, "--output_dir", str(tmp_path / "run")]))
    model, tokenizer = load_adapter(tmp_path / "run")
    ids = torch.arange(1, 1025, device=model.device)[None] % len(tokenizer)
    with torch.no_grad():
        logits = [load_adapter(tmp_path / "run")[0](ids).logits, model(ids).logits]
    assert torch.isfinite(logits[0]).all() and torch.equal(*logits)
