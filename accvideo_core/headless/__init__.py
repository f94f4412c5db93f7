"""Whole models at work without ComfyUI: encoding prompts, capturing trajectories, decoding latents, generating videos."""
