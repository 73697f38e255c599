"""A recipe of your own: `sdtune run examples/my_lora.py --config lora/tiny-hearts --gain 3`."""

from sdtune.recipes.lora import Lora


class MyLora(Lora):
    """LoRA with its loss scaled."""

    class Config(Lora.Config):
        gain: float = 2.0
        """Factor of the loss."""

    def forward(self, batch):
        return self.cfg.gain * super().forward(batch)
