"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, equation 3), on a text-to-image denoiser.

    h = W x + (alpha / r) B A x        A ~ N(0, 1/r^2), B = 0, W frozen

The loss is the base model's own: only the weights that train are others. The adapters sit inside the base's modules,
so the base is a submodule of the recipe, and frozen. LoHa and LoKr make up the change in other ways
(`models.adapter_kinds`).
"""

from sdtune.config.methods.lora import LoraConfig
from sdtune.recipes.finetune import FineTune


class Lora(FineTune):
    Config = LoraConfig

    def __init__(self, cfg, device):
        super().__init__(cfg, device)
        self.train_adapters()

    def export(self, out):
        return [self.save_adapters(out)]
