import copy
import dataclasses

import pytest
import torch

from dinoscope.features.packed_linear import PackedLinear, can_pack, pack_linears
from dinoscope.models.registry import ViTSettings
from other_libraries import random_backbone

pytestmark = pytest.mark.skipif(not can_pack(), reason="oneDNN or AVX-512 is not here")
SETTINGS = ViTSettings(embed_dim=96, depth=3, num_heads=3, ffn_hidden=200, num_storage_tokens=2, mask_k_bias=True)


@pytest.mark.parametrize("changes", [{}, {"ffn_layer": "swiglu"}, {"qkv_bias": False, "proj_bias": False}])
@pytest.mark.parametrize("batch", [1, 5])
def test_packed_layers_change_nothing_but_the_order_of_rounding(changes, batch):
    model = random_backbone(dataclasses.replace(SETTINGS, **changes))
    packed = copy.deepcopy(model)
    num_linears = 4 if "ffn_layer" not in changes else 5
    assert pack_linears(packed) == 3 * num_linears
    images = torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.double().forward_features(images.double())
        found = packed.forward_features(images)
    for name, tokens in expected.items():
        torch.testing.assert_close(found[name].double(), tokens, atol=1e-5, rtol=0)


def test_adapters_and_other_formats_stay():
    model = random_backbone(SETTINGS)
    model.blocks[0].attn.proj.lora = torch.nn.Linear(96, 96)
    model.blocks[1].mlp.to(torch.bfloat16)
    assert pack_linears(model) == 3 * 4 - 3
    assert isinstance(model.blocks[0].attn.qkv, PackedLinear) and hasattr(model.blocks[0].attn.proj, "weight")


def test_the_compiler_takes_packed_layers_as_a_whole():
    model = random_backbone(SETTINGS)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pack_linears(model)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.inference_mode():
        compiled = torch.compile(model.forward_features, backend=backend, dynamic=False)
        torch.testing.assert_close(compiled(images)["cls"], model.forward_features(images)["cls"], atol=1e-6, rtol=0)
    assert sum("packed_linear" in name for name in seen) == 3 * 4
