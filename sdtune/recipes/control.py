"""What ControlNet and T2I-Adapter share: a network beside the frozen base, which follows an image."""

from typing import Any

from torch import nn

from sdtune.config.fields import flag
from sdtune.data.further import Further, FurtherImage
from sdtune.diffusion.objective import denoising_loss
from sdtune.models.pipeline_folder import write_module
from sdtune.recipes.finetune import FineTune, unfreeze


class Control(FineTune):
    """A subclass makes the network, and says what it adds to the denoiser.

    The denoiser is a submodule and frozen: the gradient flows through it to the network.
    """

    encodes = False
    """Whether the network follows the latents of an image, whose moments can be cached."""

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.add_part(self.family.denoiser_name, trains=False)
        network = self.make_network()
        self.network = self.trained["network"] = unfreeze(network, self.unread_layers(network))

    def make_network(self) -> nn.Module:
        raise NotImplementedError

    def unread_layers(self, network: nn.Module) -> str | None:
        """Regular expression on the beginning of names of layers of the network whose output is never read."""
        return None

    def residuals(self, x_t, t, text, image) -> dict[str, Any]:
        """Further arguments of ``family.predict``.

        Args:
            image: ``[B, 3, H, W]`` in [-1, 1]; where ``encodes``, its moments ``[B, 2C, h, w]`` if they are cached.
        """
        raise NotImplementedError

    @property
    def further(self):
        cfg, column = self.cfg, "conditioning_image_column"
        made = FurtherImage(condition=cfg.condition)
        read = FurtherImage(cfg.conditioning_image_column, flag(column), encoded=self.encodes)
        return Further({"condition": made if cfg.condition else read})

    def forward(self, batch):
        family, text = self.family, self.family.conditioning(batch)

        def predict(x_t, t):
            return family.predict(x_t, t, text, **self.residuals(x_t, t, text, batch["condition"]))

        return denoising_loss(family.objective, predict, family.latents(batch), batch)

    def export(self, out):
        return write_module(out, self.network)
