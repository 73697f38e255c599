"""The variables with which a launcher tells a process its place, and what is wrong with stray ones."""

import os

from sdtune.config.errors import UserError

NUMBERS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")
"""Variables with which a launcher tells a process its place."""


def check_environment() -> None:
    """Refuse variables that another launcher, or an earlier one, left behind.

    Raises:
        UserError: with them accelerate would fail, or wait half an hour for processes that never come.
    """
    env = {name: os.environ[name] for name in (*NUMBERS, "MASTER_ADDR") if name in os.environ}
    unset = "unset it, or train under a launcher that sets it"
    for name, value in env.items():
        if not value or (name in NUMBERS and not value.lstrip("-").isdigit()):
            raise UserError(f"{name}={value}: this variable of the environment has no usable value; {unset}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError("ACCELERATE_USE_DEEPSPEED=true: sdtune does not train under DeepSpeed; unset it, or use fsdp2")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "ACCELERATE_USE_FSDP=true: weights are cut into slices by version 2 of FSDP alone; unset it, or set "
            "FSDP_VERSION=2 (in an accelerate config `fsdp_version: 2`)"
        )
    if set_ := [name for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE") if name in env]:
        among = int(env.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in env
        needed = ("RANK", "WORLD_SIZE", *(("MASTER_ADDR", "MASTER_PORT") if among else ()))
        if missing := [name for name in needed if name not in env]:
            are = "is" if len(missing) == 1 else "are"
            raise UserError(f"{set_[0]} is set in the environment, but {' and '.join(missing)} {are} not; {unset}")
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank} is no number of one of WORLD_SIZE={world} processes, from 0 on; {unset}")
