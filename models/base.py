"""What every backbone offers: to the loss and the trainer likelihoods, to the sampler tokens and images.

Beside the mathematics a backbone says here what else differs between models: how it is built, how
training images are cut, how its published files and recipes are laid out. Nothing outside this
folder asks which backbone a model is.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.log_likelihood import check_tokens, linear_sequence_logprob
from models.sampling import DecodingState, SamplingOptions, generate_tokens, require_finite
from models.transforms import Transform
from models.utils.precision import autocast_dtype


class ARTransformer(nn.Module, ABC):
    """The trained part of a model. Its forward pass is the log-likelihood, so that data-parallel
    wrappers see all of it, and the logits of a batch never exist at once."""

    checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
    compiled = False  # see ``compile_parts``
    varying_rows = False  # the rows of a batch differ from pass to pass: blocks are compiled for any number
    # Parts of the names of linear layers that run once for an image, and not for each of its tokens.
    once_per_image: tuple[str, ...] = ()

    @abstractmethod
    def transformer_blocks(self) -> nn.ModuleList:
        """The blocks, in running order: what is compiled, sharded and recomputed one by one."""

    @abstractmethod
    def hidden(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """What the output layer takes, [B, L, dim], in teacher forcing (see ``ARImageModel.inputs``)."""

    @abstractmethod
    def output_layer(self) -> nn.Linear:
        """The layer that makes the logits."""

    @abstractmethod
    def init_weights(self) -> None:
        """Random start for pretraining."""

    def compile_parts(self, varying_rows: bool) -> None:
        """From now on each block is compiled, and what the likelihood does with a chunk of tokens."""
        self.compiled, self.varying_rows = True, varying_rows
        for block in self.transformer_blocks():
            block.compile()

    def store_matrices(self, dtype: torch.dtype) -> None:
        """Keep the weights of the linear layers in the precision that autocast gives them.

        The numbers are the same to the last bit. Without gradients autocast casts every weight
        anew in each forward pass: at one token per pass that takes longer than the pass itself.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def join_matrices(self) -> None:
        """Join linear layers that take the same input into one matmul, where a backbone has such layers.

        This is for compiled sampling, whose time grows with the number of kernels. Results may differ by
        rounding.
        """

    def logits(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Teacher-forced float32 logits [B, L, V]."""
        return self.to_logits(self.hidden(labels, inputs))

    def to_logits(self, hidden: Tensor) -> Tensor:
        """The output layer: [B, n, dim] -> float32 [B, n, V]."""
        return self.output_layer()(hidden).float()

    def forward(self, labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
        """log p(tokens | label) [B] float32 of tokens [B, L] under labels [B]."""
        hidden, layer = self.hidden(labels, inputs), self.output_layer()
        dtype = autocast_dtype(hidden.device, layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return linear_sequence_logprob(hidden.to(dtype), layer.weight.to(dtype), bias, tokens, self.compiled)

    def run_blocks(self, x: Tensor, arguments: Sequence[tuple]) -> Tensor:
        """x [B, n, dim] through all blocks; ``arguments``: what each takes besides."""
        for block, others in zip(self.transformer_blocks(), arguments):
            for given in (x, *others) if self.varying_rows else ():
                if isinstance(given, Tensor) and len(given) == len(x):
                    torch._dynamo.maybe_mark_dynamic(given, 0)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return x


class ImageTokenizer(nn.Module, ABC):
    """Images [B, 3, H, W] in [-1, 1] <-> tokens [B, L] int64; frozen."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images -> tokens."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images, not clamped."""


State = TypeVar("State", bound=DecodingState)


class ARImageModel(nn.Module, ABC, Generic[State]):
    """A class-conditional autoregressive image model: a transformer and its frozen tokenizer.

    Class labels run from 0 to ``num_classes - 1``; ``null_class`` = ``num_classes`` stands for
    "no condition". Tokens are int64 [B, sequence_length]; images are [B, 3, H, W] in [-1, 1].
    """

    transformer: ARTransformer
    tokenizer: ImageTokenizer
    num_classes: int
    vocab_size: int
    step_sizes: tuple[int, ...]  # tokens produced by each decoding step
    image_size: int
    cached_length: int = 0  # positions whose keys and values a row's state keeps

    # What else the backbone decides, the same for all of its models.
    family: ClassVar[str]  # what messages call it
    default_cfg_schedule: ClassVar[str]
    checkpoint_name: ClassVar[str]  # the file a trainer writes, as the official code names it
    checkpoint_key: ClassVar[str]  # under which published files keep their state dict; "": bare
    decodes_in_half_precision: ClassVar[
        bool
    ]  # whether published sampling decodes in the transformer's precision
    training_command: ClassVar[str]  # the module of the command that trains it, such as "train_var_cca"
    trains_on_codes: ClassVar[bool]  # tokens extracted beforehand; else images, encoded on the fly
    lr_scales_with_batch: ClassVar[bool]  # whether the recipe's rate is in proportion to the global batch
    # Whether a step may be a tensor, so that all steps are one graph.
    steps_alike: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ()  # parameters of two or more dimensions without weight decay

    @classmethod
    @abstractmethod
    def build(cls, transformer: Any, tokenizer: Any, image_size: int) -> Self:
        """The model of the zoo's configurations for that image size (pixels), on torch's current device."""

    @property
    def null_class(self) -> int:
        return self.num_classes

    @property
    def sequence_length(self) -> int:
        return sum(self.step_sizes)

    def forward_flops(self) -> int:
        """Floating-point operations of one image's log-likelihood, in matrix products alone.

        Two for each weight of a linear layer and position that it sees, and in each block
        4 * sequence_length^2 * dim for attention, its masked half included, as is usual. A backward
        pass takes twice as many; what is computed a second time in it is not counted.
        """
        net, length = self.transformer, self.sequence_length
        layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)]
        once = {name for name, _ in layers if any(part in name for part in net.once_per_image)}
        products = sum(m.weight.numel() * (1 if name in once else length) for name, m in layers)
        attention = 2 * length**2 * net.output_layer().in_features * len(net.transformer_blocks())
        return 2 * (products + attention)

    @property
    def stochastic(self) -> bool:
        """Whether training mode draws random numbers (dropout, stochastic depth)."""
        rates = (getattr(m, "p", 0) or getattr(m, "drop_path_rate", 0) for m in self.transformer.modules())
        return any(rate > 0 for rate in rates)

    @abstractmethod
    def training_transform(self) -> Transform:
        """How a photograph becomes training pixels at ``image_size``, as in the published runs."""

    @abstractmethod
    def inputs(self, tokens: Tensor) -> Tensor:
        """What the transformer sees of tokens [B, L] in teacher forcing: one row per image, no gradient."""

    @property
    def cached_elements(self) -> int:
        """Numbers that a row's state keeps of earlier steps, in the transformer's precision."""
        net = self.transformer
        return 2 * self.cached_length * net.output_layer().in_features * len(net.transformer_blocks())

    @abstractmethod
    def begin(self, labels: Tensor, static: bool = False) -> State:
        """The state before the first decoding step, one row per label [rows] int64 (null class included).

        Runs under inference mode, on the labels' device, under the caller's autocast. ``static``,
        of models with ``steps_alike`` alone: a state that every step leaves in the same shapes.
        """

    def next_logits(self, state: State, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        """Logits of the tokens that this decoding step produces.

        Called once per step, in order. ``state`` (from ``begin``) is changed: it has what earlier
        steps left and gets what later ones need.

        Args:
            decoding_step: from 0 to ``len(step_sizes) - 1``; of a static state a tensor [1] int64.
            tokens: all earlier ones [rows, sum(step_sizes[:decoding_step])] int64; rows as in the state.
                Of a static state those of the step before alone, whatever they are before the first.

        Returns:
            float logits [rows, step_sizes[decoding_step], V].
        """
        x = self.step_inputs(state, decoding_step, tokens)
        x = self.transformer.run_blocks(x, self.block_arguments(state, decoding_step))
        return self.step_logits(state, x)

    @abstractmethod
    def step_inputs(self, state: State, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        """What the first block takes in ``next_logits``, [rows, step_sizes[decoding_step], dim].

        A step is made of three calls, this one first, since each is compiled on its own: the blocks,
        being alike, only once.
        """

    @abstractmethod
    def block_arguments(self, state: State, decoding_step: int | Tensor) -> Sequence[tuple]:
        """What each block takes besides, its keys and values among it, which it stores."""

    @abstractmethod
    def step_logits(self, state: State, x: Tensor) -> Tensor:
        """The logits, of what the last block gave; the state goes on to the next step."""

    @abstractmethod
    def to_uint8(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> uint8, rounded as the backbone's published sampling script does."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> tokens [B, L] int64."""
        return self.tokenizer.encode(images)

    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Tokens [B, L] -> images [B, 3, H, W] in [-1, 1], resized (bicubic) to side ``size`` if given.

        Raises ValueError for other tokens (see ``check_tokens``).
        """
        check_tokens(tokens, (len(tokens), self.sequence_length), self.vocab_size)
        images = self.tokenizer.decode(tokens).float()
        if size and size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        return images.clamp(-1, 1)  # after resizing, as the published LlamaGen script does

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced float32 logits [B, L, V] of tokens [B, L] under labels [B].

        Raises ValueError for other shapes, or tokens outside the vocabulary (see ``check_tokens``).
        """
        check_tokens(tokens, (*labels.shape, self.sequence_length), self.vocab_size)
        return self.transformer.logits(labels, self.inputs(tokens))

    def sequence_logprob(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """log p(tokens | label), summed over all tokens of an image: [B], [B, L] -> [B] float32.

        Raises ValueError as ``logits`` does.
        """
        check_tokens(tokens, (*labels.shape, self.sequence_length), self.vocab_size)
        return self.transformer(labels, self.inputs(tokens), tokens)

    def generate(
        self, labels: Tensor, uniforms: Tensor, options: SamplingOptions = SamplingOptions()
    ) -> Tensor:
        """Sample tokens.

        Args:
            labels: classes [B] int64.
            uniforms: one random number in [0, 1) per token [B, L].
            options: guidance and filters.

        Returns:
            tokens [B, L] int64.

        Raises:
            ValueError: other shapes, or a uniform number outside [0, 1).
            UserError: the logits are not finite.
        """
        fits = labels.ndim == 1 and uniforms.shape == (len(labels), self.sequence_length)
        if not fits or not ((uniforms >= 0) & (uniforms < 1)).all():  # nor NaN
            raise ValueError(
                f"labels {list(labels.shape)}, uniforms {list(uniforms.shape)}; expected [B] and "
                f"[B, {self.sequence_length}] of numbers in [0, 1)"
            )
        weight = self.transformer.output_layer().weight
        tokens = generate_tokens(self, labels, uniforms, options)
        # A copy is no inference tensor: it may be trained on.
        return require_finite(tokens, autocast_dtype(labels.device, weight.dtype)).clone()
