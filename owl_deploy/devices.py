"""The devices on which blocks are run: what was asked for, resolved once."""

from __future__ import annotations

import torch

from owl_deploy.errors import RecipeError

__all__ = ["resolve_devices"]


def resolve_devices(text: str) -> tuple[torch.device, ...]:
    """Return the devices that `text` names, in order; several share the calibration sequences.

    Args:
        text: auto (all accelerators that torch sees, else the CPU), or names such as cpu, cuda, cuda:1, or
            cuda:0,cuda:1.

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
