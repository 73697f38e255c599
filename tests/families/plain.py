"""The training loss of a batch, written out from the formulas of each base's own training script, for one comparison.

Nothing here uses sdtune: stock pipelines encode, and the forward process is spelt out. Each function takes the stock
pipeline with an adapter on its denoiser, and the batch; it returns the loss of each image.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, Flux2KleinPipeline, FluxPipeline
from torch import Tensor
from torch.nn import functional


def squares(pred: Tensor, target: Tensor) -> Tensor:
    return (pred.float() - target.float()).square().flatten(1).mean(1)


def posterior(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found = pipe.vae.encode(batch["pixels"]).latent_dist
        return found.mean + found.std * batch["posterior_noise"]


def scaled(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    return (posterior(pipe, batch) - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def sdxl(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    x0 = posterior(pipe, batch) * pipe.vae.config.scaling_factor
    t = (batch["u"] * 1000).long()
    x_t = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, batch["noise"], t)
    states = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(batch["caption"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        pooled, *_, hidden = encoder(ids.input_ids, output_hidden_states=True, return_dict=False)
        states.append(hidden[-2])
    told = {"time_ids": batch["size"].float(), "text_embeds": pooled}
    return squares(pipe.unet(x_t, t, torch.cat(states, -1), added_cond_kwargs=told).sample, batch["noise"])


def sdxl_refiner(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    x0 = posterior(pipe, batch) * pipe.vae.config.scaling_factor
    t = (batch["u"] * 1000).long()
    x_t = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, batch["noise"], t)
    ids = pipe.tokenizer_2(batch["caption"], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    pooled, *_, hidden = pipe.text_encoder_2(ids.input_ids, output_hidden_states=True, return_dict=False)
    sizes = [[*size[:4], 6.0] for size in batch["size"].tolist()]
    told = {"time_ids": torch.tensor(sizes), "text_embeds": pooled}
    return squares(pipe.unet(x_t, t, hidden[-2], added_cond_kwargs=told).sample, batch["noise"])


def upscaler(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    x0 = posterior(pipe, batch) * 0.08333
    t, schedule = (batch["u"] * 1000).long(), DDPMScheduler.from_config(pipe.scheduler.config)
    small = functional.interpolate(batch["pixels"], scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)
    level = (batch["small_u"] * (pipe.config.max_noise_level + 1)).long()
    noised = pipe.low_res_scheduler.add_noise(small, batch["small_noise"], level)
    x_t = schedule.add_noise(x0, batch["noise"], t)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(list(batch["caption"]), "cpu", 1, False)
    pred = pipe.unet(torch.cat([x_t, noised], 1), t, embeds, class_labels=level).sample
    return squares(pred, schedule.get_velocity(x0, batch["noise"], t))


def sigmas(u: Tensor, shift: float = 1.0) -> Tensor:
    return (shift * u / (1 + (shift - 1) * u)).float()


def flow(x0: Tensor, noise: Tensor, t: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
    at = t.view(-1, 1, 1, 1)
    return squares(predict((1 - at) * x0 + at * noise), noise - x0)


def sd3(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    t = sigmas(torch.special.ndtri(batch["u"]).sigmoid(), shift=3.0)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(batch["caption"], None, None, do_classifier_free_guidance=False)

    def predict(x_t: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=x_t, timestep=t * 1000, encoder_hidden_states=embeds, pooled_projections=pooled
        ).sample

    return flow(scaled(pipe, batch), batch["noise"], t, predict)


def z_image(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    t = sigmas(batch["u"], shift=3.0)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(list(batch["caption"]), do_classifier_free_guidance=False)

    def predict(x_t: Tensor) -> Tensor:
        images = list(x_t.unsqueeze(2).unbind(0))
        return -torch.stack(pipe.transformer(images, (1000 - 1000 * t) / 1000, embeds).sample).squeeze(2)

    return flow(scaled(pipe, batch), batch["noise"], t, predict)


def flux_2_klein(pipe: Any, batch: Mapping[str, Any], guidance: float | None = None) -> Tensor:
    told = None if guidance is None else torch.full((len(batch["u"]),), guidance)
    t, patches = sigmas(batch["u"]), Flux2KleinPipeline._patchify_latents
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = (pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).sqrt()
    with torch.no_grad():
        embeds, text_ids = pipe.encode_prompt(list(batch["caption"]))

    def predict(x_t: Tensor) -> Tensor:
        image_ids = Flux2KleinPipeline._prepare_latent_ids(x_t)
        tokens = pipe.transformer(
            hidden_states=Flux2KleinPipeline._pack_latents(x_t),
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            guidance=told,
        ).sample
        return Flux2KleinPipeline._unpack_latents_with_ids(tokens, image_ids)

    return flow((patches(posterior(pipe, batch)) - mean) / std, patches(batch["noise"]), t, predict)


def flux_2(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    return flux_2_klein(pipe, batch, guidance=3.5)


def packed(pipe: Any, x_t: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``run`` says of the tokens of ``x_t``, unpacked."""
    height, width = x_t.shape[-2:]
    tokens = run(FluxPipeline._pack_latents(x_t, *x_t.shape))
    return tokens.view(len(x_t), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


def image_ids(x_t: Tensor) -> Tensor:
    height, width = x_t.shape[-2:]
    return FluxPipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, "cpu", torch.float32)


def flux(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    t = sigmas(batch["u"])
    with torch.no_grad():
        embeds, pooled, text_ids = pipe.encode_prompt(batch["caption"])

    def predict(x_t: Tensor) -> Tensor:
        return packed(
            pipe,
            x_t,
            lambda tokens: (
                pipe.transformer(
                    hidden_states=tokens,
                    timestep=t,
                    guidance=torch.full((len(t),), 3.5),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=image_ids(x_t),
                ).sample
            ),
        )

    return flow(scaled(pipe, batch), batch["noise"], t, predict)


def chroma(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    t = sigmas(batch["u"])
    with torch.no_grad():
        embeds, text_ids, mask, *_ = pipe.encode_prompt(batch["caption"], do_classifier_free_guidance=False)

    def predict(x_t: Tensor) -> Tensor:
        return packed(
            pipe,
            x_t,
            lambda tokens: (
                pipe.transformer(
                    hidden_states=tokens,
                    timestep=t,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=image_ids(x_t),
                    attention_mask=pipe._prepare_attention_mask(len(t), tokens.shape[1], torch.float32, mask),
                ).sample
            ),
        )

    return flow(scaled(pipe, batch), batch["noise"], t, predict)


def qwen_image(pipe: Any, batch: Mapping[str, Any]) -> Tensor:
    t, config = sigmas(batch["u"]), pipe.vae.config
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(list(batch["caption"]))
        found = pipe.vae.encode(batch["pixels"].unsqueeze(2)).latent_dist
    z = found.mean + found.std * batch["posterior_noise"].unsqueeze(2)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))

    def predict(x_t: Tensor) -> Tensor:
        height, width = x_t.shape[-2:]
        return packed(
            pipe,
            x_t,
            lambda tokens: (
                pipe.transformer(
                    hidden_states=tokens,
                    timestep=t,
                    encoder_hidden_states=embeds,
                    encoder_hidden_states_mask=mask,
                    img_shapes=[[(1, height // 2, width // 2)]] * len(t),
                ).sample
            ),
        )

    return flow(((z - mean) / std).squeeze(2), batch["noise"], t, predict)
