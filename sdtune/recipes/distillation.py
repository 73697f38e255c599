"""What methods share that distil a text-to-image base, which is its own teacher under classifier-free guidance.

The teacher is a frozen copy of the denoiser beside the student, or, where adapters train, the denoiser without them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sdtune.diffusion.guidance import classifier_free
from sdtune.diffusion.objective import per_image
from sdtune.models.pipeline_folder import write_pipeline
from sdtune.recipes.finetune import FineTune, unfreeze
from sdtune.run.sampling_file import SAMPLING


class Distillation(FineTune):
    def add_student(self, student: Any) -> None:
        """Train all weights of ``student`` in the place of the denoiser, which becomes the teacher."""
        name = self.family.denoiser_name
        self.teacher = self.family.denoiser
        self.family.replace(name, unfreeze(student, self.family.unused_layers(name)))
        self.add_part(name)

    @property
    def student(self) -> Any:
        """The network that trains, or whose adapters do."""
        return self.trained[self.family.denoiser_name]

    def dataset(self, group, log):
        for name, tensor in self.family.no_text().items():
            self.register_buffer(f"no_{name}", tensor, persistent=False)
        return super().dataset(group, log)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Context in which the family predicts as the base does: with the teacher, or without adapters."""
        if not self.cfg.lora:
            with self.family.denoising_with(self.teacher):
                yield
            return
        self.student.disable_adapters()
        try:
            yield
        finally:
            self.student.enable_adapters()

    def guided(self, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor], scale: Tensor) -> Tensor:
        """What the base predicts under guidance, asked twice.

        Args:
            text: what the denoiser is told.
            scale: the guidance scale of each image; 1 is none: ``[B]``.
        """
        nothing = {name.removeprefix("no_"): x for name, x in self.named_buffers(recurse=False)}
        nothing = {name: x.expand(len(x_t), *x.shape[1:]) for name, x in nothing.items()}
        with self.base():
            without, with_text = (self.family.predict(x_t, t, {**text, **more}) for more in (nothing, {}))
        return classifier_free(without, with_text, per_image(scale, x_t))

    def save(self, out, sampling, scheduler=None):
        """Write the artefact, a pipeline or adapters, with how it is sampled; returns the paths.

        Args:
            scheduler: of the pipeline, if not the base's own.
        """
        if self.cfg.lora:
            return [self.save_adapters(out), sampling.write(out)]
        instead = {"scheduler": scheduler} if scheduler else {}
        return write_pipeline(out, self.family.fp32_pipeline(**instead), {SAMPLING: sampling.to_bytes()})
