"""Whole training steps against those of the published implementation (numbers in ../shared/reference/step)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinoscope.data.collate import Batch
from dinoscope.models.registry import ViTSettings
from dinoscope.recipe import resolve_recipe
from dinoscope.train.optimizer import apply_schedule, build_optimizer, clip_gradients, multipliers, update_ema
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel, parameters_by_part


class FloatImages(SSLModel):
    """Takes images that are normalised already, as the reference has them."""

    def normalised(self, crops: torch.Tensor) -> torch.Tensor:
        return crops.permute(0, 3, 1, 2)


def build(numbers: dict, tensors: dict[str, torch.Tensor]) -> SSLModel:
    config = resolve_recipe([("reference", numbers["cfg"])], "reference")
    student = config.student
    settings = ViTSettings(
        *(32, 2, 2, 128),
        num_storage_tokens=student.n_storage_tokens,
        mask_k_bias=student.mask_k_bias,
        norm_layer=student.norm_layer,
    )
    model = FloatImages(config, settings)
    for name in ("student", "teacher", "gram_teacher"):
        network = getattr(model, name)
        if network is not None:
            state = {k.removeprefix(f"{name}0."): v.float() for k, v in tensors.items() if k.startswith(f"{name}0.")}
            network.load_state_dict(state, strict=True)
    return model


def batch_of(tensors: dict[str, torch.Tensor], step: int) -> Batch:
    def get(key: str) -> torch.Tensor:
        return tensors[f"batch{step}.{key}"]

    def channels_last(key: str) -> torch.Tensor | None:
        return get(key).float().permute(0, 2, 3, 1) if f"batch{step}.{key}" in tensors else None

    return Batch(
        samples=[],
        global_crops=channels_last("collated_global_crops"),
        local_crops=channels_last("collated_local_crops"),
        gram_crops=channels_last("collated_gram_teacher_crops"),
        masks=get("collated_masks"),
        mask_indices=get("mask_indices_list"),
        mask_weights=get("masks_weight"),
    )


@pytest.mark.parametrize("name", ["plain", "gram"])
def test_two_steps_equal_the_published_ones(shared: Path, name: str) -> None:
    numbers = json.loads((shared / f"reference/step/{name}.json").read_text())
    tensors = load_file(shared / f"reference/step/{name}.safetensors")
    model = build(numbers, tensors)
    optimizer = build_optimizer(model.student, model.config, depth=2)
    first_gradients: dict[str, torch.Tensor] = {}
    for step, expected in enumerate(numbers["steps"]):
        hyper, terms = expected["hyper"], expected["terms"]
        values = ScheduleValues(
            hyper["lr"], hyper["wd"], hyper["momentum"], hyper["teacher_temp"], hyper["last_layer_lr"], None, None
        )
        apply_schedule(optimizer, values)
        optimizer.zero_grad(set_to_none=True)
        batch = batch_of(tensors, step)
        (targets,) = model.targets([batch], values.teacher_temp)
        loss, found = model(batch, targets, gram_weight=terms.get("gram_loss_weight"))
        loss.backward()
        assert loss.item() == pytest.approx(expected["total_loss"], rel=1e-5)
        for term in ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "gram_loss"):
            if term in terms:
                assert found[term].item() == pytest.approx(terms[term], rel=1e-5), term
        for key, parameter in model.student.named_parameters():
            torch.testing.assert_close(parameter.grad, tensors[f"grad{step}.{key}"], atol=2e-6, rtol=0, msg=key)
            first_gradients.setdefault(key, parameter.grad.clone())
        for part, parameters in parameters_by_part(model.student).items():
            norm = clip_gradients(parameters, expected["clip_grad"])
            assert norm.item() == pytest.approx(expected["grad_norm_before_clip"][part], rel=1e-5), part
        optimizer.step()
        update_ema(model.teacher, model.student, values.momentum)
        for key, parameter in model.student.named_parameters():
            off = (parameter - tensors[f"student{step + 1}.{key}"]).abs()
            clear = first_gradients[key].abs() > 1e-5
            assert not clear.any() or off[clear].max() <= 1e-6, key
            assert off.max() <= 2 * hyper["lr"], key
        for key, parameter in model.teacher.named_parameters():
            torch.testing.assert_close(parameter, tensors[f"teacher{step + 1}.{key}"], atol=1e-6, rtol=0, msg=key)


def test_parameter_groups_equal_the_published_ones(shared: Path) -> None:
    numbers = json.loads((shared / "reference/step/plain.json").read_text())
    config = resolve_recipe([("reference", numbers["cfg"])], "reference")
    for key, (lr, weight_decay, is_last) in numbers["param_groups"].items():
        found = multipliers(key, config, depth=2)
        assert (found.weight_decay, found.is_last_layer) == (weight_decay, is_last), key
        assert found.lr == pytest.approx(lr, rel=1e-12), key
