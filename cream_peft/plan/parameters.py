"""What a base consists of, in parameters, and what of it a run trains."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .layers import (
    active_parameters,
    adapted_layers,
    expert_parameters,
    experts_used,
    linear_parameters,
    number_of_experts,
    parameter_count,
    target_linears,
)
from .memory import Training


@dataclass(frozen=True)
class Base:
    """Parameters of the base, those that a token passes through, and of all those in 4 bits and those of experts; the
    experts of a layer, and of them those of a token; parameters trained, by which modules in how many layers."""

    parameters: int
    active: int
    in_4bit: int
    of_experts: int
    experts: int
    experts_per_token: int
    trained: int
    target_modules: list[str]
    adapted_layers: int

    def line(self) -> str:
        """What the base consists of, and what of it is trained."""

        def billions(parameters: int) -> str:
            return f"{parameters / 1e9:.2f}"

        line, rest = f"base: {billions(self.parameters)} billion parameters", self.parameters - self.in_4bit
        if self.experts_per_token:
            line += f", {billions(self.active)} active ({self.experts_per_token} of {self.experts} experts a token)"
        if self.in_4bit:
            line += f"; {billions(self.in_4bit)} in 4 bits, {billions(rest)} in 16"
            line += f", of which {billions(self.of_experts)} are experts" if self.experts_per_token else ""
        if not self.target_modules:
            return f"{line}; every weight is trained"
        where = f"{', '.join(self.target_modules)} of {self.adapted_layers} layers"
        return f"{line}; LoRA: {self.trained / 1e6:.1f} million on {where}"


def base_of(config: PreTrainedConfig, training: Training) -> Base:
    """Of the base of `config`, trained as `training` says."""
    adapted = training.use_peft
    return Base(
        parameter_count(config),
        active_parameters(config),
        linear_parameters(config) if training.load_in_4bit else 0,
        expert_parameters(config),
        number_of_experts(config),
        experts_used(config),
        training.trained_parameters(config),
        list(target_linears(config, training.target_modules)) if adapted else [],
        adapted_layers(config, training.target_modules) if adapted else config.num_hidden_layers,
    )
