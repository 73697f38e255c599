"""Module names: with dots as diffusers and transformers publish them, with underscores as kohya writes them."""

import re

# Every word between the dots of names of modules: of a UNet and a CLIP text encoder, of transformers, and sgm's (SDXL's
# original code). kohya turns dots into underscores, so a list of words is needed to find which underscores were dots.
WORDS = """
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers conv transformer_blocks attn1 attn2
    to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out ff net proj proj_in proj_out conv1 conv2
    norm norm1 norm2 norm3 time_emb_proj conv_shortcut conv_in conv_out conv_norm_out time_embedding add_embedding
    linear_1 linear_2 cond_proj encoder_hid_proj time_proj
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm embeddings token_embedding position_embedding text_projection

    2-1 adaLN_modulation all_final_layer all_x_embedder attention attn cap_embedder context_embedder
    context_refiner distilled_guidance_layer double_stream_modulation_img double_stream_modulation_txt
    feed_forward ff_context guidance_embedder img_in img_mlp img_mod in_proj linear linear_in linear_out
    noise_refiner norm1_context norm_out pos_embed proj_mlp single_stream_modulation single_transformer_blocks
    t_embedder text_embedder time_guidance_embed time_text_embed timestep_embedder to_qkv_mlp_proj txt_in
    txt_mlp txt_mod w1 w2 w3 x_embedder

    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op time_embed label_emb out
""".split()
WORD = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))}|\d+)(?:_|$)")

RESNET = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj"}
RESNET |= {"skip_connection": "conv_shortcut"}
SGM_ALONE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
BLOCKS = 3
"""Layers of a down block in sgm's count: two and their downsampler, in Stable Diffusion 1, 2 and XL."""


def dotted(name: str) -> str | None:
    """``mid_block_attentions_0_proj_in`` with its dots, sgm's names as diffusers'; None if a word is not known."""
    words, at = [], 0
    while at < len(name):
        if not (found := WORD.match(name, at)):
            return None
        words.append(found[1])
        at = found.end()
    return from_sgm(words) if words else None


def underscored(name: str) -> str:
    return name.replace(".", "_")


def from_sgm(words: list[str]) -> str | None:
    """``input_blocks 4 1 proj_in`` is ``down_blocks.1.attentions.0.proj_in``; diffusers' names stay as they are."""
    joined = ".".join(words)
    if joined in SGM_ALONE:
        return SGM_ALONE[joined]
    match words:
        case ["input_blocks", i, j, *rest] if i.isdigit() and i != "0":
            block, layer = divmod(int(i) - 1, BLOCKS)
            if rest == ["op"]:
                return f"down_blocks.{block}.downsamplers.0.conv"
            where = f"down_blocks.{block}"
        case ["output_blocks", i, j, *rest] if i.isdigit():
            block, layer = divmod(int(i), BLOCKS)
            if rest == ["conv"]:  # after the attention where there is one, else in its place
                return f"up_blocks.{block}.upsamplers.0.conv"
            where = f"up_blocks.{block}"
        case ["middle_block", ("0" | "1" | "2") as i, *rest]:
            where, j, layer = "mid_block", str(int(i) % 2), int(i) // 2
        case ["input_blocks" | "output_blocks" | "middle_block" | "time_embed" | "label_emb" | "out", *_]:
            return None
        case _:
            return joined
    if j not in ("0", "1") or not rest:
        return None
    inner = ".".join(rest)
    return f"{where}.resnets.{layer}.{RESNET.get(inner, inner)}" if j == "0" else f"{where}.attentions.{layer}.{inner}"


OF_TRANSFORMER = tuple(
    """
    transformer_blocks. single_transformer_blocks. layers. noise_refiner. context_refiner. x_embedder t_embedder
    cap_embedder context_embedder all_x_embedder pos_embed img_in txt_in time_text_embed time_guidance_embed
    single_stream_modulation double_stream_modulation distilled_guidance_layer norm_out proj_out all_final_layer
    """.split()
)
"""How names of the layers of a transformer begin; a UNet's have their transformer blocks inside of others."""


def denoiser_of(name: str) -> str:
    """The part to which a module of a denoiser belongs, by its name: ``unet`` or ``transformer``."""
    return "transformer" if name.startswith(OF_TRANSFORMER) else "unet"


def published_name(part: str, name: str) -> str:
    """The name that a module of ``part`` has in the published checkpoints."""
    return text_encoder_name(name) if part.startswith("text_encoder") else name


def text_encoder_name(name: str) -> str:
    """With the ``text_model.`` that transformers 5.6 dropped from ``CLIPTextModel``."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
