"""What training will need of this machine, looked at when a run opens: before hours of reading, not after.

Light: neither PyTorch nor transformers is imported, and nothing is looked at that could not be known for certain.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from pipelines.errors import Refusal, TryLater
from pipelines.params import HuggingFaceParams, ModelTrainingParams
from pipelines.settings import get_settings

_HUB_TIMEOUT_S = 5.0
_ABSENT = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}  # the hub hides what it keeps private
# What the drivers of NVIDIA, of NVIDIA under WSL, and of AMD put there.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def check_training_preconditions(params: ModelTrainingParams) -> None:
    """Refuse a run whose training could not begin on this machine.

    In Kubernetes nothing is checked: there, the pod that trains has other hardware than the one that opens the run.

    Raises:
        Refusal: a GPU or cores are asked for that are not here, or the Hugging Face checkpoint is nowhere.
        TryLater: whether the hub has the checkpoint cannot be asked now.
    """
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return
    if params.accelerator == "gpu":
        refuse_missing_gpu()
    if params.accelerator == "cpu":
        refuse_missing_cores(params.devices)
    if params.network == "huggingface":
        check_checkpoint(params.huggingface)


def refuse_missing_gpu(devices: tuple[Path, ...] = _GPU_DEVICES) -> None:
    """Refuse where no driver of a GPU has left its device; outside Linux nobody can tell so cheaply.

    Raises:
        Refusal: there is no such device.
    """
    if sys.platform.startswith("linux") and not any(device.exists() for device in devices):
        raise Refusal(
            "model_training.accelerator gpu",
            "this machine has no GPU, or no driver for it",
            limit=f"one of {', '.join(map(str, devices))}",
            way_out="use accelerator auto, which takes a GPU if there is any, or train where there is one",
        )


def refuse_missing_cores(processes: int) -> None:
    """Refuse more processes that train together than this one may use cores: they would only wait for each other.

    Raises:
        Refusal: there are fewer cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > cores:
        raise Refusal(
            f"model_training.devices {processes}",
            "more processes than there are cores",
            limit=f"{cores} on this machine without a GPU",
            way_out="lower model_training.devices, or train where there are as many cores or GPUs",
        )


def find_checkpoint_folder(checkpoint: str) -> Path | None:
    """The local folder that a checkpoint names, relative to the project's; None for a name on the hub."""
    folder = get_settings().project_dir / Path(checkpoint).expanduser()
    return folder if folder.is_dir() else None


def check_checkpoint(params: HuggingFaceParams) -> None:
    """Look for a checkpoint's `config.json`: in its folder, in the hub's cache on this machine, on the hub.

    Raises:
        Refusal: it is in none of them.
        TryLater: the hub does not answer.
    """
    name = params.checkpoint
    folder = find_checkpoint_folder(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise _refusal(name, f"the folder {folder} holds no config.json")
        return
    if not params.pretrained and "/" not in name:
        return  # the name of an architecture, which only transformers knows
    if not params.pretrained and name.startswith("google/efficientnet-b"):
        return  # built from dimensions that are known here
    from huggingface_hub import constants, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        address = hf_hub_url(name, "config.json")
    except HFValidationError:
        raise _refusal(name, "is neither a local folder nor a name on the hub") from None
    if constants.HF_HUB_OFFLINE:
        raise _refusal(name, "is neither a local folder nor in the hub's cache, and HF_HUB_OFFLINE is set")
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(address, headers=headers, method="HEAD")  # noqa: S310 - https always
    try:
        urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code in _ABSENT:
            raise _refusal(name, f"is no local folder, and the hub answers {error.code} {error.reason}") from error
        raise TryLater(f"the hub answers {error.code} {error.reason} for {name}") from error
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise TryLater(
            f"model_training.huggingface.checkpoint {name}: is neither a local folder nor in the hub's cache on this "
            f"machine, and the hub cannot be reached: {reason}\n"
            "  what to do: mend the network, or give a local folder made by save_pretrained"
        ) from error


def _refusal(checkpoint: str, found: str) -> Refusal:
    return Refusal(
        f"model_training.huggingface.checkpoint {checkpoint}",
        found,
        limit="a folder made by save_pretrained, or an image classifier on the Hugging Face hub",
        way_out="correct the name (a relative folder starts at that of params.yaml), or set pretrained: false with the "
        "name of an architecture such as efficientnet",
    )
