"""The flags of diffusers' training scripts (examples/, August 2026), which the commands honour or answer."""

IN_EACH = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay center_crop checkpointing_steps checkpoints_total_limit
dataloader_num_workers gradient_accumulation_steps hub_model_id hub_token learning_rate local_rank logging_dir
lr_scheduler lr_warmup_steps mixed_precision output_dir push_to_hub resolution resume_from_checkpoint
train_batch_size
""".split()
"""Flags of each of the scripts, but that those of networks that follow an image have no center_crop and local_rank."""

FLAGS = {
    "text_to_image/train_text_to_image.py": (
        "text-to-image",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name dream_detail_preservation
        dream_training enable_xformers_memory_efficient_attention foreach_ema gradient_checkpointing image_column
        image_interpolation_mode input_perturbation max_grad_norm max_train_samples max_train_steps noise_offset
        non_ema_revision num_train_epochs offload_ema prediction_type pretrained_model_name_or_path random_flip
        report_to revision scale_lr seed snr_gamma tracker_project_name train_data_dir use_8bit_adam use_ema
        validation_epochs validation_prompts variant
        """,
    ),
    "text_to_image/train_text_to_image_lora.py": (
        "lora",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name
        enable_xformers_memory_efficient_attention gradient_checkpointing image_column image_interpolation_mode
        max_grad_norm max_train_samples max_train_steps noise_offset num_train_epochs num_validation_images
        prediction_type pretrained_model_name_or_path random_flip rank report_to revision scale_lr seed snr_gamma
        train_data_dir use_8bit_adam validation_epochs validation_prompt variant
        """,
    ),
    "text_to_image/train_text_to_image_sdxl.py": (
        "text-to-image",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name enable_npu_flash_attention
        enable_xformers_memory_efficient_attention gradient_checkpointing image_column image_interpolation_mode
        max_grad_norm max_train_samples max_train_steps noise_offset num_train_epochs num_validation_images
        prediction_type pretrained_model_name_or_path pretrained_vae_model_name_or_path proportion_empty_prompts
        random_flip report_to revision scale_lr seed snr_gamma timestep_bias_begin timestep_bias_end
        timestep_bias_multiplier timestep_bias_portion timestep_bias_strategy train_data_dir use_8bit_adam use_ema
        validation_epochs validation_prompt variant
        """,
    ),
    "text_to_image/train_text_to_image_lora_sdxl.py": (
        "lora",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name debug_loss enable_npu_flash_attention
        enable_xformers_memory_efficient_attention gradient_checkpointing image_column image_interpolation_mode
        max_grad_norm max_train_samples max_train_steps noise_offset num_train_epochs num_validation_images
        prediction_type pretrained_model_name_or_path pretrained_vae_model_name_or_path random_flip rank report_to
        revision scale_lr seed snr_gamma train_data_dir train_text_encoder use_8bit_adam validation_epochs
        validation_prompt variant
        """,
    ),
    "dreambooth/train_dreambooth.py": (
        "dreambooth",
        """
        allow_tf32 class_data_dir class_labels_conditioning class_prompt enable_xformers_memory_efficient_attention
        gradient_checkpointing instance_data_dir instance_prompt lr_num_cycles lr_power max_grad_norm
        max_train_steps num_class_images num_train_epochs num_validation_images offset_noise
        pre_compute_text_embeddings pretrained_model_name_or_path prior_generation_precision prior_loss_weight
        report_to revision sample_batch_size scale_lr seed set_grads_to_none skip_save_text_encoder snr_gamma
        text_encoder_use_attention_mask tokenizer_max_length tokenizer_name train_text_encoder use_8bit_adam
        validation_images validation_prompt validation_scheduler validation_steps variant with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora.py": (
        "dreambooth",
        """
        allow_tf32 class_data_dir class_labels_conditioning class_prompt enable_xformers_memory_efficient_attention
        gradient_checkpointing image_interpolation_mode instance_data_dir instance_prompt lora_dropout lr_num_cycles
        lr_power max_grad_norm max_train_steps num_class_images num_train_epochs num_validation_images
        pre_compute_text_embeddings pretrained_model_name_or_path prior_generation_precision prior_loss_weight rank
        report_to revision sample_batch_size scale_lr seed text_encoder_use_attention_mask tokenizer_max_length
        tokenizer_name train_text_encoder use_8bit_adam validation_epochs validation_images validation_prompt
        variant with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_sdxl.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir caption_column class_data_dir class_prompt
        dataset_config_name dataset_name do_edm_style_training enable_xformers_memory_efficient_attention
        gradient_checkpointing image_column image_interpolation_mode instance_data_dir instance_prompt lora_dropout
        lr_num_cycles lr_power max_grad_norm max_train_steps num_class_images num_train_epochs num_validation_images
        optimizer output_kohya_format pretrained_model_name_or_path pretrained_vae_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction random_flip rank repeats report_to revision sample_batch_size scale_lr seed
        snr_gamma text_encoder_lr train_text_encoder use_8bit_adam use_dora validation_epochs validation_prompt
        variant with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_sd3.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir caption_column class_data_dir class_prompt
        dataset_config_name dataset_name gradient_checkpointing image_column instance_data_dir instance_prompt
        logit_mean logit_std lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale
        num_class_images num_train_epochs num_validation_images optimizer precondition_outputs
        pretrained_model_name_or_path prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple
        prodigy_safeguard_warmup prodigy_use_bias_correction random_flip repeats report_to revision
        sample_batch_size scale_lr seed text_encoder_lr train_text_encoder use_8bit_adam validation_epochs
        validation_prompt variant weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_sd3.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column class_data_dir class_prompt
        dataset_config_name dataset_name gradient_checkpointing image_column instance_data_dir instance_prompt
        logit_mean logit_std lora_blocks lora_dropout lora_layers lr_num_cycles lr_power max_grad_norm
        max_sequence_length max_train_steps mode_scale num_class_images num_train_epochs num_validation_images
        optimizer precondition_outputs pretrained_model_name_or_path prior_generation_precision prior_loss_weight
        prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank repeats
        report_to revision sample_batch_size scale_lr seed text_encoder_lr train_text_encoder upcast_before_saving
        use_8bit_adam validation_epochs validation_prompt variant weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_flux.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir caption_column class_data_dir class_prompt
        dataset_config_name dataset_name enable_npu_flash_attention gradient_checkpointing guidance_scale
        image_column image_interpolation_mode instance_data_dir instance_prompt logit_mean logit_std lr_num_cycles
        lr_power max_grad_norm max_sequence_length max_train_steps mode_scale num_class_images num_train_epochs
        num_validation_images optimizer pretrained_model_name_or_path prior_generation_precision prior_loss_weight
        prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction random_flip repeats
        report_to revision sample_batch_size scale_lr seed text_encoder_lr train_text_encoder use_8bit_adam
        validation_epochs validation_prompt variant weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_flux.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column class_data_dir class_prompt
        dataset_config_name dataset_name enable_npu_flash_attention gradient_checkpointing guidance_scale
        image_column instance_data_dir instance_prompt logit_mean logit_std lora_alpha lora_dropout lora_layers
        lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale num_class_images
        num_train_epochs num_validation_images optimizer pretrained_model_name_or_path prior_generation_precision
        prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction
        random_flip rank repeats report_to revision sample_batch_size scale_lr seed text_encoder_lr
        train_text_encoder upcast_before_saving use_8bit_adam validation_epochs validation_prompt variant
        weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_flux2.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 aspect_ratio_buckets bnb_quantization_config_path cache_dir
        cache_latents caption_column class_data_dir class_prompt dataset_config_name dataset_name do_fp8_training
        enable_npu_flash_attention final_validation_prompt fsdp_text_encoder gradient_checkpointing guidance_scale
        image_column instance_data_dir instance_prompt logit_mean logit_std lora_alpha lora_dropout lora_layers
        lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale num_class_images
        num_train_epochs num_validation_images offload optimizer pretrained_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction random_flip rank remote_text_encoder repeats report_to revision
        sample_batch_size scale_lr seed skip_final_inference text_encoder_lr text_encoder_out_layers
        upcast_before_saving use_8bit_adam use_aspect_ratio_buckets validation_epochs validation_prompt variant
        weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_flux2_klein.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 aspect_ratio_buckets bnb_quantization_config_path cache_dir
        cache_latents caption_column caption_dropout class_data_dir class_prompt dataset_config_name dataset_name
        do_fp8_training enable_npu_flash_attention final_validation_prompt fsdp_text_encoder gradient_checkpointing
        guidance_scale image_column instance_data_dir instance_prompt logit_mean logit_std lora_alpha lora_dropout
        lora_layers lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale
        num_class_images num_train_epochs num_validation_images offload optimizer pretrained_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction random_flip rank repeats report_to revision sample_batch_size scale_lr seed
        skip_final_inference text_encoder_lr text_encoder_out_layers upcast_before_saving use_8bit_adam
        use_aspect_ratio_buckets validation_epochs validation_prompt variant weighting_scheme
        with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_qwen_image.py": (
        "dreambooth",
        """
        allow_tf32 aspect_ratio_buckets bnb_quantization_config_path cache_dir cache_latents caption_column
        caption_dropout class_data_dir class_prompt dataset_config_name dataset_name final_validation_prompt
        gradient_checkpointing image_column instance_data_dir instance_prompt logit_mean logit_std lora_alpha
        lora_dropout lora_layers lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale
        num_class_images num_train_epochs num_validation_images offload optimizer pretrained_model_name_or_path
        pretrained_text_encoder_4_name_or_path pretrained_tokenizer_4_name_or_path prior_loss_weight prodigy_beta3
        prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank repeats report_to
        revision sample_batch_size scale_lr seed skip_final_inference upcast_before_saving use_8bit_adam
        use_aspect_ratio_buckets validation_epochs validation_prompt variant weighting_scheme
        with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_z_image.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 aspect_ratio_buckets bnb_quantization_config_path cache_dir
        cache_latents caption_column class_data_dir class_prompt dataset_config_name dataset_name do_fp8_training
        enable_npu_flash_attention final_validation_prompt fsdp_text_encoder gradient_checkpointing guidance_scale
        image_column instance_data_dir instance_prompt logit_mean logit_std lora_alpha lora_dropout lora_layers
        lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps mode_scale num_class_images
        num_train_epochs num_validation_images offload optimizer pretrained_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction random_flip rank repeats report_to revision sample_batch_size scale_lr seed
        skip_final_inference text_encoder_lr upcast_before_saving use_8bit_adam use_aspect_ratio_buckets
        validation_epochs validation_prompt variant weighting_scheme with_prior_preservation
        """,
    ),
    "dreambooth/train_dreambooth_lora_flux_kontext.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 aspect_ratio_buckets cache_dir cache_latents caption_column
        class_data_dir class_prompt cond_image_column dataset_config_name dataset_name enable_npu_flash_attention
        gradient_checkpointing guidance_scale image_column instance_data_dir instance_prompt logit_mean logit_std
        lora_alpha lora_dropout lora_layers lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps
        mode_scale num_class_images num_train_epochs num_validation_images optimizer pretrained_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction random_flip rank repeats report_to revision sample_batch_size scale_lr seed
        text_encoder_lr train_text_encoder upcast_before_saving use_8bit_adam use_aspect_ratio_buckets
        vae_encode_mode validation_epochs validation_image validation_prompt variant weighting_scheme
        with_prior_preservation
        """,
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column class_data_dir class_prompt
        dataset_config_name dataset_name enable_xformers_memory_efficient_attention gradient_checkpointing
        image_column image_interpolation_mode instance_data_dir instance_prompt lora_dropout lr_num_cycles lr_power
        max_grad_norm max_train_steps noise_offset num_class_images num_new_tokens_per_abstraction num_train_epochs
        num_validation_images optimizer pretrained_model_name_or_path pretrained_vae_model_name_or_path
        prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
        prodigy_use_bias_correction rank repeats report_to revision sample_batch_size scale_lr seed snr_gamma
        text_encoder_lr token_abstraction train_text_encoder train_text_encoder_frac train_text_encoder_ti
        train_text_encoder_ti_frac use_8bit_adam use_dora validation_epochs validation_prompt variant
        with_prior_preservation
        """,
    ),
    "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column class_data_dir class_prompt
        clip_skip dataset_config_name dataset_name do_edm_style_training enable_xformers_memory_efficient_attention
        gradient_checkpointing image_column image_interpolation_mode instance_data_dir instance_prompt lora_dropout
        lora_unet_blocks lr_num_cycles lr_power max_grad_norm max_train_steps noise_offset num_class_images
        num_new_tokens_per_abstraction num_train_epochs num_validation_images optimizer
        pretrained_model_name_or_path pretrained_vae_model_name_or_path prior_generation_precision prior_loss_weight
        prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank repeats
        report_to revision sample_batch_size scale_lr seed snr_gamma text_encoder_lr token_abstraction
        train_text_encoder train_text_encoder_frac train_text_encoder_ti train_text_encoder_ti_frac use_8bit_adam
        use_blora use_dora validation_epochs validation_prompt variant with_prior_preservation
        """,
    ),
    "advanced_diffusion_training/train_dreambooth_lora_flux_advanced.py": (
        "dreambooth",
        """
        adam_weight_decay_text_encoder allow_tf32 cache_dir cache_latents caption_column class_data_dir class_prompt
        dataset_config_name dataset_name enable_t5_ti gradient_checkpointing guidance_scale image_column
        image_interpolation_mode initializer_concept instance_data_dir instance_prompt logit_mean logit_std
        lora_alpha lora_dropout lora_layers lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_steps
        mode_scale num_class_images num_new_tokens_per_abstraction num_train_epochs num_validation_images optimizer
        pretrained_model_name_or_path prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple
        prodigy_safeguard_warmup prodigy_use_bias_correction random_flip rank repeats report_to revision
        sample_batch_size scale_lr seed text_encoder_lr token_abstraction train_text_encoder train_text_encoder_frac
        train_text_encoder_ti train_text_encoder_ti_frac train_transformer_frac upcast_before_saving use_8bit_adam
        validation_epochs validation_prompt variant weighting_scheme with_prior_preservation
        """,
    ),
    "textual_inversion/textual_inversion.py": (
        "textual-inversion",
        """
        allow_tf32 enable_xformers_memory_efficient_attention gradient_checkpointing initializer_token
        learnable_property lr_num_cycles max_train_steps no_safe_serialization num_train_epochs
        num_validation_images num_vectors placeholder_token pretrained_model_name_or_path repeats report_to revision
        save_as_full_pipeline save_steps scale_lr seed tokenizer_name train_data_dir validation_epochs
        validation_prompt validation_steps variant
        """,
    ),
    "textual_inversion/textual_inversion_sdxl.py": (
        "textual-inversion",
        """
        allow_tf32 enable_xformers_memory_efficient_attention gradient_checkpointing initializer_token
        learnable_property lr_num_cycles max_train_steps num_train_epochs num_validation_images num_vectors
        placeholder_token pretrained_model_name_or_path repeats report_to revision save_as_full_pipeline save_steps
        scale_lr seed train_data_dir use_8bit_adam validation_prompt validation_steps variant
        """,
    ),
    "unconditional_image_generation/train_unconditional.py": (
        "ddpm",
        """
        cache_dir dataset_config_name dataset_name ddpm_beta_schedule ddpm_num_inference_steps ddpm_num_steps
        ema_inv_gamma ema_max_decay ema_power enable_xformers_memory_efficient_attention eval_batch_size
        hub_private_repo logger model_config_name_or_path num_epochs overwrite_output_dir prediction_type
        preserve_input_precision random_flip save_images_epochs save_model_epochs train_data_dir use_ema
        """,
    ),
    "controlnet/train_controlnet.py": (
        "controlnet",
        """
        allow_tf32 cache_dir caption_column conditioning_image_column controlnet_model_name_or_path
        dataset_config_name dataset_name enable_xformers_memory_efficient_attention gradient_checkpointing
        image_column lr_num_cycles lr_power max_grad_norm max_train_samples max_train_steps num_train_epochs
        num_validation_images pretrained_model_name_or_path proportion_empty_prompts report_to revision scale_lr
        seed set_grads_to_none tokenizer_name tracker_project_name train_data_dir use_8bit_adam validation_image
        validation_prompt validation_steps variant
        """,
    ),
    "controlnet/train_controlnet_sdxl.py": (
        "controlnet",
        """
        allow_tf32 cache_dir caption_column conditioning_image_column controlnet_model_name_or_path
        crops_coords_top_left_h crops_coords_top_left_w dataset_config_name dataset_name
        enable_npu_flash_attention enable_xformers_memory_efficient_attention gradient_checkpointing
        image_column image_interpolation_mode lr_num_cycles lr_power max_grad_norm max_train_samples
        max_train_steps num_train_epochs num_validation_images pretrained_model_name_or_path
        pretrained_vae_model_name_or_path proportion_empty_prompts report_to revision scale_lr seed
        set_grads_to_none tokenizer_name tracker_project_name train_data_dir use_8bit_adam validation_image
        validation_prompt validation_steps variant
        """,
    ),
    "controlnet/train_controlnet_sd3.py": (
        "controlnet",
        """
        allow_tf32 cache_dir caption_column conditioning_image_column controlnet_model_name_or_path
        dataset_config_name dataset_name dataset_preprocess_batch_size gradient_checkpointing image_column
        logit_mean logit_std lr_num_cycles lr_power max_grad_norm max_sequence_length max_train_samples
        max_train_steps mode_scale num_extra_conditioning_channels num_train_epochs num_validation_images
        precondition_outputs pretrained_model_name_or_path proportion_empty_prompts report_to revision scale_lr
        seed set_grads_to_none tracker_project_name train_data_dir upcast_vae use_8bit_adam validation_image
        validation_prompt validation_steps variant weighting_scheme
        """,
    ),
    "controlnet/train_controlnet_flux.py": (
        "controlnet",
        """
        allow_tf32 cache_dir caption_column conditioning_image_column controlnet_model_name_or_path
        crops_coords_top_left_h crops_coords_top_left_w dataset_config_name dataset_name
        enable_model_cpu_offload enable_npu_flash_attention enable_xformers_memory_efficient_attention
        gradient_checkpointing guidance_scale image_column image_interpolation_mode jsonl_for_train logit_mean
        logit_std lr_num_cycles lr_power max_grad_norm max_train_samples max_train_steps mode_scale
        num_double_layers num_single_layers num_train_epochs num_validation_images pretrained_model_name_or_path
        pretrained_vae_model_name_or_path proportion_empty_prompts report_to revision save_weight_dtype scale_lr
        seed set_grads_to_none tokenizer_name tracker_project_name use_8bit_adam use_adafactor validation_image
        validation_prompt validation_steps variant weighting_scheme
        """,
    ),
    "t2i_adapter/train_t2i_adapter_sdxl.py": (
        "t2i-adapter",
        """
        adapter_model_name_or_path allow_tf32 cache_dir caption_column conditioning_image_column
        crops_coords_top_left_h crops_coords_top_left_w dataset_config_name dataset_name detection_resolution
        enable_xformers_memory_efficient_attention gradient_checkpointing image_column lr_num_cycles lr_power
        max_grad_norm max_train_samples max_train_steps num_train_epochs num_validation_images
        pretrained_model_name_or_path pretrained_vae_model_name_or_path proportion_empty_prompts report_to
        revision scale_lr seed set_grads_to_none tokenizer_name tracker_project_name train_data_dir
        use_8bit_adam validation_image validation_prompt validation_steps variant
        """,
    ),
    "instruct_pix2pix/train_instruct_pix2pix.py": (
        "instruct-pix2pix",
        """
        allow_tf32 cache_dir conditioning_dropout_prob dataset_config_name dataset_name edit_prompt_column
        edited_image_column enable_xformers_memory_efficient_attention gradient_checkpointing max_grad_norm
        max_train_samples max_train_steps non_ema_revision num_train_epochs num_validation_images
        original_image_column pretrained_model_name_or_path random_flip report_to revision scale_lr seed
        train_data_dir use_8bit_adam use_ema val_image_url validation_epochs validation_prompt variant
        """,
    ),
    "instruct_pix2pix/train_instruct_pix2pix_sdxl.py": (
        "instruct-pix2pix",
        """
        allow_tf32 cache_dir conditioning_dropout_prob crops_coords_top_left_h crops_coords_top_left_w
        dataset_config_name dataset_name edit_prompt_column edited_image_column
        enable_xformers_memory_efficient_attention gradient_checkpointing max_grad_norm max_train_samples
        max_train_steps non_ema_revision num_train_epochs num_validation_images original_image_column
        pretrained_model_name_or_path pretrained_vae_model_name_or_path random_flip report_to revision scale_lr
        seed train_data_dir use_8bit_adam use_ema vae_precision val_image_url_or_path validation_prompt
        validation_steps variant
        """,
    ),
    "custom_diffusion/train_custom_diffusion.py": (
        "custom-diffusion",
        """
        allow_tf32 class_data_dir class_prompt concepts_list enable_xformers_memory_efficient_attention
        freeze_model gradient_checkpointing hflip initializer_token instance_data_dir instance_prompt
        max_grad_norm max_train_steps modifier_token no_safe_serialization noaug num_class_images
        num_train_epochs num_validation_images pretrained_model_name_or_path prior_generation_precision
        prior_loss_weight real_prior report_to revision sample_batch_size scale_lr seed set_grads_to_none
        tokenizer_name use_8bit_adam validation_prompt validation_steps variant with_prior_preservation
        """,
    ),
    "consistency_distillation/train_lcm_distill_sd_wds.py": (
        "lcm",
        """
        allow_tf32 cache_dir cast_teacher_unet ema_decay enable_xformers_memory_efficient_attention
        gradient_checkpointing huber_c interpolation_type loss_type max_grad_norm max_train_samples max_train_steps
        num_ddim_timesteps num_train_epochs pretrained_teacher_model pretrained_vae_model_name_or_path
        proportion_empty_prompts random_flip report_to revision scale_lr seed teacher_revision
        timestep_scaling_factor tracker_project_name train_shards_path_or_url unet_time_cond_proj_dim
        use_8bit_adam vae_encode_batch_size validation_steps w_max w_min
        """,
    ),
    "consistency_distillation/train_lcm_distill_lora_sdxl.py": (
        "lcm",
        """
        allow_tf32 cache_dir caption_column cast_teacher_unet dataset_config_name dataset_name encode_batch_size
        enable_xformers_memory_efficient_attention gradient_checkpointing huber_c image_column interpolation_type
        lora_alpha lora_dropout lora_rank lora_target_modules loss_type max_grad_norm max_train_samples
        max_train_steps num_ddim_timesteps num_train_epochs pretrained_teacher_model
        pretrained_vae_model_name_or_path random_flip report_to revision scale_lr seed teacher_revision
        timestep_scaling_factor tracker_project_name train_data_dir use_8bit_adam use_fix_crop_and_size
        vae_encode_batch_size validation_steps w_max w_min
        """,
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_prior.py": (
        "prior",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name image_column max_grad_norm
        max_train_samples max_train_steps num_train_epochs pretrained_decoder_model_name_or_path
        pretrained_prior_model_name_or_path report_to seed snr_gamma tracker_project_name train_data_dir use_8bit_adam
        use_ema validation_epochs validation_prompts
        """,
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_lora_prior.py": (
        "prior",
        """
        allow_tf32 cache_dir caption_column dataset_config_name dataset_name image_column max_grad_norm
        max_train_samples max_train_steps num_train_epochs num_validation_images
        pretrained_decoder_model_name_or_path pretrained_prior_model_name_or_path rank report_to seed snr_gamma
        train_data_dir use_8bit_adam validation_epochs validation_prompt
        """,
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_decoder.py": (
        "image-decoder",
        """
        allow_tf32 cache_dir dataset_config_name dataset_name enable_xformers_memory_efficient_attention
        gradient_checkpointing image_column max_grad_norm max_train_samples max_train_steps num_train_epochs
        pretrained_decoder_model_name_or_path pretrained_prior_model_name_or_path report_to seed snr_gamma
        tracker_project_name train_data_dir use_8bit_adam use_ema validation_epochs validation_prompts
        """,
    ),
    "kandinsky2_2/text_to_image/train_text_to_image_lora_decoder.py": (
        "image-decoder",
        """
        allow_tf32 cache_dir dataset_config_name dataset_name gradient_checkpointing image_column max_grad_norm
        max_train_samples max_train_steps num_train_epochs num_validation_images
        pretrained_decoder_model_name_or_path pretrained_prior_model_name_or_path rank report_to seed snr_gamma
        train_data_dir use_8bit_adam validation_epochs validation_prompt
        """,
    ),
    "research_projects/autoencoderkl/train_autoencoderkl.py": (
        "autoencoder",
        """
        allow_tf32 cache_dir dataset_config_name dataset_name decoder_only disc_factor disc_learning_rate disc_loss
        disc_lr_scheduler disc_scale disc_start enable_xformers_memory_efficient_attention gradient_checkpointing
        image_column kl_scale lr_num_cycles lr_power max_grad_norm max_train_samples max_train_steps
        model_config_name_or_path num_train_epochs perceptual_scale pretrained_model_name_or_path rec_loss report_to
        revision scale_lr seed set_grads_to_none tracker_project_name train_data_dir use_8bit_adam use_ema
        validation_image
        """,
    ),
}
"""A script, the command that takes its place, and its other flags."""
