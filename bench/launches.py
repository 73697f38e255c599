"""Counts the kernels that a training step launches, by kind, without a GPU.

    python bench/launches.py --shape sd15 --bf16
    python bench/launches.py --shape sdxl --bf16 -- --gradient-checkpointing true

A step runs on tensors without values (fake tensors), and a dispatch mode notes each operation that is no view. One
operation counts as one launch, which is a lower bound: a norm or a convolution may be several kernels of a GPU. Casts
that CUDA's autocast would make are made by its published lists. Nothing is downloaded: of the shapes, all but `tiny`
are configurations (bench/family_shapes.json).
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import shapes
import torch
from harness import parser, table, write
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sdtune.cli import imported
from sdtune.config import parsing
from sdtune.config.methods.lora import LoraConfig
from sdtune.models import families
from sdtune.training import optim
from sdtune.training.engine import Engine, nan_unless_finite
from sdtune.training.log_window import Window
from sdtune.training.memory_estimate import Alone, as_frozen, heaviest_batch, make_empty, meta_recipe
from sdtune.training.prepare import prepare_modules

FREE = {"detach", "alias", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided"}
FREE |= {"lift_fresh", "sym_size", "set_", "resize_", "_local_scalar_dense", "device"}
FREE |= {"_record_function_enter_new", "_record_function_exit"}
KINDS = {
    "cast": ["_to_copy of another dtype"],
    "copy": ["_to_copy", "clone", "copy_", "cat", "stack", "constant_pad_nd"],
    "product": ["mm", "addmm", "bmm", "baddbmm", "addmv", "mv"],
    "convolution": ["convolution", "convolution_backward"],
    "attention": [],
    "norm": ["native_layer_norm", "native_group_norm", "native_layer_norm_backward", "native_group_norm_backward"],
}
HALF = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
HALF |= {"scaled_dot_product_attention", "conv_transpose2d"}
FLOAT = {"layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss", "pow", "__pow__", "exp", "norm", "sum"}
FLOAT |= {"cumsum", "prod", "softplus", "cosine_similarity", "rsqrt", "log"}


class CudaAutocast(TorchFunctionMode):
    """Casts arguments as autocast does on CUDA; a weight that trains is cast once a forward pass."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.cast: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        wanted = self.dtype if name in HALF else torch.float32 if name in FLOAT else None
        if wanted is not None:
            args, kwargs = tree_map(lambda x: self.as_wanted(x, wanted), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def as_wanted(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (dtype, torch.float64):
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if id(x) not in self.cast:
            self.cast[id(x)] = x.to(dtype)
        return self.cast[id(x)]


class Launches(TorchDispatchMode):
    """Counts operations by phase and kind; ``phase`` says which it is."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.found: Counter[tuple[str, str]] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in FREE):
            self.found[self.phase, kind_of(name, args, out)] += 1
            self.names[name] += 1
        return out


def kind_of(name: str, args: Any, out: Any) -> str:
    if name == "_to_copy":
        return "cast" if args[0].dtype != out.dtype else "copy"
    if "attention" in name:
        return "attention"
    if name.startswith(("_foreach", "_fused")):
        return "many tensors at once"
    return next((kind for kind, names in KINDS.items() if name in names), "elementwise and other")


class Counted(Engine):
    """The engine of a run, with CUDA's autocast in place of the CPU's."""

    def autocast(self) -> Any:
        on = self.dtype != torch.float32 and not self.halves
        return CudaAutocast(self.dtype) if on else nullcontext()


@contextmanager
def config(shape: str, resolution: int, bf16: bool, more: list[str]) -> Iterator[Any]:
    """The config of a LoRA run of one image, on a base that has configurations alone."""
    with tempfile.TemporaryDirectory() as place:
        model, pictures = shapes.configurations(shape, Path(place) / "base"), Path(place) / "pictures"
        pictures.mkdir()
        Image.new("RGB", (resolution, resolution)).save(pictures / "a.png")
        values = {"model": model, "dataset": str(pictures), "caption": "a", "resolution": str(resolution)}
        values |= {"train_batch_size": "1", "output_dir": f"{place}/run", "steps": "4"}
        values |= {"mixed_precision": "bf16"} if bf16 else {}
        names = [word[2:].replace("-", "_") for word in more[::2]]
        yield parsing.resolve(LoraConfig, None, values | dict(zip(names, more[1::2], strict=True)), [])


def count(cfg: Any) -> Launches:
    """The launches of the second step of a run."""
    recipe, dataset = meta_recipe(imported(cfg.entry), cfg, cfg.train_batch_size, lambda line: None)
    batch = heaviest_batch(cfg, dataset)
    device = torch.device("cpu")
    prepare_modules(recipe.train(), cfg, device)
    trained = [p for p in recipe.parameters() if p.requires_grad]
    with torch.no_grad(), as_frozen(recipe, trained):
        text = {f"text.{name}": x for name, x in recipe.family.conditioning(batch).items() if name != "size"}
    moments = torch.empty(1, 2 * recipe.family.latent_channels, *batch["noise"].shape[-2:])
    batch = {name: x for name, x in batch.items() if name != "pixels"} | text | {"moments": moments}
    seen = Launches()
    clip_grad._has_foreach_support = lambda tensors, device: True  # as on a GPU, where all norms are one operation
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_empty(recipe, device)
        batch = {n: torch.empty_like(x, device=device) if isinstance(x, Tensor) else x for n, x in batch.items()}
        engine = Counted(recipe, cfg, Alone(device))
        optimizer = optim.make_optimizer(cfg, recipe.parameter_groups())
        window = Window(cast(Any, engine), 0, 0)
        for _ in range(2):  # the second finds the state of the optimizer
            seen.found.clear()
            seen.names.clear()
            with seen:
                seen.phase = "forward"
                loss, figures = engine(batch)
                seen.phase = "backward"
                engine.backward(nan_unless_finite(loss.mean()))
                seen.phase = "step and loop"
                window.add(loss, figures, [])
                window.end_step(engine.step(optimizer, cfg.max_grad_norm))
                recipe.after_step()
    return seen


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=shapes.PIXELS, default="sd15")
    made.add_argument("--resolution", type=int, help="pixels a side; leave out for the base's own")
    made.add_argument("--bf16", action="store_true")
    made.add_argument("--names", action="store_true", help="list the operations as well")
    made.add_argument("more", nargs="*", help="after --: pairs of further options of `sdtune lora` and their values")
    given = made.parse_args()
    families.silence_libraries()
    with config(given.shape, given.resolution or shapes.PIXELS[given.shape], given.bf16, given.more) as cfg:
        seen = count(cfg)
    phases = ["forward", "backward", "step and loop"]
    kinds = sorted({kind for _, kind in seen.found})
    rows = [[kind, *(seen.found[p, kind] for p in phases), sum(seen.found[p, kind] for p in phases)] for kind in kinds]
    totals = [sum(row[k] for row in rows) for k in range(1, 5)]
    print(table(["launches of a step", *phases, "in all"], [*rows, ["in all", *totals]]))
    if given.names:
        print(table(["operation", "launches"], seen.names.most_common()))
    found = {f"{phase}: {kind}": number for (phase, kind), number in seen.found.items()}
    write({"what": "launches of a step", "found": found, "in all": totals[-1]}, given.json)


if __name__ == "__main__":
    main()
