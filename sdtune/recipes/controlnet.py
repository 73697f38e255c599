"""ControlNet: Adding Conditional Control to Text-to-Image Diffusion Models (Zhang et al. 2023, equations 3 and 5).

    y_c = F(x) + Z(F(x + Z(c_f)))        L = E || eps - eps_theta(z_t, t, c_t, c_f) ||^2

The network that sees the image c_f is a copy of the encoder of the base, F, which stays frozen. Z are convolutions that
start at zero, so that the model is the base, bit for bit, before the first step.
"""

from sdtune.config.methods.controlnet import ControlNetConfig
from sdtune.models.controls import read_control
from sdtune.recipes.control import Control


class ControlNet(Control):
    Config = ControlNetConfig

    def make_network(self):
        cfg, family = self.cfg, self.family
        self.encodes = family.control_of_latents
        if cfg.init_controlnet is None:
            return family.new_controlnet(cfg.num_layers, cfg.num_single_layers)
        return read_control(family, family.controlnet_class, cfg.init_controlnet, "--init-controlnet")

    def unread_layers(self, network):
        return self.family.unread_layers(network)

    def residuals(self, x_t, t, text, image):
        return self.family.control(self.network, x_t, t, text, image)

    def pipeline(self):
        return self.family.pipeline(self.family.control_pipelines["controlnet"], controlnet=self.network)
