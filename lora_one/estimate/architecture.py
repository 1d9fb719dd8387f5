"""The shape of a decoder: every linear layer, and the number of parameters."""

from dataclasses import dataclass

from lora_one.errors import ConfigError

from .families import Family


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block, or an expert's slice of a stacked one.

    Attributes:
        name: as in the module's path: "self_attn.q_proj".
        reads: the name of the activation that it multiplies; layers that read the same activation share it.
        copies: how many there are in the block: 1, or the number of experts.
        rows: how many of the copies a token passes: 1, or the experts per token.
        module: True for a separate module, which "all-linear" finds; False for routers and stacked experts.
    """

    name: str
    out_features: int
    in_features: int
    reads: str
    bias: bool = False
    copies: int = 1
    rows: int = 1
    module: bool = True

    @property
    def weights(self) -> int:
        """Number of entries of all copies' matrices."""
        return self.copies * self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        """Number of weights and biases of all copies."""
        return self.weights + self.copies * self.out_features * self.bias

    @property
    def used_weights(self) -> int:
        """Number of weights that one token is multiplied with."""
        return self.rows * self.out_features * self.in_features


Targets = list[list[Linear]]  # the target layers of each block


@dataclass(frozen=True)
class Block:
    """A decoder block.

    Attributes:
        linears: its linear layers.
        norm_inputs: the width of each norm's input, in entries per token.
        norm_parameters: number of parameters of all norms.
        mlp_width: width of the activations between the MLP's layers, in entries per token. With experts: the experts
            per token times the width of one.
        shared_width: the same for the shared expert; 0 without one.
        window: the number of tokens that attention looks back; None for all.
    """

    linears: tuple[Linear, ...]
    norm_inputs: tuple[int, ...]
    norm_parameters: int
    mlp_width: int
    shared_width: int
    window: int | None

    def named(self, name: str) -> Linear:
        """Return the linear layer of that name."""
        return next(linear for linear in self.linears if linear.name == name)

    @property
    def parameters(self) -> int:
        """Number of parameters of the block."""
        return self.norm_parameters + sum(linear.parameters for linear in self.linears)


@dataclass(frozen=True)
class Architecture:
    """A decoder with a language-model head.

    Attributes:
        name: of the model's folder.
        model_type: as in config.json: "llama".
        activation: the activation function's name in transformers.
        tied: the embedding and the output layer share one matrix.
        softcapped: the logits pass a tanh.
    """

    name: str
    model_type: str
    family: Family
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    tied: bool
    softcapped: bool
    blocks: tuple[Block, ...]

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the embedding and the output layer."""
        matrices = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return matrices + self.vocabulary * self.family.head_bias

    @property
    def parameters(self) -> int:
        """Number of all parameters, as transformers counts them."""
        final_norm = self.hidden * (2 if self.family.norm == "layer" else 1)
        return self.embedding_parameters + final_norm + sum(block.parameters for block in self.blocks)


def target_linears(model: Architecture, targets: str | tuple[str, ...] = "all-linear") -> Targets:
    """Return the target layers of each block.

    Args:
        targets: "all-linear" (every linear module of the blocks except gates of one output), or last names of module
            paths, where "experts" means the stacked experts.

    Raises:
        ConfigError: no layer has one of the names.
    """
    if targets == "all-linear":
        return [
            [linear for linear in block.linears if linear.module and linear.out_features > 1] for block in model.blocks
        ]
    if isinstance(targets, str):
        raise ConfigError(f'targets must be "all-linear" or names of layers, got {targets!r}')

    def target_name(linear: Linear) -> str:
        return "experts" if ".experts." in linear.name else linear.name.split(".")[-1]

    available = {target_name(linear) for block in model.blocks for linear in block.linears}
    if unknown := sorted(set(targets) - available):
        raise ConfigError(f"targets must be among {', '.join(sorted(available))}, got {', '.join(unknown)}")
    return [[linear for linear in block.linears if target_name(linear) in targets] for block in model.blocks]


def lora_parameters(targets: Targets, rank: int) -> int:
    """Return the number of entries of all LoRA factors of the given rank."""
    return sum(
        linear.copies * rank * (linear.out_features + linear.in_features) for block in targets for linear in block
    )
