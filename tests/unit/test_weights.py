"""Model files of every kind, and what is refused."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinoscope.errors import WeightsError
from dinoscope.files import write_json
from dinoscope.models.registry import ViTSettings
from dinoscope.models.vit import DinoVisionTransformer
from dinoscope.models.weights import load_backbone, read_model_file, state_digest

PUBLISHED = ViTSettings(
    64, 2, 2, 256, num_storage_tokens=4, mask_k_bias=True, norm_layer="layernormbf16", rope_rescale=2.0
)


@pytest.fixture
def model() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(PUBLISHED)
    model.init_weights()
    return model.eval()


def flat(model: DinoVisionTransformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def exported(model: DinoVisionTransformer) -> dict[str, dict[str, torch.Tensor]]:
    heads = {"dino_head.last_layer.weight": torch.ones(3, 2), "ibot_head.last_layer.weight": torch.ones(3, 2)}
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in flat(model).items()} | heads}


def test_every_kind_of_file_gives_the_same_features(model: DinoVisionTransformer, tmp_path: Path) -> None:
    image = torch.randn(2, 3, 48, 32)
    torch.save(flat(model), tmp_path / "dinov3_vits16_pretrain.pth")
    torch.save(exported(model), tmp_path / "teacher.pth")
    save_file(flat(model), tmp_path / "model.safetensors")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "final.json", {"teacher": "../teacher.pth"})
    for name in ("dinov3_vits16_pretrain.pth", "teacher.pth", "model.safetensors", "", "run"):
        loaded = load_backbone(tmp_path / name)
        assert loaded.settings == model.settings
        assert torch.equal(loaded(image), model(image)), name
    assert set(read_model_file(tmp_path / "teacher.pth").heads) == {"dino_head", "ibot_head"}


@pytest.mark.parametrize("changes", [
    {"ffn_layer": "swiglu", "ffn_hidden": 176},
    {"qkv_bias": False, "mask_k_bias": False},
    {"num_storage_tokens": 0, "layerscale": None},
    {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    {"proj_bias": False, "ffn_bias": False, "patch_size": 8, "num_heads": 4},
])  # fmt: skip
def test_settings_are_read_off_the_tensors(changes: dict, tmp_path: Path) -> None:
    model = DinoVisionTransformer(dataclasses.replace(PUBLISHED, **changes))
    model.init_weights()
    torch.save(flat(model), tmp_path / "any_name.pth")
    assert load_backbone(tmp_path / "any_name.pth").settings == model.settings


def test_the_card_tells_what_no_tensor_can(model: DinoVisionTransformer, tmp_path: Path) -> None:
    settings = dataclasses.replace(PUBLISHED, norm_layer="layernorm", rope_normalize_coords="max", layerscale=0.1)
    torch.save(flat(model), tmp_path / "teacher.pth")
    card = {"backbone": settings.as_dict(), "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    write_json(tmp_path / "model.json", card)
    loaded = load_backbone(tmp_path / "teacher.pth")
    assert loaded.settings == settings
    assert loaded.mean == (0.1, 0.2, 0.3)
    write_json(tmp_path / "model.json", card | {"backbone": settings.as_dict() | {"depth": 7}})
    with pytest.raises(WeightsError, match=r"tensors say depth = 2, but model\.json says 7"):
        load_backbone(tmp_path / "teacher.pth")


def test_what_is_not_whole_is_refused(model: DinoVisionTransformer, tmp_path: Path) -> None:
    whole = flat(model)
    without = {name: tensor for name, tensor in whole.items() if name != "blocks.1.attn.proj.weight"}
    bad = {name: (tensor * float("nan") if name == "norm.weight" else tensor) for name, tensor in whole.items()}
    training_state = {f"student.backbone.{name}": tensor for name, tensor in whole.items()}
    cases = {
        "missing.pth": (without, r"lacks tensors for a vit_nano backbone: blocks\.1\.attn\.proj\.weight"),
        "extra.pth": (whole | {"lm_head": torch.ones(2)}, "has unknown tensors.*lm_head"),
        "shape.pth": (whole | {"norm.weight": torch.ones(3)}, r"wrongly shaped.*norm\.weight"),
        "nan.pth": (bad, r"norm\.weight holds values that are not finite"),
        "state.pth": (training_state, "whole training state; give the exported teacher"),
        "other.pth": ({"fc.weight": torch.ones(2)}, "holds no DINOv3 backbone"),
        "list.pth": ([torch.ones(2)], "holds an object of type list"),
    }
    for name, (content, sentence) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=sentence):
            load_backbone(tmp_path / name)


def test_files_that_cannot_be_read_are_refused(model: DinoVisionTransformer, tmp_path: Path) -> None:
    torch.save(flat(model), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    for name, sentence in {
        "cut.pth": "cannot be read",
        "empty.pth": "it is empty",
        "text.pth": "cannot be read",
        "cut.safetensors": "damaged or cut short",
        "nowhere.pth": "does not exist",
        "dcp": r"training checkpoint \(DCP\); give the exported teacher",
        "": r"neither teacher\.pth nor the final\.json",
    }.items():
        with pytest.raises(WeightsError, match=sentence):
            load_backbone(tmp_path / name)


class Malicious:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return (exit, (3,))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"cls_token": Malicious()}))
    with pytest.raises(WeightsError, match="cannot be read"):
        load_backbone(tmp_path / "evil.pth")


def test_digest_depends_on_values_and_names_alone() -> None:
    first = {"a": torch.arange(4.0), "b": torch.ones(2)}
    assert state_digest(first) == state_digest({"b": torch.ones(2), "a": torch.arange(8.0)[:4]})
    assert state_digest(first) != state_digest({"a": torch.arange(4.0), "c": torch.ones(2)})
    assert state_digest(first) != state_digest({"a": torch.arange(4.0).reshape(2, 2), "b": torch.ones(2)})
