"""Writes checkpoints as the published trainer lays them out, from any number of processes.

    torchrun --nproc-per-node 3 tests/checkpoint_writer.py FOLDER float32 teacher [DUMMY_MB]

Tensors come from a seed, so that a test can make the same ones.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))
from dinoscope.models.heads import HeadShape
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer

SETTINGS = ViTSettings(
    embed_dim=96, depth=3, num_heads=3, ffn_hidden=256, ffn_layer="swiglu", num_storage_tokens=4, mask_k_bias=True,
    untie_global_and_local_cls_norm=True, layerscale=1e-5,
)  # fmt: skip
HEAD = HeadShape(num_prototypes=65, hidden_dim=48, bottleneck_dim=24, num_layers=3)


def network(seed: int, settings: ViTSettings = SETTINGS) -> dict[str, torch.Tensor]:
    """All tensors of a backbone and two heads, random where they are numbers that training changes."""
    generator = torch.Generator().manual_seed(seed)
    backbone = DinoVisionTransformer(settings)
    parts = {
        "backbone": backbone,
        "dino_head": HEAD.build(settings.embed_dim),
        "ibot_head": HEAD.build(settings.embed_dim),
    }
    backbone.init_weights()
    names = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    fixed = ("rope_embed.periods", "bias_mask")
    return {
        name: tensor if name.endswith(fixed) else torch.randn(tensor.shape, generator=generator)
        for name, tensor in names.items()
    }


def in_format(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state as a run with parameters of that type stores it."""
    return {name: t if name.endswith("periods") else t.to(dtype) for name, t in state.items()}


def whole_state(dtype: torch.dtype, teacher: str, dummy_mb: int, settings: ViTSettings = SETTINGS) -> dict:
    """Student (seed 0), teacher (seed 1) under the name given, an optimizer, and some ballast in it."""
    model = {}
    for prefix, seed in (("student", 0), (teacher, 1)):
        model |= {f"{prefix}.{name}": tensor for name, tensor in in_format(network(seed, settings), dtype).items()}
    moments = {name: torch.zeros_like(tensor) for name, tensor in model.items() if name.startswith("student.")}
    ballast = {f"ballast_{i}": torch.ones(1 << 18) for i in range(dummy_mb)}
    return {"model": model, "optimizer": {"exp_avg": moments | ballast, "step": 7}, "iteration": 41}


def main() -> None:
    folder, dtype, teacher, *more = sys.argv[1:]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = whole_state(getattr(torch, dtype), teacher, int(more[0]) if more else 0)
    state["model"] = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor
        for name, tensor in state["model"].items()
    }
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
