"""T2I-Adapter: Learning Adapters to Dig out More Controllable Ability (Mou et al. 2023, equations 2 and 3).

    F_enc^i + A(c)^i        L = E || eps - eps_theta(z_t, t, tau(y), A(c)) ||^2        t = (1 - u^3) T

The adapter A sees neither the timestep nor the latent, so its features are computed once for all steps of a sample.
Noisy timesteps, in which the layout is made, are drawn more often (section 3.3, cubic sampling).
"""

from sdtune.config.methods.t2i_adapter import T2IAdapterConfig
from sdtune.models.controls import read_control
from sdtune.recipes.control import Control


class T2IAdapter(Control):
    Config = T2IAdapterConfig

    def make_network(self):
        cfg, family = self.cfg, self.family
        if cfg.init_t2i_adapter is None:
            return family.new_t2i_adapter(cfg.num_res_blocks)
        return read_control(family, "T2IAdapter", cfg.init_t2i_adapter, "--init-t2i-adapter")

    def forward(self, batch):
        return super().forward(batch | {"u": 1 - batch["u"] ** 3})

    def residuals(self, x_t, t, text, image):
        return {"down_intrablock_additional_residuals": list(self.network((image / 2 + 0.5).to(x_t.dtype)))}

    def pipeline(self):
        return self.family.pipeline(self.family.control_pipelines["adapter"], adapter=self.network)
