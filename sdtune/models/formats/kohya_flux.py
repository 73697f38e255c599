"""kohya's layout of FLUX.1's transformer (and Chroma's): the names of its original code, some modules side by side.

There q, k and v of a block are one matrix, and in single blocks the first layer of the MLP with them. The changes of
diffusers' separate modules go into one whose ``up`` has a block for each; sd-scripts calls that split_qkv. Read back,
such a file gives the modules that it was made of, and one that was trained on the whole matrix gives modules with the
same ``down``.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdtune.config.sections import UserError
from sdtune.models.formats.neutral import Module

MLP = "proj_mlp"
DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", MLP),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}
"""kohya's name of a kind of block to diffusers' and the modules in it, one or several of diffusers' for one."""
WIDER = 4
"""Rows of the MLP's first layer for each of q."""
KOHYA = re.compile(rf"({'|'.join(BLOCKS)})_(\d+)_({'|'.join((*DOUBLE, *SINGLE))})")
OURS = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)")


def dotted(name: str) -> str | None:
    """``double_blocks_0_img_mlp_0`` as ``double_blocks.0.img_mlp_0``; ``None`` for what is none of FLUX.1's."""
    found = KOHYA.fullmatch(name)
    return ".".join(found.groups()) if found and found[3] in BLOCKS[found[1]][1] else None


def is_kohya(name: str) -> bool:
    """Whether a module has kohya's name, as ``dotted`` gives it."""
    return name.partition(".")[0] in BLOCKS


def joined(modules: Mapping[str, Module]) -> dict[str, Module] | None:
    """The modules of a transformer under kohya's names; ``None`` where they are not FLUX.1's.

    Single blocks tell FLUX.1 from Stable Diffusion 3, whose blocks have the same names in diffusers.

    Raises:
        UserError: a module that cannot be put beside others.
    """
    place = {
        (ours, inner): (theirs, short, k)
        for theirs, (ours, table) in BLOCKS.items()
        for short, inners in table.items()
        for k, inner in enumerate(inners)
    }
    groups: dict[str, dict[int, Module]] = {}
    for name, module in modules.items():
        found = OURS.fullmatch(name)
        where = place.get((found[1], found[3])) if found else None
        if found is None or where is None:
            return None
        groups.setdefault(f"{where[0]}.{found[2]}.{where[1]}", {})[where[2]] = module
    if not any(name.startswith("single_blocks.") for name in groups):
        return None
    return {name: side_by_side(own, inners_of(name)) for name, own in groups.items()}


def inners_of(name: str) -> Sequence[str]:
    """diffusers' modules that are in kohya's module ``single_blocks.0.linear1``."""
    block, _, short = name.split(".")
    return BLOCKS[block][1][short]


def side_by_side(own: Mapping[int, Module], inners: Sequence[str]) -> Module:
    """One module of those at their places among ``inners``; a place without one stays as it is."""
    if len(inners) == 1:
        return own[0]
    if any(m.kind != "lora" or m.magnitude is not None for m in own.values()):
        raise UserError(
            "--to kohya: q, k and v of FLUX.1 are one module there, which only plain LoRA can be joined into; "
            "diffusers and comfyui hold them apart"
        )
    first, some = next(iter(own.items()))
    width = len(some.tensors["up"]) // (WIDER if inners[first] == MLP else 1)
    rank = max(m.rank for m in own.values())
    downs, ups = [], []
    for k, inner in enumerate(inners):
        rows = width * (WIDER if inner == MLP else 1)
        if module := own.get(k):
            down, up = module.tensors["down"], module.tensors["up"]
            ups.append(pad((up.double() * module.scale).to(up.dtype), (0, rank - module.rank)))
            downs.append(pad(down, (0, 0, 0, rank - module.rank)))
        else:
            downs.append(some.tensors["down"].new_zeros(rank, some.tensors["down"].shape[1]))
            ups.append(some.tensors["up"].new_zeros(rows, rank))
    total = rank * len(inners)
    return Module("lora", {"down": torch.cat(downs), "up": torch.block_diag(*ups)}, float(total), total)


def apart(modules: Mapping[str, Module]) -> dict[str, Module]:
    """diffusers' modules of those under kohya's names.

    Raises:
        ValueError: a module whose rows are not those of FLUX.1.
    """
    found: dict[str, Module] = {}
    for name, module in modules.items():
        block, number, _ = name.split(".")
        inners = inners_of(name)
        pieces = [module] if len(inners) == 1 else pieces_of(module, inners)
        found |= {
            f"{BLOCKS[block][0]}.{number}.{inner}": piece
            for inner, piece in zip(inners, pieces, strict=True)
            if len(inners) == 1 or any(tensor.any() for tensor in piece.tensors.values())
        }
    return found


def pieces_of(module: Module, inners: Sequence[str]) -> list[Module]:
    """The rows of a module that belong to each of ``inners``, with its own ``down`` where that can be told."""
    if module.kind != "lora" or module.magnitude is not None:
        raise ValueError("q, k and v as one module of another kind than LoRA cannot be taken apart")
    down, up = module.tensors["down"], module.tensors["up"]
    shares = [WIDER if inner == MLP else 1 for inner in inners]
    if len(up) % sum(shares):
        raise ValueError(f"{len(up)} rows cannot be divided into {', '.join(inners)}")
    rows = up.split([share * len(up) // sum(shares) for share in shares])
    own = module.rank // len(inners)
    columns = [slice(k * own, (k + 1) * own) for k in range(len(inners))]
    if module.rank % len(inners) or not all(blank_beside(row, at) for row, at in zip(rows, columns, strict=True)):
        return [Module("lora", {"down": down, "up": row}, module.alpha, module.rank) for row in rows]
    alpha = module.scale * own
    return [
        Module("lora", {"down": down[at], "up": row[:, at].contiguous()}, alpha, own)
        for row, at in zip(rows, columns, strict=True)
    ]


def blank_beside(row: Tensor, at: slice) -> bool:
    """Whether ``row`` is zero in all columns but ``at``."""
    return not row[:, : at.start].any() and not row[:, at.stop :].any()
