"""Options of prior preservation (Ruiz et al. 2022): images of its class train beside those of a subject."""

from pathlib import Path
from typing import Annotated

from sdtune.config.section_base import Count, NonNegative, StrList, aliases, requires
from sdtune.config.sections import BaseOptions, Data, Model, Run


class Prior(BaseOptions, Model, Data, Run):
    """The images of the class."""

    prior_preservation: Annotated[bool, aliases("with_prior_preservation")] = False
    """Train on images of the subject's class too, as many as of the subject, so that the class does not drift."""
    class_prompt: Annotated[StrList, requires("prior_preservation")] = []
    """What the class images show, such as a photo of a dog. Several prompts take turns."""
    class_data: Annotated[Path | None, aliases("class_data_dir"), requires("prior_preservation")] = None
    """Folder of class images. Default: class-pictures in the run's folder, which the base fills."""
    num_class_images: Annotated[Count, requires("prior_preservation")] = 100
    """Number of class images to train on. The base model makes those that are not in the folder."""
    prior_loss_weight: Annotated[NonNegative, requires("prior_preservation")] = 1.0
    """Weight of the loss of the class images (the paper's lambda)."""
    sample_batch_size: Annotated[Count, requires("prior_preservation")] = 4
    """Class images to make at a time, on each process."""
    class_inference_steps: Annotated[Count, requires("prior_preservation")] = 25
    """Denoising steps of a class image."""
    class_guidance_scale: Annotated[NonNegative, requires("prior_preservation")] = 5.0
    """Classifier-free guidance of the class images."""

    def check_class(self) -> None:
        """Raises: ValueError when it is not said what the class is, or its images have no place in a batch."""
        if self.prior_preservation and not (self.class_prompt or self.class_data):
            raise ValueError(
                "prior_preservation needs class_prompt, from which the base makes class pictures, or class_data"
            )
        if self.prior_preservation and self.buckets:
            raise ValueError("prior_preservation with buckets: class pictures are square, and a batch has one shape")
