"""The interface of a backbone: likelihoods for the loss and the trainer, tokens and images for the sampler.

A backbone also defines what else differs between models: how it is built, how training images are
cropped, and the layout of its published files and recipes. Code outside this folder never asks which
backbone a model is.
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
    """The trained part of a model.

    Its forward pass returns the log-likelihood. So data-parallel wrappers see the whole computation, and the
    logits of a batch never exist all at once.
    """

    checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
    compiled = False  # see ``compile_parts``
    varying_rows = False  # the batch size differs between passes, so blocks are compiled for any batch size
    # Linear layers whose names contain one of these strings run once per image instead of once per token.
    once_per_image: tuple[str, ...] = ()

    @abstractmethod
    def transformer_blocks(self) -> nn.ModuleList:
        """Return the blocks in the order in which they run.

        Each is compiled, sharded and recomputed on its own.
        """

    @abstractmethod
    def hidden(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return the input of the output layer, [B, L, dim], in teacher forcing.

        inputs: as ``ARImageModel.inputs`` returns them.
        """

    @abstractmethod
    def output_layer(self) -> nn.Linear:
        """Return the layer that computes the logits."""

    @abstractmethod
    def init_weights(self) -> None:
        """Initialise the parameters at random for pretraining."""

    def compile_parts(self, varying_rows: bool) -> None:
        """Compile each block, and the computation of the likelihood of a chunk of tokens.

        varying_rows: the batch size differs between passes.
        """
        self.compiled, self.varying_rows = True, varying_rows
        for block in self.transformer_blocks():
            block.compile()

    def store_matrices(self, dtype: torch.dtype) -> None:
        """Convert the weights of linear layers to ``dtype``, to which autocast would cast them anyway.

        The results are the same to the last bit. Without gradients, autocast casts every weight again in
        each forward pass. With one token per pass, these casts take longer than the pass itself.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def join_matrices(self) -> None:
        """Join linear layers that take the same input into one matmul, if the backbone has such layers.

        Compiled sampling calls this, because its time grows with the number of kernels. Results may differ
        by rounding.
        """

    def logits(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Return the teacher-forced logits [B, L, V] float32."""
        return self.to_logits(self.hidden(labels, inputs))

    def to_logits(self, hidden: Tensor) -> Tensor:
        """Apply the output layer: [B, n, dim] -> [B, n, V] float32."""
        return self.output_layer()(hidden).float()

    def forward(self, labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
        """Return log p(tokens | label) [B] float32 of tokens [B, L] given labels [B]."""
        hidden, layer = self.hidden(labels, inputs), self.output_layer()
        dtype = autocast_dtype(hidden.device, layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return linear_sequence_logprob(hidden.to(dtype), layer.weight.to(dtype), bias, tokens, self.compiled)

    def run_blocks(self, x: Tensor, arguments: Sequence[tuple]) -> Tensor:
        """Run x [B, n, dim] through all blocks; ``arguments`` holds the further arguments of each block."""
        for block, others in zip(self.transformer_blocks(), arguments):
            for argument in (x, *others) if self.varying_rows else ():
                if isinstance(argument, Tensor) and len(argument) == len(x):
                    torch._dynamo.maybe_mark_dynamic(argument, 0)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *others, use_reentrant=False)
            else:
                x = block(x, *others)
        return x


class ImageTokenizer(nn.Module, ABC):
    """A frozen tokenizer: images [B, 3, H, W] in [-1, 1] <-> tokens [B, L] int64."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens of images."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens, not clamped."""


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
    cached_length: int = 0  # positions whose keys and values are cached for each batch entry

    # These are the same for all models of a backbone.
    family: ClassVar[str]  # its name in messages
    default_cfg_schedule: ClassVar[str]
    checkpoint_name: ClassVar[str]  # the file that the trainer writes, named as in the official code
    checkpoint_key: ClassVar[str]  # the key of the state dict in published files; "": no key
    # Whether the published sampling script decodes in the transformer's precision.
    decodes_in_half_precision: ClassVar[bool]
    training_command: ClassVar[str]  # the module of the command that trains it, such as "train_var_cca"
    trains_on_codes: ClassVar[bool]  # True: on extracted tokens; False: on images, encoded during training
    lr_scales_with_batch: ClassVar[bool]  # whether the learning rate is proportional to the global batch size
    # Whether a decoding step may be a tensor, so that one graph serves all steps.
    steps_alike: ClassVar[bool] = False
    no_decay: ClassVar[tuple[str, ...]] = ()  # parameters of two or more dimensions without weight decay

    @classmethod
    @abstractmethod
    def build(cls, transformer: Any, tokenizer: Any, image_size: int) -> Self:
        """Return the model of these configurations at ``image_size`` (pixels), on torch's current device."""

    @property
    def null_class(self) -> int:
        return self.num_classes

    @property
    def sequence_length(self) -> int:
        return sum(self.step_sizes)

    def forward_flops(self) -> int:
        """Return the floating-point operations of one image's log-likelihood, counting only matmuls.

        Each weight of a linear layer counts 2 per position. Attention counts 4 * sequence_length^2 * dim
        per block, which includes the masked half, as is usual. A backward pass takes twice as many, not
        counting recomputation.
        """
        net, length = self.transformer, self.sequence_length
        layers = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)]
        once = {name for name, _ in layers if any(part in name for part in net.once_per_image)}
        linear = sum(m.weight.numel() * (1 if name in once else length) for name, m in layers)
        attention = 2 * length**2 * net.output_layer().in_features * len(net.transformer_blocks())
        return 2 * (linear + attention)

    @property
    def stochastic(self) -> bool:
        """Whether the forward pass in training mode is random (dropout, stochastic depth)."""
        rates = (getattr(m, "p", 0) or getattr(m, "drop_path_rate", 0) for m in self.transformer.modules())
        return any(rate > 0 for rate in rates)

    @abstractmethod
    def training_transform(self) -> Transform:
        """Return the transform from a photograph to training pixels at ``image_size``, as published."""

    @abstractmethod
    def inputs(self, tokens: Tensor) -> Tensor:
        """Return the transformer's input in teacher forcing for tokens [B, L].

        The first dimension is B. No gradient flows through the result.
        """

    @property
    def cached_elements(self) -> int:
        """Elements that the cache holds for each batch entry, in the transformer's precision."""
        net = self.transformer
        return 2 * self.cached_length * net.output_layer().in_features * len(net.transformer_blocks())

    @abstractmethod
    def begin(self, labels: Tensor, static: bool = False) -> State:
        """Return the state before the first decoding step, one batch entry per label [rows] int64.

        Labels may be the null class. The method runs under inference mode, on the labels' device, under the
        caller's autocast.

        static: return a state whose shapes are the same at every step; only for models with ``steps_alike``.
        """

    def next_logits(self, state: State, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of the tokens that this decoding step produces.

        Call it once per step, in order. It changes ``state`` (from ``begin``), which carries results of
        earlier steps to later ones.

        Args:
            decoding_step: from 0 to ``len(step_sizes) - 1``; with a static state a tensor [1] int64.
            tokens: all earlier tokens [rows, sum(step_sizes[:decoding_step])] int64, rows as in the state.
                With a static state only those of the previous step, and any tokens at the first step.

        Returns:
            float logits [rows, step_sizes[decoding_step], V].
        """
        x = self.step_inputs(state, decoding_step, tokens)
        x = self.transformer.run_blocks(x, self.block_arguments(state, decoding_step))
        return self.step_logits(state, x)

    @abstractmethod
    def step_inputs(self, state: State, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        """Return the input of the first block in ``next_logits``, [rows, step_sizes[decoding_step], dim].

        A step consists of three calls, and this is the first. Each is compiled on its own, so that the
        blocks, which are alike, are compiled only once.
        """

    @abstractmethod
    def block_arguments(self, state: State, decoding_step: int | Tensor) -> Sequence[tuple]:
        """Return the further arguments of each block, among them the cache that the block writes to."""

    @abstractmethod
    def step_logits(self, state: State, x: Tensor) -> Tensor:
        """Return the logits for the output of the last block."""

    @abstractmethod
    def to_uint8(self, images: Tensor) -> Tensor:
        """Convert images in [-1, 1] to uint8, with the rounding of the published sampling script."""

    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens [B, L] int64 of images [B, 3, H, W] in [-1, 1]."""
        return self.tokenizer.encode(images)

    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Return the images [B, 3, H, W] in [-1, 1] of tokens [B, L], resized (bicubic) to ``size`` if given.

        Raises ValueError for invalid tokens (see ``check_tokens``).
        """
        check_tokens(tokens, (len(tokens), self.sequence_length), self.vocab_size)
        images = self.tokenizer.decode(tokens).float()
        if size and size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        return images.clamp(-1, 1)  # after resizing, as in the published LlamaGen script

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Return the teacher-forced logits [B, L, V] float32 of tokens [B, L] given labels [B].

        Raises ValueError for wrong shapes and for tokens outside the vocabulary (see ``check_tokens``).
        """
        check_tokens(tokens, (*labels.shape, self.sequence_length), self.vocab_size)
        return self.transformer.logits(labels, self.inputs(tokens))

    def sequence_logprob(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Return log p(tokens | label), summed over the tokens of each image: [B], [B, L] -> [B] float32.

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
            ValueError: a shape is wrong, or a uniform number is outside [0, 1).
            UserError: the logits are not finite.
        """
        fits = labels.ndim == 1 and uniforms.shape == (len(labels), self.sequence_length)
        if not fits or not ((uniforms >= 0) & (uniforms < 1)).all():  # written so that NaN is refused too
            raise ValueError(
                f"labels {list(labels.shape)}, uniforms {list(uniforms.shape)}; expected [B] and "
                f"[B, {self.sequence_length}] of numbers in [0, 1)"
            )
        weight = self.transformer.output_layer().weight
        tokens = generate_tokens(self, labels, uniforms, options)
        # The copy is not an inference tensor, so it can be used in training.
        return require_finite(tokens, autocast_dtype(labels.device, weight.dtype)).clone()
