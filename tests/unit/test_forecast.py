"""What a run is forecast to take, against what it takes: autograd's own tensors, the profiler, files of checkpoints."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinoscope.config import RunConfig
from dinoscope.data.collate import Batch, mask_tensors
from dinoscope.data.masking import sample_masks
from dinoscope.data.windows import CropRange
from dinoscope.models.registry import settings_from_config
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.recipe import resolve_recipe
from dinoscope.resolutions import resolutions
from dinoscope.train import outlook as outlook_module
from dinoscope.train.draws import step_draws
from dinoscope.train.flops import num_masked_patches
from dinoscope.train.forecast import Disk, Forecast, Memory, Parameters, disk_use, forecast
from dinoscope.train.outlook import Warmup, outlook, time_in_words, warnings
from dinoscope.train.parallelize import checkpoint_activations
from dinoscope.train.speed import Speed
from dinoscope.train.ssl_step import SSLModel, build_heads
from dinoscope.train.traced_memory import step_memory

MODES = {"none": {}, "selective": {"checkpointing": True}, "full": {"checkpointing_full": True}}
CASES = [
    *(("vit_nano", 4, 4096, {}, {}, mode) for mode in MODES),
    *(("vit_micro", 2, 512, {"drop_path_rate": 0.3}, {}, mode) for mode in MODES),
    ("vit_small", 2, 512, {"norm_layer": "layernormbf16"}, {}, "none"),
    ("vit_micro", 2, 512, {"trainable": "lora", "unfrozen_blocks": 1}, {}, "none"),
    ("vit_nano", 4, 512, {"ffn_layer": "swiglu", "layerscale": None}, {}, "selective"),
    ("vit_nano", 4, 512, {}, {"use_loss": True, "img_level": True}, "none"),
    ("vit_nano", 4, 512, {}, {"use_loss": True, "tokens_used": "masked"}, "none"),
]


def recipe(arch: str, tiles: int = 2, prototypes: int = 256, **sections: dict) -> RunConfig:
    head = {"head_n_prototypes": prototypes, "head_hidden_dim": 256, "head_bottleneck_dim": 64}
    layers = {
        "student": {"arch": arch, "n_storage_tokens": 4, "mask_k_bias": True} | sections.pop("student", {}),
        "crops": {"global_crops_size": 96, "local_crops_size": 48, "local_crops_number": 4},
        "dino": head,
        "ibot": head,
        "train": {"batch_size_per_gpu": tiles} | sections.pop("train", {}),
    }
    return resolve_recipe([("test", layers | sections)], "test")


def drawn_batch(config: RunConfig) -> Batch:
    """Pixels and masks as a loader gives them."""
    rng, tiles, crops = np.random.default_rng(0), config.train.batch_size_per_gpu, config.crops
    side, ibot = crops.global_crops_size // 16, config.ibot
    masks = sample_masks(2 * tiles, (side, side), ibot.mask_sample_probability, tuple(ibot.mask_ratio_min_max), rng)

    def pixels(count: int, px: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, 256, (count * tiles, px, px, 3), np.uint8))

    return Batch(
        samples=list(range(tiles)),
        global_crops=pixels(2, crops.global_crops_size),
        local_crops=pixels(crops.local_crops_number, crops.local_crops_size),
        gram_crops=None,
        **mask_tensors(torch.from_numpy(masks)),
    )


def real_model(config: RunConfig) -> SSLModel:
    model = SSLModel(config, settings_from_config(config.student))
    for tensor in model.state_dict().values():
        tensor.normal_(std=0.02)
    checkpoint_activations(model.student["backbone"].blocks, config)
    return model


def forward(model: SSLModel, batch: Batch) -> tuple[Tensor, object]:
    (targets,) = model.targets([batch], 0.07)
    sizes = [len(batch.global_crops), len(batch.local_crops)]
    draws = step_draws(model.settings, sizes, seed=0, step=0, rank=0, device=torch.device("cpu"))
    gram_weight = 1.0 if model.config.gram.use_loss else None
    return model(batch, targets, gram_weight=gram_weight, draws=draws)[0], targets


def held_by_autograd(model: SSLModel, batch: Batch) -> int:
    """Bytes of distinct storages: saved tensors that are no weights, the targets and the batch."""
    storages: dict[int, Tensor] = {}  # holds on to the tensors: an address must not be used twice

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, targets = forward(model, batch)
    output = targets.output
    for tensor in (targets.images, targets.cls_2BK, targets.patches_MK, *vars(output).values(), *vars(batch).values()):
        if isinstance(tensor, Tensor):
            keep(tensor)
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in weights)


def allocated_at_most(model: SSLModel, batch: Batch) -> int:
    """The most that torch's allocator held in a step, by the profiler."""
    for parameter in model.student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss, _ = forward(model, batch)
        loss.backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Without it, the work space that each thread of the CPU's attention has would count: 1.6 MB in a small model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("arch", "tiles", "prototypes", "student", "gram", "mode"), CASES)
def test_activations(arch: str, tiles: int, prototypes: int, student: dict, gram: dict, mode: str) -> None:
    gram_section = {"gram": gram | {"it_load_ema_teacher": 0}} if gram else {}
    config = recipe(arch, tiles, prototypes, student=student, train=MODES[mode], **gram_section)
    batch = drawn_batch(config)
    traced = step_memory(config, settings_from_config(config.student), "cpu")
    model = real_model(config)
    pixels = sum(getattr(batch, name).nbytes for name in ("global_crops", "local_crops"))
    if mode == "none":  # what checkpointing keeps is hidden from the hooks of others
        assert traced.after_forward == pytest.approx(held_by_autograd(model, batch), rel=0.07)
    assert traced.peak == pytest.approx(allocated_at_most(model, batch) + pixels, rel=0.07)


def test_what_gpus_compute_in_takes_half_of_the_memory() -> None:
    config = recipe("vit_nano", 4, 64)
    settings = settings_from_config(config.student)
    on_cpu, on_gpu = (step_memory(config, settings, device).peak for device in ("cpu", "cuda"))
    assert 0.45 * on_cpu < on_gpu < 0.7 * on_cpu


def test_accumulation_keeps_the_targets_of_all_parts_and_the_activations_of_one() -> None:
    settings = settings_from_config(recipe("vit_nano").student)
    once = step_memory(recipe("vit_nano", 4), settings, "cpu").peak
    parted = step_memory(recipe("vit_nano", 4, train={"accumulation_steps": 4}), settings, "cpu").peak
    undivided = step_memory(recipe("vit_nano", 16), settings, "cpu").peak
    assert once < parted < undivided
    config = recipe("vit_nano", 4, train={"accumulation_steps": 4})
    assert num_masked_patches(config, 16, resolutions(config)[0]) == len(
        drawn_batch(recipe("vit_nano", 16)).mask_indices
    )


@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"])
def test_weights_and_optimizer_are_divided(strategy: str) -> None:
    config = recipe("vit_nano", compute_precision={"sharding_strategy": strategy})
    settings = settings_from_config(config.student)
    one, eight = (forecast(config, settings, world, 1000, "cuda", 4).memory for world in (4, 8))
    whole = sum(p.numel() for p in SSLModel(config, settings).parameters()) * 4
    divided_by = 4 if strategy == "HYBRID_SHARD" else 8
    assert one.weights == pytest.approx(whole / 4, rel=0.05)
    assert eight.weights == pytest.approx(whole / divided_by, rel=0.05)
    assert eight.optimizer == 2 * eight.gradients == pytest.approx(eight.weights, rel=0.05)
    kept = forecast(recipe("vit_nano"), settings, 8, 1000, "cuda", 4).memory.gathered
    assert (eight.gathered == kept) == (strategy == "SHARD_GRAD_OP")


def test_numbers_of_parameters() -> None:
    config = recipe("vit_nano", student={"trainable": "lora", "unfrozen_blocks": 1, "lora_rank": 2})
    settings = settings_from_config(config.student)
    found = forecast(config, settings, 1, 1000, "cpu").parameters
    plain = sum(p.numel() for p in DinoVisionTransformer(settings).parameters())
    adapters = 2 * (4 * 64 + 3 * 64 + 64)  # A of q, k, v and proj, their Bs; in one of the two blocks
    assert found.backbone == plain + adapters
    assert found.heads == sum(p.numel() for head in build_heads(config, settings).values() for p in head.parameters())
    block = DinoVisionTransformer(settings).blocks[0]
    norms = 2 * 2 * 64 + 2 * 64  # of the other block, and the last one
    assert found.trained == sum(p.numel() for p in block.parameters()) + norms + adapters


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"max_to_keep": 3}, 4), ({"max_to_keep": None}, 10), ({"max_to_keep": 3, "keep_every": 25}, 8)],
)
def test_numbers_of_checkpoints(settings: dict, most: int) -> None:
    config = recipe("vit_nano", checkpointing={"period": 10} | settings)
    model = SSLModel(config, settings_from_config(config.student))
    assert disk_use(model, 100, 1, 1).num_checkpoints == most


def test_forecasting_draws_no_random_numbers() -> None:
    config = recipe(
        "vit_nano", student={"trainable": "lora", "drop_path_rate": 0.2, "pos_embed_rope_rescale_coords": 2}
    )
    before = torch.get_rng_state()
    forecast(config, settings_from_config(config.student), 1, 1000, "cpu")
    assert torch.equal(before, torch.get_rng_state())


AHEAD = Forecast(
    parameters=Parameters(10, 10, 5),
    memory=Memory(2**30, 2**30, 2**31, 0, 2**32, 0, 0),
    disk=Disk(10**9, 4, 10**8, 10, 0),
    iterations=1000,
    num_images=1_000_000,
    global_batch=256,
    peak_lr=1e-4,
    flops_per_tile=1e11,
    world_size=2,
    local_size=2,
    device_type="cpu",
    num_workers=1,
)
CROPS = [CropRange("global", 224, 0.3, 0.5, False), CropRange("local", 96, 0.3, 0.5, False)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 cores and 64 GiB."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(32))
    kilobytes = {"MemTotal": 64 * 2**20, "VmHWM": 7 * 2**20}
    monkeypatch.setattr(outlook_module, "_proc_kb", lambda path, name: kilobytes[name])


def test_first_steps_are_told_once(machine: None) -> None:
    warmup = Warmup(AHEAD, now=lambda: 0.0)
    slow_at_first = [warmup.note(step, 60.0, 60.0) for step in range(100, 105)]
    notes = [warmup.note(step, 2.0, 0.5) for step in range(105, 150)]
    assert slow_at_first == [None] * 5
    (note,) = [note for note in notes if note is not None]
    assert notes[14] == note
    assert (
        "after 20 steps: 128 tiles/s, 25 % of the time waiting for data (loader-bound: raise train.num_workers" in note
    )
    assert "(now 1 on 16 cores a process)" in note
    assert "peak memory 7.00 GiB a process (8.00 forecast)" in note
    assert "about 29 min left" in note  # 880 steps of 2 s


def test_no_word_of_loaders_that_keep_up(machine: None) -> None:
    warmup = Warmup(AHEAD)
    (note,) = [note for step in range(30) if (note := warmup.note(step, 2.0, 0.1)) is not None]
    assert "5 % of the time waiting for data;" in note


def test_a_run_of_which_all_is_well_is_not_warned_of(machine: None, tmp_path: Path) -> None:
    speed = Speed(wanted=100.0, delivered=200.0, share=0.4, rate=1e12, workers=1, cores=16)
    assert warnings(recipe("vit_nano"), AHEAD, speed, CROPS, tmp_path / "none", 1000) == []
    assert not (tmp_path / "none").exists()


def test_warnings(machine: None, tmp_path: Path) -> None:
    ahead = replace(AHEAD, num_images=1000, memory=replace(AHEAD.memory, activations=2**35))
    ahead = replace(ahead, disk=replace(AHEAD.disk, checkpoint=10**18))
    speed = Speed(wanted=100.0, delivered=50.0, share=0.4, rate=1e12, workers=1, cores=16)
    crops = [replace(CROPS[0], upsampled=True), CROPS[1]]
    found = warnings(recipe("vit_nano"), ahead, speed, crops, tmp_path, 12)
    expected = ["the disk is too small", "memory is short", "cap: 256 passes", "small: 1,000 tiles of 12 cases"]
    expected += ["global crops are enlarged", "loader-bound: the loaders deliver 50 tiles/s and the model wants 100"]
    assert [text[: len(start)] for text, start in zip(found, expected, strict=True)] == expected


def test_the_slower_of_model_and_loaders_sets_the_duration(machine: None, tmp_path: Path) -> None:
    speed = Speed(wanted=100.0, delivered=50.0, share=0.4, rate=1e12, workers=1, cores=16)
    rows = dict(outlook(recipe("vit_nano"), AHEAD, speed, [], tmp_path, next_iteration=500))
    assert rows["duration"] == "about 43 min at the speed of the loaders, the slower of both"  # 500 · 256 / 50 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(39.2, "40 s"), (720, "12 min"), (12_000, "3 h 20 min"), (207_360, "2.4 days")],
)
def test_time_in_words(seconds: float, text: str) -> None:
    assert time_in_words(seconds) == text
