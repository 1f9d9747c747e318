"""The devices on which blocks are run: what was asked for, resolved once."""

from __future__ import annotations

from typing import Literal

import torch

from owl_deploy.errors import RecipeError

__all__ = ["has_bfloat16_instructions", "resolve_devices", "resolve_products"]


def resolve_devices(text: str) -> tuple[torch.device, ...]:
    """Return the devices that `text` names, in order; several share the calibration sequences.

    Args:
        text: auto (all accelerators that torch sees, else the CPU), or names such as cpu, cuda, cuda:1, or
            cuda:0,cuda:1. A name may be there twice.

    Raises:
        RecipeError: a name is no device, or the device is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if text == "auto":
        if accelerator is None:
            return (torch.device("cpu"),)
        return tuple(torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count()))
    devices = []
    for name in text.split(","):
        try:
            device = torch.device(name.strip())
        except RuntimeError as error:
            raise RecipeError(
                f"device must be auto, cpu or accelerators such as cuda:0,cuda:1, got {text!r}"
            ) from error
        known = ["cpu"]
        if accelerator is not None:
            known += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
        if str(device) not in known:
            raise RecipeError(f"device {device} is not on this machine, which has {', '.join(known)}")
        devices.append(device)
    return tuple(devices)


def resolve_products(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the type of matrix products in training: auto is the faster one on that device."""
    if asked != "auto":
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16 if device.type == "xpu" else torch.float32
    features = torch.cpu.get_capabilities()
    # Without AMX an Intel Xeon has the instructions and half of float32's speed (torch 2.13: 150 against 280 Gflop/s,
    # 512 x 576 x 1536, two cores), where an AMD EPYC has twice of it.
    is_fast = features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in str(features.get("cpu_name")))
    return torch.bfloat16 if is_fast else torch.float32


def has_bfloat16_instructions() -> bool:
    """Whether this machine's processor multiplies bfloat16, however fast."""
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
