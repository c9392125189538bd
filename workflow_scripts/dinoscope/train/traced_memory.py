"""Memory that the tensors of a step take, found by tracing the step itself on tensors without data.

Fake tensors have shapes, types and storages but no memory, so that a trace takes seconds whatever the model, and
follows every change of the losses. Weights are not counted, gradients only while they are made: under FSDP both are
another matter (forecast.py).
"""

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dinoscope.data.collate import Batch
from dinoscope.models.registry import ViTSettings
from dinoscope.resolutions import Resolution, resolutions
from dinoscope.train import ssl_step
from dinoscope.train.distillation import TeacherShape
from dinoscope.train.draws import step_draws
from dinoscope.train.flops import num_masked_patches, step_flops
from dinoscope.train.parallelize import checkpoint_activations
from dinoscope.train.ssl_step import SSLModel, compute_dtype

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["LiveBytes", "StepMemory", "step_memory"]


class StepMemory(NamedTuple):
    """Bytes of tensors besides the weights.

    Attributes:
        after_forward: Alive when the first backward begins: the batch, the targets and what autograd kept.
        peak: The most that is alive at any time, intermediate results included.
    """

    after_forward: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and that are still alive.

    Args:
        known: Tensors that are not counted; those that operations give as views of others must be among them.

    Attributes:
        now: Bytes alive.
        peak: The most so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and counts what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _TracedModel(SSLModel):
    """Computes in the type of the device that is asked about, wherever it is traced."""

    dtype = torch.float32

    def normalised(self, crops: Tensor) -> Tensor:
        return super().normalised(crops).to(self.dtype)


def step_memory(
    config: "RunConfig", settings: ViTSettings, device_type: str, distilled: TeacherShape | None = None
) -> StepMemory:
    """Traces targets, forward and backward of a step on one device; of several resolutions, one with the largest crops.

    With several parts a step (`train.accumulation_steps`), two are traced: later ones find fewer targets left. Blocks
    are not compiled here; compiled ones need somewhat less.

    Args:
        config: The recipe.
        settings: Of its backbone.
        device_type: "cpu", "cuda", …: says which type is computed in.
        distilled: Of the teacher that is distilled, where there is one.
    """
    with torch.device("meta"):
        model = _TracedModel(config, settings, distilled)
    model.dtype = compute_dtype(config, device_type)
    model.to(model.dtype)
    checkpoint_activations(model.student["backbone"].blocks, config)
    largest = max(resolutions(config), key=lambda sizes: step_flops(config, settings, 1, 0, sizes))
    with _replaced(config, largest), FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        for parameter in model.student.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # it is in the shards by then
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            after_forward = _trace(model, config, largest, live)
    return StepMemory(after_forward, live.peak)


def _trace(model: SSLModel, config: "RunConfig", resolution: Resolution, live: LiveBytes) -> int:
    accumulation, tiles = config.train.accumulation_steps, config.train.batch_size_per_gpu
    whole = _empty_batch(config, tiles * accumulation, resolution)
    batches = whole.split(accumulation)
    targets = model.targets(batches, 0.07)
    after_forward = 0
    for batch in batches[:2]:
        sizes = [len(batch.global_crops), len(batch.local_crops)]
        draws = step_draws(model.settings, sizes, seed=0, step=0, rank=0, device=torch.device("cpu"))
        gram_weight = 1.0 if config.gram.use_loss else None
        loss, _ = model(batch, targets.pop(), gram_weight=gram_weight, draws=draws)
        after_forward = max(after_forward, live.now)
        loss.backward()
    return after_forward


class _EvenBatch(Batch):
    """A batch whose masked patches are split evenly: what a mask holds is not known while tracing."""

    def split(self, parts: int) -> list[Batch]:
        """Batches of equal sizes, and copies as in the training."""
        if parts == 1:
            return [self]
        tiles, masked = len(self.samples) // parts, math.ceil(len(self.mask_indices) / parts)
        per_tile = {name: len(getattr(self, name)) // len(self.samples) for name in ("global_crops", "local_crops")}
        return [
            Batch(
                samples=self.samples[:tiles],
                global_crops=torch.empty_like(self.global_crops[: tiles * per_tile["global_crops"]]),
                local_crops=torch.empty_like(self.local_crops[: tiles * per_tile["local_crops"]]),
                gram_crops=None if self.gram_crops is None else torch.empty_like(self.gram_crops[: 2 * tiles]),
                masks=self.masks[: 2 * tiles],
                mask_indices=self.mask_indices[:masked],
                mask_weights=self.mask_weights[:masked],
            )
            for _ in range(parts)
        ]


def _empty_batch(config: "RunConfig", tiles: int, sizes: Resolution) -> Batch:
    patches = (sizes.global_px // config.student.patch_size) ** 2
    masked = num_masked_patches(config, tiles, sizes)

    def pixels(number: int, side: int) -> Tensor:
        return torch.empty(number * tiles, side, side, 3, dtype=torch.uint8)

    return _EvenBatch(
        samples=list(range(tiles)),
        global_crops=pixels(2, sizes.global_px),
        local_crops=pixels(config.crops.local_crops_number, sizes.local_px),
        gram_crops=None if sizes.gram_px is None else pixels(2, sizes.gram_px),
        masks=torch.empty(2 * tiles, patches, dtype=torch.bool),
        mask_indices=torch.empty(masked, dtype=torch.int64),
        mask_weights=torch.empty(masked),
    )


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


@contextlib.contextmanager
def _replaced(config: "RunConfig", sizes: Resolution) -> Iterator[None]:
    """Keeps the trace from talking to other processes, and from asking which patches are masked."""
    gram = config.gram

    def selected(patches_BPD: Tensor, masks_BP: Tensor, tokens_used: str) -> Tensor:
        masked = num_masked_patches(config, len(masks_BP) // 2, sizes)
        return patches_BPD.flatten(0, 1)[: masked if gram.tokens_used == "masked" else masks_BP.numel() - masked]

    replacements = [(dist, "is_initialized", lambda: False), (ssl_step, "select_tokens", selected)]
    originals = [getattr(module, name) for module, name, _ in replacements]
    try:
        for module, name, value in replacements:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), original in zip(replacements, originals, strict=True):
            setattr(module, name, original)
